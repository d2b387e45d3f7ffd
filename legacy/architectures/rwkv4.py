"""RWKV-4 (Peng et al., 2023, arXiv 2305.13048): attention without queries, as a recurrence.

Time mixing. Every input is mixed with the position before (token shift): x_t^k = mu_k x_t +
(1 - mu_k) x_{t-1}, and so for v and r. Keys alone say how much each value counts, channel by
channel, with a decay w = exp(time_decay) and a bonus u for the position itself:

    wkv_t = (sum_{i<t} exp(-(t-1-i) w + k_i) v_i + exp(u + k_t) v_t) / (the same without the v)
    o_t = W_o (sigmoid(r_t) * wkv_t)

Channel mixing is a gated MLP of shifted inputs: sigmoid(W_r x^r) * W_v relu(W_k x^k)^2.

Numerator and denominator are linear recurrences with the same decay: a scan (`legacy/scan.py`)
computes each in training. Both are kept divided by exp(m), m_t = max(m_{t-1} - w, k_t) being the
largest exponent so far, so that no exponential exceeds 1. m cancels in wkv and needs no gradient,
and it is a running maximum itself: m_t = max_{i<=t}(k_i + i w) - t w.

Parameters are named and shaped as in Hugging Face's `RwkvModel`, but that `time_mix_*` are flat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from legacy.language_model import Body, LanguageModelConfig, State, remembered, wide
from legacy.scan import linear_scan

NOTHING = -1e38  # the exponent of what was never seen; finite, so that differences are


@dataclass(frozen=True)
class RWKV4Config(LanguageModelConfig):
    """The defaults have 76.4M parameters."""

    num_hidden_layers: int = 15
    intermediate_size: int = 2_048

    def body(self) -> Body:
        return RWKVBody(self)

    def layer(self, number: int) -> nn.Module:
        return RWKV4Layer(self, number)

    def sequence_flops_per_token(self, sequence_length: int) -> int:
        """A product and a sum for numerator and denominator, three times."""
        return self.num_hidden_layers * 3 * 2 * 2 * self.hidden_size


class RWKVBody(Body):
    """Ends in a layer norm with a bias, as all norms of RWKV are."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__(config)
        self.norm = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)


class RWKV4Layer(nn.Module):
    def __init__(self, config: RWKV4Config, number: int):
        super().__init__()
        norm = (config.hidden_size, config.rms_norm_eps)
        self.pre_ln = nn.LayerNorm(*norm) if number == 0 else nn.Identity()  # of the embeddings
        self.ln1 = nn.LayerNorm(*norm)
        self.attention = TimeMixing(config, number)
        self.ln2 = nn.LayerNorm(*norm)
        self.feed_forward = ChannelMixing(config, number)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        x = self.pre_ln(x)
        x = x + self.attention(self.ln1(x), state)
        return x + self.feed_forward(self.ln2(x), state)


class TimeMixing(nn.Module):
    def __init__(self, config: RWKV4Config, number: int):
        super().__init__()
        self.config, self.number = config, number
        size = config.hidden_size
        self.time_decay = nn.Parameter(torch.empty(size))
        self.time_first = nn.Parameter(torch.empty(size))
        self.time_mix_key = nn.Parameter(torch.empty(size))
        self.time_mix_value = nn.Parameter(torch.empty(size))
        self.time_mix_receptance = nn.Parameter(torch.empty(size))
        self.key = nn.Linear(size, size, bias=False)
        self.value = nn.Linear(size, size, bias=False)
        self.receptance = nn.Linear(size, size, bias=False)
        self.output = nn.Linear(size, size, bias=False)

    def initialise(self) -> None:
        """Time scales spread over the channels, more slow ones higher up, as the authors do."""
        channel, depth, from_top = channel_and_depth(self.config, self.number)
        index = torch.arange(self.config.hidden_size)
        with torch.no_grad():
            spread = (index / max(1, self.config.hidden_size - 1)) ** (0.7 + 1.3 * depth)
            self.time_decay.copy_(-5 + 8 * spread)
            self.time_first.copy_(math.log(0.3) + 0.5 * ((index + 1) % 3 - 1))
            self.time_mix_key.copy_(channel**from_top)
            self.time_mix_value.copy_(channel**from_top + 0.3 * depth)
            self.time_mix_receptance.copy_(channel ** (0.5 * from_top))

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        before = shifted(x, state, "attention_x")
        k = wide(self.key(torch.lerp(before, x, self.time_mix_key)))
        v = wide(self.value(torch.lerp(before, x, self.time_mix_value)))
        r = self.receptance(torch.lerp(before, x, self.time_mix_receptance))
        wkv = weighted_values(k, v, wide(self.time_decay).exp(), wide(self.time_first), state)
        return self.output(torch.sigmoid(r) * wkv.type_as(r))


