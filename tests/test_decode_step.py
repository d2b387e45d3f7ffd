"""The step of one token: the model's own numbers, but for the rounding of its weights.

Run without compiling here, which changes no number that counts; compiled once, at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from single_tokens import CONFIG, GREEDY, PROMPT, step_by_step
from torch import nn

from hamner import decode_step
from hamner.decode_step import rounded, speed_up
from hamner.errors import UserError
from hamner.generation import generate_batch, generate_ids
from model import Transformer


@pytest.fixture(autouse=True)
def eager(request: pytest.FixtureRequest) -> Iterator[None]:
    compiled = "compiled" in request.node.name
    with contextlib.nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG).eval()


def with_rounded_weights(model: Transformer, weights: str) -> Transformer:
    """A copy whose matrices have gone through the rounding and back."""
    copy = Transformer(CONFIG).eval()
    copy.load_state_dict(model.state_dict())
    for linear in copy.modules():
        if isinstance(linear, nn.Linear):
            values, scales = rounded(linear, weights)
            exact = values.float() if scales is None else values.float() * scales[:, None]
            linear.weight.data.copy_(exact)
    return copy


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_the_step_is_the_model_with_rounded_weights(model: Transformer, weights: str) -> None:
    ids = torch.randint(0, 320, (40,)).tolist()
    expected = step_by_step(with_rounded_weights(model, weights), ids)
    exact = step_by_step(model, ids)
    speed_up(model, weights)
    found = step_by_step(model, ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - exact).abs().max() > 1e-3  # they were rounded


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_rounding_is_off_by_half_a_step_at_most(weights: str) -> None:
    linear = nn.Linear(48, 50, bias=False)
    weight = linear.weight.data.normal_().mul_(torch.logspace(-6, 3, 50)[:, None])
    values, scales = rounded(linear, weights)
    if scales is None:
        bound = weight.abs() / 256
        found = values.float()
    else:
        bound = (weight.abs().amax(1, keepdim=True) / 127 / 2).expand_as(weight) * 1.001
        found = values.float() * scales[:, None]
    assert ((found - weight).abs() <= bound).all()
    nn.init.zeros_(linear.weight)
    assert not rounded(linear, weights).values.any()


def test_prompts_and_answers_side_by_side_take_the_weights_of_32_bits(model: Transformer) -> None:
    prompts = [PROMPT, PROMPT[:2]]
    together = generate_batch(model, prompts, GREEDY, ())
    with torch.no_grad():
        exact = model(torch.tensor([PROMPT])).logits
    speed_up(model, "int8")
    assert generate_batch(model, prompts, GREEDY, ()) == together
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([PROMPT])).logits, exact)
        labelled = model(torch.tensor([PROMPT[:1]]), torch.tensor([PROMPT[:1]]), reduction="sum")
    assert labelled.loss is not None


def test_compiled_answers_are_the_eager_ones(model: Transformer) -> None:
    if decode_step.why_not_compile(torch.device("cpu")):
        pytest.skip("nothing can be compiled here")
    speed_up(model, "bf16")
    with torch.compiler.set_stance("force_eager"):
        expected = list(generate_ids(model, PROMPT, GREEDY, ()))
    assert list(generate_ids(model, PROMPT, GREEDY, ())) == expected
    assert len(set(expected)) > 5


def test_what_can_not_be_had_is_refused(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        elsewhere = Transformer(CONFIG)
    with pytest.raises(UserError, match="--weights int8 is for the CPU"):
        speed_up(elsewhere, "int8")
    monkeypatch.setattr(decode_step, "why_not_fp16", lambda: "no FBGEMM")
    with pytest.raises(UserError, match="--weights fp16 can't be had: no FBGEMM; take bf16"):
        speed_up(model, "fp16")
    monkeypatch.setattr(decode_step, "why_not_compile", lambda _: "no C++ compiler")
    with pytest.raises(UserError, match=r"--weights bf16 .* can't be: no C\+\+ compiler"):
        speed_up(model, "bf16")
