"""The step of one token that isn't compiled: the model's own numbers, whoever else is answered."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from single_tokens import CONFIG, GREEDY, PROMPT, step_by_step

from hamner import few_rows
from hamner.decode_step import speed_up
from hamner.eager_step import PRODUCTS, why_not_fp16
from hamner.generation import generate_batch, generate_ids
from model import ModelConfig, Transformer

# None of these can be cut into blocks of 32.
UNEVEN = replace(CONFIG, vocab_size=321, hidden_size=72, intermediate_size=100)


without_fp16 = pytest.mark.skipif(
    why_not_fp16() is not None, reason="no products with weights in fp16 here"
)


def new_model(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return model


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


@without_fp16
def test_weights_in_fp16_are_rounded_and_nothing_else_is() -> None:
    model, copy = new_model(CONFIG), new_model(CONFIG)
    for linear in copy.modules():
        if isinstance(linear, torch.nn.Linear):
            linear.weight.data = linear.weight.data.half().float()
    ids = torch.randint(0, CONFIG.vocab_size, (40,)).tolist()
    exact, expected = step_by_step(model, ids), step_by_step(copy, ids)
    speed_up(model, "fp16")
    found = step_by_step(model, ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert (found - exact).abs().max() > 1e-3  # they were rounded
    with torch.no_grad():  # but for prompts they weren't
        prompt = torch.tensor([PROMPT])
        assert torch.equal(model(prompt).logits, new_model(CONFIG)(prompt).logits)


@pytest.mark.parametrize("weights", ["fp32", pytest.param("fp16", marks=without_fp16)])
@pytest.mark.parametrize("rows", [64, 65])
def test_what_is_put_does_not_look_at_what_was_there(weights: str, rows: int) -> None:
    """Or what isn't a number would stay there for good."""
    weight, x = torch.randn(rows, 24).half().float(), torch.randn(24)
    out = torch.full((rows,), torch.nan)
    product = PRODUCTS[weights](weight, x, out)
    product.put(2.0)
    torch.testing.assert_close(out, 2 * weight @ x)
    product.add()
    torch.testing.assert_close(out, 3 * weight @ x)
    x.neg_()
    torch.testing.assert_close(product.alone(), weight @ x)


def test_without_mkl_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step_by_step(new_model(CONFIG), PROMPT)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    model = new_model(CONFIG)
    monkeypatch.setattr(few_rows, "in_blocks", lambda _: pytest.fail("cut into blocks"))
    speed_up(model)
    torch.testing.assert_close(step_by_step(model, PROMPT), expected, atol=1e-5, rtol=1e-5)
