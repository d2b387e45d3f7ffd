"""Where each stage of a run stands, seen from its metrics alone: no checkpoint is opened."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np

from hamner.plan import planned_tokens
from hamner.plots.metrics import Metrics
from hamner.recipe import STAGES, EpochStage, Recipe, StreamStage

NOT_STARTED, RUNNING, STOPPED = "not started", "running", "stopped"
FINISHED, FINISHED_EARLY = "finished", "finished early"
QUIET = 180.0  # seconds without a new row before a run may be taken to have stopped
QUIET_ROWS = 5  # and so many times the seconds between two rows
RECENT = 50  # rows that tell how fast a run is now


@dataclass(frozen=True)
class Standing:
    """One line of the table of stages; None is what isn't known (yet)."""

    stage: str
    state: str
    step: int = 0
    steps: int | None = None  # planned
    epochs: int | None = None  # planned, of a stage that counts them
    tokens: float | None = None
    loss: float | None = None
    val_loss: float | None = None
    hours: float | None = None
    hours_left: float | None = None

    @property
    def finished(self) -> bool:
        return self.state in (FINISHED, FINISHED_EARLY)

    @property
    def share(self) -> float:
        """How much of the stage is done, from 0 to 1; 0 where the whole isn't known."""
        return min(1.0, self.step / self.steps) if self.steps else 0.0


def standings(
    recipe: Recipe, metrics: dict[str, Metrics], now: datetime | None = None
) -> dict[str, Standing]:
    """Of every stage of the recipe, in their order; `now` tells running from stopped."""
    now = now or datetime.now(timezone.utc)
    return {
        stage: standing(recipe, stage, metrics[stage], now)
        if stage in metrics
        else not_started(recipe, stage, metrics)
        for stage in STAGES
    }


def not_started(recipe: Recipe, stage: str, others: dict[str, Metrics]) -> Standing:
    """Its hours are estimated at the speed of the stages before it."""
    settings = recipe.stage(stage)
    tokens = planned_tokens(recipe, stage)
    speed = next(filter(None, map(speed_of, others.values())), None)
    left = tokens / speed / 3600 if tokens is not None and speed else None
    return Standing(
        stage,
        NOT_STARTED,
        steps=getattr(settings, "steps", None),
        epochs=getattr(settings, "epochs", None),
        hours_left=left,
    )


def standing(recipe: Recipe, stage: str, metrics: Metrics, now: datetime) -> Standing:
    steps, speed = planned_steps(recipe, stage, metrics), speed_of(metrics)
    tokens, left = metrics.last("tokens_total"), None
    state = state_of(recipe, stage, metrics, steps, now)
    if state in (FINISHED, FINISHED_EARLY):
        left = 0.0
    elif steps is not None and tokens and speed and metrics.step:
        left = max(0, steps - metrics.step) * tokens / metrics.step / speed / 3600
    return Standing(
        stage,
        state,
        metrics.step,
        steps,
        getattr(recipe.stage(stage), "epochs", None),
        tokens,
        metrics.last("loss"),
        metrics.last("val_loss"),
        metrics.last("elapsed_hours"),
        left,
    )


def planned_steps(recipe: Recipe, stage: str, metrics: Metrics) -> int | None:
    """By the recipe; of a stage that counts epochs also by how far its steps have come in them."""
    settings = recipe.stage(stage)
    if isinstance(settings, StreamStage):
        return settings.steps
    assert isinstance(settings, EpochStage)
    epochs = metrics.series("epoch").finite()
    if not len(epochs.x) or epochs.y[-1] <= 0:
        return settings.steps
    steps = round(epochs.x[-1] * settings.epochs / epochs.y[-1])
    return min(steps, settings.steps or steps)


def state_of(recipe: Recipe, stage: str, metrics: Metrics, steps: int | None, now: datetime) -> str:
    if steps is not None and metrics.step >= steps:
        return FINISHED
    if out_of_patience(recipe, stage, metrics):
        return FINISHED_EARLY
    quiet = (now - metrics.written).total_seconds()
    return RUNNING if quiet < max(QUIET, QUIET_ROWS * seconds_a_row(metrics)) else STOPPED


def out_of_patience(recipe: Recipe, stage: str, metrics: Metrics) -> bool:
    """Whether the stage has stopped early: its validation loss has not improved for long enough."""
    patience = getattr(recipe.stage(stage), "patience", None)
    losses = metrics.series("val_loss").y
    if patience is None or not len(losses):
        return False
    since_best = len(losses) - 1 - int(np.argmin(np.where(np.isnan(losses), np.inf, losses)))
    return since_best >= patience


def seconds_a_row(metrics: Metrics) -> float:
    hours = metrics.series("elapsed_hours").finite().y[-RECENT:]
    return float(np.median(np.diff(hours))) * 3600 if len(hours) > 1 else 0.0


def speed_of(metrics: Metrics) -> float | None:
    """Tokens per second, of late."""
    speeds = metrics.series("tokens_per_sec").finite().y[-RECENT:]
    speed = float(np.median(speeds)) if len(speeds) else 0.0
    return speed if speed > 0 else None
