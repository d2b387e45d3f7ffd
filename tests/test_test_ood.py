"""That the prompts are out of distribution, and what the script makes of a model's answers."""

from __future__ import annotations

import inspect
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
import yaml
from conftest import Workshop, write_lines
from rich.console import Console

import generate_sft_data
import generate_sft_v3
import synthetic_tasks
import test_ood
from hamner import checkpoints
from hamner.conversation import open_speaker
from hamner.errors import UserError, run
from hamner.recipe import RECIPE_FOLDER, STAGES, load_recipe
from hamner.stage import open_tokenizer
from model import Transformer
from ood_scoring import CATEGORIES, Answer, Prompt, read_prompts
from test_ood import Result, contamination, interval, kind_of, table, trained_on, user_turns

torch.set_num_threads(1)  # more would wait for each other where cores are shared
NEAR, NEAR_PARAPHRASE = 0.35, 0.7  # shares of word triples that one trained turn may hold
PROMPTS = read_prompts()


def spoken(talks: list[dict[str, Any]], key: str = "messages") -> list[str]:
    return [m["content"] for talk in talks for m in talk[key] if m["role"] == "user"]


@pytest.fixture(scope="module")
def turns() -> list[str]:
    """All that users say in the data that this repository makes, and the recipes' own prompts."""
    diverse = generate_sft_v3.conversations()
    plain = generate_sft_v3.plain_conversations()
    pairs = [*generate_sft_v3.preference_pairs(diverse), *generate_sft_v3.preference_pairs(plain)]
    rng = random.Random(0)
    exercises = [synthetic_tasks.conversation(rng) for _ in range(5_000)]
    recipes = [load_recipe(str(path)) for path in sorted(RECIPE_FOLDER.glob("*.yaml"))]
    return [
        *spoken([*diverse, *plain, *generate_sft_data.conversations()]),
        *spoken(pairs, "rejected"),
        *(messages[0]["content"] for messages in exercises),
        *(text for recipe in recipes for stage in STAGES for text in recipe.stage(stage).prompts),
    ]


@pytest.fixture(scope="module")
def trained(turns: list[str]) -> test_ood.Trained:
    return trained_on(turns, PROMPTS)


# ---------------------------------------------------------------------------- our training data


def test_no_prompt_is_trained(trained: test_ood.Trained) -> None:
    assert trained.count > 15_000
    assert [why for prompt in PROMPTS if (why := contamination(prompt, trained))] == []


def test_what_is_said_in_other_words_is_trained(trained: test_ood.Trained) -> None:
    said = [text for prompt in PROMPTS for text in prompt.paraphrase_of]
    assert [text for text in said if not trained.holds(text)] == []


def test_unseen_prompts_are_far_from_trained_ones_and_paraphrases_not_too_near(
    trained: test_ood.Trained,
) -> None:
    for prompt in PROMPTS:
        limit = NEAR_PARAPHRASE if prompt.paraphrase_of else NEAR
        for question in prompt.questions:
            share, turn = trained.nearest.get(question, (0.0, ""))
            assert share < limit, f"{question!r} is near to {turn!r}"


def test_no_exercise_trains_the_unseen_sums(trained: test_ood.Trained) -> None:
    """Exercises draw from all pairs up to 500; what they hold out is told by a hash."""
    sums = [prompt.sum for prompt in PROMPTS if prompt.sum]
    assert all(not prompt.paraphrase_of for prompt in PROMPTS if prompt.sum)
    for text in sums:
        terms, signs = text.split()[::2], set(text.split()[1::2])
        if "/" in signs or max(map(int, terms)) > 500:
            continue  # no exercise divides, or has such numbers
        orders = [terms, terms[::-1]] if len(terms) == 2 else [terms]
        for order in orders:
            row = text.split()
            row[::2] = order
            task = synthetic_tasks.Task("arithmetic", 1, f"Calculate: {' '.join(row)}", "")
            assert synthetic_tasks.is_held_out(task), row
    unnamed = [
        prompt.ask for prompt in PROMPTS
        if prompt.category == "math" and not prompt.paraphrase_of and not prompt.sum
        and len(re.findall(r"\d+", prompt.ask[0])) > 1
    ]  # fmt: skip
    assert unnamed == [], "a sum of two numbers should be named, to be checked"


def test_the_check_finds_what_is_trained(turns: list[str]) -> None:
    """Of all trained questions that are made prompts, each is found."""
    asked = random.Random(1).sample(turns, 300)
    made = [example(text) for text in asked]
    trained = trained_on(turns, made)
    assert all(contamination(prompt, trained) for prompt in made)


