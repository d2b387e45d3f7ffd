"""Products of one or a few tokens with the weights, on a CPU: what an answer's time goes into.

A new token is multiplied with every weight once, so its time is that of reading the weights. MKL
gives such a product to one core. Cut into blocks of rows, it is a batch of small products, which
all cores share; the numbers are those of the same weights. Measured in benchmarks/decode.py.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Transformer

FEW = 4  # rows up to which the blocks are the faster way
BLOCK = 32  # rows of a weight in a block


def speed_up(model: Transformer) -> None:
    """Have a model on a CPU multiply few rows in the fast way; longer inputs stay as they are."""
    if not torch.backends.mkl.is_available():
        return
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.device.type == "cpu":
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(linear: nn.Linear, x: Tensor) -> Tensor:
    return product(x, linear.weight.detach())


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) and a weight (out, in) -> (..., out): few rows by blocks, if it can be cut."""
    out, size = weight.shape
    rows = x.numel() // size
    if rows > FEW or out % BLOCK:
        return F.linear(x, weight)
    if rows == 1:
        return by_blocks(x, in_blocks(weight)).view(*x.shape[:-1], out)
    # Every block meets the same columns (in, M). MKL is slow where their strides are others.
    columns = x.contiguous().as_strided((out // BLOCK, size, rows), (0, 1, size))
    products = torch.bmm(in_blocks(weight), columns)  # (N, BLOCK, M)
    return products.permute(2, 0, 1).reshape(*x.shape[:-1], out)


def in_blocks(weight: Tensor) -> Tensor:
    """(out, in) -> (N, BLOCK, in), the same memory."""
    return weight.view(-1, BLOCK, weight.shape[1])


def by_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """A single row x (..., in) -> (out), with a weight in blocks (N, BLOCK, in)."""
    count, _, size = blocks.shape
    column = x.contiguous().as_strided((count, size, 1), (0, 1, size))
    return torch.bmm(blocks, column).view(-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`model.rms_norm` of a single row x (C) in fp32, in fewer operations."""
    return (x * (float(x.dot(x)) / len(x) + eps) ** -0.5).mul_(weight)
