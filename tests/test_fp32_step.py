"""The step of one token in fp32: the model's own numbers, whoever else is being answered."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hamner import few_rows
from hamner.decode_step import speed_up
from hamner.fp32_step import product_into
from hamner.generation import Sampling, generate_batch, generate_ids
from model import KVCache, ModelConfig, Transformer

CONFIG = ModelConfig(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    initializer_range=0.2, tie_word_embeddings=False,
)  # fmt: skip
UNEVEN = replace(
    CONFIG, vocab_size=321, hidden_size=72, intermediate_size=100
)  # no 32 divides them
GREEDY = Sampling(0.0, 0, 1.0, 1.0, max_new_tokens=30)
PROMPT = [3, 1, 4, 1, 5]


def new_model(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return model


def step_by_step(model: Transformer, ids: list[int]) -> Tensor:
    """Logits (T, V), each of a call with a single id."""
    cache = KVCache(model.config, 1, len(ids))
    with torch.no_grad():
        made = [model(torch.tensor([[id_]]), cache=cache).logits[0, 0] for id_ in ids]
    return torch.stack(made)


@pytest.mark.parametrize("config", [CONFIG, UNEVEN], ids=["blocks", "no blocks"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_step_is_the_model(config: ModelConfig, kv_heads: int) -> None:
    model = new_model(replace(config, num_key_value_heads=kv_heads))
    ids = torch.randint(0, config.vocab_size, (40,)).tolist()
    expected, before = step_by_step(model, ids), dict(model.state_dict())
    calls = []
    speed_up(model)
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(step_by_step(model, ids), expected, atol=5e-5, rtol=1e-5)
    assert not calls  # single tokens went by the step
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    generate_batch(model, [PROMPT, PROMPT], GREEDY, ())
    assert calls  # answers side by side didn't


def test_the_weights_are_in_memory_once() -> None:
    model = new_model(CONFIG)
    speed_up(model)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for parts in (
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [mlp.gate_proj, mlp.up_proj],
    ):
        storages = {part.weight.untyped_storage().data_ptr() for part in parts}
        assert len(storages) == 1


def test_answers_made_at_the_same_time_do_not_mix() -> None:
    model = new_model(CONFIG)
    prompts = [[first, *PROMPT] for first in range(8)]
    expected = [list(generate_ids(model, prompt, GREEDY, ())) for prompt in prompts]
    assert len(set(map(tuple, expected))) == len(prompts)
    speed_up(model)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            made = pool.map(lambda prompt: list(generate_ids(model, prompt, GREEDY, ())), prompts)
            assert list(made) == expected


def test_a_broken_result_is_not_passed_on() -> None:
    """What overwrites its target doesn't read it first: not a number would stay there for good."""
    for size in (64, 65):
        out, weight, x = torch.full((size,), torch.nan), torch.randn(size, 24), torch.randn(24)
        product = product_into(out, weight, x)
        product(beta=0, alpha=2.0)
        torch.testing.assert_close(out, 2 * weight @ x)
        product()
        torch.testing.assert_close(out, 3 * weight @ x)


def test_without_mkl_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step_by_step(new_model(CONFIG), PROMPT)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    model = new_model(CONFIG)
    monkeypatch.setattr(few_rows, "in_blocks", lambda _: pytest.fail("cut into blocks"))
    speed_up(model)
    torch.testing.assert_close(step_by_step(model, PROMPT), expected, atol=1e-5, rtol=1e-5)
