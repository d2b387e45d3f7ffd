"""xLSTM (Beck et al., 2024, arXiv 2405.04517): LSTMs with exponential gates, in two kinds.

mLSTM has a matrix for memory and nothing that hangs on its own output, per head (section 2.3):

    C_t = f_t C_{t-1} + i_t v_t k_t^T      n_t = f_t n_{t-1} + i_t k_t
    h_t = C_t q_t / max(|n_t^T q_t|, 1)    i = exp(~i), f = sigmoid(~f), q scaled by 1 / sqrt(d)

sLSTM has a scalar for every channel, and its four gates see the last output through a matrix R for
each head (section 2.2), so that positions have to follow one another in training too:

    c_t = f_t c_{t-1} + i_t tanh(~z_t)     n_t = f_t n_{t-1} + i_t     h_t = sigmoid(~o_t) c_t / n_t

What the exponential gates pile up is kept divided by exp(m), m_t = max(log f_t + m_{t-1}, ~i_t),
where the 1 above becomes exp(-m_t). m cancels and needs no gradient. Over a chunk of 64 positions
mLSTM is attention without a softmax, its scores multiplied by exp(~i_s + log f_{s+1} + ... +
log f_t - m_t); C, n and m go from chunk to chunk.

The mLSTM block is that of xLSTM 7B (Beck et al., 2025, arXiv 2503.13427), with the names of Hugging
Face's `xLSTMModel`: gates capped at 15, an output gate, a norm of each head, and a SwiGLU MLP. The
sLSTM block is the first paper's, ~i and ~f behind a convolution, but with full input matrices and
the same MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from legacy.language_model import CausalConv, LanguageModelConfig, State, remembered, wide
from model import RMSNorm

NOTHING = -1e38  # the exponent of what was never seen; finite, so that differences are
EPS = 1e-6  # of mLSTM's denominator, as in xLSTM 7B


@dataclass(frozen=True)
class XLSTMConfig(LanguageModelConfig):
    """xLSTM[7:1]: of eight layers one is an sLSTM. The defaults have 74.4M parameters."""

    num_hidden_layers: int = 15
    intermediate_size: int = 1_408
    num_heads: int = 4
    qk_size: int = 256
    v_size: int = 512
    gate_soft_cap: float = 15.0
    conv_kernel: int = 4
    chunk_size: int = 64
    # of layers 0, 1, ..., and then again
    block_types: tuple[str, ...] = ("mlstm",) * 3 + ("slstm",) + ("mlstm",) * 4

    def __post_init__(self) -> None:
        for name in ("hidden_size", "qk_size", "v_size"):
            if getattr(self, name) % self.num_heads:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be a multiple of "
                    f"num_heads ({self.num_heads})"
                )
        if unknown := set(self.block_types) - {"mlstm", "slstm"}:
            raise ValueError(f"a block is mlstm or slstm, not {', '.join(sorted(unknown))}")

    def block_type(self, number: int) -> str:
        return self.block_types[number % len(self.block_types)]

    def layer(self, number: int) -> nn.Module:
        blocks = {"mlstm": MLSTMBlock, "slstm": SLSTMBlock}
        return blocks[self.block_type(number)](self)

    def sequence_flops_per_token(self, sequence_length: int) -> int:
        """mLSTM's scores, values and states, and sLSTM's recurrent matrices, three times."""
        size = min(self.chunk_size, sequence_length)
        within = 2 * size * (self.qk_size + self.v_size)
        mlstm = within + 4 * self.qk_size * self.v_size // self.num_heads
        slstm = 2 * 4 * self.hidden_size**2 // self.num_heads
        types = [self.block_type(number) for number in range(self.num_hidden_layers)]
        return 3 * (types.count("mlstm") * mlstm + types.count("slstm") * slstm)


class MLSTMBlock(nn.Module):
    def __init__(self, config: XLSTMConfig):
        super().__init__()
        self.norm_mlstm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlstm_layer = MLSTM(config)
        self.norm_ffn = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        x = x + self.mlstm_layer(self.norm_mlstm(x), state)
        return x + self.ffn(self.norm_ffn(x))


class SLSTMBlock(nn.Module):
    def __init__(self, config: XLSTMConfig):
        super().__init__()
        self.norm_slstm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.slstm_layer = SLSTM(config)
        self.norm_ffn = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        x = x + self.slstm_layer(self.norm_slstm(x), state)
        return x + self.ffn(self.norm_ffn(x))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: XLSTMConfig):
        super().__init__()
        self.proj_up_gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.proj_up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.proj_down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_down(F.silu(self.proj_up_gate(x)) * self.proj_up(x))


class HeadNorm(nn.Module):
    """A layer norm of each head of (B, T, H, D), in fp32, with a weight (H * D) and no bias."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(wide(x), x.shape[-1:], eps=self.eps).flatten(2) * self.weight


