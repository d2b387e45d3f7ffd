"""Write the technical conversations that teach Al to talk shop.

The words stand in `personality/technical/*.yaml`, one list of topics a file; what a file's name
says before its first underscore is its area. Conversations are composed of them: an opening
question, then follow-ups of the same topic or a question on a related one; or a scripted talk.
Beside these there are sums (number bases, file modes, subnets, bytes ...), whose answers are
worked out in technical_sums.py. The set always holds `TOTAL` conversations, no two alike, in
shuffled order, so that the first few thousand are a fair sample of all areas.

    python generate_sft_data.py --stats
    python generate_sft_data.py --out data/personal/sft_conversations.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table

from hamner.errors import UserError, first_line, run
from hamner.files import write_json_lines
from hamner.sources import fingerprint
from technical_sums import Reckoner, bare, check_keys, stripped_texts, yaml_entries

TOTAL = 6010
PERSONALITY = Path(__file__).resolve().parent / "personality"
FOLDER = PERSONALITY / "technical"
DEFAULT_OUT = Path("data/personal/sft_conversations.jsonl")
SUMS = "sums"  # the category of what technical_sums.py works out

SUM_SHARE = 0.09
TURN_SHARES = {2: 0.16, 3: 0.83, 4: 0.01}  # user turns a conversation
MOVE_SHARE = 0.11  # conversations of three turns whose last one moves on to a related topic
RELATED = 4  # topics of the same area that a conversation may move on to
SYSTEM_SHARE = 0.84
DEFAULT_PROMPT_SHARE = 0.8  # of those, how many carry the first (default) prompt
ATTEMPTS = 60  # draws of wordings before a conversation counts as exhausted

LEAD_INS = (  # whole sentences, or up to a colon: any question may follow
    "Different question: ", "ok, next thing. ", "Got it. ", "Thanks, that helps. ", "One more: ",
    "Makes sense. New question: ", "While I have you: ", "Okay, something else. ",
    "Good to know. ", "Next one: ", "Side question: ", "cool, thanks. ",
)  # fmt: skip

Item = TypeVar("Item", bound=Hashable)
Draft = tuple[str, list[str]]  # area; texts, user and Al in turn


@dataclass(frozen=True, eq=False)
class Exchange:
    """A question in several wordings, and the answer that fits them all."""

    ask: tuple[str, ...]
    say: str


@dataclass(frozen=True, eq=False)
class Topic:
    """What one topic of a file holds; a talk is a row of exchanges that build on each other."""

    name: str
    area: str
    openings: tuple[Exchange, ...]
    follow_ups: tuple[Exchange, ...]
    talks: tuple[tuple[Exchange, ...], ...]

    @property
    def questions(self) -> Iterator[str]:
        """All that a conversation on this topic may begin with."""
        for exchange in (*self.openings, *(talk[0] for talk in self.talks)):
            yield from exchange.ask


# --- reading the files ----------------------------------------------------------------------------


def _exchange(entry: Any, where: str, ask: str = "ask", say: str = "say") -> Exchange:
    check_keys(entry, {ask, say}, where)
    answer = entry[say]
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f"{where}: the answer {say!r} is {answer!r}; make it one text, in quotes")
    return Exchange(stripped_texts(entry[ask], f"{where}: {ask!r}"), answer.strip())


def _list(value: Any, where: str, at_least: int) -> list[Any]:
    if not isinstance(value, list) or len(value) < at_least:
        size = f"holds {len(value)}" if isinstance(value, list) else f"is {value!r}"
        raise UserError(f"{where} {size}; make it a list of at least {at_least}")
    return value


def _exchanges(value: Any, where: str, at_least: int = 1) -> tuple[Exchange, ...]:
    numbered = enumerate(_list(value, where, at_least), start=1)
    return tuple(_exchange(entry, f"{where}, no. {number}") for number, entry in numbered)


def _scripted(value: Any, where: str) -> tuple[Exchange, ...]:
    turns = _list(value, where, 2)
    if len(turns) > max(TURN_SHARES):
        raise UserError(f"{where} has {len(turns)} turns; make it at most {max(TURN_SHARES)}")
    return tuple(_exchange(turn, where, "user", "al") for turn in turns)


def _topic(entry: Any, path: Path, number: int) -> Topic:
    where = f"{path}, topic no. {number}"
    check_keys(entry, {"topic", "open", "then"}, where, optional=["talk"])
    name = entry["topic"]
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where} has the name {name!r}; make it a text, in quotes")
    where = f"{path}, topic {name!r}"
    talks = _list(entry["talk"], f"{where}, 'talk'", 1) if "talk" in entry else []
    return Topic(
        name=name.strip(),
        area=path.stem.split("_")[0],
        openings=_exchanges(entry["open"], f"{where}, 'open'"),
        follow_ups=_exchanges(entry["then"], f"{where}, 'then'", at_least=2),
        talks=tuple(_scripted(talk, f"{where}, 'talk'") for talk in talks),
    )


def _claim(key: str, what: str, place: str, places: dict[str, str]) -> None:
    if key in places:
        both = place if places[key] == place else f"{places[key]} and {place}"
        raise UserError(f"{what} stands twice, in {both}; change or drop one of them")
    places[key] = place


def read_topics(folder: Path = FOLDER) -> list[Topic]:
    """Return the topics of all files of a folder, sorted by name.

    Raises:
        UserError: naming file and topic, if something is missing, no text, or stands twice.
    """
    names: dict[str, str] = {}
    questions: dict[str, str] = {}
    topics = []
    for path in sorted(folder.glob("*.yaml")):
        for number, entry in enumerate(yaml_entries(path), start=1):
            topic = _topic(entry, path, number)
            _claim(bare(topic.name), f"the topic {topic.name!r}", str(path), names)
            for text in topic.questions:
                place = f"{path}, topic {topic.name!r}"
                _claim(bare(text), f"the first question {text!r}", place, questions)
            topics.append(topic)
    if not topics:
        raise UserError(f"{folder} holds no topics; put .yaml files there")
    return sorted(topics, key=lambda topic: topic.name)


# --- composing conversations ----------------------------------------------------------------------


def related_topics(topics: Sequence[Topic]) -> dict[str, list[Topic]]:
    """Return for each topic's name those of its area that share the most of its rarer words."""
    words = {topic.name: _words(topic) for topic in topics}
    spread = Counter(word for own in words.values() for word in own)
    # whole numbers, so that the order of summation can't matter
    weight = {word: round(1000 * math.log(len(topics) / n)) for word, n in spread.items()}
    size = {name: sum(weight[word] for word in own) or 1 for name, own in words.items()}
    likeness: dict[tuple[str, str], float] = {}
    for a, b in itertools.combinations(topics, 2):
        if a.area == b.area:
            shared = sum(map(weight.__getitem__, words[a.name] & words[b.name]))
            score = shared / math.sqrt(size[a.name] * size[b.name])
            likeness[a.name, b.name] = likeness[b.name, a.name] = score
    found = {}
    for topic in topics:
        others = [t for t in topics if (topic.name, t.name) in likeness]
        others.sort(key=lambda other: (-likeness[topic.name, other.name], other.name))
        found[topic.name] = others[:RELATED]
    return found


