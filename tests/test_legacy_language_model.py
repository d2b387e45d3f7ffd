"""The skeleton of `legacy/`: loss, initial weights, counts, fitting, and the causal convolution."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from legacy.architectures.mamba2 import Mamba2Config
from legacy.architectures.retnet import RetNetConfig
from legacy.language_model import (
    CausalConv,
    LanguageModel,
    LanguageModelConfig,
    State,
    fitted,
    remembered,
    wide,
)
from model import IGNORE_INDEX, MLP, ModelConfig, count_labels


@dataclass(frozen=True)
class PlainConfig(LanguageModelConfig):
    """A layer of one MLP, which is enough to see what is around it."""

    vocab_size: int = 50
    hidden_size: int = 16
    num_hidden_layers: int = 3
    intermediate_size: int = 24

    def layer(self, number: int) -> nn.Module:
        return PlainLayer(self)


class PlainLayer(nn.Module):
    def __init__(self, config: PlainConfig):
        super().__init__()
        self.mlp = MLP(
            ModelConfig(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_attention_heads=1,
                num_key_value_heads=1,
            )
        )
        self.forget = nn.Linear(config.hidden_size, config.hidden_size)

    def initialise(self) -> None:
        nn.init.constant_(self.forget.bias, 3.0)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        return x + self.mlp(x) * torch.sigmoid(self.forget(x))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    return PlainConfig().build()


def ids_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (3, 9), generator=generator)
    return ids, ids.masked_fill(torch.rand(3, 9, generator=generator) < 0.4, IGNORE_INDEX)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_the_cross_entropy_of_the_next_label(
    model: LanguageModel, reduction: str
) -> None:
    ids, labels = ids_and_labels()
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction=reduction)
    if reduction == "none":
        expected = F.pad(expected.view(3, 8), (1, 0))
    for known in (None, count_labels(labels)):
        loss = model(ids, labels=labels, reduction=reduction, num_labels=known).loss
        torch.testing.assert_close(loss, expected)


def test_labels_that_are_the_ids_count_all(model: LanguageModel) -> None:
    ids, _ = ids_and_labels()
    torch.testing.assert_close(model(ids, labels=ids).loss, model(ids, labels=ids.clone()).loss)
    with pytest.raises(ValueError, match="reduction must be"):
        model(ids, labels=ids, reduction="average")


def test_only_the_last_positions_get_logits_where_only_they_are_wanted(
    model: LanguageModel,
) -> None:
    ids, _ = ids_and_labels()
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


def test_weights_begin_as_in_the_transformer_and_layers_have_the_last_word() -> None:
    torch.manual_seed(0)
    config = replace(PlainConfig(), vocab_size=4_000, num_hidden_layers=8)
    model = config.build()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    up = torch.cat([layer.mlp.up_proj.weight for layer in model.model.layers])
    down = torch.cat([layer.mlp.down_proj.weight for layer in model.model.layers])
    assert up.std().item() == pytest.approx(0.02, rel=0.1)
    assert down.std().item() == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.1)
    assert all((layer.forget.bias == 3).all() for layer in model.model.layers)


def test_counts_are_exact(model: LanguageModel) -> None:
    config = model.config
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())
    matrices = 50 * 16 + 3 * (3 * 16 * 24 + 16 * 16)
    assert config.flops_per_token(100) == 6 * matrices


@pytest.mark.parametrize("target", [40_000_000, 75_514_368, 163_609_344])
def test_fitting_comes_within_a_hundredth_by_layers_and_width(target: int) -> None:
    for config in (RetNetConfig(), Mamba2Config(), Mamba2Config(hidden_size=640, n_groups=2)):
        fit = fitted(config, target)
        assert abs(fit.num_parameters() / target - 1) < 0.01
        width, _ = config.inner_width() or ("", 0)
        same = {"num_hidden_layers": config.num_hidden_layers, width: getattr(config, width)}
        assert replace(fit, **same) == config
    assert fitted(RetNetConfig(), 75_514_368).num_hidden_layers == 16


def test_fitting_takes_other_layers_where_the_width_is_too_coarse() -> None:
    config = Mamba2Config(vocab_size=100, hidden_size=256)  # four layers come no closer than 1.4 %
    fit = fitted(config, 3_530_000)
    assert abs(fit.num_parameters() / 3_530_000 - 1) < 0.01
    assert fit.num_hidden_layers == 3


def test_fitting_takes_the_nearest_where_nothing_comes_close() -> None:
    config = replace(PlainConfig(), vocab_size=10)
    fit = fitted(config, 100)  # less than one layer
    assert (fit.num_hidden_layers, fit.intermediate_size) == (1, 16)


# -------------------------------------------------------------------------- the convolution


@pytest.mark.parametrize("kernel", [1, 4])
def test_the_convolution_is_torchs_and_goes_on_where_it_stopped(kernel: int) -> None:
    torch.manual_seed(0)
    conv, theirs = CausalConv(6, kernel), nn.Conv1d(6, 6, kernel, groups=6)
    conv.load_state_dict({"weight": theirs.weight[:, 0], "bias": theirs.bias})
    x = torch.randn(2, 11, 6)
    expected = theirs(F.pad(x.transpose(1, 2), (kernel - 1, 0))).transpose(1, 2)
    torch.testing.assert_close(conv(x, None), expected)
    state: State = {}
    parts = [conv(part, state) for part in x.split([1, 2, 1, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)
    assert state["conv"].shape == (2, kernel - 1, 6)
    assert conv(x.bfloat16(), None).dtype == torch.bfloat16


def test_states_are_remembered_and_half_precision_is_widened() -> None:
    zero = torch.zeros(1)
    assert remembered(None, "h", lambda: zero) is zero
    assert remembered({}, "h", lambda: zero) is zero
    assert remembered({"h": (kept := torch.ones(1))}, "h", lambda: zero) is kept
    assert [wide(zero.to(dtype)).dtype for dtype in (torch.half, torch.bfloat16, torch.double)] == [
        torch.float32,
        torch.float32,
        torch.float64,
    ]
