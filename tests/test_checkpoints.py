"""Tests of the checkpoints: whole or not at all, sealed, data and no code, retention."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import random
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import some_text
from hypothesis import given, settings
from hypothesis import strategies as st

from hamner import checkpoints, tokenization
from hamner.checkpoints import Checkpoint, DamagedCheckpoint
from hamner.errors import UserError
from hamner.recipe import CheckpointPart, load_recipe
from hamner.tokenization import CHAT_TEMPLATE, Tokenizer
from model import ModelConfig, Transformer

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, rope_theta=5_000.0,
)  # fmt: skip
KEPT = {"format", "stage", "recipe", "model_config", "model", "tokenizer", "chat_template"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = random.Random(0)
    return tokenization.train([some_text(rng, 40) for _ in range(20)], 290)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG)


@pytest.fixture
def checkpoint(model: Transformer, tokenizer: Tokenizer) -> Checkpoint:
    """A checkpoint with all that a training run puts into it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return checkpoints.make_checkpoint(
        model, tokenizer, "sft", {"name": "micro", "seed": 7},
        step=12, steps=40, position={"step": 12, "best": 1.5, "stopped_early": False},
        optimizer=optimizer.state_dict(), scaler={}, data={"row": 48},
        rng={"torch": torch.get_rng_state(), "cuda": None}, extra={"reference": torch.ones(2)},
    )  # fmt: skip


def light(step: int = 1) -> Checkpoint:
    """As little as a checkpoint can be."""
    whole = dict.fromkeys(checkpoints.NEEDED_KEYS, "")
    return {**whole, "format": checkpoints.FORMAT, "step": step, "weight": torch.arange(64.0)}


def refusal(path: Path) -> UserError:
    """The error about a file that is no good; checks that the file stays as it is."""
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        checkpoints.load(path)
    assert path.read_bytes() == before
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return caught.value


def refused(path: Path) -> str:
    """What is said about a file that can't be taken for a damaged checkpoint."""
    error = refusal(path)
    assert type(error) is UserError, error
    return str(error)


def found_damaged(path: Path) -> str:
    """What shows that a file is a damaged checkpoint."""
    error = refusal(path)
    assert isinstance(error, DamagedCheckpoint), error
    expected = f"{path} is damaged or cut short, and was not touched ({error.reason})"
    assert str(error) == expected
    return error.reason


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# ------------------------------------------------------------------------------- there and back


