"""The training loop, the one that all stages use.

A stage hands over batches and a loss function (`Task`); the loop owns steps, precision,
accumulation, clipping, compilation, activation checkpointing, validation, samples, saving,
resuming and signals.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hamner import checkpoints
from hamner.batches import Batch, MicroBatch, merged_states, on_device
from hamner.errors import UserError
from hamner.generation import Sampling, generate_text
from hamner.machine import (
    Machine,
    autocast,
    prepare_model,
    whole,
    whole_weights,
    without_averaging,
)
from hamner.optim import LossScale, gradient_norm, learning_rate, make_optimizer
from hamner.prefetching import Prefetched
from hamner.recipe import Recipe, StagePart
from hamner.saving import Saver
from hamner.step_records import Health, StepRecords, means
from hamner.tokenization import Tokenizer
from hamner.tracking import (
    MetricsCSV,
    Progress,
    SamplesJSONL,
    Stopwatch,
    TensorBoard,
    now,
    peak_flops,
)
from model import Transformer

COLUMNS = (
    "timestamp", "step", "epoch", "loss", "perplexity", "learning_rate", "grad_norm",
    "skipped_steps", "spikes", "loss_scale", "tokens_per_sec", "mfu", "data_wait", "tokens_total",
    "elapsed_hours", "val_loss",
)  # fmt: skip
SANITY_BATCHES = 2  # validation micro-batches before the first step
EAGER = contextlib.nullcontext()
READ_EVERY = 50  # steps, at most, between two looks at what the device has to tell
# What a rank tells the others before each step; the worst of them holds for all.
GO_ON, STOP, SOURCE_FAILED, SAVE_FAILED = range(4)


class LossFunction(Protocol):
    def __call__(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss of a micro-batch, and further sums to be logged as means."""


