"""The reference model's log-probabilities of preference pairs, kept on disk for the next run.

They follow from the weights, the tokens and the precision alone, whatever beta or learning rate a
run has. Each set of pairs has a file, named by a fingerprint of all that its numbers follow from.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hamner.errors import first_line
from hamner.files import write_bytes_whole
from hamner.tokenization import CHAT_TEMPLATE
from model import Transformer

FORMAT = 1


@dataclass
class ReferenceCache:
    """Log-probabilities by one reference model, as it stands now, in the files of a folder."""

    folder: Path
    model: Transformer
    arithmetic: str  # precision and kind of device, such as "fp16 on cuda"

    def log_probabilities(self, pairs: str, count: int, compute: Callable[[], Tensor]) -> Tensor:
        """(2, count), chosen above rejected: from the file if it is sound, else computed and kept.

        `pairs` is a digest of the tokenised pairs. A file that is damaged or holds something else
        is told of and replaced; where none can be written, the run goes on without.
        """
        path = self.path(pairs)
        kept = read_log_probabilities(path, count)
        if kept is not None:
            return kept
        computed = compute()
        try:
            write_bytes_whole(path, [packed(path.stem, computed)])
        except OSError as error:
            print(f"{path}: {error.strerror}; the reference is not kept for other runs", flush=True)
        return computed

    def path(self, pairs: str) -> Path:
        told = {
            "format": FORMAT,
            "weights": self._weights,
            "model": asdict(self.model.config),
            "arithmetic": self.arithmetic,
            "template": CHAT_TEMPLATE,
            "pairs": pairs,
        }
        text = json.dumps(told, sort_keys=True).encode()
        return self.folder / f"{hashlib.blake2b(text, digest_size=16).hexdigest()}.pt"

    @functools.cached_property
    def _weights(self) -> str:
        return weights_digest(self.model)


def weights_digest(model: Transformer) -> str:
    """A fingerprint of every parameter's name, shape and bytes."""
    blake = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        blake.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        blake.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return blake.hexdigest()


def packed(fingerprint: str, log_probabilities: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save({"fingerprint": fingerprint, "log_probabilities": log_probabilities}, buffer)
    return buffer.getvalue()


def read_log_probabilities(path: Path, count: int) -> Tensor | None:
    """What `packed` wrote to this file, (2, count); None, and a sentence, if it isn't that."""
    if not path.exists():
        return None
    try:
        if broken := zipfile.ZipFile(path).testzip():
            raise ValueError(f"wrong checksum of {broken}")
        kept = torch.load(path, map_location="cpu", weights_only=True)
        found = kept["log_probabilities"]
        if kept["fingerprint"] != path.stem or found.shape != (2, count):
            raise ValueError("it belongs to another model or other pairs")
        return found
    except Exception as error:  # the unpickler raises many kinds
        reason = first_line(error).split(". ")[0]
        print(f"{path} can't be used ({reason}): the reference is computed anew", flush=True)
        return None
