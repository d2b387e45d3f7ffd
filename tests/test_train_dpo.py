"""Stage 5: the loss against TRL's, the pairs that are used, and the reference that is kept."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Workshop, some_text, write_lines

import train_dpo
from hamner import checkpoints, tokenization, training
from hamner.batches import Batch, on_device, pack
from hamner.errors import UserError, run
from hamner.machine import Machine
from hamner.recipe import Recipe, check_recipe, read_yaml
from hamner.stage import Start
from hamner.tokenization import Tokenizer
from model import IGNORE_INDEX, Output, Transformer
from train_dpo import (
    Pair,
    dpo_loss,
    good_rows,
    last_answer,
    make_pair,
    pair_batch,
    read_pairs,
    reference_log_probabilities,
)

torch.set_num_threads(1)  # more would wait for each other where cores are shared
Turns = list[dict[str, str]]
Call = Callable[..., int]


ROOM = 160  # tokens


@pytest.fixture
def raw(raw: dict[str, Any]) -> dict[str, Any]:
    """The shared recipe with longer sequences, so that answers can vary in length."""
    raw["model"]["max_position_embeddings"] = ROOM
    raw["dpo"]["sequence_length"] = ROOM
    raw["dpo"] |= {"loss": "sigmoid", "label_smoothing": 0.0, "sft_weight": 0.0}
    return raw


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = random.Random(3)
    return tokenization.train([some_text(rng, 40) for _ in range(50)], 320)


def turns(*contents: str) -> Turns:
    """User and assistant by turns."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def varied_pairs(count: int, seed: int = 0) -> list[dict[str, Turns]]:
    """Preference rows with answers of 1 to 15 words, to prompts of one to three turns."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        words = [rng.randint(1, 6) for _ in range(rng.choice((1, 1, 3)))]
        prompt = turns(f"{number} {some_text(rng, 2)}", *(some_text(rng, n) for n in words[1:]))
        answers = [some_text(rng, rng.randint(1, 15)) for _ in range(2)]
        chosen, rejected = ([*prompt, {"role": "assistant", "content": a}] for a in answers)
        rows.append({"chosen": chosen, "rejected": rejected})
    return rows


def usable(rows: list[dict[str, Turns]], tokenizer: Tokenizer) -> list[Pair]:
    pairs = [make_pair(row, tokenizer, ROOM) for row in rows]
    assert all(isinstance(pair, Pair) for pair in pairs)
    return [pair for pair in pairs if isinstance(pair, Pair)]


def new_model(recipe: Recipe, seed: int) -> Transformer:
    """A model whose weights are large enough for its answers to differ in likelihood."""
    torch.manual_seed(seed)
    model = Transformer(recipe.model.config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def perturbed(model: Transformer, seed: int) -> Transformer:
    torch.manual_seed(seed)
    other = Transformer(model.config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    return other


def start_from(model: Transformer, recipe: Recipe, tokenizer: Tokenizer) -> Start:
    return Start("dpo", recipe, "micro", Machine(torch.device("cpu")), model, tokenizer, None, None)


# ------------------------------------------------------------------------------ against TRL


def as_llama(model: Transformer) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = model.config
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads max_position_embeddings rms_norm_eps tie_word_embeddings"
    ).split()
    config = LlamaConfig(
        **{name: getattr(ours, name) for name in names},
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        attention_bias=False,
    )
    llama = LlamaForCausalLM(config)
    llama.load_state_dict(model.state_dict())
    return llama


def trl_trainer(
    policy: Any, reference: Any, tokenizer: Tokenizer, out: Path, **options: Any
) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    fast = PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(tokenizer.to_json()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    settings = DPOConfig(
        output_dir=str(out), use_cpu=True, bf16=False, report_to="none", max_length=None, **options
    )
    unused = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    return DPOTrainer(policy, reference, settings, train_dataset=unused, processing_class=fast)


def trl_row(pair: Pair) -> dict[str, list[int]]:
    """A pair's ids as TRL's collator takes them: the prompt, and the answers that carry loss."""

    def split(ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        begin = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        answer = [label for label in labels if label != IGNORE_INDEX]
        assert ids[begin : begin + len(answer)] == answer
        return ids[:begin], answer

    prompt, chosen = split(pair.chosen.input_ids.tolist(), pair.chosen.labels.tolist())
    same, rejected = split(pair.rejected.input_ids.tolist(), pair.rejected.labels.tolist())
    assert prompt == same
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


# Fields of our recipe, and what they are called in TRL. Its own sigmoid loss knows no smoothing,
# but AOT's is the smoothed one where a batch is a single pair, so that there is nothing to sort.
LOSSES = {
    "sigmoid": ({}, {}, 11),
    "beta": ({"beta": 0.7}, {"beta": 0.7}, 11),
    "smoothed": ({"label_smoothing": 0.2}, {"loss_type": ["aot"], "label_smoothing": 0.2}, 1),
    "ipo": ({"loss": "ipo"}, {"loss_type": ["ipo"]}, 11),
    "ipo, beta": ({"loss": "ipo", "beta": 0.7}, {"loss_type": ["ipo"], "beta": 0.7}, 11),
    "with sft": (
        {"sft_weight": 0.3},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
        11,
    ),
    "ipo with sft": (
        {"loss": "ipo", "sft_weight": 2.0},
        {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 2.0]},
        11,
    ),
}
THEIR_NAMES = {
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "chosen_logp": "logps/chosen",
    "rejected_logp": "logps/rejected",
}


def our_step(model: Transformer, batch: Batch, recipe: Recipe) -> tuple[float, dict[str, float]]:
    """Loss and metrics of a step, as the loop sums them up; leaves the gradients."""
    loss, means = 0.0, dict.fromkeys(train_dpo.METRICS, 0.0)
    for micro in batch.micro_batches:
        part, metrics = dpo_loss(model, micro, recipe.dpo)
        (part / batch.weight).backward()
        loss += float(part.detach()) / batch.weight
        for name, value in metrics.items():
            means[name] = means.get(name, 0.0) + float(value.detach()) / batch.weight
    return loss, means


def their_step(trainer: Any, pairs: list[Pair], together: int) -> tuple[float, dict[str, float]]:
    """The same by TRL, over batches of equal size."""
    trainer.model.zero_grad()
    parts = [pairs[i : i + together] for i in range(0, len(pairs), together)]
    loss = 0.0
    for part in parts:
        batch = trainer.data_collator([trl_row(pair) for pair in part])
        part_loss = trainer.compute_loss(trainer.model, batch) / len(parts)
        part_loss.backward()
        loss += float(part_loss.detach())
    logged = trainer._metrics["train"]
    return loss, {name: sum(values) / len(values) for name, values in logged.items()}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_loss_rewards_margins_accuracy_and_gradients_are_those_of_trl(
    name: str,
    raw: dict[str, Any],
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("trl")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ours, theirs, together = LOSSES[name]
    raw["dpo"].update(ours)
    recipe = check_recipe(raw, "test")
    pairs = usable(varied_pairs(11), tokenizer)
    assert len({len(e) for pair in pairs for e in (pair.chosen, pair.rejected)}) > 8
    policy = new_model(recipe, 1)
    reference = perturbed(policy, 2)
    logps = reference_log_probabilities(start_from(reference, recipe, tokenizer), pairs, "train")
    batch = pair_batch(pairs, range(11), logps, recipe.dpo)
    assert len(batch.micro_batches) == 3  # of 4, 4 and 3 pairs
    assert all(len(micro["input_ids"]) > 1 for micro in batch.micro_batches), "one row only"
    assert any(int(micro["sequence_ids"].max()) > 0 for micro in batch.micro_batches), "not packed"
    loss, means = our_step(policy, batch, recipe)

    llama = as_llama(policy)
    trainer = trl_trainer(llama, as_llama(reference), tokenizer, tmp_path / "trl", **theirs)
    their_loss, logged = their_step(trainer, pairs, together)

    assert loss == pytest.approx(their_loss, abs=1e-5)
    for key, their_name in THEIR_NAMES.items():
        assert means[key] == pytest.approx(logged[their_name], abs=1e-5, rel=1e-6), key
    assert 0 < means["accuracy"] < 1 and abs(means["margin"]) > 0.01, "the models hardly differ"
    gradients = dict(llama.named_parameters())
    for key, parameter in policy.named_parameters():
        assert parameter.grad is not None and gradients[key].grad is not None
        torch.testing.assert_close(parameter.grad, gradients[key].grad, atol=1e-5, rtol=1e-5)
        assert parameter.grad.abs().max() > 1e-3, f"{key}: too small to compare"


def test_the_sft_loss_is_the_mean_over_all_chosen_tokens_of_a_step(
    raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    raw["dpo"]["sft_weight"] = 0.5
    recipe = check_recipe(raw, "test")
    pairs = usable(varied_pairs(7), tokenizer)
    policy = new_model(recipe, 1)
    _, means = our_step(policy, pair_batch(pairs, range(7), torch.zeros(2, 7), recipe.dpo), recipe)
    total, tokens = 0.0, 0
    for pair in pairs:
        ids = torch.from_numpy(pair.chosen.input_ids).long()[None]
        labels = torch.from_numpy(pair.chosen.labels).long()[None]
        total += float(policy(ids, labels, reduction="sum").loss.detach())
        tokens += int((labels >= 0).sum())
    assert means["sft_loss"] == pytest.approx(total / tokens, rel=1e-5)
    raw["dpo"]["sft_weight"] = 0.0
    batch = pair_batch(pairs, range(7), torch.zeros(2, 7), recipe.dpo)
    assert "sft_loss" not in our_step(policy, batch, check_recipe(raw, "test"))[1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing goes with loss: sigmoid"),
        ({"label_smoothing": 0.5}, "dpo.label_smoothing"),
        ({"label_smoothing": -0.1}, "dpo.label_smoothing"),
        ({"sft_weight": -1}, "dpo.sft_weight"),
        ({"loss": "hinge"}, "dpo.loss"),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused(
    changes: dict[str, Any], told: str, raw: dict[str, Any]
) -> None:
    raw["dpo"].update(changes)
    with pytest.raises(UserError, match=told):
        check_recipe(raw, "test")


@pytest.mark.parametrize("name", ["v4", "small", "tiny"])
def test_the_losses_stand_in_every_recipe_and_have_no_defaults(name: str) -> None:
    path = ROOT / "recipes" / f"{name}.yaml"
    settings = check_recipe(read_yaml(path), name).dpo
    assert (settings.loss, settings.label_smoothing, settings.sft_weight) == ("sigmoid", 0, 0)
    for field in ("loss", "label_smoothing", "sft_weight"):
        plain = read_yaml(path)
        del plain["dpo"][field]
        with pytest.raises(UserError, match=rf"dpo\.{field}: is missing"):
            check_recipe(plain, name)


class StandIn(torch.nn.Module):
    """In the model's place: losses without an answer to how many positions carry a label."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> Output:
        return Output(loss=torch.zeros(labels.shape, device=labels.device))


