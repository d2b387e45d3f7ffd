"""Tests of saving in the background: from a copy, one save at a time, and no error gets lost.

Children that are killed or run out of space are forked from a server that has imported torch.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from hamner import checkpoints, saving
from hamner.checkpoints import Checkpoint
from hamner.errors import UserError, run
from hamner.recipe import CheckpointPart
from hamner.saving import Saver
from hamner.tokenization import CHAT_TEMPLATE
from model import ModelConfig, Transformer

KEEP_2 = CheckpointPart(every=1, keep_last=2)
CONFIG = ModelConfig(
    vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, rope_theta=5_000.0,
)  # fmt: skip


class NoTokenizer:
    """In the place of a tokenizer, which takes no part here."""

    def to_json(self) -> str:
        return "{}"


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG)


@pytest.fixture
def optimizer(model: Transformer) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer)
    return optimizer


def train(model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """One step: all weights and moments change where they lie in memory."""
    ids = torch.tensor([[1, 2, 3]])
    model(ids, ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def state(model: Transformer, optimizer: torch.optim.Optimizer, step: int = 1) -> Checkpoint:
    """What a training run saves, nothing of it copied."""
    return checkpoints.make_checkpoint(
        model, NoTokenizer(), "base", {"name": "micro"},  # type: ignore[arg-type]
        step=step, position={"step": step}, optimizer=optimizer.state_dict(), scaler={},
        data={"rows": [1, 2]}, rng={"torch": torch.get_rng_state(), "cuda": None},
        extra={"pair": (torch.ones(2), "x")},
    )  # fmt: skip


def sized(step: int, megabytes: int) -> Checkpoint:
    whole: Checkpoint = dict.fromkeys(checkpoints.NEEDED_KEYS, "")
    weights = {"w": torch.full((megabytes * 250_000,), float(step))}
    return {**whole, "format": checkpoints.FORMAT, "step": step, "model": weights}


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing waits until this is set, so that it is certain what comes first."""
    gate, save = threading.Event(), torch.save

    def waiting_save(*arguments: Any) -> None:
        assert gate.wait(20)
        save(*arguments)

    monkeypatch.setattr(torch, "save", waiting_save)
    yield gate
    gate.set()


@pytest.fixture
def saver() -> Iterator[Saver]:
    saver = Saver()
    yield saver
    saver.wait()


# ------------------------------------------------------------------------------- from a copy


