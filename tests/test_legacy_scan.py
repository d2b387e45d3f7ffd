"""Tests of the linear recurrence, against the loop that its definition is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from legacy import scan
from legacy.scan import chunk_length, linear_scan


@pytest.fixture(params=["all steps", "chunks"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs in both orders of work, whatever the sizes would have chosen."""
    monkeypatch.setattr(scan, "BUSY_WIDTH", 0 if request.param == "all steps" else 10**9)
    return str(request.param)


def step_by_step(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    h, states = start, []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, dim=1)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    a = torch.rand(shape, generator=generator, dtype=dtype).sqrt()
    b = torch.randn(shape, generator=generator, dtype=dtype)
    start = torch.randn(shape[:1] + shape[2:], generator=generator, dtype=dtype)
    return a, b, start


@pytest.mark.parametrize("length", [1, 2, 3, 16, 37, 64])
def test_states_and_gradients_are_the_loops(order: str, length: int) -> None:
    a, b, start = (x.requires_grad_() for x in inputs(2, length, 3))
    got, expected = linear_scan(a, b, start), step_by_step(a, b, start)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(
        torch.autograd.grad(got, (a, b, start), upstream),
        torch.autograd.grad(expected, (a, b, start), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_the_gradient_is_that_of_finite_differences(order: str) -> None:
    a, b, start = (x.requires_grad_() for x in inputs(2, 7, 2))
    assert torch.autograd.gradcheck(linear_scan, (a, b, start))


def test_without_a_start_it_begins_from_zeros(order: str) -> None:
    a, b, start = inputs(2, 20, 3)
    torch.testing.assert_close(linear_scan(a, b), linear_scan(a, b, torch.zeros_like(start)))


def test_a_sequence_in_parts_is_the_whole(order: str) -> None:
    a, b, start = inputs(2, 50, 3)
    whole, h, parts = linear_scan(a, b, start), start, []
    for size, from_ in ((17, 0), (1, 17), (32, 18)):
        part = slice(from_, from_ + size)
        parts.append(linear_scan(a[:, part], b[:, part], h))
        h = parts[-1][:, -1]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_states_may_be_matrices_and_decays_shared_among_their_columns(order: str) -> None:
    a, _, _ = inputs(2, 21, 3, 1)
    _, b, start = inputs(2, 21, 3, 4)
    torch.testing.assert_close(linear_scan(a, b, start), step_by_step(a.expand_as(b), b, start))


def test_a_shared_decay_gets_the_gradients_of_all_that_share_it(order: str) -> None:
    (a, _, _), (_, b, start) = inputs(1, 21, 1), inputs(2, 21, 3)
    a.requires_grad_()
    (got,) = torch.autograd.grad(linear_scan(a, b, start).sum(), a)
    (expected,) = torch.autograd.grad(step_by_step(a.expand_as(b), b, start).sum(), a)
    torch.testing.assert_close(got, expected)


def test_decays_of_zero_and_one_and_products_that_underflow_do_no_harm(order: str) -> None:
    a, b, start = inputs(2, 400, 4, dtype=torch.float32)
    a[..., 0], a[..., 1], a[..., 2] = 0, 1, 1e-30
    a.requires_grad_()
    h = linear_scan(a, b, start)
    torch.testing.assert_close(h, step_by_step(a, b, start), atol=1e-4, rtol=1e-5)
    h.sum().backward()
    assert a.grad is not None and a.grad.isfinite().all()


def test_half_precision_is_summed_in_fp32(order: str) -> None:
    b = torch.full((1, 1_000, 1), 2.0**-9, dtype=torch.bfloat16)
    h = linear_scan(torch.ones_like(b), b)
    assert h.dtype == torch.float32
    assert h[0, -1, 0] == 1_000 * 2.0**-9  # bf16 would stop at 0.5: there 2**-9 rounds away


def test_no_state_hears_of_later_inputs(order: str) -> None:
    a, b, _ = (x.requires_grad_() for x in inputs(1, 30, 2))
    d_a, d_b = torch.autograd.grad(linear_scan(a, b)[:, 11].sum(), (a, b))
    assert not d_a[:, 12:].any() and not d_b[:, 12:].any()
    assert d_a[:, 1:12].all() and d_b[:, :12].all()


def test_chunks_are_for_narrow_steps_and_for_gpus() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert chunk_length(1_024, 4_096, cpu) == 1_024
    assert chunk_length(1_024, 64, cpu) == 32
    assert chunk_length(1_024, 4_096, gpu) == 32