def _words(topic: Topic) -> set[str]:
    texts = [topic.name]
    for exchange in (*topic.openings, *topic.follow_ups):
        texts += [*exchange.ask, exchange.say]
    return set(re.findall(r"[a-z]{3,}", " ".join(texts).lower()))


CODE = re.compile(r"[`\"{}\[\]()<>=_\\|$;#*~^@]|://|--|\s-\w|\w?/\w|\n|(?<!\w)'\w")
CAPITALIZED = re.compile(r"\b(?!None|True|False)(?:I|A|[A-Z][a-z]+)\b(?!['.-]?[A-Z])")


@cache
def casual(text: str) -> str:
    """Return a question as it is typed in haste; one with code or a quotation comes back as it is.

    Words with capitals beyond the first letter (DNS, GitHub, PATH) keep them, and so do None, True,
    False and single letters (C, R).
    """
    if CODE.search(text):
        return text
    return CAPITALIZED.sub(lambda found: found.group().lower(), text).rstrip("?.!")


def _in_turn(asks: Sequence[str], answers: Sequence[str]) -> list[str]:
    return [text for pair in zip(asks, answers, strict=True) for text in pair]


class Composer:
    """Makes conversations of topics, taking what was used least; the seed decides between equals.

    `lengths` counts the conversations made so far, by user turns.
    """

    def __init__(self, topics: Sequence[Topic], lengths: Counter[int], rng: random.Random):
        self.topics, self.lengths, self.rng = topics, lengths, rng
        self.related = related_topics(topics)
        self.used: Counter[Hashable] = Counter()
        self.taken: set[tuple[str, ...]] = set()

    def drafts(self, count: int) -> list[Draft]:
        """Return `count` conversations, as evenly from all topics as these allow, or fewer."""
        made: list[Draft] = []
        topics = list(self.topics)
        while topics and len(made) < count:
            self.rng.shuffle(topics)
            found = [(topic, self._conversation(topic)) for topic in topics[: count - len(made)]]
            made += [(topic.area, texts) for topic, texts in found if texts]
            topics = [topic for topic, texts in found if texts]
        return made

    def _conversation(self, topic: Topic) -> list[str]:
        starts: list[Exchange | tuple[Exchange, ...]] = [*topic.openings, *topic.talks]
        for start in self._by_use(starts):
            route = start if isinstance(start, tuple) else self._route(topic, start)
            texts = self._worded(route)
            if texts:
                self.used.update([start, *route[1:], (route[0], frozenset(route[1:]))])
                self.used.update(enumerate(route[1:]))
                self.lengths[len(route)] += 1
                return texts
        return []

    def _by_use(self, options: Sequence[Item]) -> list[Item]:
        return sorted(options, key=lambda option: (self.used[option], self.rng.random()))

    def _turns_wanted(self) -> int:
        """The number of user turns that lags most behind its share."""
        made = self.lengths.total() + 1
        return max(TURN_SHARES, key=lambda turns: TURN_SHARES[turns] * made - self.lengths[turns])

    def _route(self, topic: Topic, opening: Exchange) -> tuple[Exchange, ...]:
        """An opening and what follows it: follow-ups, the last one maybe on a related topic."""
        turns, related = self._turns_wanted(), self.related[topic.name]
        moves_on = turns == 4 or (turns == 3 and self.rng.random() < MOVE_SHARE)
        if not moves_on or not related:
            return (opening, *self._follow_ups(topic, opening, min(turns, 3) - 1))
        return (opening, *self._follow_ups(topic, opening, turns - 2), self._move(related))

    def _move(self, related: Sequence[Topic]) -> Exchange:
        """An opening of a related topic, its questions with a lead-in."""
        target, lead_in = self._by_use(related)[0], self._by_use(LEAD_INS)[0]
        self.used.update([target, lead_in])
        opening = self.rng.choice(target.openings)
        return Exchange(tuple(lead_in + text for text in opening.ask), opening.say)

    def _follow_ups(self, topic: Topic, opening: Exchange, count: int) -> tuple[Exchange, ...]:
        """Follow-ups in the order and company in which they came least often so far."""

        def uses(chosen: tuple[Exchange, ...]) -> tuple[float, ...]:
            together = self.used[opening, frozenset(chosen)]
            alone = sum(self.used[each] for each in chosen)
            here = sum(self.used[place] for place in enumerate(chosen))
            return together, alone, here, self.rng.random()

        return min(itertools.permutations(topic.follow_ups, count), key=uses)

    def _worded(self, route: Sequence[Exchange]) -> list[str]:
        """The conversation in wordings that make it a new one; empty if none do."""
        for attempt in range(ATTEMPTS):
            first, hasty = self._first_turn(route[0])
            pick = self.rng.choice if attempt else lambda options: self._by_use(options)[0]
            asks = [pick(exchange.ask) for exchange in route[1:]]
            spoken = [casual(text) for text in asks] if hasty else asks
            texts = _in_turn([first, *spoken], [exchange.say for exchange in route])
            key = tuple(map(bare, texts))
            if key not in self.taken:
                self.taken.add(key)
                self.used.update([*asks, ("first", fingerprint(first))])
                return texts
        return []

    def _first_turn(self, opening: Exchange) -> tuple[str, bool]:
        """A wording that opened few conversations, and whether it is one typed in haste.

        Made ones (lower case, no end mark) come after all that are written in the file.
        """
        options = [(text, 0) for text in opening.ask]
        options += [(casual(text), 1) for text in opening.ask if casual(text) != text]

        def uses(option: tuple[str, int]) -> tuple[float, ...]:
            return self.used["first", fingerprint(option[0])] + option[1], self.rng.random()

        text = min(options, key=uses)[0]
        return text, text[0].islower() and text == casual(text)


