"""Sequences cut in chunks, for states that are matrices (Mamba-2, RetNet, HGRN2).

Within a chunk such a layer is attention under a mask of decays; from chunk to chunk its state goes
on. So most of the work is matrix products, and the state exists once per chunk.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def chunks(x: Tensor, size: int, filler: float = 0.0) -> Tensor:
    """(B, T, ...) -> (B, n, size, ...), filled up at the end."""
    padding = (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % size)
    return F.pad(x, padding, value=filler).unflatten(1, (-1, size))


def passed_on(kept: Tensor, added: Tensor, start: Tensor) -> list[Tensor]:
    """The states before, between and after n chunks.

    What share each chunk keeps (B, n, ...), what it adds (B, n, ...), and the first state (B, ...).
    """
    states = [start]
    for share, new in zip(kept.unbind(1), added.unbind(1), strict=True):
        states.append(share * states[-1] + new)
    return states
