"""Tests of the transformer, against Hugging Face's Llama and against itself by other means."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import model as model_module
from hamner.recipe import load_recipe
from model import (
    IGNORE_INDEX,
    KVCache,
    ModelConfig,
    Transformer,
    attend,
    count_labels,
    head_loss,
    packed_lengths,
)

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
TINY = load_recipe(str(RECIPES / "tiny.yaml")).model.config()
SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=48,
)
# Nothing here has Llama's default value, so that a setting which never arrives is seen.
UNUSUAL = ModelConfig(
    vocab_size=97,
    hidden_size=60,
    intermediate_size=52,
    num_hidden_layers=3,
    num_attention_heads=5,
    num_key_value_heads=1,
    max_position_embeddings=64,
    rope_theta=500.0,
    rms_norm_eps=0.03,
    tie_word_embeddings=False,
)
SHAPES = {
    "v4 with 2 layers": replace(ModelConfig(), num_hidden_layers=2),
    "tiny": TINY,
    "unusual": UNUSUAL,
}


def some_ids(config: ModelConfig, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Weights so large that attention is far from even and positions count, and norms beside 1."""
    torch.manual_seed(seed)
    model = Transformer(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=1.3 / math.sqrt(parameter.shape[1]))
    return model


def llama_with_weights_of(model: Transformer) -> LlamaForCausalLM:
    """Hugging Face's Llama in the same shape, with the model's own tensors by name."""
    settings = asdict(model.config)
    theta = settings.pop("rope_theta")
    with torch.device("meta"):
        shell = LlamaForCausalLM(
            LlamaConfig(**settings, rope_parameters={"rope_type": "default", "rope_theta": theta})
        )
    assert dict(shell.named_parameters()).keys() == dict(model.named_parameters()).keys()
    llama = LlamaForCausalLM(shell.config).eval()
    report = llama.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert not report.missing_keys and not report.unexpected_keys
    return llama


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run fastest on one thread, above all where other programs run too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Pair:
    model: Transformer
    llama: LlamaForCausalLM

    @property
    def config(self) -> ModelConfig:
        return self.model.config


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def pair(request: pytest.FixtureRequest) -> Pair:
    model = random_model(request.param).requires_grad_(False)
    return Pair(model, llama_with_weights_of(model).requires_grad_(False))


@pytest.fixture
def small() -> Transformer:
    return random_model(SMALL)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def gradients(model: Transformer, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == dict(model.named_parameters()).keys()
    return found


def loss_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each later call of the head's loss gets, as the calls come."""
    rows: list[int] = []

    def counting(hidden: Tensor, *rest: Any) -> Tensor:
        rows.append(len(hidden))
        return head_loss(hidden, *rest)

    monkeypatch.setattr(model_module, "head_loss", counting)
    return rows


# Size


def real_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def test_the_default_model_has_the_163_609_344_parameters_of_v4() -> None:
    assert load_recipe(str(RECIPES / "v4.yaml")).model.config() == ModelConfig()
    assert real_parameters(ModelConfig()) == 163_609_344
    assert ModelConfig().num_parameters() == 163_609_344


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [ModelConfig(), TINY, UNUSUAL], ids=["v4", "tiny", "unusual"])
def test_the_parameter_count_is_that_of_the_real_model(config: ModelConfig, tied: bool) -> None:
    config = replace(config, tie_word_embeddings=tied)
    assert config.num_parameters() == real_parameters(config)
    other = replace(config, tie_word_embeddings=not tied)
    difference = config.vocab_size * config.hidden_size
    assert abs(config.num_parameters() - other.num_parameters()) == difference


def test_flops_count_six_per_matrix_weight_and_the_attention() -> None:
    with torch.device("meta"):
        model = Transformer(UNUSUAL)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2)
    matrices -= model.model.embed_tokens.weight.numel()  # looked up, not multiplied
    assert UNUSUAL.matmul_parameters() == matrices
    assert UNUSUAL.flops_per_token(10) == 6 * matrices + 12 * 3 * 60 * 10


# Hugging Face's Llama as the reference


def test_logits_and_loss_equal_llama(pair: Pair) -> None:
    ids = some_ids(pair.config, 2, 40)
    expected = pair.llama(ids, labels=ids)
    assert expected.logits.std() > 0.1
    close(pair.model(ids).logits, expected.logits)
    close(pair.model(ids, labels=ids).loss, expected.loss)


