"""One run of a tournament: an entrant, a seed and a round, trained by the loop that all stages use.

A run is a stage `base` of its own, with its own folder: it goes on where it was stopped, and begins
with the weights, the momenta and the place in the data that the round before left.
"""

from __future__ import annotations

import csv
import gc
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hamner import checkpoints
from hamner.batches import Batch, MicroBatch, MixedBatches, held_out_sequences
from hamner.errors import UserError, first_line
from hamner.machine import Machine
from hamner.recipe import CheckpointPart, Recipe, SchedulePart
from hamner.sources import open_stream
from hamner.stage import Start, carry_on, open_mix
from hamner.tokenization import Tokenizer
from hamner.training import LossFunction, Task, Validation
from legacy.experts import taken_balance
from legacy.language_model import LanguageModel
from legacy.tournament_results import Point, Run
from legacy.tournament_rules import Entrant, Rules
from legacy.variants import VariantConfig
from model import Transformer

Opened = tuple[Path, checkpoints.Checkpoint]
STEPS_AHEAD = 50  # whose tokens are made ready; a run is short, and what is left over is wasted
# Of the CUDA driver, of cuBLAS, and of the allocators of a CPU, on Linux and Windows.
NO_ROOM = ("out of memory", "alloc_failed", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class HeldOut:
    """The text that decides: the same sequences (N, T) for every run."""

    rows: Tensor
    bytes: int  # of UTF-8, of all tokens that are predicted: a row's first is not

    @property
    def predicted(self) -> int:
        return self.rows.shape[0] * (self.rows.shape[1] - 1)

    def bits_per_byte(self, loss: float) -> float:
        """From the mean loss of a predicted token, in nats."""
        if not math.isfinite(loss):
            return math.inf
        return loss * self.predicted / math.log(2) / self.bytes

    def validation(self, micro_batch: int) -> Validation:
        parts: list[MicroBatch] = [{"input_ids": ids} for ids in self.rows.split(micro_batch)]
        return Validation(Batch(parts, self.predicted, self.rows.numel(), {}))


def held_out_text(recipe: Recipe, rules: Rules, tokenizer: Tokenizer) -> HeldOut:
    """Held-out sequences of the base stage's sources, as many of each as its weight says.

    Raises:
        UserError: there is none.
    """
    found = []
    sources = recipe.base.sources
    counts = shared_out(rules.held_out_sequences, [source.weight for source in sources])
    for source, count in zip(sources, counts, strict=True):
        documents = open_stream(source.name, recipe, held_out=True)
        rows = held_out_sequences(documents, tokenizer, rules.sequence_length, count)
        if len(rows) < count:
            print(f"source {source.name!r} has {len(rows)} held-out sequences, not {count}")
        found.append(rows.long())
    rows = torch.cat([part for part in found if len(part)] or [torch.empty(0, 1)])
    if not len(rows):
        raise UserError("no held-out text to score on: raise held_out_fraction")
    # The tokenizer works on bytes; a character that the end of a row cuts counts as three.
    size = sum(len(tokenizer.decode(row[1:]).encode()) for row in rows.tolist())
    return HeldOut(rows, size)


def shared_out(count: int, weights: list[float]) -> list[int]:
    """`count` things in proportion to weights, at least one each: the largest remainders win."""
    exact = [count * weight / sum(weights) for weight in weights]
    whole = [max(1, int(share)) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: int(exact[i]) - exact[i])
    for i in by_rest[: max(0, count - sum(whole))]:
        whole[i] += 1
    return whole


def balanced_loss(load_balancing: float) -> LossFunction:
    """Summed cross-entropy whose gradient also evens the experts' load.

    The balance has a gradient but no value here: training loss and score are cross-entropy alone,
    whatever the model.
    """

    def loss(model: nn.Module, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        input_ids = batch["input_ids"]
        total = model(input_ids, input_ids, reduction="sum").loss
        balance = taken_balance(model)
        if balance is None:
            return total, {}
        predicted = input_ids.shape[0] * (input_ids.shape[1] - 1)
        gradient_alone = balance - balance.detach()  # 0
        metrics = {"balance": balance.detach() * predicted}
        return total + load_balancing * predicted * gradient_alone, metrics

    return loss


# ------------------------------------------------------------------------------ a run


@dataclass(frozen=True)
class Ground:
    """What all runs of a tournament have in common."""

    recipe: Recipe
    rules: Rules
    machine: Machine
    tokenizer: Tokenizer
    held_out: HeldOut
    folder: Path  # of the runs' checkpoints
    logs: Path

    def recipe_of(self, entrant: str, seed: int, number: int) -> Recipe:
        """The recipe of a run, which is its stage `base`."""
        rules, part = self.rules, self.rules.rounds[number]
        name = f"{entrant}_seed{seed}_round{number + 1}"
        base = {
            "folder": str(self.folder / name),
            "log": str(self.logs / name),
            "steps": part.steps,
            "sequence_length": rules.sequence_length,
            "sequences_per_step": rules.sequences_per_step,
            "micro_batch": rules.micro_batch,
            "optimizer": rules.optimizer.at(part.learning_rate),
            "schedule": SchedulePart(kind="cosine", warmup=part.warmup, floor=0.0),
            "log_every": rules.log_every,
            "validate_every": rules.validate_every,
            "prompts": [],
            "checkpoint": CheckpointPart(every=rules.checkpoint_every, keep_last=1),
        }
        ahead = STEPS_AHEAD * rules.sequences_per_step * rules.sequence_length
        changes = {
            "read_ahead": min(self.recipe.read_ahead, ahead),
            "base": self.recipe.base.model_copy(update=base),
            "seed": seed,
            "lanes": 1,
            "compile": rules.compile,
            "gradient_checkpointing": rules.gradient_checkpointing,
        }
        return self.recipe.model_copy(update=changes)

    def checkpoints_of(self, entrant: str, seed: int, number: int) -> Path:
        return self.recipe_of(entrant, seed, number).folder("base")


def play(ground: Ground, entrant: Entrant, seed: int, number: int, so_far: Point) -> Run | None:
    """Train a run to its end, from wherever it stands; None if it was asked to stop.

    An entrant that runs out of memory comes back as a failed run, and what it held is free again.
    Any other error is raised: a bug must not pass for a defeat.
    """
    try:
        code = start_of(ground, entrant, seed, number)
        run = None if code else result_of(ground, entrant, seed, number, so_far)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        run = Run(entrant.name, seed, number, failure=first_line(error))
    # Here, where the error no longer holds on to the frames that it passed.
    free_memory(compiled=ground.rules.compile)
    return run


def start_of(ground: Ground, entrant: Entrant, seed: int, number: int) -> int:
    """Train; the exit code of the loop."""
    device = ground.machine.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = opened(ground, entrant, seed, number)
    inherit = carry_on(start.previous, ("optimizer", "scaler"))
    return start.run(task_of(ground, entrant, start), inherit)


def opened(ground: Ground, entrant: Entrant, seed: int, number: int) -> Start:
    """The model of a run with the weights of its own checkpoint, or those of the round before."""
    recipe = ground.recipe_of(entrant.name, seed, number)
    own = newest(recipe.folder("base"))
    before = newest(ground.checkpoints_of(entrant.name, seed, number - 1)) if number else None
    model = cast(Transformer, new_model(entrant, seed))  # the loop asks no more of it
    found = own or before
    if found is not None:
        checkpoints.load_weights(model, found[1]["model"], found[0])
    return Start(
        "base", recipe, recipe.name, ground.machine, model, ground.tokenizer,
        resume=own[1] if own else None, previous=before[1] if before else None,
    )  # fmt: skip


def newest(folder: Path) -> Opened | None:
    return checkpoints.load_newest(folder) if checkpoints.exist_in(folder) else None


def new_model(entrant: Entrant, seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    return entrant.config.build()


def task_of(ground: Ground, entrant: Entrant, start: Start) -> Task:
    settings = start.recipe.base
    left = (start.previous or {}).get("data")  # where the round before was in the data

    def batches(state: dict[str, Any] | None) -> MixedBatches:
        place = state or left
        return open_mix(start, settings, place["sources"] if place else {}, place)

    experts = isinstance(entrant.config, VariantConfig) and entrant.config.num_experts > 1
    return Task(
        stage="base",
        batches=batches,
        steps=settings.steps,
        loss=balanced_loss(ground.rules.load_balancing),
        validation={"held_out": ground.held_out.validation(settings.micro_batch)},
        metrics=("balance",) if experts else (),
    )


def result_of(ground: Ground, entrant: Entrant, seed: int, number: int, so_far: Point) -> Run:
    """What a finished run's log says; its curve goes on from the point `so_far`."""
    path = ground.recipe_of(entrant.name, seed, number).log("base", "metrics.csv")
    rows = validations(path)
    steps, before, _ = so_far
    curve = [
        (
            steps + int(row["step"]),
            before + 3600 * float(row["elapsed_hours"]),
            ground.held_out.bits_per_byte(float(row["val_loss"])),
        )
        for row in rows
    ]
    balance, device = rows[-1].get("val_balance"), ground.machine.device
    return Run(
        entrant.name,
        seed,
        number,
        bits_per_byte=curve[-1][2],
        seconds=curve[-1][1] - before,
        tokens=int(rows[-1]["tokens_total"]),
        balance=float(balance) if balance else None,
        peak_memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        curve=curve,
    )


def validations(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file that tell of a validation.

    Raises:
        UserError: the file is gone, or has none.
    """
    rows: list[dict[str, str]] = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["val_loss"]]
    if not rows:
        raise UserError(
            f"{path}, which tells how a finished run went, is gone or empty: put it back, or begin "
            "the tournament anew with --fresh"
        )
    return rows


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the computer, had no room left; not all who notice have an own error."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return any(words in text for words in NO_ROOM)


def free_memory(*, compiled: bool) -> None:
    """Give back what earlier models held, and forget what was compiled for them."""
    gc.collect()
    if compiled:
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
