"""The training loop, the one that all stages use.

A stage hands over batches and a loss function (`Task`); the loop owns steps, precision,
accumulation, clipping, compilation, activation checkpointing, validation, samples, saving,
resuming and signals.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import shutil
import signal
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hamner import checkpoints
from hamner.batches import Batch, MicroBatch
from hamner.errors import UserError
from hamner.generation import Sampling, generate_text
from hamner.optim import learning_rate, make_optimizer, set_learning_rate
from hamner.prefetching import Prefetched
from hamner.recipe import Recipe, StagePart
from hamner.tokenization import Tokenizer
from hamner.tracking import MetricsCSV, Progress, SamplesJSONL, Stopwatch, now, peak_flops
from model import Transformer

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
COLUMNS = (
    "timestamp", "step", "epoch", "loss", "perplexity", "learning_rate", "grad_norm",
    "skipped_steps", "loss_scale", "tokens_per_sec", "mfu", "data_wait", "tokens_total",
    "elapsed_hours", "val_loss",
)  # fmt: skip
SANITY_BATCHES = 2  # validation micro-batches before the first step
EAGER = contextlib.nullcontext()
MAX_SKIPPED = 100  # steps in a row without a finite gradient before the run gives up


class LossFunction(Protocol):
    def __call__(self, model: Transformer, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss of a micro-batch, and further sums to be logged as means."""


def language_modelling(model: Transformer, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy summed over the labelled tokens; without labels every token is one."""
    input_ids = batch["input_ids"]
    labels = batch.get("labels", input_ids)
    out = model(input_ids, labels, sequence_ids=batch.get("sequence_ids"), reduction="sum")
    assert out.loss is not None
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
    """How far a run has come; the part of its state that is plain numbers."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    best: float = math.inf  # lowest validation loss so far
    since_best: int = 0  # validations since then
    stopped_early: bool = False  # patience ran out, or the epochs did


def pick_device(name: str) -> torch.device:
    """`auto` is cuda if there is one, then mps, then cpu.

    Raises:
        UserError: a device that this machine hasn't got.
    """
    available = {"cpu": True, "mps": torch.backends.mps.is_available()}
    available["cuda"] = torch.cuda.is_available()
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: give auto, cuda, cuda:1, mps or cpu") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not available.get(device.type, False) or (device.index or 0) >= count:
        raise UserError(f"--device {name}: there is no such device here; leave it to auto")
    return device


def why_not_compile(device: torch.device) -> str | None:
    """The reason why torch.compile can't work here; None if it can."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "no C++ compiler"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "no triton"
    return "not supported on mps" if device.type == "mps" else None


def prepare_model(model: Transformer, recipe: Recipe, device: torch.device) -> None:
    """Move the model to its device and apply activation checkpointing and compilation, by block.

    Parameter names stay what they are, so checkpoints know nothing of it.
    """
    model.to(device)
    for layer in model.model.layers:
        if recipe.gradient_checkpointing:
            layer.forward = recomputing(layer.forward)
    if not recipe.compile:
        return
    reason = why_not_compile(device)
    if reason:
        print(f"not compiled: {reason}")
        return
    for layer in model.model.layers:
        layer.compile()


def recomputing(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A forward that keeps its inputs alone and runs again in the backward pass."""

    def recomputed(*inputs: Any) -> Tensor:  # a function of ours, so that it can be compiled
        return checkpoint(forward, *inputs, use_reentrant=False)

    return recomputed


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, PRECISIONS[precision])


Sums = dict[str, Tensor]


