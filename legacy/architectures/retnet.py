"""RetNet (Sun et al., 2023, arXiv 2307.08621): retention, parallel, recurrent and in chunks.

Each head keeps a state S (Dk, Dv) with a fixed decay g. Queries and keys are turned by their
position's angles; the heads, each normed by itself, are gated by SiLU(x W_G) (equations 5 to 8):

    S_n = g S_{n-1} + k_n^T v_n,   o_n = q_n S_n                                        (recurrent)
    O = (Q K^T * D) V,   D_nm = g^(n-m) for m <= n, else 0                              (parallel)
    Y = (SiLU(X W_G) * GroupNorm_h(heads)) W_O,   g_h = 1 - 2^(-5-h), h = 0, 1, ...

`retention` is the chunkwise form: parallel within a chunk, recurrent from chunk to chunk, and
either of the two at its extremes. The decays are those values as they stand. The group norm sees
one head at one position.

Of the paper's three scalings (section 2.4) only k / sqrt(Dk) is here. All of them multiply a head's
output at a position by a number, which the group norm undoes. The rotation is RoPE's, in
the half-split layout, theta_i = 10000^(-2i/Dk); with the decay it makes up what the paper derives
and calls xPos. The feed-forward network is the paper's, GeLU(X W_1) W_2; the norms before the
sub-layers are RMSNorm, as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from legacy.chunks import chunks, passed_on
from legacy.language_model import LanguageModelConfig, State, remembered, wide
from model import RMSNorm, rotate


@dataclass(frozen=True)
class RetNetConfig(LanguageModelConfig):
    """The defaults have 75.6M parameters."""

    num_hidden_layers: int = 16
    num_heads: int = 4
    value_size: int = 1_024  # of all heads; queries and keys have hidden_size
    intermediate_size: int = 1_024
    rope_theta: float = 10_000.0
    chunk_size: int = 64

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be an even multiple of "
                f"num_heads ({self.num_heads})"
            )
        if self.value_size % self.num_heads:
            raise ValueError(
                f"value_size ({self.value_size}) must be a multiple of num_heads ({self.num_heads})"
            )

    def layer(self, number: int) -> nn.Module:
        return RetNetLayer(self)

    def sequence_flops_per_token(self, sequence_length: int) -> int:
        """Scores and their products with v within chunks; into the state and out of it again."""
        within = 2 * min(self.chunk_size, sequence_length) * (self.hidden_size + self.value_size)
        across = 2 * 2 * self.hidden_size * self.value_size // self.num_heads
        return self.num_hidden_layers * 3 * (within + across)


class RetNetLayer(nn.Module):
    def __init__(self, config: RetNetConfig):
        super().__init__()
        self.retention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.retention = MultiScaleRetention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        x = x + self.retention(self.retention_norm(x), state)
        return x + self.ffn(self.ffn_norm(x))


class MultiScaleRetention(nn.Module):
    def __init__(self, config: RetNetConfig):
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.value_size, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, config.value_size, bias=False)
        self.group_norm = nn.GroupNorm(config.num_heads, config.value_size, config.rms_norm_eps)
        self.out_proj = nn.Linear(config.value_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        heads = (self.config.num_heads, -1)
        seen = 0 if state is None else state.get("seen", 0)
        q, k, v = (
            wide(project(x)).unflatten(-1, heads)  # (B, T, H, Dk or Dv)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = rotary(seen, q, self.config.rope_theta)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin) * k.shape[-1] ** -0.5
        shape = (len(x), self.config.num_heads, k.shape[-1], v.shape[-1])
        start = remembered(state, "s", lambda: v.new_zeros(shape))
        with torch.autocast(x.device.type, enabled=False):
            y, end = retention(q, k, v, start, self.config.chunk_size)
        if state is not None:
            state["s"], state["seen"] = end, seen + x.shape[1]
        y = self.group_norm(y.flatten(2).flatten(0, 1)).view(*x.shape[:2], -1)  # (B, T, H * Dv)
        return self.out_proj(F.silu(self.g_proj(x)) * y.type_as(x))


class FeedForward(nn.Module):
    def __init__(self, config: RetNetConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


def rotary(seen: int, like: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (T, 1, Dk) for queries and keys like (B, T, H, Dk) behind `seen` positions."""
    _, length, _, size = like.shape
    exponent = torch.arange(0, size, 2, device=like.device, dtype=like.dtype) / size
    position = torch.arange(seen, seen + length, device=like.device, dtype=like.dtype)
    angle = torch.outer(position, theta**-exponent).repeat(1, 2)[:, None]
    return angle.cos(), angle.sin()


def retention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Retention of all heads in chunks, and the last state: their size 1 is the recurrent form.

    q and k (B, T, H, Dk), v (B, T, H, Dv), start (B, H, Dk, Dv) -> (B, T, H, Dv).
    """
    length, heads = q.shape[1:3]
    size = min(chunk_size, length)
    q, k, v = (chunks(x, size).transpose(2, 3) for x in (q, k, v))  # (B, n, H, L, D)
    decay = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=q.dtype, device=q.device))  # (H)
    place = torch.arange(size, device=q.device)
    sizes = length - size * torch.arange(q.shape[1], device=q.device)
    sizes = sizes.clamp(max=size)[:, None]  # (n, 1): the last may have fewer positions

    mask = decay[:, None, None] ** (place[:, None] - place).clamp(min=0)  # (H, L, L)
    y = (q @ k.transpose(-1, -2) * mask.tril()) @ v

    to_end = decay[:, None] ** (sizes[..., None] - 1 - place).clamp(min=0)  # (n, H, L)
    added = (k * to_end[..., None]).transpose(-1, -2) @ v  # (B, n, H, Dk, Dv)
    states = passed_on((decay**sizes)[None, :, :, None, None], added, start)

    from_begin = decay[:, None] ** (place + 1)  # (H, L)
    y = y + (q * from_begin[..., None]) @ torch.stack(states[:-1], dim=1)
    return y.transpose(2, 3).flatten(1, 2)[:, :length], states[-1]
