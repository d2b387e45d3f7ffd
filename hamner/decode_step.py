"""One new token through a model on a CPU, compiled, with weights of 16 or 8 bits.

The time of a token is that of reading the weights, so rounded ones make answers faster. No routine
of torch multiplies them with a single row at the memory's speed; a compiled multiplication and sum
does (benchmarks/decode.py). Inputs and sums stay in fp32. Compiling takes seconds before the first
answer, so it is for those who ask for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hamner.errors import UserError
from hamner.machine import why_not_compile
from model import DecoderLayer, KVCache, Output, Transformer, attend, rms_norm, rotate

WEIGHTS = ("fp32", "bf16", "int8")


class Rounded(NamedTuple):
    """A weight (out, in) in bf16; or in int8, times a scale (out) for each of its rows."""

    values: Tensor
    scales: Tensor | None


class LayerWeights(NamedTuple):
    """What a token meets in a layer, in that order."""

    attention_norm: Tensor
    q: Rounded
    k: Rounded
    v: Rounded
    o: Rounded
    mlp_norm: Tensor
    gate: Rounded
    up: Rounded
    down: Rounded


def rounded(weight: Tensor, weights: str) -> Rounded:
    weight = weight.detach()
    if weights == "bf16":
        return Rounded(weight.bfloat16(), None)
    scales = (weight.abs().amax(1) / 127).clamp(min=1e-12)
    return Rounded((weight / scales[:, None]).round().to(torch.int8), scales)


def layer_weights(layer: DecoderLayer, weights: str) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v, o, gate, up, down = (
        rounded(linear.weight, weights)
        for linear in (
            attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        )
    )  # fmt: skip
    norms = layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach()
    return LayerWeights(norms[0], q, k, v, o, norms[1], gate, up, down)


def product(x: Tensor, weight: Rounded) -> Tensor:
    """x (in) -> weight @ x (out)."""
    y = (weight.values.float() * x).sum(-1)
    return y if weight.scales is None else y * weight.scales


def before_attention(
    x: Tensor, cos: Tensor, sin: Tensor, w: LayerWeights, head_dim: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The stream x (C) -> q (1, H, 1, D), k and v (1, K, 1, D)."""
    x = rms_norm(x, w.attention_norm, eps)
    q, k, v = (product(x, weight).view(1, -1, 1, head_dim) for weight in (w.q, w.k, w.v))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def after_attention(x: Tensor, y: Tensor, w: LayerWeights, eps: float) -> Tensor:
    """The stream x (C) and what attention gave, y (C) -> the stream (C)."""
    x = x + product(y, w.o)
    h = rms_norm(x, w.mlp_norm, eps)
    return x + product(F.silu(product(h, w.gate)) * product(h, w.up), w.down)


def head(x: Tensor, norm: Tensor, weight: Rounded, eps: float) -> Tensor:
    """The stream x (C) -> logits (V)."""
    return product(rms_norm(x, norm, eps), weight)


class DecodeStep:
    """The step, over the cache that the model itself uses; its layers share one compilation."""

    def __init__(self, model: Transformer, weights: str):
        compiled: Any = torch.compile(dynamic=False, fullgraph=True)
        self._before, self._after = compiled(before_attention), compiled(after_attention)
        self._head = compiled(head)
        self._decoder, self._config = model.model, model.config
        layers = cast(Iterable[DecoderLayer], model.model.layers)
        self._layers = [layer_weights(layer, weights) for layer in layers]
        self._norm = model.model.norm.weight.detach()
        self._lm_head = rounded(model.lm_head.weight, weights)

    def __call__(self, id_: Tensor, cache: KVCache) -> Tensor:
        """Logits (1, 1, V) after one more id (1, 1), which is added to the cache."""
        eps, head_dim = self._config.rms_norm_eps, self._config.head_dim
        cos, sin = self._decoder.cos[cache.length], self._decoder.sin[cache.length]  # (D)
        x = self._decoder.embed_tokens(id_)[0, 0]  # (C)
        for number, weights in enumerate(self._layers):
            q, k, v = self._before(x, cos, sin, weights, head_dim, eps)
            keys, values = cache.append(number, k, v)  # (1, K, S, D)
            y = attend(q, keys, values, None, causal=False)
            x = self._after(x, y.flatten(), weights, eps)
        cache.length += 1
        return self._head(x, self._norm, self._lm_head, eps)[None, None]


def compile_step(model: Transformer, weights: str) -> None:
    """Have a model on a CPU take single tokens by a `DecodeStep`; all else stays as it was.

    The weights of 32 bits stay in memory, for prompts and for several answers side by side.

    Raises:
        UserError: the model isn't on a CPU, or nothing can be compiled here.
    """
    device = model.lm_head.weight.device
    if device.type != "cpu":
        raise UserError(f"--weights {weights} is for the CPU: leave it away, or add --cpu")
    if reason := why_not_compile(device):
        raise UserError(f"--weights {weights} has to be compiled, and that can't be: {reason}")
    step, plain = DecodeStep(model, weights), model.forward

    def forward(input_ids: Tensor, *args: Any, **options: Any) -> Output:
        cache: KVCache | None = options.get("cache")
        single = input_ids.shape == (1, 1) and not args and options.get("labels") is None
        if single and cache is not None and cache.padding is None:
            return Output(logits=step(input_ids, cache))
        return plain(input_ids, *args, **options)

    model.forward = forward  # type: ignore[method-assign]
