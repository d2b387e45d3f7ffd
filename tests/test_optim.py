"""Learning rates against values worked out by hand; optimizers and loss scale against torch's."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_wsd_schedule

from hamner import optim
from hamner.optim import FIRST_SCALE, LossScale, gradient_norm, learning_rate, make_optimizer
from hamner.recipe import OptimizerPart, SchedulePart
from model import ModelConfig, Transformer

KINDS = ("wsd", "linear", "cosine")
SETTINGS = OptimizerPart(
    learning_rate=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=1.0
)
COUNTS = st.integers(0, 300)


def schedule(kind: str, warmup: int = 0, decay: int = 0, floor: float = 0.0) -> SchedulePart:
    return SchedulePart(kind=kind, warmup=warmup, decay=decay, floor=floor)


def rates(steps: int, peak: float, part: SchedulePart) -> list[float]:
    return [learning_rate(step, steps, peak, part) for step in range(steps)]


def a_model(**shape: int | bool) -> Transformer:
    config = ModelConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8, **shape,
    )  # fmt: skip
    torch.manual_seed(0)
    return Transformer(config)


def test_wsd_warms_up_stays_and_decays_over_the_last_steps() -> None:
    expected = [2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 8.0, 6.5, 5.0, 3.5]
    found = rates(10, 8.0, schedule("wsd", warmup=4, decay=4, floor=0.25))
    assert found == pytest.approx(expected, rel=1e-12)
    assert learning_rate(10, 10, 8.0, schedule("wsd", 4, 4, 0.25)) == pytest.approx(2.0)


def test_wsd_with_a_square_root_decays_as_in_transformers() -> None:
    part = SchedulePart(kind="wsd", warmup=10, decay=60, decay_type="1-sqrt", floor=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=8.0)
    theirs = get_wsd_schedule(optimizer, 10, 60, 100, decay_type="1-sqrt", min_lr_ratio=0.1)
    expected = []
    for _ in range(100):
        expected += theirs.get_last_lr()
        optimizer.step()
        theirs.step()
    # Theirs begins the warm-up at min_lr_ratio, ours at peak / warmup.
    assert rates(100, 8.0, part)[9:] == pytest.approx(expected[10:11] + expected[10:], rel=1e-12)
    assert learning_rate(100, 100, 8.0, part) == pytest.approx(0.8, rel=1e-12)


def test_wsd_without_decay_is_flat_to_the_end() -> None:
    part = schedule("wsd", warmup=3, decay=0, floor=0.0)
    assert rates(9, 6.0, part) == pytest.approx([2.0, 4.0, *[6.0] * 7], rel=1e-12)
    assert learning_rate(9, 9, 6.0, part) == 6.0


def test_linear_falls_from_the_peak_in_equal_steps() -> None:
    found = rates(10, 8.0, schedule("linear", warmup=2, floor=0.5))
    expected = [4.0, 8.0, 8.0, 7.5, 7.0, 6.5, 6.0, 5.5, 5.0, 4.5]
    assert found == pytest.approx(expected, rel=1e-12)


def test_linear_reaches_exactly_zero_right_after_a_small_last_step() -> None:
    part = schedule("linear", floor=0.0)
    assert learning_rate(0, 400, 0.003, part) == 0.003
    assert learning_rate(399, 400, 0.003, part) == pytest.approx(0.003 / 400, rel=1e-9)
    assert learning_rate(400, 400, 0.003, part) == 0.0


def test_cosine_follows_half_a_wave_down_to_the_floor() -> None:
    part = schedule("cosine", warmup=2, floor=0.1)
    expected = [5.0, 10.0, 10.0]
    # 1 + 9 * (1 + cos(k * 30 degrees)) / 2 for k = 1 ... 5
    root = math.sqrt(3) / 2
    expected += [1 + 9 * (1 + wave) / 2 for wave in (root, 0.5, 0.0, -0.5, -root)]
    assert rates(8, 10.0, part) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(8, 8, 10.0, part) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_floor_of_one_keeps_the_peak(kind: str) -> None:
    assert rates(20, 3.0, schedule(kind, decay=10, floor=1.0)) == [3.0] * 20


@pytest.mark.parametrize("kind", KINDS)
def test_beyond_the_last_step_the_rate_stays_at_the_floor(kind: str) -> None:
    part = schedule(kind, warmup=5, decay=10, floor=0.2)
    assert learning_rate(1_000, 50, 2.0, part) == pytest.approx(0.4, rel=1e-12)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    kind=st.sampled_from(KINDS),
    steps=st.integers(1, 300),
    warmup=COUNTS,
    decay=COUNTS,
    floor=st.floats(0, 1),
    peak=st.floats(1e-6, 10),
)
def test_the_rate_is_positive_rises_while_warming_up_and_never_again(
    kind: str, steps: int, warmup: int, decay: int, floor: float, peak: float
) -> None:
    found = rates(steps, peak, schedule(kind, warmup, decay, floor))
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in found)  # rounding may add a bit
    rising, falling = found[:warmup], found[warmup:]
    assert rising == sorted(rising)
    if falling and warmup:
        assert rising[-1] == pytest.approx(peak, rel=1e-12)
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_stands_once_in_the_optimizer_and_matrices_alone_decay(tied: bool) -> None:
    model = a_model(tie_word_embeddings=tied)
    optimizer = make_optimizer(model, SETTINGS)
    names = {id(p): name for name, p in model.named_parameters()}
    decay = [
        (names[id(p)], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert sorted(name for name, _ in decay) == sorted(names.values())
    assert {name for name, value in decay if value == 0} == {
        n for n in names.values() if "norm" in n
    }
    assert {value for _, value in decay} == {0.0, 0.1}


def test_the_optimizer_takes_its_settings_from_the_recipe() -> None:
    for group in make_optimizer(a_model(), SETTINGS).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.9, 0.95), 1e-8)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_embedding_has_a_rate_of_its_own(kind: str, tied: bool) -> None:
    part = SETTINGS.model_copy(update={"kind": kind, "embedding_rate": 3.0, "weight_decay": 0.0})
    model = a_model(tie_word_embeddings=tied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, part)
    optimizer.set_learning_rate(0.001)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if kind == "muon" and "proj" in name:
            continue
        step = 0.003 if name.endswith("embed_tokens.weight") else 0.001
        expected = before[name] - step  # AdamW's first step is the rate, whatever the gradient
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-7, rtol=0, msg=name)


def test_frozen_parameters_stay_out_of_the_optimizer() -> None:
    model = a_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    held = [p for g in make_optimizer(model, SETTINGS).param_groups for p in g["params"]]
    assert len(held) == len(list(model.parameters())) - 1
    assert all(p is not model.model.embed_tokens.weight for p in held)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("decay", [None, 0.0, 0.3])
def test_without_gradients_a_step_shrinks_matrices_and_leaves_norms(
    kind: str, decay: float | None
) -> None:
    part = SETTINGS.model_copy(update={"kind": kind, "embedding_weight_decay": decay})
    model = a_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, part)
    optimizer.set_learning_rate(0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        own = decay if decay is not None and name.endswith("embed_tokens.weight") else 0.1
        factor = 1.0 if "norm" in name else 1 - 0.5 * own
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


# ------------------------------------------------------------------------------- steps


def with_gradients(model: Transformer, seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    """Give every parameter a random gradient."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    return [p.grad for p in model.parameters() if p.grad is not None]


