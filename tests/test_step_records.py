"""Tests of the steps' records: the numbers as they were, spikes and not noise, skipped steps."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hamner.errors import UserError
from hamner.machine import Machine
from hamner.step_records import ENOUGH, MAX_SKIPPED, WINDOW, Health, StepRecords, means
from hamner.training import Position

CPU = Machine(torch.device("cpu"))
GOOD, BAD = torch.tensor(1.0), torch.tensor(0.0)


def number(value: float) -> Tensor:
    return torch.tensor(value)


def record(loss: float, finite: float = 1.0, grad_norm: float = 0.5) -> dict[str, float]:
    return {"loss": loss, "grad_norm": grad_norm, "finite": finite}


# ------------------------------------------------------------------------------- records


def test_records_come_back_in_order_under_their_names_and_once() -> None:
    records = StepRecords(CPU)
    assert records.read() == []
    for step in range(3):
        row = records.total({"loss": number(step + 0.5), "margin": number(-step)})
        assert row.tolist() == [step + 0.5, -step]
        records.add(row, number(step * 2.0), BAD if step == 1 else GOOD)
    assert len(records) == 3
    assert records.read() == [
        {"loss": 0.5, "margin": 0, "grad_norm": 0, "finite": 1},
        {"loss": 1.5, "margin": -1, "grad_norm": 2, "finite": 0},
        {"loss": 2.5, "margin": -2, "grad_norm": 4, "finite": 1},
    ]
    assert len(records) == 0 and records.read() == []


class Counting(TorchDispatchMode):
    """Counts how often a number is fetched from a tensor."""

    fetched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fetched += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def test_no_number_is_fetched_before_the_reading() -> None:
    records = StepRecords(CPU)
    with Counting() as counting:
        float(number(1.0))
        assert counting.fetched == 1, "this counts nothing"
        for _ in range(5):
            row = records.total({"loss": number(1.0)})
            records.add(row, number(1.0), GOOD)
        assert counting.fetched == 1


def test_the_total_is_over_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(torch.device("cpu"), rank=0, ranks=2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.mul_(2))
    records = StepRecords(machine)
    assert records.total({"loss": number(1.5), "margin": number(2.0)}).tolist() == [3.0, 4.0]


def test_means_leave_out_the_steps_that_were_skipped() -> None:
    rows = [
        {"loss": 1.0, "margin": 4.0, "grad_norm": 1.0, "finite": 1.0},
        {"loss": math.nan, "margin": 100.0, "grad_norm": math.inf, "finite": 0.0},
        {"loss": 3.0, "margin": 2.0, "grad_norm": 9.0, "finite": 1.0},
    ]
    assert means(rows) == {"loss": 2.0, "margin": 3.0}


def test_where_all_steps_were_skipped_the_loss_is_not_a_number() -> None:
    found = means([record(math.nan, finite=0.0)] * 3)
    assert found.keys() == {"loss"} and math.isnan(found["loss"])


# ------------------------------------------------------------------------------- spikes


def told(losses: list[float], state: Position | None = None, first: int = 1) -> dict[int, str]:
    """What is told about a run with these losses, by step."""
    health = Health("base", state or Position())
    said = ((step, health.look_at(record(loss), step)) for step, loss in enumerate(losses, first))
    return {step: text for step, text in said if text is not None}


def test_a_jump_is_told_once_with_its_step_and_numbers() -> None:
    state = Position()
    found = told([4.0, 2.0] * 20 + [30.0] + [3.0] * 20, state)
    assert found == {
        41: "base step 41: the loss jumped to 30, from 3 in the 40 steps before it; "
        "gradient norm 0.5"
    }
    assert state.spikes == 1 and state.skipped == 0


def test_each_jump_is_told() -> None:
    losses = [2.0] * 60
    losses[30], losses[45] = 9.0, 30.0
    state = Position()
    assert list(told(losses, state)) == [31, 46]
    assert state.spikes == 2


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_spike(seed: int) -> None:
    rng = random.Random(seed)
    falling = [2 + 8 * math.exp(-step / 300) + rng.gauss(0, 0.15) for step in range(3_000)]
    assert told(falling) == {}


def test_a_small_jump_is_none_however_smooth_the_losses_were() -> None:
    """A tenth above the mean it takes at least: later in a run losses hardly differ."""
    assert told([2.0] * 50 + [2.19]) == {}
    assert list(told([2.0] * 50 + [2.21])) == [51]


def test_a_jump_within_six_deviations_is_none() -> None:
    noisy = [1.0, 3.0] * 30  # mean 2, standard deviation 1
    assert told([*noisy, 7.9]) == {}
    assert list(told([*noisy, 8.1])) == [61]


def test_a_few_losses_are_not_enough_to_tell_a_spike_from() -> None:
    assert told([2.0] * (ENOUGH - 1) + [50.0]) == {}
    assert list(told([2.0] * ENOUGH + [50.0])) == [ENOUGH + 1]


def test_losses_below_zero_may_spike_too() -> None:
    assert list(told([-2.0] * 50 + [-1.9, -1.0])) == [52]


def test_only_the_last_losses_count_and_no_more_are_kept() -> None:
    state = Position()
    assert told([50.0] * WINDOW + [2.0] * WINDOW + [5.0], state) == {WINDOW * 2 + 1: (
        f"base step {WINDOW * 2 + 1}: the loss jumped to 5, from 2 in the {WINDOW} steps before "
        "it; gradient norm 0.5"
    )}  # fmt: skip
    assert len(state.recent) == WINDOW


def test_counts_and_losses_go_on_from_what_was_saved() -> None:
    losses = [2.0] * 50
    losses[20], losses[40] = 9.0, 9.5
    whole, half = Position(), Position()
    expected = told(losses, whole)
    first = told(losses[:30], half)
    again = Position(**vars(half))  # as a checkpoint holds it
    second = told(losses[30:], again, first=31)
    assert first | second == expected and len(first) == len(second) == 1
    assert vars(again) == vars(whole) and whole.spikes == 2


# ------------------------------------------------------------------------------- skipped steps


def test_skipped_steps_are_counted_and_no_spikes() -> None:
    state = Position()
    health = Health("base", state)
    for step in range(1, 61):
        bad = step in (40, 41, 50)
        assert health.look_at(record(math.nan if bad else 2.0, float(not bad)), step) is None
    assert (state.skipped, state.skipped_in_a_row, state.spikes) == (3, 0, 0)
    assert all(math.isfinite(loss) for loss in state.recent) and len(state.recent) == 57


def test_too_many_in_a_row_are_an_error_with_the_step_and_what_to_do() -> None:
    state = Position()
    health = Health("chat", state)
    health.look_at(record(2.0), 1)
    for step in range(2, MAX_SKIPPED + 1):
        health.look_at(record(math.nan, 0.0), step)
    assert state.skipped_in_a_row == MAX_SKIPPED - 1
    with pytest.raises(UserError) as caught:
        health.look_at(record(math.nan, 0.0), 1_234)
    text = str(caught.value)
    assert text.startswith("chat: no finite loss and gradient in 100 steps in a row, stopped at ")
    assert "step 1,234; " in text and "lower learning rate" in text and "\n" not in text


def test_one_good_step_between_them_begins_the_count_anew() -> None:
    state = Position()
    health = Health("base", state)
    for step in range(1, 4 * MAX_SKIPPED):
        health.look_at(record(2.0, float(step % MAX_SKIPPED == 0)), step)
    assert state.skipped == 4 * MAX_SKIPPED - 1 - 3
    assert state.skipped_in_a_row == MAX_SKIPPED - 1
