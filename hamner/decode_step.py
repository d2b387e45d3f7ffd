"""One new token through a model on a CPU, with weights of 32, 16 or 8 bits.

The time of a token is that of reading the weights, so rounded ones make answers faster. fp32 and
fp16 are `eager_step`'s. No routine of torch multiplies bf16 or int8 with a single row at the
memory's speed, but a compiled multiplication and sum does. Compiling takes seconds before the first
answer, so it is for those who ask for it. Inputs and sums stay in fp32. Measured in
benchmarks/decode.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamner import few_rows
from hamner.eager_step import PRODUCTS, EagerStep, why_not_fp16
from hamner.errors import UserError
from hamner.machine import why_not_compile
from model import DecoderLayer, KVCache, Output, Transformer, attend, rms_norm, rotate

WEIGHTS = ("fp32", "fp16", "bf16", "int8")


class Weight(NamedTuple):
    """A weight (out, in) in bf16; or in int8, times a scale (out) for each row."""

    values: Tensor
    scales: Tensor | None


class LayerWeights(NamedTuple):
    """What a token meets in a layer, in that order."""

    attention_norm: Tensor
    qkv: list[Weight]
    o: Weight
    mlp_norm: Tensor
    gate: Weight
    up: Weight
    down: Weight


def rounded(linear: nn.Linear, weights: str) -> Weight:
    """Its weight in bf16 or int8."""
    weight = linear.weight.detach()
    if weights == "bf16":
        return Weight(weight.bfloat16(), None)
    scales = (weight.abs().amax(1) / 127).clamp(min=1e-12)
    return Weight((weight / scales[:, None]).round().to(torch.int8), scales)


def layer_weights(layer: DecoderLayer, weights: str) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        layer.input_layernorm.weight.detach(),
        [rounded(x, weights) for x in (attention.q_proj, attention.k_proj, attention.v_proj)],
        rounded(attention.o_proj, weights),
        layer.post_attention_layernorm.weight.detach(),
        rounded(mlp.gate_proj, weights),
        rounded(mlp.up_proj, weights),
        rounded(mlp.down_proj, weights),
    )


def product(x: Tensor, weight: Weight) -> Tensor:
    """x (in) -> weight @ x (out)."""
    y = (weight.values.float() * x).sum(-1)
    return y if weight.scales is None else y * weight.scales


def before_attention(
    x: Tensor, cos: Tensor, sin: Tensor, w: LayerWeights, heads: tuple[int, int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The stream x (C) and how many query and other heads -> q (1, H, 1, D), k, v (1, K, 1, D).

    q, k and v are products of their own, and so are gate and up: with a single reader, the compiler
    works the norm out anew for every row of the weight.
    """
    x = rms_norm(x, w.attention_norm, eps)
    qkv = torch.cat([product(x, weight) for weight in w.qkv])
    qkv = qkv.view(1, heads[0] + 2 * heads[1], 1, -1)  # (1, H + 2K, 1, D)
    qk, v = qkv.split([sum(heads), heads[1]], dim=1)
    q, k = rotate(qk, cos, sin).split(heads, dim=1)
    return q, k, v


def after_attention(x: Tensor, y: Tensor, w: LayerWeights, eps: float) -> Tensor:
    """The stream x (C) and what attention gave, y (C) -> the stream (C)."""
    x = x + product(y, w.o)
    h = rms_norm(x, w.mlp_norm, eps)
    return x + product(F.silu(product(h, w.gate)) * product(h, w.up), w.down)


def head(x: Tensor, weight: Tensor, lm_head: Weight, eps: float) -> Tensor:
    """The stream x (C) -> logits (V)."""
    return product(rms_norm(x, weight, eps), lm_head)


class CompiledStep:
    """The step with rounded weights, compiled, over the cache that the model itself uses.

    All layers share one compilation. Attention isn't compiled: its shapes change with the length.
    """

    def __init__(self, model: Transformer, weights: str):
        prepare: Any = torch.compile(dynamic=False, fullgraph=True)
        self._before, self._after = prepare(before_attention), prepare(after_attention)
        self._head = prepare(head)
        self._decoder, self._eps = model.model, model.config.rms_norm_eps
        self._heads = model.config.num_attention_heads, model.config.num_key_value_heads
        layers = cast(Iterable[DecoderLayer], model.model.layers)
        self._layers = [layer_weights(layer, weights) for layer in layers]
        self._norm = model.model.norm.weight.detach()
        self._lm_head = rounded(model.lm_head, weights)

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
    """Have a model on a CPU take single tokens by a step of its own, and a few by `few_rows`.

    The weights of 32 bits stay in memory, for prompts and for several answers side by side.

    Raises:
        UserError: weights are to be rounded, but the model isn't on a CPU; or fp16 can't be
            multiplied, or nothing compiled, here.
    """
    device = model.lm_head.weight.device
    if weights == "fp32" and device.type != "cpu":
        return
    if device.type != "cpu":
        raise UserError(f"--weights {weights} is for the CPU: leave it away, or add --cpu")
    if weights == "fp16" and (reason := why_not_fp16()):
        raise UserError(f"--weights fp16 can't be had: {reason}; take bf16")
    if weights not in PRODUCTS and (reason := why_not_compile(device)):
        raise UserError(f"--weights {weights} has to be compiled, and that can't be: {reason}")
    make = EagerStep if weights in PRODUCTS else CompiledStep
    step, plain = make(model, weights), model.forward
    few_rows.speed_up(model)

    def forward(input_ids: Tensor, *args: Any, **options: Any) -> Output:
        cache: KVCache | None = options.get("cache")
        single = input_ids.shape == (1, 1) and not args and options.get("labels") is None
        if single and cache is not None and cache.padding is None:
            return Output(logits=step(input_ids, cache))
        return plain(input_ids, *args, **options)

    model.forward = forward  # type: ignore[method-assign]
