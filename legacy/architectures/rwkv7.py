"""RWKV-7 "Goose" (Peng et al., 2025, arXiv 2503.14456): a generalised delta rule.

Each head keeps a matrix S that maps keys to values. Before it stores a pair, it decays, and takes
back what it held under (nearly) the same key:

    S_t = S_{t-1} (diag(w_t) - k^_t^T (a_t * k^_t)) + v_t^T k_t          o_t = r_t S_t^T

with row vectors, the normalised key k^ = k * k_k / |k * k_k|, a stored key k (1 + (a - 1) k_a), and
low-rank functions of the shifted input: the decay w = exp(-exp(-0.5) sigmoid(w0 + tanh(x w1) w2)),
the rate of learning a = sigmoid(a0 + x a1 a2), the gate g = sigmoid(x g1) g2, and the share
sigmoid(v0 + x v1 v2) of the first layer's values that goes into each later layer's. o passes a norm
of each head, gets the bonus (r * r_k * k summed) v, and the gate. The MLP is relu(x W_k)^2 W_v.

In chunks (section `delta_rule`). With D_t the product of a chunk's decays up to t, and u_t = -k^_t
S_{t-1}^T what is taken back, S_t is linear in all u and v of the chunk, and so is each u in those
before it: one triangular system a chunk gives all of them,

    u = (I - L_ab)^-1 (A S_0^T + L_ak v),   A_t = -k^_t D_{t-1},  L_ab = tril(A B^T, -1), ...
    B_t = a_t k^_t / D_t,  K_t = k_t / D_t

and only S goes from chunk to chunk. Dividing by D is safe, as w > exp(-exp(-0.5)) = 0.545: in 32
steps the quotients stay below exp(19.5).

It begins as the authors' code does, but for the matrices, which begin as all of `legacy/` do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from legacy.architectures.rwkv4 import RWKVBody, channel_and_depth, shifted
from legacy.language_model import Body, Cache, LanguageModelConfig, State, remembered, wide

MAX_RATE = math.exp(-0.5)  # of decay: log w is between it, negated, and 0
MAX_CHUNK = 128  # exp(128 * MAX_RATE) is 5e33: much more is no number in fp32


@dataclass(frozen=True)
class RWKV7Config(LanguageModelConfig):
    """The defaults have 73.4M parameters."""

    num_hidden_layers: int = 14
    intermediate_size: int = 2_048
    head_dim: int = 64
    decay_rank: int = 64
    rate_rank: int = 64
    value_rank: int = 32
    gate_rank: int = 128
    chunk_size: int = 32

    def __post_init__(self) -> None:
        if self.hidden_size % self.head_dim:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of head_dim ({self.head_dim})"
            )
        if self.chunk_size > MAX_CHUNK:
            raise ValueError(f"chunk_size must be at most {MAX_CHUNK}, got {self.chunk_size}")

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_dim

    def body(self) -> Body:
        return RWKV7Body(self)

    def layer(self, number: int) -> nn.Module:
        return RWKV7Layer(self, number)

    def sequence_flops_per_token(self, sequence_length: int) -> int:
        """Products within a chunk, with the state, and of the states; all three times."""
        size, dim = min(self.chunk_size, sequence_length), self.head_dim
        forward = 18 * size * dim + 8 * dim**2 + 2 * dim**3 // size
        return self.num_hidden_layers * self.num_heads * 3 * forward


class RWKV7Body(RWKVBody):
    """Hands the first layer's values on to all others."""

    def forward(self, input_ids: Tensor, cache: Cache | None) -> Tensor:
        x, values = self.embed_tokens(input_ids), None
        states: Iterable[State | None] = cache if cache is not None else [None] * len(self.layers)
        for layer, state in zip(self.layers, states, strict=True):
            x, values = layer(x, state, values)
        return self.norm(x)


