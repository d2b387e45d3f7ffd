"""Computed technical questions: number bases, file modes, subnets, bytes, time and more.

Seventeen families of sums, each with a function here that draws its values and works out what
follows from them, and with kinds of questions about these values, whose wordings stand in
`personality/technical_sums.yaml`. `Reckoner` makes conversations of two or three sums of a family.
The only source of randomness is the generator that is passed in.
"""

from __future__ import annotations

import ipaddress
import itertools
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hamner.errors import UserError, first_line, nearest
from hamner.sources import fingerprint

WORDINGS = Path(__file__).resolve().parent / "personality" / "technical_sums.yaml"
LENGTHS = (2, 3)  # sums a conversation
KEEP_VALUES_SHARE = 0.5  # sums that ask on about the same values, where there is more to ask
AGAIN_SHARE = 0.6  # of the others, how many ask the same about other values
ATTEMPTS = 1000  # conversations drawn before a family counts as exhausted

Values = dict[str, Any]


# --- reading texts --------------------------------------------------------------------------------


def yaml_entries(path: Path) -> list[Any]:
    """Return the entries of a YAML list that isn't empty.

    Raises:
        UserError: naming the file, and the line if there is one, if it holds anything else.
    """
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


def stripped_texts(value: Any, where: str) -> tuple[str, ...]:
    """Return a list of texts without the space around them; raise UserError if it is none."""
    good = isinstance(value, list) and all(isinstance(t, str) and t.strip() for t in value)
    if not good or not value:
        raise UserError(f"{where} is {value!r}; make it a list of texts, in quotes")
    return tuple(text.strip() for text in value)


def check_keys(entry: Any, needed: set[str], where: str, optional: Iterable[str] = ()) -> None:
    """Raise UserError unless an entry is a mapping with the needed keys and no unknown ones."""
    if not isinstance(entry, dict):
        keys = " and ".join(sorted(needed))
        raise UserError(f"{where} is {entry!r}; give it the keys {keys}")
    for key in sorted(needed - entry.keys()):
        raise UserError(f"{where} has no {key!r}; add it")
    for key in sorted(map(str, entry.keys() - needed - set(optional))):
        guess = nearest(key, [*sorted(needed), *optional])
        raise UserError(f"{where} has an unknown key {key!r}{guess}; correct it or take it out")


@cache
def bare(text: str) -> str:
    """Return what is left of a text without case, end marks and extra white space."""
    return fingerprint(text).rstrip(".?! ")


# --- wordings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One kind of sum; its wordings, by key of the file, take the values of its family."""

    name: str
    wordings: dict[str, tuple[str, ...]]


def read_kinds(path: Path = WORDINGS) -> dict[str, list[Kind]]:
    """Return the kinds of sums by family, in the order of the file.

    Raises:
        UserError: naming file and sum, if a part is missing, stands twice or can't be filled in.
    """
    families: dict[str, list[Kind]] = {family: [] for family in DRAWS}
    names: set[str] = set()
    for number, entry in enumerate(yaml_entries(path), start=1):
        kind = _kind(entry, f"{path}, sum no. {number}")
        if kind.name in names:
            raise UserError(f"{path}: the kind {kind.name!r} stands twice; change or drop one")
        names.add(kind.name)
        families[entry["family"]].append(kind)
    for family in families:
        if not families[family]:
            raise UserError(f"{path} holds no sum of the family {family!r}; add one")
    return families


def _kind(entry: Any, where: str) -> Kind:
    check_keys(entry, {"family", "kind", "ask", "ask_again", "say"}, where, optional=["ask_on"])
    family, name = entry["family"], entry["kind"]
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where} has the kind {name!r}; make it a text, in quotes")
    if family not in list(DRAWS):
        guess = nearest(str(family), DRAWS)
        raise UserError(f"{where} has the family {family!r}{guess}; give one of {', '.join(DRAWS)}")
    keys = [key for key in ("ask", "ask_on", "ask_again", "say") if key in entry]
    wordings = {key: stripped_texts(entry[key], f"{where}: {key!r}") for key in keys}
    _check_wordings(itertools.chain(*wordings.values()), family, where)
    return Kind(name.strip(), {"ask_on": (), **wordings})