def test_loss_equals_llama_where_some_labels_are_ignored(pair: Pair) -> None:
    ids = some_ids(pair.config, 2, 40)
    labels = ids.clone()
    labels[0, :25] = IGNORE_INDEX
    labels[1, 3::2] = IGNORE_INDEX
    close(pair.model(ids, labels=labels).loss, pair.llama(ids, labels=labels).loss)


def test_only_the_last_positions_get_logits_on_request(pair: Pair) -> None:
    ids = some_ids(pair.config, 2, 9)
    kept = pair.model(ids, logits_to_keep=2).logits
    close(kept, pair.llama(ids).logits[:, -2:])


# Cache


def test_decoding_one_by_one_after_a_prefill_equals_no_cache_and_llama(pair: Pair) -> None:
    ids = some_ids(pair.config, 2, 20)
    cache = KVCache(pair.config, batch_size=2, max_length=20)
    pieces = [pair.model(ids[:, :7], cache=cache).logits]
    for t in range(7, 20):
        pieces.append(pair.model(ids[:, t : t + 1], cache=cache).logits)
        assert cache.length == t + 1
    cached = torch.cat(pieces, dim=1)
    close(cached, pair.model(ids).logits)
    close(cached, pair.llama(ids).logits)


def test_a_prefill_in_chunks_equals_no_cache_and_llama(pair: Pair) -> None:
    ids = some_ids(pair.config, 2, 20)
    cache = KVCache(pair.config, batch_size=2)
    chunks = [pair.model(chunk, cache=cache).logits for chunk in (ids[:, :6], ids[:, 6:])]
    close(torch.cat(chunks, dim=1), pair.model(ids).logits)
    close(torch.cat(chunks, dim=1), pair.llama(ids).logits)


def test_a_cache_cut_back_continues_as_if_the_rest_had_never_been(pair: Pair) -> None:
    first, second = some_ids(pair.config, 1, 18, seed=1), some_ids(pair.config, 1, 18, seed=2)
    cache = KVCache(pair.config)
    pair.model(first, cache=cache)
    cache.length = 5
    joined = torch.cat([first[:, :5], second[:, 5:]], dim=1)
    expected = pair.llama(joined).logits
    close(pair.model(joined[:, 5:9], cache=cache).logits, expected[:, 5:9])
    for t in range(9, 18):
        close(pair.model(joined[:, t : t + 1], cache=cache).logits, expected[:, t : t + 1])


