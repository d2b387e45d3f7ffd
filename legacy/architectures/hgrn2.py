"""HGRN2 (Qin et al., 2024, arXiv 2404.07904): gated linear recurrences with an expanded state.

Each head keeps a state S (D, D). Inputs are written along one axis; along the other, each of the D
rows is forgotten at a rate of its own. As much is written as is forgotten, so there are no keys:

    f_t = l + (1 - l) sigmoid(W_f x_t)           forget gates, bounded from below by l
    S_t = diag(f_t) S_{t-1} + (1 - f_t)^T i_t,   i_t = W_i x_t
    y_t = q_t S_t,   q_t = SiLU(W_q x_t)         the output gate; then RMSNorm and W_o

The bounds l rise from layer to layer, so that lower layers forget sooner: a softmax over the layers
of one learned number per channel, summed up from the bottom, less the first (HGRN, arXiv
2311.04823). So the lowest is 0. SwiGLU follows, each behind a norm. As in the authors' code there
is no bias and no convolution.

Positions are cut in chunks. Within one, decays differ from channel to channel, and the scores
q_t diag(f_{s+1} ... f_t) k_s^T, with k = 1 - f, are a product of matrices only if each decay is
split at some position between s and t. To split all at the chunk's begin divides by f_1 ... f_s,
which overflows where gates are near 0. `decayed_scores` splits each pair at the middle of the
smallest of the blocks of 2, 4, 8, ... positions that holds both. Every factor is a product of gates
between s and t: none exceeds 1, nothing is divided, no logarithm is taken, and gates may be 0.
It takes log2(L) small products. On a CPU core they are about three times as fast as the usual way,
blocks of 16 positions whose inner scores are computed channel by channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from legacy.chunks import chunks, passed_on
from legacy.language_model import Body, Cache, LanguageModelConfig, State, remembered, wide
from model import MLP, ModelConfig, RMSNorm


@dataclass(frozen=True)
class HGRN2Config(LanguageModelConfig):
    """The defaults have 75.4M parameters."""

    num_hidden_layers: int = 16
    num_heads: int = 4
    intermediate_size: int = 1_360
    chunk_size: int = 64

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_heads "
                f"({self.num_heads})"
            )
        if self.chunk_size & (self.chunk_size - 1):
            raise ValueError(f"chunk_size ({self.chunk_size}) must be a power of two")

    def body(self) -> Body:
        return HGRN2Body(self)

    def layer(self, number: int) -> nn.Module:
        return HGRN2Layer(self)

    def sequence_flops_per_token(self, sequence_length: int) -> int:
        """Scores and their products with the inputs within chunks; into the state and out again."""
        within = 2 * 2 * min(self.chunk_size, sequence_length) * self.hidden_size
        across = 2 * 2 * self.hidden_size**2 // self.num_heads
        return self.num_hidden_layers * 3 * (within + across)


class HGRN2Body(Body):
    """Gives each layer its lower bound."""

    def __init__(self, config: HGRN2Config):
        super().__init__(config)
        # Flat, so that the optimizer knows it for no matrix and doesn't decay it.
        self.bounds = nn.Parameter(torch.zeros(config.num_hidden_layers * config.hidden_size))

    def forward(self, input_ids: Tensor, cache: Cache | None) -> Tensor:
        x = self.embed_tokens(input_ids)  # (B, T, C)
        states = cache if cache is not None else [None] * len(self.layers)
        for layer, state, bound in zip(self.layers, states, self.lower_bounds(), strict=True):
            x = layer(x, state, bound)
        return self.norm(x)

    def lower_bounds(self) -> Tensor:
        """(layers, C), from 0 at the bottom to less than 1 at the top."""
        share = wide(self.bounds).view(len(self.layers), -1).softmax(dim=0)
        return share.cumsum(dim=0) - share[0]


class HGRN2Layer(nn.Module):
    def __init__(self, config: HGRN2Config):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = GatedRecurrence(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(
            ModelConfig(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_attention_heads=1,
                num_key_value_heads=1,
            )
        )

    def forward(self, x: Tensor, state: State | None, bound: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), state, bound)
        return x + self.mlp(self.mlp_norm(x))


class GatedRecurrence(nn.Module):
    def __init__(self, config: HGRN2Config):
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.f_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.i_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.g_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, state: State | None, bound: Tensor) -> Tensor:
        f = wide(self.f_proj(x))
        forgotten = (1 - bound) * torch.sigmoid(-f)  # (B, T, C); 1 - f would lose it to rounding
        kept = bound + (1 - bound) * torch.sigmoid(f)
        q, i = wide(F.silu(self.q_proj(x))), wide(self.i_proj(x))
        heads = (self.config.num_heads, -1)
        q, forgotten, kept, i = (y.unflatten(-1, heads) for y in (q, forgotten, kept, i))
        shape = (len(x), self.config.num_heads, q.shape[-1], i.shape[-1])
        start = remembered(state, "s", lambda: i.new_zeros(shape))
        with torch.autocast(x.device.type, enabled=False):
            y, end = gated_recurrence(q, forgotten, kept, i, start, self.config.chunk_size)
        if state is not None:
            state["s"] = end
        return self.o_proj(self.g_norm(y.flatten(2)).to(x.dtype))


def gated_recurrence(
    q: Tensor, k: Tensor, kept: Tensor, v: Tensor, start: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """y_t = q_t S_t with S_t = diag(kept_t) S_{t-1} + k_t^T v_t, and the last S.

    q, k and kept (B, T, H, D), v (B, T, H, E), start (B, H, D, E) -> (B, T, H, E).
    """
    length = q.shape[1]
    size = min(chunk_size, 1 << (length - 1).bit_length())  # a power of two
    q, k, v = (chunks(x, size).transpose(2, 3) for x in (q, k, v))  # (B, n, H, L, D or E)
    kept = chunks(kept, size, filler=1.0).transpose(2, 3)
    scores, from_begin, to_end = decayed_scores(q, k, kept)
    added = (k * to_end).transpose(-1, -2) @ v  # (B, n, H, D, E)
    states = passed_on(from_begin[..., -1, :, None], added, start)
    y = scores @ v + (q * from_begin) @ torch.stack(states[:-1], dim=1)  # (B, n, H, L, E)
    return y.transpose(2, 3).flatten(1, 2)[:, :length], states[-1]


def decayed_scores(q: Tensor, k: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q_t (kept_{s+1} ... kept_t) k_s^T for s <= t, else 0, and the gates' products.

    q, k and kept (..., L, D), L a power of two. Returns the scores (..., L, L) and two products
    of gates (..., L, D): from the first position up to each, and from behind each up to the last.
    """
    scores = (q * k).sum(-1)[..., None, None]  # (..., blocks, size, size): blocks of one position
    from_begin, to_end = kept, torch.ones_like(kept)  # each within its block
    while (size := scores.shape[-1]) < q.shape[-2]:
        q_late, k_early = halves(q, size)[1], halves(k, size)[0]  # (..., blocks / 2, size, D)
        begin_early, begin_late = halves(from_begin, size)
        end_early, end_late = halves(to_end, size)
        across = (q_late * begin_late) @ (k_early * end_early).transpose(-1, -2)
        early, late = scores.unflatten(-3, (-1, 2)).unbind(-3)
        below = torch.cat([across, late], dim=-1)
        scores = torch.cat([F.pad(early, (0, size)), below], dim=-2)
        begins = [begin_early, begin_late * begin_early[..., -1:, :]]
        ends = [end_early * begin_late[..., -1:, :], end_late]
        from_begin, to_end = (torch.cat(x, dim=-2).flatten(-3, -2) for x in (begins, ends))
    return scores[..., 0, :, :], from_begin, to_end


def halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The blocks of `size` positions of x (..., L, D), two by two: two (..., n, size, D)."""
    early, late = x.unflatten(-2, (-1, 2, size)).unbind(-3)
    return early, late