class RWKV7Layer(nn.Module):
    def __init__(self, config: RWKV7Config, number: int):
        super().__init__()
        norm = (config.hidden_size, config.rms_norm_eps)
        self.ln0 = nn.LayerNorm(*norm) if number == 0 else nn.Identity()  # of the embeddings
        self.ln1 = nn.LayerNorm(*norm)
        self.attention = TimeMixing(config, number)
        self.ln2 = nn.LayerNorm(*norm)
        self.feed_forward = ChannelMixing(config, number)

    def forward(
        self, x: Tensor, state: State | None, values: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x, and the first layer's values (B, T, C): None says that this is the first."""
        x = self.ln0(x)
        y, values = self.attention(self.ln1(x), state, values)
        x = x + y
        return x + self.feed_forward(self.ln2(x), state), values


class TimeMixing(nn.Module):
    def __init__(self, config: RWKV7Config, number: int):
        super().__init__()
        self.config, self.number = config, number
        size, heads = config.hidden_size, config.num_heads
        self.mix = nn.Parameter(torch.empty(6 * size))  # shares of the position before
        self.decay = LowRank(size, config.decay_rank, torch.tanh)
        self.rate = LowRank(size, config.rate_rank)
        self.gate = LowRank(size, config.gate_rank, torch.sigmoid, bias=False)
        if number > 0:
            self.first_share = LowRank(size, config.value_rank)
        self.removal_key = nn.Parameter(torch.empty(size))  # k_k
        self.rate_of_key = nn.Parameter(torch.empty(size))  # k_a
        self.bonus = nn.Parameter(torch.empty(size))  # r_k
        self.receptance = nn.Linear(size, size, bias=False)
        self.key = nn.Linear(size, size, bias=False)
        self.value = nn.Linear(size, size, bias=False)
        self.output = nn.Linear(size, size, bias=False)
        self.norm = nn.GroupNorm(heads, size, eps=1e-5 * config.head_dim)

    def initialise(self) -> None:
        """As the authors' code: low-rank parts silent, time scales spread over the channels."""
        channel, depth, from_top = channel_and_depth(self.config, self.number)
        powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2]) * from_top  # of r, w, k, v, a, g
        spread = torch.linspace(0, 1, self.config.hidden_size) ** (0.85 + math.sqrt(depth))
        with torch.no_grad():
            self.mix.copy_((1 - channel ** powers[:, None]).flatten())
            self.decay.up.bias.copy_(-6.5 + 5 * spread)
            if self.number > 0:
                self.first_share.up.bias.fill_(1)
        nn.init.constant_(self.removal_key, 0.85)
        nn.init.ones_(self.rate_of_key)
        nn.init.zeros_(self.bonus)

    def forward(
        self, x: Tensor, state: State | None, first_values: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        before = shifted(x, state, "attention_x")
        x_r, x_w, x_k, x_v, x_a, x_g = torch.lerp(x, before, self.mix.view(6, 1, 1, -1)).unbind(0)
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        if first_values is None:
            first_values = v
        else:
            v = torch.lerp(v, first_values, torch.sigmoid(self.first_share(x_v)))
        log_w = self.log_decay(x_w)
        a = torch.sigmoid(wide(self.rate(x_a)))
        r, log_w, v, a, removal = (
            self.heads(y) for y in (r, log_w, v, a, k * self.removal_key)
        )  # (B, H, T, N)
        k = self.heads(k) * (1 + (a - 1) * self.heads(self.rate_of_key.expand_as(x)))
        removal = F.normalize(removal, dim=-1)
        start = remembered(state, "S", lambda: k.new_zeros(*k.shape[:2], k.shape[3], k.shape[3]))
        o, end = delta_rule(r, log_w, k, v, removal, a, start, self.config.chunk_size)
        if state is not None:
            state["S"] = end
        y = self.norm(o.transpose(1, 2).flatten(2).flatten(0, 1)).view_as(x)
        bonus = (r * k * self.heads(self.bonus.expand_as(x))).sum(-1, keepdim=True) * v
        y = y + bonus.transpose(1, 2).flatten(2)
        return self.output(y * self.gate(x_g)), first_values

    def log_decay(self, x: Tensor) -> Tensor:
        """log w, between -exp(-0.5) and 0."""
        return -MAX_RATE * torch.sigmoid(wide(self.decay(x)))

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, H, T, N) in fp32."""
        return wide(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)


class ChannelMixing(nn.Module):
    def __init__(self, config: RWKV7Config, number: int):
        super().__init__()
        self.config, self.number = config, number
        self.mix = nn.Parameter(torch.empty(config.hidden_size))
        self.key = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.value = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def initialise(self) -> None:
        channel, _, from_top = channel_and_depth(self.config, self.number)
        with torch.no_grad():
            self.mix.copy_(1 - channel ** (from_top**4))

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        before = shifted(x, state, "feed_forward_x")
        return self.value(F.relu(self.key(torch.lerp(x, before, self.mix))).square())


class LowRank(nn.Module):
    """W_up f(W_down x) + b, which begins as f(0) and b have it."""

    def __init__(
        self,
        size: int,
        rank: int,
        between: Callable[[Tensor], Tensor] | None = None,
        *,
        bias: bool = True,
    ):
        super().__init__()
        self.down = nn.Linear(size, rank, bias=False)
        self.between = between
        self.up = nn.Linear(rank, size, bias=bias)

    def initialise(self) -> None:
        nn.init.zeros_(self.down.weight)
        nn.init.orthogonal_(self.up.weight, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.up(x if self.between is None else self.between(x))


# -------------------------------------------------------------------------- the delta rule


def delta_rule(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    removal: Tensor,
    a: Tensor,
    start: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """o of the recurrence at the top, all but start (B, H, T, N) and in fp32, and the last state.

    `removal` is k^. States are S^T: (B, H, N keys, N values).
    """
    length = k.shape[2]
    size = min(chunk_size, length)
    with torch.autocast(k.device.type, enabled=False):
        r, log_w, k, v, asked, stored = (
            in_chunks(x, size) for x in (r, log_w, k, v, -removal, removal * a)
        )
        o, end = chunked_delta_rule(r, log_w, k, v, asked, stored, start)
    return o.flatten(2, 3)[:, :, :length], end


def in_chunks(x: Tensor, size: int) -> Tensor:
    """(B, H, T, N) -> (B, H, chunk, size, N). The zeros at the end leave a state as it is."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))


