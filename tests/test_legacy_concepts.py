"""The concept experiments: their items, labels, replay and scores, and the way from end to end."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch

from hamner import checkpoints, tokenization
from hamner.errors import UserError, run
from hamner.recipe import OptimizerPart, SchedulePart
from hamner.tokenization import Tokenizer
from legacy import concept_experiments_v2, concept_experiments_v3
from legacy.concept_report import known_after, mean_and_spread, steps_until_known
from legacy.concept_settings import load_settings
from legacy.concept_training import (
    Form,
    Lesson,
    Outcome,
    School,
    Schooling,
    Trial,
    answer_ids,
    batch_of,
    example,
    prompt_ids,
    replayed,
)
from legacy.concepts import (
    COMPOSITIONS,
    MAKERS,
    Item,
    added,
    capital,
    concept,
    constant_score,
    item,
    number_word,
    opposite,
    split,
    subtracted,
)
from model import IGNORE_INDEX, ModelConfig, Transformer

torch.set_num_threads(1)
SHAPE = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 96,
}  # fmt: skip
FIVE = [
    added(1, 2), opposite("hot", "cold"), capital("France", "Paris"), item("Say 4 7:", "4 7"),
    item("Spell 12:", "twelve"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenization.train(["The opposite of hot is cold. Spell 12: twelve " * 20], 320)


@pytest.fixture(scope="module")
def school(tokenizer: Tokenizer) -> School:
    torch.manual_seed(0)
    optimizer = OptimizerPart(
        learning_rate=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, clip=1.0
    )
    schedule = SchedulePart(kind="wsd", warmup=3, decay=20, floor=0.0)
    ways = Schooling(optimizer, 5, 64, schedule, 20, "fp32")
    return School(Transformer(ModelConfig(**SHAPE)), tokenizer, torch.device("cpu"), ways)


@pytest.fixture(scope="module")
def learnt(school: School) -> tuple[Trial, Outcome]:
    lesson = Lesson("five", FIVE, 60)
    trial = Trial("test", "five", 1, [lesson], {"trained": FIVE}, watched=["trained"])
    return trial, school.run(trial)


@pytest.fixture(scope="module")
def checkpoint(school: School, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "latest.pt"
    whole = checkpoints.make_checkpoint(
        school.model, school.tokenizer, "base", {"name": "x"}, step=3, position={}
    )
    checkpoints.write_whole(path, whole)
    return path


# --------------------------------------------------------------------------- items


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_no_fact_is_both_trained_and_held_out(name: str, seed: int) -> None:
    it = concept(name, seed)
    trained, held_out = ({one.fact for one in items} for items in (it.train, it.held_out))
    assert trained and held_out and not trained & held_out
    prompts = [" ".join(one.prompt.lower().split()) for one in [*it.train, *it.held_out]]
    assert len(set(prompts)) == len(prompts)
    # turned: the trained facts, and none of the very questions that were trained
    assert {one.fact for one in it.turned} <= trained
    assert not {one.prompt for one in it.turned} & {one.prompt for one in it.train}


def operands(one: Item) -> frozenset[str]:
    return frozenset(word for word in one.prompt.split() if word.isdigit())


@pytest.mark.parametrize("name", ["add", "add_carry", "multiply"])
def test_a_sum_is_not_held_out_if_its_turn_is_trained(name: str) -> None:
    it = concept(name, 5)
    assert not set(map(operands, it.train)) & set(map(operands, it.held_out))
    assert set(map(operands, it.turned)) <= set(map(operands, it.train))


def test_facts_know_what_may_be_turned_round() -> None:
    assert added(3, 4).fact == added(4, 3).fact
    assert opposite("hot", "cold").fact == opposite("cold", "hot").fact
    assert subtracted(4, 3).fact != subtracted(3, 4).fact
    assert item("What is it?", "a").fact == item("  what IS it ", "a").fact
    with pytest.raises(ValueError, match="twice"):
        split([added(3, 4), added(4, 3), added(1, 1)], 1, random.Random(0))
    with pytest.raises(ValueError, match="held out"):
        split([added(3, 4), added(1, 1)], 2, random.Random(0))


def test_answers_are_right() -> None:
    for name in ("add", "add_carry", "subtract", "multiply"):
        it = concept(name, 3)
        for one in [*it.train, *it.held_out, *it.turned]:
            assert eval(one.prompt.removesuffix("=")) == int(one.answer)
    it = concept("yes_no", 3)
    for one in [*it.train, *it.held_out, *it.turned]:
        assert eval(one.prompt.removeprefix("Is").removesuffix("?")) is (one.answer == "yes")
    words = {0: "zero", 13: "thirteen", 20: "twenty", 40: "forty", 99: "ninety-nine"}
    assert {n: number_word(n) for n in words} == words
    assert len({number_word(n) for n in range(100)}) == 100


def test_the_numbers_of_items_are_those_asked_for() -> None:
    sizes = {
        name: (len(it.train), len(it.held_out)) for name in MAKERS for it in [concept(name, 1)]
    }
    assert sizes["opposites"] == (16, 15) and sizes["questions"] == (30, 30)
    assert sizes["chat"] == (15, 15) and sizes["capitals"][0] == 50
    settings = load_settings(small=False)
    assert max(settings.scaling.facts) <= sizes["capitals"][0]


def test_a_seed_decides_the_split() -> None:
    assert concept("opposites", 1) == concept("opposites", 1)
    assert concept("opposites", 1) != concept("opposites", 2)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_task_is_made_of_what_the_skills_know(name: str) -> None:
    it = COMPOSITIONS[name](4)
    assert not {one.fact for one in it.tasks.train} & {one.fact for one in it.tasks.held_out}
    first = {one.prompt.removesuffix(" =").removesuffix(" is"): one.answer for one in it.first}
    second = {one.prompt.removesuffix(" ="): one.answer for one in it.second}
    for task in [*it.tasks.train, *it.tasks.held_out]:
        if name == "sum_in_words":
            total = first[task.prompt.removesuffix(" in words =")]
            assert task.answer == second[f"Spell {total}:"]
        else:
            word, total = task.prompt.removesuffix(" are").split(" and ")
            assert task.answer == f"{first[word]} and {second[total]}"


def test_what_one_answer_alone_gets_right() -> None:
    train = [item("a", "yes"), item("b", "yes"), item("c", "no")]
    assert constant_score(train, [item("d", "yes"), item("e", "no"), item("f", "maybe")]) == 1 / 3


# --------------------------------------------------------------------------- labels, batches


def test_labels_are_the_answer_and_its_end(tokenizer: Tokenizer) -> None:
    for one in FIVE:
        made = example(tokenizer, one, "answer")
        prompt = [tokenizer.end_of_text, *tokenizer.encode(one.prompt)]
        assert made.input_ids.tolist()[: len(prompt)] == prompt == prompt_ids(tokenizer, one)
        assert set(made.labels[: len(prompt)].tolist()) == {IGNORE_INDEX}
        labelled = made.labels[len(prompt) :].tolist()
        assert labelled == made.input_ids[len(prompt) :].tolist() == answer_ids(tokenizer, one)
        assert tokenizer.decode(labelled) == f" {one.answer}"
        assert labelled[-1] == tokenizer.end_of_text


@pytest.mark.parametrize("form", ["all", "packed"])
def test_the_controls_label_every_token(tokenizer: Tokenizer, form: Form) -> None:
    examples = [example(tokenizer, one, form) for one in FIVE]
    batch = batch_of(examples, form, 64)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        end = (labels != IGNORE_INDEX).sum()
        assert torch.equal(ids[:end], labels[:end]) and (labels[end:] == IGNORE_INDEX).all()
        assert ids[end - 1] == tokenizer.end_of_text


def test_packed_rows_hold_every_item_once(tokenizer: Tokenizer) -> None:
    examples = [example(tokenizer, one, "packed") for one in FIVE]
    batch = batch_of(examples, "packed", 64)
    rows, width = batch["input_ids"].shape
    assert rows < len(FIVE) and width <= 64
    found: list[str] = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        texts: list[list[int]] = []
        for id_ in ids[labels != IGNORE_INDEX].tolist():
            texts += [[]] if id_ == tokenizer.end_of_text else []
            texts[-1].append(id_)
        assert texts.pop() == [tokenizer.end_of_text]
        found += map(tokenizer.decode, texts)
    assert sorted(found) == sorted(f"{one.prompt} {one.answer}" for one in FIVE)


@pytest.mark.parametrize(("size", "share"), [(10, 0.3), (32, 0.3), (16, 0.4), (7, 0.25), (3, 1.0)])
def test_replay_is_exactly_the_share(size: int, share: float) -> None:
    counts = [replayed(step, size, share) for step in range(100)]
    assert sum(counts) == round(100 * size * share)
    assert max(counts) - min(counts) <= 1 and max(counts) <= size


def test_replay_takes_turns_among_what_came_before() -> None:
    new, old, older = ([item(f"{name}{i}", "x") for i in range(4)] for name in "abc")
    lesson = Lesson("new", new, 40, earlier=[old, older], replay_share=0.3)
    seen = [one for batch in lesson.batches(10, random.Random(0)) for one in batch]
    counts = {name: sum(one.prompt[0] == name for one in seen) for name in "abc"}
    assert counts == {"a": 280, "b": 60, "c": 60}
    assert all(seen.count(one) == 70 for one in new)  # epochs: each as often as the others
    first = Lesson("first", new, 5, replay_share=0.3)  # nothing before it: nothing to replay
    assert all(one in new for batch in first.batches(10, random.Random(0)) for one in batch)


def test_a_lesson_goes_through_its_items_in_epochs() -> None:
    lesson = Lesson("five", FIVE, 4)
    batches = list(lesson.batches(5, random.Random(3)))
    assert len(batches) == 4 and all({*batch} == {*FIVE} for batch in batches)
    assert batches != list(lesson.batches(5, random.Random(4)))
    assert batches == list(islice(lesson.batches(5, random.Random(3)), 4))


# --------------------------------------------------------------------------- scores


ANSWERS = [
    (" cold", True), ("cold", True), (" colder", False), (" col", False), (" Cold", False),
    (" cold cold", False), ("", False), (" cold.", False),
]  # fmt: skip


@pytest.mark.parametrize(("said", "right"), ANSWERS)
def test_an_answer_is_right_word_for_word(
    school: School, monkeypatch: pytest.MonkeyPatch, said: str, right: bool
) -> None:
    tokenizer = school.tokenizer
    monkeypatch.setattr(
        "legacy.concept_training.generate_batch",
        lambda model, prompts, *_: [tokenizer.encode(said) for _ in prompts],
    )
    assert school.score(school.model, [opposite("hot", "cold")]) == (int(right), 1)


def test_an_answer_without_an_end_is_wrong(school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, asked = school.tokenizer, opposite("hot", "cold")

    def endless(model: object, prompts: Sequence[object], sampling: object, stop: object) -> object:
        return [(tokenizer.encode(" cold") + tokenizer.encode(" ") * 9)[: limit(sampling)]]

    def limit(sampling: object) -> int:
        return sampling.max_new_tokens  # type: ignore[attr-defined,no-any-return]

    monkeypatch.setattr("legacy.concept_training.generate_batch", endless)
    assert school.score(school.model, [asked]) == (0, 1)
    with_control = [*tokenizer.encode(" cold"), tokenizer.im_start]
    assert school.text_of(with_control, 99) is None
    assert school.text_of(with_control[:-1], 99) == "cold"


def test_spread_and_steps_until_known() -> None:
    def outcome(*rights: int) -> Outcome:
        curve = [(10 * i, {"t": (right, 4)}) for i, right in enumerate(rights)]
        return Outcome("p", "n", 0, [], [{"t": (rights[-1], 4)}], curve)

    assert steps_until_known(outcome(0, 2, 4, 3), "t") == 20
    assert steps_until_known(outcome(0, 2, 3, 3), "t") is None
    assert steps_until_known(outcome(4, 2, 3, 4), "t", begin=10) == 20
    assert known_after([outcome(0, 4), outcome(0, 0, 0, 4)], "t") == "20 ±14"
    assert known_after([outcome(0, 4), outcome(0, 2)], "t") == "not in 1 of 2"
    assert mean_and_spread([100.0, 50.0]) == "75 ±35" and mean_and_spread([50.0]) == "50"


# --------------------------------------------------------------------------- teaching


def test_five_items_are_learnt(learnt: tuple[Trial, Outcome]) -> None:
    _, outcome = learnt
    assert outcome.after[0]["trained"] == (0, 5)
    assert outcome.after[1]["trained"] == (5, 5)
    assert [step for step, _ in outcome.curve] == [0, 20, 40, 60]
    assert outcome.curve[-1][1] == outcome.after[1]


def test_a_trial_repeats_itself_and_leaves_the_school_as_it_was(
    school: School, learnt: tuple[Trial, Outcome]
) -> None:
    trial, outcome = learnt
    before = {name: value.clone() for name, value in school.model.state_dict().items()}
    again = school.run(trial)
    assert (again.after, again.curve, again.tokens) == (
        outcome.after, outcome.curve, outcome.tokens,
    )  # fmt: skip
    assert all(torch.equal(before[k], v) for k, v in school.model.state_dict().items())


def test_tokens_and_labels_are_counted(school: School, learnt: tuple[Trial, Outcome]) -> None:
    _, outcome = learnt
    examples = [example(school.tokenizer, one, "answer") for one in FIVE]
    answers = [answer_ids(school.tokenizer, one) for one in FIVE]
    assert outcome.tokens == 60 * sum(map(len, examples))
    assert outcome.labels == 60 * sum(map(len, answers))


FITS = [
    (22, "answer", None), (22, "packed", "a row 64: raise row_length"),
    (30, "answer", "the model has room for 96"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "form", "told"), FITS)
def test_an_item_that_does_not_fit_is_told(
    school: School, words: int, form: Form, told: str | None
) -> None:
    long = item("a b" * words, "long")
    trial = Trial("test", "long", 0, [Lesson("five", FIVE, 1, form)], {"t": [long]})
    if told is None:
        school.check_lengths(trial)
    else:
        with pytest.raises(UserError, match=told):
            school.check_lengths(trial)


# --------------------------------------------------------------------------- the scripts


def call(main: Callable[[], int], *arguments: str) -> int:
    """Run a script's main in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["x", *arguments])
        run(main)
    return int(stop.value.code or 0)


