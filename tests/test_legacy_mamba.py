"""Mamba and Mamba-2 against Hugging Face's, and their scans against the recurrence step by step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hamner.optim import Optimizer
from hamner.recipe import load_recipe
from legacy.architectures.mamba import MambaConfig, selective_scan
from legacy.architectures.mamba2 import Mamba2Config, segment_sums, ssd
from legacy.language_model import LanguageModel

# Nothing but eps has the default value, neither ours nor theirs, so that a mix-up is seen.
SHAPE = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3}
MAMBA = MambaConfig(**SHAPE, intermediate_size=72, state_size=5, time_step_rank=3, conv_kernel=3)
MAMBA2 = Mamba2Config(
    **SHAPE, num_heads=6, head_dim=8, state_size=5, n_groups=2, conv_kernel=3, chunk_size=8
)
THEIRS = {**SHAPE, "conv_kernel": 3, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
NAMES = {"backbone.": "model.", "embeddings.": "embed_tokens.", "norm_f.": "norm."}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def with_weights_of(theirs: PreTrainedModel, config: MambaConfig | Mamba2Config) -> LanguageModel:
    """Our model with their weights, which become random and large first."""
    torch.manual_seed(0)
    model = config.build()
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.ndim > 1 and not name.endswith("A_log"):
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
            for old, new in NAMES.items():
                name = name.replace(old, new)
            own = ours.pop(name)
            own.copy_(parameter.view_as(own))
    assert not ours
    return model


@torch.no_grad()
def check_against(theirs: PreTrainedModel, config: MambaConfig | Mamba2Config) -> None:
    model = with_weights_of(theirs.eval(), config)
    ids = torch.randint(61, (2, 45), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)


def test_mamba_with_hugging_faces_weights_gives_its_logits() -> None:
    settings = transformers.MambaConfig(**THEIRS, expand=3, state_size=5, time_step_rank=3)
    check_against(transformers.MambaForCausalLM(settings), MAMBA)


def test_mamba2_with_hugging_faces_weights_gives_its_logits() -> None:
    settings = transformers.Mamba2Config(
        **THEIRS, expand=2, num_heads=6, head_dim=8, state_size=5, n_groups=2, chunk_size=16
    )
    check_against(transformers.Mamba2ForCausalLM(settings), MAMBA2)


# --------------------------------------------------------------------------------- Mamba's scan


def scan_inputs(length: int) -> list[Tensor]:
    """x, step, a, b, c and a start, for 2 sequences, 3 channels and 4 numbers each."""
    step = torch.nn.functional.softplus(random(2, length, 3, seed=1))
    a = -random(3, 4, seed=2).exp()
    bc = [random(2, length, 4, seed=seed) for seed in (3, 4)]
    return [random(2, length, 3, seed=0), step, a, *bc, random(2, 3, 4, seed=5)]


def literal_scan(
    x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Equations 2a, 2b and the discretisation of the paper's section 2, position by position."""
    outputs = []
    for t in range(x.shape[1]):
        h = torch.exp(step[:, t, :, None] * a) * h
        h = h + step[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
        outputs.append((h * c[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1), h


@pytest.mark.parametrize("length", [1, 16, 39])
def test_the_scan_and_its_gradients_are_those_of_the_recurrence(length: int) -> None:
    given = [x.requires_grad_() for x in scan_inputs(length)]
    upstream = (random(2, length, 3, seed=6), random(2, 3, 4, seed=7))
    ours, theirs = selective_scan(*given), literal_scan(*given)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    gradients = (torch.autograd.grad(outputs, given, upstream) for outputs in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_scan_survives_decays_that_underflow_and_steps_of_zero() -> None:
    x, step, a, b, c, start = (x.float() for x in scan_inputs(80))
    step = torch.where(random(2, 80, 3, seed=8).float() > 0, 1e4 * step, 0.0).requires_grad_()
    x = 1e-4 * x
    y, _ = selective_scan(x, step, a, b, c, start)
    expected, _ = literal_scan(x, step, a, b, c, start)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    y.sum().backward()
    assert step.grad is not None and step.grad.isfinite().all()


# ----------------------------------------------------------------------------------- Mamba-2's


def ssd_inputs(length: int) -> list[Tensor]:
    """x, log decays, b, c and a start, for 2 sequences, 4 heads of 3, and 2 groups with 5."""
    log_decay = -torch.nn.functional.softplus(random(2, length, 4, seed=1))
    bc = [random(2, length, 2, 5, seed=seed) for seed in (2, 3)]
    return [random(2, length, 4, 3, seed=0), log_decay, *bc, random(2, 2, 5, 6, seed=4)]


def literal_ssd(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence of the paper's section 3, each head and position by itself."""
    h = start.unflatten(-1, (2, 3)).movedim(3, 2).flatten(1, 2)  # (B, H, N, P)
    b, c = b.repeat_interleave(2, dim=2), c.repeat_interleave(2, dim=2)
    outputs = []
    for t in range(x.shape[1]):
        written = b[:, t, :, :, None] * x[:, t, :, None]
        h = log_decay[:, t, :, None, None].exp() * h + written
        outputs.append(torch.einsum("bhn,bhnp->bhp", c[:, t], h))
    return torch.stack(outputs, dim=1), h.unflatten(1, (2, 2)).movedim(2, 3).flatten(-2)


@pytest.mark.parametrize(("length", "chunk_size"), [(1, 64), (37, 1), (37, 8), (32, 8), (37, 64)])
def test_ssd_and_its_gradients_are_those_of_the_recurrence(length: int, chunk_size: int) -> None:
    given = [x.requires_grad_() for x in ssd_inputs(length)]
    upstream = (random(2, length, 4, 3, seed=5), random(2, 2, 5, 6, seed=6))
    ours, theirs = ssd(*given, chunk_size), literal_ssd(*given)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    gradients = (torch.autograd.grad(outputs, given, upstream) for outputs in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_decays_after_a_strong_one_are_not_lost_to_rounding() -> None:
    log_decay = torch.full((64,), -0.01)
    log_decay[5] = -3e4
    between = segment_sums(log_decay).exp()
    place = torch.arange(64.0)
    expected = torch.exp(-0.01 * (place[:, None] - place)).tril()
    torch.testing.assert_close(between[6:, 6:], expected[6:, 6:])
    assert (between[5:, :5] == 0).all() and (between.triu(1) == 0).all()


def test_heads_must_fill_their_groups() -> None:
    with pytest.raises(ValueError, match=r"num_heads \(6\) must be a multiple of n_groups \(4\)"):
        Mamba2Config(num_heads=6, n_groups=4)


# ----------------------------------------------------------------------------- both at the start


def test_what_sets_the_time_scales_begins_as_in_the_papers_and_is_not_decayed() -> None:
    for config, bias in ((MAMBA, "dt_proj.bias"), (MAMBA2, "dt_bias")):
        torch.manual_seed(0)
        model = config.build()
        own = dict(model.model.layers[1].mixer.named_parameters())
        steps = torch.nn.functional.softplus(own[bias])
        assert 0.0009 < steps.min() < steps.max() < 0.11 and steps.std() > 0.01
        assert own["A_log"].exp().min() >= 1 and own["A_log"].exp().max() > 4.9
        assert (own["D"] == 1).all()
        optimizer = Optimizer(model, load_recipe("tiny").base.optimizer)
        groups = [g for g in optimizer.param_groups if g["weight_decay"] == 0]
        spared = [id(p) for group in groups for p in group["params"]]
        assert all(id(own[name]) in spared for name in ("A_log", "D", bias))
