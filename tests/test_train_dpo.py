"""Stage 5: the loss against TRL's, the pairs that are used, and the reference that is kept."""

from __future__ import annotations

import csv
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workshop, some_text, write_lines

import train_dpo
from hamner import checkpoints, tokenization, training
from hamner.errors import UserError, run
from hamner.recipe import Recipe, check_recipe
from hamner.stage import Start
from hamner.tokenization import Tokenizer
from model import IGNORE_INDEX, Transformer
from train_dpo import (
    Pair,
    dpo_loss,
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
    return Start("dpo", recipe, "micro", torch.device("cpu"), model, tokenizer, None, None)


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


def trl_trainer(policy: Any, reference: Any, tokenizer: Tokenizer, beta: float, out: Path) -> Any:
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
        output_dir=str(out), beta=beta, use_cpu=True, bf16=False, report_to="none", max_length=None
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


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_loss_rewards_margins_accuracy_and_gradients_are_those_of_trl(
    beta: float,
    raw: dict[str, Any],
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("trl")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    raw["dpo"].update(beta=beta)
    recipe = check_recipe(raw, "test")
    pairs = usable(varied_pairs(11), tokenizer)
    assert len({len(e) for pair in pairs for e in (pair.chosen, pair.rejected)}) > 8
    policy = new_model(recipe, 1)
    reference = perturbed(policy, 2)
    logps = reference_log_probabilities(start_from(reference, recipe, tokenizer), pairs, "train")
    batch = pair_batch(pairs, range(11), logps, recipe.dpo)
    assert len(batch.micro_batches) == 3  # of 4, 4 and 3 pairs
    assert all(len(micro["input_ids"]) > 1 for micro in batch.micro_batches), "one row only"
    assert all(int(micro["sequence_ids"].max()) > 0 for micro in batch.micro_batches), "not packed"
    loss, sums = 0.0, dict.fromkeys(train_dpo.METRICS, 0.0)
    for micro in batch.micro_batches:
        part, metrics = dpo_loss(policy, micro, beta)
        (part / batch.weight).backward()
        loss += float(part.detach()) / batch.weight
        for name, value in metrics.items():
            sums[name] += float(value.detach()) / batch.weight

    theirs = as_llama(policy)
    trainer = trl_trainer(theirs, as_llama(reference), tokenizer, beta, tmp_path / "trl")
    theirs.zero_grad()
    their_loss = trainer.compute_loss(theirs, trainer.data_collator([trl_row(p) for p in pairs]))
    their_loss.backward()
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}

    assert loss == pytest.approx(float(their_loss.detach()), abs=1e-5)
    for ours, name in (
        ("chosen_reward", "rewards/chosen"),
        ("rejected_reward", "rewards/rejected"),
        ("margin", "rewards/margins"),
        ("accuracy", "rewards/accuracies"),
    ):
        assert sums[ours] == pytest.approx(logged[name], abs=1e-5), ours
    for ours, name in (("chosen_logp", "logps/chosen"), ("rejected_logp", "logps/rejected")):
        assert sums[ours] == pytest.approx(logged[name], rel=1e-6), ours
    assert 0 < sums["accuracy"] < 1 and abs(sums["margin"]) > 0.01, "the models hardly differ"
    gradients = dict(theirs.named_parameters())
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and gradients[name].grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=0)
        assert parameter.grad.abs().max() > 1e-3, f"{name}: too small to compare"


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
    monkeypatch.setattr(training, "peak_flops", lambda device: None)
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
