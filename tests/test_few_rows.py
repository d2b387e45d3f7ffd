"""The fast products of few rows: the same numbers, and where they are taken."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hamner.errors import UserError
from hamner.few_rows import FEW, fast_product, speed_up
from hamner.generation import Sampling, generate_batch
from model import ModelConfig, Transformer

CONFIG = ModelConfig(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
GREEDY = Sampling(0.0, 0, 1.0, 1.0, max_new_tokens=30)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG).eval()


@pytest.mark.parametrize("out", [32, 320, 33])  # 33 can't be cut into blocks
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (4, 1), (1, 5), (7, 3)])
def test_products_by_blocks_are_those_of_torch(out: int, shape: tuple[int, int]) -> None:
    weight, x = torch.randn(out, 48), torch.randn(*shape, 48)
    torch.testing.assert_close(fast_product(weight, "fp32")(x), F.linear(x, weight))
    across = torch.randn(*shape[::-1], 48).transpose(0, 1)  # not contiguous
    torch.testing.assert_close(fast_product(weight, "fp32")(across), F.linear(across, weight))
    part = torch.randn(*shape, 60)[..., 5:53]  # of something longer
    torch.testing.assert_close(fast_product(weight, "fp32")(part), F.linear(part, weight))


@pytest.mark.parametrize("rows", [1, 2, FEW])
def test_weights_of_8_bits_are_off_by_no_more_than_their_rounding(rows: int) -> None:
    weight, x = torch.randn(320, 48), torch.randn(rows, 48)
    found = fast_product(weight, "int8")(x)
    # Half a step of each weight, and 1 in 256 of everything for bf16.
    step = weight.abs().amax(1) / 127
    bound = x.abs().sum(1)[:, None] * step / 2 + (x.abs() @ weight.abs().T + 1) / 128
    assert ((found - x @ weight.T).abs() <= bound).all()
    assert not torch.equal(found, x @ weight.T)
    zeros = fast_product(torch.zeros(32, 48), "int8")(x)
    assert torch.equal(zeros, torch.zeros(rows, 32))


def test_long_inputs_keep_their_32_bits() -> None:
    weight, x = torch.randn(320, 48), torch.randn(FEW + 1, 48)
    assert torch.equal(fast_product(weight, "int8")(x), F.linear(x, weight))


def test_a_model_says_the_same_faster(model: Transformer) -> None:
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5]]
    expected = generate_batch(model, prompts, GREEDY, ())
    names = list(model.state_dict())
    speed_up(model)
    assert generate_batch(model, prompts, GREEDY, ()) == expected
    assert list(model.state_dict()) == names


def test_weights_of_8_bits_give_nearly_the_same_logits(model: Transformer) -> None:
    ids = torch.randint(0, 320, (1, 2))
    with torch.no_grad():
        exact = model(ids).logits
        rounded = copy.deepcopy(model)
        speed_up(rounded, "int8")
        found = rounded(ids).logits
    assert 0 < (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_8_bits_are_refused_where_there_are_none() -> None:
    with torch.device("meta"):
        model = Transformer(replace(CONFIG, num_hidden_layers=1))
    speed_up(model)  # nothing to do
    with pytest.raises(UserError, match="--weights int8 is for the CPU"):
        speed_up(model, "int8")
