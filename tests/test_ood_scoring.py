"""The scorers: what they let pass and what not, and that no parrot gets through all of them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

import generate_sft_v3
from hamner.errors import UserError
from ood_scoring import (
    CATEGORIES,
    GREETINGS,
    SCORERS,
    Answer,
    AnyScorer,
    Prompt,
    flaw,
    folded,
    numbers,
    read_prompts,
    triples,
    verdict,
    words,
)

LOW = 0.15  # of all prompts: what somebody who doesn't listen may get right


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return read_prompts()


def scorer(**given: Any) -> Any:
    return TypeAdapter(AnyScorer).validate_python(given)


def prompt(ask: str | list[str], **given: Any) -> Prompt:
    """One that takes any answer with a yes, a no, or a dog in it."""
    rest = {"examples": ["Yes."], "score": {"by": "words", "any": ["yes", "no", "dog"]}, **given}
    return Prompt.model_validate({"category": "logic", "ask": ask, **rest})


def right(prompts: list[Prompt], say: Callable[[Prompt], str]) -> float:
    return sum(not p.fault(Answer(say(p))) for p in prompts) / len(prompts)


# ------------------------------------------------------------------------------ words, numbers


def test_words_are_folded() -> None:
    assert words("What's UP, you two-faced _cat_?") == [
        "what's",
        "up",
        "you",
        "two",
        "faced",
        "cat",
    ]
    assert words("it\u2019s") == ["it's"]
    assert words("?! \u2026") == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("7 x 8 is 56.", [7, 8, 56]), ("It's fifty-six.", [56]), ("fifty six", [56]),
        ("1,234.5 and -3", [1234.5, -3]), ("10-3", [10, 3]), ("H2O", []), ("the 2nd of May", []),
        ("25% of $80", [25, 80]), ("Twelve, that one's easy", [12]), ("One.", [1]),
        ("3 is one more than two", [3]), ("version 1.5.", [1.5]), ("none", []),
        ("Two hundred and ten minutes", [210]), ("two, four and six", [2, 4, 6]),
        ("three thousand, four hundred seven", [3407]), ("ninetyfold", []), ("seventeen", [17]),
    ],
)  # fmt: skip
def test_numbers_are_read(text: str, found: list[float]) -> None:
    assert numbers(text) == found


def test_triples() -> None:
    assert triples(folded("One two, three FOUR")) == {
        ("one", "two", "three"), ("two", "three", "four"),
    }  # fmt: skip
    assert triples(folded("One, two")) == {("one", "two")}
    assert triples(folded("?!")) != triples(folded(":)"))


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("Yes.", "yes"), ("yep, it is", "yes"), ("Sure thing", "yes"), ("Well, of course!", "yes"),
        ("That's right.", "yes"), ("Definitely.", "yes"), ("I'd say yes", "yes"),
        ("No.", "no"), ("no it doesn't", "no"), ("Nope, not human.", "no"), ("Not at all", "no"),
        ("Definitely not.", "no"), ("Oh no, never.", "no"), ("I don't think so.", "no"),
        ("No idea.", ""), ("No coffee after noon.", ""), ("Not much.", ""), ("Never mind.", ""),
        ("Not sure.", ""), ("Nothing happens.", ""), ("Yesterday.", ""), ("Paris.", ""), ("", ""),
    ],
)  # fmt: skip
def test_yes_and_no_are_told_apart(text: str, given: str) -> None:
    assert verdict(text) == given


# -------------------------------------------------------------------------------------- scorers

MATCHES = [
    (dict(by="words", any=["paris"]), ["Paris.", "It is PARIS, of course"], ["Parish", "Rome", ""]),
    (
        dict(by="words", all=["polish", "welsh"], none=["dutch"]),
        ["Welsh and Polish."], ["Polish.", "Polish, Welsh, Dutch"],
    ),
    (
        dict(by="number", right=56),
        ["56", "Fifty-six.", "7 x 8 is 56.", "56, which is 7 times 8", "56. Easy, that one."],
        ["", "no number", "7 x 8 is 54.", "56 or 57", "56 and 63", "5,6"],
    ),
    (dict(by="verdict", right="yes"), ["Yes.", "Sure, why not"], ["No.", "Maybe.", ""]),
    (
        dict(by="verdict", right="no", also=["can't"]),
        ["No.", "Nope", "It can't."], ["Yes, it can't be helped.", "It can."],
    ),
    (
        dict(by="choice", right="sam", among=["tom", "ben", "sam"]),
        ["Sam.", "Sam, then Ben", "Ben beats Tom, so Sam"],
        ["Ben, then Sam", "Sam is out, so it's Tom", "Kim", ""],
    ),
    (dict(by="greeting", kind="hello"), ["Hey!", "Hello there."], ["They left.", "Goodbye"]),
    (dict(by="greeting", kind="hello", naming=["ida"]), ["Hi Ida!"], ["Hi!", "Ida", "Hi Idaho"]),
    (dict(by="greeting", kind="bye"), ["See you!", "Take care."], ["Hello", "I see"]),
    (dict(by="greeting", kind="thanks"), ["You're welcome.", "Anytime!"], ["Thanks", "Time"]),
    (
        dict(by="unable", about=["clock", "time"], none=[r"\d\d:\d\d"]),
        ["I can't tell the time.", "No clock in here."],
        ["I can't.", "It's time.", "I don't know, 12:30 is the time", ""],
    ),
    (
        dict(by="stand", sides=["coffee", "tea"]),
        ["Coffee.", "I'd take tea."],
        ["Milk.", "It depends: coffee or tea", "As for coffee, I don't have opinions", ""],
    ),
    (
        dict(by="stand", about=["puns?"]),
        ["I love puns.", "A pun? Never."],
        ["I love it.", "Puns exist.", "Puns are neutral", "Both have pros and cons, like puns"],
    ),
    (
        dict(by="prose", about=["sea"], least=4, most=8),
        ["The lamp shone over the sea.", "Ships at sea saw it!"],
        ["The sea.", "The lamp shone over the land.", "The lamp shone over the sea and",
         "The lamp shone over the sea and all of the ships.", ""],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "good", "bad"), MATCHES)
def test_a_scorer_tells_right_from_wrong(
    given: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    made = scorer(**given)
    assert {text: made.fault(text, "what is 7 x 8?") for text in good} == dict.fromkeys(good, "")
    assert [text for text in bad if not made.fault(text, "what is 7 x 8?")] == []


def test_every_scorer_is_tested() -> None:
    assert {given["by"] for given, _, _ in MATCHES} == set(SCORERS)


@pytest.mark.parametrize("kind", GREETINGS)
def test_each_kind_of_greeting_is_asked_for_and_answered(kind: str, prompts: list[Prompt]) -> None:
    own = [p for p in prompts if getattr(p.score, "kind", "") == kind]
    assert own, "the kind has no prompt"
    assert not own[0].fault(Answer(own[0].examples[0]))


@pytest.mark.parametrize(
    "given",
    [
        dict(by="words"), dict(by="words", any=["("]), dict(by="words", any=[".*"]),
        dict(by="choice", right="a", among=["b", "c"]), dict(by="stand"),
        dict(by="stand", sides=["a"], about=["b"]), dict(by="prose", about=[]),
        dict(by="number", right="many"), dict(by="greeting", kind="wave"),
    ],
)  # fmt: skip
def test_a_scorer_that_asks_for_nothing_or_nonsense_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        scorer(**given)


# ----------------------------------------------------------------------- what no answer may be


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "says nothing"), (" \n...", "says nothing"),
        ("Sure.\nuser: and you?", "another role"), ("Yes.\nassistant\nNo.", "another role"),
        ("Yes <|im_end|>", "another role"), ("no no no no", "repeats itself"),
        ("the cat saw the cat and the cat saw the cat and the cat saw the cat", "repeats itself"),
        ("I'm ChatGPT.", "I'm ChatGPT"), ("I was made by Google.", "made by Google"),
        ("OpenAI trained me", "OpenAI trained me"), ("My name is Max.", "My name is Max"),
        ("I'm a real person.", "I'm a real person"), ("I am an actual woman", ""),
        ("I was developed by a large technology company.", "by a large technology company"),
    ],
)  # fmt: skip
def test_flaws_of_any_answer(text: str, what: str) -> None:
    assert what in flaw(Answer(text))


@pytest.mark.parametrize(
    "text",
    [
        "I'm Al.", "My name is Al, spelled A, L.", "I was not made by Google.",
        "La la la, in text.",
        "I wasn't made by Microsoft, David Hamner made me.", "I'm not a person.",
        "No company made me.", "The user decides.", "It's 10 x 10, and ten tens are one hundred.",
        "A cat is a cat is a cat, some say.",
    ],
)  # fmt: skip
def test_good_answers_have_no_flaw(text: str) -> None:
    assert flaw(Answer(text)) == ""


def test_an_answer_that_was_cut_off_is_wrong() -> None:
    assert flaw(Answer("A fine answer.", ended=False)) == "never ends"


@pytest.mark.parametrize("say", ["is this a DOG", "Is this a dog?", "You ask: is this a dog?"])
def test_an_echo_is_no_answer(say: str) -> None:
    assert prompt("Is this a dog?").fault(Answer(say))


def test_what_follows_an_echo_counts() -> None:
    asked = prompt("Is this a dog?")
    assert not asked.fault(Answer("Is this a dog? Yes."))
    assert asked.fault(Answer("Is this a dog? Maybe."))
    assert (
        prompt("And now, is this a dog?").fault(Answer("is this a dog")) == "repeats the question"
    )


def test_earlier_turns_may_be_quoted_in_part_and_not_in_whole() -> None:
    asked = prompt(
        ["I own a small dog called Rex.", "Nice.", "What do I own?"],
        score={"by": "words", "any": ["dog"]}, examples=["A small dog."],
    )  # fmt: skip
    assert not asked.fault(Answer("a small dog called Rex"))
    assert asked.fault(Answer("I own a small dog called Rex."))


# ------------------------------------------------------------------------------ the prompts


def test_there_are_enough_prompts_of_every_category_and_kind(prompts: list[Prompt]) -> None:
    counts = Counter((p.category, bool(p.paraphrase_of)) for p in prompts)
    assert len(prompts) >= 100
    assert set(counts) == {(name, kind) for name in CATEGORIES for kind in (True, False)}
    assert min(counts.values()) >= 7
    assert 0.4 <= sum(bool(p.paraphrase_of) for p in prompts) / len(prompts) <= 0.6


def test_no_two_prompts_are_alike(prompts: list[Prompt]) -> None:
    asked = Counter(" / ".join(" ".join(words(turn)) or turn for turn in p.ask) for p in prompts)
    assert [text for text, count in asked.items() if count > 1] == []


def test_the_examples_are_right_and_the_sums_add_up(prompts: list[Prompt]) -> None:
    assert right(prompts, lambda p: p.examples[0]) == 1
    assert sum(len(p.examples) for p in prompts) > 2 * len(prompts)
    sums = [p for p in prompts if p.sum]
    assert len(sums) >= 8
    assert all(eval(p.sum) == p.score.right for p in sums)  # type: ignore[union-attr]


def test_what_training_answers_is_right_for_a_paraphrase_too(prompts: list[Prompt]) -> None:
    taught: dict[tuple[str, ...], set[str]] = {}
    for talk in [*generate_sft_v3.conversations(), *generate_sft_v3.plain_conversations()]:
        for asked, said in itertools.pairwise(m["content"] for m in talk["messages"]):
            taught.setdefault(folded(asked), set()).add(said)
    pairs = [
        (p, answer) for p in prompts for text in p.paraphrase_of
        for answer in taught.get(folded(text), ())
    ]  # fmt: skip
    wrong = {
        (p.ask[-1], answer): fault for p, answer in pairs if (fault := p.fault(Answer(answer)))
    }
    assert len(pairs) > 150
    assert len(wrong) < 0.05 * len(pairs), wrong  # a bear's tale is another one than a robot's


def test_follow_ups_have_something_to_follow(prompts: list[Prompt]) -> None:
    assert {p.category for p in prompts if len(p.ask) > 1} == {"follow_up"}
    assert all(len(p.ask) > 1 for p in prompts if p.category == "follow_up")


ECHOES: list[Callable[[str], str]] = [
    lambda asked: asked,
    lambda asked: asked.upper().rstrip("?!."),
    lambda asked: f"You asked: {asked}",
    lambda asked: f"{asked} {asked}",
    lambda asked: " ".join(asked.split()[1:]),
    lambda asked: " ".join(asked.split()[-6:]),
    lambda asked: f"Yes, {asked}",
    lambda asked: f"I don't know {asked}",
]


@pytest.mark.parametrize("echo", ECHOES)
def test_an_echo_gets_hardly_anything_right(
    echo: Callable[[str], str], prompts: list[Prompt]
) -> None:
    assert right(prompts, lambda p: echo(p.ask[-1])) < LOW
    assert right(prompts, lambda p: echo(" ".join(p.ask))) < LOW


CONSTANTS = [
    "", "...", "?", "Yes.", "No.", "Maybe.", "I don't know.", "I can't do that.", "Hello!", "42",
    "I'm Al, a small language model made by David Hamner.", "I like it, it's good.",
    "No, I can't see or know that, I have no eyes, no clock and no internet, only words.",
    "Hi! Yes. I'm Al, David Hamner made me on one RTX 3090, I can't know the time, I like it best.",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen",
    "red green blue coffee tea cats dogs Monday Tuesday Wednesday Tom Ben Sam sea box people words",
]  # fmt: skip


@pytest.mark.parametrize("text", CONSTANTS)
def test_the_same_answer_to_everything_gets_hardly_anything_right(
    text: str, prompts: list[Prompt]
) -> None:
    assert right(prompts, lambda p: text) < LOW


def trained_answers(talks: list[dict[str, Any]]) -> set[str]:
    return {m["content"] for talk in talks for m in talk["messages"] if m["role"] == "assistant"}


def test_no_trained_answer_has_a_flaw() -> None:
    answers = trained_answers(generate_sft_v3.conversations())
    assert len(answers) > 1000
    assert {text: flaw(Answer(text)) for text in answers if flaw(Answer(text))} == {}


def test_no_trained_answer_does_for_everything(prompts: list[Prompt]) -> None:
    answers = trained_answers(generate_sft_v3.plain_conversations())
    phrases = [text for text in answers if not numbers(text)]
    shares = {text: right(prompts, lambda p, text=text: text) for text in phrases}  # type: ignore[misc]
    assert len(shares) > 50
    assert {text: share for text, share in shares.items() if share >= LOW} == {}


def test_an_answer_to_one_prompt_is_wrong_for_the_others(prompts: list[Prompt]) -> None:
    shares = {p.ask[-1]: right(prompts, lambda q, p=p: p.examples[0]) for p in prompts}  # type: ignore[misc]
    assert {text: share for text, share in shares.items() if share >= LOW} == {}
    assert sum(shares.values()) / len(shares) < 0.04  # its own is 0.006 of it


# ---------------------------------------------------------------------------- reading the file

GOOD = {
    "category": "math", "ask": "One and one?", "examples": ["2"],
    "score": {"by": "number", "right": 2},
}  # fmt: skip


def written(folder: Path, *entries: Any) -> Path:
    path = folder / "prompts.yaml"
    path.write_text(yaml.safe_dump(list(entries)), encoding="utf-8")
    return path


def test_messages_carry_a_system_prompt_if_there_is_one(tmp_path: Path) -> None:
    own = {**GOOD, "ask": ["One?", "Yes.", "And one?"], "system": "be brief"}
    first, second = read_prompts(written(tmp_path, GOOD, own))
    assert first.messages("") == [{"role": "user", "content": "One and one?"}]
    assert first.messages("be kind")[0] == {"role": "system", "content": "be kind"}
    roles = [message["role"] for message in second.messages("be kind")]
    assert roles == ["system", "user", "assistant", "user"]
    assert second.messages("be kind")[0]["content"] == "be brief"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"catgory": "math"}, "no. 1: catgory: unknown key (did you mean 'category'?)"),
        ({"category": "maths"}, "no. 1: category: must be 'greetings', "),
        ({"ask": ["One?", "Two."]}, "no. 1: ask must be a text, or texts of user and Al in turn"),
        ({"ask": " "}, "no. 1: ask must be a text"),
        ({"ask": None}, "no. 1: ask: must be a valid"),
        ({"examples": ["2", "3"]}, "no. 1: the example '3' is not right: says 3, not 2"),
        ({"sum": "1 plus 1"}, "no. 1: sum: "),
        ({"score": {"by": "number"}}, "no. 1: score.right: is missing"),
        ({"score": {"by": "number", "right": 2, "rigth": 2}}, "score.rigth: unknown key (did you"),
        ({"score": {"by": "numbr", "right": 2}}, "no. 1: score.by: must be one of words, number, "),
        ({"score": {"right": 2}}, "no. 1: score.by: must be one of words, number, "),
        ({"score": {"by": "words", "any": ["("]}}, "no. 1: score.any[0]: not a regular expression"),
        ({"score": {"by": "words", "any": ["x*"]}}, "no. 1: score.any[0]: matches an empty text"),
        ({"score": {"by": "words"}}, "no. 1: score: give any or all"),
    ],
)  # fmt: skip
def test_a_faulty_prompt_is_told_in_one_line(
    change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = written(tmp_path, {**GOOD, **change})
    with pytest.raises(UserError) as error:
        read_prompts(path)
    assert f"{path}, prompt " in str(error.value)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_prompts(written(tmp_path, {**GOOD, "ask": 1}, GOOD, {**GOOD, "examples": ["4"]}, "x"))
    lines = str(error.value).splitlines()
    assert [line.split("prompt ")[1][:5] for line in lines] == ["no. 1", "no. 3", "no. 4"]


def test_a_file_that_is_none_or_no_list_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "none.yaml")
    path = tmp_path / "prompts.yaml"
    for text, problem in (("a: 1", "is no YAML list"), ("- [", "line 2: not valid YAML")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=problem):
            read_prompts(path)