# ------------------------------------------------------------------------------------ the check


def example(ask: str, **given: Any) -> Prompt:
    score = {"by": "words", "any": ["spam"]}
    return Prompt.model_validate(
        {"category": "math", "ask": ask, "score": score, "examples": ["spam"], **given}
    )


@pytest.mark.parametrize("turn", ["What IS a dog", " what is, a dog?! "])
def test_case_and_punctuation_make_no_other_prompt(turn: str) -> None:
    prompt = example("What is a dog?", paraphrase_of=["dog?"])
    assert contamination(prompt, trained_on([turn], [prompt])) == "'What is a dog?' is trained"
    assert not contamination(prompt, trained_on(["What is a dogma?"], [prompt]))


def test_texts_without_words_differ_by_their_marks() -> None:
    prompt = example("\U0001f642?")
    assert not contamination(prompt, trained_on([":("], [prompt]))
    assert contamination(prompt, trained_on([" \U0001f642?"], [prompt]))


def test_a_trained_turn_that_holds_half_of_an_unseen_prompt_is_too_near() -> None:
    ask = "How many apples are in the big basket of my aunt?"  # nine triples
    near, far = "Count: how many apples are in the box?", "How many apples are there?"
    far_enough, too_near = example(ask), example(ask)
    assert trained_on([near], [too_near]).nearest[ask] == (4 / 9, near)
    longer = "Tell me how many apples are in the big basket."
    assert "is too near to 'Tell me" in contamination(too_near, trained_on([longer], [too_near]))
    assert not contamination(far_enough, trained_on([near, far], [far_enough]))
    paraphrase = example(ask, paraphrase_of=["apples?"])
    assert not contamination(paraphrase, trained_on([longer], [paraphrase]))


@pytest.mark.parametrize(
    ("turn", "found"),
    [
        ("what is 7 + 12?", True), ("12 times 7", True), ("twelve and seven", True),
        ("7 + 13", False), ("7 + 12 + 1", False), ("7", False),
    ],
)  # fmt: skip
def test_operands_that_were_trained_together_are_found(turn: str, found: bool) -> None:
    prompt = example("Twelve and seven more?", sum="12 + 7")
    assert bool(contamination(prompt, trained_on([turn], [prompt]))) is found


def test_every_turn_of_a_follow_up_is_checked() -> None:
    prompt = example(["I am Bo.", "Hi Bo.", "Who am I?"])  # type: ignore[arg-type]
    for turn, found in (("i am bo", True), ("who am I", True), ("Hi Bo.", False)):
        assert bool(contamination(prompt, trained_on([turn], [prompt]))) is found


def test_a_paraphrase_of_what_was_not_trained_counts_as_unseen() -> None:
    prompt = example("Is it a dog?", paraphrase_of=["a dog?", "dog or not?"])
    assert kind_of(prompt, None) == "paraphrase"
    assert kind_of(prompt, trained_on(["A dog!"], [prompt])) == "paraphrase"
    assert kind_of(prompt, trained_on(["A cat!"], [prompt])) == "unseen"
    assert kind_of(example("Is it a dog?"), None) == "unseen"