def test_grouped_and_repeated_heads_attend_alike() -> None:
    """On a GPU the grouped kernel runs, on a CPU each key/value head is repeated."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    close(attend(q, k, v, mask=None, causal=True), expected, 1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_single_token_attends_as_with_repeated_heads(batch: int, masked: bool) -> None:
    torch.manual_seed(0)
    q = torch.randn(batch, 1, 12, 8).transpose(1, 2)  # as a projection gives it
    k, v = torch.randn(2, batch, 4, 30, 8)[..., :25, :].unbind()
    mask = torch.rand(batch, 1, 1, 25) > 0.3 if masked else None
    repeated = [x.repeat_interleave(3, dim=1) for x in (k, v)]
    expected = F.scaled_dot_product_attention(q, *repeated, attn_mask=mask)
    close(attend(q, k, v, mask, causal=False), expected, 1e-6)


# Packing

LENGTHS = (9, 1, 14, 6)  # of the packed sequences; then comes padding
PADDING = 5


@dataclass
class Packed:
    ids: Tensor  # (1, T)
    labels: Tensor  # (1, T), some of them ignored
    sequence_ids: Tensor  # (1, T), -1 for padding
    parts: list[slice]  # where each sequence lies


def packed_row() -> Packed:
    total = sum(LENGTHS) + PADDING
    ids = some_ids(SMALL, 1, total, seed=3)
    labels = ids.clone()
    labels[0, 3:6] = IGNORE_INDEX
    labels[0, -PADDING:] = IGNORE_INDEX
    sequence_ids = torch.full((1, total), -1)
    parts, begin = [], 0
    for number, length in enumerate(LENGTHS):
        parts.append(slice(begin, begin + length))
        sequence_ids[0, begin : begin + length] = number
        begin += length
    return Packed(ids, labels, sequence_ids, parts)


def packed_loss(model: Transformer, row: Packed, reduction: str) -> Tensor:
    output = model(row.ids, row.labels, sequence_ids=row.sequence_ids, reduction=reduction)
    return output.loss


def losses_alone(model: Transformer, row: Packed) -> list[Tensor]:
    """The loss of every token of each sequence, each in a call of its own."""
    return [
        model(row.ids[:, part], row.labels[:, part], reduction="none").loss[0] for part in row.parts
    ]


def test_packed_sequences_have_the_losses_that_they_have_alone(small: Transformer) -> None:
    row = packed_row()
    packed = packed_loss(small, row, "none")[0]
    alone = losses_alone(small, row)
    for part, expected in zip(row.parts, alone, strict=True):
        close(packed[part], expected, 1e-5)
    assert (packed[-PADDING:] == 0).all()
    everything = torch.cat(alone)
    close(packed_loss(small, row, "sum"), everything.sum(), 1e-4)
    close(packed_loss(small, row, "mean"), everything.sum() / (everything != 0).sum(), 1e-5)


def test_packed_sequences_have_the_gradients_that_they_have_alone(small: Transformer) -> None:
    row = packed_row()
    packed = gradients(small, lambda: packed_loss(small, row, "sum"))
    alone = gradients(small, lambda: torch.cat(losses_alone(small, row)).sum())
    for name, expected in alone.items():
        close(packed[name], expected, 1e-5 * float(1 + expected.abs().max()))


def test_sequences_apart_and_by_a_mask_are_the_same(small: Transformer) -> None:
    ids, sequence_ids = some_ids(SMALL, 3, 20), torch.zeros(3, 20, dtype=torch.long)
    sequence_ids[0, 7:], sequence_ids[0, 19:], sequence_ids[2, 12:] = 1, -1, 5
    assert packed_lengths(sequence_ids) == [7, 12, 1, 20, 12, 8]

    def loss() -> Tensor:
        return small(ids, ids, sequence_ids=sequence_ids, reduction="none").loss

    apart, apart_gradients = loss(), gradients(small, lambda: loss().sum())
    small.model.compiled = True
    close(apart, loss(), 1e-5)
    for name, expected in gradients(small, lambda: loss().sum()).items():
        close(apart_gradients[name], expected, 1e-5 * float(1 + expected.abs().max()))


def test_no_loss_is_taken_across_a_border_between_sequences(small: Transformer) -> None:
    row = packed_row()
    row.labels = row.ids  # every token asks for a loss; a sequence's first one can't have it
    losses = packed_loss(small, row, "none")[0]
    firsts = [part.start for part in row.parts] + [sum(LENGTHS)]
    assert (losses == 0).nonzero().flatten().tolist() == firsts


@pytest.mark.parametrize("changed", [0, 1, 2, 3])
def test_a_token_leaves_other_packed_sequences_bit_identical(
    small: Transformer, changed: int
) -> None:
    row = packed_row()
    before = packed_loss(small, row, "none")[0]
    own = row.parts[changed]
    ids = row.ids.clone()
    ids[0, own.start] = (ids[0, own.start] + 1) % SMALL.vocab_size
    after = packed_loss(small, replace(row, ids=ids), "none")[0]
    for part in row.parts:
        if part != own:
            assert torch.equal(after[part], before[part])
    if own.stop - own.start > 1:
        assert not torch.equal(after[own], before[own])


# Causality and labels


@pytest.mark.parametrize("cached", [False, True])
def test_a_logit_depends_on_no_later_position(small: Transformer, cached: bool) -> None:
    embedded: list[Tensor] = []
    small.model.embed_tokens.register_forward_hook(lambda *call: embedded.append(call[2]))
    ids = some_ids(SMALL, 1, 12)
    for t in (0, 5, 11):
        cache = KVCache(SMALL) if cached else None
        logits = small(ids, cache=cache).logits
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), embedded[-1])
        sizes = gradient[0].abs().amax(-1)
        assert (sizes[t + 1 :] == 0).all()
        assert (sizes[: t + 1] > 0).all()


def test_each_loss_stands_where_its_label_stands(small: Transformer) -> None:
    ids = some_ids(SMALL, 2, 15)
    losses = small(ids, labels=ids, reduction="none").loss
    log_p = small(ids).logits.log_softmax(-1)
    expected = -log_p[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    close(losses[:, 1:], expected, 1e-5)
    assert (losses[:, 0] == 0).all()


def test_ignored_labels_cost_no_logits(small: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = some_ids(SMALL, 3, 20)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, 0] = ids[0, 0]  # nothing stands before it, so there is nothing to predict it from
    labels[0, 4:8] = ids[0, 4:8]
    labels[2, -1] = ids[2, -1]
    rows = loss_rows(monkeypatch)
    losses = small(ids, labels=labels, reduction="none").loss
    assert rows == [5] and int((losses != 0).sum()) == 5


def test_labels_may_be_the_very_tensor_of_the_inputs(small: Transformer) -> None:
    ids = some_ids(SMALL, 2, 20)
    for reduction in ("mean", "sum", "none"):
        same = small(ids, labels=ids, reduction=reduction).loss
        assert torch.equal(same, small(ids, labels=ids.clone(), reduction=reduction).loss)


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.fixture(params=["torch's own", "ours"])
def either_head(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunked loss of torch 2.13, and the one that stands in for it where there is none."""
    if request.param == "ours":
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    elif not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")


