"""Tests of learning-rate schedules, against values worked out by hand, and of AdamW's groups."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hamner.optim import learning_rate, make_optimizer, set_learning_rate
from hamner.recipe import OptimizerPart, SchedulePart
from model import ModelConfig, Transformer

KINDS = ("wsd", "linear", "cosine")
SETTINGS = OptimizerPart(
    learning_rate=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=1.0
)
COUNTS = st.integers(0, 300)


def schedule(kind: str, warmup: int = 0, decay: int = 0, floor: float = 0.0) -> SchedulePart:
    return SchedulePart(kind=kind, warmup=warmup, decay=decay, floor=floor)


def rates(steps: int, peak: float, part: SchedulePart) -> list[float]:
    return [learning_rate(step, steps, peak, part) for step in range(steps)]


def a_model(**shape: int | bool) -> Transformer:
    config = ModelConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8, **shape,
    )  # fmt: skip
    torch.manual_seed(0)
    return Transformer(config)


def test_wsd_warms_up_stays_and_decays_over_the_last_steps() -> None:
    expected = [2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 8.0, 6.5, 5.0, 3.5]
    found = rates(10, 8.0, schedule("wsd", warmup=4, decay=4, floor=0.25))
    assert found == pytest.approx(expected, rel=1e-12)
    assert learning_rate(10, 10, 8.0, schedule("wsd", 4, 4, 0.25)) == pytest.approx(2.0)


def test_wsd_without_decay_is_flat_to_the_end() -> None:
    part = schedule("wsd", warmup=3, decay=0, floor=0.0)
    assert rates(9, 6.0, part) == pytest.approx([2.0, 4.0, *[6.0] * 7], rel=1e-12)
    assert learning_rate(9, 9, 6.0, part) == 6.0


def test_linear_falls_from_the_peak_in_equal_steps() -> None:
    found = rates(10, 8.0, schedule("linear", warmup=2, floor=0.5))
    expected = [4.0, 8.0, 8.0, 7.5, 7.0, 6.5, 6.0, 5.5, 5.0, 4.5]
    assert found == pytest.approx(expected, rel=1e-12)


def test_linear_reaches_exactly_zero_right_after_a_small_last_step() -> None:
    part = schedule("linear", floor=0.0)
    assert learning_rate(0, 400, 0.003, part) == 0.003
    assert learning_rate(399, 400, 0.003, part) == pytest.approx(0.003 / 400, rel=1e-9)
    assert learning_rate(400, 400, 0.003, part) == 0.0


def test_cosine_follows_half_a_wave_down_to_the_floor() -> None:
    part = schedule("cosine", warmup=2, floor=0.1)
    expected = [5.0, 10.0, 10.0]
    # 1 + 9 * (1 + cos(k * 30 degrees)) / 2 for k = 1 ... 5
    root = math.sqrt(3) / 2
    expected += [1 + 9 * (1 + wave) / 2 for wave in (root, 0.5, 0.0, -0.5, -root)]
    assert rates(8, 10.0, part) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(8, 8, 10.0, part) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_floor_of_one_keeps_the_peak(kind: str) -> None:
    assert rates(20, 3.0, schedule(kind, decay=10, floor=1.0)) == [3.0] * 20


@pytest.mark.parametrize("kind", KINDS)
def test_beyond_the_last_step_the_rate_stays_at_the_floor(kind: str) -> None:
    part = schedule(kind, warmup=5, decay=10, floor=0.2)
    assert learning_rate(1_000, 50, 2.0, part) == pytest.approx(0.4, rel=1e-12)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    kind=st.sampled_from(KINDS),
    steps=st.integers(1, 300),
    warmup=COUNTS,
    decay=COUNTS,
    floor=st.floats(0, 1),
    peak=st.floats(1e-6, 10),
)
def test_the_rate_is_positive_rises_while_warming_up_and_never_again(
    kind: str, steps: int, warmup: int, decay: int, floor: float, peak: float
) -> None:
    found = rates(steps, peak, schedule(kind, warmup, decay, floor))
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in found)  # rounding may add a bit
    rising, falling = found[:warmup], found[warmup:]
    assert rising == sorted(rising)
    if falling and warmup:
        assert rising[-1] == pytest.approx(peak, rel=1e-12)
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_stands_once_in_the_optimizer_and_matrices_alone_decay(tied: bool) -> None:
    model = a_model(tie_word_embeddings=tied)
    optimizer = make_optimizer(model, SETTINGS)
    names = {id(p): name for name, p in model.named_parameters()}
    decay = [
        (names[id(p)], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert sorted(name for name, _ in decay) == sorted(names.values())
    assert {name for name, value in decay if value == 0} == {
        n for n in names.values() if "norm" in n
    }
    assert {value for _, value in decay} == {0.0, 0.1}


def test_the_optimizer_takes_its_settings_from_the_recipe() -> None:
    for group in make_optimizer(a_model(), SETTINGS).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.9, 0.95), 1e-8)


def test_frozen_parameters_stay_out_of_the_optimizer() -> None:
    model = a_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    held = [p for g in make_optimizer(model, SETTINGS).param_groups for p in g["params"]]
    assert len(held) == len(list(model.parameters())) - 1
    assert all(p is not model.model.embed_tokens.weight for p in held)


def test_without_gradients_a_step_shrinks_matrices_and_leaves_norms() -> None:
    model = a_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, SETTINGS)
    set_learning_rate(optimizer, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if "norm" in name else 1 - 0.5 * 0.1
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
