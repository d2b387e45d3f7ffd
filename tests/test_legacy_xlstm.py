"""Tests of xLSTM, against Hugging Face's and the papers' recurrences without any stabiliser."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import xLSTMConfig, xLSTMModel

from legacy.architectures import xlstm
from legacy.architectures.xlstm import (
    MLSTM,
    SLSTM,
    MLSTMBlock,
    SLSTMBlock,
    XLSTMConfig,
    matrix_memory,
    scalar_memory,
)

SMALL = XLSTMConfig(
    vocab_size=50,
    hidden_size=64,
    intermediate_size=72,
    num_hidden_layers=2,
    num_heads=4,
    qk_size=32,
    v_size=64,
    block_types=("mlstm", "slstm"),
)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("qk_share", [0.5, 1.0])
def test_with_hugging_faces_weights_it_gives_their_outputs(qk_share: float) -> None:
    torch.manual_seed(0)
    settings = xLSTMConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=3, num_heads=4, qk_dim_factor=qk_share
    )
    theirs = xLSTMModel(settings).eval()
    model = XLSTMConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=theirs.blocks[0].ffn.up_proj_dim,
        num_hidden_layers=3,
        num_heads=4,
        qk_size=int(64 * qk_share),
        v_size=64,
        block_types=("mlstm",),
        rms_norm_eps=settings.norm_eps,
    ).build()
    mine = dict(model.model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3)
            name = name.replace("embeddings", "embed_tokens").replace("blocks", "layers")
            mine.pop(name.replace("out_norm", "norm")).copy_(parameter)
        assert not mine
        ids = torch.randint(50, (2, 150))  # two chunks and a part of one
        expected = theirs(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(model.model(ids, None), expected, atol=1e-4, rtol=0)


def same_with_gradients(mine: Tensor, theirs: Tensor, given: list[Tensor]) -> None:
    torch.testing.assert_close(mine, theirs)
    upstream = random(*mine.shape, seed=99)
    gradients = (torch.autograd.grad(y, given, upstream) for y in (mine, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def literal_mlstm(q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor) -> Tensor:
    """Equations 19 to 27 of the paper: C (V, K), n (K), h = C q / max(|n . q|, 1)."""
    memory = q.new_zeros(*q.shape[:2], v.shape[-1], k.shape[-1])
    n, outputs = torch.zeros_like(k[:, :, 0]), []
    for t in range(q.shape[2]):
        enter, keep = i[:, :, t].exp(), log_f[:, :, t].exp()
        pair = v[:, :, t, :, None] * k[:, :, t, None, :]
        memory = keep[..., None, None] * memory + enter[..., None, None] * pair
        n = keep[..., None] * n + enter[..., None] * k[:, :, t]
        size = (n * q[:, :, t]).sum(-1, keepdim=True).abs().clamp(min=1)
        outputs.append((memory @ q[:, :, t, :, None])[..., 0] / size)
    return torch.stack(outputs, dim=2)


@pytest.mark.parametrize("length", [1, 5, 8, 21])
def test_the_chunked_mlstm_and_its_gradients_are_the_recurrences(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xlstm, "EPS", 0)  # the paper has none
    q, k, v = (
        random(2, 3, length, 6),
        random(2, 3, length, 6, seed=1),
        random(2, 3, length, 4, seed=2),
    )
    i, f = random(2, 3, length, seed=3, scale=4), random(2, 3, length, seed=4, scale=2)
    given = [x.requires_grad_() for x in (q, k, v, i, f)]
    theirs = literal_mlstm(q, k, v, i, F.logsigmoid(f))
    same_with_gradients(matrix_memory(q, k, v, i, F.logsigmoid(f), None, 8), theirs, given)


def literal_slstm(driven: Tensor, recurrent: Tensor) -> Tensor:
    """Equations 8 to 14 of the paper, f a sigmoid; driven (T, H, B, 4 D)."""
    h = driven.new_zeros(*driven.shape[1:3], driven.shape[3] // 4)
    c, n, outputs = torch.zeros_like(h), torch.zeros_like(h), []
    for now in driven:
        i, f, z, o = (now + h @ recurrent).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + i.exp() * torch.tanh(z)
        n = torch.sigmoid(f) * n + i.exp()
        h = torch.sigmoid(o) * c / n
        outputs.append(h)
    return torch.stack(outputs)


def test_the_slstm_and_its_gradients_are_the_recurrences() -> None:
    given = [random(12, 3, 2, 20, scale=2), random(3, 5, 20, seed=1)]
    given = [x.requires_grad_() for x in given]
    same_with_gradients(scalar_memory(*given, None), literal_slstm(*given), given)


def test_the_exponential_gates_cannot_overflow() -> None:
    driven = random(30, 2, 1, 12, scale=200)  # exp(200) doesn't exist in fp32
    recurrent = random(2, 3, 12, seed=1)
    h = scalar_memory(driven.float(), recurrent.float(), None)
    torch.testing.assert_close(h.double(), literal_slstm(driven, recurrent), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sign", [-1, 1])
def test_gates_at_their_cap_for_a_thousand_positions_leave_all_finite(sign: int) -> None:
    torch.manual_seed(0)
    layer = MLSTM(SMALL)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.constant_(layer.igate_preact.bias, sign * 1e4)
    torch.nn.init.constant_(layer.fgate_preact.bias, -sign * 1e4)
    y = layer(torch.randn(1, 1_000, 64), None)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_forget_gates_begin_open_and_input_gates_all_but_shut() -> None:
    mlstm, slstm = (layer for layer in SMALL.build().model.layers)
    layer = mlstm.mlstm_layer
    torch.testing.assert_close(layer.fgate_preact.bias, torch.linspace(3, 6, 4))
    assert (layer.igate_preact.bias == -10).all()
    assert not layer.fgate_preact.weight.any() and not layer.igate_preact.weight.any()
    input_bias, forget_bias = slstm.slstm_layer.gates.bias.chunk(2)
    assert not input_bias.any()
    torch.testing.assert_close(forget_bias, torch.linspace(3, 6, 64))


def test_of_eight_blocks_one_is_an_slstm() -> None:
    config = XLSTMConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=16, qk_size=8, v_size=8
    )
    layers = config.build().model.layers
    assert [i for i, layer in enumerate(layers) if isinstance(layer, SLSTMBlock)] == [3, 11]
    assert sum(isinstance(layer, MLSTMBlock) for layer in layers) == 14


def test_heads_must_divide_the_sizes() -> None:
    with pytest.raises(ValueError, match=r"qk_size \(30\) must be a multiple of num_heads \(4\)"):
        XLSTMConfig(qk_size=30)


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(ValueError, match="a block is mlstm or slstm, not lstm"):
        XLSTMConfig(block_types=("mlstm", "lstm"))


def test_heads_of_the_slstm_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    layer = SLSTM(SMALL)
    torch.nn.init.normal_(layer.recurrent)
    driven = torch.randn(6, 4, 1, 64, requires_grad=True)
    h = scalar_memory(driven, layer.recurrent, None)
    (gradient,) = torch.autograd.grad(h[-1, 2].sum(), driven)
    seen = gradient.abs().amax((0, 2, 3)) > 0
    assert seen.tolist() == [False, False, True, False]