class ChannelMixing(nn.Module):
    def __init__(self, config: RWKV4Config, number: int):
        super().__init__()
        self.config, self.number = config, number
        size = config.hidden_size
        self.time_mix_key = nn.Parameter(torch.empty(size))
        self.time_mix_receptance = nn.Parameter(torch.empty(size))
        self.key = nn.Linear(size, config.intermediate_size, bias=False)
        self.receptance = nn.Linear(size, size, bias=False)
        self.value = nn.Linear(config.intermediate_size, size, bias=False)

    def initialise(self) -> None:
        channel, _, from_top = channel_and_depth(self.config, self.number)
        with torch.no_grad():
            self.time_mix_key.copy_(channel**from_top)
            self.time_mix_receptance.copy_(channel**from_top)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        before = shifted(x, state, "feed_forward_x")
        k = F.relu(self.key(torch.lerp(before, x, self.time_mix_key))).square()
        r = self.receptance(torch.lerp(before, x, self.time_mix_receptance))
        return torch.sigmoid(r) * self.value(k)


def channel_and_depth(config: LanguageModelConfig, number: int) -> tuple[Tensor, float, float]:
    """i / C for the channels i (C), a layer's depth from 0 to 1, and from 1 down to nearly 0."""
    channel = torch.arange(config.hidden_size) / config.hidden_size
    depth = number / max(1, config.num_hidden_layers - 1)
    return channel, depth, 1 - number / config.num_hidden_layers


def shifted(x: Tensor, state: State | None, key: str) -> Tensor:
    """x (B, T, C) one position later; zeros, or what `state[key]` holds, come first."""
    first = remembered(state, key, lambda: torch.zeros_like(x[:, :1]))
    if state is not None:
        state[key] = x[:, -1:].clone()
    return torch.cat([first.type_as(x), x[:, :-1]], dim=1)


def weighted_values(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: State | None) -> Tensor:
    """wkv (B, T, C) of keys and values (B, T, C), decays w and bonuses u (C), all in fp32."""
    old_top = remembered(state, "top", lambda: torch.full_like(k[:, 0], NOTHING))
    with torch.no_grad():
        elapsed = torch.arange(1, k.shape[1] + 1, device=k.device)[:, None] * w  # (T, C)
        highest = torch.maximum((k + elapsed).cummax(dim=1).values, old_top[:, None])
        top = highest - elapsed  # (B, T, C): m
        top_before = torch.cat([old_top[:, None], top[:, :-1]], dim=1)
        both = torch.maximum(top_before, u + k)
    weight, decay = torch.exp(k - top), torch.exp(top_before - w - top)
    above = sums_before(decay, weight * v, state, "above")
    below = sums_before(decay, weight, state, "below")
    if state is not None:
        state["top"] = top[:, -1].clone()
    past, now = torch.exp(top_before - both), torch.exp(u + k - both)
    return (past * above + now * v) / (past * below + now)


def sums_before(decay: Tensor, summands: Tensor, state: State | None, key: str) -> Tensor:
    """The decaying sums (B, T, C) of all that stands before each position."""
    start = remembered(state, key, lambda: torch.zeros_like(summands[:, 0]))
    sums = linear_scan(decay, summands, start)
    if state is not None:
        state[key] = sums[:, -1].clone()
    return torch.cat([start[:, None], sums[:, :-1]], dim=1)
