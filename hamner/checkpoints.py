"""Checkpoints: self-contained `.pt` files, written whole or not at all, read without unpickling."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import time
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hamner import tokenization
from hamner.errors import UserError, first_line
from hamner.recipe import CheckpointPart
from hamner.tokenization import CHAT_TEMPLATE, Tokenizer
from model import ModelConfig, Transformer

FORMAT = 1
Checkpoint = dict[str, Any]
NEEDED_KEYS = ("stage", "recipe", "model_config", "model", "tokenizer", "step", "position")
# What only the continuation of the same stage needs; best.pt goes without.
TRAINING_KEYS = ("optimizer", "scaler", "data", "rng", "extra")


def make_checkpoint(
    model: Transformer, tokenizer: Tokenizer, stage: str, recipe: Mapping[str, Any], **state: Any
) -> Checkpoint:
    """Everything that a stage, a chat or an export needs to go on from here."""
    return {
        "format": FORMAT,
        "stage": stage,
        "recipe": dict(recipe),
        "model_config": asdict(model.config),
        "model": model.state_dict(),
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
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"can't write {path} ({error}); what was there before is intact") from None


def link_whole(existing: Path, path: Path) -> None:
    """Make `path` another name of the file `existing`, atomically; a copy where links can't be."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(existing, temporary)
    except OSError:
        shutil.copyfile(existing, temporary)
    os.replace(temporary, path)


def save_step(folder: Path, checkpoint: Checkpoint, retention: CheckpointPart) -> Path:
    """Write step_NNNNNNN.pt, let latest.pt name it too, and drop step files past retention."""
    path = folder / f"step_{checkpoint['step']:07d}.pt"
    write_whole(path, checkpoint)
    link_whole(path, folder / "latest.pt")
    for old in outdated(folder, retention):
        if old != path:
            old.unlink(missing_ok=True)
    return path


def outdated(folder: Path, retention: CheckpointPart) -> list[Path]:
    """Step files that are neither among the newest `keep_last` nor multiples of `keep_every`."""
    named = ((re.fullmatch(r"step_(\d{7,})\.pt", path.name), path) for path in folder.iterdir())
    steps = {int(match[1]): path for match, path in named if match}
    newest = sorted(steps)[-retention.keep_last :]
    return [
        path
        for step, path in steps.items()
        if step not in newest and not (retention.keep_every and step % retention.keep_every == 0)
    ]


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU; nothing in it is executed.

    Raises:
        UserError: missing, cut short, not a checkpoint, or one with more than data in it.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"wrong checksum of {part}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is not a checkpoint of this project, or holds code beside data; not loaded"
        ) from None
    except Exception as error:  # the unpickler raises many kinds
        reason = first_line(error).split(". ")[0]  # torch follows it with advice of its own
        raise UserError(f"{path} is damaged or cut short, and was not touched ({reason})") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project (format {FORMAT})")
    missing = [key for key in NEEDED_KEYS if key not in checkpoint]
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of this project (format {FORMAT}): it lacks "
            f"{', '.join(missing)}"
        )
    return checkpoint


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