@pytest.mark.usefixtures("either_head")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_in_parts_is_the_same_loss(monkeypatch: pytest.MonkeyPatch, reduction: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, requires_grad=True)
    weight = torch.randn(61, 16, requires_grad=True)
    targets, upstream = torch.randint(61, (50,)), torch.rand(50 if reduction == "none" else ())
    whole = F.cross_entropy(hidden @ weight.T, targets, reduction=reduction)
    expected = torch.autograd.grad((whole * upstream).sum(), (hidden, weight))
    monkeypatch.setattr(model_module, "MAX_LOGITS", 7 * 61 + 1)
    with LargestTensor() as largest:
        loss = head_loss(hidden, weight, targets, reduction)
        actual = torch.autograd.grad((loss * upstream).sum(), (hidden, weight))
    close(loss, whole, 1e-4)
    for theirs, ours in zip(expected, actual, strict=True):
        close(ours, theirs, 1e-5)
    assert largest.elements == 61 * 16  # the weight and its gradient; 50 x 61 logits never were


@pytest.mark.usefixtures("either_head")
def test_without_any_label_the_loss_is_a_zero_with_gradients(small: Transformer) -> None:
    ids = some_ids(SMALL, 2, 20)
    gradient = gradients(
        small, lambda: small(ids, torch.full_like(ids, -100), reduction="sum").loss
    )
    assert all(not g.any() for g in gradient.values()) and len(gradient) > 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_sixteen_bits_hold_the_loss_of_a_large_batch(dtype: torch.dtype, reduction: str) -> None:
    """A sum over 20,000 tokens is beyond fp16's 65,504, and bf16 would round it to 1 in 256."""
    torch.manual_seed(0)
    hidden = torch.randn(20_000, 16, requires_grad=True)
    weight = torch.randn(97, 16, requires_grad=True)
    targets = torch.randint(97, (20_000,))
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    theirs = torch.autograd.grad(expected / 20_000, (hidden, weight))
    with torch.autocast("cpu", dtype):
        loss = head_loss(hidden, weight, targets, reduction).sum()
    ours = torch.autograd.grad(loss / 20_000, (hidden, weight))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32 and float((a - b).norm() / b.norm()) < 0.01


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_count_of_labels_given_beforehand_changes_nothing(
    small: Transformer, reduction: str
) -> None:
    ids = some_ids(SMALL, 3, 30)
    sequence_ids = torch.arange(30).div(8, rounding_mode="floor").expand(3, 30)
    labels = ids.masked_fill(torch.rand(3, 30) < 0.4, IGNORE_INDEX)
    count = count_labels(labels, sequence_ids)
    assert 0 < count < labels[:, 1:].ne(IGNORE_INDEX).sum()
    asked = small(ids, labels, sequence_ids=sequence_ids, reduction=reduction).loss
    told = small(ids, labels, sequence_ids=sequence_ids, reduction=reduction, num_labels=count).loss
    assert torch.equal(asked, told)


# The label shift. On the cycle 0, 1, 2, ..., CYCLE - 1, 0, ... the next token is one more than
# this one and the next but one is two more: which of them a model learns tells how often the
# labels were shifted on their way to the loss.

