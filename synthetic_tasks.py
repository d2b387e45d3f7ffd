"""Generated exercises with known answers: training lines, chat examples and a grader.

Nine task families, each with five levels of difficulty. `document` and `conversation` make one
example from a random generator, `check` grades a free-text answer, and `is_held_out` puts a fixed
tenth of all questions aside for evaluation. The only source of randomness is the generator that
is passed in, so a given generator state yields the same example on every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import operator
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hamner.files import write_json_lines

Maker = Callable[[random.Random, int], tuple[str, str]]
Phrasing = tuple[re.Pattern[str], dict[str, list[str]]]

DIFFICULTIES = range(1, 6)
SPLITS = ("train", "held_out", "all")
MAX_DRAWS = 1000


def _listed(words: str) -> list[str]:
    return words.split()


NOUNS = _listed("""apple ball basket bell bird boat book bottle bowl box brush bucket button cake
camera candle card carpet cat chair cherry clock coat coin cup desk dog door drum egg feather flag
flower fork glove hammer hat horse kettle key kite knife ladder lamp lemon map mirror mouse needle
onion owl pencil piano pillow plate rabbit ring rope shell ship shirt shoe spoon stone table tent
tiger tree umbrella wagon whistle window""")
COLORS = _listed("red blue green yellow black white brown pink purple silver")
ADJECTIVES = _listed("small big old new heavy clean round shiny broken pretty")
NAMES = _listed("""Anna Ben Carla David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul
Rosa Sam Tina Victor Wendy Zoe""")
STATES = _listed("""tired happy hungry busy late calm angry brave cold proud quiet ready sad sick
thirsty warm worried lucky""")
BRACKETS = ("()", "[]", "{}")
_ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_LISTOPS: dict[str, Callable[[Iterable[int]], int]] = {"MAX": max, "MIN": min, "SUM": sum}


@dataclass(frozen=True)
class Task:
    """One exercise: a canonical question and its right answer."""

    family: str
    difficulty: int
    question: str
    answer: str

    @property
    def text(self) -> str:
        """The exercise with its answer as one plain training line."""
        joint = {"arithmetic": " = ", "listops": " = ", "logic": " "}
        return f"{self.question}{joint.get(self.family, ' Answer: ')}{self.answer}"


# Makers: one per family, each returning (question, answer).


def make_arithmetic(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Two or three integers joined by +, - or *."""
    ranges = {3: [(1, 100)] * 2, 4: [(10, 500)] * 2, 5: [(10, 500), (10, 500), (1, 200)]}
    numbers = [rng.randint(*r) for r in ranges.get(difficulty, [(1, 10 * difficulty)] * 2)]
    signs = "+-*" if difficulty in (3, 4) else "+-"
    expression, result = str(numbers[0]), numbers[0]
    for number in numbers[1:]:
        sign = rng.choice(signs)
        expression += f" {sign} {number}"
        result = _ARITHMETIC[sign](result, number)
    return f"Calculate: {expression}", str(result)


