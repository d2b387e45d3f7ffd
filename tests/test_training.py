"""The training loop: accumulation, skipped steps, precision, and what passes between stages."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from conftest import Workshop, some_text, write_lines
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train_chat_pretrain
import train_dpo
import train_pretrain
from hamner import checkpoints, machine, stage, step_records, tokenization, training
from hamner.batches import Batch, Example, MicroBatch, make_example, packed_batch
from hamner.errors import UserError, run
from hamner.machine import Machine, pick_device, why_not_compile
from hamner.recipe import Recipe, check_recipe, load_recipe
from hamner.saving import Saver
from hamner.stage import Start, check_needs, resolved, stream_task
from hamner.tokenization import Tokenizer
from hamner.training import Task, Trainer, Validation, language_modelling
from model import IGNORE_INDEX, Transformer

torch.set_num_threads(1)  # more would wait for each other where cores are shared
CPU = Machine(torch.device("cpu"))
Sums = dict[str, Tensor]
Call = Callable[..., int]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = random.Random(3)
    return tokenization.train([some_text(rng, 40) for _ in range(50)], 320)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "peak_flops", lambda *_: None)


def new_model(recipe: Recipe) -> Transformer:
    torch.manual_seed(recipe.seed)
    return Transformer(recipe.model.config())


def full_rows(recipe: Recipe, steps: int, micro_batch: int, sequences: int = 4) -> list[Batch]:
    """Batches of random tokens, all of which carry loss."""
    generator = torch.Generator().manual_seed(5)
    length = recipe.base.sequence_length
    batches = []
    for step in range(steps):
        ids = torch.randint(17, 320, (sequences, length), generator=generator)
        parts: list[MicroBatch] = [{"input_ids": part} for part in ids.split(micro_batch)]
        batches.append(Batch(parts, sequences * (length - 1), ids.numel(), {"row": step + 1}))
    return batches


def packed_rows(recipe: Recipe, steps: int, micro_batch: int) -> list[Batch]:
    """Batches of four packed rows with very different numbers of labels."""
    rng = random.Random(6)
    batches = []
    for step in range(steps):
        rows = []
        for labelled in (1, 3, 15, 28):
            ids = [[rng.randrange(17, 320) for _ in range(30)] for _ in range(2)]
            labels = [[IGNORE_INDEX] * (30 - labelled) + part[30 - labelled :] for part in ids]
            rows.append([make_example(*pair) for pair in zip(ids, labels, strict=True)])
        state = {"row": 4 * (step + 1)}
        length = recipe.base.sequence_length
        batch = packed_batch(rows, length, micro_batch)
        batches.append(dataclasses.replace(batch, state=state, epoch=float(step)))
    return batches


def task_of(rows: list[Batch], **fields: Any) -> Task:
    held_out = {"one": Validation(rows[0])}
    given = {
        "stage": "base",
        "batches": lambda state: iter(rows),
        "steps": len(rows),
        "loss": language_modelling,
        "validation": held_out,
        **fields,
    }
    return Task(**given)


class Recorder(Trainer):
    """Remembers the gradients of every step and the learning rates they were used with."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.gradients: list[dict[str, Tensor]] = []
        step = self.optimizer.step

        def recorded_step(divisor: Tensor, finite: Tensor) -> None:
            named = self.model.named_parameters()
            grads = {name: p.grad / divisor for name, p in named if p.grad is not None}
            self.gradients.append(grads)
            step(divisor, finite)

        self.optimizer.step = recorded_step  # type: ignore[method-assign]


def momenta(trainer: Trainer) -> dict[int, dict[str, Tensor]]:
    """AdamW's state, by the numbers of the parameters."""
    return trainer.optimizer.state_dict()["parts"][0]["state"]


def trained(task: Task, recipe: Recipe, tokenizer: Tokenizer) -> Recorder:
    """A trainer after its run, begun with the recipe's initial weights and without old files."""
    for name in ("checkpoints", "logs"):
        shutil.rmtree(name, ignore_errors=True)
    trainer = Recorder(task, recipe, new_model(recipe), tokenizer, CPU)
    assert trainer.run() == 0
    return trainer


