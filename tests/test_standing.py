"""Where stages stand, as their metrics tell: planned steps, state, and hours that are left."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest

from hamner.plots.metrics import Metrics, Series
from hamner.plots.standing import Standing, standings
from hamner.recipe import Recipe, check_recipe

WRITTEN = datetime(2026, 3, 1, tzinfo=timezone.utc)


@pytest.fixture
def recipe(raw: dict[str, Any]) -> Recipe:
    """base: 1,000 steps of 4 x 64 tokens; sft: 3 epochs; dpo: 2 epochs, at most 500 steps."""
    raw["base"]["steps"] = 1_000
    raw["sft"] |= {"epochs": 3, "patience": 2}
    raw["dpo"]["steps"] = 500
    return check_recipe(raw, "test")


def metrics(step: int, **columns: float | list[float]) -> Metrics:
    """Ten rows up to a step; a number is the last value of a column that grows evenly."""
    found = {}
    for name, values in columns.items():
        ys = values if isinstance(values, list) else values * np.arange(1, 11) / 10
        found[name] = Series(np.linspace(0, step, len(ys) + 1)[1:], np.array(ys, dtype=float))
    return Metrics(step, found, WRITTEN)


def stand(recipe: Recipe, stage: str, of: Metrics, seconds_later: float = 0) -> Standing:
    return standings(recipe, {stage: of}, WRITTEN + timedelta(seconds=seconds_later))[stage]


def test_a_running_stage_tells_how_far_it_is_and_what_is_left(recipe: Recipe) -> None:
    running = metrics(
        250, loss=[4.0, 3.5], val_loss=[3.75], tokens_total=64_000, tokens_per_sec=[20.0] * 10,
        elapsed_hours=1.0,
    )  # fmt: skip
    found = stand(recipe, "base", running, seconds_later=5)
    assert (found.state, found.step, found.steps, found.share) == ("running", 250, 1_000, 0.25)
    assert (found.tokens, found.loss, found.val_loss, found.hours) == (64_000, 3.5, 3.75, 1.0)
    assert found.hours_left == pytest.approx(3 * 64_000 / 20 / 3600)
    assert not found.finished


@pytest.mark.parametrize(("hours", "seconds_later", "state"), [
    (0.01, 120, "running"), (0.01, 200, "stopped"),  # rows come every few seconds
    (10, 3_000, "running"), (10, 6 * 3_600, "stopped"),  # a row an hour
])  # fmt: skip
def test_a_run_is_taken_to_have_stopped_when_rows_stay_away(
    recipe: Recipe, hours: float, seconds_later: float, state: str
) -> None:
    rows = metrics(250, elapsed_hours=hours)
    assert stand(recipe, "base", rows, seconds_later).state == state


def test_a_stage_at_its_last_step_is_finished(recipe: Recipe) -> None:
    found = stand(recipe, "base", metrics(1_000, loss=[2.5]), seconds_later=1e6)
    assert (found.state, found.share, found.hours_left) == ("finished", 1.0, 0.0)
    assert found.finished


def test_steps_of_epochs_follow_from_how_far_the_epochs_are(recipe: Recipe) -> None:
    part = stand(recipe, "sft", metrics(120, epoch=[0.4, 0.9]))
    assert (part.steps, part.epochs, part.share, part.state) == (400, 3, 0.3, "running")
    whole = stand(recipe, "sft", metrics(400, epoch=[1.5, 3]))
    assert (whole.steps, whole.state) == (400, "finished")
    assert stand(recipe, "sft", metrics(10, loss=[1.0])).steps is None
    limited = stand(recipe, "dpo", metrics(500, epoch=[1.0]))
    assert (limited.steps, limited.state) == (500, "finished")
    shorter = stand(recipe, "dpo", metrics(100, epoch=[0.5]))
    assert (shorter.steps, shorter.share) == (400, 0.25)


@pytest.mark.parametrize(("losses", "state"), [
    ([3.0, 2.0, 2.5, 2.25], "finished early"), ([3.0, 2.0, 2.5], "stopped"),
    ([2.0, float("nan"), float("nan")], "finished early"), ([3.0, 2.5, 2.0], "stopped"),
])  # fmt: skip
def test_a_stage_whose_patience_is_out_has_finished_early(
    recipe: Recipe, losses: list[float], state: str
) -> None:
    rows = metrics(120, epoch=[0.9], val_loss=losses)
    found = stand(recipe, "sft", rows, seconds_later=1e6)
    assert (found.state, found.share) == (state, 0.3)
    assert found.finished == (state == "finished early")
    base = stand(recipe, "base", metrics(120, val_loss=losses), seconds_later=1e6)
    assert base.state == "stopped"  # it has no patience


def test_stages_to_come_are_estimated_at_the_speed_so_far(recipe: Recipe) -> None:
    found = standings(recipe, {"base": metrics(10, tokens_per_sec=[100.0] * 10)}, WRITTEN)
    assert list(found) == ["base", "anneal", "chat", "sft", "dpo"]
    anneal, sft = found["anneal"], found["sft"]
    assert (anneal.state, anneal.step, anneal.steps, anneal.share) == ("not started", 0, 12, 0.0)
    assert anneal.hours_left == pytest.approx(12 * 4 * 64 / 100 / 3600)
    assert (sft.steps, sft.epochs, sft.hours_left, sft.loss) == (None, 3, None, None)
    nothing = standings(recipe, {}, WRITTEN)
    assert [each.hours_left for each in nothing.values()] == [None] * 5
