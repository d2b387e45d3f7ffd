"""Two ranks on a CPU train what one rank trains, and end together, well or badly.

Starting torchrun takes seconds. So it is started once: this file is also the script that it runs,
a list of jobs, each a stage script's main as if it had been typed. What came of a job on each rank
stands in `outcomes/<job>.<rank>.json`.
"""

from __future__ import annotations

import contextlib
import csv
import inspect
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from conftest import ROOT, Workshop
from torch import Tensor

import prepare_sft_data
import train_dpo
import train_pretrain
import train_sft
from hamner import machine, stage, tokenization, training
from hamner.batches import MicroBatch
from hamner.errors import UserError, run
from hamner.machine import Machine

torch.set_num_threads(1)
MAINS = {
    "base": train_pretrain.main,
    "sft": train_sft.main,
    "dpo": train_dpo.main,
    "prepare": prepare_sft_data.main,
}
RANKS = 2
# The CSV holds six digits: two equal losses of 1 to 10 may differ by a unit of the fifth decimal.
CLOSE = 1.01e-5


@dataclass
class Job:
    """A stage to be run by all ranks, or by one."""

    name: str
    main: str = "base"
    options: list[str] = field(default_factory=list)  # KEY=VALUE
    arguments: list[str] = field(default_factory=list)
    trouble: str = ""  # "nan": every loss; "stop": rank 1 is told to stop in its fifth step
    port: int = 0
    exits: bool = False  # the process itself ends with it

    def command_line(self) -> list[str]:
        folders = [f"{self.main}.folder=runs/{self.name}", f"{self.main}.log=logs/{self.name}"]
        sets = self.options if self.main == "prepare" else [*folders, *self.options]
        given = [part for option in sets for part in ("--set", option)]
        device = [] if self.main == "prepare" else ["--device", "cpu"]
        return ["x", "--recipe", "micro.yaml", *device, *given, *self.arguments]


# ------------------------------------------------------------------------------ what a rank does


