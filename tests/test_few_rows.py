"""The fast products of few rows: the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hamner.few_rows import product, speed_up
from hamner.generation import Sampling, generate_batch
from model import ModelConfig, Transformer

GREEDY = Sampling(0.0, 0, 1.0, 1.0, max_new_tokens=30)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (4, 1), (1, 5), (7, 3)])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_products_by_blocks_are_those_of_torch(
    shape: tuple[int, int], capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    weight, x = torch.randn(96, 48), torch.randn(*shape, 48)
    torch.testing.assert_close(product(x, weight), F.linear(x, weight))
    across = torch.randn(*shape[::-1], 48).transpose(0, 1)  # not contiguous
    torch.testing.assert_close(product(across, weight), F.linear(across, weight))
    part = torch.randn(*shape, 60)[..., 5:53]  # of something longer
    torch.testing.assert_close(product(part, weight), F.linear(part, weight))


@pytest.mark.parametrize("vocab_size", [320, 321])  # 321 can't be cut into blocks
def test_a_model_says_the_same_and_keeps_its_weights_names(vocab_size: int) -> None:
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            initializer_range=0.2,
        )
    )  # fmt: skip
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5]]
    expected, names = generate_batch(model, prompts, GREEDY, ()), list(model.state_dict())
    products = []
    with pytest.MonkeyPatch.context() as patch:
        bmm = torch.bmm
        patch.setattr(torch, "bmm", lambda *a: (products.append(1), bmm(*a))[1])
        speed_up(model)
        assert generate_batch(model, prompts, GREEDY, ()) == expected
    assert len({tuple(ids) for ids in expected}) == 2 and len(set(expected[0])) > 3
    assert products and list(model.state_dict()) == names
