"""One new token through a model on a CPU, with weights of 32, 16 or 8 bits.

The time of a token is that of reading the weights, so rounded ones make answers faster. The step is
`single_token.c`, compiled in a second for the machine it runs on. Without a C compiler fp32 goes by
`few_rows`. Inputs and sums stay in fp32. Measured in benchmarks/decode.py.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hamner import few_rows
from hamner.errors import UserError, first_line
from model import DecoderLayer, KVCache, Output, Transformer

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
WEIGHTS = tuple(DTYPES)
SOURCE = Path(__file__).with_name("single_token.c")
COMPILERS = ("cc", "gcc", "clang")


# ------------------------------------------------------------------------------ the library


def compiler() -> str:
    """The command that compiles C: the environment's CC, or the first that is found.

    Raises:
        UserError: there is none.
    """
    names = os.environ.get("CC") or next(filter(shutil.which, COMPILERS), None)
    if names is None:
        raise UserError(f"no C compiler ({', '.join(COMPILERS)})")
    return names


@functools.cache
def compiled(weights: str, names: str) -> ctypes.CDLL:
    """`single_token.c` as a library for such weights, made for this CPU by the compiler `names`.

    A compiler without OpenMP makes one for a single thread.

    Raises:
        UserError: the compiler fails.
    """
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # nobody else's
        library = str(Path(folder) / "single_token.so")
        command = [
            *shlex.split(names), "-std=gnu11", "-O3", native, "-Wno-psabi", "-shared", "-fPIC",
            f"-DWEIGHT_BITS={8 * DTYPES[weights].itemsize}", str(SOURCE), "-o", library, "-lm",
        ]  # fmt: skip
        try:
            if why_it_fails([*command, "-fopenmp"]) and (reason := why_it_fails(command)):
                raise UserError(f"{names} fails: {reason}")
            return ctypes.CDLL(library)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"{names} fails: {first_line(error)}") from None


def why_it_fails(command: Sequence[str]) -> str | None:
    """The first line of what it says, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = done.stderr.strip() or f"it ended with {done.returncode}"
    return said.splitlines()[0] if done.returncode else None


class CMatrix(ctypes.Structure):
    """`matrix` of single_token.c."""

    _fields_ = (("values", ctypes.c_void_p), ("scales", ctypes.c_void_p))


class CLayer(ctypes.Structure):
    """`layer` of single_token.c."""

    _fields_ = (
        ("attention_norm", ctypes.c_void_p), ("qkv", CMatrix), ("o", CMatrix),
        ("mlp_norm", ctypes.c_void_p), ("gate_up", CMatrix), ("down", CMatrix),
    )  # fmt: skip


class CModel(ctypes.Structure):
    """`model` of single_token.c."""

    _fields_ = (
        ("hidden", ctypes.c_int), ("inner", ctypes.c_int), ("heads", ctypes.c_int),
        ("kv_heads", ctypes.c_int), ("head_dim", ctypes.c_int), ("layers", ctypes.c_int),
        ("vocabulary", ctypes.c_int), ("eps", ctypes.c_float), ("layer", ctypes.POINTER(CLayer)),
        ("norm", ctypes.c_void_p), ("lm_head", CMatrix),
    )  # fmt: skip


# ------------------------------------------------------------------------------ the weights


class Weight(NamedTuple):
    """A matrix (out, in): in fp32 or fp16, or in int8, times a scale (out) for each row."""

    values: Tensor
    scales: Tensor | None


def rounded(weight: Tensor, weights: str) -> Weight:
    """A matrix (out, in) of fp32 as it is to be kept."""
    if weights != "int8":
        return Weight(weight.to(DTYPES[weights]), None)
    scales = (weight.abs().amax(1) / 127).clamp(min=1e-12)
    return Weight((weight / scales[:, None]).round().to(torch.int8), scales)


class Room:
    """All weights in one piece of memory, in the order of their use.

    On Linux what is large lies in large pages, and is read some 5 % faster.
    """

    def __init__(self, count: int, weights: str):
        self._weights, self._filled = weights, 0
        self._room = torch.empty(count, dtype=DTYPES[weights])

    def add(self, *linears: nn.Linear) -> Weight:
        """Their weights as one matrix. Those of 32 bits move here: the layers go on with them."""
        size, begin = linears[0].in_features, self._filled
        scales = []
        for linear in linears:
            exact = linear.weight.detach()
            values, scale = rounded(exact, self._weights)
            part = self._room[self._filled :][: exact.numel()].view_as(exact).copy_(values)
            self._filled += exact.numel()
            if scale is not None:
                scales.append(scale)
            if part.dtype == exact.dtype:
                linear.weight.data = part
        whole = self._room[begin : self._filled].view(-1, size)
        return Weight(whole, torch.cat(scales) if scales else None)


