"""Mamba (Gu and Dao, 2023, arXiv 2312.00752): a state space model whose matrices see the input.

Each of the E channels of x carries a state h of N numbers, each with a decay of its own:

    delta_t = softplus(W_delta W_r x_t + b)      step sizes (E), by way of a low rank
    B_t, C_t = W_B x_t, W_C x_t                  (N) each, the same for all channels
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,   A = -exp(A_log)    (E, N), elementwise
    y_t = C_t . h_t + D x_t

Around it stand a projection to x and z, a causal convolution over four positions of x, SiLU, then
y * SiLU(z) and a projection back. There is no MLP.

The states of all positions together are N times as large as x. They never exist at once: the scan
goes through 16 positions at a time, in a CPU core's cache, and the backward pass computes their
states anew from the one before them (the paper's section 3.3.2). Within the 16 all but the
recurrence itself is one operation, and the recurrence is one multiply-add per position. Scans that
are parallel in time were far slower on a CPU: see `SelectiveScan`. Decays are multiplied, never
divided.

Parameters are named and shaped as in Hugging Face's `MambaForCausalLM`, layer for layer, but that
`A_log` is flat and `conv1d.weight` lacks its middle axis of 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from legacy.language_model import CausalConv, LanguageModelConfig, State, remembered, wide
from model import RMSNorm

SCAN_LENGTH = 16  # positions whose states exist at once
MIN_STEP, MAX_STEP = 0.001, 0.1  # step sizes at the start, evenly in the logarithm


@dataclass(frozen=True)
class MambaConfig(LanguageModelConfig):
    """The defaults have 76.0M parameters."""

    num_hidden_layers: int = 30
    intermediate_size: int = 1_024
    state_size: int = 16
    conv_kernel: int = 4
    time_step_rank: int = 32

    def layer(self, number: int) -> nn.Module:
        return MambaLayer(self)

    def sequence_flops_per_token(self, sequence_length: int) -> int:
        """delta A, delta x B and its sum with the decayed state, C h: three times 7 per number."""
        return self.num_hidden_layers * 3 * 7 * self.intermediate_size * self.state_size


class MambaLayer(nn.Module):
    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = MambaMixer(config)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        return x + self.mixer(self.norm(x), state)


class MambaMixer(nn.Module):
    def __init__(self, config: MambaConfig):
        super().__init__()
        inner, states, rank = config.intermediate_size, config.state_size, config.time_step_rank
        self.sizes = [rank, states, states]  # of a step, B and C
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.conv1d = CausalConv(inner, config.conv_kernel)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        # Flat, so that the optimizer knows it for no matrix: it is neither decayed nor turned.
        self.A_log = nn.Parameter(torch.empty(inner * states))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def initialise(self) -> None:
        """A = -1, -2, ..., -N in every channel (S4D-Real), as in the paper's section 3.6."""
        rank, states, _ = self.sizes
        a = torch.arange(1, states + 1, device=self.A_log.device).float()
        with torch.no_grad():
            self.A_log.copy_(a.log().repeat(len(self.D)))
            self.dt_proj.bias.copy_(step_bias(self.dt_proj.bias))
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, T, E) each
        x = F.silu(self.conv1d(x, state))
        rank, b, c = self.x_proj(x).split(self.sizes, dim=-1)  # (B, T, R), (B, T, N) twice
        step = F.softplus(wide(F.linear(rank, self.dt_proj.weight)) + self.dt_proj.bias)
        a = -torch.exp(wide(self.A_log)).view(x.shape[-1], -1)  # (E, N)
        start = remembered(state, "h", lambda: a.new_zeros(len(x), *a.shape))
        y, end = selective_scan(wide(x), step, a, wide(b), wide(c), start)
        if state is not None:
            state["h"] = end
        return self.out_proj((y + self.D * x).type_as(z) * F.silu(z))


