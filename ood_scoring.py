"""What test_ood.py asks, and how an answer is judged: right, or what is wrong with it.

A prompt names one of the scorers below, which look at the words of an answer and at nothing else.
Numbers, names and choices are judged strictly. Of free text a scorer can only tell that it is of a
sensible length and speaks of the matter, so it asks for little there, not for good prose. What no
answer may be (empty, endless, an echo, somebody else's) is wrong whatever was asked.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic import model_validator as validator

from hamner.errors import UserError, nearest
from hamner.recipe import Part
from hamner.tokenization import Message
from technical_sums import yaml_entries

PROMPTS = Path(__file__).resolve().parent / "ood" / "prompts.yaml"
Category = Literal[
    "greetings", "identity", "knowledge", "math", "opinion", "logic", "open_ended", "follow_up",
    "edge_cases",
]  # fmt: skip
CATEGORIES: tuple[str, ...] = get_args(Category)
Row = tuple[str, ...]  # words
ECHO = 4  # words of a question that an answer repeats
RUN, DISTINCT = 4, 0.6  # a word so often in a row, or so few distinct triples: it repeats itself

# ------------------------------------------------------------------------------- words and numbers

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
VALUES = dict(zip([*UNITS, *TENS], [*range(20), *range(20, 100, 10)], strict=True))
_UNIT = "|".join(reversed(UNITS))  # "seventeen" before "seven"
_ONE = rf"(?:(?:{'|'.join(TENS)})(?:[- ](?:{'|'.join(UNITS[1:10])}))?|{_UNIT})"
_HUNDREDS = rf"{_ONE}(?: hundred(?:(?: and)? {_ONE})?)?"
WRITTEN = re.compile(rf"\b{_HUNDREDS}(?: thousand(?:,?(?: and)? {_HUNDREDS})?)?\b")
DIGITS = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\d|st\b|nd\b|rd\b|th\b)")


def words(text: str) -> list[str]:
    """Its words in lower case, without punctuation."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", straight(text).lower())


def straight(text: str) -> str:
    return text.replace("\u2019", "'").replace("\u2018", "'")


def numbers(text: str) -> list[float]:
    """The numbers of a text in its order; those in words only where there are no digits."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.lower())
    if found := DIGITS.findall(text):
        return [float(number) for number in found]
    spelt = [_value(found) for found in WRITTEN.findall(text)]
    return [value for value in spelt if value != 1] or spelt  # beside others, "one" is rarely meant


def _value(spelt: str) -> float:
    thousands = rest = 0
    for word in re.findall(r"[a-z]+", spelt):
        if word == "thousand":
            thousands, rest = 1000 * rest, 0
        else:
            rest = 100 * rest if word == "hundred" else rest + VALUES.get(word, 0)
    return float(thousands + rest)


def folded(text: str) -> Row:
    """The same for texts that differ in case, punctuation and white space; its words, if any."""
    return tuple(words(text)) or (text.strip(),)


def triples(row: Row) -> set[Row]:
    """All groups of three words in a row; of a shorter row, all of it."""
    return set(zip(row, row[1:], row[2:], strict=False)) or {row}


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{pattern})(?!\w)", re.IGNORECASE)


def matching(patterns: Iterable[str], text: str) -> list[str]:
    """Those patterns that match whole words of a text."""
    return [pattern for pattern in patterns if _compiled(pattern).search(text)]


def _checked_pattern(pattern: str) -> str:
    try:
        found = re.search(pattern, "")
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from None
    if found:
        raise ValueError("matches an empty text")
    return pattern


# ----------------------------------------------------------------------------------------- scorers

Pattern = Annotated[str, AfterValidator(_checked_pattern)]
Patterns = tuple[Pattern, ...]
Some = Annotated[Patterns, Field(min_length=1)]


class Words(Part):
    """Right if one of `any` and all of `all` are said, and nothing of `none`."""

    by: Literal["words"]
    any: Patterns = ()
    all: Patterns = ()
    none: Patterns = ()

    @validator(mode="after")
    def _asks_for_something(self) -> Words:
        if not self.any and not self.all:
            raise ValueError("give any or all")
        return self

    def fault(self, text: str, asked: str) -> str:
        if self.any and not matching(self.any, text):
            return f"says none of: {', '.join(self.any)}"
        if missing := [p for p in self.all if not matching([p], text)]:
            return f"doesn't say: {', '.join(missing)}"
        wrong = matching(self.none, text)
        return f"says: {wrong[0]}" if wrong else ""


class Number(Part):
    """Right if the last number is `right`, or the only one that wasn't in the question."""

    by: Literal["number"]
    right: float

    def fault(self, text: str, asked: str) -> str:
        found = numbers(text)
        if not found:
            return f"gives no number, not {self.right:g}"
        if found[-1] == self.right or set(found) - set(numbers(asked)) == {self.right}:
            return ""
        return f"says {found[-1]:g}, not {self.right:g}"


