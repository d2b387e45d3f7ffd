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
    count = out // BLOCK
    # Every block meets the same columns (in, M). MKL is slow where their strides are others.
    columns = x.contiguous().as_strided((count, size, rows), (0, 1, size))
    products = torch.bmm(weight.view(count, BLOCK, size), columns)  # (count, BLOCK, M)
    if rows > 1:
        products = products.permute(2, 0, 1).contiguous()
    return products.view(*x.shape[:-1], out)
