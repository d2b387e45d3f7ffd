"""One new token through a model on a CPU, in few operations, with weights of 32, 16 or 8 bits.

The time of a token is that of reading the weights, and then that of many small operations. So q, k
and v are one product here, gate and up another. In 32 bits nothing is compiled: `few_rows` reads
the weights at the memory's speed. Rounded ones make answers faster; no routine of torch multiplies
them with a single row at that speed, but a compiled multiplication and sum does. Compiling takes
seconds before the first answer, so it is for those who ask for it. Inputs and sums stay in fp32.
Measured in benchmarks/decode.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamner import few_rows
from hamner.errors import UserError
from hamner.machine import why_not_compile
from model import DecoderLayer, KVCache, Output, Transformer, attend, rms_norm, rotate

WEIGHTS = ("fp32", "bf16", "int8")


class Weight(NamedTuple):
    """A weight (out, in) in bf16; or in int8, times a scale (out) for each row; or fp32 in blocks.

    Blocks are those of `few_rows`; what can't be cut into them is fp32 as it is.
    """

    values: Tensor
    scales: Tensor | None


class LayerWeights(NamedTuple):
    """What a token meets in a layer, in that order. Products of the same input may be joined."""

    attention_norm: Tensor
    qkv: list[Weight]
    o: Weight
    mlp_norm: Tensor
    gate_up: list[Weight]
    down: Weight


def stored(weight: Tensor, weights: str) -> Weight:
    """A weight in one of `WEIGHTS`; in fp32 it takes no memory of its own."""
    weight = weight.detach()
    if weights == "fp32":
        can_be_cut = torch.backends.mkl.is_available() and len(weight) % few_rows.BLOCK == 0
        return Weight(few_rows.in_blocks(weight) if can_be_cut else weight, None)
    if weights == "bf16":
        return Weight(weight.bfloat16(), None)
    scales = (weight.abs().amax(1) / 127).clamp(min=1e-12)
    return Weight((weight / scales[:, None]).round().to(torch.int8), scales)


def joined(linears: list[nn.Linear], weights: str) -> list[Weight]:
    """Weights for the same input; in fp32 a single one, whose parts the layers go on with.

    Compiled, they are faster apart: the compiler then writes the input down before it is used.
    """
    if weights != "fp32":
        return [stored(linear.weight, weights) for linear in linears]
    whole = torch.cat([linear.weight.detach() for linear in linears])
    parts = whole.split([len(linear.weight) for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight.data = part
    return [stored(whole, weights)]


def layer_weights(layer: DecoderLayer, weights: str) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        layer.input_layernorm.weight.detach(),
        joined([attention.q_proj, attention.k_proj, attention.v_proj], weights),
        stored(attention.o_proj.weight, weights),
        layer.post_attention_layernorm.weight.detach(),
        joined([mlp.gate_proj, mlp.up_proj], weights),
        stored(mlp.down_proj.weight, weights),
    )


def product(x: Tensor, *weights: Weight) -> Tensor:
    """x (in) -> weight @ x (out); of several weights, one result after the other."""
    if len(weights) > 1:
        return torch.cat([product(x, weight) for weight in weights])
    ((values, scales),) = weights
    if values.dim() == 3:
        return few_rows.by_blocks(x, values)
    if values.dtype == torch.float32:
        return F.linear(x, values)
    y = (values.float() * x).sum(-1)
    return y if scales is None else y * scales


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (C)."""
    return (rms_norm if torch.compiler.is_compiling() else few_rows.rms_norm)(x, weight, eps)


def before_attention(
    x: Tensor, cos: Tensor, sin: Tensor, w: LayerWeights, heads: tuple[int, int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The stream x (C) and how many query and other heads -> q (1, H, 1, D), k, v (1, K, 1, D)."""
    x = norm(x, w.attention_norm, eps)
    qkv = product(x, *w.qkv).view(1, heads[0] + 2 * heads[1], 1, -1)  # (1, H + 2K, 1, D)
    qk, v = qkv.split([sum(heads), heads[1]], dim=1)
    q, k = rotate(qk, cos, sin).split(heads, dim=1)
    return q, k, v


def after_attention(x: Tensor, y: Tensor, w: LayerWeights, eps: float) -> Tensor:
    """The stream x (C) and what attention gave, y (C) -> the stream (C)."""
    x = x + product(y, w.o)
    h = norm(x, w.mlp_norm, eps)
    gate, up = product(h, *w.gate_up).chunk(2)
    return x + product(F.silu(gate) * up, w.down)


def head(x: Tensor, weight: Tensor, lm_head: Weight, eps: float) -> Tensor:
    """The stream x (C) -> logits (V)."""
    return product(norm(x, weight, eps), lm_head)


class DecodeStep:
    """The step, over the cache that the model itself uses.

    Rounded weights are multiplied by compiled functions; all layers share one compilation.
    """

    def __init__(self, model: Transformer, weights: str):
        prepare: Any = torch.compile(dynamic=False, fullgraph=True)
        if weights == "fp32":
            prepare = lambda function: function  # noqa: E731
        self._before, self._after = prepare(before_attention), prepare(after_attention)
        self._head = prepare(head)
        self._decoder, self._eps = model.model, model.config.rms_norm_eps
        self._heads = model.config.num_attention_heads, model.config.num_key_value_heads
        layers = cast(Iterable[DecoderLayer], model.model.layers)
        self._layers = [layer_weights(layer, weights) for layer in layers]
        self._norm = model.model.norm.weight.detach()
        self._lm_head = stored(model.lm_head.weight, weights)

    def __call__(self, id_: Tensor, cache: KVCache) -> Tensor:
        """Logits (1, 1, V) after one more id (1, 1), which is added to the cache."""
        cos, sin = self._decoder.cos[cache.length], self._decoder.sin[cache.length]  # (D)
        x = self._decoder.embed_tokens(id_)[0, 0]  # (C)
        for number, weights in enumerate(self._layers):
            q, k, v = self._before(x, cos, sin, weights, self._heads, self._eps)
            keys, values = cache.append(number, k, v)  # (1, K, S, D)
            y = attend(q, keys, values, None, causal=False)
            x = self._after(x, y.flatten(), weights, self._eps)
        cache.length += 1
        return self._head(x, self._norm, self._lm_head, self._eps)[None, None]


def speed_up(model: Transformer, weights: str = "fp32") -> None:
    """Have a model on a CPU take single tokens by a `DecodeStep`, and a few more by `few_rows`.

    The weights of 32 bits stay in memory, for prompts and for several answers side by side.

    Raises:
        UserError: weights are to be rounded, but the model isn't on a CPU, or nothing can be
            compiled here.
    """
    device = model.lm_head.weight.device
    if weights == "fp32" and device.type != "cpu":
        return
    if device.type != "cpu":
        raise UserError(f"--weights {weights} is for the CPU: leave it away, or add --cpu")
    if weights != "fp32" and (reason := why_not_compile(device)):
        raise UserError(f"--weights {weights} has to be compiled, and that can't be: {reason}")
    step, plain = DecodeStep(model, weights), model.forward
    few_rows.speed_up(model)

    def forward(input_ids: Tensor, *args: Any, **options: Any) -> Output:
        cache: KVCache | None = options.get("cache")
        single = input_ids.shape == (1, 1) and not args and options.get("labels") is None
        if single and cache is not None and cache.padding is None:
            return Output(logits=step(input_ids, cache))
        return plain(input_ids, *args, **options)

    model.forward = forward  # type: ignore[method-assign]