def test_the_file_is_the_one_that_would_be_written_in_the_foreground(
    tmp_path: Path, saver: Saver, model: Transformer, optimizer: torch.optim.Optimizer
) -> None:
    """To the byte: types, order and shared memory are the same."""
    checkpoint = state(model, optimizer)
    checkpoints.save_step(tmp_path / "foreground", checkpoint, KEEP_2)
    saver.save(tmp_path / "background", checkpoint, KEEP_2)
    saver.wait()
    assert files_in(tmp_path / "background") == {"step_0000001.pt", "latest.pt"}
    for name in ("step_0000001.pt", "latest.pt"):
        ours, theirs = (tmp_path / folder / name for folder in ("background", "foreground"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_what_changes_after_the_save_began_is_not_in_the_file(
    tmp_path: Path,
    saver: Saver,
    gate: threading.Event,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
) -> None:
    checkpoint = state(model, optimizer)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    moments = [part["exp_avg"].clone() for part in optimizer.state.values()]
    saver.save(tmp_path, checkpoint, KEEP_2)
    train(model, optimizer)
    checkpoint["data"]["rows"].append(3)
    checkpoint["step"] = 9
    gate.set()
    saver.wait()
    saved = checkpoints.load(tmp_path / "latest.pt")
    assert saved["model"].keys() == before.keys()
    assert all(torch.equal(saved["model"][name], before[name]) for name in before)
    assert not any(torch.equal(model.state_dict()[name], before[name]) for name in before)
    saved_moments = [part["exp_avg"] for part in saved["optimizer"]["state"].values()]
    assert all(map(torch.equal, saved_moments, moments))
    assert saved["data"] == {"rows": [1, 2]} and saved["step"] == 1
    assert torch.equal(saved["extra"]["pair"][0], torch.ones(2))
    assert saved["chat_template"] == CHAT_TEMPLATE


def test_tied_weights_take_their_room_once(tmp_path: Path, saver: Saver) -> None:
    weight = torch.randn(1_000, 250)
    tied = sized(1, 0) | {"model": {"in": weight, "out": weight.detach(), "half": weight[500:]}}
    saver.save(tmp_path, tied, KEEP_2)
    saver.wait()
    assert 1_000_000 < (tmp_path / "latest.pt").stat().st_size < 1_010_000
    saved = checkpoints.load(tmp_path / "latest.pt")["model"]
    assert all(torch.equal(saved[name], tied["model"][name]) for name in ("in", "out", "half"))


def test_views_and_types_of_all_kinds_are_copied_as_they_are() -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "turned": whole.t(), "part": whole[1:3, ::2], "empty": torch.empty(0, 3),
        "number": torch.tensor(5), "half": torch.ones(3, dtype=torch.bfloat16),
        "bytes": torch.get_rng_state(), "yes": torch.tensor([True, False]),
    }  # fmt: skip
    copied, _ = saving.copy_to_cpu({"nested": [{"deep": (tensors,)}]}, {})
    for name, tensor in tensors.items():
        other = copied["nested"][0]["deep"][0][name]
        assert other.dtype == tensor.dtype and other.stride() == tensor.stride()
        assert torch.equal(other, tensor) and other is not tensor
        assert tensor.numel() == 0 or other.data_ptr() != tensor.data_ptr()


def test_a_second_copy_takes_the_memory_of_the_first() -> None:
    weight, passing = torch.ones(1_000), torch.ones(7)
    first, memory = saving.copy_to_cpu({"weight": weight, "passing": passing}, {})
    address = first["weight"].data_ptr()
    weight.fill_(2)
    second, memory = saving.copy_to_cpu({"weight": weight}, memory)
    assert second["weight"].data_ptr() == address
    assert torch.equal(second["weight"], weight)
    assert len(memory) == 1, "what is saved no more takes memory no more"


def test_memory_of_another_size_is_not_taken() -> None:
    """Another tensor can come to lie where one lay before."""
    place = bytearray(range(100))
    short, long = (torch.frombuffer(place, dtype=torch.uint8, count=n) for n in (10, 100))
    assert short.data_ptr() == long.data_ptr()
    memory: saving.Memory = {}
    for tensor in (short, long, short):
        copied, memory = saving.copy_to_cpu({"tensor": tensor}, memory)
        assert torch.equal(copied["tensor"], tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_model_on_a_gpu_is_copied_to_the_cpu(tmp_path: Path, saver: Saver) -> None:
    weight = torch.randn(1_000, 250, device="cuda")
    before = weight.cpu()
    saver.save(tmp_path, sized(1, 0) | {"model": {"in": weight, "out": weight.t()}}, KEEP_2)
    weight.zero_()
    saver.wait()
    saved = torch.load(tmp_path / "latest.pt", weights_only=True)["model"]
    assert saved["in"].device.type == "cpu" and torch.equal(saved["in"], before)
    assert torch.equal(saved["out"], before.t())
    assert (tmp_path / "latest.pt").stat().st_size < 1_010_000


# ------------------------------------------------------------------------------- in the background


def test_save_returns_before_the_file_is_written_and_wait_after(
    tmp_path: Path, saver: Saver, gate: threading.Event
) -> None:
    saver.save(tmp_path, sized(1, 0), KEEP_2)
    assert not (tmp_path / "latest.pt").exists()
    saver.check()
    gate.set()
    saver.wait()
    assert checkpoints.load(tmp_path / "latest.pt")["step"] == 1


def test_a_save_waits_for_the_one_before_it(
    tmp_path: Path, saver: Saver, gate: threading.Event
) -> None:
    saver.save(tmp_path, sized(1, 0), KEEP_2)
    second = threading.Thread(target=saver.save, args=(tmp_path, sized(2, 0), KEEP_2))
    second.start()
    second.join(0.2)
    assert second.is_alive() and not (tmp_path / "latest.pt").exists()
    gate.set()
    second.join(20)
    assert (tmp_path / "step_0000001.pt").exists()
    saver.wait()
    assert files_in(tmp_path) == {"step_0000001.pt", "step_0000002.pt", "latest.pt"}


def test_old_steps_go_as_in_the_foreground(tmp_path: Path, saver: Saver) -> None:
    for step in range(1, 6):
        saver.save(tmp_path, sized(step, 0), KEEP_2)
    saver.wait()
    assert files_in(tmp_path) == {"step_0000004.pt", "step_0000005.pt", "latest.pt"}


def test_the_best_weights_go_without_the_training_state(
    tmp_path: Path, saver: Saver, model: Transformer, optimizer: torch.optim.Optimizer
) -> None:
    checkpoint = state(model, optimizer)
    saver.save_weights(tmp_path / "best.pt", checkpoint)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    train(model, optimizer)
    saver.wait()
    best = checkpoints.load(tmp_path / "best.pt")
    assert checkpoint.keys() - best.keys() == set(checkpoints.TRAINING_KEYS)
    assert all(torch.equal(best["model"][name], weights[name]) for name in weights)


def test_waiting_without_a_save_is_nothing(saver: Saver) -> None:
    saver.wait()
    saver.check()


# ------------------------------------------------------------------------------- errors


Call = Callable[[Saver, Path], None]
REPORTING: dict[str, Call] = {
    "wait": lambda saver, folder: saver.wait(),
    "save": lambda saver, folder: saver.save(folder, sized(2, 0), KEEP_2),
    "weights": lambda saver, folder: saver.save_weights(folder / "best.pt", sized(2, 0)),
}


@pytest.mark.parametrize("how", REPORTING)
def test_the_error_of_a_save_is_raised_once_by_whatever_comes_next(
    tmp_path: Path, saver: Saver, how: str
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("where the folder should be")
    saver.save(blocked, sized(1, 0), KEEP_2)
    with pytest.raises(UserError, match=r"can't write .*/step_0000001\.pt"):
        REPORTING[how](saver, tmp_path / "good")
    saver.wait()
    assert not (tmp_path / "good").exists(), "nothing is begun after a failure"
    saver.save(tmp_path / "good", sized(3, 0), KEEP_2)
    saver.wait()
    assert checkpoints.load(tmp_path / "good" / "latest.pt")["step"] == 3


def test_check_raises_the_error_of_a_save_that_failed_without_waiting(
    tmp_path: Path, saver: Saver, gate: threading.Event
) -> None:
    (tmp_path / "step_0000001.pt").mkdir()  # the file can't take the place of a folder
    saver.save(tmp_path, sized(1, 0), KEEP_2)
    saver.check()
    gate.set()
    end = time.monotonic() + 20
    with pytest.raises(UserError, match=r"can't write .*/step_0000001\.pt"):
        while time.monotonic() < end:
            saver.check()
            time.sleep(0.005)
    saver.check()


def test_an_error_that_is_a_fault_of_the_program_is_raised_too(
    tmp_path: Path, saver: Saver
) -> None:
    saver.save(tmp_path, sized(1, 0) | {"extra": lambda: "can't be pickled"}, KEEP_2)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        saver.wait()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 30 MB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_with_one_sentence_and_the_last_checkpoint_stays_good(
    small_disk: Path, saver: Saver, capfd: pytest.CaptureFixture[str]
) -> None:
    run = small_disk / "run"
    for step in (1, 2):
        saver.save(run, sized(step, 12), KEEP_2)
    saver.save(run, sized(3, 12), KEEP_2)
    with pytest.raises(UserError) as caught:
        saver.wait()
    assert str(caught.value) == (
        f"can't write {run}/step_0000003.pt ([Errno 28] No space left on device): free some space "
        "there, or keep fewer files with checkpoint.keep_last; what was there before is intact"
    )
    assert files_in(run) == {"step_0000001.pt", "step_0000002.pt", "latest.pt"}
    path, loaded = checkpoints.load_newest(run)
    assert path.name == "latest.pt" and loaded["step"] == 2
    assert torch.equal(loaded["model"]["w"], sized(2, 12)["model"]["w"])
    (run / "step_0000001.pt").unlink()
    saver.save(run, sized(3, 12), KEEP_2)
    saver.wait()
    assert checkpoints.load(run / "latest.pt")["step"] == 3
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------- as a process


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tokenizers", "pydantic", "yaml", "pytest"])
    return context


def started(server: ForkServerContext, target: Callable[..., None], folder: Path) -> Any:
    child = server.Process(target=in_folder, args=(target, str(folder)))
    child.start()
    return child


def in_folder(target: Callable[..., None], folder: str) -> None:
    """What a child does. All that it says goes to the file `output`."""
    os.chdir(folder)
    with open("output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    target()


def pause_in_the_middle(seconds: float) -> None:
    """Let torch.save write half of its bytes from now on, and the rest after so many seconds."""
    save = torch.save

    def slow_save(checkpoint: Checkpoint, file: Any) -> None:
        class Halting:
            written = 0

            def write(self, data: memoryview) -> int:
                before, self.written = self.written, self.written + len(data)
                if before < 2_000_000 <= self.written:
                    file.write(data[: len(data) // 2])
                    file.file.flush()
                    time.sleep(seconds)
                    data = data[len(data) // 2 :]
                file.write(data)
                return self.written - before

            def flush(self) -> None:
                pass

        save(checkpoint, Halting())

    torch.save = slow_save


def save_and_hang() -> None:
    saver = Saver()
    saver.save(Path("run"), sized(1, 4), KEEP_2)
    saver.wait()
    pause_in_the_middle(100)
    saver.save(Path("run"), sized(2, 4), KEEP_2)
    saver.wait()


def test_killed_in_the_middle_of_a_save_the_last_checkpoint_stays_and_the_next_one_works(
    tmp_path: Path, server: ForkServerContext, saver: Saver
) -> None:
    child = started(server, save_and_hang, tmp_path)
    half = tmp_path / "run" / "step_0000002.pt.tmp"
    end = time.monotonic() + 60
    while not (half.exists() and half.stat().st_size > 1_000_000):
        assert time.monotonic() < end and child.is_alive(), (tmp_path / "output").read_text()
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join(20)
    assert child.exitcode == -signal.SIGKILL
    assert half.stat().st_size < 4_000_000, "killed too late to show anything"
    path, loaded = checkpoints.load_newest(tmp_path / "run")
    assert path.name == "latest.pt" and loaded["step"] == 1
    saver.save(tmp_path / "run", sized(2, 4), KEEP_2)
    saver.wait()
    assert files_in(tmp_path / "run") == {"step_0000001.pt", "step_0000002.pt", "latest.pt"}
    assert checkpoints.load(tmp_path / "run" / "latest.pt")["step"] == 2


def save_and_end() -> None:
    pause_in_the_middle(0.5)
    Saver().save(Path("run"), sized(1, 4), KEEP_2)


def test_a_program_that_ends_does_not_cut_off_its_save(
    tmp_path: Path, server: ForkServerContext
) -> None:
    child = started(server, save_and_end, tmp_path)
    child.join(60)
    assert child.exitcode == 0
    assert (tmp_path / "output").read_text() == ""
    assert checkpoints.load(tmp_path / "run" / "latest.pt")["step"] == 1


def save_with_little_room() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, resource.RLIM_INFINITY))

    def main() -> None:
        saver = Saver()
        saver.save(Path("run"), sized(1, 1), KEEP_2)
        saver.save(Path("run"), sized(2, 12), KEEP_2)
        saver.wait()

    run(main)


def test_a_file_that_can_not_grow_ends_a_program_with_one_sentence(
    tmp_path: Path, server: ForkServerContext
) -> None:
    pytest.importorskip("resource", reason="this platform limits no files")
    child = started(server, save_with_little_room, tmp_path)
    child.join(60)
    assert (tmp_path / "output").read_text() == (
        "error: can't write run/step_0000002.pt ([Errno 27] File too large): free some space there,"
        " or keep fewer files with checkpoint.keep_last; what was there before is intact\n"
    )
    assert child.exitcode == 2
    assert files_in(tmp_path / "run") == {"step_0000001.pt", "latest.pt"}
    assert checkpoints.load(tmp_path / "run" / "latest.pt")["step"] == 1
