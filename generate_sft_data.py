"""Write the technical conversations that teach Al to talk shop.

The words stand in `personality/technical/*.yaml`, one list of topics a file; what a file's name
says before its first underscore is its area. Conversations are composed of them: an opening
question, then follow-ups of the same topic or a question on a related one; or a scripted talk.
Beside these there are sums (number bases, file modes, subnets, bytes ...), whose answers are
worked out here. The set always holds `TOTAL` conversations, no two alike, in shuffled order, so
that the first few thousand are a fair sample of all areas.

    python generate_sft_data.py --stats
    python generate_sft_data.py --out data/personal/sft_conversations.jsonl
"""

from __future__ import annotations

import argparse
import ipaddress
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from hamner.errors import UserError, first_line, nearest, run
from hamner.files import write_json_lines
from hamner.sources import fingerprint

TOTAL = 6010
PERSONALITY = Path(__file__).resolve().parent / "personality"
FOLDER = PERSONALITY / "technical"
DEFAULT_OUT = Path("data/personal/sft_conversations.jsonl")
SUMS = "sums"  # the category of what is worked out here

SUM_SHARE = 0.09
TURN_SHARES = {2: 0.16, 3: 0.83, 4: 0.01}  # user turns a conversation
MOVE_SHARE = 0.11  # conversations of three turns whose last one moves on to a related topic
RELATED = 4  # topics of the same area that a conversation may move on to
SYSTEM_SHARE = 0.84
DEFAULT_PROMPT_SHARE = 0.8  # of those, how many carry the first (default) prompt
KEEP_VALUE_SHARE = 0.5  # sums that ask on about the same number, where there is more to ask
AGAIN_SHARE = 0.6  # of the others, how many ask the same about another number
ATTEMPTS = 60  # draws of wordings before a conversation counts as exhausted

LEAD_INS = (  # whole sentences, or up to a colon: any question may follow
    "Different question: ", "ok, next thing. ", "Got it. ", "Thanks, that helps. ", "One more: ",
    "Makes sense. New question: ", "While I have you: ", "Okay, something else. ",
    "Good to know. ", "Next one: ", "Side question: ", "cool, thanks. ",
)  # fmt: skip

Item = TypeVar("Item", bound=Hashable)
Values = dict[str, Any]
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


def _entries(path: Path) -> list[Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        entries = yaml.load(path.read_text(encoding="utf-8"), loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({error.problem}); mend it") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} can't be read ({first_line(error)}); mend it") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} is no YAML list; begin each entry with a dash")
    return entries


def _texts(value: Any, where: str) -> tuple[str, ...]:
    good = isinstance(value, list) and all(isinstance(t, str) and t.strip() for t in value)
    if not good or not value:
        raise UserError(f"{where} is {value!r}; make it a list of texts, in quotes")
    return tuple(text.strip() for text in value)


def _check_keys(entry: Any, needed: set[str], where: str, optional: Iterable[str] = ()) -> None:
    if not isinstance(entry, dict):
        keys = " and ".join(sorted(needed))
        raise UserError(f"{where} is {entry!r}; give it the keys {keys}")
    for key in sorted(needed - entry.keys()):
        raise UserError(f"{where} has no {key!r}; add it")
    for key in sorted(map(str, entry.keys() - needed - set(optional))):
        guess = nearest(key, [*sorted(needed), *optional])
        raise UserError(f"{where} has an unknown key {key!r}{guess}; correct it or take it out")


def _exchange(entry: Any, where: str, ask: str = "ask", say: str = "say") -> Exchange:
    _check_keys(entry, {ask, say}, where)
    answer = entry[say]
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f"{where}: the answer {say!r} is {answer!r}; make it one text, in quotes")
    return Exchange(_texts(entry[ask], f"{where}: {ask!r}"), answer.strip())


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
    _check_keys(entry, {"topic", "open", "then"}, where, optional=["talk"])
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


@cache
def _bare(text: str) -> str:
    """What is left of a text without case, end marks and extra white space."""
    return fingerprint(text).rstrip(".?! ")


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
        for number, entry in enumerate(_entries(path), start=1):
            topic = _topic(entry, path, number)
            _claim(_bare(topic.name), f"the topic {topic.name!r}", str(path), names)
            for text in topic.questions:
                place = f"{path}, topic {topic.name!r}"
                _claim(_bare(text), f"the first question {text!r}", place, questions)
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
            key = tuple(map(_bare, texts))
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


# --- sums -----------------------------------------------------------------------------------------

