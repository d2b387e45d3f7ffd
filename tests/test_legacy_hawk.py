"""Tests of Hawk and Griffin, against Hugging Face's RecurrentGemma and the paper's recurrence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import RecurrentGemmaConfig, RecurrentGemmaModel

from legacy.architectures.hawk import RGLRU, GriffinConfig, HawkConfig, LocalAttention
from legacy.language_model import LanguageModel

GRIFFIN = GriffinConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    lru_width=40,
    num_gate_blocks=4,
    num_attention_heads=4,
    window=6,
    rms_norm_eps=1e-6,
)
HAWK = HawkConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    lru_width=40,
    num_gate_blocks=4,
    rms_norm_eps=1e-6,
)


def some_ids(*shape: int) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


def recurrent_gemma(config: HawkConfig) -> RecurrentGemmaModel:
    torch.manual_seed(0)
    theirs = RecurrentGemmaModel(
        RecurrentGemmaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=2 * config.intermediate_size,  # theirs is that of both branches
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=4,  # of attention, and the blocks of the gates
            num_key_value_heads=1,
            lru_width=config.lru_width,
            attention_window_size=GRIFFIN.window,
            rms_norm_eps=config.rms_norm_eps,
            block_types=getattr(config, "block_types", ("recurrent",)),
            pad_token_id=None,
        )
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return theirs


@torch.no_grad()
def take_weights(model: LanguageModel, theirs: RecurrentGemmaModel) -> None:
    mine = dict(model.model.named_parameters())
    for name, parameter in theirs.named_parameters():
        own = mine.pop(name.replace("final_norm", "norm"))
        if "norm" in name:
            parameter = 1 + parameter
        elif "embed" in name:
            parameter = parameter * theirs.normalizer.float()  # they scale what is looked up
        own.copy_(parameter.reshape(own.shape))
    assert not mine


@pytest.mark.parametrize("config", [HAWK, GRIFFIN], ids=["Hawk", "Griffin"])
def test_with_recurrent_gemmas_weights_it_gives_its_outputs(config: HawkConfig) -> None:
    theirs, model = recurrent_gemma(config), config.build()
    take_weights(model, theirs)
    ids = some_ids(2, 40)  # far more than the window
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(model.model(ids, None), expected, atol=1e-4, rtol=0)


def literal_rg_lru(unit: RGLRU, x: Tensor) -> Tensor:
    """Equations 1 to 4 of the paper, with a block-diagonal matrix for each gate."""
    input_matrix = torch.block_diag(*unit.input_gate_weight).T
    recurrence_matrix = torch.block_diag(*unit.recurrent_gate_weight).T
    h, outputs = torch.zeros_like(x[:, 0]), []
    for t, now in enumerate(x.unbind(1)):
        r = torch.sigmoid(now @ recurrence_matrix.T + unit.recurrent_gate_bias)
        i = torch.sigmoid(now @ input_matrix.T + unit.input_gate_bias)
        a = torch.exp(-8 * F.softplus(unit.recurrent_param) * r)
        h = a * h + (torch.sqrt(1 - a**2) if t else 1.0) * (i * now)
        outputs.append(h)
    return torch.stack(outputs, dim=1)


def test_the_rg_lru_and_its_gradients_are_the_papers_recurrence() -> None:
    torch.manual_seed(0)
    unit = RGLRU(HAWK).double()
    for parameter in unit.parameters():
        torch.nn.init.normal_(parameter)
    given = [torch.randn(2, 20, 40, dtype=torch.float64, requires_grad=True), *unit.parameters()]
    mine, theirs = unit(given[0], None), literal_rg_lru(unit, given[0])
    torch.testing.assert_close(mine, theirs)
    upstream = torch.randn_like(mine)
    gradients = (torch.autograd.grad(y, given, upstream) for y in (mine, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_decay_of_one_has_a_finite_gradient() -> None:
    unit = RGLRU(HAWK)
    unit.initialise()
    torch.nn.init.constant_(unit.recurrent_gate_bias, -200)  # r = 0, a = 1, sqrt(1 - a^2) = 0
    unit(torch.randn(1, 5, 40), None).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unit.parameters())


def test_decays_with_an_open_gate_begin_between_a_tenth_and_a_thousandth_below_one() -> None:
    unit = HawkConfig(hidden_size=64, num_hidden_layers=1, vocab_size=10).build()
    rg_lru = unit.model.layers[0].temporal_block.rg_lru
    decay = torch.exp(-8 * F.softplus(rg_lru.recurrent_param))
    assert 0.9 <= decay.min() < 0.91 and 0.99 < decay.max() <= 0.9991


def test_griffin_has_two_recurrent_blocks_for_one_of_attention() -> None:
    layers = replace(GRIFFIN, num_hidden_layers=9).build().model.layers
    kinds = [isinstance(layer.temporal_block, LocalAttention) for layer in layers]
    assert kinds == [False, False, True] * 3


def test_attention_sees_the_window_and_nothing_before_it() -> None:
    torch.manual_seed(0)
    attention = LocalAttention(GRIFFIN)
    x = torch.randn(1, 20, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention(x, None)[0, 12].sum(), x)
    seen = gradient[0].abs().amax(-1) > 0
    assert seen.nonzero()[:, 0].tolist() == list(range(7, 13))


def test_the_cache_of_attention_stops_growing_at_the_window() -> None:
    model = GRIFFIN.build()
    cache, sizes = model.new_cache(), []
    with torch.no_grad():
        for ids in some_ids(1, 12).split([1, 2, 1, 6, 1, 1], dim=1):
            model(ids, cache=cache)
            sizes.append(cache[2]["k"].shape[2])
    assert sizes == [1, 3, 4, 5, 5, 5]  # with the next position itself, 6
    assert cache[2]["k"].untyped_storage().nbytes() == 5 * 8 * 4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lru_width": 42}, r"lru_width \(42\) must be a multiple of num_gate_blocks \(4\)"),
        ({"hidden_size": 40}, r"hidden_size \(40\) must be a multiple of four times"),
        ({"block_types": ("recurrent", "conv")}, "a block is recurrent or attention, not conv"),
    ],
)
def test_configs_that_make_no_model_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GRIFFIN, **setting)