def test_users_turns_are_found_in_any_column(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": talk, "n": 1}, {"x": 2, "chosen": talk}])
    assert list(user_turns(path)) == ["one", "one"]
    with pytest.raises(UserError, match="holds no user's turn"):
        list(user_turns(write_lines(tmp_path / "b.jsonl", [{"text": "user: one"}])))


# --------------------------------------------------------------------------------- the counting


@pytest.mark.parametrize(("right", "count"), [(0, 10), (3, 7), (8.5, 20), (50, 100), (12, 12)])
def test_the_interval_is_wilsons(right: float, count: int) -> None:
    """Its ends are the shares p with |right / count - p| = 1.96 standard errors of p."""
    for end in interval(right, count):
        error = 1.96 * math.sqrt(end * (1 - end) / count)
        assert abs(right / count - end) == pytest.approx(error, abs=1e-9)
    low, high = interval(right, count)
    assert 0 <= low <= right / count <= high <= 1 and low < high


def rendered(results: list[Result], width: int = 80) -> list[list[str]]:
    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(table(results))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    return [line.split() for line in lines if line.strip()]


def test_the_table_counts_categories_and_kinds_apart() -> None:
    good, bad = Answer("spam"), Answer("ham")
    results = [
        Result(example("a"), "paraphrase", [good]),
        Result(example("b"), "paraphrase", [bad]),
        Result(example("c"), "unseen", [good, bad, bad, bad]),
        Result(example("d", category="logic"), "unseen", [good]),
    ]
    _, _, math_, logic, *_, total = rendered(results)
    assert math_ == ["math", "2", "50%", "1", "25%", "3", "42%", "9", "to", "84%"]
    assert logic == ["logic", "1", "100%", "1", "100%", "21", "to", "100%"]
    assert total[:7] == ["all", "2", "50%", "2", "62%", "4", "56%"]


# ----------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A workshop with a model that was never trained, at sft/best.pt."""
    folder = tmp_path_factory.mktemp("ood")
    raw = inspect.unwrap(conftest.raw)(inspect.unwrap(conftest.data)(folder))
    raw["model"]["max_position_embeddings"] = 256
    raw["system_prompt"] = "be kind"
    workshop = Workshop(folder, raw)
    recipe = load_recipe(str(workshop.recipe))
    torch.manual_seed(0)
    checkpoint = checkpoints.make_checkpoint(
        Transformer(recipe.model.config()), open_tokenizer(recipe), "sft",
        recipe.model_dump(mode="json"), step=3, steps=3, position={},
    )  # fmt: skip
    checkpoints.write_whole(folder / "checkpoints/micro/sft/best.pt", checkpoint)
    return workshop


Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(
    model: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Ask:
    """Runs test_ood.py in this process; gives exit code, output and errors."""
    monkeypatch.chdir(model.folder)
    monkeypatch.setenv("COLUMNS", "80")

    def ask(*arguments: str) -> tuple[int, str, str]:
        device = [] if "--say" in arguments else ["--device", "cpu"]
        given = ["test_ood.py", "--recipe", str(model.recipe), *device, *arguments]
        monkeypatch.setattr(sys, "argv", given)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(test_ood.main)
        return (int(stop.value.code or 0), *capsys.readouterr())

    return ask


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the model say the same to everything, which takes no time."""
    monkeypatch.setattr(test_ood, "answer", lambda *given: Answer("ham"))


def said(folder: Path, name: str) -> dict[str, list[str]]:
    """The answers in a JSON file, by what was asked."""
    prompts = json.loads((folder / name).read_text(encoding="utf-8"))["prompts"]
    return {" / ".join(p["ask"]): [answer["text"] for answer in p["answers"]] for p in prompts}


def test_it_asks_everything_and_shows_what_was_said(ask: Ask, model: Workshop) -> None:
    code, out, error = ask("--json", "all.json")
    assert (code, error) == (0, "")
    assert out.startswith("checkpoints/micro/sft/best.pt (stage sft, step 3), ")
    assert "\nnot checked against training data" in out
    asked = said(model.folder, "all.json")
    assert list(asked) == [" / ".join(prompt.ask) for prompt in PROMPTS]
    for prompt in PROMPTS:
        assert all(f"  {text}\n" in out for text in prompt.ask)
    lines = [line.split() for line in out.splitlines() if line.strip()]
    rows = [line for line in lines if line[0] in (*CATEGORIES, "all") and len(line) == 10]
    assert [row[0] for row in rows] == [*CATEGORIES, "all"]
    assert sum(int(row[5]) for row in rows[:-1]) == int(rows[-1][5]) == len(PROMPTS)
    assert out.count("\n   WRONG  ") + out.count("\n   right\n") == len(PROMPTS)
    assert max(len(line) for line in out[out.rindex("paraphrase") :].splitlines()) < 100
    assert "\x1b" not in out
    assert f"{len(PROMPTS)} answers in " in out and "\ntemperature 0.7\n" in out


def test_the_same_seed_gives_the_same_answers_whatever_else_is_asked(
    ask: Ask, model: Workshop
) -> None:
    two = ["--category", "logic", "--category", "math", "--quiet"]
    assert ask(*two, "--samples", "2", "--json", "two.json")[0] == 0
    assert ask("--category", "math", "--json", "one.json")[0] == 0
    assert ask("--category", "math", "--json", "other.json", "--seed", "1")[0] == 0
    both, one = said(model.folder, "two.json"), said(model.folder, "one.json")
    assert {question: both[question][:1] for question in one} == one
    assert all(first != second for first, second in both.values())
    other = said(model.folder, "other.json")
    assert all(one[question] != other[question] for question in one)
    assert len({answers[0] for answers in one.values()}) > len(one) / 2, "the seeds are alike"


def test_at_temperature_0_the_seed_changes_nothing(ask: Ask, model: Workshop) -> None:
    for seed in "01":
        ask("--category", "greetings", "--temp", "0", "--seed", seed, "--json", f"{seed}.json")
    assert said(model.folder, "0.json") == said(model.folder, "1.json")


def test_the_system_prompt_is_the_recipes_or_the_given_one(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []

    def answer(speaker: Any, messages: Any, sampling: Any) -> Answer:
        heard.append(messages[0])
        return Answer("")

    monkeypatch.setattr(test_ood, "answer", answer)
    for arguments, system in (((), "be kind"), (("--system", "be rude"), "be rude")):
        ask("--category", "math", *arguments)
        assert heard[-1] == {"role": "system", "content": system}
    ask("--category", "math", "--system", "")
    assert heard[-1]["role"] == "user"


@pytest.mark.parametrize(("say", "share"), [("example", "100%"), ("", "0%")])
def test_right_answers_are_counted(
    say: str, share: str, ask: Ask, monkeypatch: pytest.MonkeyPatch, model: Workshop
) -> None:
    examples = {prompt.ask[-1]: prompt.examples[0] if say else "" for prompt in PROMPTS}

    def answer(speaker: Any, messages: Any, sampling: Any) -> Answer:
        return Answer(examples[messages[-1]["content"]])

    monkeypatch.setattr(test_ood, "answer", answer)
    code, out, _ = ask("--quiet", "--json", "x.json")
    assert code == 0
    assert "WRONG" not in out and "right\n" not in out.split("95 % sure")[0], "quiet isn't"
    cells = next(line for line in out.splitlines() if line.strip().startswith("all ")).split()
    assert cells[2] == cells[4] == cells[6] == share
    told = json.loads((model.folder / "x.json").read_text(encoding="utf-8"))
    assert told["right"] == float(share[:-1]) / 100
    assert told["stage"] == "sft" and told["sampling"]["temperature"] == 0.7
    assert {p["score"] for p in told["prompts"]} == {told["right"]}


@pytest.mark.parametrize(("length", "ended"), [(7, True), (8, False)])
def test_an_answer_of_all_tokens_that_it_may_have_was_cut_off(
    length: int, ended: bool, model: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model.folder / "checkpoints/micro/sft/best.pt"
    speaker = open_speaker(str(model.recipe), path, "cpu")
    ids = speaker.tokenizer.encode("a" * 8)[:1] * length
    monkeypatch.setattr(test_ood, "generate_ids", lambda *given: iter(ids))
    messages = [{"role": "user", "content": "hello"}]
    assert speaker.sampling.max_new_tokens == 8
    made = test_ood.answer(speaker, messages, speaker.sampling)
    assert made == Answer(speaker.tokenizer.decode(ids), ended)


@pytest.fixture
def prepared(model: Workshop) -> Iterator[Path]:
    """Stage 4's conversations, with two of the prompts and with what a third one paraphrases."""
    wrong = next(p for p in PROMPTS if p.category == "math" and p.paraphrase_of)
    sum_ = next(p for p in PROMPTS if p.sum)
    known = next(p for p in PROMPTS if p.category == "math" and p.paraphrase_of and p != wrong)
    turns = [wrong.ask[0].upper(), sum_.sum, known.paraphrase_of[0]]
    rows = [{"messages": [{"role": "user", "content": turn}]} for turn in turns]
    path = write_lines(Path(model.raw["sft"]["data"]["folder"]) / "train.jsonl", rows)
    yield path
    path.unlink()


def test_what_the_recipes_data_hold_is_named_and_left_out(
    ask: Ask, model: Workshop, prepared: Path, quick: None
) -> None:
    code, out, error = ask("--category", "math", "--json", "left.json")
    first, second = error.splitlines()
    assert code == 0 and first.startswith("left out, math: '") and first.endswith("' is trained")
    assert second == "left out, math: 61 + 29: 29 and 61 are trained together"
    asked = said(model.folder, "left.json")
    everything = [p for p in PROMPTS if p.category == "math"]
    assert len(asked) == len(everything) - 2
    assert not any(question in first for question in asked)
    assert f"checked against 3 distinct user turns of {prepared}" in out
    others = sum(bool(p.paraphrase_of) for p in everything) - 2
    assert f"\n{others} paraphrases of what isn't trained there count as unseen\n" in out
    math_ = next(line for line in out.splitlines() if line.strip().startswith("math  ")).split()
    assert math_[1] == "1" and math_[3] == str(len(asked) - 1)


def test_other_data_may_be_checked_or_none(
    ask: Ask, model: Workshop, prepared: Path, quick: None
) -> None:
    assert "not checked against training data" in ask("--category", "math", "--check-data")[1]
    talk = [{"messages": [{"role": "user", "content": PROMPTS[0].ask[0]}]}]
    other = write_lines(model.folder / "other.jsonl", talk)
    _, out, error = ask("--category", "greetings", "--check-data", str(other), str(prepared))
    assert "checked against 4 distinct user turns of " in out
    assert error.count("\n") == 1 and PROMPTS[0].ask[0] in error


def test_if_all_is_trained_nothing_is_asked(ask: Ask, model: Workshop) -> None:
    turns = [turn for prompt in PROMPTS for turn in prompt.questions]
    rows = [{"messages": [{"role": "user", "content": turn}]} for turn in turns]
    path = write_lines(model.folder / "all.jsonl", rows)
    code, out, error = ask("--check-data", str(path))
    assert (code, out) == (2, "")
    assert error == f"error: {path}: all {len(PROMPTS)} prompts are trained there; write others\n"


def test_control_characters_do_not_reach_the_terminal() -> None:
    result = Result(example("a\x1b[2J"), "unseen", [Answer("b\x07\x9b\nc", ended=False)])
    shown = test_ood.transcript(result)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)
    assert shown.splitlines()[-3:] == [
        "  answer  b\ufffd\ufffd", "          c ...", "   WRONG  never ends",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--temp", "-1"], "--temp must be from 0 to 10, got -1"),
        (["--temp", "nan"], "--temp must be from 0 to 10, got nan"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--samples", "2", "--temp", "0"], "--samples: at temperature 0 all answers"),
        (["--say", "x", "--temp", "1", "--samples", "2"], "leave --temp and --samples away"),
        (["--say", "x", "--seed", "0", "--device", "cpu"], "leave --device and --seed away"),
        (["--json", "."], "--json .: is a folder; name a file"),
        (["--json", "micro.yaml/x.json", "--category", "math"], "micro.yaml/x.json: can't be"),
        (["--check-data", "none.jsonl"], "--check-data none.jsonl: no such file"),
        (["--prompts", "none.yaml"], "none.yaml: no such file"),
        (["--checkpoint", "none.pt"], "no checkpoint at none.pt"),
        (["--recipe", "none"], "no recipe 'none'"),
        (["--device", "abacus"], "--device abacus: give auto, cuda"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments: list[str], problem: str, ask: Ask) -> None:
    code, _, error = ask(*arguments)
    assert code == 2
    assert error.startswith("error: ") and problem in error and error.count("\n") == 1


def test_one_answer_to_everything_is_scored_without_a_model(
    ask: Ask, model: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_ood, "open_speaker", None)
    code, out, error = ask("--say", "No. {question}", "--json", "no.json", "--quiet")
    assert (code, error) == (0, "") and out.startswith("no model: 'No. {question}'")
    asked = said(model.folder, "no.json")
    assert asked == {" / ".join(p.ask): [f"No. {p.ask[-1]}"] for p in PROMPTS}
    ask("--say", "No.", "--json", "no.json")
    report = json.loads((model.folder / "no.json").read_text(encoding="utf-8"))
    right = sum(not prompt.fault(Answer("No.")) for prompt in PROMPTS)
    assert right > 5 and report["right"] == pytest.approx(right / len(PROMPTS))
    assert report["say"] == "No." and "checkpoint" not in report


def test_prompts_of_ones_own_are_asked(ask: Ask, model: Workshop) -> None:
    own = {
        "category": "logic", "ask": "Is it?", "examples": ["Yes."],
        "score": {"by": "verdict", "right": "yes"},
    }  # fmt: skip
    path = model.folder / "own.yaml"
    path.write_text(yaml.safe_dump([own]), encoding="utf-8")
    assert ask("--prompts", str(path), "--json", "own.json")[0] == 0
    assert list(said(model.folder, "own.json")) == ["Is it?"]
    code, _, error = ask("--prompts", str(path), "--category", "math")
    assert code == 2 and error == f"error: {path} holds no prompts of math\n"
    path.write_text(yaml.safe_dump([{**own, "ask": "word " * 200}]), encoding="utf-8")
    code, _, error = ask("--prompts", str(path))
    assert code == 2 and "the message is too long: " in error


def test_nothing_is_asked_when_it_is_imported() -> None:
    """pytest, too, looks at files of this name: there is nothing in it for it to run."""
    assert not [name for name in vars(test_ood) if name.startswith(("test_", "Test"))]