# ---------------------------------------------------------------------------------- mLSTM


class MLSTM(nn.Module):
    def __init__(self, config: XLSTMConfig):
        super().__init__()
        self.heads, self.cap = config.num_heads, config.gate_soft_cap
        self.chunk_size = config.chunk_size
        self.q = nn.Linear(config.hidden_size, config.qk_size, bias=False)
        self.k = nn.Linear(config.hidden_size, config.qk_size, bias=False)
        self.v = nn.Linear(config.hidden_size, config.v_size, bias=False)
        self.ogate_preact = nn.Linear(config.hidden_size, config.v_size, bias=False)
        self.igate_preact = nn.Linear(config.hidden_size, config.num_heads)
        self.fgate_preact = nn.Linear(config.hidden_size, config.num_heads)
        self.multihead_norm = HeadNorm(config.v_size, config.rms_norm_eps)
        self.out_proj = nn.Linear(config.v_size, config.hidden_size, bias=False)

    def initialise(self) -> None:
        """Gates that don't see x yet: hardly anything comes in, and stays 20 to 400 positions."""
        nn.init.zeros_(self.igate_preact.weight)
        nn.init.zeros_(self.fgate_preact.weight)
        nn.init.constant_(self.igate_preact.bias, -10)
        with torch.no_grad():
            self.fgate_preact.bias.copy_(torch.linspace(3, 6, self.heads))

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        q, k, v = (
            wide(y(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.q, self.k, self.v)
        )  # (B, H, T, K or V)
        i, f = (
            self.cap * torch.tanh(wide(y(x)) / self.cap).transpose(1, 2)
            for y in (self.igate_preact, self.fgate_preact)
        )  # (B, H, T)
        q = q * q.shape[-1] ** -0.5
        with torch.autocast(x.device.type, enabled=False):
            h = matrix_memory(q, k, v, i, F.logsigmoid(f), state, self.chunk_size)
        y = self.multihead_norm(h.transpose(1, 2))
        return self.out_proj(torch.sigmoid(self.ogate_preact(x)) * y.type_as(x))


def matrix_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    log_f: Tensor,
    state: State | None,
    chunk_size: int,
) -> Tensor:
    """h (B, H, T, V) of q and k (B, H, T, K), v (B, H, T, V), ~i and log f (B, H, T), in fp32."""
    batch, heads, length, dim = k.shape
    size = min(chunk_size, length)
    padding = -length % size  # positions where nothing comes in and nothing is forgotten
    v = F.pad(v, (0, 1), value=1.0)  # the last column makes n of C, and n^T q of C q
    q, k, v = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, size)) for x in (q, k, v))
    i = F.pad(i, (0, padding), value=NOTHING).unflatten(2, (-1, size))  # (B, H, n, L)
    log_f = F.pad(log_f, (0, padding)).unflatten(2, (-1, size))
    memory = remembered(state, "C", lambda: k.new_zeros(batch, heads, dim, v.shape[-1]))
    top = remembered(state, "m", lambda: k.new_zeros(batch, heads))
    memories, tops = chunk_states(k, v, i, log_f, memory, top)
    if state is not None:
        state["C"], state["m"] = memories[-1], tops[-1]
    h = read(q, k, v, i, log_f, torch.stack(memories[:-1], 2), torch.stack(tops[:-1], 2))
    return h.flatten(2, 3)[:, :, :length]


