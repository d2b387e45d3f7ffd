"""The linear recurrence h[t] = a[t] * h[t-1] + b[t], elementwise, over a whole sequence.

What gated linear RNNs (Hawk, the liquid cell, RWKV-4) have in common. It only ever
multiplies decays and adds, never divides by a product of them nor takes a logarithm, so decays of
exactly 0 and 1 and products that underflow are as good as any.

The backward pass is the same recurrence run from the end: with G the gradient of h and g what
comes from above, G[t] = g[t] + a[t+1] * G[t+1], and so db = G and da[t] = G[t] * h[t-1]. Only a and
h are kept for it; there is no graph over the steps.

The order of work depends on the machine (`chunk_length`). A step over many channels keeps a CPU's
core busy, so there all steps follow one another. Where a step is too small for that, and on a GPU,
the sequence is cut into about sqrt(T) chunks that advance together, and the chunks' ends are
chained afterwards: about 2 sqrt(T) dependent steps instead of T.

Forward on one core with B, T, C = 8, 256, 256 (and 8, 1024, 512): 1.0 ms (7.0) step by step, 2.4 ms
(10) in chunks, 3.9 ms (81) by doubling in log2(T) passes. Forward and backward with autograd over
the steps take some 15 (150) times as long as here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BUSY_WIDTH = 2_048  # a step over so many numbers costs a CPU core more than the call does


@torch.compiler.disable  # a graph of thousands of small steps takes minutes to compile
def linear_scan(a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
    """All h of h[t] = a[t] * h[t-1] + b[t].

    Args:
        a: decays (B, T, ...), as large as b or broadcast to it.
        b: inputs (B, T, ...).
        start: h before the first position (B, ...); zeros if None.

    Returns:
        h (B, T, ...), in fp32 if b is in half precision.
    """
    dtype = torch.promote_types(b.dtype, torch.float32)
    a, b = a.to(dtype).expand_as(b), b.to(dtype)
    if start is not None:
        b = torch.cat([b[:, :1] + a[:, :1] * start.to(dtype)[:, None], b[:, 1:]], dim=1)
    h = LinearScan.apply(a.flatten(2), b.flatten(2))  # (B, T, C)
    return h.reshape(b.shape)


class LinearScan(torch.autograd.Function):
    """`linear_scan` of a and b (B, T, C) from zeros, with its gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        h = run(a, b, 1)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        after = F.pad(a[:, 1:], (0, 0, 0, 1))  # (B, T, C): a[t+1]
        d_b = run(after, upstream, -1)
        d_a = F.pad(d_b[:, 1:] * h[:, :-1], (0, 0, 1, 0))
        return d_a, d_b


def chunk_length(length: int, width: int, device: torch.device) -> int:
    """How many steps follow one another where each is over `width` numbers."""
    if device.type == "cpu" and width >= BUSY_WIDTH:
        return length
    return 2 ** round(math.log2(math.sqrt(length)))


def run(a: Tensor, b: Tensor, step: int) -> Tensor:
    """h[t] = a[t] * h[t-step] + b[t] for a and b (B, T, C), step 1 or -1, from zeros."""
    batch, length, channels = b.shape
    size = chunk_length(length, batch * channels, b.device)
    if size == length:
        h = torch.empty_like(b)
        advance(a.unbind(1)[::step], b.unbind(1)[::step], h.unbind(1)[::step])
        return h
    padding = (0, 0, 0, -length % size)
    a, b = (F.pad(x, padding).unflatten(1, (-1, size)) for x in (a, b))  # (B, N, size, C)
    h, decay = torch.empty_like(b), torch.empty_like(a)
    steps = [x.unbind(2)[::step] for x in (a, b, h, decay)]
    advance(*steps[:3])
    multiply(steps[0], steps[3])
    ends = torch.empty_like(h[:, :, 0])  # (B, N, C): h where each chunk ends
    chained = (steps[3][-1], steps[2][-1], ends)
    advance(*(x.unbind(1)[::step] for x in chained))
    behind, before = (slice(1, None), slice(None, -1))[::step]
    h[:, behind].addcmul_(decay[:, behind], ends[:, before, None])
    return h.flatten(1, 2)[:, :length]


def advance(a: Sequence[Tensor], b: Sequence[Tensor], h: Sequence[Tensor]) -> None:
    """Fill h[i] = a[i] * h[i-1] + b[i]."""
    h[0].copy_(b[0])
    for i in range(1, len(h)):
        torch.addcmul(b[i], a[i], h[i - 1], out=h[i])


def multiply(a: Sequence[Tensor], products: Sequence[Tensor]) -> None:
    """Fill products[i] = a[0] * ... * a[i]."""
    products[0].copy_(a[0])
    for i in range(1, len(a)):
        torch.mul(a[i], products[i - 1], out=products[i])