def chunked_delta_rule(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """o of H_t = diag(w_t) H_{t-1} + b_t^T (a_t H_{t-1}) + k_t^T v_t, and the last H.

    H = S^T. o and all arguments but start (B, H, N, N) are in n chunks of L: (B, H, n, L, N).
    """
    size, dim = k.shape[3:]
    since = log_w.cumsum(dim=3)  # log D_t
    decay, growth = torch.exp(since), torch.exp(-since)
    a_in, r_in = a * torch.exp(since - log_w), r * decay
    b_in, k_in = b * growth, k * growth
    scores = torch.cat([a_in, r_in], dim=3) @ torch.cat([b_in, k_in], dim=3).mT  # (2L, 2L)
    ab, ak = (x.tril(-1) for x in scores[..., :size, :].split(size, dim=-1))
    rb, rk = (x.tril() for x in scores[..., size:, :].split(size, dim=-1))
    solved = torch.linalg.solve_triangular(  # (I - ab)^-1; the 1s of the diagonal are implied
        -ab, torch.cat([a_in, ak @ v], dim=-1), upper=False, unitriangular=True
    )
    u_of_state, u_of_values = solved.split(dim, dim=-1)  # u = u_of_state H + u_of_values
    end = decay[..., -1, :]  # (B, H, n, N)
    b_end, k_end = (b_in * end[..., None, :]).mT, (k_in * end[..., None, :]).mT
    transition = torch.diag_embed(end) + b_end @ u_of_state  # (N, N)
    addition = b_end @ u_of_values + k_end @ v
    states = [start]
    for product, summand in zip(transition.unbind(2), addition.unbind(2), strict=True):
        states.append(product @ states[-1] + summand)
    o = (r_in + rb @ u_of_state) @ torch.stack(states[:-1], dim=2) + rb @ u_of_values + rk @ v
    return o, states[-1]