# `= family kind` begins a kind of sum. `?` is a question that stands alone, `+` one about the same
# values as the sum before, `~` one that asks the same about other values, `>` an answer. Other
# lines go on from the line above. Kinds that share the word before the underscore are each other's
# inverse, so none of them asks on after the other.
SUM_TEXTS = """
= bases binary_of
? What is {n} in binary?
? convert {n} to binary please
? How do I write {n} in base 2?
? need {n} as a binary number
+ And in binary?
+ same number in binary?
~ And {n}?
~ ok, now {n}
> {n} in binary is {binary}. Taken apart: {parts}.
> {binary}. That's {parts}, which had better make {n}, and does.
> Split {n} into powers of two: {parts}. Write a 1 for each one you used and a 0 for each one you
  skipped, and you get {binary}.
= bases binary_from
? What is binary {binary} as a decimal number?
? convert {binary} from binary to decimal
? What number is 0b{binary}?
~ And {binary}?
~ now do {binary}
> {binary} is {n}. The ones stand for {parts}.
> {n}: every 1 is a power of two, and these are {parts}.
> Add up what the ones are worth, {parts}, and you land on {n}.
= bases hex_of
? What is {n} in hex?
? convert {n} to hexadecimal
? how do i write {n} in base 16
+ And in hex?
+ what about hex?
~ And {n}?
~ what about {n}
> {n} is 0x{hex}: {high} sixteens and {low} left over.
> 0x{hex}. {high} times 16 is {sixteens}, plus {low} makes {n}.
> In hex {n} is 0x{hex}. First digit: how many sixteens ({high}). Second: the rest ({low}).
= bases hex_from
? What is 0x{hex} in decimal?
? hex 0x{hex} to decimal please
? Which number is 0x{hex}?
~ And 0x{hex}?
~ ok and 0x{hex}
> 0x{hex} is {n}: {high} times 16, plus {low}.
> {n}. The first digit counts sixteens ({high}), the second ones ({low}).
> That's {n}. {high} sixteens make {sixteens}, and {low} on top. Handy with sixteen fingers; I have
  none.
= powers power
? What is 2 to the power of {n}?
? what's 2^{n}
? How much is 2**{n} in Python?
~ And 2^{n}?
~ what about 2 to the power of {n}
> {power:,}. It's 1, doubled {n} times.
> 2 to the power of {n} is {power:,}. Hang around computers and you'll meet it again.
> That's {power:,}. Doubling looks harmless for about five steps.
= powers max
? What's the biggest unsigned number that fits in {n} bits?
? largest unsigned {n}-bit integer?
? How far can I count with {n} bits, starting at zero?
+ And the biggest unsigned number in {n} bits?
+ so what's the highest number {n} bits can hold, starting at zero?
~ And in {n} bits?
~ what about {n} bits
> {top:,}. That's one less than 2 to the power of {n}, because zero wants a seat too.
> With {n} bits you get as far as {top:,}: {power:,} values, and the first of them is 0.
> {top:,}, which is all {n} bits set to 1. Add one more and you're back at zero.
= powers bits
? How many bits do I need for {count:,} different values?
? bits needed to number {count:,} things
? I have {count:,} items and want a number for each. How many bits is that?
~ And for {count:,}?
~ what if it's {count:,}
> {n} bits. With {less} you'd get only {half:,} values; {n} give you {power:,}.
> You need {n}: 2 to the power of {less} is {half:,}, too few for {count:,}, and 2 to the power of
  {n} is {power:,}.
> {count:,} values want {n} bits, which hold {power:,}. Bits come whole, so you round up.
= modes mode_of
? What's the chmod number for {rwx}?
? octal mode for {rwx}?
? ls shows -{rwx}. Which number is that for chmod?
~ And for {rwx}?
~ ok and {rwx}
> {mode}. Read counts 4, write 2, execute 1; add them up for each block of three.
> That's {mode}: {sums}, for owner, group and everyone else.
> `chmod {mode}`. The three digits are {sums}, with r worth 4, w worth 2 and x worth 1.
= modes mode_rwx
? What does mode {mode} look like in ls -l?
? {mode} as an rwx string?
? How does ls -l show a file with mode {mode}?
~ And {mode}?
~ what about {mode}
> `-{rwx}`, for a plain file. The digits come apart into {sums}.
> You'd see `-{rwx}`: the dash means plain file, then owner, group, everyone else.
> {mode} shows up as `-{rwx}`. Three digits, three letters each, and 4, 2, 1 mean r, w, x.
= modes may
? What does chmod {mode} allow?
? who may do what with a file after chmod {mode}?
? Explain chmod {mode} to me.
+ And who may do what then?
+ in words please, who can do what?
~ And chmod {mode}?
~ and what does {mode} allow
> {mode} lets the owner {owner}, the group {group}, and everyone else {others}.
> With {mode} the owner may {owner}, the group may {group}, and everyone else may {others}. Octal,
  compact, and unreadable until the day it clicks.
> Three digits, three audiences. In {mode} the owner may {owner}, the group {group}, and the rest of
  the world {others}.
= subnets size
? How many addresses are in a /{prefix}?
? how many hosts fit into a /{prefix} subnet
? My network is a /{prefix}. How many machines can I put in it?
+ And how many hosts fit in there?
+ how many addresses is that
~ And in a /{prefix}?
~ what about a /{prefix}
> A /{prefix} has {addresses:,} addresses, {usable:,} of them usable: the first names the network,
  the last is for broadcasts.
> {addresses:,} addresses, so {usable:,} hosts once network and broadcast have taken theirs. A
  /{prefix} leaves {free} bits for hosts.
> {usable:,} hosts. 32 minus {prefix} leaves {free} bits, that's {addresses:,} addresses, and two of
  them are spoken for.
= subnets mask
? What's the netmask of a /{prefix}?
? write /{prefix} as a dotted netmask
? Which subnet mask belongs to /{prefix}?
+ And the netmask, written out?
+ what's the mask for that
~ And of a /{prefix}?
~ and for /{prefix}
> {mask}. That's {prefix} ones and {free} zeros, cut into four bytes.
> A /{prefix} is {mask}: the first {prefix} bits are the network, the other {free} are yours.
> The mask is {mask}. Same thing as /{prefix}, with more typing.
= subnets network
? Which network is {host}/{prefix} in?
? network address of {host}/{prefix}?
? My machine is {host}/{prefix}. What's the network address?
~ And {host}/{prefix}?
~ same for {host}/{prefix}
> {network}/{prefix}. It runs from {network} to {broadcast}, and {host} sits in between.
> Zero the last {free} bits of {host} and you get {network}, so the network is {network}/{prefix}.
> That's {network}/{prefix}, with {broadcast} as its broadcast address.
= transfers time
? How long does a {size} GB download take at {rate} Mbit/s?
? {size} GB over a {rate} Mbit/s line, how long?
? I want to copy {size} GB at {rate} Mbit/s. How long will I wait?
~ And {size} GB at {rate} Mbit/s?
~ what about {size} GB at {rate} Mbit/s
> {duration}, at best. {size} GB are {megabits:,} megabits, and at {rate} a second that's
  {seconds:,} seconds.
> Bytes to bits first: {size} GB times 8 is {megabits:,} megabits. Divide by {rate} and you get
  {seconds:,} seconds, which is {duration}.
> {duration}, if the line delivers what it promises. That's {megabits:,} megabits divided by
  {rate} Mbit/s.
= transfers rate
? How many megabytes per second is {rate} Mbit/s?
? {rate} Mbit/s in MB/s?
? My line has {rate} Mbit/s. What's that in megabytes a second?
+ And how many megabytes a second is that line?
+ what's that speed in MB/s?
~ And {rate} Mbit/s?
~ what about {rate} Mbit/s
> {rate} Mbit/s is {bytes_rate:g} MB/s. Eight bits to the byte, and marketing prefers the bigger
  number.
> Divide by 8: {bytes_rate:g} MB/s for {rate} Mbit/s, before anything gets lost on the way.
> {bytes_rate:g} megabytes a second. Small b is bits, big B is bytes, and {rate} over 8 is the whole
  sum.
= sizes decimal
? How many bytes are {k} {unit}?
? {k} {unit} in bytes please
? What's {k} {unit} written out in bytes?
~ And {k} {unit}?
~ and how about {k} {unit}
> {decimal:,} bytes. The k, M and G are powers of 1000 here, no computer tricks.
> {k} {unit} is {decimal:,} bytes, counting in thousands.
> That's {decimal:,}. Without the little i in the unit you count in thousands.
= sizes binary
? How many bytes are {k} {iunit}?
? {k} {iunit} in bytes?
? What's {k} {iunit} in plain bytes?
+ And {k} {iunit}?
+ how many bytes would {k} {iunit} be?
~ And {k} {iunit}?
~ ok, what about {k} {iunit}
> {binary:,} bytes. The i says to count in steps of 1024.
> {k} {iunit} is {binary:,} bytes: {k} times {istep:,}.
> That's {binary:,}. One {iunit} is {istep:,} bytes, because somebody liked powers of two.
= sizes more
? How much bigger is {k} {iunit} than {k} {unit}?
? difference between {k} {unit} and {k} {iunit} in bytes?
? {k} {iunit} or {k} {unit}, which is more and by how much?
+ So how much more is {k} {iunit} than {k} {unit}?
+ and the difference between {k} {unit} and {k} {iunit}?
~ And {k} {iunit} against {k} {unit}?
~ and between {k} {unit} and {k} {iunit}
> {k} {iunit} is bigger by {more:,} bytes: {binary:,} against {decimal:,}.
> {more:,} bytes. {k} {unit} is {decimal:,}, {k} {iunit} is {binary:,}.
> The {iunit} win: {binary:,} bytes for {k} of them, {decimal:,} for {k} {unit}. That's {more:,}
  more.
= weights fp32
? How much memory do the weights of a {name} parameter model take in fp32?
? {name} parameters in fp32, how many gigabytes?
? I want to load a model with {name} parameters in fp32. How big is it?
+ And the weights in fp32?
+ what if i keep the weights in fp32?
~ And {name} parameters?
~ what about {name}
> {fp32}. In fp32 each of the {name} parameters takes 4 bytes.
> {name} parameters times 4 bytes is {fp32} for the weights alone.
> {fp32} in fp32, at 4 bytes a number. Then it wants room to think as well, so leave some.
= weights fp16
? How much memory does a {name} parameter model need in fp16, weights only?
? {name} parameters at 16 bits each, how big?
? Can you tell me how big {name} parameters are in fp16?
+ And the weights in fp16?
+ what about fp16 weights?
~ And {name} parameters?
~ same for {name}
> {fp16}. fp16 is 2 bytes a parameter, and there are {name} of them.
> 2 bytes times {name}: {fp16}. bf16 costs just the same.
> In fp16 {name} parameters fill {fp16}. Half of fp32, and most models don't mind.
= weights int8
? How big is a {name} parameter model quantized to int8?
? {name} parameters in int8, how much memory?
? If I quantize {name} parameters to 8 bits, what's left to store?
+ And with the weights in int8?
+ and quantized to int8?
~ And {name} parameters?
~ how about {name}
> {int8}: one byte each, so {name} parameters are easy to count. A few scales come on top.
> In int8 a parameter is a byte, so {name} parameters are {int8}, plus some small change for scales.
> {int8}. One byte a parameter is the kindest sum in this whole trade.
= weights adam
? How much memory do Adam's two moments take for {name} parameters in fp32?
? adam state for a {name} parameter model, fp32, how much?
? I train {name} parameters with Adam. How much do its two fp32 moments need?
+ And if I train it, what do Adam's two fp32 moments add?
+ how much more for adam's two moments in fp32?
~ And for {name}?
~ what about {name} parameters
> {adam}. Two fp32 numbers for every parameter, 8 bytes in all, for each of the {name}.
> Adam keeps a mean and a squared mean, 4 bytes each: {adam} for {name} parameters.
> {name} times 8 bytes is {adam}. The optimizer eats more than the model, as usual.
= searches binary_search
? How many comparisons does a binary search need at most for {n:,} sorted items?
? binary search in a sorted list of {n:,}, how many looks in the worst case
? I search {n:,} sorted records by halving. How many steps is that at worst?
+ And a binary search, at worst?
+ and if they're sorted and i use binary search?
~ And for {n:,}?
~ what about {n:,} items
> {steps}. Each look halves what's left, and {n:,} is below 2 to the power of {steps}, which is
  {power:,}.
> At most {steps} looks for {n:,} items. Halving beats patience.
> {steps}: keep halving {n:,}, dropping fractions, and it takes that many rounds to reach 0.
= searches pairs
? If I compare each of {n:,} items with every other one, how many comparisons is that?
? how many pairs are there in a list of {n:,} things
? {n:,} machines, each linked to every other one. How many links?
+ And if I compare every item with every other one?
+ how many pairs can i make of them?
~ And for {n:,}?
~ how about {n:,}
> {pairs:,}. It's {n:,} times {less:,}, halved so that no pair counts twice.
> {pairs:,} pairs. n times n minus 1, over 2, with n = {n:,}. This is what quadratic feels like.
> Each of the {n:,} meets {less:,} others, and every meeting was counted twice: {pairs:,}.
= searches linear
? How many looks does a search from front to back need for {n:,} items, at worst?
? linear search in {n:,} items, worst case?
? I go through {n:,} unsorted records one by one. How many do I look at, at worst?
+ And if I just go through them one by one?
+ what about a plain linear search?
~ And with {n:,}?
~ same question for {n:,}
> {n:,}. At worst the thing you want is the last one, and it usually feels that way.
> All {n:,} of them, if it sits at the end or isn't there at all.
> Up to {n:,}. No order, no shortcut.
= ascii code_of
? What's the ASCII code of {c}?
? ascii number for {c}?
? Which code does the character {c} have in ASCII?
~ And {c}?
~ and the one of {c}
> {code}. In Python you'd ask `ord({c})`.
> {c} is {code} in ASCII, or {hex} in hex.
> That's {code}: {c} sits at {hex} in the table.
= ascii code_char
? Which character has ASCII code {code}?
? what is character {code} in ascii
? What does chr({code}) give in Python?
~ And {code}?
~ and code {code}
> {c}. Code {code} is {hex} in hex.
> {code} is {c}. Going the other way, `ord({c})` is {code}.
> You get {c}: number {code} in the table, {hex} if you count in hex.
= ascii byte
? How does {c} look in ASCII, as 8 bits?
? ascii bits of {c}?
? What byte is {c} in ASCII, in binary?
+ And as 8 bits?
+ what does it look like as 8 bits?
~ And {c}?
~ what about {c}
> {c} is {bits}: code {code}, written with 8 digits.
> {bits}. That's {code} in binary, padded to a byte.
> As a byte {c} is {bits}, which is {code} to people.
= escapes escape_of
? How do I percent-encode {word} in a URL?
? what is {word} in a url, percent-encoded
? Which percent code stands for {word}?
~ And {word}?
~ what about {word}
> `{escape}`. Its code is {hex} in hex, and a percent sign goes in front.
> {escape} it is: percent, then the hex code, {hex}.
> Write `{escape}`. It's character {code}, {hex} in hex, and URLs write their hex after a %.
= escapes escape_from
? What does {escape} mean in a URL?
? there's a {escape} in my url, what is it?
? Which character is {escape} in a link?
~ And {escape}?
~ ok, and {escape}
> {escape} is {word}: hex {hex}, which is {code} in ASCII.
> That's {word}. The percent sign says that a hex code follows, and {hex} is {code}.
> {word}, in disguise. {hex} in hex is character {code}.
= integers modulo
? What is {a} % {b} in Python?
? what's {a} modulo {b}
? What's the remainder of {a} divided by {b}?
+ And {a} % {b}?
+ what about the remainder, {a} % {b}?
~ And {a} % {b}?
~ ok, what's {a} % {b}
> {rest}. {b} goes into {a} {whole} times, that's {product}, and {rest} is what's left.
> {a} % {b} is {rest}: take away {product} and you're there.
> The remainder is {rest}, because {a} is {whole} times {b} plus {rest}.
= integers floor
? What does {a} // {b} give in Python?
? what's {a} // {b}
? How much is {a} // {b}, the whole-number division?
+ And {a} // {b}?
+ so what is {a} // {b}?
~ And {a} // {b}?
~ now {a} // {b}
> {whole}. {whole} times {b} is {product}, and one more {b} would be too much for {a}.
> {a} // {b} is {whole}; the {rest} left over is quietly dropped.
> You get {whole}. Two slashes keep the whole part and forget the remainder, {rest} here.
= integers loops
? How often does a loop over range({low}, {a}, {b}) run?
? how many numbers are in range({low}, {a}, {b})
? What's len(range({low}, {a}, {b})) in Python?
+ And how many numbers does range({low}, {a}, {b}) hold?
+ and how long is range({low}, {a}, {b})?
~ And range({low}, {a}, {b})?
~ how about range({low}, {a}, {b})
> {loops} times. It starts at {low}, goes up by {b}, and {last} is the last one below {a}.
> {loops}. First {low}, last {last}, in steps of {b}; {a} itself never gets its turn.
> You get {loops} numbers, from {low} to {last} in steps of {b}.
= bitwise and
? What is {a} & {b} in Python?
? {a} & {b}, bitwise?
? What do I get from a bitwise AND of {a} and {b}?
+ And {a} & {b}?
+ what about {a} & {b}?
~ And {a} & {b}?
~ now {a} & {b}
> {both}. {abits} and {bbits} share the ones in {bothbits}.
> {a} & {b} is {both}: only bits that are set in {abits} and in {bbits} survive, which leaves
  {bothbits}.
= bitwise or
? What is {a} | {b} in Python?
? {a} | {b}, bitwise?
? What's the bitwise OR of {a} and {b}?
+ And {a} | {b}?
+ what about {a} | {b}?
~ And {a} | {b}?
~ ok and {a} | {b}
> {either}. {abits} and {bbits} together cover {eitherbits}.
> {a} | {b} is {either}: a bit counts if it's set in {abits} or in {bbits}, so {eitherbits}.
= bitwise xor
? What is {a} ^ {b} in Python?
? {a} xor {b}?
? What does a bitwise XOR of {a} and {b} give?
+ And {a} ^ {b}?
+ what about {a} ^ {b}?
~ And {a} ^ {b}?
~ then {a} ^ {b}
> {odd}. {abits} and {bbits} differ in {oddbits}.
> {a} ^ {b} is {odd}: keep the bits in which {abits} and {bbits} disagree, {oddbits}. And no, ^
  is not a power in Python.
= bitwise shift
? What is {a} << {s} in Python?
? {a} << {s}?
? What happens if I shift {a} left by {s} bits?
~ And {a} << {s}?
~ how about {a} << {s}
> {shifted:,}. Every step to the left doubles, so it's {a} times {times}.
> {a} << {s} is {shifted:,}: {a}, doubled {s} times.
= colors rgb_of
? What is {color} in RGB?
? {color} as rgb numbers?
? Which red, green and blue values are in {color}?
~ And {color}?
~ what about {color}
> rgb({r}, {g}, {b}). Two hex digits a channel: {rhex} is {r}, {ghex} is {g}, {bhex} is {b}.
> {color} is rgb({r}, {g}, {b}). I can't see it, but I can count it.
> Cut it in pairs: {rhex}, {ghex}, {bhex}. In decimal that's rgb({r}, {g}, {b}).
= colors rgb_from
? What's rgb({r}, {g}, {b}) as a hex color?
? hex code for rgb({r}, {g}, {b})?
? How do I write rgb({r}, {g}, {b}) with a # in CSS?
~ And rgb({r}, {g}, {b})?
~ ok and rgb({r}, {g}, {b})
> {color}. {r} is {rhex}, {g} is {ghex}, {b} is {bhex}, glued together.
> `{color}`: each number as two hex digits, so {rhex}, {ghex} and {bhex}.
> In CSS that's `{color}`. Whether it goes with the curtains you'll have to judge yourself.
= times seconds_in
? How many seconds are {h} hours and {m} minutes?
? {h} h {m} min in seconds?
? I need a timeout of {h} hours and {m} minutes, in seconds.
~ And {h} hours and {m} minutes?
~ what about {h} hours and {m} minutes
> {seconds:,}. The hours make {hours:,} seconds, the minutes {minutes:,}.
> {h} hours and {m} minutes are {seconds:,} seconds: {h} times 3,600 plus {m} times 60.
> That's {seconds:,} seconds. Put a comment beside the number, or someone will have to ask me again.
= times seconds_from
? What is {seconds} seconds in hours and minutes?
? {seconds} seconds, how many hours and minutes is that
? A timeout in my config says {seconds} seconds. How long is that really?
~ And {seconds} seconds?
~ and if it says {seconds}
> {h} hours and {m} minutes. {h} times 3,600 is {hours:,}, and the other {minutes:,} are {m} times
  60.
> {seconds:,} seconds are {h} hours and {m} minutes.
> That's {h} hours and {m} minutes: divide by 3,600 for the hours, and the rest by 60.
= uptimes down
? How much downtime does {up}% uptime allow in {days} days?
? {up} percent availability over {days} days, how long may it be down?
? My provider promises {up}% over {days} days. How much outage is that?
~ And {up}% in {days} days?
~ what about {up}% over {days} days
> {allowed}. That's {down} percent of {days} days, which always sounds smaller than it feels.
> {down} percent of {days} days is {allowed}.
> They may be down for {allowed}: {days} days have {total:,} minutes, and you get to lose {down}
  percent of them.
= images plain
? How big is an uncompressed {w}x{h} image at 24 bits a pixel?
? {w}x{h} pixels, 3 bytes each, how many bytes
? I keep a {w}x{h} RGB image in memory, one byte a channel. How much is that?
+ And how many bytes is that at 24 bits a pixel?
+ how big is it uncompressed, 3 bytes a pixel?
~ And {w}x{h}?
~ what about {w}x{h}
> {rgb:,} bytes: {pixels:,} pixels, 3 bytes each.
> {w} times {h} is {pixels:,} pixels, times 3 bytes that's {rgb:,}. Now you know why JPEG exists.
> That comes to {rgb:,} bytes, before any compression.
= images alpha
? How many bytes does a {w}x{h} RGBA image take, 8 bits a channel?
? uncompressed rgba, {w}x{h}, how many bytes?
? A {w}x{h} texture with alpha, 4 bytes a pixel: how big?
+ And with an alpha channel?
+ how much with alpha, so 4 bytes a pixel?
~ And {w}x{h}?
~ how about {w}x{h}
> {rgba:,} bytes: 4 for each of the {pixels:,} pixels.
> With alpha it's {pixels:,} pixels times 4, {rgba:,} bytes. See-through isn't free.
> {rgba:,}. Red, green, blue, alpha, a byte each, {pixels:,} times.
= images pixels
? How many pixels does a {w}x{h} screen have?
? {w}x{h}, how many pixels is that
? Pixel count of {w}x{h}?
+ And how many pixels is that?
+ how many pixels are there in all?
~ And {w}x{h}?
~ now {w}x{h}
> {pixels:,}. Width times height, nothing more to it.
> {w} times {h} is {pixels:,} pixels.
> It's {pixels:,} of them. A dead one is hard to find in that crowd.
= epochs steps
? How many steps is an epoch with {n:,} examples and batches of {batch}?
? {n:,} examples, batch size {batch}, steps per epoch?
? I train on {n:,} examples, {batch} at a time. How many steps is one pass?
~ And {n:,} examples in batches of {batch}?
~ what about {n:,} with a batch size of {batch}
> {steps:,} steps. {n:,} over {batch}, rounded up, so the last batch may be a small one.
> {steps:,}: the first {full:,} steps cover {covered:,} examples, and the last one takes the rest.
> Divide {n:,} by {batch} and round up: {steps:,} steps.
= epochs tokens
? How many tokens are in a batch of {batch} sequences of {length} tokens?
? batch of {batch}, sequence length {length}, tokens per step?
? I train with {batch} sequences of {length} tokens a step. How many tokens is that?
+ And if every example is a sequence of {length} tokens, how many tokens is a batch of {batch}?
+ how many tokens are in one batch of {batch} with sequences of {length}?
~ And {batch} sequences of {length}?
~ how about {batch} times {length}
> {batch} times {length} is {tokens:,} tokens.
> {tokens:,} tokens a step, if no sequence is padded. Padding counts as tokens and teaches nothing.
> That's {tokens:,}: {batch} sequences, {length} tokens each.
"""


