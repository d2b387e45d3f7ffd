"""Products of one or a few tokens with the weights, on a CPU: what an answer's time goes into.

A new token is multiplied with every weight once, so its time is that of reading the weights. MKL
gives such a product to one core. Cut into blocks of rows, it is a batch of small products, which
all cores share; the numbers are those of the same weights. Measured in benchmarks/decode.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Transformer

FEW = 4  # rows up to which the blocks are the faster way
BLOCK = 32  # rows of a weight in a block

Product = Callable[[Tensor], Tensor]  # (..., in) -> (..., out)


def speed_up(model: Transformer) -> None:
    """Have a model on a CPU multiply few rows in the fast way; longer inputs stay as they are."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and can_be_cut(module.weight):
            module.forward = fast_product(module.weight.detach())  # type: ignore


def can_be_cut(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and torch.backends.mkl.is_available()
    return on_cpu and len(weight) % BLOCK == 0


def fast_product(weight: Tensor) -> Product:
    """A function that multiplies with a weight (out, in), few rows by blocks."""
    blocks = weight.view(-1, BLOCK, weight.shape[1])  # (N, BLOCK, in)
    count, _, size = blocks.shape

    def product(x: Tensor) -> Tensor:
        rows = x.numel() // size
        if rows > FEW:
            return F.linear(x, weight)
        # Every block meets the same columns (in, M). MKL is slow where their strides are others.
        columns = x.contiguous().as_strided((count, size, rows), (0, 1, size))
        products = torch.bmm(blocks, columns)  # (N, BLOCK, M)
        if rows > 1:
            products = products.permute(2, 0, 1).contiguous()
        return products.view(*x.shape[:-1], len(weight))

    return product
