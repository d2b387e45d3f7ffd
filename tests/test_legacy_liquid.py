"""Tests of the liquid cells: the paper's equation written out, and the differential equation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from legacy.architectures.liquid import FASTEST, SLOWEST, CfCCell, LiquidConfig, ParallelCell

SMALL = LiquidConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    state_size=12,
    backbone_size=20,
)


def random_cell(kind: type[CfCCell] | type[ParallelCell]) -> CfCCell | ParallelCell:
    torch.manual_seed(0)
    cell = kind(SMALL).double()
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return cell


def affine(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def equation_5(f: Tensor, g: Tensor, h: Tensor, t: float) -> Tensor:
    gate = 1 / (1 + torch.exp(f * t))  # sigmoid(-f t)
    return gate * torch.tanh(g) + (1 - gate) * torch.tanh(h)


def same_with_gradients(
    cell: CfCCell | ParallelCell, literal: Tensor, x: Tensor, mine: Tensor
) -> None:
    torch.testing.assert_close(mine, literal)
    given, upstream = [x, *cell.parameters()], torch.randn_like(mine)
    gradients = (torch.autograd.grad(y, given, upstream) for y in (mine, literal))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_cfc_cell_is_equation_5_of_the_input_and_the_state_before() -> None:
    cell = random_cell(CfCCell)
    x = torch.randn(2, 15, 16, dtype=torch.float64, requires_grad=True)
    state, states = x.new_zeros(2, 12), []
    joint = torch.cat([cell.backbone.weight, cell.recurrent.weight], dim=1)  # of [I_t, x_{t-1}]
    for now in x.unbind(1):
        z = F.silu(torch.cat([now, state], dim=1) @ joint.T + cell.backbone.bias)
        state = equation_5(*affine(cell.heads, z).chunk(3, dim=1), t=1)
        states.append(state)
    same_with_gradients(cell, torch.stack(states, dim=1), x, cell(x, None))


def heads_of(cell: ParallelCell, x: Tensor) -> tuple[Tensor, ...]:
    """f, g, h and s (B, T, R) of the inputs, by a convolution written out."""
    taps, padded = cell.conv.weight, F.pad(x, (0, 0, 3, 0))
    mixed = cell.conv.bias + sum(padded[:, i : i + x.shape[1]] * taps[:, i] for i in range(4))
    return affine(cell.heads, F.silu(affine(cell.backbone, mixed))).chunk(4, dim=-1)


def test_the_parallel_cell_is_its_recurrence() -> None:
    cell = random_cell(ParallelCell)
    x = torch.randn(2, 15, 16, dtype=torch.float64, requires_grad=True)
    f, g, h, s = heads_of(cell, x)
    candidate, decay = equation_5(f, g, h, t=1), torch.exp(-(F.softplus(cell.leak) + F.softplus(s)))
    state, states = x.new_zeros(2, 12), []
    for d, c in zip(decay.unbind(1), candidate.unbind(1), strict=True):
        state = d * state + (1 - d) * c
        states.append(state)
    same_with_gradients(cell, torch.stack(states, dim=1), x, cell(x, None))


@torch.no_grad()
def test_a_step_of_the_parallel_cell_solves_the_liquid_time_constant_equation() -> None:
    """dx/dt = -(w + s) x + (w + s) c, integrated over each token by Runge-Kutta in 50 parts."""
    cell = random_cell(ParallelCell)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    f, g, h, s = heads_of(cell, x)
    candidate, rate = equation_5(f, g, h, t=1), F.softplus(cell.leak) + F.softplus(s)
    state, states, dt = x.new_zeros(2, 12), [], 1 / 50
    for c, k in zip(candidate.unbind(1), rate.unbind(1), strict=True):
        for _ in range(50):
            k1 = k * (c - state)
            k2 = k * (c - (state + dt / 2 * k1))
            k3 = k * (c - (state + dt / 2 * k2))
            k4 = k * (c - (state + dt * k3))
            state = state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(state)
    torch.testing.assert_close(cell(x, None), torch.stack(states, dim=1), atol=1e-6, rtol=1e-6)


def test_time_constants_begin_between_ten_and_a_thousand_tokens() -> None:
    cell = SMALL.build().model.layers[0].cell
    *_, s = cell.heads.bias.chunk(4)
    rates = F.softplus(s)
    torch.testing.assert_close(rates[0].item(), SLOWEST, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(rates[-1].item(), FASTEST, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(F.softplus(cell.leak), torch.full((12,), SLOWEST))


def test_an_unknown_cell_is_refused() -> None:
    with pytest.raises(ValueError, match="cell must be one of parallel, cfc, got 'ltc'"):
        LiquidConfig(cell="ltc")
