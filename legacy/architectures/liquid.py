"""Closed-form liquid networks (Hasani et al., 2022, Nature Machine Intelligence, arXiv 2106.13898).

The paper starts from liquid time-constant neurons, whose leak depends on the input I,

    dx/dt = -(w + f(x, I)) x + A f(x, I)                                            (LTC)

approximates the solution, and ends at a cell without a differential equation. Its three heads f, g
and h stand on one backbone of the input and of the state before; t is the time since then:

    x_t = sigmoid(-f t) g + (1 - sigmoid(-f t)) h,   f, g, h of (I_t, x_{t-1})      (CfC, eq. 5)

Tokens are one unit of time apart: t = 1. As in the authors' code g and h end in a tanh. Two cells:

`cell="cfc"` is equation (CfC) and nothing else. Its gates hang on x_{t-1}, so positions follow one
another in training too.

`cell="parallel"`, the default, is ours: a linear recurrence, and so a scan (`legacy/scan.py`).
Heads see the input alone, here behind a causal convolution over four positions. Without x_{t-1},
(CfC) has no memory any more: it becomes the candidate that the state leans to, and memory comes
from the step that (LTC) takes exactly while the input stands still, with f of the input alone (as
where the paper solves it) and the candidate in place of the fixed point A f / (w + f):

    c_t = sigmoid(-f) g + (1 - sigmoid(-f)) h,   f, g, h of I_t
    x_t = d_t x_{t-1} + (1 - d_t) c_t,           d_t = exp(-(w + softplus(s of I_t)))
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from legacy.language_model import CausalConv, LanguageModelConfig, State, remembered, wide
from legacy.scan import linear_scan
from model import MLP, RMSNorm

SLOWEST, FASTEST = 0.001, 0.1  # rates of decay at the start, per token, evenly in the logarithm


@dataclass(frozen=True)
class LiquidConfig(LanguageModelConfig):
    """The defaults have 75.9M parameters with the parallel cell."""

    num_hidden_layers: int = 13
    intermediate_size: int = 1_344
    state_size: int = 512
    backbone_size: int = 512
    conv_kernel: int = 4
    cell: str = "parallel"

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {self.cell!r}")

    def layer(self, number: int) -> nn.Module:
        return LiquidLayer(self)

    def sequence_flops_per_token(self, sequence_length: int) -> int:
        """The scan's product and sum, three times; the other cell has matrices alone."""
        scan = 3 * 2 * self.state_size if self.cell == "parallel" else 0
        return self.num_hidden_layers * scan


class LiquidLayer(nn.Module):
    """x + W_o (SiLU(W_g x) * cell(x)), then SwiGLU, each behind a norm."""

    def __init__(self, config: LiquidConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cell = CELLS[config.cell](config)
        self.gate_proj = nn.Linear(config.hidden_size, config.state_size, bias=False)
        self.o_proj = nn.Linear(config.state_size, config.hidden_size, bias=False)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)  # type: ignore[arg-type]  # it reads the two sizes

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        y = self.input_layernorm(x)
        x = x + self.o_proj(F.silu(self.gate_proj(y)) * self.cell(y, state))
        return x + self.mlp(self.post_attention_layernorm(x))


class ParallelCell(nn.Module):
    def __init__(self, config: LiquidConfig):
        super().__init__()
        self.conv = CausalConv(config.hidden_size, config.conv_kernel)
        self.backbone = nn.Linear(config.hidden_size, config.backbone_size)
        self.heads = nn.Linear(config.backbone_size, 4 * config.state_size)  # f, g, h and s
        self.leak = nn.Parameter(torch.empty(config.state_size))  # softplus of it is w

    def initialise(self) -> None:
        slowest = torch.tensor(SLOWEST)
        rates = torch.logspace(math.log10(SLOWEST), math.log10(FASTEST), len(self.leak))
        with torch.no_grad():
            self.leak.fill_(inverse_softplus(slowest))
            self.heads.bias[-len(self.leak) :] = inverse_softplus(rates)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        z = F.silu(self.backbone(self.conv(x, state)))
        f, g, h, s = wide(self.heads(z)).chunk(4, dim=-1)  # (B, T, R)
        rate = F.softplus(wide(self.leak)) + F.softplus(s)
        b = -torch.expm1(-rate) * interpolated(f, g, h)
        states = linear_scan(torch.exp(-rate), b, None if state is None else state.get("x"))
        if state is not None:
            state["x"] = states[:, -1].clone()
        return states.type_as(x)


class CfCCell(nn.Module):
    def __init__(self, config: LiquidConfig):
        super().__init__()
        self.state_size = config.state_size
        self.backbone = nn.Linear(config.hidden_size, config.backbone_size)
        self.recurrent = nn.Linear(config.state_size, config.backbone_size, bias=False)
        self.heads = nn.Linear(config.backbone_size, 3 * config.state_size)  # f, g, h

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        start = remembered(state, "x", lambda: wide(x.new_zeros(len(x), self.state_size)))
        states = self.states(self.backbone(x), start)
        if state is not None:
            state["x"] = states[:, -1].clone()
        return states.type_as(x)

    @torch.compiler.disable  # compiled, the loop would be as many copies of its body
    def states(self, driven: Tensor, now: Tensor) -> Tensor:
        """All x (B, T, R) of the backbone's share of the input (B, T, U) and x before it (B, R)."""
        states = []
        for step in driven.unbind(1):
            z = F.silu(step + self.recurrent(now))
            now = interpolated(*wide(self.heads(z)).chunk(3, dim=-1))
            states.append(now)
        return torch.stack(states, dim=1)


def interpolated(f: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """sigmoid(-f) tanh(g) + (1 - sigmoid(-f)) tanh(h)."""
    return torch.lerp(h.tanh(), g.tanh(), torch.sigmoid(-f))


def inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))


CELLS = {"parallel": ParallelCell, "cfc": CfCCell}