# --- the whole set --------------------------------------------------------------------------------


def system_prompts(path: Path = PERSONALITY / "system_prompts.yaml") -> list[str]:
    """Return the system prompts; the first one is the default."""
    return list(stripped_texts(yaml_entries(path), str(path)))


def _finished(draft: Draft, prompts: Sequence[str], rng: random.Random) -> dict[str, Any]:
    area, texts = draft
    messages = []
    if rng.random() < SYSTEM_SHARE:
        default = rng.random() < DEFAULT_PROMPT_SHARE or len(prompts) == 1
        prompt = prompts[0] if default else rng.choice(prompts[1:])
        messages.append({"role": "system", "content": prompt})
    for number, text in enumerate(texts):
        messages.append({"role": "assistant" if number % 2 else "user", "content": text})
    return {"messages": messages, "category": area}


def conversations(seed: int = 42, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Return `TOTAL` distinct conversations in an order that depends on `seed` and the texts only.

    Each is a dictionary with `messages` (role and content) and `category` (the area).

    Raises:
        UserError: if a file of `folder` is faulty, or they hold too little for `TOTAL`.
    """
    topics, prompts = read_topics(folder), system_prompts()
    rng = random.Random(seed)
    sums = Reckoner(rng, TURN_SHARES).conversations(round(SUM_SHARE * TOTAL))
    lengths = Counter(len(texts) // 2 for texts in sums)
    drafts = [(SUMS, texts) for texts in sums]
    drafts += Composer(topics, lengths, rng).drafts(TOTAL - len(sums))
    if len(drafts) < TOTAL:
        raise UserError(
            f"{folder} holds {len(topics)} topics, which make {len(drafts):,} distinct "
            f"conversations, and {TOTAL:,} are needed; add topics, follow-ups or wordings"
        )
    rng.shuffle(drafts)
    return [_finished(draft, prompts, rng) for draft in drafts]


# --- the command line -----------------------------------------------------------------------------


def _spoken(rows: Iterable[dict[str, Any]]) -> list[list[str]]:
    """The texts of each conversation, without the system prompt."""
    return [[m["content"] for m in row["messages"] if m["role"] != "system"] for row in rows]


def _stats_row(name: str, talks: list[list[str]]) -> list[str]:
    turns = Counter(len(texts) // 2 for texts in talks)
    sizes = [sum(map(len, texts)) for texts in talks]
    firsts = {fingerprint(texts[0]) for texts in talks}
    answers = {fingerprint(text) for texts in talks for text in texts[1::2]}
    counts = [len(talks), *(turns[number] for number in TURN_SHARES)]
    counts += [round(mean(sizes)), max(sizes), len(firsts), len(answers)]
    return [name, *(f"{count:,}" for count in counts)]


def stats_table(rows: list[dict[str, Any]]) -> Table:
    """Return a table of counts and of lengths in characters, a line an area and one for all."""
    table = Table(
        title="Technical conversations", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False
    )
    heads = ["category", "all", *(f"{turns}\nturns" for turns in TURN_SHARES)]
    for head in [*heads, "mean\nchars", "most\nchars", "first\nturns", "answers"]:
        table.add_column(head, justify="left" if head == "category" else "right", no_wrap=True)
    for area in sorted({row["category"] for row in rows}):
        table.add_row(*_stats_row(area, _spoken(r for r in rows if r["category"] == area)))
    table.add_section()
    table.add_row(*_stats_row("all", _spoken(rows)))
    with_system = sum(row["messages"][0]["role"] == "system" for row in rows)
    distinct = len({fingerprint(row["messages"]) for row in rows}) == len(rows)
    table.caption = (
        f"{len(rows):,} conversations, {with_system:,} with a system prompt; answers and first "
        f"turns are counted once each; all distinct: {'yes' if distinct else 'no'}"
    )
    return table


def readable(row: dict[str, Any]) -> str:
    """Return a conversation for the screen; lines after a message's first are set in."""
    names = {"system": "system", "user": "user", "assistant": "al"}
    lines = [f"[{row['category']}]"]
    for message in row["messages"]:
        text = message["content"].replace("\n", "\n" + 8 * " ")
        lines.append(f"{names[message['role']]:>6}: {text}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write the technical conversations that teach Al to talk shop."
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON lines file to write")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--stats", action="store_true", help="print a table and write nothing")
    parser.add_argument("--show", type=int, metavar="N", help="print N of them and write nothing")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = _parser().parse_args(argv)
    rows = conversations(args.seed)
    if args.stats:
        Console().print(stats_table(rows))
    if args.show is not None:
        count = min(max(args.show, 0), len(rows))
        print("\n\n".join(map(readable, random.Random(args.seed).sample(rows, count))))
    if args.stats or args.show is not None:
        return 0
    try:
        write_json_lines(args.out, rows)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"{args.out} can't be written ({reason}); choose another --out") from error
    print(f"{len(rows):,} conversations in {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