def step_bias(like: Tensor) -> Tensor:
    """Biases whose softplus is spread log-uniformly over MIN_STEP ... MAX_STEP."""
    low, high = math.log(MIN_STEP), math.log(MAX_STEP)
    step = torch.empty_like(like).uniform_(low, high).exp()
    return step + torch.log(-torch.expm1(-step))  # the inverse of softplus


@torch.compiler.disable  # a graph of thousands of small steps takes minutes to compile
def selective_scan(
    x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """y_t = c_t . h_t with h_t = exp(step_t a) h_{t-1} + step_t x_t b_t, and the last h.

    x and step (B, T, E), a (E, N), b and c (B, T, N), start (B, E, N), all in fp32 or better.
    """
    with torch.autocast(x.device.type, enabled=False):
        return SelectiveScan.apply(step * x, step, a, b, c, start)


class SelectiveScan(torch.autograd.Function):
    """`selective_scan` of u = step * x; for its backward pass it keeps every 16th state.

    With G the gradient of h and d = exp(step a): G_t = dy_t c_t + d_{t+1} G_{t+1}, whence
    du_t = G_t . b_t, db_t = G_t . u_t, dc_t = dy_t . h_t and, of step_t a, G_t d_t h_{t-1}.

    Forward and backward on one core of a CPU, with (B, T, E, N) = (8, 256, 512, 16): 149 ms. A
    plain loop under autograd takes 133 ms, but keeps 2 N numbers per channel and position instead
    of N / 16, and makes several times as many calls, which is what a GPU would wait for. With
    tensors over the whole sequence it is 358 ms; parallel in time, by doubling (log2(T) passes),
    5,400 ms, and in blocks that advance together 3,800 ms.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, starts = torch.empty_like(u), [start]
        for piece in pieces(u.shape[1]):
            _, h = decays_and_states(u[:, piece], step[:, piece], a, b[:, piece], starts[-1])
            starts.append(h[:, -1].clone())
            y[:, piece] = h.mul_(c[:, piece, None]).sum(-1)
        ctx.save_for_backward(u, step, a, b, c, *starts[:-1])
        return y, starts[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, d_end: Tensor) -> tuple[Tensor, ...]:
        u, step, a, b, c, *starts = ctx.saved_tensors
        d_u, d_step, d_b, d_c = (torch.empty_like(x) for x in (u, step, b, c))
        d_a, d_h = torch.zeros_like(a), d_end
        for start, piece in reversed(list(zip(starts, pieces(u.shape[1]), strict=True))):
            decay, h = decays_and_states(u[:, piece], step[:, piece], a, b[:, piece], start)
            g = d_y[:, piece, :, None] * c[:, piece, None]  # (B, 16, E, N)
            g[:, -1] += d_h
            backwards = list(zip(g.unbind(1), decay.unbind(1), strict=True))[::-1]
            for (later, its_decay), (now, _) in pairwise(backwards):
                now.addcmul_(its_decay, later)
            d_h = decay[:, 0] * g[:, 0]
            d_u[:, piece] = (g * b[:, piece, None]).sum(-1)
            d_b[:, piece] = (u[:, piece, None] @ g)[:, :, 0]
            d_c[:, piece] = (d_y[:, piece, None] @ h)[:, :, 0]
            exponent = decay.mul_(g)  # and now its gradient
            exponent[:, 1:] *= h[:, :-1]
            exponent[:, 0] *= start
            d_step[:, piece] = (exponent * a).sum(-1)
            d_a += (exponent * step[:, piece, :, None]).sum((0, 1))
        return d_u, d_step, d_a, d_b, d_c, d_h


def pieces(length: int) -> list[slice]:
    return [slice(i, min(i + SCAN_LENGTH, length)) for i in range(0, length, SCAN_LENGTH)]


def decays_and_states(
    u: Tensor, step: Tensor, a: Tensor, b: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Both (B, T, E, N), of a few positions."""
    decay = torch.exp(step[..., None] * a)
    h = u[..., None] * b[:, :, None]
    before = start
    for its_decay, now in zip(decay.unbind(1), h.unbind(1), strict=True):
        before = now.addcmul_(its_decay, before)
    return decay, h