def by_torch(model: Transformer, settings: OptimizerPart) -> list[torch.optim.Optimizer]:
    """The optimizers that ours stands for, put together by hand."""
    named = dict(model.named_parameters())
    layers = [p for name, p in named.items() if "layers" in name and p.dim() == 2]
    others = [p for name, p in named.items() if "layers" not in name and p.dim() == 2]
    norms = [p for p in named.values() if p.dim() == 1]
    rate, decay = settings.learning_rate, settings.weight_decay
    muon = settings.kind == "muon"
    groups = [
        {"params": others if muon else [*layers, *others], "weight_decay": decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=rate, betas=settings.betas, eps=settings.eps)
    ]
    if muon:
        found.append(
            torch.optim.Muon(
                layers, lr=rate, weight_decay=decay, momentum=0.8, adjust_lr_fn="match_rms_adamw"
            )
        )
    return found


MUON = SETTINGS.model_copy(update={"kind": "muon", "momentum": 0.8})
BOTH = pytest.mark.parametrize("part", [SETTINGS, MUON], ids=["adamw", "muon"])
YES, NO = torch.tensor(1.0), torch.tensor(0.0)


def assert_same_weights(one: Transformer, other: Transformer, atol: float) -> None:
    theirs = dict(other.named_parameters())
    for name, weight in one.named_parameters():
        torch.testing.assert_close(weight, theirs[name], atol=atol, rtol=0, msg=name)