# ------------------------------------------------------------------------------ the step


class DecodeStep:
    """The step, over the cache that the model itself uses."""

    def __init__(self, model: Transformer, weights: str):
        """
        Raises:
            UserError: it can't be compiled here.
        """
        self._decoder, config = model.model, model.config
        self._kept: list[Tensor] = []  # what the C side points at
        with ThreadPoolExecutor(1) as pool:
            library = pool.submit(compiled, weights, compiler())  # meanwhile:
            room = Room(config.matmul_parameters(), weights)
            layers = cast(Iterable[DecoderLayer], model.model.layers)
            of_layers = [self._layer(layer, room) for layer in layers]
            lm_head = self._matrix(room.add(model.lm_head))
            self._decode: Any = library.result().decode
        self._model = CModel(
            config.hidden_size, config.intermediate_size, config.num_attention_heads,
            config.num_key_value_heads, config.head_dim, config.num_hidden_layers,
            config.vocab_size, config.rms_norm_eps, (CLayer * len(of_layers))(*of_layers),
            self._pointer(model.model.norm.weight), lm_head,
        )  # fmt: skip
        self._decode.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int] * 3 + [ctypes.c_void_p]
        self._lock = threading.Lock()  # answers made at the same time take turns with the cores

    def _pointer(self, tensor: Tensor) -> int:
        self._kept.append(tensor.detach())
        return tensor.data_ptr()

    def _matrix(self, weight: Weight) -> CMatrix:
        values, scales = weight
        return CMatrix(self._pointer(values), None if scales is None else self._pointer(scales))

    def _layer(self, layer: DecoderLayer, room: Room) -> CLayer:
        attention, mlp = layer.self_attn, layer.mlp
        return CLayer(
            self._pointer(layer.input_layernorm.weight),
            self._matrix(room.add(attention.q_proj, attention.k_proj, attention.v_proj)),
            self._matrix(room.add(attention.o_proj)),
            self._pointer(layer.post_attention_layernorm.weight),
            self._matrix(room.add(mlp.gate_proj, mlp.up_proj)),
            self._matrix(room.add(mlp.down_proj)),
        )

    def __call__(self, id_: Tensor, cache: KVCache) -> Tensor:
        """Logits (1, 1, V) after one more id (1, 1), which is added to the cache.

        Raises:
            IndexError: the cache is full.
        """
        decoder, length = self._decoder, cache.length
        if length >= cache.max_length:
            raise IndexError(f"the cache is full: it holds {length} positions")
        inputs = decoder.embed_tokens.weight[int(id_)], decoder.cos[length], decoder.sin[length]
        keys, values = (
            (ctypes.c_void_p * len(part))(*(layer.data_ptr() for layer in part))
            for part in (cache.keys, cache.values)
        )
        logits = torch.empty(1, 1, self._model.vocabulary)
        with self._lock:
            failed = self._decode(
                ctypes.byref(self._model), *(x.data_ptr() for x in inputs), keys, values,
                length, cache.max_length, torch.get_num_threads(), logits.data_ptr(),
            )  # fmt: skip
        if failed:
            raise MemoryError("no memory for one more token")
        cache.length += 1
        return logits


def speed_up(model: Transformer, weights: str = "fp32") -> None:
    """Have a model (fp32) on a CPU take single tokens by a step of its own, a few by `few_rows`.

    The weights of 32 bits stay in memory, for prompts and for several answers side by side.

    Raises:
        UserError: weights are to be rounded, but the model isn't on a CPU, or nothing can be
            compiled here.
    """
    weight = model.lm_head.weight
    if weight.device.type != "cpu":
        if weights != "fp32":
            raise UserError(f"--weights {weights} is for the CPU: leave it away, or add --cpu")
        return
    if weight.dtype != torch.float32:
        raise ValueError(f"the model is in {weight.dtype}, not in fp32")
    few_rows.speed_up(model)
    try:
        step = DecodeStep(model, weights)
    except UserError as error:
        if weights != "fp32":
            reason = f"--weights {weights} has to be compiled, and that can't be: {error}"
            raise UserError(reason) from None
        return
    plain = model.forward

    def forward(input_ids: Tensor, *args: Any, **options: Any) -> Output:
        cache: KVCache | None = options.get("cache")
        single = input_ids.shape == (1, 1) and not args and options.get("labels") is None
        if single and cache is not None and cache.padding is None:
            return Output(logits=step(input_ids, cache))
        return plain(input_ids, *args, **options)

    model.forward = forward  # type: ignore[method-assign]
