"""Metrics and samples of runs that nobody trained, as the training loop would have written them.

`PYTHONPATH=. python tests/made_runs.py FOLDER` writes those of a whole v4 run, to be drawn there.
"""

from __future__ import annotations

import csv
import math
import os
import random
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from hamner.optim import learning_rate
from hamner.recipe import STAGES, Recipe, StreamStage, load_recipe
from hamner.tracking import MetricsCSV, SamplesJSONL
from hamner.training import COLUMNS
from train_dpo import METRICS

BEGAN = datetime(2026, 3, 1, tzinfo=timezone.utc)
TOKENS_PER_SECOND = 26_000
STEPS = {"sft": 12_900, "dpo": 30_000}  # of stages whose data decide
TOKENS_PER_STEP = {"sft": 8_050, "dpo": 2_900}
SAID = {
    0.1: "the same, the same of the same and the first of the other, and the first of",
    0.5: "a city of the river, and in the north of the country it is known for its old town.",
    1.0: "Paris. It lies on the Seine, and has been the seat of government for most of a "
    "thousand years; the museums there are among the largest in the world.",
}


def base_loss(tokens: float) -> float:
    """nats per token: about what v4's earlier runs logged, and a power law that goes on."""
    billions = tokens / 1e9
    return 2.72 + 0.62 * (billions + 0.02) ** -0.3 + 5.5 * math.exp(-billions / 0.012)


LOSS: dict[str, Callable[[float, float], float]] = {  # of the share that is done, and of tokens
    "base": lambda share, tokens: base_loss(tokens),
    "anneal": lambda share, tokens: 2.55 - 0.28 * share + 0.5 * math.exp(-share / 0.01),
    "chat": lambda share, tokens: 1.75 - 0.3 * share**0.5 + 0.7 * math.exp(-share / 0.03),
    "sft": lambda share, tokens: 1.5 - 0.22 * share**0.5 + 0.3 * math.exp(-share / 0.02),
    "dpo": lambda share, tokens: 0.693 - 0.12 * share**0.6,
}
NOISE = {"base": 0.035, "anneal": 0.05, "chat": 0.06, "sft": 0.07, "dpo": 0.03}


def dpo_metrics(share: float, noise: float, rng: random.Random) -> dict[str, float]:
    chosen = -0.35 * share + rng.gauss(0, noise)
    rejected = -1.05 * share**0.8 + rng.gauss(0, noise)
    accuracy = 0.5 + 0.22 * share**0.5 + rng.gauss(0, noise)
    values = (chosen, rejected, chosen - rejected, accuracy, -210.0, -190.0)
    return dict(zip(METRICS, values, strict=True))


def write_stage(recipe: Recipe, stage: str, share: float = 1.0, resumed_at: float = 0.31) -> None:
    """Rows and samples of a stage up to a share of it, in a run that was killed and resumed."""
    settings, rng = recipe.stage(stage), random.Random(stage)
    steps: int = getattr(settings, "steps", None) or STEPS[stage]
    sources = [s.name for s in settings.sources] if isinstance(settings, StreamStage) else []
    further = list(METRICS) if stage == "dpo" else []
    columns = [*COLUMNS, *further, *(f"val_{name}" for name in (*sources, *further))]
    path, last = recipe.log(stage, "metrics.csv"), round(share * steps)
    MetricsCSV(path, columns, 0)
    samples = SamplesJSONL(recipe.log(stage, "samples.jsonl"), 0)
    with open(path, "a", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, columns, restval="")
        every = settings.log_every
        for step in [*range(every, last + 1, every), *[last] * (last % every > 0)]:
            rows.writerow(made_row(recipe, stage, step, steps, rng))
            if step % settings.sample_every == 0 or step == steps:
                said = SAID[min(key for key in SAID if key >= step / steps)]
                samples.write(step, step, {prompt: f" {said}" for prompt in settings.prompts})
    if share > resumed_at:
        break_and_resume(path, round(resumed_at * steps))


def break_and_resume(path: Path, step: int) -> None:
    """The file as another writer leaves it: rows after `step` twice, a half line between them."""
    header, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    numbers = [int(line.split(",")[1]) for line in lines]
    before = [line for line, number in zip(lines, numbers, strict=True) if number <= step]
    after = lines[len(before) :]
    lost = [",".join([*line.split(",")[:3], "99", *line.split(",")[4:]]) for line in after[:7]]
    half = after[7][:40] + "\n" if len(after) > 7 else ""
    path.write_text("".join([header, *before, *lost, half, *after]), encoding="utf-8")


def made_row(
    recipe: Recipe, stage: str, step: int, steps: int, rng: random.Random
) -> Mapping[str, Any]:
    settings, share = recipe.stage(stage), step / steps
    tokens = step * tokens_per_step(recipe, stage)
    loss = LOSS[stage](share, tokens) + rng.gauss(0, NOISE[stage])
    speed = TOKENS_PER_SECOND * (0.75 if rng.random() < 0.01 else 1) * rng.gauss(1, 0.006)
    peak, hours = settings.optimizer.learning_rate, tokens / TOKENS_PER_SECOND / 3600
    row: dict[str, Any] = {
        "timestamp": (BEGAN + timedelta(hours=hours)).isoformat(timespec="seconds"),
        "step": step, "epoch": share * getattr(settings, "epochs", 0), "loss": loss,
        "perplexity": math.exp(loss), "skipped_steps": 0, "spikes": 0, "loss_scale": 65536,
        "learning_rate": learning_rate(step - 1, steps, peak, settings.schedule),
        "grad_norm": rng.lognormvariate(-0.9 + 2 * math.exp(-share / 0.005), 0.2),
        "tokens_per_sec": speed, "mfu": speed / 61_000, "data_wait": 0.0004,
        "tokens_total": tokens, "elapsed_hours": hours,
    }  # fmt: skip
    row |= dpo_metrics(share, 0.07, rng) if stage == "dpo" else {}
    if step % settings.validate_every == 0 or step == steps:
        row |= validation(recipe, stage, LOSS[stage](share, tokens), share, rng)
    return {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}


def tokens_per_step(recipe: Recipe, stage: str) -> int:
    settings = recipe.stage(stage)
    if isinstance(settings, StreamStage):
        return settings.sequences_per_step * settings.sequence_length
    return TOKENS_PER_STEP[stage]


def validation(
    recipe: Recipe, stage: str, loss: float, share: float, rng: random.Random
) -> dict[str, float]:
    values = {"val_loss": loss + rng.gauss(0, 0.008)}
    settings = recipe.stage(stage)
    if isinstance(settings, StreamStage):
        middle = (len(settings.sources) - 1) / 2
        for number, source in enumerate(settings.sources):
            values[f"val_{source.name}"] = values["val_loss"] + 0.3 * (number - middle)
    if stage == "dpo":
        values |= {f"val_{name}": value for name, value in dpo_metrics(share, 0.012, rng).items()}
    return values


def write_run(recipe: Recipe) -> None:
    """All five stages, in the current folder."""
    for stage in STAGES:
        write_stage(recipe, stage)


if __name__ == "__main__":
    v4 = load_recipe("v4")
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    os.chdir(sys.argv[1])
    write_run(v4)
