"""Tests of the generated exercises: every question is solved a second time by other means."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import synthetic_tasks
from synthetic_tasks import DIFFICULTIES, FAMILIES, Task, check, make_task

LEVELS = [(family, level) for family in FAMILIES for level in DIFFICULTIES]
DRAWS = 150


def draws(family: str, level: int, count: int = DRAWS) -> list[Task]:
    rng = random.Random(f"{family}/{level}")
    return [make_task(rng, family, level) for _ in range(count)]


def calculate(expression: str) -> int:
    assert re.fullmatch(r"[\d+\-* ]+", expression)
    return int(eval(expression))


def parts(pattern: str, text: str) -> tuple[Any, ...]:
    match = re.fullmatch(pattern, text)
    assert match, text
    return match.groups()


# Independent solvers, from the question alone.


def solve_arithmetic(question: str) -> str:
    return str(calculate(*parts(r"Calculate: (.+)", question)))


def solve_counting(question: str) -> str:
    head, _, listing = question.rstrip(".").partition(": ")
    tally = Counter(listing.split(", "))
    if head == "Count the words":
        return str(tally.total())
    return str(tally[parts(r'Count how often "(\w+)" appears', head)[0]])


def solve_brackets(question: str) -> str:
    (string,) = parts(r"Are these brackets balanced: (.+)\?", question)
    pending = []
    for mark in string:
        if mark in "([{":
            pending.append({"(": ")", "[": "]", "{": "}"}[mark])
        elif mark in ")]}" and (not pending or mark != pending.pop()):
            return "no"
    return "no" if pending else "yes"


def parse_listops(tokens: list[str]) -> tuple[int, int]:
    """Value and nesting depth; takes its tokens from the front of the list."""
    token = tokens.pop(0)
    if token.isdigit():
        assert len(token) == 1
        return int(token), -1
    assert token == "["
    name, children = tokens.pop(0), []
    while tokens[0] != "]":
        children.append(parse_listops(tokens))
    tokens.pop(0)
    assert 2 <= len(children) <= 4
    values = sorted(value for value, _ in children)
    value = {"MIN": values[0], "MAX": values[-1], "SUM": sum(values)}[name]
    return value, 1 + max(depth for _, depth in children)


def solve_listops(question: str) -> str:
    tokens = re.findall(r"[\[\]]|\w+", question)
    value, _ = parse_listops(tokens)
    assert not tokens
    return str(value)


def solve_sorting(question: str) -> str:
    order, listing = parts(r"Sort in (\w+) order: (.+)\.", question)
    rest, ordered = [int(number) for number in listing.split(", ")], []
    while rest:
        pick = min(rest) if order == "ascending" else max(rest)
        rest.remove(pick)
        ordered.append(str(pick))
    return ", ".join(ordered)


def solve_copying(question: str) -> str:
    pattern = r'Repeat the (word|phrase) "([a-z ]+)" (\d+) times(, separated by \|)?\.'
    kind, unit, times, separated = parts(pattern, question)
    assert (kind == "phrase") == bool(separated) == (" " in unit)
    text = str(unit)
    for _ in range(int(times) - 1):
        text += (" | " if separated else " ") + unit
    return text


def solve_recall(question: str) -> str:
    *facts, ask = re.split(r"(?<=\.) ", question)
    known: dict[str, str] = {}
    for fact in facts:
        fact = fact.rstrip(".")
        if match := re.fullmatch(r"(An? \w+) belongs to (\w+)", fact):
            key, value = match[2], match[1].lower()
        elif match := re.fullmatch(r"(\w+) (?:has|owns) (an? \w+)", fact):
            key, value = match[1], match[2]
        else:
            match = re.fullmatch(r"The (?:color of the )?(\w+) is (\w+)", fact)
            assert match, fact
            key, value = match[1], match[2]
        assert key not in known
        known[key] = value
    keys = [word for word in re.findall(r"\w+", ask) if word in known]
    assert len(keys) == 1
    return known[keys[0]]


def solve_logic(question: str) -> str:
    rules: dict[str, str] = {}
    facts = []
    for sentence in question.rstrip(".").split(". "):
        if sentence.startswith("If "):
            cause, effect = parts(r"If (.+), then (.+)", sentence)
            rules[cause] = effect
        else:
            facts.append(sentence)
    (state,) = facts
    assert state in rules
    while state in rules:
        state = rules[state]
    return f"Therefore {state}."


def solve_comparison(question: str) -> str:
    relation = re.search(r"bigger|smaller|largest|smallest", question)
    assert relation
    sides = re.findall(r"\d+ [+*] \d+|\d+", question)
    values = [calculate(side) for side in sides]
    if len(set(values)) == 1:
        return "equal"
    best = min(values) if relation[0].startswith("small") else max(values)
    assert values.count(best) == 1
    return str(sides[values.index(best)])


SOLVERS: dict[str, Callable[[str], str]] = {
    "arithmetic": solve_arithmetic,
    "counting": solve_counting,
    "brackets": solve_brackets,
    "listops": solve_listops,
    "sorting": solve_sorting,
    "copying": solve_copying,
    "recall": solve_recall,
    "logic": solve_logic,
    "comparison": solve_comparison,
}


@pytest.mark.parametrize(("family", "level"), LEVELS)
def test_answers_agree_with_an_independent_solver(family: str, level: int) -> None:
    for task in draws(family, level):
        assert task.answer == SOLVERS[family](task.question), task
        assert (task.family, task.difficulty) == (family, level)
        assert task.text.startswith(task.question) and task.text.endswith(task.answer)


def test_families_are_complete_and_examples_read_as_documented() -> None:
    assert set(FAMILIES) == set(SOLVERS) and list(DIFFICULTIES) == [1, 2, 3, 4, 5]
    assert Task("arithmetic", 1, "Calculate: 3 + 4", "7").text == "Calculate: 3 + 4 = 7"
    assert Task("listops", 1, "[MAX 2 1]", "2").text == "[MAX 2 1] = 2"
    assert Task("logic", 1, "If a, then b. a.", "Therefore b.").text.endswith("a. Therefore b.")
    assert Task("counting", 1, "Count the words: a, b.", "2").text.endswith("b. Answer: 2")


# What each level of difficulty contains.


@pytest.mark.parametrize("level", DIFFICULTIES)
def test_arithmetic_ranges(level: int) -> None:
    ranges = {1: [(1, 10)] * 2, 2: [(1, 20)] * 2, 3: [(1, 100)] * 2, 4: [(10, 500)] * 2}
    ranges[5] = [(10, 500), (10, 500), (1, 200)]
    tasks = draws("arithmetic", level)
    for task in tasks:
        numbers = [int(number) for number in re.findall(r"\d+", task.question)]
        assert all(a <= n <= b for n, (a, b) in zip(numbers, ranges[level], strict=True))
    signs = {sign for task in tasks for sign in re.findall(r" ([-+*]) ", task.question)}
    assert signs == (set("+-*") if level in (3, 4) else set("+-"))
    assert any(task.answer.startswith("-") for task in tasks)


@pytest.mark.parametrize("level", DIFFICULTIES)
def test_counting_copying_sorting_and_recall_sizes(level: int) -> None:
    counts = {int(task.answer) for task in draws("counting", level)}
    assert counts == set(range(2, 3 + 2 * level))
    times = {int(re.findall(r"\d+", task.question)[0]) for task in draws("copying", level)}
    assert times == set(range(2, 3 + level))
    lists = [list(map(int, task.answer.split(", "))) for task in draws("sorting", level)]
    assert {len(numbers) for numbers in lists} == set(range(3, 4 + level))
    assert all(0 <= number <= 10 * level for numbers in lists for number in numbers)
    facts = {task.question.count(".") for task in draws("recall", level)}
    assert facts == set(range(2, 3 + 2 * level))


@pytest.mark.parametrize("level", DIFFICULTIES)
def test_variants_start_at_their_level(level: int) -> None:
    def share(family: str, text: str) -> float:
        return sum(text in task.question for task in draws(family, level)) / DRAWS

    for family, text, first in [
        ("counting", "how often", 3),
        ("copying", "phrase", 3),
        ("sorting", "descending", 4),
        ("recall", "belongs to", 3),
        ("comparison", "small", 3),
    ]:
        assert (share(family, text) > 0.2) if level >= first else share(family, text) == 0, family
    assert share("comparison", "equal") == (level == 5)
    assert share("comparison", "est:") == (level == 4)


@pytest.mark.parametrize("level", DIFFICULTIES)
def test_brackets_shape_and_balance(level: int) -> None:
    tasks = draws("brackets", level, 2000)
    strings = [task.question.removeprefix("Are these brackets balanced: ")[:-1] for task in tasks]
    assert set(re.sub(r"[a-z]", "", "".join(strings))) == set("()[]{}"[: 2 * min(level, 3)])
    sizes = {len(re.sub(r"[a-z]", "", t.question.partition(": ")[2])) for t in tasks}
    assert max(sizes) - 1 == 2 * min(level + 1, 6)
    assert 0.45 < sum(task.answer == "yes" for task in tasks) / len(tasks) < 0.55
    nouns = sum(bool(re.search("[a-z]", string)) for string in strings) / len(strings)
    assert (0.4 < nouns < 0.6) if level > 1 else (0.85 < nouns < 0.95)


@pytest.mark.parametrize("level", DIFFICULTIES)
def test_listops_depth_logic_rules_and_comparison_size(level: int) -> None:
    for task in draws("listops", level):
        depth = parse_listops(re.findall(r"[\[\]]|\w+", task.question))[1]
        assert depth == {1: 0, 2: 0, 3: 1, 4: 1, 5: 2}[level]
    for task in draws("logic", level):
        assert task.question.count("If ") == {1: 1, 2: 1, 3: 2, 4: 2, 5: 3}[level]
        causes = re.findall(r"If (.+?), then (.+?)\.", task.question)
        chained = sum(effect == cause for _, effect in causes for cause, _ in causes)
        assert chained == (level >= 4)
    limit = {1: 100, 2: 100, 3: 500, 4: 1000}.get(level, 0)
    for task in draws("comparison", level) if limit else []:
        numbers = [int(number) for number in re.findall(r"\d+", task.question)]
        assert len(numbers) in ((3, 4) if level == 4 else (2,))
        assert min(numbers) >= 1 and max(numbers) <= limit


def test_any_fact_may_be_asked_for() -> None:
    places: Counter[int] = Counter()
    for task in draws("recall", 1):
        *facts, ask = re.split(r"(?<=\.) ", task.question)
        key = ask.rstrip("?").replace(" have", "").split()[-1]
        places[[key in fact.rstrip(".").split() for fact in facts].index(True)] += 1
    assert len(places) == 4


def test_sum_against_product_is_sometimes_equal_and_has_no_favorite_side() -> None:
    answers = [task.answer for task in draws("comparison", 5, 1000)]
    assert 0.15 < answers.count("equal") / 1000 < 0.35
    assert 0.3 < sum("+" in answer for answer in answers) / 1000 < 0.5


# Grading.


@pytest.mark.parametrize(("family", "level"), LEVELS)
def test_check_accepts_the_answer_plain_and_in_a_sentence(family: str, level: int) -> None:
    for task in draws(family, level, 60):
        answer = task.answer
        for text in (answer, f"  {answer.upper()} \n", f"The answer is: {answer}", f"**{answer}**"):
            assert check(task, text), (task, text)
        if family != "copying":
            assert check(task, f"The answer is {answer}."), task
        assert check(task, task.text.removeprefix(task.question)), task


def wrong_answers(task: Task) -> list[str]:
    answer = task.answer
    if task.family in ("arithmetic", "counting", "listops"):
        value = int(answer)
        near = [value + 1, value - 1, value + 10, 10 * value + 1]
        far = [f"1{abs(value)}", f"{value}.5", f"{value} or {value + 1}", f"It is not {value}."]
        return [*map(str, near), *far, *([str(-value)] if value else [])]
    if task.family == "brackets":
        other = {"yes": "no", "no": "yes"}[answer]
        return [other, f"{other}, it is", "yes and no", f"{answer}, or rather {other}"]
    if task.family == "sorting":
        numbers = answer.split(", ")
        lists = [numbers[::-1], numbers[1:] + numbers[:1], numbers[:-1], [*numbers, numbers[-1]]]
        return [", ".join(w) for w in lists if w != numbers]
    if task.family == "copying":
        separator = " | " if "|" in answer else " "
        units = answer.split(separator)
        unit = units[0]
        lists = [units[1:], [*units, unit], [*units[1:], "wolf"], [*units[1:], f"{unit}s"]]
        return [separator.join(w) for w in lists]
    if task.family == "recall":
        others = ["red", "blue"] if " " not in answer else ["a key", "a hat"]
        other = next(word for word in others if word != answer)
        return [other, f"{answer} and {other}", f"{answer} or {other}", f"not {answer}"]
    if task.family == "logic":
        name, state = parts(r"Therefore (\w+) is (\w+)\.", answer)
        fact = task.question.rpartition(". ")[2]
        wrong = [f"Therefore {fact}", f"Therefore {name} is un{state}.", state, name]
        return [*wrong, f"Therefore {name} is not {state}.", f"{answer} And {name} is green."]
    sides = [s for s in re.findall(r"\d+ [+*] \d+|\d+", task.question) if s != answer]
    if answer == "equal":
        return [*sides, "not equal", "unequal", "they aren't equal"]
    return [*sides, f"{answer} or {sides[0]}", "equal", f"not {answer}"]


@pytest.mark.parametrize(("family", "level"), LEVELS)
def test_check_refuses_wrong_answers(family: str, level: int) -> None:
    for task in draws(family, level, 60):
        for wrong in ["", "I do not know.", f"Maybe {task.answer}", *wrong_answers(task)]:
            assert not check(task, wrong), (task, wrong)
        assert not check(task, f"The answer is: {wrong_answers(task)[0]}"), task


SEVEN = Task("arithmetic", 1, "Calculate: 3 + 4", "7")
MINUS = Task("arithmetic", 1, "Calculate: 3 - 10", "-7")
LARGE = Task("arithmetic", 4, "Calculate: 300 * 400", "120000")
THREE = Task("counting", 1, "Count the words: cat, dog, egg.", "3")
OPS = Task("listops", 3, "[MAX 2 [MIN 4 7] 1]", "4")
BALANCED = Task("brackets", 1, "Are these brackets balanced: ()?", "yes")
BROKEN = Task("brackets", 1, "Are these brackets balanced: ((?", "no")
LIST = Task("sorting", 1, "Sort in ascending order: 9, 3, 5.", "3, 5, 9")
COPY = Task("copying", 1, 'Repeat the word "cat" 3 times.', "cat cat cat")
PHRASE = Task(
    "copying", 3, 'Repeat the phrase "red cat" 2 times, separated by |.', "red cat | red cat"
)
COLOR = Task("recall", 1, "The key is red. Anna has an egg. What color is the key?", "red")
OWNER = Task("recall", 1, "The key is red. Anna has an egg. What does Anna have?", "an egg")
CHAIN = Task(
    "logic",
    5,
    "If Ben is sad, then Mia is late. If Mia is late, then Leo is cold. "
    "If Zoe is calm, then Sam is busy. Ben is sad.",
    "Therefore Leo is cold.",
)
BIGGER = Task("comparison", 1, "Which is bigger: 45 or 72?", "72")
SUM = Task("comparison", 5, "Which is bigger, 12 + 9 or 4 * 5, or are they equal?", "12 + 9")
EQUAL = Task("comparison", 5, "Which is bigger, 12 + 8 or 4 * 5, or are they equal?", "equal")


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        (SEVEN, "3 + 4 = 7"),
        (SEVEN, "3+4 is 7!"),
        (SEVEN, "Three plus four is 7"),
        (SEVEN, "seven"),
        (SEVEN, "7.0"),
        (MINUS, "3 - 10 = -7"),
        (MINUS, "minus 7"),
        (MINUS, "\u22127"),
        (MINUS, "negative seven"),
        (LARGE, "300 \u00d7 400 = 120,000"),
        (THREE, "There are three words in the list."),
        (OPS, "[MAX 2 [MIN 4 7] 1] = 4"),
        (BALANCED, "Yes, they are."),
        (BALANCED, "The brackets are correctly matched."),
        (BALANCED, "They are not unbalanced."),
        (BROKEN, "No, they are not."),
        (BROKEN, "The string isn't properly balanced."),
        (BROKEN, "Unbalanced."),
        (LIST, "[3, 5, 9]"),
        (LIST, "3 < 5 < 9"),
        (LIST, "- 3\n- 5\n- 9"),
        (LIST, "9, 3, 5 becomes 3, 5 and 9."),
        (COPY, "Sure, here it is: cat, cat, cat."),
        (COPY, '"cat" "cat" "cat"'),
        (PHRASE, "Red cat|red cat"),
        (COLOR, "The key is RED."),
        (OWNER, "egg"),
        (OWNER, "Anna has an egg."),
        (CHAIN, "Leo is cold"),
        (CHAIN, "Since Ben is sad, Mia is late, so Leo is cold."),
        (CHAIN, "If Ben is sad, then Mia is late. So in the end Leo is cold."),
        (BIGGER, "72 is larger than 45."),
        (SUM, "12+9"),
        (SUM, "They are not equal: 12 + 9 = 21 is more than 4 * 5 = 20."),
        (SUM, "21 is bigger"),
        (EQUAL, "Both are the same."),
        (EQUAL, "They are equal, since 12 + 8 = 20 and 4 * 5 = 20."),
    ],
)
def test_check_is_tolerant_of_form(task: Task, answer: str) -> None:
    assert check(task, answer)


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        (SEVEN, "17"),
        (SEVEN, "-7"),
        (SEVEN, "- 7"),
        (SEVEN, "7.5"),
        (SEVEN, "7th"),
        (SEVEN, "3 + 4"),
        (SEVEN, "3 + 4 = 8, so 7"),
        (SEVEN, "thirty-seven"),
        (SEVEN, "More than 7."),
        (SEVEN, "about 7"),
        (SEVEN, "7 is wrong"),
        (SEVEN, "9" * 5000),
        (SUM, "9" * 5000),
        (MINUS, "7"),
        (LARGE, "120"),
        (THREE, "thirty three"),
        (OPS, "[MAX 2 [MIN 4 7] 1]"),
        (BALANCED, "Yes, they are not balanced."),
        (BALANCED, "not balanced"),
        (BALANCED, "Hello."),
        (BROKEN, "No, they are balanced."),
        (BROKEN, "I am not sure."),
        (BROKEN, "not unbalanced"),
        (LIST, "5, 3, 9"),
        (LIST, "3, 5"),
        (LIST, "3, 5, 9, 9"),
        (LIST, "-3, 5, 9"),
        (LIST, "9, 3, 5"),
        (COPY, "cat cat"),
        (COPY, "cat cat dog cat"),
        (COPY, "catcatcat"),
        (COPY, "cat cat cat cats"),
        (PHRASE, "red cat red cat"),
        (PHRASE, "cat red | cat red"),
        (COLOR, "The key is not red."),
        (COLOR, "red or blue"),
        (COLOR, "reddish"),
        (OWNER, "Ben has an egg."),
        (OWNER, "Anna has an egg and a key."),
        (OWNER, "Anna has no egg."),
        (CHAIN, "Mia is late."),
        (CHAIN, "Leo is cold and Sam is busy."),
        (CHAIN, "If Mia is late, then Leo is cold."),
        (CHAIN, "Leo is not cold."),
        (CHAIN, "Leo isn't cold."),
        (BIGGER, "45 is bigger than 72."),
        (BIGGER, "72 is smaller than 45."),
        (BIGGER, "72 and 45"),
        (BIGGER, "172"),
        (SUM, "4 * 5"),
        (SUM, "equal"),
        (SUM, "Both are equal to 12 + 9."),
        (SUM, "20"),
        (EQUAL, "12 + 8 is bigger, not equal"),
        (EQUAL, "They are not equal."),
        (EQUAL, "Equal, but 4 * 5 is bigger."),
    ],
)
def test_check_is_strict_on_substance(task: Task, answer: str) -> None:
    assert not check(task, answer)


# Splits, repeatability and options.


def test_train_and_held_out_never_share_a_question() -> None:
    rng = random.Random(5)
    train = {synthetic_tasks.document(rng) for _ in range(3000)}
    held_out = {synthetic_tasks.document(rng, split="held_out") for _ in range(3000)}
    assert len(train) > 2000 and len(held_out) > 1000
    assert train.isdisjoint(held_out)


@pytest.mark.parametrize(("family", "level"), LEVELS)
def test_every_cell_has_both_splits(family: str, level: int) -> None:
    rng = random.Random(1)
    for split, expected in [("train", False), ("held_out", True)]:
        task = synthetic_tasks.draw_task(rng, split, level, [family])
        assert synthetic_tasks.is_held_out(task) is expected
        assert (task.family, task.difficulty) == (family, level)


def test_split_is_a_tenth_and_does_not_depend_on_difficulty() -> None:
    tasks = [task for level in DIFFICULTIES for task in draws("recall", level, 800)]
    share = sum(map(synthetic_tasks.is_held_out, tasks)) / len(tasks)
    assert 0.085 < share < 0.115
    for task in tasks[:100]:
        twin = Task(task.family, 6 - task.difficulty, task.question, "")
        assert synthetic_tasks.is_held_out(twin) == synthetic_tasks.is_held_out(task)


def test_split_stays_where_it_was() -> None:
    """A changed hash would move held-out questions into training without notice."""
    held = [
        f"{a} + {b}"
        for a in range(1, 6)
        for b in range(1, 6)
        if synthetic_tasks.is_held_out(Task("arithmetic", 1, f"Calculate: {a} + {b}", ""))
    ]
    assert held == ["1 + 4", "2 + 2", "4 + 1", "4 + 4", "5 + 4"]


def test_impossible_split_and_bad_options_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    with pytest.raises(ValueError, match=r"Unknown family 'algebra'.*arithmetic.*comparison"):
        make_task(rng, "algebra")
    for level in (0, 6):
        with pytest.raises(ValueError, match=r"Unknown difficulty.*1, 2, 3, 4, 5"):
            make_task(rng, "logic", level)
    with pytest.raises(ValueError, match=r"Unknown split 'test'.*train, held_out, all"):
        synthetic_tasks.document(rng, split="test")
    with pytest.raises(ValueError, match="Unknown family 'algebra'"):
        synthetic_tasks.conversation(rng, families=["logic", "algebra"])
    with pytest.raises(ValueError, match="families must be a list"):
        synthetic_tasks.document(rng, families=[])
    with pytest.raises(ValueError, match="families must be a list"):
        synthetic_tasks.document(rng, families="logic")
    monkeypatch.setattr(synthetic_tasks, "is_held_out", lambda task: False)
    with pytest.raises(ValueError, match="No held_out task of family logic at difficulty 2"):
        synthetic_tasks.document(rng, split="held_out", families=["logic"], difficulty=2)
    assert synthetic_tasks.document(rng, split="train") and synthetic_tasks.document(rng)


def test_options_choose_family_and_difficulty() -> None:
    rng = random.Random(3)
    tasks = [synthetic_tasks.draw_task(rng, "all") for _ in range(2000)]
    cells = Counter((task.family, task.difficulty) for task in tasks)
    assert set(cells) == set(LEVELS) and max(cells.values()) < 90
    assert any(map(synthetic_tasks.is_held_out, tasks))
    families = ["sorting", "logic"]
    tasks = [synthetic_tasks.draw_task(rng, "all", 4, families) for _ in range(50)]
    assert {(task.family, task.difficulty) for task in tasks} == {("sorting", 4), ("logic", 4)}


def test_same_generator_state_gives_the_same_examples_and_the_next_differ() -> None:
    def sample(seed: int) -> list[object]:
        rng = random.Random(seed)
        makers = (synthetic_tasks.document, synthetic_tasks.conversation)
        return [makers[index % 2](rng) for index in range(200)]

    random.seed(1)
    first = sample(7)
    random.seed(2)
    assert first == sample(7) != sample(8)


def test_output_does_not_depend_on_the_hash_seed_of_the_process() -> None:
    command = [sys.executable, str(synthetic_tasks.__file__), "--count", "60", "--chat"]
    outputs = [
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] and outputs[0].count(b"assistant: ") == 60


# Conversations.


@pytest.mark.parametrize(("family", "level"), LEVELS)
def test_conversation_replies_pass_check_and_questions_vary(family: str, level: int) -> None:
    rng = random.Random(level)
    openings = set()
    for task in draws(family, level, 40):
        for _ in range(3):
            user, assistant = synthetic_tasks.to_messages(rng, task)
            assert (user["role"], assistant["role"]) == ("user", "assistant")
            assert check(task, assistant["content"]), (task, assistant)
            assert not re.search(r"[{}]\w*\}|  ", user["content"]) or family == "brackets"
            for number in re.findall(r"\d+", task.question):
                assert number in user["content"]
            openings.add(" ".join(user["content"].split()[:2]))
    assert len(openings) >= 2


def test_sorting_phrasings_name_the_right_direction() -> None:
    rng = random.Random(4)
    for task in draws("sorting", 5):
        text = " ".join(m["content"] for m in synthetic_tasks.to_messages(rng, task))
        wrong, right = ["largest to smallest", "descending"], ["smallest to largest", "ascending"]
        if task.question.startswith("Sort in descending"):
            wrong, right = right, wrong
        assert any(words in text for words in right) and not any(words in text for words in wrong)


def test_conversation_has_two_messages_and_respects_options() -> None:
    rng = random.Random(0)
    for _ in range(50):
        messages = synthetic_tasks.conversation(rng, families=["sorting"], difficulty=1)
        assert [sorted(message) for message in messages] == [["content", "role"]] * 2
        assert re.search("smallest|ascending", messages[0]["content"])
    with pytest.raises(ValueError, match="Not a sorting question"):
        synthetic_tasks.to_messages(rng, Task("sorting", 1, "Which?", ""))


# Command line.


def test_cli_writes_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, chat = tmp_path / "plain.jsonl", tmp_path / "chat.jsonl"
    assert synthetic_tasks.main(["--count", "30", "--out", str(plain)]) == 0
    options = ["--count", "5", "--family", "logic", "--difficulty", "5", "--chat"]
    assert synthetic_tasks.main([*options, "--out", str(chat)]) == 0
    rows = [json.loads(line) for line in plain.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 30 and all(set(r) == {"text", "family", "difficulty"} for r in rows)
    rows = [json.loads(line) for line in chat.read_text(encoding="utf-8").splitlines()]
    assert [(r["family"], r["difficulty"], len(r["messages"])) for r in rows] == [
        ("logic", 5, 2)
    ] * 5
    assert sorted(tmp_path.iterdir()) == [chat, plain]
    assert capsys.readouterr().out == ""


def test_cli_prints_examples_of_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for arguments in ([], ["--seed", "42"], ["--seed", "43"]):
        assert synthetic_tasks.main(arguments) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert len(outputs[0].splitlines()) == 10
    rng = random.Random(42)
    assert outputs[0].splitlines() == [synthetic_tasks.document(rng) for _ in range(10)]


@pytest.mark.parametrize("when", ["writing", "replacing"])
def test_failed_write_leaves_the_old_file(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "tasks.jsonl"
    target.write_text("old\n")

    def broken_rows(args: object) -> Iterator[dict[str, str]]:
        yield {"text": "first"}
        raise ValueError("broken on purpose")

    def broken_replace(old: Path, new: Path) -> None:
        raise OSError("broken on purpose")

    if when == "writing":
        monkeypatch.setattr(synthetic_tasks, "_rows", broken_rows)
    else:
        monkeypatch.setattr(os, "replace", broken_replace)
    with pytest.raises(SystemExit) as stop:
        synthetic_tasks.main(["--out", str(target)])
    assert stop.value.code == 2
    assert target.read_text() == "old\n" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "positive whole number"),
        (["--count", "many"], "positive whole number"),
        (["--family", "algebra"], "arithmetic"),
        (["--difficulty", "6"], "--difficulty"),
        (["--split", "test"], "held_out"),
        (["--seed", "x"], "--seed"),
        (["--stats", "--chat"], "cannot be combined"),
        (["--out", "/dev/null/tasks.jsonl"], "/dev/null"),
        (["--unknown"], "--unknown"),
    ],
)
def test_cli_refuses_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        synthetic_tasks.main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_cli_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    assert synthetic_tasks.main(["--stats", "--count", "200"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["family", "difficulty", "distinct", "characters", "valid"]
    cells = [row.split() for row in rows]
    assert [(cell[0], int(cell[1])) for cell in cells] == LEVELS
    for family, _, distinct, characters, valid in cells:
        assert 0 < float(distinct.rstrip("%")) <= 100 and 10 < float(characters) < 400
        assert (valid == "-") == (family != "brackets")
        assert valid == "-" or 35 < float(valid.rstrip("%")) < 65
    assert synthetic_tasks.main(["--stats", "--family", "logic", "--difficulty", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
