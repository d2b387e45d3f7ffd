"""What is asked of the training data, what counts as right, and what is shown and written."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, Workshop, write_lines

sys.path.insert(0, str(ROOT / "benchmarks"))

import trained_prompts
from trained_prompts import Answer, Asked, Categories, Marks, Prompt, Question, judge

from hamner.conversation import Speaker
from hamner.errors import UserError
from hamner.generation import Sampling, generate_text
from hamner.recipe import load_recipe
from hamner.stage import open_tokenizer
from hamner.tokenization import Tokenizer
from model import Transformer

SAMPLING = Sampling(0.7, 20, 0.9, 1.1, max_new_tokens=24, seed=1)
CONTEXT = 96
Talk = list[dict[str, str]]


def talk(*turns: str, system: str = "") -> Talk:
    before = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return [*before, *({"role": roles[n % 2], "content": text} for n, text in enumerate(turns))]


def question(category: str, text: str, *wanted: str) -> Question:
    return Question(talk(text), category, list(wanted))


# ------------------------------------------------------------------------------- the questions

ROWS: list[tuple[Talk, str]] = [
    (talk("hi", "Hello."), "greetings"),
    (talk("hey there", "Hi, hi."), "greetings"),
    (talk("who are you?", "I'm Al."), "identity"),
    (talk("2 x 3", "2 x 3 is 6."), "math"),
    (talk("3 + 4", "3 + 4 is 7."), "math"),
    (talk("and 3 + 4?", "3 + 4 is 7.", "hi", "Hello."), "greetings"),  # chained: the last one's
    (talk("what's up?", "Rain.", "is it?", "Yes."), "multi_turn"),
]
HELD_OUT = (talk("bye", "Farewell."), "greetings")
UNNAMED = talk("why?", "Because.")


@pytest.fixture
def micro(workshop: Workshop, data: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """With conversations of known categories, prepared for training but for one held out."""
    monkeypatch.chdir(workshop.folder)
    monkeypatch.setenv("COLUMNS", "80")
    rows = [{"messages": messages, "category": name} for messages, name in (*ROWS, HELD_OUT)]
    write_lines(data / "talk.jsonl", rows)
    prepare(workshop, [*(messages for messages, _ in ROWS), UNNAMED])
    return workshop


def train_file(micro: Workshop) -> Path:
    return Path(load_recipe(str(micro.recipe)).sft.data.folder) / "train.jsonl"


def prepare(micro: Workshop, talks: Sequence[Talk]) -> None:
    rows = [{"messages": messages, "source": "smalltalk", "repeat": 1} for messages in talks]
    write_lines(train_file(micro), rows)


def questions_of(micro: Workshop) -> list[Question]:
    categories = trained_prompts.read_categories(load_recipe(str(micro.recipe)))
    return trained_prompts.read_questions(train_file(micro), categories)


def test_the_first_questions_are_asked_with_their_categories(micro: Workshop) -> None:
    found = {q.messages[-1]["content"]: q.group for q in questions_of(micro)}
    assert found == {
        "hi": "greetings",
        "hey there": "greetings",
        "who are you?": "identity",
        "2 x 3": "math: products",
        "3 + 4": "math: other",
        "and 3 + 4?": "math: other",
        "what's up?": "multi_turn",
        "why?": "smalltalk",
    }


def test_what_is_held_out_is_neither_asked_nor_an_answer(micro: Workshop) -> None:
    questions = questions_of(micro)
    known = trained_prompts.answers_by_category(questions)
    assert known["greetings"] == {"Hello.", "Hi, hi."}
    assert known["math"] == {"2 x 3 is 6.", "3 + 4 is 7."}
    assert "bye" not in {q.messages[-1]["content"] for q in questions}


def test_a_question_is_asked_once_and_has_all_its_answers(micro: Workshop) -> None:
    talks = [talk("hi", "A."), talk("hi", "B.", "oh", "C."), talk("hi", "A.", "so", "D.")]
    prepare(micro, [*talks, talk("hi", "E.", system="be brief")])
    first, second = questions_of(micro)
    assert (first.messages, first.wanted) == (talk("hi"), ["A.", "B."])
    assert (second.messages, second.wanted) == (talk("hi", system="be brief"), ["E."])


def test_a_copy_is_known_whatever_its_case_and_space() -> None:
    categories = Categories()
    categories.add(talk("Hi  there", "Hello."), "greetings")
    assert categories.of_first(talk("hi there", "hello."), "hello.") == "greetings"
    assert categories.of_first(talk("hi you", "Hello."), "Hello.") is None


def test_an_answer_of_several_categories_decides_nothing() -> None:
    categories = Categories()
    chained = talk("so?", "Yes.", "hi", "Hello.")
    categories.add(chained, "greetings")
    for name in ("facts", "tech"):
        categories.add(talk(f"is it {name}?", "Yes."), name)
    assert categories.of_first(chained, "Yes.") == "greetings"


def test_others_with_their_answers_may_stand_before_a_question() -> None:
    questions = [question("facts", f"Q{n}?", f"A{n}.", f"B{n}.") for n in range(9)]
    questions.append(Question(talk("Q9?", system="be brief"), "facts", ["A9."]))
    found = trained_prompts.after_others(questions, questions, 3, seed=0)
    for one, before in zip(found, questions, strict=True):
        *system, last = before.messages
        assert one.messages[-1] == last and one.messages[: len(system)] == system
        assert (one.wanted, one.category) == (before.wanted, "facts")
        turns = [message["content"] for message in one.messages[len(system) : -1]]
        assert len(turns) == 6 and len(set(turns)) == 6 and last["content"] not in turns
        assert all(a == f"A{q[1]}." for q, a in zip(turns[::2], turns[1::2], strict=True))
        (gone,) = trained_prompts.departures(
            [Asked(one, [Answer("?")], [Marks(False, False, None)])]
        )
        assert gone["system"] == "".join(m["content"] for m in system)
        assert gone["question"] == last["content"]
    assert found == trained_prompts.after_others(questions, questions, 3, seed=0)
    assert found != trained_prompts.after_others(questions, questions, 3, seed=1)
    with pytest.raises(UserError, match="--after 10: there are only 10 questions"):
        trained_prompts.after_others(questions, questions, 10, seed=0)


# ------------------------------------------------------------------------------- what is right


@pytest.mark.parametrize(
    ("category", "text", "expected"),
    [
        ("greetings", "Hello.", (True, True, True)),
        ("greetings", "Good day.", (True, True, True)),  # its other answer
        ("greetings", "Hi, hi.", (False, False, True)),  # another question's
        ("greetings", "hello.", (False, False, False)),
        ("greetings", "Hello. 7", (False, False, False)),
        ("math", "3 + 4 is 7.", (True, True, None)),
        ("math", "That makes 7", (False, True, None)),
        ("math", "7 is 3 + 4", (False, False, None)),
        ("math", "3 + 4 is 17.", (False, False, None)),
        ("math", "3 + 4 is -7.", (False, False, None)),
        ("math", "Nobody knows.", (False, False, None)),
        ("math", "2 x 3 is 6.", (False, False, None)),  # another sum's
        ("math", "", (False, False, None)),
    ],
)
def test_marks(category: str, text: str, expected: tuple[bool, bool, bool | None]) -> None:
    asked = {
        "greetings": question("greetings", "hi", "Hello.", "Good day."),
        "math": question("math", "3 + 4", "3 + 4 is 7."),
    }
    known = {"Hello.", "Good day.", "Hi, hi.", "3 + 4 is 7.", "2 x 3 is 6."}
    assert judge(asked[category], Answer(text), known) == expected
    cut_off = judge(asked[category], Answer(text, ended=False), known)
    assert not any(cut_off)


def test_a_sum_without_a_number_is_right_word_for_word_alone() -> None:
    asked = question("math", "how many?", "None.")
    assert judge(asked, Answer("None."), set()) == (True, True, None)
    assert judge(asked, Answer("Nothing."), set()) == (False, False, None)


def test_samples_of_a_question_count_as_one_in_the_interval() -> None:
    marks = [Marks(n < 3, n < 3, n < 3) for n in range(4)]
    answers = [Answer("")] * 4
    asked = [Asked(question("greetings", str(n), "x"), answers, marks) for n in range(20)]
    counted = trained_prompts.count_up(asked)
    assert (counted["questions"], counted["answers"]) == (20, 80)
    right = counted["right"]
    assert (right["count"], right["percent"]) == (60, 75)
    for end in right["interval"]:  # Wilson's: 15 of 20 lie 1.96 standard errors from its ends
        error = 1.96 * math.sqrt(end * (100 - end) / 20)
        assert abs(75 - end) == pytest.approx(error, rel=1e-3)


# ------------------------------------------------------------------------------- asking


@pytest.mark.parametrize("seed", range(5))
def test_groups_hold_all_and_leave_room(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained_prompts, "BATCH", 7)
    rng = random.Random(seed)
    prompts = []
    for number in range(60):
        length = rng.randint(1, CONTEXT - 1)
        prompts.append(Prompt(number, [0] * length, rng.randint(1, CONTEXT - length)))
    groups = list(trained_prompts.in_groups(prompts, CONTEXT))
    assert sorted(p.number for group in groups for p in group) == list(range(60))
    lengths = [len(p.ids) for group in groups for p in group]
    assert lengths == sorted(lengths) and max(map(len, groups)) <= 7
    for group in groups:
        assert max(len(p.ids) for p in group) + max(p.need for p in group) <= CONTEXT


@pytest.fixture
def speaker(micro: Workshop) -> Speaker:
    """One that was never trained."""
    recipe = load_recipe(str(micro.recipe))
    torch.manual_seed(0)
    config = replace(recipe.model.config(), initializer_range=0.4)  # or it would say one id only
    tokenizer = open_tokenizer(recipe)
    model = Transformer(config).eval()
    return Speaker(model, tokenizer, SAMPLING, "", Path("dpo/best.pt"), "dpo", 3)


def test_groups_answer_as_one_alone_does(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedily, each question gets the answer that `generate_text` gives to it."""
    monkeypatch.setattr(trained_prompts, "BATCH", 3)
    texts = ["the red dog and the cat", "a", "who?", "the river", "under stone and tree", "3 + 4"]
    questions = [question("", text, "yes") for text in texts]
    greedy = replace(speaker.sampling, temperature=0)
    found = trained_prompts.ask(speaker, questions, greedy, 1)
    for asked, (answer,) in zip(questions, found, strict=True):
        prompt, _ = speaker.tokenizer.chat(asked.messages, answer_next=True)
        alone = "".join(generate_text(speaker.model, speaker.tokenizer, prompt, greedy))
        assert answer.text.rstrip("\ufffd") == alone.strip().rstrip("\ufffd")
    assert len({answer.text for (answer,) in found}) > 3