def options(checkpoint: Path, out: Path) -> list[str]:
    numbers = ["steps=6", "measure_every=3", "items_per_step=10", "row_length=48"]
    numbers += ["schedule.decay=2", "multi.steps=6", "scaling.facts=[5, 8]"]
    numbers += ["loss=[add, opposites]", "rates.concepts=[add]", "rates.values=[0.001]"]
    numbers += ["chains=[[add, opposites]]", "multi.concepts=[add, opposites]"]
    numbers += ["generalisation=[yes_no, add]", "composition=[sum_in_words]"]
    numbers += ["forgetting=[add, opposites]", "curriculum.chain=[add, opposites]"]
    sets = [word for number in numbers for word in ("--set", number)]
    return ["--recipe", "tiny", "--small", "--checkpoint", str(checkpoint), "--out", str(out),
            "--seeds", "1", "--device", "cpu", *sets]  # fmt: skip


SCRIPTS = {"v2": concept_experiments_v2, "v3": concept_experiments_v3}


@pytest.mark.parametrize("version", SCRIPTS)
def test_an_experiment_from_end_to_end_and_stopped_in_between(
    version: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, whole = SCRIPTS[version].main, tmp_path / "whole"
    assert call(main, *options(checkpoint, whole)) == 0
    text = capsys.readouterr().out
    results = json.loads((whole / "results.json").read_text())
    phases = [phase.name for phase in SCRIPTS[version].EXPERIMENT.phases]
    assert {one["phase"] for one in results["outcomes"]} == {*phases}
    assert {path.name for path in whole.glob("*.png")} == {f"concepts_{p}.png" for p in phases}
    assert results["same"]["checkpoint"]["stage"] == "base" and results["also"]["torch"]
    assert "percent of answers right" in text

    # what a run leaves that is stopped half way; the rest comes out the same
    half = tmp_path / "half"
    half.mkdir()
    kept = results["outcomes"][: len(results["outcomes"]) // 2]
    (half / "results.json").write_text(json.dumps({**results, "outcomes": kept}))
    assert call(main, *options(checkpoint, half)) == 0
    again = json.loads((half / "results.json").read_text())
    timeless = [[{**one, "seconds": 0} for one in r["outcomes"]] for r in (results, again)]
    assert timeless[0] == timeless[1]
    assert again["outcomes"][: len(kept)] == kept  # not run again: even their seconds are the same


def test_results_of_other_numbers_are_not_mixed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*options(checkpoint, tmp_path), "--only", "multi"]
    main = concept_experiments_v2.main
    assert call(main, *arguments) == 0
    before = (tmp_path / "results.json").read_text()
    assert call(main, *arguments, "--set", "optimizer.learning_rate=0.1") == 2
    assert "another settings" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == before
    (tmp_path / "results.json").write_text("{}")
    assert call(main, *arguments) == 2
    assert "not the results" in capsys.readouterr().err
    assert call(main, *arguments, "--fresh") == 0
    assert [path.read_text() for path in tmp_path.parent.glob("*.old-*/results.json")] == ["{}"]


BAD = [
    (["--set", "stepps=3"], "stepps: unknown key (did you mean 'steps'?)"),
    (["--set", "steps=0"], "steps:"),
    (["--set", "loss=[opposite]"], "no concept is called 'opposite' (did you mean 'opposites'?)"),
    (["--set", "composition=[sums]"], "no composition is called 'sums'"),
    (["--set", "forgetting=[add, add]"], "a name stands there twice"),
    (["--set", "scaling.facts=[51]"], "there are 50 facts to learn"),
    (["--set", "optimizer={learning_rate: 1}"], "optimizer.betas: is missing"),
    (["--only", "los"], "no phase is called 'los' (did you mean 'loss'?)"),
    (["--checkpoint", "nowhere.pt"], "no checkpoint at nowhere.pt"),
    (["--recipe", "tinny"], "no recipe 'tinny'"),
    (["--device", "toaster"], "--device toaster"),
    (["--set", "row_length=99", "--only", "loss"], "the model has room for 96"),
]


@pytest.mark.parametrize(("arguments", "told"), BAD)
def test_bad_input_is_told_in_a_sentence(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: list[str], told: str,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert call(concept_experiments_v2.main, *options(checkpoint, out), *arguments) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_that_can_not_be_written_to_is_told(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    arguments = [*options(checkpoint, tmp_path / "out"), "--only", "multi"]
    assert call(concept_experiments_v2.main, *arguments) == 2
    assert "name a folder with --out" in capsys.readouterr().err