def make_counting(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Count all words of a list, or how often one of them occurs."""
    count = rng.randint(2, 2 + 2 * difficulty)
    if difficulty < 3 or rng.random() < 0.5:
        return f"Count the words: {', '.join(rng.sample(NOUNS, count))}.", str(count)
    target, *others = rng.sample(NOUNS, 1 + rng.randint(1, 2 * difficulty))
    words = [target] * count + others
    rng.shuffle(words)
    return f'Count how often "{target}" appears: {", ".join(words)}.', str(count)


def make_brackets(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Nested brackets, about half of them broken at one position."""
    kinds = BRACKETS[: min(difficulty, 3)]
    pairs = [rng.choice(kinds) for _ in range(rng.randint(1, min(difficulty + 1, 6)))]
    # Bare brackets have few forms at level 1, and one form must not dominate a split.
    middle = rng.choice(NOUNS) if rng.random() < (0.5 if difficulty > 1 else 0.9) else ""
    left = "".join(pair[0] for pair in pairs)
    right = "".join(pair[1] for pair in reversed(pairs))
    string = left + middle + right
    if rng.random() < 0.5:
        place = rng.randrange(2 * len(left))
        place += len(middle) if place >= len(left) else 0
        others = [mark for mark in "".join(kinds) if mark != string[place]]
        new = rng.choice(others) if rng.random() < 0.7 else ""
        string = string[:place] + new + string[place + 1 :]
    return f"Are these brackets balanced: {string}?", "yes" if _balanced(string) else "no"


def _balanced(string: str) -> bool:
    marks = re.sub(r"[a-z]", "", string)
    while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", marks)) != marks:
        marks = shorter
    return not marks


def make_listops(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """A prefix expression of MAX, MIN and SUM over digits."""
    expression, value = _listops(rng, (difficulty - 1) // 2)
    return expression, str(value)


def _listops(rng: random.Random, depth: int) -> tuple[str, int]:
    name = rng.choice(list(_LISTOPS))
    count = rng.randint(2, 4)
    deepest = rng.randrange(count)
    parts: list[tuple[str, int]] = []
    for index in range(count):
        if depth and (index == deepest or rng.random() < 0.25):
            parts.append(_listops(rng, depth - 1))
        else:
            digit = rng.randint(0, 9)
            parts.append((str(digit), digit))
    value = _LISTOPS[name](value for _, value in parts)
    return f"[{name} {' '.join(text for text, _ in parts)}]", value


def make_sorting(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """A list of integers to put in order."""
    numbers = [rng.randint(0, 10 * difficulty) for _ in range(rng.randint(3, 3 + difficulty))]
    descending = difficulty >= 4 and rng.random() < 0.5
    order = "descending" if descending else "ascending"
    ordered = sorted(numbers, reverse=descending)
    given = ", ".join(map(str, numbers))
    return f"Sort in {order} order: {given}.", ", ".join(map(str, ordered))


def make_copying(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """A word or a short phrase to repeat a given number of times."""
    times = rng.randint(2, 2 + difficulty)
    noun = rng.choice(NOUNS)
    if difficulty < 3 or rng.random() < 0.5:
        return f'Repeat the word "{noun}" {times} times.', " ".join([noun] * times)
    adjectives = [rng.choice(ADJECTIVES), rng.choice(COLORS)][rng.randrange(2) :]
    phrase = " ".join([*adjectives, noun])
    question = f'Repeat the phrase "{phrase}" {times} times, separated by |.'
    return question, " | ".join([phrase] * times)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def make_recall(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """A list of facts and a question about one of them."""
    count = rng.randint(2, 2 + 2 * difficulty)
    varied = difficulty >= 3
    names, nouns = rng.sample(NAMES, count), rng.sample(NOUNS, count)
    asked = rng.randrange(count)
    facts, question, answer = [], "", ""
    for index, (name, noun) in enumerate(zip(names, nouns, strict=True)):
        if rng.random() < 0.5:
            result = rng.choice(COLORS)
            forms = [f"The {noun} is {result}.", f"The color of the {noun} is {result}."]
            asks = [f"What color is the {noun}?", f"What is the color of the {noun}?"]
        else:
            result = _with_article(noun)
            forms = [f"{name} has {result}.", f"{name} owns {result}."]
            forms.append(f"{result.capitalize()} belongs to {name}.")
            asks = [f"What does {name} have?", f"What does {name} own?"]
        facts.append(rng.choice(forms) if varied else forms[0])
        if index == asked:
            question, answer = rng.choice(asks) if varied else asks[0], result
    return f"{' '.join(facts)} {question}", answer


def make_logic(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """If-then rules and a fact, from which a conclusion follows."""
    people = zip(rng.sample(NAMES, 5), rng.sample(STATES, 5), strict=True)
    start, middle, end, other, unused = (f"{name} is {state}" for name, state in people)
    chain = [(start, middle), (middle, end)] if difficulty >= 4 else [(start, end)]
    distractors = [(other, unused)] if difficulty in (3, 5) else []
    rules = [f"If {cause}, then {effect}." for cause, effect in chain + distractors]
    rng.shuffle(rules)
    return f"{' '.join(rules)} {start}.", f"Therefore {end}."


def make_comparison(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Numbers, or a sum and a product, to compare."""
    if difficulty == 5:
        return _compare_expressions(rng)
    if difficulty == 4:
        numbers = rng.sample(range(1, 1001), rng.randint(3, 4))
        relation = rng.choice(["the largest", "the smallest"])
    else:
        numbers = rng.sample(range(1, 501 if difficulty == 3 else 101), 2)
        relation = rng.choice(["bigger", "smaller"]) if difficulty == 3 else "bigger"
    answer = min(numbers) if "small" in relation else max(numbers)
    given = ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"
    return f"Which is {relation}: {given}?", str(answer)


def _compare_expressions(rng: random.Random) -> tuple[str, str]:
    first, second = rng.randint(2, 12), rng.randint(2, 12)
    product = first * second
    # Totals near the product, so that a rough estimate does not settle the question.
    total = product if rng.random() < 0.2 else max(2, product + rng.randint(-10, 10))
    part = rng.randint(1, total - 1)
    sides = [(total, f"{part} + {total - part}"), (product, f"{first} * {second}")]
    rng.shuffle(sides)
    relation = rng.choice(["bigger", "smaller"])
    answer = "equal"
    if total != product:
        answer = (max(sides) if relation == "bigger" else min(sides))[1]
    question = f"Which is {relation}, {sides[0][1]} or {sides[1][1]}, or are they equal?"
    return question, answer


FAMILIES: dict[str, Maker] = {
    "arithmetic": make_arithmetic,
    "counting": make_counting,
    "brackets": make_brackets,
    "listops": make_listops,
    "sorting": make_sorting,
    "copying": make_copying,
    "recall": make_recall,
    "logic": make_logic,
    "comparison": make_comparison,
}


def make_task(rng: random.Random, family: str | None = None, difficulty: int | None = None) -> Task:
    """Make one task; a family or difficulty left at None is drawn uniformly."""
    _require_known("family", family, FAMILIES)
    _require_known("difficulty", difficulty, DIFFICULTIES)
    family = rng.choice(list(FAMILIES)) if family is None else family
    difficulty = rng.choice(DIFFICULTIES) if difficulty is None else difficulty
    return Task(family, difficulty, *FAMILIES[family](rng, difficulty))


def _require_known(what: str, value: object, valid: Iterable[object]) -> None:
    names = list(valid)
    if value is not None and value not in names:
        listed = ", ".join(map(str, names))
        raise ValueError(f"Unknown {what} {value!r}; valid values are: {listed}.")


def is_held_out(task: Task) -> bool:
    """Whether the task belongs to the tenth of all questions kept out of training."""
    digest = hashlib.sha256(f"{task.family}\n{task.question}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def draw_task(
    rng: random.Random,
    split: str = "train",
    difficulty: int | None = None,
    families: Sequence[str] | None = None,
) -> Task:
    """Draw a task of the wanted split; ValueError if none turns up in MAX_DRAWS attempts."""
    _require_known("split", split, SPLITS)
    _require_known("difficulty", difficulty, DIFFICULTIES)
    if families is not None and (isinstance(families, str) or not families):
        raise ValueError("families must be a list with at least one family name, or None.")
    for name in families or ():
        _require_known("family", name, FAMILIES)
    # Fixed before the redraws, so that no family or level gains from being easier to match.
    family = rng.choice(list(families or FAMILIES))
    level = rng.choice(DIFFICULTIES) if difficulty is None else difficulty
    for _ in range(MAX_DRAWS):
        task = make_task(rng, family, level)
        if split == "all" or is_held_out(task) == (split == "held_out"):
            return task
    raise ValueError(
        f"No {split} task of family {family} at difficulty {level} in {MAX_DRAWS} draws; "
        "choose another split, family or difficulty."
    )


def document(rng: random.Random, **options: Any) -> str:
    """One exercise with its answer as plain text; options as for draw_task."""
    return draw_task(rng, **options).text


def conversation(rng: random.Random, **options: Any) -> list[dict[str, str]]:
    """One exercise as a user question and an assistant reply; options as for draw_task."""
    return to_messages(rng, draw_task(rng, **options))


# Chat phrasings. A line names a family and the pattern of its question; the lines marked Q and A
# below it hold ways to ask and to reply, separated by slashes.
_CHAT_TABLE = r"""
arithmetic Calculate: (?P<body>.+)
Q What is {body}? / Calculate {body}. / Can you work out {body} for me?
A {body} = {answer} / The answer is {answer}. / That is {answer}.
counting Count the words: (?P<body>.+)\.
Q How many words are in this list? {body} / Count these words: {body}.
A There are {answer} words. / The list has {answer} words.
counting Count how often "(?P<word>.+)" appears: (?P<body>.+)\.
Q How many times does "{word}" appear in this list? {body}
Q Count how often the word "{word}" occurs here: {body}.
A "{word}" appears {answer} times. / It appears {answer} times.
brackets Are these brackets balanced: (?P<body>.+)\?
Q Are these brackets balanced? {body} / Do all the brackets match in this string? {body}
Q Tell me whether every bracket is closed correctly: {body}
listops (?P<body>.+)
Q What is the value of {body}? / Evaluate {body}.
Q MAX takes the largest value, MIN takes the smallest, and SUM adds them all. What is {body}?
A The value is {answer}. / {body} = {answer} / The result is {answer}.
sorting Sort in (?P<order>\w+) order: (?P<body>.+)\.
Q Sort these numbers in {order} order: {body}. / Put these numbers in order from {span}: {body}.
Q Can you arrange these numbers from {span}? {body}
A In {order} order: {answer}. / Sorted from {span}: {answer}.
copying Repeat the word "(?P<unit>.+)" (?P<times>\d+) times\.
Q Repeat the word "{unit}" {times} times. / Say "{unit}" {times} times.
Q Please write "{unit}" {times} times in a row.
A {answer} / Here you go: {answer}
copying Repeat the phrase "(?P<unit>.+)" (?P<times>\d+) times, separated by \|\.
Q Repeat the phrase "{unit}" {times} times, separated by |.
Q Please write "{unit}" {times} times, with | between the copies.
A {answer} / Here you go: {answer}
recall (?P<facts>.+\.) (?P<ask>.+ the (?P<noun>\w+)\?)
Q {facts} {ask} / Here are some facts. {facts} {ask} / Read this and answer. {facts} {ask}
A The {noun} is {answer}. / It is {answer}.
recall (?P<facts>.+\.) (?P<ask>What does (?P<name>\w+) \w+\?)
Q {facts} {ask} / Here are some facts. {facts} {ask} / Read this and answer. {facts} {ask}
A {name} has {answer}. / {name} owns {answer}.
logic (?P<body>.+)
Q {body} What follows in the end? / {body} What is the final conclusion?
Q Suppose that all of this is true. {body} What can you conclude in the end?
A {answer} / It follows that {conclusion} / The conclusion is that {conclusion}
comparison Which is (?P<relation>.+): (?P<body>.+)\?
Q Which is {relation}: {body}? / Which number is {relation}, {body}?
Q Tell me which number is {relation}: {body}.
A {answer} is {relation}. / The answer is {answer}.
comparison Which is (?P<relation>\w+), (?P<body>.+), or are they equal\?
Q Which is {relation}, {body}, or are they equal?
Q Is one of these {relation}, or are they equal: {body}?
A {answer} is {relation}. / The {relation} one is {answer}.
"""
_REPLIES_BY_ANSWER = {
    ("brackets", "yes"): ["Yes, the brackets are balanced.", "Yes, they all match."],
    ("brackets", "no"): ["No, the brackets are not balanced.", "No, they do not all match."],
    ("comparison", "equal"): ["They are equal.", "Both are equal."],
}


def _read_phrasings(table: str) -> dict[str, list[Phrasing]]:
    phrasings: dict[str, list[Phrasing]] = {family: [] for family in FAMILIES}
    for line in table.strip().splitlines():
        head, rest = line.split(" ", 1)
        if head in phrasings:
            latest: Phrasing = (re.compile(rest), {"Q": [], "A": []})
            phrasings[head].append(latest)
        else:
            latest[1][head] += rest.split(" / ")
    return phrasings


_PHRASINGS = _read_phrasings(_CHAT_TABLE)


def to_messages(rng: random.Random, task: Task) -> list[dict[str, str]]:
    """The task in one of its chat phrasings, with a short reply."""
    for pattern, ways in _PHRASINGS[task.family]:
        if match := pattern.fullmatch(task.question):
            fields = match.groupdict() | _extra_fields(task)
            replies = _REPLIES_BY_ANSWER.get((task.family, task.answer), ways["A"])
            user, reply = (rng.choice(texts).format(**fields) for texts in (ways["Q"], replies))
            return [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    raise ValueError(f"Not a {task.family} question: {task.question!r}.")


def _extra_fields(task: Task) -> dict[str, str]:
    descending = "descending" in task.question
    return {
        "answer": task.answer,
        "conclusion": task.answer.removeprefix("Therefore "),
        "span": "largest to smallest" if descending else "smallest to largest",
    }


# Grading. Answers are folded to lower case with plain signs; then each family looks for claims.

_FOLD = str.maketrans("\u2019\u2212\u2013\u00d7", "'--*", "`$")
_SIGNS = (("plus", "+"), ("minus|negative", "-"), ("times|x", "*"))
_NUMBER_WORDS = _listed("""zero one two three four five six seven eight nine ten eleven twelve
thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty""")
_NUMBER_END = r"(?![\w%/]|\.\d)"
_UNSURE = re.compile(
    r"\b(?:not sure|unsure|maybe|perhaps|possibly|might|(?:do not|don't) know|can't tell|about"
    r"|almost|nearly|roughly|approximately|at least|at most)\b"
)
_NEGATION = r"(?:\b(?:no|not|never|neither|nor|cannot)\b|n't\b)"
_RIGHT = (
    r"\b(?:balanced|valid|correct|correctly|match|matched|matching|closed|properly|nested|true)\b"
)
_WRONG = (
    r"\b(?:unbalanced|invalid|incorrect|incorrectly|mismatch|mismatched|unmatched|unclosed"
    r"|missing|wrong|false)\b"
)
_MORE = "bigger|biggest|larger|largest|greater|greatest|higher|highest|more"
_LESS = "smaller|smallest|lower|lowest|less|lesser|least"
_VOCABULARY = {word.lower() for word in NOUNS + COLORS + ADJECTIVES + NAMES}


def check(task: Task, answer: str) -> bool:
    """Whether a free-text answer states the task's answer and nothing that contradicts it."""
    text = _fold(answer)
    if _UNSURE.search(text):
        return False
    if task.family == "brackets":
        return _verdicts(text) == {task.answer}
    if task.family == "comparison" and task.answer != "equal":
        text = re.sub(r"\b(?:not|aren't) equal\b", "", text)
    if re.search(f"{_NEGATION}|{_WRONG}", text):
        return False
    return _CHECKERS.get(task.family, _check_number)(task, text)


def _fold(answer: str) -> str:
    text = " ".join(answer.lower().translate(_FOLD).replace("**", "").split())
    if not re.search(r"\d", text):
        # Not the "seven" of "thirty-seven"; beside digits, "one" is rarely meant as a number.
        words = rf"(?<!ty[ -])\b(?:{'|'.join(_NUMBER_WORDS)})\b(?![ -]hundred)"
        text = re.sub(words, lambda match: str(_NUMBER_WORDS.index(match[0])), text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    for words, sign in _SIGNS:
        text = re.sub(rf"\b(?:{words}) (?=-?\d)", sign, text)
    return text


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def _numbers(text: str) -> list[float]:
    return [float(n) for n in re.findall(rf"(?<![\w./])-?\d+(?:\.\d+)?{_NUMBER_END}", text)]


def _check_number(task: Task, text: str) -> bool:
    """One number is left once expressions (the working) are taken out."""
    text = re.sub(r"\[(?:max|min|sum).*\]|[()]", " ", text)
    text = re.sub(r"-?\d+(?:\s*[-+*]\s*-?\d+)+", " ", text)
    numbers = _numbers(re.sub(r"- (?=\d)", "-", text))
    return set(numbers) == {float(task.answer)} and " than " not in text


def _verdicts(text: str) -> set[str]:
    def resolve(match: re.Match[str]) -> str:
        return " yes " if re.fullmatch(_WRONG, match[1]) else " no "

    negated = rf"(?:\b(?:not|never|cannot)\b|n't\b)[^.;!?]*?((?:{_RIGHT} ?)+|{_WRONG})"
    text = re.sub(negated, resolve, text)
    found = {"yes": rf"\byes\b|{_RIGHT}", "no": f"{_NEGATION}|{_WRONG}"}
    return {verdict for verdict, pattern in found.items() if re.search(pattern, text)}


def _check_sorting(task: Task, text: str) -> bool:
    wanted = _numbers(task.answer)
    # Dashes may be list marks; the question's own list may be repeated first.
    return _numbers(text.replace("- ", " ")) in (wanted, _numbers(task.question) + wanted)


def _check_copying(task: Task, text: str) -> bool:
    """The same words and separators in the same order, after an introduction with a colon."""
    return _copied(text.rpartition(":")[2]) == _copied(task.answer)


def _copied(text: str) -> list[str]:
    marks = re.findall(r"[a-z]+|\|", text)
    return [mark for mark in marks if mark == "|" or mark.removesuffix("s") in _VOCABULARY]


def _check_recall(task: Task, text: str) -> bool:
    """The wanted word is named, and no person, thing or color outside the question asked."""
    words = _words(text)
    allowed = _words(task.question.rpartition(".")[2]) | _words(task.answer)
    return task.answer.split()[-1] in words and words & _VOCABULARY <= allowed


def _check_logic(task: Task, text: str) -> bool:
    """The conclusion is claimed, and all other claims follow from the question."""
    question = task.question.lower()
    rules = re.findall(r"if (.+?), then (.+?)\.", question)
    known = {question.rpartition(". ")[2].rstrip(".")}
    for _ in rules:
        known |= {effect for cause, effect in rules if cause in known}
    text = re.sub(r"\bif [^.;]*?\bthen \w+ is \w+", "", text)
    claims = set(re.findall(rf"\b(?:{'|'.join(NAMES).lower()}) is \w+", text))
    return task.answer.lower()[len("therefore ") : -1] in claims and claims <= known


def _check_comparison(task: Task, text: str) -> bool:
    refused = _LESS if re.search("bigger|largest", task.question) else _MORE
    refused = f"{_LESS}|{_MORE}" if task.answer == "equal" else f"{refused}|equal|same"
    if re.search(rf"\b(?:{refused})\b", text):
        return False
    if task.answer == "equal":
        return bool(re.search(r"\b(?:equal|same)\b", text))
    return _values(re.sub(r"\bthan\b[^.;!?]*", "", text)) == _values(task.answer)


def _values(text: str) -> set[float]:
    pattern = rf"(?<![\w./-])(\d+)(?: ?([+*]) ?(\d+))?{_NUMBER_END}"
    found = re.findall(pattern, text)
    return {_ARITHMETIC[sign](float(a), float(b)) if sign else float(a) for a, sign, b in found}


_CHECKERS: dict[str, Callable[[Task, str], bool]] = {
    "sorting": _check_sorting,
    "copying": _check_copying,
    "recall": _check_recall,
    "logic": _check_logic,
    "comparison": _check_comparison,
}


# Command line.


def _rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rng = random.Random(args.seed)
    families = [args.family] if args.family else None
    for _ in range(args.count or 10):
        task = draw_task(rng, args.split, args.difficulty, families)
        body = {"messages": to_messages(rng, task)} if args.chat else {"text": task.text}
        yield {**body, "family": task.family, "difficulty": task.difficulty}


def _readable(row: dict[str, Any]) -> str:
    if "text" in row:
        return str(row["text"])
    return "".join(f"{message['role']}: {message['content']}\n" for message in row["messages"])


def _statistics(args: argparse.Namespace) -> Iterator[str]:
    rng, count = random.Random(args.seed), args.count or 1000
    yield f"{'family':<12}{'difficulty':>10}{'distinct':>10}{'characters':>12}{'valid':>8}"
    for family in [args.family] if args.family else FAMILIES:
        for level in [args.difficulty] if args.difficulty else DIFFICULTIES:
            tasks = [draw_task(rng, args.split, level, [family]) for _ in range(count)]
            distinct = len({task.question for task in tasks}) / count
            length = sum(len(task.text) for task in tasks) / count
            valid = sum(task.answer == "yes" for task in tasks) / count
            last = f"{valid:>8.1%}" if family == "brackets" else f"{'-':>8}"
            yield f"{family:<12}{level:>10}{distinct:>10.1%}{length:>12.1f}{last}"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Print or write generated exercises.")
    add = parser.add_argument
    add("--count", type=_positive, help="number of tasks (default 10; per row 1000 with --stats)")
    add("--family", choices=list(FAMILIES), help="only this family")
    add("--difficulty", type=int, choices=list(DIFFICULTIES), help="only this level")
    add("--chat", action="store_true", help="user and assistant messages, not plain lines")
    add("--split", choices=SPLITS, default="train", help="part of the tasks (default train)")
    add("--seed", type=int, default=42, help="start of the random generator (default 42)")
    add("--out", type=Path, metavar="FILE.jsonl", help="write JSON lines to this file")
    add("--stats", action="store_true", help="print a table by family and difficulty")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; bad arguments end it with exit code 2."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.stats and (args.chat or args.out):
        parser.error("--stats prints a table and cannot be combined with --chat or --out")
    try:
        if args.out:
            write_json_lines(args.out, _rows(args))
            return 0
        lines = list(_statistics(args)) if args.stats else [_readable(r) for r in _rows(args)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # The reader, such as head, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