def language_modelling(model: nn.Module, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy summed over the labelled tokens; without labels every token is one."""
    input_ids = batch["input_ids"]
    if "labels" not in batch:
        return model(input_ids, input_ids, reduction="sum").loss, {}
    out = model(
        input_ids,
        batch["labels"],
        sequence_ids=batch["sequence_ids"],
        num_labels=batch["num_labels"],
        reduction="sum",
    )
    return out.loss, {}


@dataclass
class Validation:
    """Held-out micro-batches of one source, and its share in the mean over sources."""

    batch: Batch
    share: float = 1.0


@dataclass
class Task:
    """What a stage hands to the loop."""

    stage: str
    batches: Callable[[dict[str, Any] | None], Iterator[Batch]]  # from a data position on
    steps: int
    loss: LossFunction
    validation: dict[str, Validation]
    metrics: tuple[str, ...] = ()  # names of the loss function's further sums
    keep_best: bool = False  # write best.pt whenever validation improves
    patience: int | None = None  # validations without improvement before stopping early
    chat_prompts: bool = False  # samples answer a user instead of continuing a text
    extra: dict[str, Any] = field(default_factory=dict)  # goes into every checkpoint as it is


@dataclass
class Position:
    """How far a run has come, and how it fares; the part of its state that is plain numbers."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0  # steps whose loss or gradient wasn't finite
    skipped_in_a_row: int = 0
    spikes: int = 0
    recent: list[float] = field(default_factory=list)  # losses that the next one is compared with
    best: float = math.inf  # lowest validation loss so far
    since_best: int = 0  # validations since then
    stopped_early: bool = False  # patience ran out, or the epochs did


Sums = dict[str, Tensor]


def add(sums: Sums, values: Mapping[str, Tensor]) -> None:
    """Add values to sums, without asking the device for a number."""
    for key, value in values.items():
        value = value.detach().float()
        sums[key] = sums[key] + value if key in sums else value


class PinnedBatches:
    """The same batches, in page-locked memory: a GPU fetches them while it computes."""

    def __init__(self, batches: Iterator[Batch]):
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        for micro_batch in batch.micro_batches:
            for key, value in micro_batch.items():
                if isinstance(value, Tensor):
                    micro_batch[key] = value.pin_memory()
        return batch

    def close(self) -> None:
        close = getattr(self._batches, "close", None)
        if close is not None and not isinstance(self._batches, types.GeneratorType):
            close()


class Interrupt:
    """Ctrl-C and SIGTERM ask for a stop after the current step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


class Trainer:
    """Runs one stage from where its checkpoint stands to its last step."""

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        model: Transformer,
        tokenizer: Tokenizer,
        machine: Machine,
        resume: checkpoints.Checkpoint | None = None,
        inherit: Mapping[str, Any] | None = None,
        tensorboard: Path | None = None,
    ):
        """
        Args:
            resume: a checkpoint of this stage to go on from, model already loaded.
            inherit: optimizer and scaler of the stage before, where this one continues them.
            tensorboard: folder in which TensorBoard is to find the run, too.
        """
        self.task, self.recipe, self.tokenizer, self.machine = task, recipe, tokenizer, machine
        self.settings: StagePart = recipe.stage(task.stage)
        self.model, self.device = model, machine.device
        self.for_loss = prepare_model(model, recipe, machine)  # its gradients cover all ranks
        self.autocast = autocast(recipe.precision, self.device)
        self.optimizer = make_optimizer(model, self.settings.optimizer)
        self.scale = LossScale(self.device, enabled=recipe.precision == "fp16")
        self.saver = Saver()
        self.tensorboard = tensorboard
        self.board: TensorBoard | None = None
        self.position = Position()
        self.data: dict[str, Any] | None = None
        self._load_state(resume, inherit)
        self._flops = model.config.flops_per_token(self.settings.sequence_length)
        self._peak = peak_flops(self.device, recipe.precision)
        self._records = StepRecords(machine)
        self._health = Health(task.stage, self.position)
        self._since_row: list[dict[str, float]] = []  # records of the steps since the last row
        self._tokens_since_row = 0
        self._waited = 0.0  # seconds spent waiting for batches since the last row

    # ------------------------------------------------------------------ state

    def _load_state(
        self, resume: checkpoints.Checkpoint | None, inherit: Mapping[str, Any] | None
    ) -> None:
        state = resume if resume is not None else inherit
        if state is not None:
            self._load_optimizer(state, resumed=resume is not None)
        if resume is not None:
            self.position = Position(**resume["position"])
            self.data = resume["data"]
            torch.set_rng_state(resume["rng"]["torch"])
            if self.device.type == "cuda" and resume["rng"]["cuda"] is not None:
                torch.cuda.set_rng_state(resume["rng"]["cuda"], self.device)

    def _load_optimizer(self, state: Mapping[str, Any], *, resumed: bool) -> None:
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError:
            kind = self.settings.optimizer.kind
            if resumed:
                raise UserError(
                    f"{self.folder}: this run began with another optimizer than the recipe's "
                    f"{kind}: put the old one back, or begin anew with --fresh"
                ) from None
            print(f"{self.task.stage}: begins with fresh momenta, as its optimizer is {kind} now")
        self.scale.load_state_dict(state["scaler"])

    def _checkpoint(self) -> checkpoints.Checkpoint:
        """The run as it stands; every rank has to call this."""
        self._read_records()
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return checkpoints.make_checkpoint(
            self.model,
            self.tokenizer,
            self.task.stage,
            self.recipe.model_dump(mode="json"),
            weights=whole_weights(self.model, keep=self.machine.leads),
            step=self.position.step,
            steps=self.task.steps,
            position=dict(vars(self.position)),
            optimizer=whole(self.optimizer.state_dict(), keep=self.machine.leads),
            scaler=self.scale.state_dict(),
            data=merged_states(self.machine.gathered(self.data)),
            rng={"torch": torch.get_rng_state(), "cuda": cuda},
            extra=self.task.extra,
        )

    @property
    def folder(self) -> Path:
        return self.recipe.folder(self.task.stage)

    def _save(self) -> None:
        checkpoint = self._checkpoint()
        self._saved_step = self.position.step
        if self.machine.leads:
            self.saver.save(self.folder, checkpoint, self.settings.checkpoint)

    # ------------------------------------------------------------------ the loop

    def run(self) -> int:
        """Train to the last step, or until asked to stop. Returns the exit code."""
        position, task = self.position, self.task
        if position.step >= task.steps or position.stopped_early:
            how = "stopped early at" if position.stopped_early else "stands at"
            print(
                f"{task.stage}: nothing left to do, {self.folder}/latest.pt {how} step "
                f"{position.step:,} of {task.steps:,}; --fresh begins anew"
            )
            return 0
        self._open_logs()
        if task.validation:
            self._validate(limit=SANITY_BATCHES)  # better to fail now than hours later
        self._saved_step = position.step
        self.progress = Progress(task.stage, position.step, task.steps, shown=self.machine.leads)
        self.model.train()
        batches = Prefetched(self._ready(task.batches(self.data)))
        with Interrupt() as interrupt:
            with contextlib.closing(batches), contextlib.closing(self.progress):
                self._train(batches, interrupt)
            return self._finish()  # another signal doesn't cut the last save off

    def _train(self, batches: Prefetched[Batch], interrupt: Interrupt) -> None:
        batch = self._next(batches, interrupt)
        self.watch = Stopwatch()  # the sources took their time to begin; the clock waited
        self._waited = 0.0
        while batch is not None:
            self._step(batch)
            self._after_step(batch)
            if self.position.step >= self.task.steps or self.position.stopped_early:
                return
            batch = self._next(batches, interrupt)
        if not self.machine.highest(interrupt.requested):
            # With other batch sizes than before, the data end sooner.
            self.position.stopped_early = True
            self._saved_step = -1

    def _ready(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, in memory that a GPU can read by itself; made so in the background."""
        if self.device.type != "cuda":
            return batches
        return PinnedBatches(batches)

    def _next(self, batches: Prefetched[Batch], interrupt: Interrupt) -> Batch | None:
        """The next batch; None if there is none, or the run is to stop, on this rank or another.

        Raises:
            UserError: a source can't go on (what has been learnt is saved first), or a checkpoint
                couldn't be written.
        """
        begin, batch, error, code = time.perf_counter(), None, None, SAVE_FAILED
        try:
            self.saver.check()
            code = SOURCE_FAILED
            batch = self._wait_for(batches, interrupt)
            code = STOP if batch is None else GO_ON
        except UserError as caught:
            error = caught
        code = self.machine.highest(code)
        self._waited += time.perf_counter() - begin
        if code == SOURCE_FAILED and self._saved_step != self.position.step:
            self._save()
            self.saver.wait()
        if code in (SOURCE_FAILED, SAVE_FAILED):
            raise error or UserError(f"rank {self.machine.rank} stopped: another can't go on")
        return batch if code == GO_ON else None

    def _wait_for(self, batches: Prefetched[Batch], interrupt: Interrupt) -> Batch | None:
        while not batches.wait(0.2):  # so that a stop is heeded while the network is down
            if interrupt.requested:
                return None
        return None if interrupt.requested else next(batches, None)

    def _open_logs(self) -> None:
        columns = [*COLUMNS, *self.task.metrics]
        for name in self.task.validation:
            columns += [f"val_{name}"] if len(self.task.validation) > 1 else []
        columns += [f"val_{name}" for name in self.task.metrics]
        step = self.position.step
        if self.machine.leads:
            self.csv = MetricsCSV(self.recipe.log(self.task.stage, "metrics.csv"), columns, step)
            self.samples = SamplesJSONL(self.recipe.log(self.task.stage, "samples.jsonl"), step)
            if self.tensorboard is not None:
                self.board = TensorBoard(self.tensorboard, step)

    def _step(self, batch: Batch) -> None:
        """One optimizer step: forward and backward of every micro-batch, clip, update.

        Nothing in here waits for the device.
        """
        steps, settings = self.task.steps, self.settings
        peak = settings.optimizer.learning_rate
        self.rate = learning_rate(self.position.step, steps, peak, settings.schedule)
        self.optimizer.set_learning_rate(self.rate)
        sums: Sums = {}
        for number, micro_batch in enumerate(batch.micro_batches, 1):
            last = number == len(batch.micro_batches)
            with without_averaging(self.for_loss, unless=last):
                self._forward_backward(micro_batch, batch.weight, sums)
        row = self._records.total(sums)
        norm = gradient_norm(self.optimizer.parameters) / self.scale.scale
        finite = (norm.isfinite() & row[0].isfinite()).float()
        self._records.add(row, norm, finite)
        excess = (norm / settings.optimizer.clip).clamp(min=1)
        self.optimizer.step(divisor=self.scale.scale * excess, finite=finite)
        self.optimizer.zero_grad()
        self.scale.update(finite)

    def _forward_backward(self, micro_batch: MicroBatch, weight: float, sums: Sums) -> None:
        """Add a micro-batch's gradients to those of the step, and what it tells to `sums`."""
        with self.autocast:
            loss, metrics = self.task.loss(self.for_loss, on_device(micro_batch, self.device))
        mean = loss / weight
        # The ranks' gradients are averaged, and are to be summed.
        (mean * (self.scale.scale * self.machine.ranks)).backward()
        add(sums, {"loss": mean, **{key: value / weight for key, value in metrics.items()}})

    def _after_step(self, batch: Batch) -> None:
        """Count, log, validate, sample and save, each when its time has come."""
        position, settings = self.position, self.settings
        position.step += 1
        position.tokens += batch.tokens
        self.data = batch.state
        self._tokens_since_row += batch.tokens
        self.progress.advance()
        last = position.step == self.task.steps
        row: dict[str, Any] = {}
        if len(self._records) == READ_EVERY:
            self._read_records()
        if position.step % settings.log_every == 0 or last:
            row = self._metrics_row(batch.epoch)
        if self.task.validation and (position.step % settings.validate_every == 0 or last):
            row |= self.watch.paused(self._validate_and_judge)
        if row and self.machine.leads:
            row = {"timestamp": now(), "step": position.step, **row}
            self.csv.write(row)
            if self.board is not None:
                self.board.write(row)
        if settings.prompts and (position.step % settings.sample_every == 0 or last):
            self.watch.paused(self._write_samples)
        if position.step % settings.checkpoint.every == 0 and not last:
            self.watch.paused(self._save)

    def _finish(self) -> int:
        """Save what isn't saved yet, and say where the run stands. Returns the exit code."""
        step, steps, latest = self.position.step, self.task.steps, self.folder / "latest.pt"
        if self._saved_step != step:
            self._save()
        self.saver.wait()
        if self.board is not None:
            self.board.close()
        if step < steps and not self.position.stopped_early:
            print(
                f"{self.task.stage}: stopped at step {step:,} of {steps:,}, saved as {latest}; "
                "the same command without --fresh goes on from there"
            )
            return 130
        print(f"{self.task.stage}: finished at step {step:,}, saved as {latest}")
        return 0

    # ------------------------------------------------------------------ looking at it

    def _read_records(self) -> None:
        """Fetch what the last steps left on the device, and look at how they went."""
        records = self._records.read()
        first = self.position.step - len(records) + 1
        for step, record in enumerate(records, first):
            told = self._health.look_at(record, step)
            if told is not None:
                self.progress.say(told)
        self._since_row += records

    def _metrics_row(self, epoch: float) -> dict[str, Any]:
        """Means over the steps since the last row, those aside that were skipped."""
        self._read_records()
        seconds = self.watch.lap()
        self.position.seconds += seconds
        averages, speed = means(self._since_row), self._tokens_since_row / seconds
        loss, grad_norm = averages["loss"], self._since_row[-1]["grad_norm"]
        mfu = speed * self._flops / (self._peak * self.machine.ranks) if self._peak else None
        data_wait, self._waited = self._waited / seconds, 0.0
        self._since_row, self._tokens_since_row = [], 0
        self.progress.report(loss, speed, mfu)
        return {
            **averages,
            "epoch": epoch,
            "perplexity": math.exp(loss) if loss < 50 else math.nan,
            "learning_rate": self.rate,
            "grad_norm": grad_norm,
            "skipped_steps": self.position.skipped,
            "spikes": self.position.spikes,
            "loss_scale": float(self.scale.scale),
            "tokens_per_sec": speed,
            "mfu": "" if mfu is None else mfu,
            "data_wait": data_wait,  # share of the time in which the model waited for tokens
            "tokens_total": self.position.tokens,
            "elapsed_hours": self.position.seconds / 3600,
        }

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast:
                yield
        finally:
            self.model.train()

    def _validate(self, limit: int | None = None) -> dict[str, float]:
        """Mean losses and metrics on the held-out batches, by source and over all."""
        result: dict[str, float] = {}
        total_share = sum(validation.share for validation in self.task.validation.values())
        for name, validation in self.task.validation.items():
            with self._evaluating():
                sums = self._validation_sums(validation.batch.micro_batches[:limit])
            averages = {key: total / validation.batch.weight for key, total in sums.items()}
            for key, mean in averages.items():
                share = mean * validation.share / total_share
                result[f"val_{key}"] = result.get(f"val_{key}", 0.0) + share
            if len(self.task.validation) > 1:
                result[f"val_{name}"] = averages["loss"]
        return result

    def _validation_sums(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """Sums of loss and metrics; the ranks share the micro-batches out."""
        rank, ranks = self.machine.rank, self.machine.ranks
        sums: dict[str, float] = {}
        for begin in range(0, len(micro_batches), ranks):
            left = begin + rank < len(micro_batches)
            # A rank that has none left takes another's: with FSDP all have to compute something.
            micro_batch = micro_batches[begin + rank if left else begin]
            loss, metrics = self.task.loss(self.model, on_device(micro_batch, self.device))
            for key, value in {"loss": loss, **metrics}.items():
                sums[key] = sums.get(key, 0.0) + float(value) * left
        totals = self.machine.total(torch.tensor(list(sums.values()), dtype=torch.float64))
        return dict(zip(sums, totals.tolist(), strict=True))

    def _validate_and_judge(self) -> dict[str, float]:
        """Validate; keep best.pt where asked; end the run when patience is out."""
        result, position = self._validate(), self.position
        text = ", ".join(f"{key} {value:.4f}" for key, value in result.items())
        self.progress.say(f"{self.task.stage} step {position.step:,}: {text}")
        improved = result["val_loss"] < position.best
        position.best = min(position.best, result["val_loss"])
        position.since_best = 0 if improved else position.since_best + 1
        if improved and self.task.keep_best:
            checkpoint = self._checkpoint()
            if self.machine.leads:
                self.saver.save_weights(self.folder / "best.pt", checkpoint)
        if self.task.patience is not None and position.since_best >= self.task.patience:
            position.stopped_early = True
            self.progress.say(
                f"{self.task.stage}: no better validation loss than {position.best:.4f} in "
                f"{position.since_best} validations, stopping early"
            )
        return result

    def _write_samples(self) -> None:
        if not self.machine.leads and self.recipe.parallel == "ddp":
            return  # under FSDP no rank can compute without the others
        settings = self.recipe.sampling
        sampling = Sampling(**settings.model_dump(), seed=self.recipe.seed)
        texts = {}
        # A compiled block would be compiled anew for every length of the cache.
        eager = torch.compiler.set_stance("force_eager") if self.recipe.compile else EAGER
        with self._evaluating(), eager:
            for prompt in self.settings.prompts:
                ids = self._prompt_ids(prompt)
                texts[prompt] = "".join(generate_text(self.model, self.tokenizer, ids, sampling))
        if self.machine.leads:
            self.samples.write(self.position.step, self.position.tokens, texts)
            if self.board is not None:
                self.board.write_samples(self.position.step, texts)

    def _prompt_ids(self, prompt: str) -> list[int]:
        if not self.task.chat_prompts:
            return self.tokenizer.encode(prompt)
        message = {"role": "user", "content": prompt}
        return self.tokenizer.chat([message], answer_next=True)[0]