def test_everything_in_a_checkpoint_comes_back(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "new" / "folder" / "latest.pt"
    checkpoints.write_whole(path, checkpoint)
    loaded = checkpoints.load(path)
    assert same(dict(loaded), dict(checkpoint))
    assert loaded["stage"] == "sft" and loaded["chat_template"] == CHAT_TEMPLATE
    assert [file.name for file in path.parent.iterdir()] == ["latest.pt"]


def test_the_weights_come_back_bit_for_bit(
    tmp_path: Path, checkpoint: Checkpoint, model: Transformer
) -> None:
    path = tmp_path / "latest.pt"
    checkpoints.write_whole(path, checkpoint)
    loaded = checkpoints.load_model(checkpoints.load(path), path)
    assert loaded.config == CONFIG
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_tokenizer_comes_back_with_the_same_ids(
    tmp_path: Path, checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "latest.pt"
    checkpoints.write_whole(path, checkpoint)
    loaded = checkpoints.load_tokenizer(checkpoints.load(path))
    messages = [
        {"role": "user", "content": "what is 1234 + 5? <|im_end|>"},
        {"role": "assistant", "content": "naïve 日本 🙂"},
    ]
    assert loaded.chat(messages) == tokenizer.chat(messages)
    for text in ("the old dog sees", "  two\n\nlines\t", "日本 🙂 é", "<|endoftext|>", ""):
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    ids = (loaded.end_of_text, loaded.im_start, loaded.im_end, loaded.vocab_size)
    expected = tokenizer.end_of_text, tokenizer.im_start, tokenizer.im_end, tokenizer.vocab_size
    assert ids == expected


def test_without_training_state_exactly_the_training_keys_are_gone(checkpoint: Checkpoint) -> None:
    lean = checkpoints.without_training_state(checkpoint)
    assert checkpoint.keys() - lean.keys() == {"optimizer", "scaler", "data", "rng", "extra"}
    assert lean.keys() == KEPT | {"step", "steps", "position"}
    assert all(lean[key] is checkpoint[key] for key in lean)


def test_a_checkpoint_without_training_state_still_makes_a_model(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    whole, lean = tmp_path / "latest.pt", tmp_path / "best.pt"
    checkpoints.write_whole(whole, checkpoint)
    checkpoints.write_whole(lean, checkpoints.without_training_state(checkpoint))
    assert lean.stat().st_size < whole.stat().st_size / 2
    loaded = checkpoints.load(lean)
    checkpoints.load_model(loaded, lean)
    checkpoints.load_tokenizer(loaded)


# ------------------------------------------------------------------------------- no code is run


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["zip", "old torch format", "bare pickle"])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path: Path, kind: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    content = {**light(), "extra": Bomb(marker)}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(content))
        pickle.loads(path.read_bytes())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
        torch.load(path, weights_only=False)
    assert marker.exists(), "the bomb must be one"
    marker.rmdir()
    assert "holds code beside data; not loaded" in refused(path)
    assert not marker.exists()


def test_a_pickled_model_object_is_refused(tmp_path: Path, model: Transformer) -> None:
    path = tmp_path / "model.pt"
    torch.save(model, path)
    assert "not loaded" in refused(path)


# ------------------------------------------------------------------------------- damaged files


def test_there_is_no_checkpoint_where_there_is_none(tmp_path: Path) -> None:
    for path in (tmp_path / "no.pt", tmp_path):
        with pytest.raises(UserError, match="no checkpoint at"):
            checkpoints.load(path)


def test_a_file_cut_short_is_damaged_and_stays_as_it_is(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    path = tmp_path / "latest.pt"
    checkpoints.write_whole(path, checkpoint)
    whole = path.read_bytes()
    lengths = {0, 1, 2, 3, 4, 10, 100, 1_000, *range(len(whole) - 120, len(whole))}
    for length in sorted(lengths | {len(whole) * i // 20 for i in range(1, 20)}):
        path.write_bytes(whole[:length])
        found_damaged(path)


def test_an_empty_file_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "latest.pt"
    path.touch()
    assert found_damaged(path) == "no more than its beginning is left"


@pytest.mark.parametrize("lost", ["all", "beginning", "end", "middle"])
def test_zeros_where_a_disk_lost_something_are_damage(
    tmp_path: Path, checkpoint: Checkpoint, lost: str
) -> None:
    path = tmp_path / "latest.pt"
    checkpoints.write_whole(path, checkpoint)
    whole = path.read_bytes()
    page, size = 4_096, len(whole)
    start, end = {
        "all": (0, size), "beginning": (0, page), "end": (size - page, size),
        "middle": (size // 2, size // 2 + page),
    }[lost]  # fmt: skip
    path.write_bytes(whole[:start] + bytes(end - start) + whole[end:])
    reason = found_damaged(path)
    assert (reason == "it begins with zeros") == (start == 0)


def test_a_file_of_random_bytes_is_refused(tmp_path: Path) -> None:
    """Also such as begin like a pickle or a zip archive."""
    rng = random.Random(0)
    path = tmp_path / "latest.pt"
    for number in range(600):
        start = (b"", b"\x80\x02", b"PK\x03\x04")[number % 3]
        path.write_bytes(start + rng.randbytes(rng.randrange(1, 100)))
        refusal(path)


def test_text_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "latest.pt"
    texts = ["hello, this is text", "{}", json.dumps({"format": 1}), "\n", "cos\nsystem\n"]
    for content in [text.encode() for text in texts] + [b"\x7fELF" + bytes(200), bytes(1_000)]:
        path.write_bytes(content)
        refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(3),
        [1, 2, 3],
        {},
        {"model": {"w": torch.ones(2)}},
        {"format": checkpoints.FORMAT + 1, "model": {}},
        {"format": checkpoints.FORMAT, "model": {}},
        None,
    ],
)
def test_torch_files_of_another_kind_are_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    assert f"is not a checkpoint of this project (format {checkpoints.FORMAT})" in refused(path)


def test_a_sealed_file_of_another_format_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "latest.pt"
    checkpoints.write_whole(path, {**light(), "format": checkpoints.FORMAT - 1})
    assert "is not a checkpoint of this project" in refused(path)


# ------------------------------------------------------------------------------- the checksum


def assert_noticed(path: Path, places: Iterable[int]) -> None:
    """Change one byte after the other, each to another value drawn at random."""
    whole, rng = path.read_bytes(), random.Random(0)
    for place in places:
        other = bytes([whole[place] ^ rng.randrange(1, 256)])
        path.write_bytes(whole[:place] + other + whole[place + 1 :])
        with pytest.raises(DamagedCheckpoint, match="was not touched"):
            checkpoints.load(path)
    path.write_bytes(whole)
    checkpoints.load(path)


def test_no_byte_of_a_file_can_change_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "latest.pt"
    checkpoints.write_whole(path, light())
    size = path.stat().st_size
    assert size > 1_000
    assert_noticed(path, range(size))


def test_no_byte_of_a_real_checkpoint_can_change_unnoticed(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    path = tmp_path / "latest.pt"
    checkpoints.write_whole(path, checkpoint)
    rng, size = random.Random(1), path.stat().st_size
    assert_noticed(path, [rng.randrange(size) for _ in range(300)])


def test_torch_and_zip_readers_take_a_sealed_file(tmp_path: Path) -> None:
    """Also one that is longer than a zip archive's comment can be."""
    path = tmp_path / "latest.pt"
    for size in (64, 100_000):
        content = {**light(), "weight": torch.arange(float(size))}
        checkpoints.write_whole(path, content)
        assert same(torch.load(path, weights_only=True), content)
        assert same(torch.load(path, weights_only=True, mmap=True), content)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            comment = archive.comment
        plain = path.read_bytes().removesuffix(comment)[:-2] + bytes(2)
        assert comment == b"hamner sha256 " + hashlib.sha256(plain).hexdigest().encode()
        assert same(torch.load(io.BytesIO(plain), weights_only=True), content)


def test_a_file_without_a_checksum_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "latest.pt"
    torch.save(light(), path)
    assert found_damaged(path) == "its checksum is missing"


def test_a_file_with_something_after_its_checksum_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "latest.pt"
    checkpoints.write_whole(path, light())
    path.write_bytes(path.read_bytes() + b"\n")
    found_damaged(path)


def test_code_in_a_sealed_file_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    checkpoints.write_whole(path, {**light(), "extra": Bomb(marker)})
    assert "holds code beside data; not loaded" in refused(path)
    assert not marker.exists()


def test_too_little_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest.pt"
    checkpoints.write_whole(path, light())

    def load(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory. Buy new RAM!")

    monkeypatch.setattr(torch, "load", load)
    assert refused(path) == (
        f"can't load {path} (DefaultCPUAllocator: can't allocate memory), although the file is "
        "whole"
    )


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_place_that_a_disk_can_not_read_is_damage_and_a_forbidden_file_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "latest.pt"
    checkpoints.write_whole(path, light())

    def fail(_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoints, "find_damage", fail)
    if number == errno.EIO:
        assert found_damaged(path) == os.strerror(errno.EIO)
    else:
        assert refused(path) == f"can't read {path} (Permission denied)"


# ------------------------------------------------------------------------------- a failing disk


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def save(checkpoint: Any, file: Any) -> None:
        file.write(b"the first part of a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", save)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, RuntimeError("PytorchStreamWriter failed writing file")])
def test_a_disk_that_fills_up_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "latest.pt"
    checkpoints.write_whole(path, light(1))
    before = path.read_bytes()
    fill_the_disk(monkeypatch, error)
    with pytest.raises(UserError) as caught:
        checkpoints.write_whole(path, light(2))
    assert f"can't write {path} (" in str(caught.value) and str(error) in str(caught.value)
    assert "what was there before is intact" in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_error_of_the_disk_gets_through_torch_unchanged(
    checkpoint: Checkpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    """Wherever the disk is full; torch's own writer would tell something else, or more."""

    class Disk(io.BytesIO):
        def __init__(self, room: int):
            super().__init__()
            self.room = room

        def write(self, data: Any) -> int:
            if self.tell() + len(data) > self.room:
                raise FULL
            return super().write(data)

    whole = io.BytesIO()
    checkpoints.write_sealed(checkpoint, whole)
    for room in (0, 10, 100, 1_000, *range(5_000, len(whole.getvalue()), 5_000)):
        with pytest.raises(OSError) as caught:
            checkpoints.write_sealed(checkpoint, Disk(room))
        assert caught.value is FULL
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_the_disk(monkeypatch, FULL)
    with pytest.raises(UserError) as caught:
        checkpoints.save_step(tmp_path, light(2), CheckpointPart(every=1, keep_last=1))
    assert str(caught.value) == (
        f"can't write {tmp_path}/step_0000002.pt ([Errno 28] No space left on device): free some "
        "space there, or keep fewer files with checkpoint.keep_last; what was there before is "
        "intact"
    )


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latest.pt"
    checkpoints.write_whole(path, light(1))
    fill_the_disk(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write_whole(path, light(2))
    assert checkpoints.load(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "latest.pt"
    checkpoints.write_whole(path, light(1))

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match="what was there before is intact"):
        checkpoints.write_whole(path, light(2))
    monkeypatch.undo()
    assert checkpoints.load(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_an_error_in_plain_words(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="can't write"):
        checkpoints.write_whole(tmp_path / "checkpoints" / "base" / "latest.pt", light())


@pytest.fixture
def disk_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was flushed ('flush' and the name of the file or folder) and renamed, in order."""
    calls: list[str] = []
    fsync, rename = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        calls.append(f"flush {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    def noted_rename(old: Path, new: Path) -> None:
        calls.append(f"rename {old.name} {new.name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_rename)
    return calls


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")


@needs_proc
def test_file_and_folder_are_flushed_around_the_renaming(
    tmp_path: Path, disk_calls: list[str]
) -> None:
    checkpoints.write_whole(tmp_path / "latest.pt", light())
    assert disk_calls == [
        "flush latest.pt.tmp", "rename latest.pt.tmp latest.pt", f"flush {tmp_path.name}",
    ]  # fmt: skip


@needs_proc
def test_new_folders_are_flushed_into_those_above_them(
    tmp_path: Path, disk_calls: list[str]
) -> None:
    checkpoints.write_whole(tmp_path / "a" / "b" / "latest.pt", light())
    assert set(disk_calls[:2]) == {"flush a", f"flush {tmp_path.name}"}
    assert disk_calls[2] == "flush latest.pt.tmp" and disk_calls[-1] == "flush b"


@needs_proc
@pytest.mark.parametrize("linked", [True, False])
def test_old_steps_go_only_when_the_new_one_is_on_the_disk_by_both_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk_calls: list[str], linked: bool
) -> None:
    folder = tmp_path / "run"
    checkpoints.save_step(folder, light(1), CheckpointPart(every=1, keep_last=1))
    disk_calls.clear()
    remove = checkpoints.remove
    monkeypatch.setattr(
        checkpoints, "remove", lambda path: (disk_calls.append(f"remove {path.name}"), remove(path))
    )
    if not linked:
        monkeypatch.setattr(os, "link", no_links)
    checkpoints.save_step(folder, light(2), CheckpointPart(every=1, keep_last=1))
    assert disk_calls == [
        "flush step_0000002.pt.tmp", "rename step_0000002.pt.tmp step_0000002.pt", "flush run",
        *([] if linked else ["flush latest.pt.tmp"]),
        "rename latest.pt.tmp latest.pt", "flush run", "remove step_0000001.pt",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [None, errno.EINVAL, errno.ENOTSUP])
def test_a_platform_that_flushes_no_folders_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    fsync = os.fsync

    def fail(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    def flush_files(handle: int) -> None:
        if Path(f"/dev/fd/{handle}").is_dir():
            raise OSError(number, "no")
        fsync(handle)

    if number is None:
        monkeypatch.setattr(os, "open", fail)
    else:
        monkeypatch.setattr(os, "fsync", flush_files)
    checkpoints.write_whole(tmp_path / "latest.pt", light(3))
    monkeypatch.undo()
    assert checkpoints.load(tmp_path / "latest.pt")["step"] == 3


def test_what_a_killed_run_left_half_written_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "latest.pt"
    (tmp_path / "latest.pt.tmp").write_bytes(b"half")
    checkpoints.write_whole(path, light(5))
    assert checkpoints.load(path)["step"] == 5
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------- another model


def test_a_checkpoint_of_the_same_model_is_accepted(checkpoint: Checkpoint) -> None:
    checkpoints.check_same_model(checkpoint, CONFIG, Path("latest.pt"))


@pytest.mark.parametrize("key", asdict(CONFIG))
def test_a_checkpoint_of_another_model_is_refused_by_what_differs(
    checkpoint: Checkpoint, key: str
) -> None:
    ours = getattr(CONFIG, key)
    theirs = (not ours) if isinstance(ours, bool) else ours * 2
    if key == "num_attention_heads":
        theirs = 4
    checkpoint["model_config"][key] = theirs
    with pytest.raises(UserError) as caught:
        checkpoints.check_same_model(checkpoint, CONFIG, Path("some/latest.pt"))
    message = str(caught.value)
    assert message.startswith("some/latest.pt holds another model than the recipe describes: ")
    assert f"{key} {theirs} (recipe: {ours})" in message
    assert message.count("(recipe:") == 1


def test_all_that_differs_is_named(checkpoint: Checkpoint) -> None:
    config = replace(CONFIG, hidden_size=32, num_hidden_layers=3)
    with pytest.raises(UserError) as caught:
        checkpoints.check_same_model(checkpoint, config, Path("latest.pt"))
    assert "hidden_size 16 (recipe: 32), num_hidden_layers 2 (recipe: 3)" in str(caught.value)


def test_weights_of_another_shape_are_refused(checkpoint: Checkpoint) -> None:
    other = Transformer(replace(CONFIG, intermediate_size=40))
    with pytest.raises(UserError, match=r"best\.pt holds the weights of another model: size mis"):
        checkpoints.load_weights(other, checkpoint["model"], Path("best.pt"))


def test_missing_weights_are_refused(checkpoint: Checkpoint, model: Transformer) -> None:
    weights = dict(list(checkpoint["model"].items())[1:])
    with pytest.raises(UserError, match=r"best\.pt holds the weights of another model: "):
        checkpoints.load_weights(Transformer(CONFIG), weights, Path("best.pt"))


# ------------------------------------------------------------------------------- step files


def no_links(*_: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def steps_in(folder: Path) -> set[int]:
    return {int(path.stem[5:]) for path in folder.glob("step_*.pt")}


@contextlib.contextmanager
def new_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name) / "run"


def test_a_step_is_saved_under_its_number_and_as_latest(tmp_path: Path) -> None:
    retention = CheckpointPart(every=10, keep_last=2)
    path = checkpoints.save_step(tmp_path, light(123), retention)
    assert path == tmp_path / "step_0000123.pt"
    assert {file.name for file in tmp_path.iterdir()} == {"step_0000123.pt", "latest.pt"}
    assert same(checkpoints.load(path), light(123))
    assert same(checkpoints.load(tmp_path / "latest.pt"), light(123))


def test_latest_takes_no_room_of_its_own(tmp_path: Path) -> None:
    path = checkpoints.save_step(tmp_path, light(1), CheckpointPart(every=1, keep_last=1))
    assert path.samefile(tmp_path / "latest.pt")


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=10, unique=True).map(sorted),
    st.integers(1, 4),
    st.sampled_from([0, 5, 10]),
)
def test_the_newest_and_the_round_steps_stay_and_latest_is_the_newest(
    steps: list[int], keep_last: int, keep_every: int
) -> None:
    retention = CheckpointPart(every=1, keep_last=keep_last, keep_every=keep_every)
    with new_folder() as folder:
        for number, step in enumerate(steps, 1):
            checkpoints.save_step(folder, light(step), retention)
            saved = steps[:number]
            expected = set(saved[-keep_last:])
            expected |= {s for s in saved if keep_every and s % keep_every == 0}
            assert steps_in(folder) == expected
            assert checkpoints.load(folder / "latest.pt")["step"] == step
            assert not list(folder.glob("*.tmp"))


def test_the_step_just_saved_stays_where_an_abandoned_run_had_got_further(tmp_path: Path) -> None:
    """As after going back to an earlier step with --checkpoint."""
    retention = CheckpointPart(every=1, keep_last=2)
    for step in (10, 20, 30):
        checkpoints.save_step(tmp_path, light(step), retention)
    path = checkpoints.save_step(tmp_path, light(15), retention)
    assert path.exists()
    assert checkpoints.load(tmp_path / "latest.pt")["step"] == 15


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    mine = ["best.pt", "notes.txt", "step_0000001.pt.old", "step_0000010_good.pt", "step_final.pt"]
    mine += ["step_0000010_2.pt", "my_step_0000001.pt"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    for step in (20, 30, 40):
        checkpoints.save_step(tmp_path, light(step), CheckpointPart(every=1, keep_last=1))
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {*mine, "step_0000040.pt", "latest.pt"}


def test_a_save_that_fails_leaves_latest_and_the_older_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retention = CheckpointPart(every=1, keep_last=1)
    checkpoints.save_step(tmp_path, light(1), retention)
    fill_the_disk(monkeypatch, FULL)
    with pytest.raises(UserError):
        checkpoints.save_step(tmp_path, light(2), retention)
    monkeypatch.undo()
    assert steps_in(tmp_path) == {1}
    assert checkpoints.load(tmp_path / "latest.pt")["step"] == 1


def test_what_killed_runs_left_half_written_goes_with_the_next_save(tmp_path: Path) -> None:
    """A run that is killed at a step of its own, such as by a second Ctrl-C, never writes that
    file again."""
    (tmp_path / "step_0000017.pt.tmp").write_bytes(b"half")
    checkpoints.save_step(tmp_path, light(20), CheckpointPart(every=10, keep_last=1))
    assert {path.name for path in tmp_path.iterdir()} == {"step_0000020.pt", "latest.pt"}


def test_an_old_step_that_can_not_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save_step(tmp_path, light(1), CheckpointPart(every=1, keep_last=1))
    unlink = Path.unlink

    def forbidden(path: Path, missing_ok: bool = False) -> None:
        if path.name == "step_0000001.pt":
            raise PermissionError(errno.EACCES, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", forbidden)
    with pytest.raises(UserError) as caught:
        checkpoints.save_step(tmp_path, light(2), CheckpointPart(every=1, keep_last=1))
    assert str(caught.value).startswith(
        f"can't remove {tmp_path}/step_0000001.pt (Permission denied), which is not needed"
    )
    assert checkpoints.load(tmp_path / "latest.pt")["step"] == 2


def checkpoint_bytes(parameters: int) -> int:
    """fp32 weights and the optimizer's two fp32 moments; tokenizer, names and padding are few."""
    return 12 * parameters + 8_000_000


def test_a_checkpoint_takes_twelve_bytes_a_parameter(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, hidden_size=256, intermediate_size=700, num_hidden_layers=3)
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    checkpoint = checkpoints.make_checkpoint(
        model, tokenizer, "base", {}, step=1, position={}, optimizer=optimizer.state_dict()
    )
    checkpoints.write_whole(tmp_path / "latest.pt", checkpoint)
    size, parameters = (tmp_path / "latest.pt").stat().st_size, config.num_parameters()
    assert parameters > 1_000_000
    assert 12 * parameters < size < 12.2 * parameters + 100_000
    assert size < checkpoint_bytes(parameters)


@pytest.mark.parametrize("linked", [True, False])
def test_stage_1_of_the_real_run_never_holds_more_than_20_gigabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    """At each renaming a new file stands beside all old ones: there is never more than then."""
    recipe = load_recipe("v4")
    base = recipe.base
    size = checkpoint_bytes(recipe.model.config().num_parameters())
    assert 1.9e9 < size < 2.1e9 and base.steps == 400_000
    held, rename = [], os.replace

    def counting_rename(old: Path, new: Path) -> None:
        held.append(len({path.stat().st_ino for path in tmp_path.iterdir()}))
        rename(old, new)

    monkeypatch.setattr(os, "replace", counting_rename)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    if not linked:
        monkeypatch.setattr(os, "link", no_links)
    checkpoints.write_whole(tmp_path / "best.pt", light(0))
    for step in range(base.checkpoint.every, base.steps + 1, base.checkpoint.every):
        checkpoints.save_step(tmp_path, light(step), base.checkpoint)
    assert len(held) == 1 + 2 * 400
    assert max(held) >= base.checkpoint.keep_last + 2, "the file being written was not counted"
    assert max(held) * size < 20e9
    assert {100_000, 200_000, 300_000, 399_000, 400_000} == steps_in(tmp_path)


# ------------------------------------------------------------------------------- the newest whole


def saved_steps(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoints.save_step(folder, light(step), CheckpointPart(every=1, keep_last=9))


def damage_middle(*paths: Path) -> None:
    """Flip a byte in place: a file that has two names is damaged by both."""
    for path in paths:
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))


Output = pytest.CaptureFixture[str]


def test_the_newest_is_the_latest_where_all_is_well(tmp_path: Path, capsys: Output) -> None:
    saved_steps(tmp_path, 1, 2)
    path, checkpoint = checkpoints.load_newest(tmp_path)
    assert path == tmp_path / "latest.pt" and same(checkpoint, light(2))
    assert capsys.readouterr().out == ""


def test_a_damaged_latest_falls_back_to_the_step_before_and_reads_no_file_twice(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """latest.pt and the newest step file are one file."""
    saved_steps(tmp_path, 1, 2, 10, 11)
    damage_middle(tmp_path / "latest.pt")
    read, load = [], checkpoints.load
    monkeypatch.setattr(checkpoints, "load", lambda path: (read.append(path.name), load(path))[1])
    path, checkpoint = checkpoints.load_newest(tmp_path)
    assert path == tmp_path / "step_0000010.pt" and checkpoint["step"] == 10
    assert read == ["latest.pt", "step_0000010.pt"]
    assert capsys.readouterr().out == (
        f"{tmp_path}/latest.pt is damaged (wrong checksum): falling back to step_0000010.pt\n"
    )


def test_a_latest_that_is_a_copy_falls_back_to_the_step_that_it_was_copied_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_links)
    saved_steps(tmp_path, 1, 2)
    damage_middle(tmp_path / "latest.pt")
    assert checkpoints.load_newest(tmp_path)[0] == tmp_path / "step_0000002.pt"


def test_every_damaged_file_on_the_way_is_told(tmp_path: Path, capsys: Output) -> None:
    saved_steps(tmp_path, 1, 2, 3)
    damage_middle(tmp_path / "latest.pt")
    (tmp_path / "step_0000002.pt").write_bytes(b"")
    assert checkpoints.load_newest(tmp_path)[1]["step"] == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/latest.pt is damaged (wrong checksum): falling back to step_0000002.pt",
        f"{tmp_path}/step_0000002.pt is damaged (no more than its beginning is left): "
        "falling back to step_0000001.pt",
    ]


def test_names_are_tried_in_turn_and_missing_ones_passed_over(tmp_path: Path) -> None:
    saved_steps(tmp_path, 1, 2)
    names = ("best.pt", "latest.pt")
    assert checkpoints.load_newest(tmp_path, names)[0].name == "latest.pt"
    checkpoints.write_whole(tmp_path / "best.pt", light(7))
    assert checkpoints.load_newest(tmp_path, names)[0].name == "best.pt"
    damage_middle(tmp_path / "best.pt")
    assert checkpoints.load_newest(tmp_path, names)[0].name == "latest.pt"
    (tmp_path / "latest.pt").unlink()
    assert checkpoints.load_newest(tmp_path, names)[0].name == "step_0000002.pt"


def test_where_all_are_damaged_the_folder_is_named_and_what_to_do(tmp_path: Path) -> None:
    saved_steps(tmp_path, 1, 2)
    damage_middle(tmp_path / "latest.pt")
    (tmp_path / "step_0000001.pt").write_bytes(b"P")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DamagedCheckpoint) as caught:
        checkpoints.load_newest(tmp_path)
    assert str(caught.value) == (
        f"every checkpoint in {tmp_path} is damaged and was not touched (latest.pt: wrong "
        "checksum; step_0000001.pt: no more than its beginning is left): put back a copy of one "
        "if you have it, name another with --checkpoint, or begin the stage anew with --fresh"
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["", "not/there"])
def test_where_there_is_no_checkpoint_nothing_is_called_damaged(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"^no checkpoint in ") as caught:
        checkpoints.load_newest(tmp_path / name)
    assert type(caught.value) is UserError


def test_what_is_no_checkpoint_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    """A latest.pt of another project or version is no accident: its owner is to decide."""
    saved_steps(tmp_path, 1, 2)
    (tmp_path / "latest.pt").unlink()
    torch.save({"model": {}}, tmp_path / "latest.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project") as caught:
        checkpoints.load_newest(tmp_path)
    assert type(caught.value) is UserError


# ------------------------------------------------------------------------------- links and renames


def test_a_link_that_fails_is_an_error_in_plain_words_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where links can't be made, and the disk has no room for a copy."""
    saved_steps(tmp_path, 1)

    def fail(source: Any, target: Any, _: int) -> None:
        target.write(b"half")
        raise FULL

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr("shutil.copyfileobj", fail)
    with pytest.raises(UserError, match=r"can't write .*/latest\.pt .*No space left"):
        saved_steps(tmp_path, 2)
    monkeypatch.undo()
    assert checkpoints.load(tmp_path / "latest.pt")["step"] == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_link_to_what_it_names_already_leaves_nothing_behind(tmp_path: Path) -> None:
    """rename does nothing where both names are of the same file."""
    saved_steps(tmp_path, 1)
    checkpoints.link_whole(tmp_path / "step_0000001.pt", tmp_path / "latest.pt")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_link_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    old, new, path = tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "latest.pt"
    old.write_text("old")
    new.write_text("new")
    for existing in (old, new):
        checkpoints.link_whole(existing, path)
        assert path.samefile(existing)
    assert old.read_text() == "old"
    assert {file.name for file in tmp_path.iterdir()} == {"a.pt", "b.pt", "latest.pt"}


def test_where_there_are_no_links_a_copy_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_links)
    path = checkpoints.save_step(tmp_path, light(3), CheckpointPart(every=1, keep_last=1))
    latest = tmp_path / "latest.pt"
    assert latest.read_bytes() == path.read_bytes() and not latest.samefile(path)
    assert {file.name for file in tmp_path.iterdir()} == {"step_0000003.pt", "latest.pt"}


def test_a_link_half_made_by_a_killed_run_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "latest.pt.tmp").write_text("half")
    (tmp_path / "a.pt").write_text("new")
    checkpoints.link_whole(tmp_path / "a.pt", tmp_path / "latest.pt")
    assert (tmp_path / "latest.pt").read_text() == "new"
    assert not (tmp_path / "latest.pt.tmp").exists()


def test_nothing_is_moved_aside_where_there_is_nothing(tmp_path: Path) -> None:
    assert checkpoints.move_aside(tmp_path / "base") is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_moving_aside_never_overwrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Five runs moved aside within the same second all stay."""
    monkeypatch.setattr("time.strftime", lambda _: "20250102-030405")
    path, moved = tmp_path / "base", []
    for number in range(5):
        if kind == "folder":
            path.mkdir()
        content = path / "latest.pt" if kind == "folder" else path
        content.write_text(str(number))
        aside = checkpoints.move_aside(path)
        assert aside is not None and aside.name.startswith("base.old-20250102-030405")
        assert not path.exists()
        moved.append(aside)
    assert len(set(moved)) == 5
    contents = [aside / "latest.pt" if kind == "folder" else aside for aside in moved]
    assert [content.read_text() for content in contents] == list("01234")
