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

from hamner.errors import UserError
from model import Transformer

FEW = 4  # rows up to which the blocks are the faster way
BLOCK = 32  # rows of a weight in a block
WEIGHTS = ("fp32", "int8")

Product = Callable[[Tensor], Tensor]  # (..., in) -> (..., out)
FewRows = Callable[[Tensor, int], Tensor]  # the same, contiguous, and how many rows there are


def speed_up(model: Transformer, weights: str = "fp32") -> None:
    """Have a model on a CPU multiply few rows in the fast way; longer inputs stay as they are.

    With `weights` int8, few rows are multiplied with weights of 8 bits and one scale per row of the
    weight (W8A16: the inputs are rounded to bf16), which are a quarter as much to read; the 32-bit
    ones stay in memory for long inputs.

    Raises:
        UserError: weights of 8 bits for a model that isn't on a CPU.
    """
    if model.lm_head.weight.device.type != "cpu":
        if weights != "fp32":
            raise UserError(f"--weights {weights} is for the CPU: leave it away, or add --cpu")
        return
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = fast_product(module.weight.detach(), weights)  # type: ignore


def fast_product(weight: Tensor, weights: str) -> Product:
    few = product_int8(weight) if weights == "int8" else product_in_blocks(weight)
    size = weight.shape[1]

    def product(x: Tensor) -> Tensor:
        rows = x.numel() // size
        if rows > FEW or few is None:
            return F.linear(x, weight)
        return few(x.contiguous(), rows).view(*x.shape[:-1], len(weight))

    return product


def product_in_blocks(weight: Tensor) -> FewRows | None:
    """x (M, in) -> x @ weight.T (M, out) by blocks; None where that isn't faster."""
    if len(weight) % BLOCK or not torch.backends.mkl.is_available():
        return None
    blocks = weight.view(-1, BLOCK, weight.shape[1])  # (N, BLOCK, in)
    count, _, size = blocks.shape

    def product(x: Tensor, rows: int) -> Tensor:
        # Every block meets the same columns (in, M). MKL is slow where their strides are others.
        columns = x.as_strided((count, size, rows), (0, 1, size))
        products = torch.bmm(blocks, columns)  # (N, BLOCK, M)
        return products if rows == 1 else products.permute(2, 0, 1).contiguous()

    return product


def product_int8(weight: Tensor) -> FewRows:
    """x (M, in) -> x @ weight.T (M, out) with a weight rounded to 8 bits, row by row."""
    size = weight.shape[1]
    scales = (weight.abs().amax(1) / 127).clamp(min=1e-12)  # (out)
    rounded = (weight / scales[:, None]).round().to(torch.int8)
    scales = scales.bfloat16()

    def product(x: Tensor, rows: int) -> Tensor:
        x16 = x.bfloat16().view(rows, size)
        return torch._weight_int8pack_mm(x16, rounded, scales).to(x.dtype)

    return product
