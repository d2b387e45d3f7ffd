"""One new token through a model on a CPU, in few operations, with weights in fp32 or fp16.

The time of a token is that of reading the weights, and then that of many small operations, in which
the memory stands idle. So every result has a tensor of its own that each layer overwrites, and all
views of them are made beforehand; q, k and v are one product, gate and up another; a norm's factor
goes into the product that follows, and the stream is added to within the product. Nothing is
compiled: the first answer doesn't wait. Measured in benchmarks/decode.py.

fp32 goes by the blocks of `few_rows`, fp16 through FBGEMM, PyTorch's library for x86: it turns the
weights into fp32 as it reads them, and multiplies and adds in that.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamner import few_rows
from model import DecoderLayer, KVCache, Transformer, attend


class Fp32Product:
    """weight (M, N) @ x (N): alone, or put into or added to a tensor out (M) that stays."""

    def __init__(self, weight: Tensor, x: Tensor, out: Tensor | None = None):
        self._weight, self._x = weight.detach(), x
        if out is None:
            return
        self._into = partial(out.addmv_, self._weight, x)
        if few_rows.can_be_cut(weight):
            blocks = few_rows.in_blocks(self._weight)
            into = out.view(*blocks.shape[:2], 1)
            self._into = partial(into.baddbmm_, blocks, few_rows.columns(x, blocks))

    def alone(self) -> Tensor:
        return few_rows.product(self._x, self._weight)

    def put(self, factor: float) -> None:
        """out = factor * weight @ x"""
        self._into(beta=0, alpha=factor)

    def add(self) -> None:
        """out += weight @ x"""
        self._into()


class Fp16Product:
    """The same with a copy of the weight in fp16."""

    def __init__(self, weight: Tensor, x: Tensor, out: Tensor | None = None):
        packed = torch.ops.quantized.linear_prepack_fp16(weight.detach(), None)
        self._multiply = partial(torch.ops.quantized.linear_dynamic_fp16, x[None], packed)
        self._out = out

    def alone(self) -> Tensor:
        return self._multiply()[0]

    def put(self, factor: float) -> None:
        torch.mul(self.alone(), factor, out=self._out)

    def add(self) -> None:
        assert self._out is not None
        self._out.add_(self.alone())


Product = Fp32Product | Fp16Product
PRODUCTS: dict[str, type[Fp32Product] | type[Fp16Product]] = {
    "fp32": Fp32Product,
    "fp16": Fp16Product,
}


def why_not_fp16() -> str | None:
    """What is missing here for weights in fp16."""
    try:
        torch.ops.quantized.linear_prepack_fp16(torch.zeros(1, 1), None)
    except (RuntimeError, AttributeError):
        return "this PyTorch has no FBGEMM for this CPU"
    return None


class Layer(NamedTuple):
    """What a token meets in a layer, in that order."""

    attention_norm: Tensor
    qkv: Product
    o: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product


def joined(*linears: nn.Linear) -> Tensor:
    """The weights of these as one (M, N), whose parts the layers themselves go on with."""
    whole = torch.cat([linear.weight.detach() for linear in linears])
    parts = whole.split([len(linear.weight) for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight.data = part
    return whole


class EagerStep:
    """The step, over the cache that the model itself uses."""

    def __init__(self, model: Transformer, weights: str):
        self._product = PRODUCTS[weights]
        config, decoder = model.config, model.model
        hidden, heads, kv_heads = (
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
        )  # fmt: skip
        size = config.head_dim
        self._x = torch.zeros(hidden)  # the stream
        self._h = torch.zeros(hidden)  # what a product takes, or attention gave
        self._qkv = torch.zeros((heads + 2 * kv_heads) * size)
        self._gate_up = torch.zeros(2 * config.intermediate_size)
        self._gate, self._up = self._gate_up.chunk(2)

        qkv = self._qkv.view(heads + 2 * kv_heads, size)  # (H + 2K, D)
        self._qk, self._v = qkv.split([heads + kv_heads, kv_heads])
        self._halves = self._qk.chunk(2, dim=1)[::-1]
        self._swapped = torch.zeros_like(self._qk)
        self._k = qkv[heads : heads + kv_heads]
        # Queries as their group's positions, as `attend` would lay them: 2 % of a token's time.
        self._q = qkv[:heads].view(1, kv_heads, -1, size)
        self._attended = self._h.view_as(self._q)

        sign = torch.ones(size)
        sign[: size // 2] = -1
        self._cos, self._sin = decoder.cos, decoder.sin * sign
        self._eps, self._embedding = config.rms_norm_eps, decoder.embed_tokens.weight.detach()
        layers = cast(Iterable[DecoderLayer], decoder.layers)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # fp16 takes a second or two
            lm_head = pool.submit(lambda: self._product(model.lm_head.weight, self._h))
            self._layers = list(pool.map(self._layer, layers))
            self._lm_head = lm_head.result()
        self._norm = decoder.norm.weight.detach()
        self._lock = threading.Lock()  # two answers may be made at the same time

    def _layer(self, layer: DecoderLayer) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = joined(attention.q_proj, attention.k_proj, attention.v_proj)
        gate_up = joined(mlp.gate_proj, mlp.up_proj)
        return Layer(
            layer.input_layernorm.weight.detach(),
            self._product(qkv, self._h, self._qkv),
            self._product(attention.o_proj.weight, self._h, self._x),
            layer.post_attention_layernorm.weight.detach(),
            self._product(gate_up, self._h, self._gate_up),
            self._product(mlp.down_proj.weight, self._gate, self._x),
        )

    def __call__(self, id_: Tensor, cache: KVCache) -> Tensor:
        """Logits (1, 1, V) after one more id (1, 1), which is added to the cache."""
        with self._lock:
            cos, sin = self._cos[cache.length], self._sin[cache.length]  # (D)
            self._x.copy_(self._embedding[int(id_)])
            for number, layer in enumerate(self._layers):
                layer.qkv.put(self._weighted(layer.attention_norm))
                torch.cat(self._halves, 1, out=self._swapped)
                self._qk.mul_(cos).addcmul_(self._swapped, sin)
                self._attend(cache.keys[number][0], cache.values[number][0], cache.length)
                layer.o.add()
                layer.gate_up.put(self._weighted(layer.mlp_norm))
                F.silu(self._gate, inplace=True).mul_(self._up)
                layer.down.add()
            cache.length += 1
            self._h.mul_(self._weighted(self._norm))
            return self._lm_head.alone()[None, None]

    def _weighted(self, weight: Tensor) -> float:
        """RMSNorm of the stream in two parts: _h, the stream times the weight; and the factor."""
        torch.mul(self._x, weight, out=self._h)
        return (float(self._x.dot(self._x)) / len(weight) + self._eps) ** -0.5

    def _attend(self, keys: Tensor, values: Tensor, length: int) -> None:
        """k and v go to keys and values (K, S, D); what q finds there goes to _h."""
        keys.select(1, length).copy_(self._k)
        values.select(1, length).copy_(self._v)
        keys, values = keys.narrow(1, 0, length + 1), values.narrow(1, 0, length + 1)
        self._attended.copy_(attend(self._q, keys[None], values[None], None, causal=False))