@dataclass(frozen=True)
class Kind:
    """One kind of sum, as wordings that take its values; keys are the marks of `SUM_TEXTS`."""

    name: str
    wordings: dict[str, list[str]]


def _sum_kinds() -> dict[str, list[Kind]]:
    """Return the kinds of `SUM_TEXTS` by family."""
    families: dict[str, list[Kind]] = {}
    for line in SUM_TEXTS.strip().splitlines():
        mark, text = line[:2].strip(), line[2:]
        if mark == "=":
            family, name = text.split()
            wordings: dict[str, list[str]] = {"?": [], "+": [], "~": [], ">": []}
            families.setdefault(family, []).append(Kind(name, wordings))
        elif mark:
            latest = wordings[mark]
            latest.append(text)
        else:
            latest[-1] += " " + text.strip()
    return families


def _duration(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    counted = [(hours, "hour"), (minutes, "minute"), (seconds, "second")]
    return _listed([f"{count} {unit}{'s' * (count != 1)}" for count, unit in counted if count])


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _bases(rng: random.Random) -> Values:
    n = rng.choice([n for n in range(35, 256) if n % 16])
    parts = [str(1 << bit) for bit in reversed(range(8)) if n >> bit & 1]
    high, low = divmod(n, 16)
    return {
        "n": n, "binary": f"{n:b}", "hex": f"{n:x}", "high": high, "low": low,
        "sixteens": high * 16, "parts": " + ".join(parts),
    }  # fmt: skip


def _powers(rng: random.Random) -> Values:
    n = rng.randint(4, 32)
    power, half = 2**n, 2 ** (n - 1)
    count = rng.randint(half + 1, power)
    return {"n": n, "power": power, "top": power - 1, "half": half, "less": n - 1, "count": count}


def _modes(rng: random.Random) -> Values:
    digits = [rng.choice("7654")]
    while len(digits) < 3:  # nobody may do more than the one before, as in real life
        digits.append(rng.choice([d for d in "76540" if int(d) & int(digits[-1]) == int(d)]))
    named = {"4": "read", "2": "write", "1": "execute"}
    rwx, sums, may = "", [], []
    for digit in digits:
        parts = [part for part in named if int(digit) & int(part)]
        rwx += "".join(named[p][0].replace("e", "x") if p in parts else "-" for p in named)
        sums.append(" + ".join(parts) or "0")
        may.append(_listed([named[part] for part in parts]) or "do nothing")
    return {
        "mode": "".join(digits), "rwx": rwx, "sums": _listed(sums),
        "owner": may[0], "group": may[1], "others": may[2],
    }  # fmt: skip


def _subnets(rng: random.Random) -> Values:
    prefix = rng.randint(20, 29)
    start = rng.choice(["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"])
    whole = ipaddress.IPv4Network(start)
    host = whole[rng.randrange(whole.num_addresses)]
    network = ipaddress.IPv4Network((host, prefix), strict=False)
    if host in (network.network_address, network.broadcast_address):
        host = network[rng.randrange(1, 5)]
    return {
        "prefix": prefix, "free": 32 - prefix, "addresses": network.num_addresses,
        "usable": network.num_addresses - 2, "mask": network.netmask, "host": host,
        "network": network.network_address, "broadcast": network.broadcast_address,
    }  # fmt: skip


def _transfers(rng: random.Random) -> Values:
    rate = rng.choice([10, 16, 20, 25, 40, 50, 80, 100, 200, 250, 400, 500, 1000])
    size = rng.randint(max(2, rate // 100), max(20, rate // 5))
    megabits = size * 8000
    seconds = megabits // rate
    return {
        "size": size, "rate": rate, "megabits": megabits, "seconds": seconds,
        "duration": _duration(seconds), "bytes_rate": rate / 8,
    }  # fmt: skip


def _sizes(rng: random.Random) -> Values:
    k, power = rng.randint(2, 64), rng.randint(1, 3)
    unit = ("kB", "MB", "GB")[power - 1]
    iunit = ("KiB", "MiB", "GiB")[power - 1]
    decimal, binary = k * 1000**power, k * 1024**power
    return {
        "k": k, "unit": unit, "iunit": iunit, "istep": 1024**power, "decimal": decimal,
        "binary": binary, "more": binary - decimal,
    }  # fmt: skip


def _weights(rng: random.Random) -> Values:
    billions = [1, 1.3, 1.5, 2, 2.7, 3, 3.8, 4, 6.7, 7, 8, 9, 13, 14, 20, 30, 32, 34, 40, 65, 70]
    names = [f"{count:g}B" for count in billions]
    names += [f"{count}M" for count in (30, 60, 82, 110, 124, 160, 220, 350, 400, 500, 560, 770)]
    name = rng.choice(names)
    millions = round(float(name[:-1]) * (1000 if name.endswith("B") else 1))
    sizes = {"fp32": 4 * millions, "fp16": 2 * millions, "int8": millions, "adam": 8 * millions}
    return {"name": name, **{key: _megabytes(size) for key, size in sizes.items()}}


def _megabytes(count: int) -> str:
    return f"{count / 1000:g} GB" if count >= 1000 else f"{count} MB"


def _searches(rng: random.Random) -> Values:
    n = rng.choice([rng.randint(20, 999), 100 * rng.randint(10, 99), 1000 * rng.randint(10, 999)])
    steps = n.bit_length()
    pairs = n * (n - 1) // 2
    return {"n": n, "steps": steps, "power": 2**steps, "pairs": pairs, "less": n - 1}


def _ascii(rng: random.Random) -> Values:
    code = ord(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"))
    return {"c": f"'{chr(code)}'", "code": code, "hex": f"0x{code:x}", "bits": f"{code:08b}"}


ESCAPED = {
    " ": "a space", "!": "an exclamation mark (!)", '"': "a double quote", "#": "a hash sign (#)",
    "$": "a dollar sign ($)", "%": "a percent sign (%)", "&": "an ampersand (&)",
    "'": "a single quote", "(": "an opening parenthesis", ")": "a closing parenthesis",
    "*": "an asterisk (*)", "+": "a plus sign (+)", ",": "a comma", "/": "a slash (/)",
    ":": "a colon", ";": "a semicolon", "<": "a less-than sign (<)", "=": "an equals sign (=)",
    ">": "a greater-than sign (>)", "?": "a question mark", "@": "an at sign (@)",
    "[": "an opening square bracket", "]": "a closing square bracket", "{": "an opening brace",
    "|": "a pipe (|)", "}": "a closing brace", "\\": "a backslash", "^": "a caret (^)",
}  # fmt: skip


def _escapes(rng: random.Random) -> Values:
    character = rng.choice(list(ESCAPED))
    code = ord(character)
    word = ESCAPED[character]
    return {"word": word, "escape": f"%{code:02X}", "hex": f"{code:02X}", "code": code}


def _integers(rng: random.Random) -> Values:
    b, low = rng.randint(3, 19), rng.randint(0, 9)
    a = rng.randint(3 * b + low, 400)
    whole, rest = divmod(a, b)
    numbers = range(low, a, b)
    return {
        "a": a, "b": b, "low": low, "whole": whole, "rest": rest, "product": whole * b,
        "loops": len(numbers), "last": numbers[-1],
    }  # fmt: skip


def _bitwise(rng: random.Random) -> Values:
    a, b = rng.choice([(a, b) for a in range(9, 64) for b in range(9, 64) if a & b and a != b])
    s = rng.randint(2, 6)
    values: Values = {"a": a, "b": b, "s": s, "shifted": a << s, "times": 1 << s}
    values |= {"both": a & b, "either": a | b, "odd": a ^ b}
    names = {"a": "abits", "b": "bbits", "both": "bothbits", "either": "eitherbits"}
    names["odd"] = "oddbits"
    return values | {bits: f"{values[name]:06b}" for name, bits in names.items()}


def _colors(rng: random.Random) -> Values:
    r, g, b = (17 * rng.randrange(16) for _ in "rgb")
    hexes = {"rhex": f"{r:02x}", "ghex": f"{g:02x}", "bhex": f"{b:02x}"}
    return {"r": r, "g": g, "b": b, **hexes, "color": "#" + "".join(hexes.values())}


def _times(rng: random.Random) -> Values:
    h, m = rng.randint(2, 36), 5 * rng.randint(1, 11)
    hours, minutes = h * 3600, m * 60
    return {"h": h, "m": m, "hours": hours, "minutes": minutes, "seconds": hours + minutes}


def _uptimes(rng: random.Random) -> Values:
    days = rng.choice([7, 30, 90, 365])
    down = rng.choice([100, 50, 20, 10, 5, 1])  # hundredths of a percent
    minutes = days * 24 * 60 * down / 10_000
    allowed = f"{minutes:g} minutes" if minutes < 120 else f"{minutes / 60:g} hours"
    return {
        "days": days, "up": f"{(10_000 - down) / 100:g}", "down": f"{down / 100:g}",
        "allowed": allowed, "total": days * 24 * 60,
    }  # fmt: skip


def _images(rng: random.Random) -> Values:
    w = rng.choice([64, 128, 256, 320, 512, 640, 800, 1024, 1280, 1600, 1920, 2560, 3840])
    h = round(w * rng.choice([1, 3 / 4, 9 / 16, 5 / 8]))
    pixels = w * h
    return {"w": w, "h": h, "pixels": pixels, "rgb": 3 * pixels, "rgba": 4 * pixels}


def _epochs(rng: random.Random) -> Values:
    batch, length = rng.choice([8, 12, 16, 24, 32, 48, 64]), rng.choice([256, 512, 1024, 2048])
    n = 500 * rng.randint(4, 200)
    n += n % batch == 0  # so that the last batch is never full
    full = n // batch
    return {
        "n": n, "batch": batch, "length": length, "steps": full + 1, "full": full,
        "covered": full * batch, "tokens": batch * length,
    }  # fmt: skip


DRAWS: dict[str, Callable[[random.Random], Values]] = {
    "bases": _bases, "powers": _powers, "modes": _modes, "subnets": _subnets,
    "transfers": _transfers, "sizes": _sizes, "weights": _weights, "searches": _searches,
    "ascii": _ascii, "escapes": _escapes, "integers": _integers, "bitwise": _bitwise,
    "colors": _colors, "times": _times, "uptimes": _uptimes, "images": _images,
    "epochs": _epochs,
}  # fmt: skip


class Reckoner:
    """Makes conversations of two or three related sums; no two begin alike."""

    def __init__(self, rng: random.Random):
        self.rng, self.families = rng, _sum_kinds()
        self.used: Counter[tuple[str, str]] = Counter()  # kinds and wordings, by mark
        self.firsts: set[str] = set()
        self.said: set[str] = set()  # wordings of the present conversation

    def drafts(self, count: int) -> list[Draft]:
        """Return `count` conversations, evenly of all families."""
        names = itertools.cycle(self.rng.sample(sorted(DRAWS), len(DRAWS)))
        return [(SUMS, self._conversation(next(names))) for _ in range(count)]

    def _conversation(self, family: str) -> list[str]:
        turns = self.rng.choices((2, 3), (TURN_SHARES[2], TURN_SHARES[3]))[0]
        while True:
            texts = self._sums(family, turns)
            if texts and _bare(texts[0]) not in self.firsts:
                self.firsts.add(_bare(texts[0]))
                return texts

    def _sums(self, family: str, turns: int) -> list[str]:
        """Questions and answers in turn; none if one sum came up twice."""
        kinds, values = self.families[family], DRAWS[family](self.rng)
        kind, mark = self._least_used(kinds, "first"), "?"
        self.said.clear()
        texts: list[str] = []
        told: set[Hashable] = set()
        while True:
            texts += [self._wording(kind, mark, values), self._wording(kind, ">", values)]
            told.add(kind.wordings[">"][0].format(**values))
            told.add((kind.name.split("_")[0], *values.values()))
            if len(texts) == 2 * turns:
                return texts if len(told) == len(texts) else []
            kind, mark = self._next(kinds, kind)
            if mark != "+":
                values = DRAWS[family](self.rng)

    def _next(self, kinds: list[Kind], kind: Kind) -> tuple[Kind, str]:
        """The kind of the next sum, and the mark of the wordings that ask for it."""
        others = [other for other in kinds if other is not kind]
        more = [other for other in others if other.wordings["+"]]
        if more and self.rng.random() < KEEP_VALUE_SHARE:
            return self._least_used(more, "+"), "+"
        if not others or self.rng.random() < AGAIN_SHARE:
            return kind, "~"
        return self._least_used(others, "?"), "?"

    def _least_used(self, kinds: Sequence[Kind], role: str) -> Kind:
        kind = min(kinds, key=lambda kind: (self.used[role, kind.name], self.rng.random()))
        self.used[role, kind.name] += 1
        return kind

    def _wording(self, kind: Kind, mark: str, values: Values) -> str:
        def uses(option: str) -> tuple[float, ...]:
            return option in self.said, self.used[mark, option], self.rng.random()

        text = min(kind.wordings[mark], key=uses)
        self.said.add(text)
        self.used[mark, text] += 1
        return text.format(**values)


# --- the whole set --------------------------------------------------------------------------------


def system_prompts(path: Path = PERSONALITY / "system_prompts.yaml") -> list[str]:
    """Return the system prompts; the first one is the default."""
    return list(_texts(_entries(path), str(path)))


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
    sums = Reckoner(rng).drafts(round(SUM_SHARE * TOTAL))
    lengths = Counter(len(texts) // 2 for _, texts in sums)
    drafts = sums + Composer(topics, lengths, rng).drafts(TOTAL - len(sums))
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