@BOTH
@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_step_is_torchs_own_after_its_own_clipping(
    part: OptimizerPart, has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for torch's Muon rounding to bf16: its updates, of some 0.01, are off by up to 2 %."""
    monkeypatch.setattr(optim, "cpu_multiplies_bf16", lambda: has_bf16)
    atol = 1e-6 if part.kind == "adamw" or has_bf16 else 8e-4
    ours, theirs = a_model(), a_model()
    start = a_model()
    optimizer, parts = make_optimizer(ours, part), by_torch(theirs, part)
    for seed, scale in enumerate((3.0, 0.001, 1.0, 0.01)):  # some are clipped, some are not
        loss_scale = torch.tensor(2.0**10)
        gradients = with_gradients(ours, seed, scale * 2.0**10)
        norm = gradient_norm(optimizer.parameters) / loss_scale
        excess = (norm / part.clip).clamp(min=1)
        optimizer.step(divisor=loss_scale * excess, finite=YES)
        assert len(gradients) == len(optimizer.parameters)
        with_gradients(theirs, seed, scale)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), part.clip)
        assert float(norm) == pytest.approx(float(expected), rel=1e-5)
        for each in parts:
            each.step()
        assert_same_weights(ours, theirs, atol=atol)
    before = dict(start.named_parameters())
    for name, weight in ours.named_parameters():
        assert (weight - before[name]).abs().max() > 0.005, f"{name} has not moved"


def state_tensors(state: object) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state.clone()]
    if isinstance(state, dict):
        return [t for value in state.values() for t in state_tensors(value)]
    return [t for value in state for t in state_tensors(value)] if isinstance(state, list) else []


@BOTH
def test_a_step_that_is_not_finite_changes_nothing(part: OptimizerPart) -> None:
    model = a_model()
    optimizer = make_optimizer(model, part)
    with_gradients(model, 0)
    optimizer.step(divisor=YES, finite=YES)
    weights = [p.detach().clone() for p in model.parameters()]
    before = state_tensors(optimizer.state_dict())
    gradients = with_gradients(model, 1)
    gradients[3].view(-1)[0] = torch.nan
    optimizer.step(divisor=torch.tensor(torch.nan), finite=NO)
    for weight, old in zip(model.parameters(), weights, strict=True):
        assert torch.equal(weight, old)
    after = state_tensors(optimizer.state_dict())
    assert len(before) == len(after) > 10
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    counts = {float(s["step"]) for s in optimizer.state_dict()["parts"][0]["state"].values()}
    assert counts == {1.0}, "AdamW has counted a step that it didn't take"
    with_gradients(model, 2)
    optimizer.step(divisor=YES, finite=YES)
    assert not torch.equal(next(model.parameters()), weights[0])


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16), (1, 5)])
def test_muons_update_has_the_singular_vectors_of_its_matrix(shape: tuple[int, int]) -> None:
    """Newton and Schulz's polynomial, taken of each singular value by itself."""
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    group = torch.optim.Muon([torch.nn.Parameter(matrix)]).param_groups[0]
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    a, b, c = group["ns_coefficients"]
    for _ in range(group["ns_steps"]):
        values = a * values + b * values**3 + c * values**5
    assert 0.6 < values.min() <= values.max() < 1.3
    update = optim.orthogonal(matrix, group)
    torch.testing.assert_close(update, u @ values.diag() @ v, atol=1e-10, rtol=0)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_muon_is_torchs_own_where_bf16_is_fast(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, orthogonal = [], optim.orthogonal
    monkeypatch.setattr(optim, "cpu_multiplies_bf16", lambda: has_bf16)
    monkeypatch.setattr(optim, "orthogonal", lambda *a: (calls.append(1), orthogonal(*a))[1])
    model = a_model()
    with_gradients(model, 0)
    make_optimizer(model, MUON).step()
    assert len(calls) == (0 if has_bf16 else 14)


def test_muon_has_the_matrices_of_the_layers_and_adamw_all_else() -> None:
    for tied in (True, False):
        model = a_model(tie_word_embeddings=tied)
        names = {id(p): name for name, p in model.named_parameters()}
        adamw, muon = make_optimizer(model, MUON)._parts
        theirs = {names[id(p)] for group in muon.param_groups for p in group["params"]}
        rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
        assert theirs == {n for n in names.values() if "layers" in n and "norm" not in n}
        assert rest == set(names.values()) - theirs
        assert "model.embed_tokens.weight" in rest
        assert ("lm_head.weight" in rest) == (not tied)


@BOTH
def test_a_learning_rate_is_set_for_all(part: OptimizerPart) -> None:
    optimizer = make_optimizer(a_model(), part)
    optimizer.set_learning_rate(0.125)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}