LEAD = r"(?:well|hm+|oh|ah|honestly|actually|sadly|sorry|i'd say|i think|that's(?: an?)?|so)"
SURE = r"(?:definitely|certainly|absolutely|of course|probably|most likely|obviously)"
YES = r"(?:yes|yeah|yep|yup|sure|right|correct|true|indeed|exactly)"
# "no coffee after noon" and "not much" say something else
NO = (
    r"(?:no(?=\W*$|[^\w\s]| (?:it|i|he|she|they|we|you|that|this|there|not)\b)|nope|nah|wrong|false"
    r"|not(?=\W*$|[^\w\s]| (?:really|at all|quite|exactly|necessarily|me|one|by|yet|for me)\b)"
    r"|never(?! mind)|i don't think so|i doubt it)"
)
VERDICT = re.compile(
    rf"\W*(?:{LEAD}\b\W*)*(?:(?P<no>(?:{SURE}\W+)?{NO})|(?P<yes>{SURE}|{YES}))\b", re.IGNORECASE
)


def verdict(text: str) -> str:
    """What a text begins with: "yes", "no", or "" if it is neither."""
    found = VERDICT.match(text)
    return (found.lastgroup or "") if found else ""


class Verdict(Part):
    """Right if the answer begins with yes or no, as `right` says, or else says one of `also`."""

    by: Literal["verdict"]
    right: Literal["yes", "no"]
    also: Patterns = ()

    def fault(self, text: str, asked: str) -> str:
        given = verdict(text)
        if given:
            return "" if given == self.right else f"says {given}"
        return "" if matching(self.also, text) else f"doesn't say {self.right}"


THEREFORE = re.compile(r"\b(?:so|therefore|hence|thus|which makes|that makes)\b", re.IGNORECASE)


class Choice(Part):
    """Right if `right` is the first of `among` that is said, or the first after a "so"."""

    by: Literal["choice"]
    right: Pattern
    among: Annotated[Patterns, Field(min_length=2)]

    @validator(mode="after")
    def _is_possible(self) -> Choice:
        if self.right not in self.among:
            raise ValueError(f"right ({self.right}) must be one of among")
        return self

    def fault(self, text: str, asked: str) -> str:
        chosen = self._first(THEREFORE.split(text)[-1]) or self._first(text)
        if not chosen:
            return f"chooses none of: {', '.join(self.among)}"
        return "" if chosen == self.right else f"chooses {chosen}"

    def _first(self, text: str) -> str:
        places = [(found.start(), p) for p in self.among if (found := _compiled(p).search(text))]
        return min(places)[1] if places else ""


GREETINGS = {
    "hello": r"hi|hiya|hello|hey|howdy|yo|greetings|welcome|good (?:day|morning|evening)|what's up",
    "wellbeing": r"(?:pretty |very |quite |doing |all )?(?:good|well|fine|great|ok|okay)|not bad"
    r"|can't complain|no complaints",
    "morning": r"(?:good )?morning|and to you|same to you",
    "night": r"(?:good ?)?night|sleep (?:well|tight)|sweet dreams|rest well",
    "bye": r"good ?bye|bye|see you|see ya|later|take care|so long|farewell|come back"
    r"|(?:good|safe|nice|pleasant) (?:travels|trip|flight|journey)",
    "thanks": r"(?:you're |you are )?welcome|any ?time|no problem|don't mention it|my pleasure"
    r"|glad (?:i could|to)|happy to",
    "meeting": r"(?:nice|good|great|pleased|lovely) to meet you|you too|likewise|pleasure"
    r"|same here",
}


class Greeting(Part):
    """Right if the answer gives back a greeting of this kind, and says one of `naming`."""

    by: Literal["greeting"]
    kind: Literal["hello", "wellbeing", "morning", "night", "bye", "thanks", "meeting"]
    naming: Patterns = ()

    def fault(self, text: str, asked: str) -> str:
        if not matching([GREETINGS[self.kind]], text):
            return f"doesn't greet back ({self.kind})"
        if self.naming and not matching(self.naming, text):
            return f"doesn't say: {', '.join(self.naming)}"
        return ""


UNABLE = (
    r"can't|can not|cannot|couldn't|(?:don't|do not) (?:know|have|see)|unable|not able"
    r"|no (?:idea|clue|clock|way|eyes|hands|body|internet|window|calendar)|haven't|not for me"
    r"|(?:nobody|no one) (?:knows|can)|wouldn't know|if i knew|not online|have no"
    r"|only (?:get|see|have|do|read)"
)


