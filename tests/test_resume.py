"""A stage that was killed anywhere and started again ends exactly as if nothing had happened.

Starting a process takes seconds, most of them spent on importing torch. So the scripts run here
in children of a fork server that has imported torch already: processes of their own, which can be
killed, and each runs its script as `__main__` from the beginning. A child sends the signal to
itself, a given number of function calls, in any of its threads, after a given file has appeared:
that is a moment as arbitrary as any, in the middle of a step or of a file, and about the same in
every run of the test.
"""

from __future__ import annotations

import csv
import inspect
import itertools
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from conftest import ROOT, Workshop, some_text, write_lines

from hamner import training
from hamner.optim import FIRST_SCALE

HEAVY = ["torch._dynamo", "pyarrow.parquet", "tokenizers", "pydantic", "tqdm", "yaml", "pytest"]
STAGES = ("base", "anneal", "chat", "sft", "dpo")
SCRIPTS = {
    "base": ("train_pretrain.py", "--device", "cpu"),
    "anneal": ("train_pretrain.py", "--device", "cpu", "--stage", "anneal"),
    "chat": ("train_chat_pretrain.py", "--device", "cpu"),
    "sft": ("train_sft.py", "--device", "cpu"),
    "dpo": ("train_dpo.py", "--device", "cpu"),
}


@dataclass
class Moment:
    """When a run gets a signal: so many function calls after a file has appeared."""

    file: str
    calls: int
    signal: signal.Signals = signal.SIGKILL
    counted: Iterator[int] | None = None  # calls since then; `next` of it is safe among threads

    def watch(self) -> None:
        """Begin to look at every function call, of this thread and of those begun after it."""
        self.counted = itertools.count(1)
        threading.setprofile(self)  # checkpoints are written by a thread
        sys.setprofile(self)

    def __call__(self, *_: object) -> None:
        if self.counted is None or not os.path.exists(self.file):
            return
        if next(self.counted) == self.calls:
            os.kill(os.getpid(), self.signal)