def add(sums: Sums, values: Mapping[str, Tensor]) -> None:
    """Add values to sums, without asking the device for a number."""
    for key, value in values.items():
        value = value.detach().float()
        sums[key] = sums[key] + value if key in sums else value


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
        device: torch.device,
        resume: checkpoints.Checkpoint | None = None,
        inherit: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            resume: a checkpoint of this stage to go on from, model already loaded.
            inherit: optimizer and scaler of the stage before, where this one continues them.
        """
        self.task, self.recipe, self.tokenizer, self.device = task, recipe, tokenizer, device
        self.settings: StagePart = recipe.stage(task.stage)
        self.model = model
        prepare_model(model, recipe, device)
        self.autocast = autocast(recipe.precision, device)
        self.optimizer = make_optimizer(model, self.settings.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.position = Position()
        self.data: dict[str, Any] | None = None
        self._load_state(resume, inherit)
        self._flops = model.config.flops_per_token(self.settings.sequence_length)
        self._peak = peak_flops(device)
        self._sums: Sums = {}
        self._sum_steps = self._sum_tokens = self._skipped_in_a_row = 0
        self._waited = 0.0  # seconds spent waiting for batches since the last row

    # ------------------------------------------------------------------ state

    def _load_state(
        self, resume: checkpoints.Checkpoint | None, inherit: Mapping[str, Any] | None
    ) -> None:
        state = resume if resume is not None else inherit
        if state is not None:
            self.optimizer.load_state_dict(self._with_own_settings(state["optimizer"]))
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        if resume is not None:
            self.position = Position(**resume["position"])
            self.data = resume["data"]
            torch.set_rng_state(resume["rng"]["torch"])
            if self.device.type == "cuda" and resume["rng"]["cuda"] is not None:
                torch.cuda.set_rng_state(resume["rng"]["cuda"], self.device)

    def _with_own_settings(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A saved optimizer state whose hyper-parameters are this recipe's, not the saved ones."""
        groups = [
            {**own, "params": saved["params"]}
            for own, saved in zip(
                self.optimizer.state_dict()["param_groups"], state["param_groups"], strict=True
            )
        ]
        return {"state": state["state"], "param_groups": groups}

    def _checkpoint(self) -> checkpoints.Checkpoint:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return checkpoints.make_checkpoint(
            self.model,
            self.tokenizer,
            self.task.stage,
            self.recipe.model_dump(mode="json"),
            step=self.position.step,
            steps=self.task.steps,
            position=dict(vars(self.position)),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            data=self.data,
            rng={"torch": torch.get_rng_state(), "cuda": cuda},
            extra=self.task.extra,
        )

    @property
    def folder(self) -> Path:
        return self.recipe.folder(self.task.stage)

    def _save(self) -> None:
        checkpoints.save_step(self.folder, self._checkpoint(), self.settings.checkpoint)
        self._saved_step = self.position.step

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
        self.progress = Progress(task.stage, position.step, task.steps)
        self.model.train()
        batches = Prefetched(task.batches(self.data))
        with (
            Interrupt() as interrupt,
            contextlib.closing(batches),
            contextlib.closing(self.progress),
        ):
            batch = self._next(batches, interrupt)
            self.watch = Stopwatch()  # the sources took their time to begin; the clock waited
            self._waited = 0.0
            while batch is not None:
                self._step(batch)
                self._after_step(batch)
                if position.step >= task.steps or position.stopped_early:
                    break
                batch = self._next(batches, interrupt)
        if batch is None and not interrupt.requested:
            position.stopped_early = True  # with other batch sizes than before, the data end sooner
            self._save()
        return self._finish()

    def _next(self, batches: Prefetched[Batch], interrupt: Interrupt) -> Batch | None:
        """The next batch; None if there is none or the run is to stop.

        Raises:
            UserError: a source can't go on. What has been learnt is saved first.
        """
        begin = time.perf_counter()
        while not interrupt.requested:
            if batches.wait(0.2):  # so that a stop is heeded while the network is down
                break
        else:
            return None
        try:
            return next(batches, None)
        except UserError:
            if self._saved_step != self.position.step:
                self._save()
            raise
        finally:
            self._waited += time.perf_counter() - begin

    def _open_logs(self) -> None:
        columns = [*COLUMNS, *self.task.metrics]
        for name in self.task.validation:
            columns += [f"val_{name}"] if len(self.task.validation) > 1 else []
        columns += [f"val_{name}" for name in self.task.metrics]
        step = self.position.step
        self.csv = MetricsCSV(self.recipe.log(self.task.stage, "metrics.csv"), columns, step)
        self.samples = SamplesJSONL(self.recipe.log(self.task.stage, "samples.jsonl"), step)

    def _step(self, batch: Batch) -> None:
        """One optimizer step: forward and backward of every micro-batch, clip, update."""
        self.rate = learning_rate(
            self.position.step,
            self.task.steps,
            self.settings.optimizer.learning_rate,
            self.settings.schedule,
        )
        set_learning_rate(self.optimizer, self.rate)
        sums: Sums = {}
        for micro_batch in batch.micro_batches:
            with self.autocast:
                loss, metrics = self.task.loss(self.model, self._on_device(micro_batch))
                mean = loss / batch.weight
            self.scaler.scale(mean).backward()
            add(sums, {"loss": mean, **{k: v / batch.weight for k, v in metrics.items()}})
        self.scaler.unscale_(self.optimizer)
        clip = self.settings.optimizer.clip
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        finite = bool(self.grad_norm.isfinite())
        if finite:
            add(self._sums, sums)
            self._sum_steps += 1
        self._update(finite)
        self.optimizer.zero_grad(set_to_none=True)

    def _update(self, finite: bool) -> None:
        """Apply the gradients if they are finite; count the step as skipped if not."""
        if finite:
            self.scaler.step(self.optimizer)
        else:
            self.position.skipped += 1
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        self.scaler.update()
        if self._skipped_in_a_row >= MAX_SKIPPED:
            raise UserError(
                f"{self.task.stage}: no finite gradient in {MAX_SKIPPED} steps in a row, stopped at"
                f" step {self.position.step:,}; go on from an earlier checkpoint in {self.folder} "
                "with a lower learning rate or precision=fp32"
            )

    def _on_device(self, micro_batch: MicroBatch) -> MicroBatch:
        if self.device.type == "cuda":
            pinned = {key: value.pin_memory() for key, value in micro_batch.items()}
            return {k: v.to(self.device, non_blocking=True) for k, v in pinned.items()}
        return {key: value.to(self.device) for key, value in micro_batch.items()}

    def _after_step(self, batch: Batch) -> None:
        """Count, log, validate, sample and save, each when its time has come."""
        position, settings = self.position, self.settings
        position.step += 1
        position.tokens += batch.tokens
        self.data = batch.state
        self._sum_tokens += batch.tokens
        self.progress.advance()
        last = position.step == self.task.steps
        row: dict[str, Any] = {}
        if position.step % settings.log_every == 0 or last:
            row = self._metrics_row(batch.epoch)
        if self.task.validation and (position.step % settings.validate_every == 0 or last):
            row |= self.watch.paused(self._validate_and_judge)
        if row:
            self.csv.write({"timestamp": now(), "step": position.step, **row})
        if settings.prompts and (position.step % settings.sample_every == 0 or last):
            self.watch.paused(self._write_samples)
        if position.step % settings.checkpoint.every == 0 and not last:
            self.watch.paused(self._save)

    def _finish(self) -> int:
        """Save what isn't saved yet, and say where the run stands. Returns the exit code."""
        step, steps, latest = self.position.step, self.task.steps, self.folder / "latest.pt"
        if self._saved_step != step:
            self._save()
        if step < steps and not self.position.stopped_early:
            print(
                f"{self.task.stage}: stopped at step {step:,} of {steps:,}, saved as {latest}; "
                "the same command without --fresh goes on from there"
            )
            return 130
        print(f"{self.task.stage}: finished at step {step:,}, saved as {latest}")
        return 0

    # ------------------------------------------------------------------ looking at it

    def _metrics_row(self, epoch: float) -> dict[str, Any]:
        """Means over the steps since the last row, those aside that were skipped."""
        means = {key: float(value) / self._sum_steps for key, value in self._sums.items()}
        means.setdefault("loss", math.nan)  # all of them were
        seconds = self.watch.lap()
        self.position.seconds += seconds
        speed = self._sum_tokens / seconds
        mfu = speed * self._flops / self._peak if self._peak else None
        data_wait, self._waited = self._waited / seconds, 0.0
        self._sums, self._sum_steps, self._sum_tokens = {}, 0, 0
        self.progress.report(means["loss"], speed, mfu)
        return {
            **means,
            "epoch": epoch,
            "perplexity": math.exp(means["loss"]) if means["loss"] < 50 else math.nan,
            "learning_rate": self.rate,
            "grad_norm": float(self.grad_norm),
            "skipped_steps": self.position.skipped,
            "loss_scale": self.scaler.get_scale(),
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
            sums: dict[str, float] = {}
            with self._evaluating():
                for micro_batch in validation.batch.micro_batches[:limit]:
                    loss, metrics = self.task.loss(self.model, self._on_device(micro_batch))
                    for key, value in {"loss": loss, **metrics}.items():
                        sums[key] = sums.get(key, 0.0) + float(value)
            means = {key: total / validation.batch.weight for key, total in sums.items()}
            for key, mean in means.items():
                share = mean * validation.share / total_share
                result[f"val_{key}"] = result.get(f"val_{key}", 0.0) + share
            if len(self.task.validation) > 1:
                result[f"val_{name}"] = means["loss"]
        return result

    def _validate_and_judge(self) -> dict[str, float]:
        """Validate; keep best.pt where asked; end the run when patience is out."""
        result, position = self._validate(), self.position
        text = ", ".join(f"{key} {value:.4f}" for key, value in result.items())
        self.progress.say(f"{self.task.stage} step {position.step:,}: {text}")
        improved = result["val_loss"] < position.best
        position.best = min(position.best, result["val_loss"])
        position.since_best = 0 if improved else position.since_best + 1
        if improved and self.task.keep_best:
            best = checkpoints.without_training_state(self._checkpoint())
            checkpoints.write_whole(self.folder / "best.pt", best)
        if self.task.patience is not None and position.since_best >= self.task.patience:
            position.stopped_early = True
            self.progress.say(
                f"{self.task.stage}: no better validation loss than {position.best:.4f} in "
                f"{position.since_best} validations, stopping early"
            )
        return result

    def _write_samples(self) -> None:
        settings = self.recipe.sampling
        sampling = Sampling(**settings.model_dump(), seed=self.recipe.seed)
        texts = {}
        # A compiled block would be compiled anew for every length of the cache.
        eager = torch.compiler.set_stance("force_eager") if self.recipe.compile else EAGER
        with self._evaluating(), eager:
            for prompt in self.settings.prompts:
                ids = self._prompt_ids(prompt)
                texts[prompt] = "".join(generate_text(self.model, self.tokenizer, ids, sampling))
        self.samples.write(self.position.step, self.position.tokens, texts)

    def _prompt_ids(self, prompt: str) -> list[int]:
        if not self.task.chat_prompts:
            return self.tokenizer.encode(prompt)
        message = {"role": "user", "content": prompt}
        return self.tokenizer.chat([message], answer_next=True)[0]