def _check_wordings(texts: Iterable[str], family: str, where: str) -> None:
    values = DRAWS[family](random.Random(0))
    for text in texts:
        try:
            text.format(**values)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where}: {text!r} can't be filled in ({first_line(error)}); "
                f"put only {', '.join(values)} in braces"
            ) from error


# --- values ---------------------------------------------------------------------------------------


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


# --- conversations --------------------------------------------------------------------------------


class Reckoner:
    """Makes conversations of two or three related sums; no two begin alike.

    `turn_shares` says how likely each number of user turns is; those of `LENGTHS` count.
    """

    def __init__(
        self, rng: random.Random, turn_shares: Mapping[int, float], wordings: Path = WORDINGS
    ):
        self.rng, self.wordings, self.families = rng, wordings, read_kinds(wordings)
        self.weights = [turn_shares[turns] for turns in LENGTHS]
        self.used: Counter[tuple[str, str]] = Counter()  # kinds and wordings, by role
        self.firsts: set[str] = set()
        self.said: set[str] = set()  # wordings of the present conversation

    def conversations(self, count: int) -> list[list[str]]:
        """Return `count` lists of texts, user and Al in turn, evenly of all families.

        Raises:
            UserError: if the wordings of a family make too few distinct questions.
        """
        names = itertools.cycle(self.rng.sample(sorted(DRAWS), len(DRAWS)))
        return [self._conversation(next(names)) for _ in range(count)]

    def _conversation(self, family: str) -> list[str]:
        turns = self.rng.choices(LENGTHS, self.weights)[0]
        for _ in range(ATTEMPTS):
            texts = self._sums(family, turns)
            if texts and bare(texts[0]) not in self.firsts:
                self.firsts.add(bare(texts[0]))
                return texts
        raise UserError(
            f"{self.wordings}: the family {family!r} makes too few distinct questions and answers; "
            "add wordings, with values in braces"
        )

    def _sums(self, family: str, turns: int) -> list[str]:
        """Questions and answers in turn; none if one sum came up twice."""
        kinds, values = self.families[family], DRAWS[family](self.rng)
        kind, key = self._least_used(kinds, "first"), "ask"
        self.said.clear()
        texts: list[str] = []
        told: set[Hashable] = set()
        while True:
            texts += [self._wording(kind, key, values), self._wording(kind, "say", values)]
            told.add(kind.wordings["say"][0].format(**values))
            told.add((kind.name.split("_")[0], *values.values()))
            if len(texts) == 2 * turns:
                return texts if len(told) == len(texts) else []
            kind, key = self._next(kinds, kind)
            if key != "ask_on":
                values = DRAWS[family](self.rng)

    def _next(self, kinds: list[Kind], kind: Kind) -> tuple[Kind, str]:
        """The kind of the next sum, and the key of the wordings that ask for it."""
        others = [other for other in kinds if other is not kind]
        more = [other for other in others if other.wordings["ask_on"]]
        if more and self.rng.random() < KEEP_VALUES_SHARE:
            return self._least_used(more, "ask_on"), "ask_on"
        if not others or self.rng.random() < AGAIN_SHARE:
            return kind, "ask_again"
        return self._least_used(others, "ask"), "ask"

    def _least_used(self, kinds: Sequence[Kind], role: str) -> Kind:
        kind = min(kinds, key=lambda kind: (self.used[role, kind.name], self.rng.random()))
        self.used[role, kind.name] += 1
        return kind

    def _wording(self, kind: Kind, key: str, values: Values) -> str:
        def uses(option: str) -> tuple[float, ...]:
            return option in self.said, self.used[key, option], self.rng.random()

        text = min(kind.wordings[key], key=uses)
        self.said.add(text)
        self.used[key, text] += 1
        return text.format(**values)
