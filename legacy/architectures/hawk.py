"""Hawk and Griffin (De et al., 2024, arXiv 2402.19427): gated linear recurrences, local attention.

Hawk's recurrent block (section 2.3) multiplies two branches of x: GeLU(W_y x), and W_x x behind a
causal convolution over four positions and a real-gated linear recurrent unit (RG-LRU, section 2.4):

    r_t = sigmoid(W_a x_t + b_a)                    recurrence gate (W block-diagonal)
    i_t = sigmoid(W_i x_t + b_i)                    input gate
    a_t = exp(-8 softplus(L) r_t)                   the decay of each channel, in (0, 1)
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)

which is linear in h and so a scan over the sequence (`legacy/scan.py`). A gated MLP follows.
Griffin puts a block of local attention behind every two recurrent ones: queries see the last
`window` positions, all heads share one key and value head, and the cache never outgrows the window.

Three things are as in the authors' released RecurrentGemma: the first position of a sequence enters
h unscaled, the MLP and all projections but q, k and v have biases, and half of each head is
rotated. Its weights copy by name: gates' biases flat, `conv_1d` without its middle axis of 1, norms
as 1 + weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from legacy.language_model import CausalConv, LanguageModelConfig, State, wide
from legacy.scan import linear_scan
from model import RMSNorm, attend, rotate

MIN_SQUARE = 2.5e-7  # below it the root's slope would pass 1,000


@dataclass(frozen=True)
class HawkConfig(LanguageModelConfig):
    """Hawk. The defaults have 73.6M parameters."""

    num_hidden_layers: int = 14
    intermediate_size: int = 1_536
    lru_width: int = 640
    num_gate_blocks: int = 8  # of the gates' block-diagonal matrices
    conv_kernel: int = 4

    def __post_init__(self) -> None:
        if self.lru_width % self.num_gate_blocks:
            raise ValueError(
                f"lru_width ({self.lru_width}) must be a multiple of "
                f"num_gate_blocks ({self.num_gate_blocks})"
            )

    def layer(self, number: int) -> nn.Module:
        return HawkLayer(self, RecurrentBlock(self))

    def recurrent_flops_per_token(self) -> int:
        """The gates' blocks, and the scan's product and sum, three times."""
        return 3 * self.lru_width * (2 * 2 * self.lru_width // self.num_gate_blocks + 2)

    def sequence_flops_per_token(self, sequence_length: int) -> int:
        return self.num_hidden_layers * self.recurrent_flops_per_token()


@dataclass(frozen=True)
class GriffinConfig(HawkConfig):
    """Griffin. The defaults have 71.5M parameters."""

    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    window: int = 512
    rope_theta: float = 10_000.0
    # of layers 0, 1, ..., and then again
    block_types: tuple[str, ...] = ("recurrent", "recurrent", "attention")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % (4 * self.num_attention_heads):  # half of a head is rotated, in pairs
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of four times "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if unknown := set(self.block_types) - {"recurrent", "attention"}:
            raise ValueError(f"a block is recurrent or attention, not {', '.join(sorted(unknown))}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def attends(self, number: int) -> bool:
        return self.block_types[number % len(self.block_types)] == "attention"

    def layer(self, number: int) -> nn.Module:
        return HawkLayer(
            self, LocalAttention(self) if self.attends(number) else RecurrentBlock(self)
        )

    def sequence_flops_per_token(self, sequence_length: int) -> int:
        """The recurrent blocks' as in Hawk; attention's scores and values over the window."""
        attention = sum(self.attends(number) for number in range(self.num_hidden_layers))
        recurrent = self.num_hidden_layers - attention
        scores = 12 * self.hidden_size * min(sequence_length, self.window)
        return recurrent * self.recurrent_flops_per_token() + attention * scores


class HawkLayer(nn.Module):
    """Temporal mixing, recurrent or by attention, and a gated MLP, each behind a norm."""

    def __init__(self, config: HawkConfig, temporal_block: nn.Module):
        super().__init__()
        self.temporal_pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.temporal_block = temporal_block
        self.channel_pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_block = GatedMLP(config)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        x = x + self.temporal_block(self.temporal_pre_norm(x), state)
        return x + self.mlp_block(self.channel_pre_norm(x))


class RecurrentBlock(nn.Module):
    def __init__(self, config: HawkConfig):
        super().__init__()
        self.linear_y = nn.Linear(config.hidden_size, config.lru_width)
        self.linear_x = nn.Linear(config.hidden_size, config.lru_width)
        self.linear_out = nn.Linear(config.lru_width, config.hidden_size)
        self.conv_1d = CausalConv(config.lru_width, config.conv_kernel)
        self.rg_lru = RGLRU(config)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        gate = F.gelu(self.linear_y(x), approximate="tanh")
        h = self.rg_lru(self.conv_1d(self.linear_x(x), state), state)
        return self.linear_out(gate * h)


class RGLRU(nn.Module):
    """The real-gated linear recurrent unit: equations (1) to (4) of the paper."""

    def __init__(self, config: HawkConfig):
        super().__init__()
        width = config.lru_width // config.num_gate_blocks
        blocks = (config.num_gate_blocks, width, width)  # (block, in, out)
        self.recurrent_param = nn.Parameter(torch.empty(config.lru_width))
        self.input_gate_weight = nn.Parameter(torch.empty(blocks))
        self.input_gate_bias = nn.Parameter(torch.empty(config.lru_width))
        self.recurrent_gate_weight = nn.Parameter(torch.empty(blocks))
        self.recurrent_gate_bias = nn.Parameter(torch.empty(config.lru_width))

    def initialise(self) -> None:
        """Decays with the gate fully open, exp(-8 softplus(L)), evenly within 0.9 ... 0.999."""
        with torch.no_grad():
            slowness = -torch.empty_like(self.recurrent_param).uniform_(0.9, 0.999).log() / 8
            self.recurrent_param.copy_(torch.log(torch.expm1(slowness)))
        for weight in (self.input_gate_weight, self.recurrent_gate_weight):
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]))
        nn.init.zeros_(self.input_gate_bias)
        nn.init.zeros_(self.recurrent_gate_bias)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        start = None if state is None else state.get("h")
        r = self.gate(x, self.recurrent_gate_weight, self.recurrent_gate_bias)  # (B, T, R)
        i = self.gate(x, self.input_gate_weight, self.input_gate_bias)
        log_a = -8 * F.softplus(wide(self.recurrent_param)) * r
        scale = (-torch.expm1(2 * log_a)).clamp(min=MIN_SQUARE).sqrt()
        if start is None:
            scale = F.pad(scale[:, 1:], (0, 0, 1, 0), value=1.0)
        h = linear_scan(log_a.exp(), scale * (i * wide(x)), start)
        if state is not None:
            state["h"] = h[:, -1].clone()
        return h.type_as(x)

    @staticmethod
    def gate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """sigmoid of a block-diagonal product, (B, T, R) in fp32."""
        blocks = x.unflatten(-1, weight.shape[:2])  # (B, T, block, in)
        y = torch.einsum("btni,nio->btno", blocks, weight)
        return torch.sigmoid(wide(y.flatten(2)) + bias)


class LocalAttention(nn.Module):
    """Multi-query attention over the last `window` positions, the own one included."""

    def __init__(self, config: GriffinConfig):
        super().__init__()
        self.config = config
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        seen = 0 if state is None else state.get("seen", 0)
        positions = torch.arange(seen, seen + x.shape[1], device=x.device)
        heads = (-1, self.config.head_dim)
        q = self.rotated(self.q_proj(x).unflatten(-1, heads).transpose(1, 2), positions)
        k = self.rotated(self.k_proj(x).unflatten(-1, heads).transpose(1, 2), positions)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)  # (B, K, T, D)
        if state is not None:
            k, v = self.remember(state, k, v)  # (B, K, S, D)
        mask = self.mask(x.shape[1], k.shape[2], x.device)
        y = attend(q, k, v, mask, causal=mask is None and x.shape[1] > 1)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, H, T, D) with the first half of each head turned by its position's angle."""
        turned, rest = x.chunk(2, dim=-1)
        size = turned.shape[-1]
        exponent = torch.arange(0, size, 2, device=x.device).float() / size
        angle = torch.outer(positions.float(), self.config.rope_theta**-exponent)  # (T, D/4)
        angle = torch.cat([angle, angle], dim=-1)
        return torch.cat([rotate(turned, angle.cos(), angle.sin()), rest], dim=-1)

    def remember(self, state: State, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with the remembered ones before them; keeps what the next can see."""
        state["seen"] = state.get("seen", 0) + k.shape[2]
        if "k" in state:
            k, v = torch.cat([state["k"], k], dim=2), torch.cat([state["v"], v], dim=2)
        begin = max(0, k.shape[2] - (self.config.window - 1))
        state["k"], state["v"] = k[:, :, begin:].clone(), v[:, :, begin:].clone()
        return k, v

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Who sees whom (queries, keys); None where plain causal attention says it all.

        The queries are the last of the keys' positions.
        """
        if keys <= self.config.window and queries in (1, keys):
            return None
        key = torch.arange(keys, device=device)
        distance = key[keys - queries :, None] - key
        return (distance >= 0) & (distance < self.config.window)


class GatedMLP(nn.Module):
    """GeGLU (arXiv 2002.05202) with biases."""

    def __init__(self, config: HawkConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.gelu(self.gate_proj(x), approximate="tanh")
        return self.down_proj(gate * self.up_proj(x))