@pytest.mark.parametrize("changes", [{}, {"loss": "ipo", "sft_weight": 1.0}])
def test_the_loss_asks_the_device_for_no_number(
    changes: dict[str, Any], raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    raw["dpo"].update(changes)
    settings = check_recipe(raw, "test").dpo
    pairs = usable(varied_pairs(3), tokenizer)
    batch = pair_batch(pairs, range(3), torch.zeros(2, 3), settings).micro_batches[0]
    nowhere = on_device(batch, torch.device("meta"))  # has shapes, not values
    loss, sums = dpo_loss(StandIn(), nowhere, settings)
    assert loss.device.type == "meta" and all(s.device.type == "meta" for s in sums.values())


# ------------------------------------------------------------------------------ rows


def places(rows: list[list[int]], lengths: list[int]) -> int:
    return len(rows) * max(sum(lengths[i] for i in row) for row in rows)


def test_rows_hold_every_item_once_and_waste_little() -> None:
    rng = random.Random(2)
    wasted, wasted_by_full_rows = 0, 0
    for _ in range(200):
        lengths = [rng.randint(20, rng.choice((100, 300, 1024))) for _ in range(rng.choice((2, 8)))]
        rows = good_rows(lengths, 1024)
        assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
        longest = max(sum(lengths[i] for i in row) for row in rows)
        assert max(lengths) <= longest <= 1024
        wasted += len(rows) * longest - sum(lengths)
        wasted_by_full_rows += len(pack(lengths, 1024)) * 1024 - sum(lengths)
    assert wasted < 0.5 * wasted_by_full_rows


def test_rows_are_long_only_where_that_saves_places() -> None:
    assert sorted(map(sorted, good_rows([500] * 4, 1024))) == [[0], [1], [2], [3]]
    assert len(good_rows([500, 490, 500, 490], 1024)) == 4  # two rows would save 20 places
    assert len(good_rows([600, 200, 200, 200], 1024)) == 2


def test_rows_hold_an_item_of_exactly_their_length() -> None:
    assert good_rows([64], 64) == [[0]]
    assert sorted(good_rows([64, 30, 34], 64)) == [[0], [2, 1]]
    with pytest.raises(ValueError, match="length 65"):
        good_rows([3, 65], 64)


@pytest.mark.parametrize("changes", [{}, {"loss": "ipo", "sft_weight": 0.5}])
def test_the_length_of_rows_changes_no_loss(
    changes: dict[str, Any],
    raw: dict[str, Any],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw["dpo"].update(changes)
    recipe = check_recipe(raw, "test")
    pairs, logps = usable(varied_pairs(9), tokenizer), torch.randn(2, 9) - 20
    policy = new_model(recipe, 1)
    short = pair_batch(pairs, range(9), logps, recipe.dpo)
    loss, means = our_step(policy, short, recipe)
    monkeypatch.setattr(train_dpo, "good_rows", lambda lengths, row: pack(lengths, row))
    full = pair_batch(pairs, range(9), logps, recipe.dpo)
    assert [m["input_ids"].shape for m in short.micro_batches] != [
        m["input_ids"].shape for m in full.micro_batches
    ]
    full_loss, full_means = our_step(policy, full, recipe)
    assert loss == pytest.approx(full_loss, abs=1e-5)
    assert means == pytest.approx(full_means, abs=1e-4)


def test_packing_changes_no_reward(raw: dict[str, Any], tokenizer: Tokenizer) -> None:
    recipe = check_recipe(raw, "test")
    pairs = usable(varied_pairs(6), tokenizer)
    policy = new_model(recipe, 1)
    none = torch.zeros(2, 6)
    packed = train_dpo.pair_log_probabilities(policy, train_dpo.pair_tensors(pairs, none, ROOM))
    for number, pair in enumerate(pairs):
        for side, example in enumerate((pair.chosen, pair.rejected)):
            ids = torch.from_numpy(example.input_ids).long()
            log_p = policy(ids[None]).logits[0].log_softmax(-1).detach()
            alone = sum(
                float(log_p[t - 1, ids[t]]) for t in range(1, len(ids)) if example.labels[t] >= 0
            )
            assert float(packed[side, number].detach()) == pytest.approx(alone, abs=1e-3, rel=1e-5)


# ------------------------------------------------------------------------------ pairs


def test_labels_cover_the_last_assistant_turn_and_nothing_else(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        *turns("the dog", "a first answer", "and the cat", "the last answer"),
    ]
    example = last_answer(tokenizer, messages)
    ids, labels = example.input_ids.tolist(), example.labels.tolist()
    assert ids == tokenizer.chat(messages)[0]
    wanted = [*tokenizer.encode("the last answer"), tokenizer.im_end]
    assert [label for label in labels if label != IGNORE_INDEX] == wanted
    newline = len(tokenizer.encode("\n"))
    assert labels[-newline - len(wanted) : -newline] == wanted
    assert labels[-newline:] == [IGNORE_INDEX] * newline


def write_pairs(raw: dict[str, Any], train: list[Any], validation: list[Any] | None = None) -> None:
    folder = Path(raw["data_dir"])
    write_lines(folder / "pairs.jsonl", train)
    if validation is not None:
        write_lines(folder / "held.jsonl", validation)
        raw["sources"]["held"] = {**raw["sources"]["pairs"], "paths": ["held.jsonl"]}
        raw["dpo"]["validation"] = "held"


def test_unusable_pairs_are_left_out_and_counted_by_reason(
    raw: dict[str, Any], tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    good = varied_pairs(4)
    long = some_text(random.Random(1), 150)
    bad = [
        {"chosen": turns("q", "a", "q2"), "rejected": turns("q", "a", "q2")},
        {"chosen": turns("q", "a"), "rejected": turns("q", "a", "q2")},
        {"chosen": turns("one question", "a"), "rejected": turns("another question", "b")},
        {"chosen": turns("q", "the same"), "rejected": turns("q", " the same\n")},
        {"chosen": turns("q", "the same"), "rejected": turns("q", "the same")},
        {"chosen": turns("q", "the same "), "rejected": turns("q", "the same")},
        {"chosen": turns("q", long), "rejected": turns("q", "short")},
    ]
    write_pairs(raw, [bad[0], good[0], *bad[1:4], good[1], *bad[4:], *good[2:]], good)
    pairs = read_pairs(check_recipe(raw, "test"), tokenizer, "train", 100)
    assert capsys.readouterr().out == (
        "train: 4 preference pairs; 2 left out: not ending with an answer; 1 left out: answers to "
        "different prompts; 3 left out: the same answer twice; 1 left out: longer than 160 tokens\n"
    )
    kept = [tokenizer.decode(pair.rejected.input_ids.tolist()) for pair in pairs]
    assert kept == [tokenizer.decode(tokenizer.chat(row["rejected"])[0]) for row in good]


def test_no_more_pairs_are_read_than_asked_for(raw: dict[str, Any], tokenizer: Tokenizer) -> None:
    write_pairs(raw, varied_pairs(20), varied_pairs(3, seed=1))
    recipe = check_recipe(raw, "test")
    assert len(read_pairs(recipe, tokenizer, "train", 7)) == 7
    assert len(read_pairs(recipe, tokenizer, "validation", 7)) == 3


def odd_rows() -> list[dict[str, Turns]]:
    """Rows with the same texts in several roles, empty ones, white space and odd characters."""
    texts = ["a", " a", "", "  ", "\n", "1+1=2 <|im_end|>", "\ud83d alone", "zażółć 🙂", "user"]
    rng = random.Random(6)
    rows = []
    for _ in range(60):
        prompt = turns(*(rng.choice(texts) for _ in range(rng.choice((1, 3)))))
        answers = [turns("", rng.choice(texts))[1:] for _ in range(2)]
        rows.append({"chosen": [*prompt, *answers[0]], "rejected": [*prompt, *answers[1]]})
    return rows


@pytest.mark.parametrize("together", [1, 7, 1000])
def test_texts_tokenised_together_give_the_same_pairs(
    together: int, raw: dict[str, Any], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_dpo, "TOGETHER", together)
    rows = [*odd_rows(), *varied_pairs(20)]
    write_pairs(raw, rows, rows)
    alone = [make_pair(row, tokenizer, ROOM) for row in rows]
    wanted = [pair for pair in alone if isinstance(pair, Pair)][:50]
    pairs = read_pairs(check_recipe(raw, "test"), tokenizer, "train", 50)
    assert len(pairs) == len(wanted) == 50
    for pair, other in zip(pairs, wanted, strict=True):
        for side in ("chosen", "rejected"):
            ours, theirs = getattr(pair, side), getattr(other, side)
            assert ours.input_ids.tolist() == theirs.input_ids.tolist()
            assert ours.labels.tolist() == theirs.labels.tolist()


def test_texts_are_not_tokenised_one_by_one(
    raw: dict[str, Any], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = varied_pairs(20)
    for row in rows:
        for message in row["chosen"] + row["rejected"]:
            message["content"] = f" The {message['content'].strip()}\n"
    write_pairs(raw, rows, rows)
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: [len(text)][: len(text) < 12])
    texts: list[str] = []
    encode_batch = Tokenizer.encode_batch

    def noted(self: Tokenizer, batch: list[str]) -> list[list[int]]:
        texts.extend(batch)
        return encode_batch(self, batch)

    monkeypatch.setattr(Tokenizer, "encode_batch", noted)
    pairs = read_pairs(check_recipe(raw, "test"), tokenizer, "train", 20)
    assert len(texts) == len(set(texts)) > 40
    answer = rows[0]["chosen"][-1]["content"].strip()
    assert set(tokenizer.encode_batch([answer])[0]) <= set(pairs[0].chosen.input_ids.tolist())


def test_no_row_is_read_beyond_the_last_pair_wanted(
    raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    write_pairs(raw, [*varied_pairs(4), {"chosen": "broken"}], varied_pairs(1))
    recipe = check_recipe(raw, "test")
    assert len(read_pairs(recipe, tokenizer, "train", 4)) == 4
    with pytest.raises(UserError, match="source 'pairs': not a preference pair"):
        read_pairs(recipe, tokenizer, "train", 5)


def test_a_source_without_a_usable_pair_is_an_error(
    raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    write_pairs(raw, [{"chosen": turns("q", "a"), "rejected": turns("q", "a")}], varied_pairs(1))
    with pytest.raises(UserError, match="source 'pairs': no usable preference pair for train"):
        read_pairs(check_recipe(raw, "test"), tokenizer, "train", 9)


ANSWERED = {"chosen": turns("q", "a"), "rejected": turns("q", "b")}
ROBOT = {"role": "robot", "content": "q"}
NOT_PAIRS = {
    "texts": {"chosen": "text", "rejected": "text"},
    "no chosen": {"rejected": turns("q", "a")},
    "no messages": {"chosen": [], "rejected": []},
    "plain strings": {"chosen": ["q", "a"], "rejected": ["q", "b"]},
    "no content": {**ANSWERED, "rejected": [turns("q")[0], {"role": "assistant"}]},
    "unknown role": {side: [ROBOT, *ANSWERED[side][1:]] for side in ANSWERED},
    "content null": {
        **ANSWERED,
        "rejected": [turns("q")[0], {"role": "assistant", "content": None}],
    },
    "string prompt": {side: ["q", *ANSWERED[side][1:]] for side in ANSWERED},
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", NOT_PAIRS)
def test_a_row_that_is_no_pair_is_a_plain_error(
    kind: str, shared: bool, raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    row, good = NOT_PAIRS[kind], varied_pairs(3)
    write_pairs(raw, [row, *good], None if shared else good)
    raw["held_out_fraction"] = 1e-9
    with pytest.raises(UserError, match="source 'pairs'"):
        read_pairs(check_recipe(raw, "test"), tokenizer, "train", 100)


def prompt_text(pair: Pair, tokenizer: Tokenizer) -> str:
    row = trl_row(pair)
    return tokenizer.decode(row["prompt_ids"])


def test_a_source_for_both_sides_is_split_by_prompt(
    raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    rng = random.Random(5)
    rows = [
        {"chosen": turns(f"question {q}", f"{q} {n} good"), "rejected": turns(f"question {q}", "x")}
        for q in range(40)
        for n in range(3)  # three pairs to each prompt
    ]
    rng.shuffle(rows)
    write_pairs(raw, rows)
    raw["held_out_fraction"] = 0.3
    recipe = check_recipe(raw, "test")
    sides = {
        side: [prompt_text(pair, tokenizer) for pair in read_pairs(recipe, tokenizer, side, 999)]
        for side in ("train", "validation")
    }
    assert not set(sides["train"]) & set(sides["validation"])
    assert len(sides["train"]) + len(sides["validation"]) == 120
    assert 15 <= len(sides["validation"]) <= 60
    assert all(sides[side].count(prompt) == 3 for side in sides for prompt in sides[side])


def test_two_sources_are_not_split(raw: dict[str, Any], tokenizer: Tokenizer) -> None:
    write_pairs(raw, varied_pairs(30), varied_pairs(5, seed=9))
    recipe = check_recipe(raw, "test")
    assert len(read_pairs(recipe, tokenizer, "train", 100)) == 30
    assert len(read_pairs(recipe, tokenizer, "validation", 100)) == 5


# ------------------------------------------------------------------------------ whole runs


@pytest.fixture
def call(workshop: Workshop, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs stage 5 in this process, after an SFT checkpoint with untrained weights."""
    monkeypatch.chdir(workshop.folder)
    monkeypatch.setattr(training, "peak_flops", lambda *_: None)
    recipe = check_recipe(workshop.raw, "test")
    sft = checkpoints.make_checkpoint(
        new_model(recipe, 4),
        tokenizer,
        "sft",
        recipe.model_dump(mode="json"),
        step=5,
        steps=9,
        position=dict(vars(training.Position(step=5))),
    )
    checkpoints.write_whole(recipe.folder("sft") / "best.pt", sft)

    def call(*arguments: str) -> int:
        workshop.write()
        options = ["--device", "cpu", "--recipe", str(workshop.recipe)]
        monkeypatch.setattr(sys, "argv", ["x", *options, *arguments])
        with pytest.raises(SystemExit) as stop:
            run(train_dpo.main)
        return int(stop.value.code or 0)

    return call


def latest(workshop: Workshop) -> dict[str, Any]:
    return checkpoints.load(workshop.folder / "checkpoints/micro/dpo/latest.pt")


def test_the_loss_begins_at_log_2_and_the_rewards_at_0(call: Call, workshop: Workshop) -> None:
    workshop.raw["common"]["log_every"] = 1
    workshop.raw["dpo"]["validation_pairs"] = 3
    assert call("--steps", "3") == 0
    with open(workshop.folder / "logs/micro/dpo_metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["loss"]) == pytest.approx(math.log(2), abs=1e-5)
    for name in ("chosen_reward", "rejected_reward", "margin"):
        assert float(rows[0][name]) == pytest.approx(0, abs=1e-4)
    assert float(rows[2]["loss"]) < math.log(2) - 1e-3  # the weights have moved since


def test_the_reference_is_computed_once_and_lives_in_the_checkpoint(
    call: Call, workshop: Workshop, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    compute = train_dpo.reference_log_probabilities

    def counted(start: Start, pairs: list[Pair], side: str) -> torch.Tensor:
        computed.append(side)
        return compute(start, pairs, side)

    monkeypatch.setattr(train_dpo, "reference_log_probabilities", counted)
    assert call("--steps", "4") == 0
    assert sorted(computed) == ["train", "validation"]
    first = latest(workshop)["extra"]["reference"]
    assert call() == 0
    assert latest(workshop)["step"] > 4
    assert sorted(computed) == ["train", "validation"], "computed again after the resume"
    kept = latest(workshop)["extra"]["reference"]
    assert all(torch.equal(first[side], kept[side]) for side in ("train", "validation"))

    recipe = check_recipe(workshop.raw, "test")
    pairs = read_pairs(recipe, tokenizer, "train", recipe.dpo.max_pairs)
    untouched = start_from(new_model(recipe, 4), recipe, tokenizer)
    torch.testing.assert_close(kept["train"], compute(untouched, pairs, "train"))
    assert kept["train"].shape == (2, len(pairs))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sides whose references have been computed, one after the other."""
    sides: list[str] = []
    compute = train_dpo.reference_log_probabilities

    def counted(start: Start, pairs: list[Pair], side: str) -> torch.Tensor:
        sides.append(side)
        return compute(start, pairs, side)

    monkeypatch.setattr(train_dpo, "reference_log_probabilities", counted)
    return sides


def kept_reference(workshop: Workshop) -> dict[str, torch.Tensor]:
    kept = latest(workshop)["extra"]["reference"]
    return {side: kept[side] for side in ("train", "validation")}


def test_another_run_over_the_same_pairs_has_its_reference_from_the_disk(
    call: Call, workshop: Workshop, computed: list[str]
) -> None:
    assert call("--steps", "2") == 0
    first = kept_reference(workshop)
    assert call("--fresh", "--steps", "2", "--set", "dpo.beta=0.4", "--set", "seed=8") == 0
    again = kept_reference(workshop)
    assert sorted(computed) == ["train", "validation"]
    assert all(torch.equal(first[side], again[side]) for side in first)


@pytest.mark.parametrize("change", ["weights", "precision", "pairs"])
def test_a_reference_of_something_else_is_not_taken(
    change: str, call: Call, workshop: Workshop, computed: list[str]
) -> None:
    assert call("--steps", "2") == 0
    options = ["--fresh", "--steps", "2"]
    if change == "weights":
        path = workshop.folder / "checkpoints/micro/sft/best.pt"
        sft = checkpoints.load(path)
        sft["model"]["model.norm.weight"][3] += 0.1
        checkpoints.write_whole(path, sft)
    elif change == "precision":
        options += ["--set", "precision=bf16"]
    else:
        options += ["--set", "dpo.max_pairs=20", "--set", "dpo.validation_pairs=2"]
    first = kept_reference(workshop)
    assert call(*options) == 0
    assert sorted(computed) == ["train", "train", "validation", "validation"]
    again = kept_reference(workshop)
    assert not any(torch.equal(first[side], again[side]) for side in first)


def test_a_resume_needs_no_reference_on_the_disk(
    call: Call, workshop: Workshop, computed: list[str]
) -> None:
    assert call("--steps", "3") == 0
    shutil.rmtree(workshop.folder / "checkpoints/micro/dpo_reference")
    assert call("--steps", "5") == 0
    assert latest(workshop)["step"] == 5 and len(computed) == 2
    assert not (workshop.folder / "checkpoints/micro/dpo_reference").exists()


def test_a_damaged_reference_is_told_of_and_computed_anew(
    call: Call,
    workshop: Workshop,
    computed: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("--steps", "2") == 0
    first = kept_reference(workshop)
    files = sorted((workshop.folder / "checkpoints/micro/dpo_reference").iterdir())
    sound = [file.read_bytes() for file in files]
    files[0].write_bytes(sound[0][:300])
    assert call("--fresh", "--steps", "2") == 0
    assert f"{files[0].name} can't be used (" in capsys.readouterr().out
    assert len(computed) == 3
    assert [file.read_bytes() for file in files] == sound
    again = kept_reference(workshop)
    assert all(torch.equal(first[side], again[side]) for side in first)


@pytest.mark.parametrize("weight", [0, 0.5])
def test_the_csv_holds_the_metrics_and_with_sft_its_loss(
    weight: float, call: Call, workshop: Workshop
) -> None:
    workshop.raw["common"]["log_every"] = 1
    workshop.raw["dpo"]["sft_weight"] = weight
    assert call("--steps", "2") == 0
    with open(workshop.folder / "logs/micro/dpo_metrics.csv", newline="") as file:
        row = next(csv.DictReader(file))
    for name in ("chosen_logp", "rejected_logp", "chosen_reward", "rejected_reward"):
        assert math.isfinite(float(row[name])), name
    assert {"margin", "accuracy", "val_margin", "val_accuracy"} <= row.keys()
    assert ("sft_loss" in row) == ("val_sft_loss" in row) == bool(weight)
    if weight:
        assert float(row["loss"]) == pytest.approx(math.log(2) + 0.5 * float(row["sft_loss"]), 1e-4)


def test_the_best_checkpoint_goes_without_reference_and_optimizer(
    call: Call, workshop: Workshop
) -> None:
    assert call("--steps", "5") == 0
    best = checkpoints.load(workshop.folder / "checkpoints/micro/dpo/best.pt")
    assert not {"extra", "optimizer", "data"} & best.keys()


@pytest.mark.parametrize("change", ["fewer", "order", "words"])
def test_a_resume_with_other_pairs_is_refused(
    change: str, call: Call, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    path = workshop.folder / "texts/pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert call("--steps", "4") == 0
    if change == "fewer":
        rows = rows[:40]
    elif change == "order":
        rows.reverse()
    else:
        rows[7]["chosen"][-1]["content"] += " again"
    write_lines(path, rows)
    assert call() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: this run began with ")
    assert "bring the old data back, or begin anew with --fresh" in error
    assert latest(workshop)["step"] == 4


def test_every_pair_is_seen_once_an_epoch_in_another_order(
    raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    recipe = check_recipe(raw, "test")
    pairs = usable(varied_pairs(13), tokenizer)
    batches = train_dpo.PairBatches(pairs, torch.zeros(2, 13), recipe)
    first, second = batches.order[:13], batches.order[13:]
    assert sorted(first) == sorted(second) == list(range(13))
    assert first != second
    assert batches.steps == math.ceil(26 / recipe.dpo.pairs_per_step)
    seen = list(batches)
    assert [batch.weight for batch in seen] == [8, 8, 8, 2]
    assert seen[-1].epoch == 2
    again = train_dpo.PairBatches(pairs, torch.zeros(2, 13), recipe, seen[1].state)
    for ours, theirs in zip(again, seen[2:], strict=True):
        for one, other in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            assert torch.equal(one["input_ids"], other["input_ids"])


# ------------------------------------------------------------------------------ ranks

RANK_LOSSES = [{}, {"label_smoothing": 0.1, "sft_weight": 0.5}, {"loss": "ipo", "sft_weight": 0.5}]


def ranks_recipe(raw: dict[str, Any], **changes: Any) -> Recipe:
    raw["dpo"] |= {"pairs_per_step": 6, "micro_batch": 2, "epochs": 1, **changes}
    return check_recipe(raw, "test")


def answers_in(micro: dict[str, Any]) -> list[list[int]]:
    """The tokens of every answer of a micro-batch, chosen ones first."""
    own = micro["sequence_ids"] >= 0  # no padding
    count = micro["reference"].numel()
    return [micro["input_ids"][own & (micro["answers"] == n)].tolist() for n in range(count)]


def pairs_in(batch: Batch) -> list[tuple[list[int], list[int]]]:
    found = []
    for micro in batch.micro_batches:
        answers = answers_in(micro)
        half = len(answers) // 2
        found += list(zip(answers[:half], answers[half:], strict=True))
    return found


@pytest.mark.parametrize("count", [13, 14, 16])  # of which the last step has 1, 2 or 4
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_pairs_of_every_step(
    ranks: int, count: int, raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    recipe = ranks_recipe(raw)
    pairs, logps = usable(varied_pairs(count), tokenizer), torch.randn(2, count)
    whole = train_dpo.PairBatches(pairs, logps, recipe)
    shares = [
        train_dpo.PairBatches(pairs, logps, recipe, rank=r, ranks=ranks) for r in range(ranks)
    ]
    assert whole.steps == 3
    for step, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert [pair for part in parts for pair in pairs_in(part)] == pairs_in(step)
        assert len({len(part.micro_batches) for part in parts}) == 1
        references = [m["reference"] for part in parts for m in part.micro_batches]
        expected = [m["reference"] for m in step.micro_batches]
        assert torch.equal(torch.cat(references, 1), torch.cat(expected, 1))
        for part in parts:
            assert (part.weight, part.tokens) == (step.weight, step.tokens)
            assert (part.state, part.epoch) == (step.state, step.epoch)
            for micro in part.micro_batches:
                assert micro["num_labels"] == int(micro["answer_tokens"].sum())


@pytest.mark.parametrize("changes", RANK_LOSSES)
@pytest.mark.parametrize("count", [6, 4, 1])
@pytest.mark.parametrize("ranks", [2, 3])
def test_losses_metrics_and_gradients_of_the_ranks_add_up_to_those_of_one(
    ranks: int, count: int, changes: dict[str, Any], raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    recipe = ranks_recipe(raw, **changes)
    pairs, logps = usable(varied_pairs(count), tokenizer), torch.randn(2, count) - 20
    policy = new_model(recipe, 1)

    def step(**rank: int) -> tuple[float, dict[str, float], list[torch.Tensor]]:
        policy.zero_grad()
        batch = pair_batch(pairs, range(count), logps, recipe.dpo, **rank)
        found = our_step(policy, batch, recipe)
        gradients = [p.grad for p in policy.parameters() if p.grad is not None]
        assert len(gradients) == len(list(policy.parameters()))
        return *found, [gradient.clone() for gradient in gradients]

    loss, means, gradients = step()
    parts = [step(rank=rank, ranks=ranks) for rank in range(ranks)]
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-5)
    for name, mean in means.items():
        assert sum(part[1][name] for part in parts) == pytest.approx(mean, rel=1e-4, abs=1e-5)
    for number, gradient in enumerate(gradients):
        total = torch.stack([part[2][number] for part in parts]).sum(0)
        torch.testing.assert_close(total, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", RANK_LOSSES)
def test_a_rank_without_a_pair_gets_a_filler_that_adds_nothing(
    changes: dict[str, Any], raw: dict[str, Any], tokenizer: Tokenizer
) -> None:
    recipe = ranks_recipe(raw, **changes)
    pairs = usable(varied_pairs(1), tokenizer)
    filler = pair_batch(pairs, [0], torch.zeros(2, 1), recipe.dpo, rank=1, ranks=2)
    assert [micro["num_labels"] for micro in filler.micro_batches] == [0]
    policy = new_model(recipe, 1)
    loss, means = our_step(policy, filler, recipe)
    assert loss == 0 and not any(means.values())
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