class Unable(Part):
    """Right if Al says that he can't or doesn't know, and what or why (one of `about`)."""

    by: Literal["unable"]
    about: Some
    none: Patterns = ()

    def fault(self, text: str, asked: str) -> str:
        if wrong := matching(self.none, text):
            return f"claims to know: {wrong[0]}"
        if not matching([UNABLE], text):
            return "doesn't say that it can't, or doesn't know"
        return "" if matching(self.about, text) else f"says none of: {', '.join(self.about)}"


HEDGES = (
    r"(?:do not|don't) have (?:personal |any )*(?:opinions?|preferences?)|neutral|it depends"
    r"|depends on|advantages and disadvantages|pros and cons|many (?:valid )?perspectives"
    r"|many factors|take a side|equally good|opinions differ|up to you|not able to express"
)
STANCES = (
    r"yes|yep|no|nope|never|always|not (?:at all|really|seriously)|for it|against it|fan|best|worst"
    r"|i(?:'d| would)? (?:like|love|hate|say|prefer|take|pick|go|think|choose|respect)|better|worse"
    r"|good|bad|great|awful|terrible|horrible|fine|fun|funny|delicious|disgusting|charming|pointless"
    r"|silly|stupid|nonsense|overrated|underrated|wrong|right|too (?:much|long|many)|waste|nice"
    r"|should(?:n't)?|belongs?|stop|cancel|skip|let them|cute|find (?:it|them)"
)


class Stand(Part):
    """Right if the answer takes a side: it names one of `sides`, or judges and says one of `about`.

    What weighs all sides or declines to judge is wrong.
    """

    by: Literal["stand"]
    sides: Patterns = ()
    about: Patterns = ()

    @validator(mode="after")
    def _asks_for_something(self) -> Stand:
        if bool(self.sides) == bool(self.about):
            raise ValueError("give either sides or about")
        return self

    def fault(self, text: str, asked: str) -> str:
        if hedge := _compiled(HEDGES).search(text):
            return f"takes no side: {hedge[0]}"
        if self.sides:
            return "" if matching(self.sides, text) else f"names none of: {', '.join(self.sides)}"
        if not matching([STANCES], text):
            return "doesn't judge"
        return "" if matching(self.about, text) else f"says none of: {', '.join(self.about)}"


class Prose(Part):
    """Right if the answer is a sentence or more of fitting length that says one of `about`."""

    by: Literal["prose"]
    about: Some
    least: int = Field(default=4, ge=1)  # words
    most: int = Field(default=150, ge=1)

    def fault(self, text: str, asked: str) -> str:
        count = len(words(text))
        if not self.least <= count <= self.most:
            return f"has {count} words, not {self.least} to {self.most}"
        if not re.search(r"[.!?:)\"'*`\u201d]\s*$|\n", text):  # lists and letters end otherwise
            return "ends in mid-sentence"
        return "" if matching(self.about, text) else f"says none of: {', '.join(self.about)}"


AnyScorer = Union[Words, Number, Verdict, Choice, Greeting, Unable, Stand, Prose]
SCORERS: dict[str, type[Part]] = {
    get_args(scorer.model_fields["by"].annotation)[0]: scorer for scorer in get_args(AnyScorer)
}

# ------------------------------------------------------------------- what no answer may be

OTHERS = (
    r"chatgpt|gpt-?\d\w*|openai|siri|alexa|cortana|claude|anthropic|gemini|bard|copilot|llama|mistral"
    r"|deepseek|grok"
)
FIRMS = r"openai|google|microsoft|apple|amazon|meta|facebook|anthropic|nvidia|ibm"
MADE = r"made|created|built|developed|trained|programmed|designed"
FALSE_CLAIMS = (
    rf"(?:i am|i'm|i was|my name is|my name's|call me)(?: called)? (?:{OTHERS})",
    rf"(?<!not )(?<!n't )(?<!never )(?:{MADE}) by (?:{FIRMS}|a (?:large|leading)[\w ]* company)",
    rf"(?:{FIRMS}) (?:{MADE}) me",
    r"(?:i am|i'm) (?:really |actually )?an? (?:real )?(?:human|person|man|woman|boy|girl)",
)
OTHER_NAME = re.compile(r"\b[Mm]y name(?: is|'s) (?!A-?l\b|AL\b|Hamner\b)[A-Z]\w+")
ROLE_MARKER = re.compile(
    r"<\||^\W*(?:user|human|assistant|system|bot)\s*(?::|$)", re.IGNORECASE | re.MULTILINE
)


def repeats_itself(text: str) -> bool:
    row = tuple(words(text))
    runs = (len(list(same)) for _, same in itertools.groupby(row))
    count = len(row) - 2
    return max(runs, default=0) >= RUN or (count >= 8 and len(triples(row)) < DISTINCT * count)


