"""Saving while training goes on: a copy of everything is made, and a thread writes the copy."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, UntypedStorage

from hamner import checkpoints
from hamner.checkpoints import Checkpoint
from hamner.recipe import CheckpointPart

Memory = dict[tuple[torch.device, int, int], UntypedStorage]  # by device, address and bytes


class Saver:
    """Writes checkpoints in the background, one at a time.

    It keeps the memory of the last copy for the next one. A program that ends in good order waits
    for a save that is running; call `wait` to learn whether it went well.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._memory: Memory = {}

    def save(self, folder: Path, checkpoint: Checkpoint, retention: CheckpointPart) -> None:
        """Begin what `checkpoints.save_step` does; the checkpoint may change after the return.

        Raises:
            UserError: the save before this one failed; this one was not begun.
        """
        self._begin(checkpoint, lambda copied: checkpoints.save_step(folder, copied, retention))

    def save_weights(self, path: Path, checkpoint: Checkpoint) -> None:
        """Begin to write a checkpoint to `path` without its training state.

        Raises:
            UserError: the save before this one failed; this one was not begun.
        """
        lean = checkpoints.without_training_state(checkpoint)
        self._begin(lean, partial(checkpoints.write_whole, path))

    def check(self) -> None:
        """Raise the error of a save that failed, once; don't wait for one that is running."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait for a save that is running; raise the error if it failed, or one before it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _begin(self, checkpoint: Checkpoint, write: Callable[[Checkpoint], object]) -> None:
        self.wait()
        copied, self._memory = copy_to_cpu(checkpoint, self._memory)
        self._thread = threading.Thread(target=self._run, args=(write, copied), name="saver")
        self._thread.start()  # no daemon: that would be cut off when the program ends

    def _run(self, write: Callable[[Checkpoint], object], copied: Checkpoint) -> None:
        try:
            write(copied)
        except BaseException as error:
            self._error = error


def copy_to_cpu(checkpoint: Checkpoint, memory: Memory) -> tuple[Checkpoint, Memory]:
    """A copy that nothing shares with the checkpoint, and the memory that its tensors lie in.

    Tensors that share memory, such as tied weights, share it in the copy, so that a file holds them
    once. What `memory` holds of an earlier copy is written over.
    """
    used: Memory = {}
    copies = {id(tensor): copy_tensor(tensor, memory, used) for tensor in tensors_in(checkpoint)}
    return copy.deepcopy(checkpoint, copies), used


def tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


def copy_tensor(tensor: Tensor, memory: Memory, used: Memory) -> Tensor:
    """A copy on the CPU, in a part of `memory` or in new; notes in `used` what it lies in."""
    storage = tensor.untyped_storage()
    key = storage.device, storage.data_ptr(), storage.nbytes()
    if key not in used:
        used[key] = memory.get(key) or UntypedStorage(storage.nbytes())
        used[key].copy_(storage)
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(used[key], tensor.storage_offset(), tensor.size(), tensor.stride())
