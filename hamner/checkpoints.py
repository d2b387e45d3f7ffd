"""Checkpoints: self-contained `.pt` files, written whole or not at all, read without unpickling.

A file is what torch.save writes, a zip archive, and at its end, as the archive's comment, the
checksum of all that comes before. torch.load and any zip reader take it as it is.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hamner import tokenization
from hamner.errors import UserError, first_line
from hamner.recipe import CheckpointPart
from hamner.tokenization import CHAT_TEMPLATE, Tokenizer
from model import ModelConfig, Transformer

FORMAT = 2
Checkpoint = dict[str, Any]
NEEDED_KEYS = ("stage", "recipe", "model_config", "model", "tokenizer", "step", "position")
# What only the continuation of the same stage needs; best.pt goes without.
TRAINING_KEYS = ("optimizer", "scaler", "data", "rng", "extra")
ZIP_BEGINS = b"PK\x03\x04"
# A zip archive ends with the length of its comment, in two bytes, and the comment.
SEAL = b"hamner sha256 "  # sha256: twice as fast as blake2b on a CPU that has instructions for it
SEAL_BYTES = 2 + len(SEAL) + 2 * hashlib.sha256().digest_size
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DamagedCheckpoint(UserError):
    """The bytes of a checkpoint are not those that were written; `reason` says how that shows."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def make_checkpoint(
    model: Transformer,
    tokenizer: Tokenizer,
    stage: str,
    recipe: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    **state: Any,
) -> Checkpoint:
    """Everything that a stage, a chat or an export needs to go on from here.

    `weights` are the model's if it doesn't have all of them itself, shared out over ranks.
    """
    return {
        "format": FORMAT,
        "stage": stage,
        "recipe": dict(recipe),
        "model_config": asdict(model.config),
        "model": dict(weights if weights is not None else model.state_dict()),
        "tokenizer": tokenizer.to_json(),
        "chat_template": CHAT_TEMPLATE,
        **state,
    }


def without_training_state(checkpoint: Checkpoint) -> Checkpoint:
    return {key: value for key, value in checkpoint.items() if key not in TRAINING_KEYS}


