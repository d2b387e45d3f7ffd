"""Write the conversations that teach the model to chat as Al.

The words stand in `personality/*.yaml` and can be edited without touching this file; the sums and
their answers are made here. The set always holds `TOTAL` conversations, no two alike: every
hand-written question is used once, and arithmetic fills up the rest. All first user turns differ,
so one question never has two answers.

    python generate_sft_v3.py --stats
    python generate_sft_v3.py --out data/personal/sft_diverse_only.jsonl --pairs pairs.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import math
import operator
import random
import re
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hamner.files import write_json_lines

TOTAL = 2129
PERSONA = ("greetings", "identity", "opinions", "chitchat")
TASKS = ("math", "facts", "reasoning", "tech", "edge_cases", "followups", "multi_turn")
CATEGORIES = PERSONA + TASKS
FOLDER = Path(__file__).resolve().parent / "personality"
DEFAULT_OUT = Path("data/personal/sft_diverse_only.jsonl")

SYSTEM_SHARE = 0.5  # chance of a system prompt; the turns marked exact never carry one
DEFAULT_PROMPT_SHARE = 0.5  # of those, how many carry the first (default) prompt
CASUAL_SHARE = 0.35  # first turns made lower case and stripped of their end mark, where that is new
REMARK_SHARE = 0.25  # sums that get a word from Al after the number
STRAY_SHARE = 0.35  # rejected answers of a persona category that belong to another question
NO_STRAYS = {"identity", "greetings"}  # here the answer to another question may well be right

PHRASINGS_PER_PRODUCT = 2
SUM_KINDS = {"plus": 26, "minus": 24, "divide": 20, "percent": 10, "story": 20}
PLAIN = ("greetings", "identity", "math")
PLAIN_SUMS = 60
PLAIN_PHRASINGS = 4
PLAIN_CHAINED_SHARE = 0.2
SIZES = (10, 20, 20, 50, 100, 100, 500)
PERCENTAGES = (5, 10, 10, 20, 25, 30, 40, 50, 50, 60, 75, 80, 90)
NUMBER = re.compile(r"\d+")


@dataclass
class Draft:
    """A conversation in the making: user and Al take turns in `turns`, the user first."""

    category: str
    turns: list[str]
    exact: bool = False


# --- the hand-written part ------------------------------------------------------------------------


@cache
def _read(name: str) -> Any:
    path = FOLDER / f"{name}.yaml"
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error


def _texts(value: Any, where: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
        raise ValueError(f"personality/{where}: expected texts, in quotes, not {value!r}")
    return [text.strip() for text in texts]


def system_prompts() -> list[str]:
    """Return the system prompts; the first one is the default."""
    return _texts(_read("system_prompts"), "system_prompts.yaml")


def _questions(entry: dict, category: str, where: str, rng: random.Random) -> Iterator[Draft]:
    exact, ask = _texts(entry.get("exact", []), where), _texts(entry.get("ask", []), where)
    say = _texts(entry.get("say"), where)
    for text in exact:
        yield Draft(category, [text, say[0]], exact=True)
    first = rng.randrange(len(say))
    for number, text in enumerate(ask, start=first):
        yield Draft(category, [text, say[number % len(say)]])


def _talks(entry: dict, category: str, where: str) -> Iterator[Draft]:
    turns = [_texts(part.get(who), where) for part in entry["talk"] for who in ("user", "al")]
    for version in range(max(map(len, turns))):
        yield Draft(category, [texts[version % len(texts)] for texts in turns])


def _written(category: str, rng: random.Random) -> Iterator[Draft]:
    for entry in _read(category):
        where = f"{category}.yaml, topic {entry.get('topic')}"
        if "talk" in entry:
            yield from _talks(entry, category, where)
        else:
            yield from _questions(entry, category, where, rng)


def _key(text: str) -> str:
    return text.strip().lower()


def _claim(draft: Draft, taken: set[str]) -> Draft:
    first = draft.turns[0]
    if _key(first) in taken:
        raise ValueError(f"the first user turn {first!r} stands twice in personality/")
    taken.add(_key(first))
    return draft


def _make_casual(drafts: Iterable[Draft], taken: set[str], rng: random.Random) -> None:
    for draft in drafts:
        text = draft.turns[0]
        bare = text.lower().rstrip("?.!")
        wanted = rng.random() < CASUAL_SHARE and not draft.exact and not text.isupper()
        if wanted and bare and (bare not in taken or bare == _key(text)):
            draft.turns[0] = bare
            taken.add(bare)


# --- arithmetic -----------------------------------------------------------------------------------


RESULTS: dict[str, Callable[[int, int], int]] = {
    "plus": operator.add,
    "minus": operator.sub,
    "times": operator.mul,
    "divide": operator.floordiv,
    "percent": lambda a, b: a * b // 100,
}


def _operands(op: str, words: dict, rng: random.Random) -> tuple[int, int]:
    if op == "percent":
        percent = rng.choice(words.get("percents", PERCENTAGES))
        step = 100 // math.gcd(percent, 100)
        return percent, step * rng.randint(2, 400 // step)
    limits = (1, rng.choice(SIZES))
    a, b = rng.randint(*words.get("a", limits)), rng.randint(*words.get("b", limits))
    if op == "divide":
        return a * b, b
    return (max(a, b), min(a, b)) if op == "minus" else (a, b)


def _sum(
    op: str, a: int, b: int, ask: str, say: str, remark: str = "", exact: bool = False
) -> Draft:
    answer = say.format(a=a, b=b, r=RESULTS[op](a, b))
    return Draft("math", [ask.format(a=a, b=b), f"{answer} {remark}".strip()], exact)


def _remark(rng: random.Random) -> str:
    return rng.choice(_read("math")["remarks"]) if rng.random() < REMARK_SHARE else ""


def _products(taken: set[str], rng: random.Random) -> Iterator[Draft]:
    words = _read("math")["times"]
    for a, b in itertools.product(range(2, 13), repeat=2):
        free = [ask for ask in words["ask"] if _key(ask.format(a=a, b=b)) not in taken]
        for ask in rng.sample(free, PHRASINGS_PER_PRODUCT):
            yield _sum("times", a, b, ask, rng.choice(words["say"]), _remark(rng))


def _plain_sums(rng: random.Random) -> Iterator[Draft]:
    """Yield all products of 2 to 12 and some sums, asked in several ways, answered in one."""
    words = _read("math")
    pairs = list(itertools.product(range(2, 50), repeat=2))
    exact = [(item["op"], item["a"], item["b"]) for item in words["exact"]]
    facts = [("times", a, b) for a, b in itertools.product(range(2, 13), repeat=2)]
    facts += [("plus", a, b) for a, b in rng.sample(pairs, PLAIN_SUMS)]
    for op, a, b in dict.fromkeys(exact + facts):
        kind = words[op]
        first, *others = kind["ask"]
        yield _sum(op, a, b, first, kind["say"][0], exact=(op, a, b) in exact)
        for ask in rng.sample(others, PLAIN_PHRASINGS - 1):
            yield _sum(op, a, b, ask, kind["say"][0])


def _other_sums(rng: random.Random) -> Iterator[Draft]:
    words = _read("math")
    while True:
        op = rng.choices(list(SUM_KINDS), list(SUM_KINDS.values()))[0]
        if op == "story":
            kind = rng.choice(words["stories"])
            op, ask, say = kind["op"], kind["ask"], kind["say"]
        else:
            kind = words[op]
            ask, say = rng.choice(kind["ask"]), rng.choice(kind["say"])
        yield _sum(op, *_operands(op, kind, rng), ask, say, _remark(rng))


def _math(count: int, taken: set[str], rng: random.Random) -> list[Draft]:
    """Return `count` sums: the exact ones, all products of 2 to 12, and then a mixture."""
    drafts = [_claim(_sum(**item, exact=True), taken) for item in _read("math")["exact"]]
    drafts += [_claim(draft, taken) for draft in _products(taken, rng)]
    if len(drafts) > count:
        raise ValueError(
            f"personality/ holds {len(drafts) - count} hand-written conversations too many: "
            f"with {TOTAL} in all there is no room left for the times tables"
        )
    others = _other_sums(rng)
    while len(drafts) < count:
        draft = next(others)
        if _key(draft.turns[0]) not in taken:
            drafts.append(_claim(draft, taken))
    return drafts


# --- the whole set --------------------------------------------------------------------------------


def _finished(draft: Draft, rng: random.Random) -> dict:
    messages, prompts = [], system_prompts()
    if rng.random() < SYSTEM_SHARE and not draft.exact:
        default = rng.random() < DEFAULT_PROMPT_SHARE or len(prompts) == 1
        prompt = prompts[0] if default else rng.choice(prompts[1:])
        messages.append({"role": "system", "content": prompt})
    for number, text in enumerate(draft.turns):
        messages.append({"role": "assistant" if number % 2 else "user", "content": text})
    return {"messages": messages, "category": draft.category}


def _check_categories(categories: Collection[str]) -> None:
    unknown = ", ".join(repr(name) for name in categories if name not in CATEGORIES)
    if unknown:
        raise ValueError(f"unknown category {unknown}; valid are {', '.join(CATEGORIES)}")


def conversations(seed: int = 42, categories: Collection[str] | None = None) -> list[dict]:
    """Return the conversations in an order that depends on `seed` only.

    Each is a dictionary with `messages` (role and content) and `category`. With `categories` only
    those are returned; they are the same conversations as in the full set.
    """
    if categories is not None:
        _check_categories(categories)
    rng = random.Random(seed)
    taken: set[str] = set()
    drafts = [d for name in CATEGORIES if name != "math" for d in _written(name, rng)]
    for draft in drafts:
        _claim(draft, taken)
    _make_casual(drafts, taken, rng)
    drafts += _math(TOTAL - len(drafts), taken, rng)
    rng.shuffle(drafts)
    talks = [_finished(draft, rng) for draft in drafts]
    return [talk for talk in talks if categories is None or talk["category"] in categories]


def plain_conversations(seed: int = 42, categories: Collection[str] = PLAIN) -> list[dict]:
    """Return a set that a model of a million parameters can hold.

    Each question has one answer whatever its phrasing, there are no system prompts and no remarks,
    every sum is asked in several ways, and some conversations run on from one question to another.
    """
    _check_categories(categories)
    rng = random.Random(seed)
    drafts = [draft for name in categories if name != "math" for draft in _plain(name, rng)]
    drafts += list(_plain_sums(rng)) if "math" in categories else []
    rng.shuffle(drafts)
    drafts = _chained(drafts, rng)
    return [_finished(replace(draft, exact=True), rng) for draft in drafts]


def _chained(drafts: list[Draft], rng: random.Random) -> list[Draft]:
    """Join a share of the drafts into conversations of two or three questions."""
    kept, loose = [], []
    for draft in drafts:
        chained = rng.random() < PLAIN_CHAINED_SHARE and not draft.exact
        (loose if chained else kept).append(draft)
    while loose:
        chain = [loose.pop() for _ in range(min(len(loose), rng.randint(2, 3)))]
        kept.append(Draft(chain[-1].category, [turn for draft in chain for turn in draft.turns]))
    rng.shuffle(kept)
    return kept


def _plain(category: str, rng: random.Random) -> Iterator[Draft]:
    for draft in _written(category, rng):
        topic = _topics().get(draft.turns[-1], "")
        yield replace(
            draft, turns=[*draft.turns[:-1], _first_answers().get(topic, draft.turns[-1])]
        )


# --- preference pairs -----------------------------------------------------------------------------


@cache
def _topics() -> dict[str, str]:
    """Map each hand-written final answer to its topic."""
    topics = {}
    for category in CATEGORIES:
        for entry in _read(category) if category != "math" else []:
            last = entry["talk"][-1]["al"] if "talk" in entry else entry["say"]
            for text in _texts(last, f"{category}.yaml"):
                topics[text] = f"{category}/{entry.get('topic')}"
    return topics


@cache
def _first_answers() -> dict[str, str]:
    """Map each topic to the first of its hand-written final answers."""
    first: dict[str, str] = {}
    for answer, topic in _topics().items():
        first.setdefault(topic, answer)
    return first


def _wrong_number(answer: str, rng: random.Random) -> str:
    """Replace the result, which is the last number of the answer, by one that is close."""
    found = list(NUMBER.finditer(answer))[-1]
    right = int(found.group())
    near = {right - 10, right - 1, right + 1, right + 10, int(str(right)[::-1])} - {right}
    wrong = rng.choice(sorted(n for n in near if n >= 0))
    return answer[: found.start()] + str(wrong) + answer[found.end() :]


def _strays(answer: str, answers: Iterable[str]) -> list[str]:
    topics = _topics()
    own = topics.get(answer, answer)
    return [other for other in answers if topics.get(other, other) != own]


def _worse(answer: str, category: str, answers: Iterable[str], rng: random.Random) -> str:
    if category == "math" and NUMBER.search(answer):
        return _wrong_number(answer, rng)
    stiff = [text for text in _read("rejections").get(category, []) if text != answer]
    wants_stray = category not in NO_STRAYS and (not stiff or rng.random() < STRAY_SHARE)
    strays = _strays(answer, answers) if wants_stray else []
    return rng.choice(strays or stiff or _read("rejections")["chitchat"])


def _pair(talk: dict, answers: Iterable[str], rng: random.Random) -> dict:
    *before, last = talk["messages"]
    worse = _worse(last["content"], talk["category"], answers, rng)
    return {
        "prompt": before[-1]["content"],
        "chosen": [dict(message) for message in talk["messages"]],
        "rejected": [*map(dict, before), {"role": "assistant", "content": worse}],
        "category": talk["category"],
    }


def preference_pairs(conversations: list[dict], seed: int = 42) -> list[dict]:
    """Return for each conversation a pair that differs in the last answer only.

    `chosen` holds the messages of the conversation, `rejected` the same with a worse last answer: a
    wrong number, a stiff or false line about who Al is, or the answer to another question.
    """
    rng = random.Random(seed)
    answers: dict[str, dict[str, None]] = {}
    for talk in conversations:
        answers.setdefault(talk["category"], {})[talk["messages"][-1]["content"]] = None
    return [_pair(talk, answers[talk["category"]], rng) for talk in conversations]


# --- the command line -----------------------------------------------------------------------------


def _spoken(talk: dict) -> list[dict]:
    return [message for message in talk["messages"] if message["role"] != "system"]


def _stats_row(name: str, talks: list[dict]) -> str:
    spoken = [_spoken(talk) for talk in talks]
    turns = statistics.mean(len(s) / 2 for s in spoken)
    characters = statistics.mean(sum(len(m["content"]) for m in s) for s in spoken)
    firsts = len({_key(s[0]["content"]) for s in spoken})
    answers = len({_key(m["content"]) for s in spoken for m in s[1::2]})
    return f"{name:<12}{len(talks):>14}{turns:>12.2f}{characters:>12.1f}{firsts:>15}{answers:>18}"


def _stats_table(talks: list[dict]) -> str:
    heads = ("conversations", "mean turns", "mean chars", "first turns", "distinct answers")
    lines = ["{:<12}{:>14}{:>12}{:>12}{:>15}{:>18}".format("category", *heads)]
    groups = {name: [t for t in talks if t["category"] == name] for name in CATEGORIES}
    lines += [_stats_row(name, group) for name, group in groups.items() if group]
    with_system = sum(talk["messages"][0]["role"] == "system" for talk in talks)
    lines += [_stats_row("all", talks), f"with a system prompt: {with_system} of {len(talks)}"]
    return "\n".join(lines)


def _readable(talk: dict) -> str:
    lines = [f"[{talk['category']}]"]
    return "\n".join(lines + [f"{m['role']:>9}: {m['content']}" for m in talk["messages"]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write the conversations that teach Al to chat.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON lines file to write")
    parser.add_argument("--pairs", type=Path, help="also write preference pairs to this file")
    parser.add_argument("--categories", help="comma-separated (default: all; with --plain, few)")
    parser.add_argument(
        "--plain", action="store_true", help="one answer a question: what a tiny model can hold"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--stats", action="store_true", help="print a table and write nothing")
    parser.add_argument("--show", type=int, metavar="N", help="print N of them and write nothing")
    return parser


def _run(args: argparse.Namespace, talks: list[dict]) -> None:
    if args.stats:
        print(_stats_table(talks))
    if args.show is not None:
        count = min(max(args.show, 0), len(talks))
        print("\n\n".join(map(_readable, random.Random(args.seed).sample(talks, count))))
    if args.stats or args.show is not None:
        return
    write_json_lines(args.out, talks)
    print(f"{len(talks)} conversations in {args.out}")
    if args.pairs:
        pairs = preference_pairs(talks, args.seed)
        write_json_lines(args.pairs, pairs)
        print(f"{len(pairs)} preference pairs in {args.pairs}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    default = PLAIN if args.plain else CATEGORIES
    names = [name.strip() for name in args.categories.split(",")] if args.categories else default
    make = plain_conversations if args.plain else conversations
    try:
        _check_categories(names)
    except ValueError as error:
        parser.error(str(error))
    if args.pairs and args.pairs.resolve() == args.out.resolve():
        parser.error("--out and --pairs name the same file")
    try:
        _run(args, make(args.seed, names))
    except (OSError, ValueError) as error:
        print(f"generate_sft_v3.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