CYCLE = 11


def steps_ahead(take_batch: Callable[[Tensor], tuple[Tensor, Tensor]]) -> set[int]:
    """Train on the cycle; by how many steps the greedy prediction is ahead of its token."""
    torch.manual_seed(0)
    model = Transformer(replace(SMALL, vocab_size=CYCLE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    starts = torch.arange(CYCLE)[:, None]
    ids = (starts + torch.arange(16)) % CYCLE  # (CYCLE, 16)
    for _ in range(60):
        inputs, labels = take_batch(ids)
        loss = model(inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    with torch.no_grad():
        predicted = model(ids).logits.argmax(-1)
    return set(((predicted - ids) % CYCLE).flatten().tolist())


def test_trained_with_its_inputs_as_labels_the_model_predicts_the_next_token() -> None:
    assert steps_ahead(lambda ids: (ids, ids)) == {1}
    assert steps_ahead(lambda ids: (ids, ids.clone())) == {1}


def test_labels_shifted_once_more_by_hand_would_teach_the_next_but_one_token() -> None:
    assert steps_ahead(lambda ids: (ids[:, :-1], ids[:, 1:])) == {2}


# Initialisation


@pytest.mark.parametrize("config", [SHAPES["v4 with 2 layers"], TINY], ids=["v4", "tiny"])
def test_a_fresh_model_is_as_good_as_guessing(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = Transformer(config)
    ids = some_ids(config, 2, 100)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert loss == pytest.approx(math.log(config.vocab_size), abs=0.5)


def test_weights_start_at_002_and_residual_projections_smaller() -> None:
    torch.manual_seed(0)
    layers = 8
    config = replace(TINY, num_hidden_layers=layers, tie_word_embeddings=False)
    names = []
    for name, parameter in Transformer(config).named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
            continue
        residual = ".o_proj." in name or ".down_proj." in name
        expected = 0.02 / math.sqrt(2 * layers) if residual else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.04), name
        assert abs(parameter.mean().item()) < 0.05 * expected, name
        names += [name] * residual
    assert len(names) == 2 * layers


def test_tied_embeddings_are_one_tensor() -> None:
    tied = Transformer(SMALL)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = Transformer(replace(SMALL, tie_word_embeddings=False))
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)


# Bad arguments


def test_too_many_positions_are_refused(small: Transformer) -> None:
    small(some_ids(SMALL, 1, 48))
    with pytest.raises(ValueError, match="49 positions, but there is room for 48"):
        small(some_ids(SMALL, 1, 49))


def test_a_cache_that_would_overflow_is_refused_and_stays_usable(small: Transformer) -> None:
    cache = KVCache(SMALL, max_length=10)
    ids = some_ids(SMALL, 1, 10)
    small(ids[:, :8], cache=cache)
    with pytest.raises(ValueError, match="11 positions, but there is room for 10"):
        small(ids[:, :3], cache=cache)
    assert cache.length == 8
    close(small(ids[:, 8:], cache=cache).logits, small(ids).logits[:, 8:])


def test_a_cache_longer_than_the_context_does_not_lengthen_the_context(small: Transformer) -> None:
    cache = KVCache(SMALL, max_length=100)
    small(some_ids(SMALL, 1, 48), cache=cache)
    with pytest.raises(ValueError, match="49 positions, but there is room for 48"):
        small(some_ids(SMALL, 1, 1), cache=cache)


def test_sequence_ids_together_with_a_cache_are_refused(small: Transformer) -> None:
    ids = some_ids(SMALL, 1, 4)
    with pytest.raises(ValueError, match=r"cache .* sequence_ids"):
        small(ids, sequence_ids=torch.zeros_like(ids), cache=KVCache(SMALL))


def test_an_unknown_reduction_is_refused(small: Transformer) -> None:
    ids = some_ids(SMALL, 1, 4)
    with pytest.raises(ValueError, match="mean, sum or none, got 'average'"):
        small(ids, labels=ids, reduction="average")


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, r"hidden_size \(30\) .* \(4\)"),
        ({"hidden_size": 12, "num_attention_heads": 4}, r"hidden_size \(12\) .* even .* \(4\)"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) .* num_key_value_heads \(3\)"),
    ],
)
def test_heads_that_do_not_divide_are_refused(sizes: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(SMALL, **sizes)
