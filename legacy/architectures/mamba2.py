"""Mamba-2 (Dao and Gu, 2024, arXiv 2405.21060): structured state space duality.

Mamba's recurrence with one decay for all of a head's state h (P, N). With A < 0 a number per head,
and B, C of (N) that the heads of a group share:

    h_t = a_t h_{t-1} + delta_t x_t B_t^T,   a_t = exp(delta_t A),   delta_t = softplus(. + b)
    y_t = h_t C_t + D x_t

The same, written without h, is attention without a softmax under a mask of decays (section 3.2):

    y = (L * C B^T) (delta x) + D x,   L_ts = a_t a_{t-1} ... a_{s+1} for s <= t, else 0

Positions are cut in chunks (section 6): within one it is computed as attention, from chunk to chunk
h goes on, all with matrix products. Log decays are summed only over the positions that lie between
(`segment_sums`): differences of running sums would lose them to rounding once a chunk has seen a
strong decay.

x, B and C come out of one causal convolution and SiLU; y is gated and normed, RMSNorm(y * SiLU(z)).

Parameters are named and shaped as in Hugging Face's `Mamba2ForCausalLM`, layer for layer, but that
`conv1d.weight` lacks its middle axis of 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from legacy.architectures.mamba import step_bias
from legacy.chunks import chunks, passed_on
from legacy.language_model import CausalConv, LanguageModelConfig, State, remembered, wide
from model import RMSNorm


@dataclass(frozen=True)
class Mamba2Config(LanguageModelConfig):
    """The defaults have 75.0M parameters."""

    num_hidden_layers: int = 29
    num_heads: int = 16
    head_dim: int = 64
    state_size: int = 128
    n_groups: int = 1
    conv_kernel: int = 4
    chunk_size: int = 64

    def __post_init__(self) -> None:
        if self.num_heads % self.n_groups:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of n_groups ({self.n_groups})"
            )

    def layer(self, number: int) -> nn.Module:
        return Mamba2Layer(self)

    def inner_width(self) -> tuple[str, int]:
        return "num_heads", self.n_groups

    def sequence_flops_per_token(self, sequence_length: int) -> int:
        """Scores and their products with x within chunks; into the state and out of it again."""
        chunk = min(self.chunk_size, sequence_length)
        inner = self.num_heads * self.head_dim
        within = 2 * chunk * (self.n_groups * self.state_size + inner)
        across = 2 * 2 * inner * self.state_size
        return self.num_hidden_layers * 3 * (within + across)


class Mamba2Layer(nn.Module):
    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = Mamba2Mixer(config)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        return x + self.mixer(self.norm(x), state)


class Mamba2Mixer(nn.Module):
    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.config = config
        inner = config.num_heads * config.head_dim
        shared = config.n_groups * config.state_size
        self.inner_sizes = [inner, shared, shared]  # of x, B and C
        self.outer_sizes = [inner, sum(self.inner_sizes), config.num_heads]  # z, those, delta
        self.in_proj = nn.Linear(config.hidden_size, sum(self.outer_sizes), bias=False)
        self.conv1d = CausalConv(sum(self.inner_sizes), config.conv_kernel)
        self.dt_bias = nn.Parameter(torch.empty(config.num_heads))
        self.A_log = nn.Parameter(torch.empty(config.num_heads))
        self.D = nn.Parameter(torch.empty(config.num_heads))
        self.norm = GatedNorm(inner, config.n_groups, config.rms_norm_eps)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def initialise(self) -> None:
        """A spread evenly over -1 ... -16, the range of the authors' code."""
        a = torch.linspace(1, 16, len(self.A_log), device=self.A_log.device)
        with torch.no_grad():
            self.A_log.copy_(a.log())
            self.dt_bias.copy_(step_bias(self.dt_bias))
        nn.init.ones_(self.D)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        config, dtype = self.config, x.dtype
        z, xbc, step = self.in_proj(x).split(self.outer_sizes, dim=-1)
        x, b, c = wide(F.silu(self.conv1d(xbc, state))).split(self.inner_sizes, dim=-1)
        x = x.unflatten(-1, (config.num_heads, -1))  # (B, T, H, P)
        b, c = (y.unflatten(-1, (config.n_groups, -1)) for y in (b, c))  # (B, T, G, N)
        step = F.softplus(wide(step) + self.dt_bias)  # (B, T, H)
        log_decay = -torch.exp(wide(self.A_log)) * step
        group_width = config.num_heads * config.head_dim // config.n_groups
        shape = (len(x), config.n_groups, config.state_size, group_width)
        start = remembered(state, "h", lambda: x.new_zeros(shape))
        with torch.autocast(x.device.type, enabled=False):
            y, end = ssd(step[..., None] * x, log_decay, b, c, start, config.chunk_size)
        if state is not None:
            state["h"] = end
        y = y + self.D[:, None] * x
        return self.out_proj(self.norm(y.flatten(2), z).to(dtype))


class GatedNorm(nn.Module):
    """RMSNorm(y * SiLU(z)), each group of channels by itself."""

    def __init__(self, size: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups, self.eps = groups, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        y = (y * F.silu(wide(z))).unflatten(-1, (self.groups, -1))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.flatten(-2)


def ssd(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, start: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """y_t = c_t h_t with h_t = exp(log_decay_t) h_{t-1} + b_t^T x_t, and the last h.

    x (B, T, H, P), log_decay (B, T, H), b and c (B, T, G, N) -> (B, T, H, P). The states of a
    group's R heads lie side by side: start is (B, G, N, R * P).
    """
    length, groups = x.shape[1], b.shape[2]
    x, log_decay, b, c = (chunks(y, min(chunk_size, length)) for y in (x, log_decay, b, c))
    x = x.unflatten(3, (groups, -1)).transpose(2, 3)  # (B, n, G, L, R, P)
    b, c = b.transpose(2, 3), c.transpose(2, 3)  # (B, n, G, L, N)
    log_decay = log_decay.unflatten(3, (groups, -1)).movedim(2, -1)  # (B, n, G, R, L)
    between = segment_sums(log_decay).exp()  # (B, n, G, R, L, L)

    scores = (c @ b.transpose(-1, -2))[:, :, :, None] * between
    within = (scores @ x.transpose(3, 4)).transpose(3, 4)  # (B, n, G, L, R, P)

    to_end = between[..., -1, :].transpose(-1, -2)[..., None]  # (B, n, G, L, R, 1)
    added = b.transpose(-1, -2) @ (x * to_end).flatten(-2)  # (B, n, G, N, R * P)
    from_begin = log_decay.cumsum(-1).exp().transpose(-1, -2)[..., None]  # (B, n, G, L, R, 1)
    kept = from_begin[:, :, :, -1].expand(*x.shape[:3], *x.shape[4:]).flatten(-2)
    states = passed_on(kept[..., None, :], added, start)
    across = (c @ torch.stack(states[:-1], dim=1)).unflatten(-1, x.shape[4:]) * from_begin

    y = (within + across).transpose(2, 3).flatten(3, 4)  # (B, n, L, H, P)
    return y.flatten(1, 2)[:, :length], states[-1]


def segment_sums(x: Tensor) -> Tensor:
    """(..., L) -> (..., L, L): x_{s+1} + ... + x_t at [t, s], and -inf where s > t."""
    ones = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device)
    sums = torch.where(ones.tril(-1), x[..., :, None], 0.0).cumsum(dim=-2)
    return sums.masked_fill(ones.triu(1), -torch.inf)
