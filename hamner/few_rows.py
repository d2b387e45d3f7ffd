"""Products of one or a few tokens with the weights, on a CPU: what an answer's time goes into.

A new token is multiplied with every weight once, so its time is that of reading the weights. MKL
gives such a product to one core. Cut into blocks of rows, it is a batch of small products, which
all cores share; the numbers are those of the same weights. For two to four answers side by side;
single tokens go by `decode_step`, and come here where nothing can be compiled. Measured in
benchmarks/decode.py.
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
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.device.type == "cpu":
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(linear: nn.Linear, x: Tensor) -> Tensor:
    return product(x, linear.weight.detach())


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) and a weight (out, in) -> (..., out): few rows by blocks, if it can be cut."""
    out, size = weight.shape
    if x.numel() > FEW * size or not can_be_cut(weight):
        return F.linear(x, weight)
    blocks = in_blocks(weight)
    products = torch.bmm(blocks, columns(x.contiguous(), blocks))  # (N, out / N, M)
    return products.permute(2, 0, 1).reshape(*x.shape[:-1], out)


def can_be_cut(weight: Tensor) -> bool:
    return torch.backends.mkl.is_available() and len(weight) % BLOCK == 0


def in_blocks(weight: Tensor) -> Tensor:
    """(out, in) -> (N, out / N, in), the same memory; without AVX-512 in few large blocks."""
    few = 2 * torch.get_num_threads()
    if len(weight) % few or "AVX512" in torch.backends.cpu.get_cpu_capability():
        return weight.view(-1, BLOCK, weight.shape[1])
    return weight.view(few, -1, weight.shape[1])


def columns(x: Tensor, blocks: Tensor) -> Tensor:
    """Contiguous rows x (..., in) as every block (N, out / N, in) is to meet them: (N, in, M).

    It is the same memory. MKL is slow where the strides are others.
    """
    count, _, size = blocks.shape
    return x.as_strided((count, size, x.numel() // size), (0, 1, size))