def chunk_states(
    k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, memory: Tensor, top: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """C (B, H, K, V + 1), divided by exp(m), and m (B, H), before each chunk and after the last."""
    fading = log_f.sum(-1)  # (B, H, n): of what a chunk finds
    share = fading[..., None] - log_f.cumsum(-1) + i  # (B, H, n, L): of its positions at its end
    tops = [top]
    with torch.no_grad():
        for fade, peak in zip(fading.unbind(2), share.amax(-1).unbind(2), strict=True):
            tops.append(torch.maximum(fade + tops[-1], peak))
    before, after = torch.stack(tops[:-1], 2), torch.stack(tops[1:], 2)  # (B, H, n)
    kept = torch.exp(fading + before - after)
    added = (k * torch.exp(share - after[..., None])[..., None]).mT @ v  # (B, H, n, K, V + 1)
    memories = [memory]
    for keep, addition in zip(kept.unbind(2), added.unbind(2), strict=True):
        memories.append(keep[..., None, None] * memories[-1] + addition)
    return memories, tops


def read(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, memory: Tensor, top: Tensor
) -> Tensor:
    """h (B, H, n, L, V): what the queries find in their own chunk and in the memory before it."""
    size = q.shape[3]
    since = log_f.cumsum(-1)  # (B, H, n, L)
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    exponent = since[..., :, None] - since[..., None, :] + i[..., None, :]  # (B, H, n, L, L)
    exponent = exponent.masked_fill(future, -math.inf)
    old = since + top[..., None]
    highest = torch.maximum(exponent.amax(-1), old).detach()[..., None]
    scores = q @ k.mT * torch.exp(exponent - highest)
    found = scores @ v + torch.exp(old[..., None] - highest) * (q @ memory)
    above, below = found[..., :-1], found[..., -1:]
    return above / (torch.maximum(below.abs(), torch.exp(-highest)) + EPS)


# ---------------------------------------------------------------------------------- sLSTM


class SLSTM(nn.Module):
    def __init__(self, config: XLSTMConfig):
        super().__init__()
        size, self.heads = config.hidden_size, config.num_heads
        dim = size // config.num_heads
        self.conv = CausalConv(size, config.conv_kernel)
        self.gates = nn.Linear(size, 2 * size)  # ~i and ~f, of what the convolution gives
        self.inputs = nn.Linear(size, 2 * size)  # ~z and ~o, of x itself
        self.recurrent = nn.Parameter(torch.empty(config.num_heads, dim, 4 * dim))  # R: i, f, z, o
        self.norm = HeadNorm(size, config.rms_norm_eps)
        self.out_proj = nn.Linear(size, size, bias=False)

    def initialise(self) -> None:
        """Forget gates of 0.95 to 0.998, and no recurrence yet."""
        nn.init.zeros_(self.recurrent)
        size = len(self.norm.weight)
        with torch.no_grad():
            self.gates.bias[size:] = torch.linspace(3, 6, size)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        gates, inputs = self.gates(F.silu(self.conv(x, state))), self.inputs(x)
        driven = wide(torch.cat([gates, inputs], dim=-1))
        driven = driven.unflatten(-1, (4, self.heads, -1)).permute(1, 3, 0, 2, 4).flatten(3)
        with torch.autocast(x.device.type, enabled=False):
            h = scalar_memory(driven, wide(self.recurrent), state)  # (T, H, B, D)
        return self.out_proj(self.norm(h.permute(2, 0, 1, 3)).type_as(x))


@torch.compiler.disable  # compiled, the loop would be as many copies of its body
def scalar_memory(driven: Tensor, recurrent: Tensor, state: State | None) -> Tensor:
    """h (T, H, B, D) of the gates without the recurrent part (T, H, B, 4 D) and R (H, D, 4 D)."""
    nothing = torch.zeros_like(driven[0].unflatten(-1, (4, -1)).movedim(-2, 0))  # (4, H, B, D)
    nothing[3] = NOTHING
    h, c, n, m = remembered(state, "hcnm", lambda: nothing).unbind(0)
    outputs = []
    for now in driven.unbind(0):
        i, f, z, o = torch.baddbmm(now, h, recurrent).chunk(4, dim=-1)
        log_f = F.logsigmoid(f)
        with torch.no_grad():
            top = torch.maximum(log_f + m, i)
        i, f = torch.exp(i - top), torch.exp(log_f + m - top)
        c, n, m = f * c + i * torch.tanh(z), f * n + i, top
        h = torch.sigmoid(o) * c / n
        outputs.append(h)
    if state is not None:
        state["hcnm"] = torch.stack([h, c, n, m])
    return torch.stack(outputs)