def run_as_main(folder: str, script: str, arguments: list[str], moment: Moment | None) -> None:
    """What a child does. Its exit code is the script's; its output goes to the file `output`."""
    os.chdir(folder)
    torch.set_num_threads(1)
    training.peak_flops = lambda *_: None  # measuring it would take half of the time here
    with open("output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = [script, *arguments]
    if moment is not None:
        moment.watch()
    runpy.run_path(str(ROOT / script), run_name="__main__")


@dataclass
class Runs:
    """A workshop whose scripts are run by children of the fork server."""

    server: ForkServerContext
    workshop: Workshop

    @property
    def folder(self) -> Path:
        return self.workshop.folder

    def run(self, stage: str, *more: str, moment: Moment | None = None, code: int = 0) -> str:
        """Run a stage; check the exit code (negative: the signal that killed it)."""
        script, *arguments = SCRIPTS.get(stage, (stage,))
        arguments = ["--recipe", str(self.workshop.recipe), *arguments, *more]
        child = self.server.Process(
            target=run_as_main, args=(str(self.folder), script, arguments, moment)
        )
        child.start()
        child.join(120)
        output = (self.folder / "output").read_text(encoding="utf-8")
        assert child.exitcode == code, f"exit {child.exitcode}\n{output}"
        return output

    def checkpoints(self, stage: str) -> Path:
        return self.folder / "checkpoints" / "micro" / stage

    def latest(self, stage: str, name: str = "latest.pt") -> dict[str, Any]:
        return torch.load(self.checkpoints(stage) / name, weights_only=True)

    def metrics(self, stage: str) -> list[dict[str, str]]:
        path = self.folder / "logs" / "micro" / f"{stage}_metrics.csv"
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def samples(self, stage: str) -> list[dict[str, Any]]:
        path = self.folder / "logs" / "micro" / f"{stage}_samples.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServerContext]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    yield context


def micro_workshop(folder: Path) -> Workshop:
    """The shared fixtures' recipe, with so few books that the run goes through them again."""
    data = inspect.unwrap(conftest.data)(folder)
    rng = random.Random(2)
    books = [{"text": f"book {i} {some_text(rng, 25)}"} for i in range(12)]
    write_lines(data / "books.jsonl", books)
    raw = inspect.unwrap(conftest.raw)(data)
    raw["dpo"]["epochs"] = 3
    return Workshop(folder, raw)


@pytest.fixture(scope="module")
def undisturbed(server: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All five stages, run one after the other without a break."""
    runs = Runs(server, micro_workshop(tmp_path_factory.mktemp("undisturbed")))
    runs.run("prepare_sft_data.py")
    for stage in STAGES:
        runs.run(stage)
    return runs


@pytest.fixture
def before(undisturbed: Runs, tmp_path: Path, request: pytest.FixtureRequest) -> Runs:
    """A folder with the stages before the one that the test is about, and nothing of it yet."""
    stage = request.node.callspec.params["stage"]
    runs = Runs(undisturbed.server, Workshop(tmp_path, undisturbed.workshop.raw))
    for earlier in STAGES[: STAGES.index(stage)]:
        shutil.copytree(undisturbed.checkpoints(earlier), runs.checkpoints(earlier))
    return runs


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Places where two checkpoints differ, to the bit."""
    if type(one) is not type(other):
        return [where]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        if one.keys() != other.keys():
            return [where]
        return [d for key in one for d in differences(one[key], other[key], f"{where}/{key}")]
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [where]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}/{i}")]
    else:
        same = one == other
    return [] if same else [where]


def assert_same_end(run: Runs, undisturbed: Runs, stage: str) -> None:
    ours, theirs = run.latest(stage), undisturbed.latest(stage)
    assert ours["position"].pop("seconds") > 0
    assert theirs["position"].pop("seconds") > 0
    assert differences(ours, theirs) == []
    assert ours["optimizer"]["parts"][0]["state"] and ours["data"], "nothing was compared"
    if stage in ("sft", "dpo"):
        ours, theirs = run.latest(stage, "best.pt"), undisturbed.latest(stage, "best.pt")
        assert differences(ours["model"], theirs["model"]) == []
        assert ours["step"] == theirs["step"]
    assert not list(run.folder.rglob("*.tmp"))


def assert_same_logs(run: Runs, undisturbed: Runs, stage: str) -> None:
    """Each step once, in order, with the same validation losses and the same samples."""
    ours, theirs = run.metrics(stage), undisturbed.metrics(stage)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert max(Counter(row["step"] for row in ours).values()) == 1
    for column in ("val_loss", "tokens_total", "learning_rate", "epoch", "grad_norm"):
        assert [row[column] for row in ours] == [row[column] for row in theirs], column
    texts = [(row["step"], row["samples"]) for row in run.samples(stage)]
    assert texts == [(row["step"], row["samples"]) for row in undisturbed.samples(stage)]


def step_file(stage: str, step: int) -> str:
    return f"checkpoints/micro/{stage}/step_{step:07d}.pt"


@pytest.mark.parametrize("stage", STAGES)
def test_killed_twice_and_started_again_a_stage_ends_bit_identical(
    stage: str, before: Runs, undisturbed: Runs
) -> None:
    rng = random.Random(f"{stage}/kill")
    for step in (3, 6):
        moment = Moment(step_file(stage, step), 1 + rng.randrange(20_000))
        before.run(stage, moment=moment, code=-signal.SIGKILL)
    at = before.latest(stage)["step"]
    assert 3 <= at < undisturbed.latest(stage)["step"], "killed too late to show anything"
    before.run(stage)
    assert_same_end(before, undisturbed, stage)
    assert_same_logs(before, undisturbed, stage)


@pytest.mark.parametrize("stage", ["base"])
def test_killed_before_the_first_checkpoint_a_stage_begins_again(
    stage: str, before: Runs, undisturbed: Runs
) -> None:
    moment = Moment(f"logs/micro/{stage}_samples.jsonl", 15_000)
    before.run(stage, moment=moment, code=-signal.SIGKILL)
    assert not before.checkpoints(stage).exists()
    before.run(stage)
    assert_same_end(before, undisturbed, stage)
    assert_same_logs(before, undisturbed, stage)


@pytest.mark.parametrize("stage", ["sft"])
@pytest.mark.parametrize("name", ["step_0000006.pt.tmp", "latest.pt.tmp", "best.pt.tmp"])
def test_killed_while_it_writes_a_checkpoint_a_stage_still_ends_bit_identical(
    stage: str, name: str, before: Runs, undisturbed: Runs
) -> None:
    moment = Moment(f"checkpoints/micro/{stage}/{name}", 1)
    before.run(stage, moment=moment, code=-signal.SIGKILL)
    assert (before.checkpoints(stage) / name).exists()
    before.run(stage)
    assert_same_end(before, undisturbed, stage)


@pytest.mark.parametrize("stage", ["base", "dpo"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_code_130_and_the_run_can_go_on(
    stage: str, number: signal.Signals, before: Runs, undisturbed: Runs
) -> None:
    output = before.run(stage, moment=Moment(step_file(stage, 3), 6_000, number), code=130)
    stopped = before.latest(stage)["step"]
    steps = undisturbed.latest(stage)["step"]
    assert 3 <= stopped < steps
    said = f"{stage}: stopped at step {stopped} of {steps}, saved as checkpoints/micro/{stage}/"
    assert said in output
    assert "the same command without --fresh goes on from there" in output
    assert (before.folder / step_file(stage, stopped)).exists()
    assert f"step {stopped})" in before.run(stage)
    assert_same_end(before, undisturbed, stage)
    assert_same_logs(before, undisturbed, stage)


@pytest.mark.parametrize("stage", ["base"])
def test_a_signal_in_the_last_save_doesnt_cut_it_off(
    stage: str, before: Runs, undisturbed: Runs
) -> None:
    last = f"{step_file(stage, undisturbed.latest(stage)['step'])}.tmp"
    output = before.run(stage, moment=Moment(last, 1, signal.SIGTERM))
    assert f"{stage}: finished at step" in output
    assert_same_end(before, undisturbed, stage)


def newest_step(folder: Path) -> int:
    """Of the step files: latest.pt is one behind if its run was killed between the two."""
    return max((int(path.stem[5:]) for path in folder.glob("step_*.pt")), default=0)


def wait_for_step_after(folder: Path, step: int, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while newest_step(folder) <= step:
        assert time.monotonic() < end, f"nothing after step {step} in {folder}"
        time.sleep(0.005)


def test_killed_and_terminated_from_outside_the_script_itself_ends_bit_identical(
    server: ForkServerContext, tmp_path: Path
) -> None:
    """The same with nothing in between: the real script, signals sent by another process."""
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    one = Runs(server, micro_workshop(tmp_path / "one"))
    one.workshop.raw["base"].update(steps=150, prompts=[])
    one.workshop.raw["common"].update(validate_every=100, log_every=10)
    one.workshop.write()
    other = Runs(server, Workshop(tmp_path / "other", one.workshop.raw))
    delays, step = random.Random("outside"), 0
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)):
        process = one.workshop.start(*SCRIPTS["base"])
        wait_for_step_after(one.checkpoints("base"), step)
        time.sleep(delays.uniform(0, 0.05))
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == code
        step = newest_step(one.checkpoints("base"))
    one.run("base")
    other.run("base")
    assert_same_end(one, other, "base")


@pytest.mark.parametrize("stage", ["base"])
def test_fp16_resumes_with_its_loss_scale(stage: str, before: Runs) -> None:
    try:
        with torch.autocast("cpu", torch.float16):
            torch.nn.functional.linear(torch.ones(2, 8), torch.ones(8, 8)).sum()
    except RuntimeError as error:
        pytest.skip(f"no fp16 autocast on this CPU: {error}")
    options = ["--set", "precision=fp16", "--set", "base.steps=9", "--set", "base.prompts=[]"]
    before.run(stage, *options)
    whole = before.latest(stage)
    fresh = {"scale": FIRST_SCALE, "finite_steps": 0}
    assert whole["scaler"].keys() == fresh.keys()
    assert whole["scaler"] != fresh, "the scaler has not moved: this shows nothing"
    before.run(
        stage, *options, "--fresh", moment=Moment(step_file(stage, 3), 9_000), code=-signal.SIGKILL
    )
    halfway = before.latest(stage)
    assert halfway["step"] < whole["step"]
    assert halfway["scaler"] != whole["scaler"]
    before.run(stage, *options)
    end = before.latest(stage)
    del end["position"]["seconds"], whole["position"]["seconds"]
    assert differences(end, whole) == []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("stage", ["chat"])
def test_fresh_moves_the_old_run_aside_says_where_and_deletes_nothing(
    stage: str, before: Runs, undisturbed: Runs
) -> None:
    before.run(stage, "--set", "chat.steps=4")
    old = contents(before.checkpoints(stage))
    logs = {name: p for name, p in contents(before.folder / "logs" / "micro").items()}
    assert old and logs
    others = contents(before.checkpoints("anneal"))
    output = before.run(stage, "--fresh")
    said = dict(line[6:].split(" to ") for line in output.splitlines() if line[:6] == "moved ")
    assert sorted(said) == [
        f"checkpoints/micro/{stage}",
        f"logs/micro/{stage}_metrics.csv",
        f"logs/micro/{stage}_samples.jsonl",
    ]
    assert contents(before.folder / said[f"checkpoints/micro/{stage}"]) == old
    for name, content in logs.items():
        assert (before.folder / said[f"logs/micro/{name}"]).read_bytes() == content
    assert contents(before.checkpoints("anneal")) == others
    assert_same_end(before, undisturbed, stage)  # and the new run begins at the beginning
    before.run(stage, "--fresh")
    kept = [p for p in before.checkpoints("x").parent.iterdir() if p.name.startswith("chat.old-")]
    assert len(kept) == 2


@pytest.mark.parametrize("stage", ["base"])
def test_a_finished_stage_says_so_and_changes_nothing(
    stage: str, before: Runs, undisturbed: Runs
) -> None:
    shutil.copytree(undisturbed.checkpoints(stage), before.checkpoints(stage))
    shutil.copytree(undisturbed.folder / "logs", before.folder / "logs")
    old = contents(before.folder / "checkpoints") | contents(before.folder / "logs")
    output = before.run(stage)
    assert "base: nothing left to do" in output
    assert "stands at step 12 of 12; --fresh begins anew" in output
    assert contents(before.folder / "checkpoints") | contents(before.folder / "logs") == old


def test_the_run_goes_through_its_books_more_than_once(undisturbed: Runs) -> None:
    """What the tests above compare includes positions in later blocks and later epochs."""
    sources = undisturbed.latest("anneal")["data"]["sources"]
    assert sources["books"][0]["documents"]["epoch"] > 0
    assert sources["web"][0]["documents"]["block"] > 0