class TroubledLoss:
    """Language modelling that keeps what it was trained on, and gets into trouble if asked to."""

    def __init__(self, trouble: str, rank: int):
        self.trouble, self.rank, self.rows = trouble, rank, []  # type: ignore[var-annotated]
        self.original = training.language_modelling

    def __call__(self, model: Any, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, sums = self.original(model, batch)
        if not model.training:
            return loss, sums
        self.rows += batch["input_ids"].tolist()
        if self.trouble == "stop" and self.rank == 1 and len(self.rows) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return (loss * torch.nan if self.trouble == "nan" else loss), sums


def do(job: Job, rank: int) -> dict[str, Any]:
    """Run a job in this process; its exit code, output, and the rows it was trained on."""
    loss = TroubledLoss(job.trouble, rank)
    stage.language_modelling = loss  # type: ignore[assignment]
    training.peak_flops = lambda *_: None  # measuring it takes half a second
    sys.argv = job.command_line()
    if job.exits:
        Path(f"outcomes/{job.name}.{rank}.began").write_text(str(time.time()))
        run(MAINS[job.main])
    out, error, began = io.StringIO(), io.StringIO(), time.monotonic()
    code: Any = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            run(MAINS[job.main])
        except SystemExit as stop:
            code = stop.code
    machine.leave()
    return {
        "code": code,
        "out": out.getvalue(),
        "error": error.getvalue(),
        "seconds": time.monotonic() - began,
        "rows": loss.rows,
    }


def be_a_rank(folder: str) -> None:
    """What each process does that torchrun starts."""
    os.chdir(folder)
    rank = int(os.environ["RANK"])
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # every job meets at a port of its own
    for fields in json.loads(Path("jobs.json").read_text()):
        job = Job(**fields)
        os.environ["MASTER_PORT"] = str(job.port)
        outcome = Path(f"outcomes/{job.name}.{rank}.json")
        outcome.parent.mkdir(exist_ok=True)
        outcome.write_text(json.dumps(do(job, rank)))


if __name__ == "__main__":
    be_a_rank(sys.argv[1])


# ------------------------------------------------------------------------------ the runs


STEPS, HALF = 30, 15
ONE_LANE = ["lanes=1"]
# One source, so that documents can be told apart in what was trained on.
TWO_LANES = ["lanes=2", "base.sources=[{name: web, weight: 1}]"]
FSDP, DDP = ["parallel=fsdp"], ["parallel=ddp"]
FROM_BASE = ["--checkpoint", "runs/one/latest.pt", "--steps", "6"]

BY_ONE = [
    Job("one", options=ONE_LANE),
    Job("one_two_lanes", options=TWO_LANES),
    Job("prepare", "prepare"),
    Job("one_sft", "sft", arguments=FROM_BASE),
    Job("one_dpo", "dpo", arguments=FROM_BASE),
]
BY_TWO = [
    Job("ddp", options=ONE_LANE + DDP),
    Job("fsdp", options=ONE_LANE + FSDP),
    Job("ddp_two_lanes", options=TWO_LANES + DDP),
    Job("fsdp_two_lanes", options=TWO_LANES + FSDP),
    Job("fsdp_after_one", options=ONE_LANE + FSDP,
        arguments=["--checkpoint", "runs/one/step_0000015.pt"]),
    Job("sft_ddp", "sft", DDP, FROM_BASE),
    Job("dpo_fsdp", "dpo", FSDP, FROM_BASE),
    Job("uneven", options=["base.sequences_per_step=5"]),
    Job("other_lanes", options=["lanes=2"], arguments=["--checkpoint", "runs/one/step_0000015.pt"]),
    Job("no_data", options=["data_dir=nowhere", TWO_LANES[1]]),
    Job("damaged", arguments=["--checkpoint", "damaged.pt"]),
    Job("stop", trouble="stop"),
    Job("no_disk", options=["base.folder=micro.yaml/runs"]),
    Job("nan", options=["base.steps=300"], trouble="nan", exits=True),
]  # fmt: skip
AFTERWARDS = [
    Job("one_after_fsdp", options=ONE_LANE,
        arguments=["--checkpoint", "runs/fsdp/step_0000015.pt"]),
    Job("one_after_stop", arguments=["--checkpoint", "runs/stop/latest.pt"]),
]  # fmt: skip


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass
class Runs:
    """What came of all jobs, in one folder."""

    folder: Path
    alone: dict[str, dict[str, Any]] = field(default_factory=dict)
    output: str = ""  # of torchrun
    code: int | None = None  # of torchrun; None: it had to be killed
    ended: float = 0.0  # when torchrun did

    def of(self, job: str) -> list[dict[str, Any]]:
        """The outcomes of a job, by rank."""
        if job in self.alone:
            return [self.alone[job]]
        paths = [self.folder / f"outcomes/{job}.{rank}.json" for rank in range(RANKS)]
        missing = [path.name for path in paths if not path.exists()]
        assert not missing, f"no {missing}\n{self.output}"
        return [json.loads(path.read_text()) for path in paths]

    def column(self, job: str, name: str = "loss") -> list[float]:
        path = self.folder / f"logs/{job}_metrics.csv"
        with open(path, encoding="utf-8", newline="") as file:
            return [float(row[name]) for row in csv.DictReader(file) if row[name]]

    def checkpoint(self, job: str, name: str = "latest.pt") -> dict[str, Any]:
        return torch.load(self.folder / "runs" / job / name, weights_only=True)

    def errors(self, job: str) -> list[str]:
        """What each rank said in the end; each must have refused in one line and no traceback."""
        outcomes = self.of(job)
        assert [outcome["code"] for outcome in outcomes] == [2] * RANKS, outcomes
        said = [outcome["error"].removesuffix("\n") for outcome in outcomes]
        assert all(text.startswith("error: ") and "\n" not in text for text in said), said
        return [text.removeprefix("error: ") for text in said]


def write_recipe(folder: Path) -> None:
    raw = inspect.unwrap(conftest.raw)(inspect.unwrap(conftest.data)(folder))
    raw["common"] |= {"log_every": 1, "validate_every": 10, "sample_every": 15}
    raw["common"]["checkpoint"] = {"every": HALF, "keep_last": 2}
    raw["base"]["steps"] = STEPS
    Workshop(folder, raw)


def run_torchrun(runs: Runs, jobs: list[Job]) -> None:
    for job, port in zip(jobs, free_ports(len(jobs)), strict=True):
        job.port = port
    (runs.folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={RANKS}",
               f"--master-port={free_ports(1)[0]}", "--redirects=3", "--log-dir=ranks",
               __file__, str(runs.folder)]  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            command, cwd=runs.folder, env=environment, capture_output=True, text=True, timeout=150
        )
        runs.code, runs.output = done.returncode, done.stdout + done.stderr
    runs.ended = time.time()
    for path in sorted(runs.folder.glob("ranks/**/std*.log")):
        runs.output += f"--- {path.parent.name}/{path.name}\n{path.read_text()}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("ranks"))
    write_recipe(runs.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(runs.folder)
        patch.setattr(sys, "argv", [])
        for owner, name in ((stage, "language_modelling"), (training, "peak_flops")):
            patch.setattr(owner, name, getattr(owner, name))  # put back in the end
        for job in BY_ONE:
            runs.alone[job.name] = do(job, rank=0)
        whole = (runs.folder / "runs/one/latest.pt").read_bytes()
        (runs.folder / "damaged.pt").write_bytes(whole[:-1000])
        run_torchrun(runs, BY_TWO)
        for job in AFTERWARDS:
            runs.alone[job.name] = do(job, rank=0)
        yield runs


# ------------------------------------------------------------------------------ the same model

SAME = {
    "ddp": "one",
    "fsdp": "one",
    "ddp_two_lanes": "one_two_lanes",
    "fsdp_two_lanes": "one_two_lanes",
    "sft_ddp": "one_sft",
    "dpo_fsdp": "one_dpo",
}


@pytest.mark.parametrize("job", SAME)
def test_two_ranks_have_the_losses_and_gradients_of_one(job: str, runs: Runs) -> None:
    assert [outcome["code"] for outcome in runs.of(job)] == [0] * RANKS
    steps = 6 if job in ("sft_ddp", "dpo_fsdp") else STEPS
    for column in ("loss", "val_loss", "grad_norm", "learning_rate", "tokens_total", "epoch"):
        ours, theirs = runs.column(job, column), runs.column(SAME[job], column)
        assert ours == pytest.approx(theirs, abs=CLOSE, rel=1e-6), column
        assert len(ours) == steps or column == "val_loss"
    losses = runs.column(job)
    assert losses[0] - losses[-1] > 0.03, "nothing was learnt"


@pytest.mark.parametrize("job", SAME)
def test_two_ranks_end_with_the_weights_and_the_data_position_of_one(job: str, runs: Runs) -> None:
    ours, theirs = runs.checkpoint(job), runs.checkpoint(SAME[job])
    assert ours.keys() == theirs.keys() and ours["model"].keys() == theirs["model"].keys()
    for name, weight in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], weight, atol=1e-6, rtol=0)
        if "ddp" in job:  # each rank has one micro-batch, and the order of the sum is the same
            assert torch.equal(ours["model"][name], weight), name
    assert ours["data"] == theirs["data"]
    for key in ("step", "tokens", "skipped", "spikes", "stopped_early"):
        assert ours["position"][key] == theirs["position"][key]
    (momenta,), (expected,) = ours["optimizer"]["parts"], theirs["optimizer"]["parts"]
    assert momenta["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(momenta["state"][number][key], value, atol=1e-6, rtol=1e-4)


def test_only_the_rank_that_leads_talks_and_the_samples_are_those_of_one(runs: Runs) -> None:
    for job in SAME:
        leader, other = runs.of(job)
        assert "finished at step" in leader["out"] and other["out"] == ""
        assert leader["error"] == other["error"] == ""

    def samples(job: str) -> list[Any]:
        lines = (runs.folder / f"logs/{job}_samples.jsonl").read_text().splitlines()
        return [(json.loads(line)["step"], json.loads(line)["samples"]) for line in lines]

    assert [step for step, _ in samples("fsdp")] == [step for step, _ in samples("one")] == [15, 30]
    assert samples("ddp") == samples("one")


@pytest.mark.parametrize("job", ["ddp", "fsdp", "ddp_two_lanes", "fsdp_two_lanes"])
def test_the_ranks_share_out_the_rows_of_each_step(job: str, runs: Runs) -> None:
    (alone,), (first, second) = runs.of(SAME[job]), runs.of(job)
    assert len(alone["rows"]) == 4 * STEPS
    together = [
        row
        for step in range(STEPS)
        for rank in (first, second)
        for row in rank["rows"][2 * step : 2 * step + 2]
    ]
    assert together == alone["rows"]


@pytest.mark.parametrize("job", ["ddp_two_lanes", "fsdp_two_lanes"])
def test_with_lanes_every_document_is_used_once_and_by_one_rank(job: str, runs: Runs) -> None:
    tokenizer = tokenization.from_json(runs.checkpoint(job)["tokenizer"])
    seen: list[str] = []
    for outcome in runs.of(job):
        ids = [id_ for row in outcome["rows"] for id_ in row]
        assert len(ids) == STEPS * 2 * 64
        ends = [i for i, id_ in enumerate(ids) if id_ == tokenizer.end_of_text]
        begins = [0, *(end + 1 for end in ends)]
        texts = [tokenizer.decode(ids[a:b]) for a, b in zip(begins, ends, strict=False)]
        assert all(text.endswith(".") for text in texts), "documents were torn apart"
        seen += [text.split()[0] for text in texts]  # the number that each begins with
    assert len(seen) == len(set(seen)) > 40


# ------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("job", ["fsdp_after_one", "one_after_fsdp"])
def test_checkpoints_may_be_continued_with_another_number_of_ranks(job: str, runs: Runs) -> None:
    assert {outcome["code"] for outcome in runs.of(job)} == {0}
    assert f"step {HALF})" in runs.of(job)[0]["out"]
    ours, theirs = runs.column(job), runs.column("one")[HALF:]
    assert len(ours) == STEPS - HALF
    assert ours == pytest.approx(theirs, abs=CLOSE)
    end, expected = runs.checkpoint(job), runs.checkpoint("one")
    assert end["data"] == expected["data"]
    for name, weight in expected["model"].items():
        torch.testing.assert_close(end["model"][name], weight, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------ ends


def test_a_step_that_the_ranks_can_not_share_is_refused(runs: Runs) -> None:
    expected = (
        "base.sequences_per_step (5) must be a multiple of the number of processes (2): start "
        "fewer, or --set base.sequences_per_step=..."
    )
    assert runs.errors("uneven") == [expected] * RANKS


def test_another_number_of_lanes_is_refused_when_a_run_goes_on(runs: Runs) -> None:
    for error in runs.errors("other_lanes"):
        assert error.startswith(
            "source 'web' was dealt into 1 lane(s) so far, and the recipe says "
        )
        assert "lanes: 2: put the old number back" in error


@pytest.mark.parametrize(
    ("job", "told"),
    [
        ("no_data", "source 'web': no file matches nowhere/web.jsonl"),
        ("damaged", "damaged.pt is damaged or cut short"),
    ],
)
def test_what_stands_in_the_way_of_beginning_is_said_by_all_ranks(
    job: str, told: str, runs: Runs
) -> None:
    """Only the rank that leads looks for the data; the others don't wait for it in vain."""
    assert all(error.startswith(told) for error in runs.errors(job))
    assert all(outcome["seconds"] < 10 for outcome in runs.of(job))


def test_a_signal_to_one_rank_stops_all_of_them_with_a_checkpoint(runs: Runs) -> None:
    leader, other = runs.of("stop")
    assert leader["code"] == other["code"] == 130
    assert "stopped at step 5 of 30, saved as runs/stop/latest.pt" in leader["out"]
    assert leader["error"] == other["error"] == other["out"] == ""
    assert runs.checkpoint("stop")["step"] == 5


def test_a_run_that_was_stopped_by_one_rank_goes_on_as_if_nothing_had_been(runs: Runs) -> None:
    end, expected = runs.checkpoint("one_after_stop"), runs.checkpoint("one")
    assert end["data"] == expected["data"]
    assert all(torch.equal(end["model"][name], w) for name, w in expected["model"].items())


def test_a_save_that_fails_on_the_rank_that_leads_ends_all(runs: Runs) -> None:
    leader, other = runs.errors("no_disk")
    assert leader.startswith("can't write micro.yaml/runs/step_0000015.pt (")
    assert other == "rank 1 stopped: another can't go on"
    steps = len(runs.column("no_disk"))
    assert HALF <= steps <= HALF + 5, "the run went on for long after the failure"


def test_an_error_during_the_run_ends_the_processes_at_once_with_a_sentence(runs: Runs) -> None:
    began = float((runs.folder / "outcomes/nan.0.began").read_text())
    assert runs.code == 1, runs.output  # torchrun's own, if any rank's is not 0
    assert runs.ended - began < 30, "the processes hung in the end"
    said = [path.read_text() for path in sorted(runs.folder.glob("ranks/**/stderr.log"))]
    sentence = "error: base: no finite loss and gradient in 100 steps in a row, stopped at step 100"
    assert len(said) == RANKS
    assert any(text.startswith(sentence) for text in said), runs.output
    for text in said:  # nothing, if torchrun was quicker to end it
        assert "Traceback" not in text and len(text.splitlines()) <= 1, runs.output
    assert runs.checkpoint("nan")["step"] < 100


# ------------------------------------------------------------------------------ one rank


def test_a_machine_of_one_rank_has_nobody_to_ask() -> None:
    alone = Machine(torch.device("cpu"))
    values = torch.tensor([1.5, 2.0])
    assert alone.leads and alone.ranks == 1
    assert alone.total(values) is values
    assert alone.highest(3) == 3
    assert alone.gathered({"a": 1}) == [{"a": 1}]
    assert alone.from_leader(lambda: "made") == "made"
    alone.wait_for_all()
    machine.leave()


def test_only_the_first_rank_leads() -> None:
    ranks = [Machine(torch.device("cpu"), rank, 3) for rank in range(3)]
    assert [rank.leads for rank in ranks] == [True, False, False]


def test_several_processes_on_mps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UserError, match="2 processes on mps: several need cuda or cpu"):
        machine.join("mps")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="cuda:1: there is no such device"):
        machine.join("cuda")
