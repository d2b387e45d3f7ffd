"""Tests of the checkpoints: whole or not at all, data and no code, retention."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import some_text
from hypothesis import given, settings
from hypothesis import strategies as st

from hamner import checkpoints, tokenization
from hamner.checkpoints import Checkpoint
from hamner.errors import UserError
from hamner.recipe import CheckpointPart
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


def refused(path: Path) -> str:
    """What is said about a file that is no good; checks that it stays as it is."""
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        checkpoints.load(path)
    assert path.read_bytes() == before
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


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


def test_a_file_cut_short_is_refused_and_stays_as_it_is(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    path = tmp_path / "latest.pt"
    checkpoints.write_whole(path, checkpoint)
    whole = path.read_bytes()
    lengths = {0, 1, 2, 3, 4, 10, 100, 1_000, len(whole) - 1, len(whole) - 30}
    for length in sorted(lengths | {len(whole) * i // 20 for i in range(1, 20)}):
        path.write_bytes(whole[:length])
        refused(path)


def test_an_empty_file_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "latest.pt"
    path.touch()
    assert "is damaged or cut short, and was not touched" in refused(path)


def test_a_file_of_random_bytes_is_refused(tmp_path: Path) -> None:
    """Also such as begin like a pickle or a zip file does."""
    rng = random.Random(0)
    path = tmp_path / "latest.pt"
    for number in range(600):
        start = (b"", b"\x80\x02", b"PK\x03\x04")[number % 3]
        path.write_bytes(start + rng.randbytes(rng.randrange(1, 100)))
        refused(path)


def test_text_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "latest.pt"
    texts = ["hello, this is text", "{}", json.dumps({"format": 1}), "\n", "cos\nsystem\n"]
    for content in [text.encode() for text in texts] + [b"\x7fELF" + bytes(200), bytes(1_000)]:
        path.write_bytes(content)
        refused(path)


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
    assert "is not a checkpoint of this project (format 1)" in refused(path)


def test_a_changed_weight_is_noticed(tmp_path: Path) -> None:
    """A disk or a download can flip a bit without changing the file's length."""
    path = tmp_path / "latest.pt"
    checkpoints.write_whole(path, light())
    content = bytearray(path.read_bytes())
    content[content.find(light()["weight"].numpy().tobytes()) + 41] ^= 16
    path.write_bytes(content)
    assert "damaged" in refused(path)


# ------------------------------------------------------------------------------- a failing disk


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
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


def test_the_file_is_flushed_before_it_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), rename(a, b)))
    checkpoints.write_whole(tmp_path / "latest.pt", light())
    assert calls == ["fsync", "replace"]


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


# ------------------------------------------------------------------------------- links and renames


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
    def link(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
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
