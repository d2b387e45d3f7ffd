"""RetNet against its paper's equations, written down as they stand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from legacy.architectures.retnet import MultiScaleRetention, RetNetConfig, retention

CONFIG = RetNetConfig(hidden_size=24, num_heads=3, value_size=36, chunk_size=8)


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
    """q, k, v and a state, for 2 sequences and 3 heads with 4 and 5 numbers."""
    qk = [random(2, length, 3, 4, seed=seed) for seed in (0, 1)]
    return [*qk, random(2, length, 3, 5, seed=2), random(2, 3, 4, 5, seed=3)]


def recurrent(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 6: S_n = g S_{n-1} + K_n^T V_n, Retention(X_n) = Q_n S_n."""
    g = 1 - 2.0 ** -torch.arange(5.0, 5 + q.shape[2], dtype=torch.float64)
    outputs = []
    for n in range(q.shape[1]):
        s = g[:, None, None] * s + k[:, n, :, :, None] * v[:, n, :, None]
        outputs.append((q[:, n, :, None] @ s)[:, :, 0])
    return torch.stack(outputs, dim=1), s


@pytest.mark.parametrize(
    ("length", "chunk_size"), [(1, 64), (37, 1), (37, 8), (32, 8), (37, 37), (37, 64)]
)
def test_chunks_of_any_size_are_the_recurrent_form(length: int, chunk_size: int) -> None:
    given = [x.requires_grad_() for x in inputs(length)]
    upstream = (random(2, length, 3, 5, seed=4), random(2, 3, 4, 5, seed=5))
    ours, theirs = retention(*given, chunk_size), recurrent(*given)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    gradients = (torch.autograd.grad(outputs, given, upstream) for outputs in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_what_was_written_fades_at_the_papers_rates() -> None:
    length, heads = 200, 8
    ones, written = torch.ones(1, length, heads, 1), torch.zeros(1, length, heads, 1)
    written[:, 0] = 1
    y, _ = retention(ones, written, ones, torch.zeros(1, heads, 1, 1), 64)
    n = torch.arange(length)
    for head, rate in enumerate((31 / 32, 63 / 64, 127 / 128, 255 / 256)):
        torch.testing.assert_close(y[0, :, head, 0], rate**n)
    torch.testing.assert_close(y[0, :, 7, 0], (4095 / 4096) ** n)


def parallel(layer: MultiScaleRetention, x: Tensor) -> Tensor:
    """Equations 5 and 8 with all of section 2.4, one head after the other; x (T, C)."""
    heads, length = CONFIG.num_heads, len(x)
    position = torch.arange(length, dtype=x.dtype)
    outputs = []
    for head in range(heads):
        q, k, v = (
            (x @ project.weight.T).chunk(heads, dim=-1)[head]
            for project in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        size = q.shape[-1]
        theta = CONFIG.rope_theta ** (-2 * torch.arange(size // 2, dtype=x.dtype) / size)
        turn = torch.polar(torch.ones(length, size // 2, dtype=x.dtype), position[:, None] * theta)
        q, k = (torch.complex(*y.chunk(2, dim=-1)) * turn for y in (q, k))
        scores = (q @ k.conj().T).real / size**0.5
        g = 1 - 2.0 ** (-5 - head)
        d = (g ** (position[:, None] - position)).tril()
        scores = scores * d / d.sum(1, keepdim=True).sqrt()
        scores = scores / scores.sum(1, keepdim=True).abs().clamp(min=1)
        y = scores @ v
        y = (y - y.mean(1, keepdim=True)) / y.var(1, unbiased=False, keepdim=True).sqrt()
        outputs.append(y)
    y = torch.cat(outputs, dim=1) * layer.group_norm.weight + layer.group_norm.bias
    return (F.silu(x @ layer.g_proj.weight.T) * y) @ layer.out_proj.weight.T


@torch.no_grad()
def test_multi_scale_retention_is_the_papers_with_all_its_scalings() -> None:
    torch.manual_seed(0)
    layer = MultiScaleRetention(CONFIG).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = random(2, 30, 24, seed=6)
    expected = torch.stack([parallel(layer, row) for row in x])
    torch.testing.assert_close(
        layer(x, None) / expected.std(), expected / expected.std(), atol=1e-4, rtol=0
    )


def test_shapes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="even multiple of num_heads"):
        RetNetConfig(hidden_size=36, num_heads=4)
    with pytest.raises(ValueError, match=r"value_size \(30\) must be a multiple"):
        RetNetConfig(hidden_size=32, num_heads=4, value_size=30)