@BOTH
def test_a_saved_state_goes_on_exactly_with_the_new_hyper_parameters(part: OptimizerPart) -> None:
    whole, again = a_model(), a_model()
    optimizer = make_optimizer(whole, part)
    for seed in range(3):
        with_gradients(whole, seed)
        optimizer.step(YES, YES)
    again.load_state_dict(whole.state_dict())
    other = make_optimizer(again, part.model_copy(update={"weight_decay": 0.05}))
    saved = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(saved)
    decays = {group["weight_decay"] for group in other.param_groups}
    assert decays == {0.05, 0.0}
    for group in other.param_groups:
        group["weight_decay"] *= 2  # as it was
    for model, each in ((whole, optimizer), (again, other)):
        with_gradients(model, 9)
        each.step(YES, YES)
    assert_same_weights(whole, again, atol=0)


@pytest.mark.parametrize(("one", "other"), [(SETTINGS, MUON), (MUON, SETTINGS)])
def test_the_state_of_another_kind_is_refused(one: OptimizerPart, other: OptimizerPart) -> None:
    state = make_optimizer(a_model(), one).state_dict()
    with pytest.raises(ValueError, match="another kind of optimizer"):
        make_optimizer(a_model(), other).load_state_dict(state)


# ------------------------------------------------------------------------------- loss scale


def scales_of_torch(finite: list[bool], interval: int) -> list[tuple[float, int]]:
    """What torch's GradScaler makes of gradients that are finite or not."""
    scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=interval)
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight])
    found = []
    for good in finite:
        scaler.scale(torch.zeros(1))
        weight.grad = torch.tensor([1.0 if good else torch.inf])
        scaler.step(optimizer)
        scaler.update()
        state = scaler.state_dict()
        found.append((state["scale"], state["_growth_tracker"]))
    return found


def test_the_loss_scale_moves_as_torchs_does(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(4)
    finite = [rng.random() < 0.8 for _ in range(200)]
    monkeypatch.setattr(optim, "GROWTH_INTERVAL", 3)
    scale, found = LossScale(torch.device("cpu"), enabled=True), []
    for good in finite:
        scale.update(torch.tensor(float(good)))
        state = scale.state_dict()
        found.append((state["scale"], state["finite_steps"]))
    assert found == scales_of_torch(finite, 3)
    assert len({value for value, _ in found}) > 5, "it has hardly moved"


def test_the_loss_scale_doubles_after_two_thousand_good_steps_and_halves_after_a_bad_one() -> None:
    scale = LossScale(torch.device("cpu"), enabled=True)
    assert float(scale.scale) == 65_536
    for _ in range(1_999):
        scale.update(YES)
    assert float(scale.scale) == 65_536
    scale.update(YES)
    assert float(scale.scale) == 131_072
    scale.update(NO)
    assert float(scale.scale) == 65_536


def test_the_loss_scale_goes_on_from_what_was_saved() -> None:
    scale, again = (LossScale(torch.device("cpu"), enabled=True) for _ in range(2))
    for good in (NO, NO, *[YES] * 1_995):
        scale.update(good)
    saved = scale.state_dict()
    assert saved == {"scale": 16_384.0, "finite_steps": 1_995}
    again.load_state_dict(saved)
    for _ in range(5):
        scale.update(YES)
        again.update(YES)
    assert again.state_dict() == scale.state_dict() == {"scale": 32_768.0, "finite_steps": 0}


def test_where_it_is_not_needed_the_loss_scale_is_one_and_stays() -> None:
    scale = LossScale(torch.device("cpu"), enabled=False)
    for good in (NO, YES):
        scale.update(good)
    assert float(scale.scale) == 1 and scale.state_dict() == {}
    scale.load_state_dict({"scale": 4.0, "finite_steps": 3})  # of a run in fp16 that goes on here
    assert float(scale.scale) == 1
