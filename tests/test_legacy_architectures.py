"""What every architecture under `legacy/architectures/` owes: one line here adds another."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hamner.machine import recomputing
from legacy.architectures.hawk import GriffinConfig, HawkConfig
from legacy.architectures.hgrn2 import HGRN2Config
from legacy.architectures.liquid import LiquidConfig
from legacy.architectures.mamba import MambaConfig
from legacy.architectures.mamba2 import Mamba2Config
from legacy.architectures.retnet import RetNetConfig
from legacy.architectures.rwkv4 import RWKV4Config
from legacy.architectures.rwkv7 import RWKV7Config
from legacy.architectures.xlstm import XLSTMConfig
from legacy.language_model import LanguageModel, LanguageModelConfig, fitted

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
V01 = 75_514_368  # parameters of the tournament's small dense transformer

# Small, and with chunks so short that sequences of 75 cross their borders many times.
ARCHITECTURES: dict[str, LanguageModelConfig] = {
    "mamba": MambaConfig(**SMALL, intermediate_size=48, state_size=8, time_step_rank=4),
    "mamba2": Mamba2Config(**SMALL, num_heads=4, head_dim=16, state_size=16, chunk_size=16),
    "retnet": RetNetConfig(**SMALL, num_heads=2, value_size=64, chunk_size=16),
    "hgrn2": HGRN2Config(**SMALL, num_heads=2, intermediate_size=64, chunk_size=16),
    "rwkv4": RWKV4Config(**SMALL, intermediate_size=64),
    "rwkv7": RWKV7Config(
        **SMALL, intermediate_size=64, head_dim=8, chunk_size=16,
        decay_rank=4, rate_rank=4, value_rank=4, gate_rank=8,
    ),
    "xlstm": XLSTMConfig(
        **SMALL, intermediate_size=64, num_heads=2, qk_size=16, v_size=32, chunk_size=16,
        block_types=("mlstm", "slstm"),
    ),
    "hawk": HawkConfig(**SMALL, intermediate_size=64, lru_width=48, num_gate_blocks=4),
    "griffin": GriffinConfig(
        **SMALL, intermediate_size=64, lru_width=48, num_gate_blocks=4, num_attention_heads=4,
        window=16, block_types=("recurrent", "attention"),
    ),
    "liquid": LiquidConfig(**SMALL, intermediate_size=64, state_size=48, backbone_size=32),
    "cfc": LiquidConfig(**SMALL, intermediate_size=64, state_size=48, backbone_size=32, cell="cfc"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ARCHITECTURES)
def config(request: pytest.FixtureRequest) -> LanguageModelConfig:
    return ARCHITECTURES[request.param]


@pytest.fixture
def model(config: LanguageModelConfig) -> LanguageModel:
    """Weights so large that what stands before counts: at their beginning it hardly does."""
    torch.manual_seed(0)
    model = config.build()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
    return model


def some_ids(*shape: int) -> Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(1))


def in_parts(model: LanguageModel, ids: Tensor, lengths: list[int]) -> Tensor:
    """Logits of ids (B, T) given to one cache in parts of these lengths."""
    cache = model.new_cache()
    parts = ids.split(lengths, dim=1)
    return torch.cat([model(part, cache=cache).logits for part in parts], dim=1)


def test_no_position_sees_the_future_and_the_last_sees_the_first(model: LanguageModel) -> None:
    ids = some_ids(2, 40)
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    model.model.embed_tokens.register_forward_hook(lambda *_: embedded)
    logits = model(ids).logits
    for t in (0, 1, 15, 16, 22, 39):
        (gradient,) = torch.autograd.grad(logits[:, t].square().sum(), embedded, retain_graph=True)
        assert (gradient[:, t + 1 :] == 0).all()
        assert (gradient[:, t].abs().sum(-1) > 0).all()
    assert (gradient[:, 0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize(
    "lengths",
    [[1] * 75, [17, 1, 1, 40, 3, 13], [64, 11]],
    ids=["one by one", "any lengths", "a whole chunk"],
)
@torch.no_grad()
def test_cached_decoding_gives_the_logits_of_the_whole(
    model: LanguageModel, lengths: list[int]
) -> None:
    ids = some_ids(3, 75)
    whole = model(ids).logits
    assert whole.std() > 0.1
    torch.testing.assert_close(in_parts(model, ids, lengths), whole, atol=1e-4, rtol=0)


@torch.no_grad()
def test_what_stands_before_counts_and_rows_keep_apart(model: LanguageModel) -> None:
    ids = some_ids(2, 33)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids[1:]).logits, whole[1:], atol=1e-4, rtol=0)
    changed = ids.clone()
    changed[:, 26] = (ids[:, 26] + 1) % 64
    assert (model(changed).logits[:, -1] - whole[:, -1]).abs().max() > 1e-4  # in the next chunk


def test_it_learns_a_batch_by_heart(config: LanguageModelConfig) -> None:
    torch.manual_seed(0)
    model, ids = config.build(), some_ids(4, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), fused=True)
    for _ in range(150):
        loss = model(ids, labels=ids).loss
        if loss < 0.1:
            return
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    pytest.fail(f"the loss is still {loss:.3f}")


def test_under_bf16_all_stays_finite_and_near(model: LanguageModel) -> None:
    ids = some_ids(2, 75)
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits
        loss = model(ids, labels=ids).loss
        decoded = in_parts(model, ids, [70, 1, 1, 3])
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for half in (logits, decoded):
        assert half.isfinite().all()
        assert (half.float() - exact).square().mean().sqrt() < 0.1 * exact.std()


@pytest.mark.parametrize(
    ("name", "key"), [("mamba", "h"), ("mamba2", "h"), ("retnet", "s"), ("hgrn2", "s")]
)
def test_states_stay_in_fp32_under_bf16(name: str, key: str) -> None:
    model = ARCHITECTURES[name].build()
    cache = model.new_cache()
    with torch.autocast("cpu", torch.bfloat16):
        model(some_ids(2, 20), cache=cache)
        model(some_ids(2, 1), cache=cache)
    assert all(state[key].dtype == torch.float32 for state in cache)


def test_recomputing_the_layers_changes_no_gradient(model: LanguageModel) -> None:
    ids, again = some_ids(2, 33), copy.deepcopy(model)
    for layer in again.model.layers:
        layer.forward = recomputing(layer.forward)  # type: ignore[method-assign]
    for each in (model, again):
        each(ids, labels=ids).loss.backward()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_weights_survive_a_state_dict(model: LanguageModel, config: LanguageModelConfig) -> None:
    again, ids = config.build(), some_ids(1, 20)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=0, rtol=0)
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())


def test_flops_are_those_that_torch_counts(model: LanguageModel) -> None:
    ids = some_ids(2, 64)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    counted = counter.get_total_flops() / ids.numel()  # of matrix products alone, not of scans
    assert 0.8 < counted / model.config.flops_per_token(64) < 1.05


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_defaults_are_as_large_as_the_small_transformer(name: str) -> None:
    config = type(ARCHITECTURES[name])()
    assert abs(config.num_parameters() / V01 - 1) < 0.06
    assert abs(fitted(config, V01).num_parameters() / V01 - 1) < 0.01