def without(text: str, questions: Sequence[str]) -> str:
    """A text without those questions that it repeats, and empty if it is a part of the last one.

    Of questions and parts, those with ECHO words or more count.
    """
    for row in map(words, questions):
        if words(text) == row:
            return ""
        if len(row) >= ECHO:
            text = re.sub(r"[\W_]+".join(map(re.escape, row)), " ", text, flags=re.IGNORECASE)
    left, last = f" {' '.join(words(text))} ", f" {' '.join(words(questions[-1]))} "
    return "" if left in last and len(left.split()) >= ECHO else text


@dataclass(frozen=True)
class Answer:
    text: str
    ended: bool = True  # by the model, before it was cut off


@cache
def flaw(answer: Answer) -> str:
    """What is wrong with an answer, whatever was asked; "" if nothing is."""
    text = straight(answer.text)
    if not words(text):
        return "says nothing"
    if not answer.ended:
        return "never ends"
    if ROLE_MARKER.search(text):
        return "goes on in another role"
    if repeats_itself(text):
        return "repeats itself"
    for pattern in FALSE_CLAIMS:
        if found := _compiled(pattern).search(text):
            return f"claims: {found[0]}"
    other = OTHER_NAME.search(text)
    return f"claims: {other[0]}" if other else ""


# ----------------------------------------------------------------------------------------- prompts


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Prompt(Part):
    """What is asked, what of training it says in other words, and how the answer is judged."""

    category: Category
    paraphrase_of: tuple[str, ...] = ()  # trained prompts
    ask: Annotated[tuple[str, ...], BeforeValidator(_listed)]  # user and Al in turn, the user last
    system: str = ""
    sum: Annotated[str, Field(pattern=r"^(\d+( [-+*/] \d+)+)?$")] = ""  # to be worked out
    score: Annotated[AnyScorer, Field(discriminator="by")]
    examples: Annotated[tuple[str, ...], Field(min_length=1)]  # right answers

    @validator(mode="after")
    def _holds(self) -> Prompt:
        if len(self.ask) % 2 == 0 or not all(text.strip() for text in self.ask):
            raise ValueError("ask must be a text, or texts of user and Al in turn, the user's last")
        for example in self.examples:
            if wrong := self.fault(Answer(example)):
                raise ValueError(f"the example {example!r} is not right: {wrong}")
        return self

    @property
    def questions(self) -> tuple[str, ...]:
        """What the user says."""
        return self.ask[::2]

    @property
    def pairs(self) -> set[tuple[float, ...]]:
        """Neighbours in the sum, the smaller one first."""
        terms = [float(number) for number in self.sum.split()[::2]]
        return {tuple(sorted(pair)) for pair in itertools.pairwise(terms)}

    def messages(self, system: str) -> list[Message]:
        """The conversation, with the prompt's own system prompt or else the given one."""
        system = self.system or system
        first = [{"role": "system", "content": system}] if system else []
        roles = itertools.cycle(("user", "assistant"))
        return [*first, *({"role": next(roles), "content": text} for text in self.ask)]

    def fault(self, answer: Answer) -> str:
        """What is wrong with an answer; "" if it is right."""
        if wrong := flaw(answer):
            return wrong
        text = without(straight(answer.text), [straight(text) for text in self.questions])
        if not words(text):
            return "repeats the question"
        return self.score.fault(text, "\n".join(self.questions))


def read_prompts(path: Path = PROMPTS) -> list[Prompt]:
    """Read a file like ood/prompts.yaml.

    Raises:
        UserError: it can't be read, or anything in it doesn't hold; all at once.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give prompts like those of {PROMPTS.name}")
    entries = yaml_entries(path)
    try:
        return TypeAdapter(list[Prompt]).validate_python(entries)
    except ValidationError as error:
        problems = [f"{path}, {_described(problem)}" for problem in error.errors()]
        raise UserError("\n       ".join(dict.fromkeys(problems))) from None


def _described(problem: Any) -> str:
    """One of pydantic's problems as `place: what is wrong`."""
    number, *location = problem["loc"]
    known = Prompt.model_fields
    if location[:1] == ["score"] and location[1:2]:
        known = SCORERS[location.pop(1)].model_fields  # pydantic names the scorer there
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    where = f"prompt no. {number + 1}: {place.removeprefix('.')}".removesuffix(": ")
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(str(location[-1]), known)}"
    if problem["type"] == "missing":
        return f"{where}: is missing"
    if problem["type"].startswith("union_tag"):
        return f"{where}.by: must be one of {', '.join(SCORERS)}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be")
    given = problem["input"]
    return f"{where}: {message}" + ("" if isinstance(given, (dict, list)) else f", got {given!r}")
