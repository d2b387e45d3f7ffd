"""HGRN2 against its recurrence step by step, above all where gates are near 0."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from legacy.architectures.hgrn2 import GatedRecurrence, HGRN2Body, HGRN2Config, gated_recurrence

CONFIG = HGRN2Config(
    vocab_size=50, hidden_size=24, num_hidden_layers=4, num_heads=3, intermediate_size=32
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def inputs(length: int) -> list[Tensor]:
    """q, k, gates, v and a state, for 2 sequences and 3 heads with 4 and 5 numbers."""
    q, k, f = (random(2, length, 3, 4, seed=seed) for seed in range(3))
    return [q, k, torch.sigmoid(3 * f), random(2, length, 3, 5, seed=3), random(2, 3, 4, 5, seed=4)]


def literal(q: Tensor, k: Tensor, kept: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[1]):
        s = kept[:, t, :, :, None] * s + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, None] @ s)[:, :, 0])
    return torch.stack(outputs, dim=1), s


@pytest.mark.parametrize(
    ("length", "chunk_size"), [(1, 64), (3, 64), (37, 1), (37, 8), (32, 8), (150, 64)]
)
def test_chunks_and_their_gradients_are_those_of_the_recurrence(
    length: int, chunk_size: int
) -> None:
    given = [x.requires_grad_() for x in inputs(length)]
    upstream = (random(2, length, 3, 5, seed=5), random(2, 3, 4, 5, seed=6))
    ours, theirs = gated_recurrence(*given, chunk_size), literal(*given)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    gradients = (torch.autograd.grad(outputs, given, upstream) for outputs in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gates", [[0.0], [1e-30], [0.01], [0.2], [0.0, 1e-20, 0.3, 1.0]], ids=str)
def test_gates_near_zero_and_of_zero_lose_nothing(gates: list[float]) -> None:
    q, k, kept, v, start = (x.float() for x in inputs(150))
    choice = torch.randint(len(gates), kept.shape, generator=torch.Generator().manual_seed(7))
    kept = torch.tensor(gates)[choice].requires_grad_()
    y, _ = gated_recurrence(q, k, kept, v, start, 64)
    expected, _ = literal(*(x.double() for x in (q, k, kept, v, start)))
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=1e-4)
    (gradient,) = torch.autograd.grad(y.sum(), kept)
    (their_gradient,) = torch.autograd.grad(expected.sum(), kept)
    torch.testing.assert_close(gradient, their_gradient, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("logit", [-1e4, -100.0, -1.5, 100.0])
def test_the_layer_stays_finite_whatever_the_gates_inputs(logit: float) -> None:
    torch.manual_seed(0)
    layer, x = GatedRecurrence(CONFIG), torch.rand(2, 200, 24, requires_grad=True)
    with torch.no_grad():
        layer.f_proj.weight.fill_(logit / 12)  # x sums up to about 12
    y = layer(x, None, torch.zeros(24))
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    assert layer.f_proj.weight.grad is not None and layer.f_proj.weight.grad.isfinite().all()


@torch.no_grad()
def test_a_layer_is_the_papers_equations() -> None:
    torch.manual_seed(0)
    layer, x, bound = GatedRecurrence(CONFIG).double(), random(2, 20, 24, seed=8), torch.rand(24)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    f = bound + (1 - bound) * torch.sigmoid(x @ layer.f_proj.weight.T)
    q, i = F.silu(x @ layer.q_proj.weight.T), x @ layer.i_proj.weight.T
    q, k, f, i = (y.unflatten(-1, (3, 8)) for y in (q, 1 - f, f, i))
    y, _ = literal(q, k, f, i, torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    y = F.rms_norm(y.flatten(2), (24,), layer.g_norm.weight, CONFIG.rms_norm_eps)
    expected = y @ layer.o_proj.weight.T
    torch.testing.assert_close(layer(x, None, bound), expected, atol=1e-4, rtol=1e-4)


def test_lower_bounds_rise_from_zero_at_the_bottom() -> None:
    body = CONFIG.build().model
    assert isinstance(body, HGRN2Body)
    even = torch.tensor([0, 0.25, 0.5, 0.75])[:, None].expand(4, 24)
    torch.testing.assert_close(body.lower_bounds(), even)
    torch.nn.init.normal_(body.bounds)
    bounds = body.lower_bounds()
    share = body.bounds.view(4, 24).exp()
    share = share / share.sum(0)
    for layer in range(4):  # HGRN's equation: those of the layers below, but for the first
        torch.testing.assert_close(bounds[layer], share[1 : layer + 1].sum(0))
    assert (bounds.diff(dim=0) > 0).all() and bounds.max() < 1


def test_each_layer_gets_its_bound_and_the_bounds_learn() -> None:
    torch.manual_seed(0)
    model = CONFIG.build()
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.attn.f_proj.weight, 0)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.attn.register_forward_pre_hook(lambda _, given: seen.append(given[2]))
    ids = torch.randint(50, (2, 12))
    model(ids, labels=ids).loss.backward()
    body = model.model
    assert isinstance(body, HGRN2Body)
    torch.testing.assert_close(torch.stack(seen), body.lower_bounds())
    assert body.bounds.grad is not None and body.bounds.grad.abs().sum() > 0


def test_odd_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden_size \(30\) must be a multiple"):
        HGRN2Config(hidden_size=30, num_heads=4)
    with pytest.raises(ValueError, match=r"chunk_size \(48\) must be a power of two"):
        HGRN2Config(chunk_size=48)