def test_a_seed_repeats_the_samples(speaker: Speaker) -> None:
    questions = [question("", text, "yes") for text in ("the dog", "the red bird and rain")]
    first, again = (trained_prompts.ask(speaker, questions, SAMPLING, 3) for _ in range(2))
    assert first == again and all(len(set(answers)) == 3 for answers in first)
    assert trained_prompts.ask(speaker, questions, replace(SAMPLING, seed=2), 3) != first


def test_what_does_not_fit_is_left_out(speaker: Speaker) -> None:
    fits, long = question("", "the dog", "yes"), question("", "dog " * CONTEXT, "yes")
    wordy = question("", "the dog", "yes, " * CONTEXT)
    found = trained_prompts.ask(speaker, [long, fits, wordy], SAMPLING, 2)
    assert [len(answers) for answers in found] == [0, 2, 0]
    with pytest.raises(UserError, match=r"of 2 questions none fits .* context of 96 tokens"):
        trained_prompts.ask(speaker, [long, wordy], SAMPLING, 1)


def test_a_long_answer_may_take_what_it_needs(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than max_new_tokens where that is wanted; one that is cut off there hasn't ended."""
    wanted = "the river and the tree and the stone"
    right = speaker.tokenizer.encode(wanted)
    made = [right, [*right, right[0]]]

    def generate(model: Any, prompts: Any, how: Sampling, *_: Any) -> list[list[int]]:
        return [ids[: how.max_new_tokens] for ids in made]

    monkeypatch.setattr(trained_prompts, "generate_batch", generate)
    (answers,) = trained_prompts.ask(
        speaker, [question("", "so?", wanted)], replace(SAMPLING, max_new_tokens=2), 2
    )
    assert answers == [Answer(wanted, True), Answer(speaker.tokenizer.decode(made[1]), False)]


# ------------------------------------------------------------------------------- all of it

SAID = {
    "hi": "Hello.",
    "hey there": "Hello.",  # not what it was taught, but a greeting
    "who are you?": "Who knows?",
    "2 x 3": "2 x 3 is 6.",
    "3 + 4": "I think it's 7.",
    "and 3 + 4?": "3 + 4 is 8.",
    "what's up?": "Rain.",
    "why?": "Because.",
}


@pytest.fixture
def call(
    micro: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run main; what it printed. At temperature 0 models say what stands in SAID."""
    tokenizer = open_tokenizer(load_recipe(str(micro.recipe)))
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=CONTEXT))
    said = {tuple(tokenizer.chat(talk(q), answer_next=True)[0]): a for q, a in SAID.items()}

    def open_speaker(recipe: str, path: Path | None, device: str) -> Speaker:
        where = path or Path("dpo/best.pt")
        return Speaker(model, tokenizer, SAMPLING, "", where, where.parent.name, 3)  # type: ignore

    def generate(_: Any, prompts: list[list[int]], how: Sampling, *__: Any) -> list[list[int]]:
        """Above 0, half of the answers are others."""
        spoil = [how.temperature and n % 2 for n in range(len(prompts))]
        answers = ["ham" if bad else said[tuple(p)] for bad, p in zip(spoil, prompts, strict=True)]
        return [tokenizer.encode(answer) for answer in answers]

    monkeypatch.setattr(trained_prompts, "open_speaker", open_speaker)
    monkeypatch.setattr(trained_prompts, "generate_batch", generate)

    def called(*arguments: str) -> str:
        command = ["trained_prompts.py", "--recipe", str(micro.recipe), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        assert trained_prompts.main() == 0
        return capsys.readouterr().out

    return called


def rows_of(output: str) -> dict[str, list[str]]:
    """The table's rows of several words, by the category that they begin with."""
    lines = [line.strip() for line in output.splitlines()]
    names = ("greetings", "identity", "math: products", "math: other", "multi_turn", "all")
    return {n: line[len(n) :].split() for n in names for line in lines if line.startswith(n + " ")}


def test_the_table_counts_by_category(call: Callable[..., str]) -> None:
    output = call()
    assert "8 of the 8 first questions of" in output
    assert "1  dpo/best.pt (stage dpo, step 3), the likeliest answers" in output
    assert "answered word for word: 4 of 8" in output
    rows = rows_of(output)
    #                       run asked  word for word  right         95 % sure    category's
    assert rows["greetings"] == "1 2 1 50.0 1 50.0 9.5 to 90.5 2 100.0".split()
    assert rows["identity"] == "1 1 0 0.0 0 0.0 0.0 to 79.3 0 0.0".split()
    assert rows["math: products"] == "1 1 1 100.0 1 100.0 20.7 to 100 -".split()
    assert rows["math: other"] == "1 2 0 0.0 1 50.0 9.5 to 90.5 -".split()
    assert rows["all"][:6] == ["1", "8", "4", "50.0", "5", "62.5"] and rows["all"][-1] == "-"
    table = output[output.index("Answers to trained questions") :].splitlines()
    assert max(map(len, table)) <= 80 and "…" not in output


def test_checkpoints_and_temperatures_stand_side_by_side(
    call: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "asked.json"
    output = call(
        "--checkpoint", "a/sft/best.pt", "a/dpo/best.pt", "--temp", "0", "0.7", "--samples", "4",
        "--json", str(out),
    )  # fmt: skip
    report = json.loads(out.read_text())
    assert [(run["stage"], run["sampling"]["temperature"]) for run in report["runs"]] == [
        ("sft", 0), ("sft", 0.7), ("dpo", 0), ("dpo", 0.7),
    ]  # fmt: skip
    assert [run["categories"]["all"]["answers"] for run in report["runs"]] == [8, 32, 8, 32]
    assert [run["categories"]["all"]["word_for_word"]["count"] for run in report["runs"]] == [
        4, 8, 4, 8,
    ]  # fmt: skip
    assert "2  a/sft/best.pt (stage sft, step 3), sampled at 0.7" in output
    table = output[output.index("Answers to trained questions") :].splitlines()
    places = [line.split()[line.startswith(" all") :][:2] for line in table[-6:] if line.strip()]
    assert places[-4:] == [["1", "8"], ["2", "32"], ["3", "8"], ["4", "32"]]


def test_the_file_holds_what_was_said_instead(call: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "asked.json"
    call("--json", str(out))
    (result,) = json.loads(out.read_text())["runs"]
    assert result["categories"]["math: other"]["of_category"] is None
    wrong = {row["question"]: row for row in result["not_word_for_word"]}
    assert wrong.keys() == {"hey there", "who are you?", "3 + 4", "and 3 + 4?"}
    assert wrong["hey there"] == {
        "category": "greetings", "system": "", "question": "hey there", "said": "Hello.",
        "ended": True, "wanted": ["Hi, hi."], "right": False, "of_category": True,
    }  # fmt: skip
    assert [wrong[q]["right"] for q in ("3 + 4", "and 3 + 4?")] == [True, False]


def test_so_many_are_drawn_by_the_seed(call: Callable[..., str], tmp_path: Path) -> None:
    drawn: set[str] = set()
    for seed in range(6):
        output = call("--count", "3", "--seed", str(seed))
        assert "3 of the 8 first questions" in output and rows_of(output)["all"][1] == "3"
        drawn.add(" ".join(rows_of(output)))
    assert len(drawn) > 1
    assert "8 of the 8" in call("--count", "99")


def test_the_answers_of_a_category_are_those_of_all_its_questions(
    call: Callable[..., str], tmp_path: Path
) -> None:
    """Also where the question that they belong to isn't drawn."""
    for seed in range(99):
        call("--count", "1", "--seed", str(seed), "--json", str(tmp_path / "one.json"))
        (result,) = json.loads((tmp_path / "one.json").read_text())["runs"]
        wrong = result["not_word_for_word"]
        if wrong and wrong[0]["question"] == "hey there":
            break
    assert wrong[0]["of_category"] and result["categories"]["greetings"]["questions"] == 1


def test_it_refuses(call: Callable[..., str], micro: Workshop, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--temp must be from 0 to 10, got 11"):
        call("--temp", "0", "11")
    with pytest.raises(UserError, match=r"--json .* is a folder: name a file"):
        call("--json", str(tmp_path))
    write_lines(train_file(micro), [{"messages": ROWS[0][0]}, {"messages": talk("hi")}])
    with pytest.raises(UserError, match=r"train\.jsonl, row 2: not a conversation \(no answer\)"):
        call()
    train_file(micro).unlink()
    with pytest.raises(UserError, match=r"train\.jsonl doesn't exist: run prepare_sft_data\.py"):
        call()


def test_the_tokenizer_gives_back_what_it_takes(micro: Workshop) -> None:
    """Word for word can't be had otherwise."""
    tokenizer: Tokenizer = open_tokenizer(load_recipe(str(micro.recipe)))
    for text in ("I'm Al.", "2 x 3 is 6.", "a  b , c", "naïve ☃"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_one_category_can_be_asked_alone() -> None:
    questions = [
        Question([{"role": "user", "content": name}], name, ["yes"]) for name in ("math", "facts")
    ]
    assert trained_prompts.of_categories(questions, ["facts"]) == questions[1:]
    with pytest.raises(UserError, match="--category fact: there are facts, math"):
        trained_prompts.of_categories(questions, ["fact"])