def write_whole(path: Path, checkpoint: Checkpoint) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, and rename it into place.

    Raises:
        UserError: the disk is full or not writable; nothing at `path` has changed.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        make_folder(path.parent)
        with open(temporary, "wb") as file:
            write_sealed(checkpoint, file)
            flush_file(file)
        os.replace(temporary, path)
        flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise not_written(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_sealed(checkpoint: Checkpoint, file: BinaryIO) -> None:
    """Write a checkpoint at the beginning of a file, and the checksum at its end."""
    hashed = HashedFile(file)
    torch.save(checkpoint, hashed)  # type: ignore[arg-type]  # it needs no more than write, flush
    if hashed.error is not None:
        raise hashed.error
    file.seek(-2, os.SEEK_END)  # where the archive says that it has no comment
    file.write(seal(hashed.hash.hexdigest()))


class HashedFile:
    """A file, for torch.save to write to, that hashes what goes through.

    torch's writer takes no exception well: it tries to complete the archive and raises another
    that says nothing of the disk. So a failed write is kept in `error`, and those after it go
    nowhere.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.hash = file, hashlib.sha256()
        self.error: BaseException | None = None

    def write(self, data: memoryview) -> int:
        if self.error is None:
            try:
                self.file.write(data)
                self.hash.update(data)
            except BaseException as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """What torch.save calls at its end; the file itself is flushed when it is complete."""


def seal(digest: str) -> bytes:
    """What a file ends with: length and text of the archive's comment."""
    comment = SEAL + digest.encode()
    return len(comment).to_bytes(2, "little") + comment


def not_written(path: Path, error: Exception) -> UserError:
    advice = ""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        advice = ": free some space there, or keep fewer files with checkpoint.keep_last"
    return UserError(f"can't write {path} ({error}){advice}; what was there before is intact")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that a power cut doesn't take them away again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush_folder(path.parent)


def flush_file(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make names in a folder outlast a power cut, where the platform knows how to."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems
            raise
    finally:
        os.close(handle)


def link_whole(existing: Path, path: Path) -> None:
    """Make `path` another name of the file `existing`, atomically; a copy where links can't be.

    Raises:
        UserError: the disk is full or not writable; nothing at `path` has changed.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(existing, temporary)
        except OSError:
            copy_flushed(existing, temporary)
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        raise not_written(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def copy_flushed(existing: Path, path: Path) -> None:
    with open(existing, "rb") as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
        flush_file(target)


def save_step(folder: Path, checkpoint: Checkpoint, retention: CheckpointPart) -> Path:
    """Write step_NNNNNNN.pt, let latest.pt name it too, and drop step files past retention.

    Nothing is dropped before the new file and its name latest.pt are on the disk.

    Raises:
        UserError: the disk is full or not writable; the files that were there are intact.
    """
    for half_written in folder.glob("step_*.pt.tmp"):  # of a run that was killed
        remove(half_written)
    path = folder / f"step_{checkpoint['step']:07d}.pt"
    write_whole(path, checkpoint)
    link_whole(path, folder / "latest.pt")
    for old in outdated(folder, retention):
        if old != path:
            remove(old)
    return path


def remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        reason = f"can't remove {path} ({error.strerror}), which is not needed any more"
        raise UserError(f"{reason}: make its folder writable, or remove it yourself") from None


def outdated(folder: Path, retention: CheckpointPart) -> list[Path]:
    """Step files that are neither among the newest `keep_last` nor multiples of `keep_every`."""
    steps = step_files(folder)
    newest = sorted(steps)[-retention.keep_last :]
    return [
        path
        for step, path in steps.items()
        if step not in newest and not (retention.keep_every and step % retention.keep_every == 0)
    ]


def step_files(folder: Path) -> dict[int, Path]:
    """The step files in a folder, by their steps."""
    paths = folder.iterdir() if folder.is_dir() else ()
    named = ((re.fullmatch(r"step_(\d{7,})\.pt", path.name), path) for path in paths)
    return {int(match[1]): path for match, path in named if match}


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU; nothing in it is executed.

    Raises:
        DamagedCheckpoint: cut short, or any byte of it is not what was written.
        UserError: missing, not a checkpoint, of another format, or with more than data in it.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    sealed = is_sealed(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is not a checkpoint of this project, or holds code beside data; not loaded"
        ) from None
    except Exception as error:  # torch raises many kinds
        reason = first_line(error).split(". ")[0]  # torch follows it with advice of its own
        if sealed:
            raise UserError(f"can't load {path} ({reason}), although the file is whole") from None
        raise damaged(path, reason) from None
    check_content(checkpoint, path)
    if not sealed:
        raise damaged(path, "its checksum is missing")
    return checkpoint


def damaged(path: Path, reason: str) -> DamagedCheckpoint:
    message = f"{path} is damaged or cut short, and was not touched ({reason})"
    return DamagedCheckpoint(message, reason)


def is_sealed(path: Path) -> bool:
    """Whether a file ends with its checksum, and with the right one.

    Raises:
        DamagedCheckpoint: it is a wrong one, or what is left of the file is too little to tell.
        UserError: this file can't be read by this user now.
    """
    try:
        with open(path, "rb") as file:
            problem, sealed = find_damage(file)
    except OSError as error:
        if error.errno != errno.EIO:  # what a disk says of a place that it can't read any more
            raise UserError(f"can't read {path} ({error.strerror})") from None
        problem, sealed = str(error.strerror), False
    if problem:
        raise damaged(path, problem)
    return sealed


def find_damage(file: BinaryIO) -> tuple[str | None, bool]:
    """What shows that a file is damaged, if anything does, and whether it ends with a checksum."""
    begin = file.read(len(ZIP_BEGINS))
    if len(begin) < len(ZIP_BEGINS) and ZIP_BEGINS.startswith(begin):
        return "no more than its beginning is left", False
    if not any(begin):
        return "it begins with zeros", False
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - SEAL_BYTES))
    ending = file.read()
    if not ending[2:].startswith(SEAL):
        return None, False
    right = ending == seal(hash_before_seal(file, size - SEAL_BYTES))
    return None if right else "wrong checksum", True


def hash_before_seal(file: BinaryIO, size: int) -> str:
    """The hash of an archive of `size` bytes and two more, in which it says: no comment."""
    file.seek(0)
    hashed, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    while size and (count := file.readinto(buffer[:size])):  # type: ignore[attr-defined]
        hashed.update(buffer[:count])
        size -= count
    hashed.update(bytes(2))
    return hashed.hexdigest()


def check_content(checkpoint: object, path: Path) -> None:
    """Refuse what is not a checkpoint of this project and format."""
    refusal = f"{path} is not a checkpoint of this project (format {FORMAT})"
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(refusal)
    if missing := [key for key in NEEDED_KEYS if key not in checkpoint]:
        raise UserError(f"{refusal}: it lacks {', '.join(missing)}")


def load_newest(folder: Path, names: Sequence[str] = ("latest.pt",)) -> tuple[Path, Checkpoint]:
    """Read the first of `names` that is there and whole, or else the newest step file that is.

    Each damaged file is told in one line.

    Returns:
        The file that was read, and what it holds.

    Raises:
        DamagedCheckpoint: there are checkpoints, and all of them are damaged.
        UserError: there is none, or the first that is whole is not a checkpoint of this project.
    """
    found = newest_first(folder, names)
    if not found:
        raise UserError(f"no checkpoint in {folder}")
    reasons = []
    for path, following in zip_longest(found, found[1:]):
        try:
            return path, load(path)
        except DamagedCheckpoint as error:
            reasons.append(f"{path.name}: {error.reason}")
            if following is not None:
                told = f"{path} is damaged ({error.reason}): falling back to {following.name}"
                print(told, flush=True)
    raise DamagedCheckpoint(
        f"every checkpoint in {folder} is damaged and was not touched ({'; '.join(reasons)}): put "
        "back a copy of one if you have it, name another with --checkpoint, or begin the stage "
        "anew with --fresh",
        reasons[0],
    )


def newest_first(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files in a folder that have these names, then step files; each file by one name only."""
    steps = step_files(folder)
    paths = [folder / name for name in names] + [steps[step] for step in sorted(steps)[::-1]]
    files: dict[tuple[int, int], Path] = {}
    for path in paths:
        if path.is_file():
            status = path.stat()
            files.setdefault((status.st_dev, status.st_ino), path)
    return list(files.values())


def model_config(checkpoint: Checkpoint) -> ModelConfig:
    known = {field.name for field in fields(ModelConfig)}
    return ModelConfig(**{k: v for k, v in checkpoint["model_config"].items() if k in known})


def load_model(checkpoint: Checkpoint, path: Path) -> Transformer:
    """The model that a checkpoint holds, on the CPU, in fp32.

    Raises:
        UserError: its weights don't fit its own configuration.
    """
    model = Transformer(model_config(checkpoint))
    load_weights(model, checkpoint["model"], path)
    return model


def load_weights(model: Transformer, weights: Mapping[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} holds the weights of another model: {reason}") from None


def check_same_model(checkpoint: Checkpoint, config: ModelConfig, path: Path) -> None:
    """Refuse a checkpoint whose model is not the recipe's, naming what differs."""
    theirs, ours = asdict(model_config(checkpoint)), asdict(config)
    different = [
        f"{key} {theirs[key]} (recipe: {ours[key]})" for key in ours if theirs[key] != ours[key]
    ]
    if different:
        raise UserError(
            f"{path} holds another model than the recipe describes: {', '.join(different)}; "
            "give its own recipe, or begin anew with --fresh and a stage before it"
        )


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return tokenization.from_json(checkpoint["tokenizer"])


def exist_in(folder: Path, names: Sequence[str] = ("latest.pt",)) -> bool:
    """Whether a folder holds anything for `load_newest` to read."""
    return bool(newest_first(folder, names))


def move_aside(path: Path) -> Path | None:
    """Rename a file or folder to `<name>.old-<time>`; return the new name, or None if absent."""
    if not path.exists():
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = path.with_name(f"{path.name}.old-{stamp}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.old-{stamp}-{number}")
    path.rename(aside)
    return aside