def logged() -> list[dict[str, str]]:
    with open("logs/micro/base_metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def recipe(raw: dict[str, Any]) -> Recipe:
    raw["common"]["log_every"] = 1
    raw["base"]["prompts"] = []
    return check_recipe(raw, "test")


# ------------------------------------------------------------------------------ one step


@pytest.mark.parametrize("rows", [full_rows, packed_rows])
def test_accumulated_micro_batches_give_the_update_of_one_large_batch(
    rows: Callable[..., list[Batch]], recipe: Recipe, tokenizer: Tokenizer
) -> None:
    one, four = (trained(task_of(rows(recipe, 3, n)), recipe, tokenizer) for n in (1, 4))
    assert len(rows(recipe, 1, 1)[0].micro_batches) == 4
    assert len(rows(recipe, 1, 4)[0].micro_batches) == 1
    for name, gradient in one.gradients[0].items():
        torch.testing.assert_close(gradient, four.gradients[0][name], atol=1e-6, rtol=0)
    start = new_model(recipe).state_dict()
    for name, weight in one.model.state_dict().items():
        torch.testing.assert_close(weight, four.model.state_dict()[name], atol=1e-6, rtol=0)
        assert (weight - start[name]).abs().max() > 1e-3, f"{name} was not trained"


def test_the_logged_loss_is_the_mean_over_labelled_tokens(
    recipe: Recipe, tokenizer: Tokenizer
) -> None:
    batches = packed_rows(recipe, 1, 2)
    trained(task_of(batches), recipe, tokenizer)
    model, losses = new_model(recipe), []
    for micro in batches[0].micro_batches:
        losses.append(
            model(micro["input_ids"], micro["labels"], sequence_ids=micro["sequence_ids"],
                  reduction="none").loss.detach()
        )  # fmt: skip
    mean = float(torch.cat(losses).sum()) / (2 * (1 + 3 + 15 + 28))
    assert float(logged()[0]["loss"]) == pytest.approx(mean, rel=1e-5)


def test_gradients_are_clipped_to_the_norm_in_the_recipe(
    raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    raw["common"]["optimizer"]["clip"] = 0.01
    recipe = check_recipe(raw, "test")
    trainer = trained(task_of(full_rows(recipe, 2, 2)), recipe, tokenizer)
    for gradients in trainer.gradients:
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        assert float(norm) == pytest.approx(0.01, rel=1e-3)


# ------------------------------------------------------------------------------ skipped steps


class Unreliable:
    """Language modelling whose loss is NaN in the training steps of these numbers."""

    def __init__(self, bad: range | list[int], micro_batches: int = 2):
        self.bad, self.micro_batches, self.calls = bad, micro_batches, 0

    def __call__(self, model: Transformer, batch: MicroBatch) -> tuple[Tensor, Sums]:
        loss, sums = language_modelling(model, batch)
        if not model.training:
            return loss, sums
        step = self.calls // self.micro_batches
        self.calls += 1
        return (loss * torch.nan if step in self.bad else loss), sums


def test_a_step_with_a_loss_that_is_not_a_number_is_skipped_and_counted(
    recipe: Recipe, tokenizer: Tokenizer
) -> None:
    batches = full_rows(recipe, 6, 2)
    trainer = trained(task_of(batches, loss=Unreliable([1, 2, 4])), recipe, tokenizer)
    assert trainer.position.skipped == 3
    assert trainer.position.step == 6
    assert [row["skipped_steps"] for row in logged()] == ["0", "1", "2", "2", "3", "3"]
    saved = torch.load("checkpoints/micro/base/latest.pt", weights_only=True)
    assert saved["position"]["skipped"] == 3
    for name, weight in trainer.model.state_dict().items():
        assert weight.isfinite().all(), name
    for state in momenta(trainer).values():
        assert int(state["step"]) == 3  # neither weights nor moments have moved in the others
        assert state["exp_avg"].isfinite().all()


def test_a_skipped_step_leaves_the_weights_as_they_are(
    recipe: Recipe, tokenizer: Tokenizer
) -> None:
    batches = full_rows(recipe, 4, 2)
    short = trained(task_of(batches, steps=2), recipe, tokenizer)
    after_two = {name: w.clone() for name, w in short.model.state_dict().items()}
    skipping = trained(task_of(batches, loss=Unreliable([2, 3])), recipe, tokenizer)
    rates = [row["learning_rate"] for row in logged()]
    assert rates[0] != rates[-1]
    whole = trained(task_of(batches), recipe, tokenizer)
    assert any(
        not torch.equal(w, whole.model.state_dict()[name]) for name, w in after_two.items()
    ), "the later steps do nothing anyway"
    same = trained(task_of(batches, steps=4, loss=Unreliable([2, 3])), recipe, tokenizer)
    for name, weight in skipping.model.state_dict().items():
        assert torch.equal(weight, same.model.state_dict()[name])
    assert all(int(s["step"]) == 2 for s in momenta(skipping).values())


def test_too_many_skipped_steps_in_a_row_stop_the_run_with_a_plain_error(
    recipe: Recipe, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_records, "MAX_SKIPPED", 3)
    batches = full_rows(recipe, 30, 2)
    loss = Unreliable([1, 2, *range(5, 30)])  # two in a row are no reason to stop
    trainer = Recorder(task_of(batches, loss=loss), recipe, new_model(recipe), tokenizer, CPU)
    with pytest.raises(UserError, match="gradient in 3 steps in a row, stopped at step 8"):
        trainer.run()
    assert trainer.position.step == 5 + 3
    assert all(weight.isfinite().all() for weight in trainer.model.state_dict().values())


class Forgetful(Trainer):
    """Its optimizer never sees the steps of these numbers."""

    forgotten: tuple[int, ...] = ()

    def _step(self, batch: Batch) -> None:
        step = self.optimizer.step
        if self.position.step in self.forgotten:
            self.optimizer.step = lambda *_, **__: None  # type: ignore[method-assign]
        super()._step(batch)
        self.optimizer.step = step  # type: ignore[method-assign]


def test_a_run_with_a_bad_batch_ends_as_if_the_optimizer_had_never_seen_it(
    recipe: Recipe, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = full_rows(recipe, 8, 2)
    skipping = trained(task_of(batches, loss=Unreliable([3])), recipe, tokenizer)
    assert logged()[-1]["skipped_steps"] == "1" and skipping.position.skipped == 1
    assert [row["loss"] for row in logged()].count("nan") == 1
    monkeypatch.setattr(Forgetful, "forgotten", (3,))
    shutil.rmtree("checkpoints")
    without = Forgetful(task_of(batches), recipe, new_model(recipe), tokenizer, CPU)
    assert without.run() == 0
    undisturbed = trained(task_of(batches), recipe, tokenizer)
    for name, weight in skipping.model.state_dict().items():
        assert weight.isfinite().all(), name
        assert torch.equal(weight, without.model.state_dict()[name]), name
    assert not torch.equal(skipping.model.lm_head.weight, undisturbed.model.lm_head.weight), (
        "the step makes no difference: this shows nothing"
    )


def test_infinite_gradients_under_a_finite_loss_are_skipped_too(
    recipe: Recipe, tokenizer: Tokenizer
) -> None:
    def steep(model: Transformer, batch: MicroBatch) -> tuple[Tensor, Sums]:
        loss, sums = language_modelling(model, batch)
        weight = next(model.parameters())
        return loss + (weight * 0).sum().abs().sqrt(), sums  # its slope at 0 is infinite

    trainer = trained(task_of(full_rows(recipe, 3, 4), loss=steep), recipe, tokenizer)
    assert trainer.position.skipped == 3
    start = new_model(recipe).state_dict()
    assert all(torch.equal(w, start[name]) for name, w in trainer.model.state_dict().items())


def test_where_nothing_is_finite_the_run_stops_and_leaves_the_last_good_checkpoint(
    raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    raw["common"].update(log_every=1_000, checkpoint={"every": 7, "keep_last": 100})
    raw["base"]["prompts"] = []
    recipe = check_recipe(raw, "test")
    rows = full_rows(recipe, 1, 4)
    task = task_of(rows, batches=lambda state: endless(rows), steps=400, validation={},
                   loss=Unreliable(range(7, 400), micro_batches=1))  # fmt: skip
    trainer = Trainer(task, recipe, new_model(recipe), tokenizer, CPU)
    with pytest.raises(UserError, match="in 100 steps in a row, stopped at step 107;"):
        trainer.run()
    assert 107 <= trainer.position.step < 107 + training.READ_EVERY
    trainer.saver.wait()
    good = checkpoints.load(Path("checkpoints/micro/base/step_0000007.pt"))
    latest = checkpoints.load(Path("checkpoints/micro/base/latest.pt"))
    assert good["position"]["skipped"] == 0
    start = new_model(recipe).state_dict()
    for name, weight in good["model"].items():
        assert weight.isfinite().all() and not torch.equal(weight, start[name])
        assert torch.equal(weight, latest["model"][name])  # nothing has moved since


# ------------------------------------------------------------------------------ records of steps


def test_what_the_steps_leave_is_read_every_fifty_steps_at_the_latest(
    raw: dict[str, Any], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw["common"].update(log_every=1_000, checkpoint={"every": 1_000, "keep_last": 1})
    raw["base"]["prompts"] = []
    recipe = check_recipe(raw, "test")
    read: list[int] = []
    original = step_records.StepRecords.read

    def counted(self: step_records.StepRecords) -> list[dict[str, float]]:
        read.append(len(self))
        return original(self)

    monkeypatch.setattr(step_records.StepRecords, "read", counted)
    rows = full_rows(recipe, 1, 4)
    trained(
        task_of(rows, batches=lambda state: endless(rows), steps=120, validation={}),
        recipe,
        tokenizer,
    )
    assert [count for count in read if count] == [50, 50, 20]
    (row,) = logged()
    assert row["step"] == "120" and float(row["loss"]) > 0


class Jumping:
    """Language modelling with a loss ten times as high in the training steps of these numbers."""

    def __init__(self, steps: tuple[int, ...], first: int = 0):
        self.steps, self.step = steps, first

    def __call__(self, model: Transformer, batch: MicroBatch) -> tuple[Tensor, Sums]:
        loss, sums = language_modelling(model, batch)
        if model.training:
            self.step += 1
            loss = loss * (10 if self.step in self.steps else 1)
        return loss, sums


def test_spikes_are_told_once_counted_in_the_csv_and_survive_a_resume(
    raw: dict[str, Any], tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    raw["common"].update(log_every=10, checkpoint={"every": 5, "keep_last": 100})
    raw["base"]["prompts"] = []
    recipe = check_recipe(raw, "test")
    rows = full_rows(recipe, 50, 4)

    def task(first: int) -> Task:
        return task_of(
            rows, batches=lambda state: iter(rows[first:]), loss=Jumping((31, 47), first)
        )

    whole = trained(task(0), recipe, tokenizer)
    told = [line for line in capsys.readouterr().out.splitlines() if "jumped" in line]
    assert [line.split(":")[0] for line in told] == ["base step 31", "base step 47"]
    assert [row["spikes"] for row in logged() if row["loss"]] == ["0", "0", "0", "1", "2"]
    for step in (30, 35):  # just before the first, and between the two
        checkpoint = checkpoints.load(Path(f"checkpoints/micro/base/step_{step:07d}.pt"))
        model = new_model(recipe)
        model.load_state_dict(checkpoint["model"])
        again = Trainer(task(step), recipe, model, tokenizer, CPU, checkpoint)
        assert again.run() == 0
        out = capsys.readouterr().out
        assert out.count("jumped") == (2 if step == 30 else 1)
        assert told[-1] in out.splitlines()
        ours, theirs = ({**vars(t.position), "seconds": 0} for t in (again, whole))
        assert ours == theirs
        assert [row["spikes"] for row in logged() if row["loss"]] == ["0", "0", "0", "1", "2"]


def test_the_logged_loss_is_the_mean_over_the_steps_that_were_not_skipped(
    raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    raw["common"].update(log_every=1)
    raw["base"]["prompts"] = []
    loss = Unreliable([1, 2], micro_batches=1)
    recipe = check_recipe(raw, "test")
    batches = full_rows(recipe, 4, 4)
    trained(task_of(batches, loss=loss), recipe, tokenizer)
    each = [float(row["loss"]) for row in logged()]
    raw["common"].update(log_every=4)
    recipe = check_recipe(raw, "test")
    loss = Unreliable([1, 2], micro_batches=1)
    trained(task_of(batches, loss=loss), recipe, tokenizer)
    (row,) = logged()
    assert float(row["loss"]) == pytest.approx((each[0] + each[3]) / 2, rel=1e-5)


# ------------------------------------------------------------------------------ precision, speed


def test_recomputing_activations_changes_neither_losses_nor_gradients(
    raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    trainers, losses = [], []
    for on in (False, True):
        raw["gradient_checkpointing"] = on
        raw["common"]["log_every"] = 1
        recipe = check_recipe(raw, "test")
        trainers.append(trained(task_of(packed_rows(recipe, 3, 2)), recipe, tokenizer))
        losses.append([row["loss"] for row in logged()])
    assert losses[0] == losses[1]
    for ours, theirs in zip(*(t.gradients for t in trainers), strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-7, rtol=1e-6)


def test_recomputing_activations_runs_every_layer_twice(
    raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    raw["gradient_checkpointing"] = True
    raw["base"]["prompts"] = []
    recipe = check_recipe(raw, "test")
    batches = full_rows(recipe, 1, 4)
    trainer = Trainer(task_of(batches, validation={}), recipe, new_model(recipe), tokenizer, CPU)
    calls: list[str] = []
    for layer in trainer.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append("mlp"))
    assert trainer.run() == 0
    assert len(calls) == 2 * recipe.model.num_hidden_layers


@pytest.mark.skipif(why_not_compile(CPU.device) is not None, reason="no C++ compiler")
def test_compilation_changes_the_losses_by_no_more_than_rounding(
    raw: dict[str, Any],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw["model"]["num_hidden_layers"] = 1
    raw["common"]["log_every"] = 1
    raw["base"]["prompts"] = []
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # starts no processes
    torch._dynamo.utils.counters.clear()
    losses = []
    for on in (False, True):
        raw["compile"] = raw["gradient_checkpointing"] = on  # as the large recipes have it
        recipe = check_recipe(raw, "test")
        trained(task_of(full_rows(recipe, 3, 4), validation={}), recipe, tokenizer)
        losses.append([float(row["loss"]) for row in logged()])
    assert "not compiled" not in capsys.readouterr().out
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert not torch._dynamo.utils.counters["graph_break"]
    saved = torch.load("checkpoints/micro/base/latest.pt", weights_only=True)
    assert saved["model"].keys() == new_model(recipe).state_dict().keys()


def test_without_a_compiler_the_run_says_so_and_goes_on(
    raw: dict[str, Any],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    raw["compile"] = True
    raw["base"]["prompts"] = []
    recipe = check_recipe(raw, "test")
    trained(task_of(full_rows(recipe, 1, 4)), recipe, tokenizer)
    assert "not compiled: no C++ compiler\n" in capsys.readouterr().out


def test_bf16_trains_close_to_fp32_and_keeps_its_weights_in_fp32(
    raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    raw["common"]["log_every"] = 1
    losses: dict[str, list[float]] = {}
    dtypes = set()
    for precision in ("fp32", "bf16"):
        recipe = check_recipe({**raw, "precision": precision}, "test")
        trainer = Recorder(
            task_of(full_rows(recipe, 8, 2)), recipe, new_model(recipe), tokenizer, CPU
        )
        shutil.rmtree("checkpoints", ignore_errors=True)
        mlp = trainer.model.model.layers[0].mlp
        mlp.register_forward_hook(lambda _, inputs, out: dtypes.add(out.dtype))
        assert trainer.run() == 0
        losses[precision] = [float(row["loss"]) for row in logged()]
        assert all(weight.dtype == torch.float32 for weight in trainer.model.state_dict().values())
        assert all(s["exp_avg"].dtype == torch.float32 for s in momenta(trainer).values())
    assert dtypes == {torch.float32, torch.bfloat16}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)
    assert losses["bf16"] != losses["fp32"]


# ------------------------------------------------------------------------------ validation


@pytest.fixture
def start(recipe: Recipe, tokenizer: Tokenizer) -> Start:
    return Start("base", recipe, "micro", CPU, new_model(recipe), tokenizer, None, None)


def test_held_out_documents_are_not_trained_on(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    documents = Tokenizer.documents

    def recorded(self: Tokenizer, texts: list[Any]) -> list[list[int]]:
        read.extend(texts)
        return documents(self, texts)

    monkeypatch.setattr(Tokenizer, "documents", recorded)
    task = stream_task(start)  # tokenises what it validates on
    held_out = set(read)
    read.clear()
    for _, _ in zip(range(220), task.batches(None), strict=False):
        pass
    assert len(held_out) == 3  # enough for two sequences of each source
    assert len(set(read)) > 300, "more than one epoch should have gone by"
    assert len(read) > len(set(read))
    assert not held_out & set(read)


class Watched:
    """Language modelling that remembers whether each call was for training."""

    def __init__(self) -> None:
        self.training: list[bool] = []

    def __call__(self, model: Transformer, batch: MicroBatch) -> tuple[Tensor, Sums]:
        self.training.append(model.training)
        assert torch.is_grad_enabled() == model.training
        return language_modelling(model, batch)


def test_two_validation_batches_of_each_source_run_before_the_first_step(
    recipe: Recipe, tokenizer: Tokenizer
) -> None:
    loss = Watched()
    many = Validation(full_rows(recipe, 1, 1, sequences=5)[0])  # five micro-batches
    few = Validation(full_rows(recipe, 1, 4)[0])  # one
    task = task_of(full_rows(recipe, 2, 4), loss=loss, validation={"many": many, "few": few})
    trained(task, recipe, tokenizer)
    assert loss.training[:4] == [False, False, False, True]


def test_a_validation_that_fails_does_so_before_the_first_step(
    recipe: Recipe, tokenizer: Tokenizer
) -> None:
    def broken(model: Transformer, batch: MicroBatch) -> tuple[Tensor, Sums]:
        if not model.training:
            raise ZeroDivisionError
        raise AssertionError("a step was taken")

    trainer = Trainer(
        task_of(full_rows(recipe, 2, 4), loss=broken), recipe, new_model(recipe), tokenizer, CPU
    )
    with pytest.raises(ZeroDivisionError):
        trainer.run()


def test_validation_is_weighted_like_the_mix(recipe: Recipe, tokenizer: Tokenizer) -> None:
    sides = {
        "web": Validation(full_rows(recipe, 1, 1)[0], share=0.75),
        "books": Validation(packed_rows(recipe, 1, 3)[0], share=0.25),
    }
    trained(task_of(full_rows(recipe, 1, 4), validation=sides), recipe, tokenizer)
    row = logged()[-1]
    web, books = float(row["val_web"]), float(row["val_books"])
    assert abs(web - books) > 1e-3
    assert float(row["val_loss"]) == pytest.approx(0.75 * web + 0.25 * books, rel=1e-5)


# ------------------------------------------------------------------------------ devices


def test_auto_picks_cuda_before_mps_before_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(cuda: bool, mps: bool) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        return pick_device("auto").type

    assert machine(cuda=True, mps=True) == "cuda"
    assert machine(cuda=False, mps=True) == "mps"
    assert machine(cuda=False, mps=False) == "cpu"


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "xpu", "meta"])
def test_a_device_that_is_not_there_is_a_plain_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"--device {name}: there is no such device here"):
        pick_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu:-2"])
def test_a_device_name_that_says_nothing_is_a_plain_error(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name}: "):
        pick_device(name)


def test_the_second_gpu_of_a_machine_with_one_is_a_plain_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(UserError, match="--device cuda:1"):
        pick_device("cuda:1")


# ------------------------------------------------------------------------------ stage to stage


@pytest.fixture
def call(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs a stage script's main in this process."""

    def call(script: types.ModuleType, *arguments: str) -> int:
        workshop.write()
        options = ["--device", "cpu", "--recipe", str(workshop.recipe)]
        monkeypatch.setattr(sys, "argv", ["x", *options, *arguments])
        with pytest.raises(SystemExit) as stop:
            run(script.main)
        return int(stop.value.code or 0)

    return call


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainers that the scripts make; the second and later ones are made but not run."""
    made: list[Trainer] = []
    run_it = Trainer.run

    def run_first(self: Trainer) -> int:
        made.append(self)
        return run_it(self) if len(made) == 1 else 0

    monkeypatch.setattr(Trainer, "run", run_first)
    return made


def test_the_anneal_continues_the_base_stages_optimizer(
    call: Call, trainers: list[Trainer], workshop: Workshop
) -> None:
    workshop.raw["anneal"]["optimizer"] = {"learning_rate": 0.0007, "betas": [0.8, 0.9]}
    assert call(train_pretrain, "--steps", "4") == 0
    assert call(train_pretrain, "--stage", "anneal") == 0
    base, anneal = (trainer.optimizer.state_dict()["parts"][0] for trainer in trainers)
    assert len(anneal["state"]) == len(base["state"]) > 0
    for number, state in base["state"].items():
        assert float(state["exp_avg"].abs().max()) > 0
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(anneal["state"][number][key], state[key])
    for group in anneal["param_groups"]:  # but its hyper-parameters are its own
        assert group["lr"] == 0.0007
        assert tuple(group["betas"]) == (0.8, 0.9)
    assert trainers[1].position.step == 0
    for ours, theirs in zip(trainers[1].model.parameters(), trainers[0].model.parameters()):  # noqa: B905
        assert torch.equal(ours, theirs)


def test_the_chat_stage_begins_with_a_fresh_optimizer_and_the_weights_before_it(
    call: Call, trainers: list[Trainer], workshop: Workshop
) -> None:
    assert call(train_pretrain, "--steps", "4") == 0
    base = str(workshop.folder / "checkpoints/micro/base/latest.pt")
    assert call(train_chat_pretrain, "--checkpoint", base) == 0
    assert momenta(trainers[0])
    assert not momenta(trainers[1])
    for ours, theirs in zip(trainers[1].model.parameters(), trainers[0].model.parameters()):  # noqa: B905
        assert torch.equal(ours, theirs)


def test_the_anneal_reads_on_where_the_base_stage_stopped(
    call: Call, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on: list[int] = []

    def recorded(model: Transformer, batch: MicroBatch) -> tuple[Tensor, Sums]:
        if model.training:
            trained_on.extend(batch["input_ids"].flatten().tolist())
        return language_modelling(model, batch)

    monkeypatch.setattr(stage, "language_modelling", recorded)
    for name in ("base", "anneal"):
        workshop.raw[name]["sources"] = [{"name": "books", "weight": 1.0}]
        workshop.raw[name]["prompts"] = []
    assert call(train_pretrain, "--steps", "5") == 0
    in_base = len(trained_on)
    assert call(train_pretrain, "--stage", "anneal", "--steps", "7") == 0
    assert len(trained_on) == in_base / 5 * 12

    path = workshop.folder / "checkpoints/micro/anneal/latest.pt"
    saved = torch.load(path, weights_only=True)
    tokenizer = tokenization.from_json(saved["tokenizer"])
    whole = "".join("\n" if id_ == tokenizer.end_of_text else tokenizer.decode([id_])
                    for id_ in trained_on)  # fmt: skip
    numbers = [document.split()[1] for document in whole.split("\n")[:-1]]
    assert len(numbers) > 8
    assert len(set(numbers)) == len(numbers), "a document came twice"
    # One long stream: between the stages not a token is lost or repeated.
    recipe = check_recipe(workshop.raw, "test")
    model = Transformer(recipe.model.config())
    alone = stream_task(Start("base", recipe, "micro", CPU, model, tokenizer, None, None))
    tokens: list[int] = []
    for _, batch in zip(range(12), alone.batches(None), strict=False):
        tokens += [id_ for micro in batch.micro_batches for id_ in micro["input_ids"].flatten()]
    assert trained_on == [int(id_) for id_ in tokens]


def test_a_source_that_only_the_later_stage_has_begins_at_its_beginning(
    start: Start, recipe: Recipe
) -> None:
    batches = stream_task(start).batches(None)
    for _ in range(12):
        position = next(batches).state
    chat = dataclasses.replace(start, stage="chat", previous={"data": position})
    first = next(stream_task(chat).batches(None)).state["sources"]
    assert first["talk"][0]["documents"]["epoch"] == 0
    assert first["talk"][0]["documents"]["block"] == 0
    before = position["sources"]["web"][0]["documents"]
    assert (first["web"][0]["documents"]["block"], first["web"][0]["documents"]["document"]) >= (
        before["block"],
        before["document"],
    )
    assert before["block"] > 0


def test_the_time_that_validation_takes_does_not_count_as_training(
    recipe: Recipe, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**9))
    monkeypatch.setattr("hamner.tracking.time.perf_counter", lambda: float(next(clock)))
    slow = Trainer._validate

    def validate(self: Trainer, limit: int | None = None) -> dict[str, float]:
        for _ in range(1000):
            next(clock)
        return slow(self, limit)

    monkeypatch.setattr(Trainer, "_validate", validate)
    trainer = trained(task_of(full_rows(recipe, 12, 4)), recipe, tokenizer)
    assert trainer.position.seconds < 200


def endless(batches: list[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches


def test_the_run_takes_exactly_as_many_steps_as_asked(recipe: Recipe, tokenizer: Tokenizer) -> None:
    batches = full_rows(recipe, 2, 4)
    task = task_of(batches, batches=lambda state: endless(batches), steps=7)
    trainer = trained(task, recipe, tokenizer)
    assert len(trainer.gradients) == 7
    assert [row["step"] for row in logged()] == [str(n) for n in range(1, 8)]
    assert trainer.position.tokens == 7 * 4 * recipe.base.sequence_length


def test_documents_of_a_source_come_in_the_share_of_its_weight(start: Start) -> None:
    batches = stream_task(start).batches(None)
    for _ in range(25):
        drawn = next(batches).state["drawn"]
    assert drawn == {"web": 60, "books": 40}


def test_an_empty_source_is_named_before_anything_is_trained(workshop: Workshop) -> None:
    write_lines(workshop.folder / "texts/books.jsonl", [])
    with pytest.raises(UserError, match="source 'books' is empty"):
        check_needs("base", load_recipe(str(workshop.recipe)), new=True)


# ------------------------------------------------------------------------------ waiting for data


def slow_batches(rows: list[Batch], seconds: float) -> Iterator[Batch]:
    for batch in rows:
        time.sleep(seconds)
        yield batch


def test_the_metrics_tell_what_share_of_the_time_was_spent_waiting_for_data(
    recipe: Recipe, tokenizer: Tokenizer
) -> None:
    rows = full_rows(recipe, 6, 4)
    trained(task_of(rows, batches=lambda state: slow_batches(rows, 0.25)), recipe, tokenizer)
    waiting = [float(row["data_wait"]) for row in logged()]
    assert all(share > 0.5 for share in waiting[1:]), waiting  # a step here takes some 20 ms
    trained(task_of(rows), recipe, tokenizer)
    assert sum(float(row["data_wait"]) for row in logged()[1:]) < sum(waiting[1:])


def test_what_has_been_learnt_is_saved_when_a_source_can_not_go_on(
    recipe: Recipe, tokenizer: Tokenizer
) -> None:
    def batches(state: Any) -> Iterator[Batch]:
        yield from full_rows(recipe, 5, 4)
        raise UserError("source 'web': can't reach it")

    task = task_of(full_rows(recipe, 8, 4), batches=batches)
    trainer = Trainer(task, recipe, new_model(recipe), tokenizer, CPU)
    with pytest.raises(UserError, match="can't reach it"):
        trainer.run()
    saved = torch.load("checkpoints/micro/base/latest.pt", weights_only=True)
    assert saved["step"] == 5 and saved["data"] == {"row": 5}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_waits_for_the_network_can_be_stopped(
    recipe: Recipe, tokenizer: Tokenizer, number: signal.Signals
) -> None:
    gone_on = threading.Event()

    def batches(state: Any) -> Iterator[Batch]:
        yield from full_rows(recipe, 4, 4)
        threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
        gone_on.wait(5)

    task = task_of(full_rows(recipe, 8, 4), batches=batches)
    trainer = Trainer(task, recipe, new_model(recipe), tokenizer, CPU)
    threading.Timer(2.0, gone_on.set).start()
    assert trainer.run() == 130
    assert torch.load("checkpoints/micro/base/latest.pt", weights_only=True)["step"] == 4


def test_validation_stays_what_it_was_when_a_run_goes_on(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint holds its sequences: hub streams need not be read for them again."""
    task = stream_task(start)
    start.resume = {"extra": task.extra}
    monkeypatch.setattr("hamner.stage.held_out_sequences", lambda *_: pytest.fail("read again"))
    again = stream_task(start)
    for name, validation in task.validation.items():
        parts = again.validation[name].batch.micro_batches
        for mine, other in zip(validation.batch.micro_batches, parts, strict=True):
            assert torch.equal(mine["input_ids"], other["input_ids"])


def test_a_token_cache_changes_no_batch_and_saves_the_second_run_its_tokenising(
    start: Start, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def rows(recipe: Recipe) -> list[Tensor]:
        batches = stream_task(dataclasses.replace(start, recipe=recipe)).batches(None)
        found = [next(batches).micro_batches[0]["input_ids"] for _ in range(12)]
        batches.close()  # type: ignore[attr-defined]
        return found

    plain = rows(start.recipe)
    cached = start.recipe.model_copy(update={"token_cache": str(tmp_path / "tokens")})
    first = rows(cached)
    assert list((tmp_path / "tokens").rglob("*.tokens"))
    start.resume = {"extra": stream_task(start).extra}  # validation is read without the cache
    monkeypatch.setattr(Tokenizer, "documents", lambda *_: pytest.fail("tokenised again"))
    for one, two, three in zip(plain, first, rows(cached), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


# ------------------------------------------------------------------------------ saving meanwhile


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """As a full disk: what is written beyond fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def saves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is taken while a checkpoint is written, so that it is known which comes after."""
    save = Saver.save

    def save_and_wait(self: Saver, *arguments: Any) -> None:
        save(self, *arguments)
        assert self._thread is not None
        self._thread.join()

    monkeypatch.setattr(Saver, "save", save_and_wait)


@pytest.mark.usefixtures("saves_at_once")
@pytest.mark.parametrize("steps", ["12", "6"])  # the save of step 6 is not the last; it is
def test_a_save_that_fails_stops_the_run_with_a_sentence_and_leaves_the_last_good_one(
    steps: str, call: Call, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop.raw["common"]["log_every"] = 1
    assert call(train_pretrain, "--steps", "4") == 0
    folder = workshop.folder / "checkpoints/micro/base"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"step_0000003.pt", "step_0000004.pt", "latest.pt"}
    capsys.readouterr()
    with files_no_larger_than(100_000):
        assert call(train_pretrain, "--steps", steps) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: can't write checkpoints/micro/base/step_0000006.pt (")
    assert "free some space" in error and "intact" in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert logged()[-1]["step"] == "6", "the run went on after the failure"
    assert call(train_pretrain, "--steps", "12") == 0  # with room again it goes on
    assert checkpoints.load(folder / "latest.pt")["step"] == 12


def test_a_run_does_not_wait_for_the_disk(
    recipe: Recipe, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are taken while a checkpoint is being written, and what is written is of its step."""
    gone_on = threading.Event()
    write, steps = checkpoints.write_whole, {}

    def slow(path: Path, checkpoint: dict[str, Any]) -> None:
        if path.name == "step_0000003.pt":
            assert gone_on.wait(20), "the run waits for the checkpoint"
        write(path, checkpoint)

    def noted(model: Transformer, batch: MicroBatch) -> tuple[Tensor, Sums]:
        if model.training:
            steps[len(steps)] = model.model.norm.weight.detach().clone()
            if len(steps) == 6:
                gone_on.set()
        return language_modelling(model, batch)

    monkeypatch.setattr(checkpoints, "write_whole", slow)
    trained(task_of(full_rows(recipe, 6, 4), loss=noted, validation={}), recipe, tokenizer)
    saved = checkpoints.load(Path("checkpoints/micro/base/step_0000003.pt"))
    assert torch.equal(saved["model"]["model.norm.weight"], steps[3])
    assert not torch.equal(steps[3], steps[5])


# ------------------------------------------------------------------------------ auto

GIB = 2**30


@pytest.fixture
def with_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets what the device has free, in GiB."""
    return lambda gib: monkeypatch.setattr(stage, "free_memory", lambda device: round(gib * GIB))


def decided(recipe: Recipe, name: str, device: str) -> tuple[Any, Any, Any]:
    recipe = resolved(recipe, name, Machine(torch.device(device)))
    return recipe.precision, recipe.compile, recipe.gradient_checkpointing


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("name", ["base", "sft", "dpo"])
def test_auto_is_decided_for_the_device(
    name: str,
    bf16: bool,
    with_memory: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "cpu_multiplies_bf16", lambda: bf16)
    on_cpu = "bf16" if bf16 else "fp32"
    recipe = load_recipe("v4")
    assert {recipe.precision, recipe.compile, recipe.gradient_checkpointing} == {"auto"}
    with_memory(1_000)
    assert decided(recipe, name, "cuda") == ("fp16", True, False)
    assert decided(recipe, name, "cpu") == (on_cpu, False, False)
    with_memory(2)
    assert decided(recipe, name, "cuda") == ("fp16", True, True)
    assert decided(recipe, name, "cpu") == (on_cpu, False, True)


def test_what_the_recipe_says_is_not_decided_again(with_memory: Callable[[float], None]) -> None:
    said = ["precision=bf16", "compile=false", "gradient_checkpointing=true"]
    with_memory(1_000)
    assert decided(load_recipe("v4", said), "base", "cuda") == ("bf16", False, True)
    said = ["precision=fp32", "compile=true", "gradient_checkpointing=false"]
    with_memory(0.001)
    assert decided(load_recipe("v4", said), "base", "cpu") == ("fp32", True, False)


def test_activations_are_recomputed_where_memory_is_short_and_not_elsewhere(
    with_memory: Callable[[float], None],
) -> None:
    """More memory never turns it on; and there is a point at which it turns off."""
    found = []
    for gib in (1, 2, 4, 8, 16, 32, 64, 128):
        with_memory(gib)
        found.append(decided(load_recipe("v4"), "base", "cuda")[2])
    assert found == sorted(found, reverse=True) and found[0] and not found[-1]


def test_a_run_says_what_was_decided(
    call: Call,
    workshop: Workshop,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "cpu_multiplies_bf16", lambda: True)
    workshop.raw.update(precision="auto", compile="auto", gradient_checkpointing="auto")
    assert call(train_pretrain, "--steps", "1") == 0
    assert "parameters on cpu, bf16, from nothing\n" in capsys.readouterr().out
    path = workshop.folder / "checkpoints/micro/base/latest.pt"
    kept = checkpoints.load(path)["recipe"]
    assert (kept["precision"], kept["compile"]) == ("bf16", False)


# ------------------------------------------------------------------------------ no waiting


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device: asking for a number, or for a shape."""

    refused = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        assert name not in self.refused, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def preference_batch(recipe: Recipe) -> Batch:
    rng = random.Random(8)

    def answer(length: int) -> Example:
        ids = [rng.randrange(17, 320) for _ in range(length)]
        return make_example(ids, [IGNORE_INDEX] * 5 + ids[5:])

    pairs = [train_dpo.Pair(answer(20 + i), answer(30 - i)) for i in range(6)]
    return train_dpo.pair_batch(pairs, range(6), torch.zeros(2, 6) - 20, recipe.dpo)


@pytest.mark.parametrize("kind", ["stream", "sft", "dpo", "dpo, ipo and sft"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_device(
    kind: str, precision: str, raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        float(torch.ones(1))
    raw["precision"] = precision
    if "ipo" in kind:
        raw["dpo"].update(loss="ipo", sft_weight=0.5)
    recipe, name = check_recipe(raw, "test"), kind[:3]
    given: dict[str, Any] = {}
    if name == "dpo":
        batch = preference_batch(recipe)
        given = {"stage": "dpo", "loss": partial(train_dpo.dpo_loss, settings=recipe.dpo)}
    else:
        batch = (packed_rows if name == "sft" else full_rows)(recipe, 1, 2)[0]
    assert len(batch.micro_batches) == 2
    task = task_of([batch], **given)
    trainer = Trainer(task, recipe, new_model(recipe), tokenizer, CPU)
    trainer.model.model.compiled = True  # packed rows by a mask, as on a GPU
    before = trainer.model.lm_head.weight.detach().clone()
    for _ in range(2):  # the first makes the optimizer's state
        with NoWaiting():
            trainer._step(batch)
    assert not torch.equal(before, trainer.model.lm_head.weight)
    assert all(record["finite"] for record in trainer._records.read())


# ------------------------------------------------------------------------------ muon


def test_a_run_with_muon_learns_and_goes_on_exactly(call: Call, workshop: Workshop) -> None:
    workshop.raw["common"]["optimizer"]["kind"] = "muon"
    workshop.raw["common"]["log_every"] = 3
    assert call(train_pretrain) == 0
    folder = workshop.folder / "checkpoints/micro/base"
    whole = checkpoints.load(folder / "latest.pt")
    assert len(whole["optimizer"]["parts"]) == 2
    losses = [float(row["loss"]) for row in logged() if row["loss"]]
    assert losses[-1] < losses[0] - 0.2
    assert call(train_pretrain, "--checkpoint", str(folder / "step_0000009.pt")) == 0
    again = checkpoints.load(folder / "latest.pt")
    assert [float(row["loss"]) for row in logged() if row["loss"]] == losses
    for name, weight in whole["model"].items():
        assert torch.equal(weight, again["model"][name]), name


@pytest.mark.parametrize("kinds", [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizer_is_refused_in_the_middle_of_a_stage(
    kinds: tuple[str, str],
    call: Call,
    workshop: Workshop,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workshop.raw["common"]["optimizer"]["kind"] = kinds[0]
    assert call(train_pretrain, "--steps", "3") == 0
    workshop.raw["common"]["optimizer"]["kind"] = kinds[1]
    capsys.readouterr()
    assert call(train_pretrain, "--steps", "5") == 2
    assert capsys.readouterr().err == (
        "error: checkpoints/micro/base: this run began with another optimizer than the recipe's "
        f"{kinds[1]}: put the old one back, or begin anew with --fresh\n"
    )


@pytest.mark.parametrize("kinds", [("adamw", "muon"), ("muon", "adamw")])
def test_the_anneal_may_have_another_optimizer_and_begins_with_fresh_momenta_then(
    kinds: tuple[str, str],
    call: Call,
    workshop: Workshop,
    trainers: list[Trainer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, kind in zip(("base", "anneal"), kinds, strict=True):
        workshop.raw[name]["optimizer"] = {"learning_rate": 0.003, "kind": kind}
    assert call(train_pretrain, "--steps", "3") == 0
    assert call(train_pretrain, "--stage", "anneal") == 0
    told = f"anneal: begins with fresh momenta, as its optimizer is {kinds[1]} now\n"
    assert told in capsys.readouterr().out
    base, anneal = trainers
    assert all(part["state"] for part in base.optimizer.state_dict()["parts"])
    assert not any(part["state"] for part in anneal.optimizer.state_dict()["parts"])


# ------------------------------------------------------------------------------ TensorBoard


@pytest.fixture
def later_files_have_later_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads files in the order of the seconds in which they were begun."""
    seconds = itertools.count(1_800_000_000)
    clock = types.SimpleNamespace(time=lambda: float(next(seconds)))
    monkeypatch.setattr(event_file_writer, "time", clock)


def seen_in_tensorboard(folder: str, tag: str) -> dict[int, Any]:
    """What TensorBoard shows, by step; every step once."""
    events = EventAccumulator(folder, size_guidance={"tensors": 0}).Reload().Tensors(tag)
    assert len({event.step for event in events}) == len(events)
    return {event.step: make_ndarray(event.tensor_proto).item() for event in events}


@pytest.mark.usefixtures("later_files_have_later_names")
def test_tensorboard_sees_each_row_and_sample_of_a_resumed_run_once(
    call: Call, workshop: Workshop
) -> None:
    step_9 = "checkpoints/micro/base/step_0000009.pt"
    assert call(train_pretrain, "--tensorboard") == 0
    assert call(train_pretrain, "--tensorboard", "--checkpoint", step_9) == 0
    for name in ("loss", "val_loss", "val_web", "learning_rate", "tokens_total"):
        expected = {int(row["step"]): float(row[name]) for row in logged() if row[name]}
        assert len(expected) > 2
        seen = seen_in_tensorboard("logs/micro/base_tensorboard", name)
        assert seen == pytest.approx(expected, rel=1e-5)
    lines = Path("logs/micro/base_samples.jsonl").read_text(encoding="utf-8").splitlines()
    said = {record["step"]: record["samples"]["the dog"] for record in map(json.loads, lines)}
    assert list(said) == [6, 12]
    seen = seen_in_tensorboard("logs/micro/base_tensorboard", "samples/the dog/text_summary")
    as_it_is = {step: "    " + text.replace("\n", "\n    ") for step, text in said.items()}
    assert {step: text.decode() for step, text in seen.items()} == as_it_is


def test_fresh_moves_what_tensorboard_reads_aside_and_nothing_is_written_unasked(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(train_pretrain, "--tensorboard", "--steps", "2") == 0
    capsys.readouterr()
    assert call(train_pretrain, "--fresh", "--steps", "2") == 0
    (aside,) = Path("logs/micro").glob("base_tensorboard*")
    assert aside.name.startswith("base_tensorboard.old-")
    assert f"moved logs/micro/base_tensorboard to {aside}\n" in capsys.readouterr().out
    assert list(seen_in_tensorboard(str(aside), "loss")) == [2]


def test_without_tensorboard_the_run_does_not_begin(
    call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert call(train_pretrain, "--tensorboard") == 2
    told = "--tensorboard needs TensorBoard, which isn't installed: `pip install tensorboard`"
    assert capsys.readouterr() == ("", f"error: {told}\n")
    assert not Path("checkpoints").exists() and not Path("logs").exists()
    assert call(train_pretrain, "--steps", "2") == 0
