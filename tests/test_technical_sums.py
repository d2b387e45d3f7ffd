"""Tests of the computed questions: every sum a second time, their variety, faulty wordings."""

from __future__ import annotations

import random
import re
import stat
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from fractions import Fraction
from math import ceil, comb
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
import yaml

from hamner.errors import UserError
from technical_sums import DRAWS, ESCAPED, WORDINGS, Kind, Reckoner, read_kinds

SHARES = {2: 0.16, 3: 0.83, 4: 0.01}
QUESTIONS = ("ask_on", "ask", "ask_again")  # keys of a kind, as one understands a question


def bare(text: str) -> str:
    """The letters and digits of a text, and the signs that tell one question from another."""
    return re.sub(r"[\s.?!]+", " ", text.lower()).strip()


@pytest.fixture(scope="module")
def kinds() -> dict[str, list[Kind]]:
    return read_kinds()


@pytest.fixture(scope="module")
def sums() -> list[list[str]]:
    return Reckoner(random.Random(42), SHARES).conversations(541)


# --- the sums, worked out a second time from the words of the user --------------------------------
PLACE = re.compile(r"\{(\w+)[^}]*\}")
RESULTS = {
    "binary_of": "binary", "binary_from": "n", "hex_of": "hex", "hex_from": "n", "power": "power",
    "max": "top", "bits": "n", "mode_of": "mode", "mode_rwx": "rwx", "may": "owner group others",
    "size": "usable", "mask": "mask", "network": "network", "time": "duration",
    "rate": "bytes_rate", "decimal": "decimal", "binary": "binary", "more": "more",
    "fp32": "fp32", "fp16": "fp16", "int8": "int8", "adam": "adam", "binary_search": "steps",
    "pairs": "pairs", "linear": "n", "code_of": "code", "code_char": "c", "byte": "bits",
    "escape_of": "escape", "escape_from": "word", "modulo": "rest", "floor": "whole",
    "loops": "loops", "and": "both", "or": "either", "xor": "odd", "shift": "shifted",
    "rgb_of": "r g b", "rgb_from": "color", "seconds_in": "seconds", "seconds_from": "h m",
    "down": "allowed", "plain": "rgb", "alpha": "rgba", "pixels": "pixels", "steps": "steps",
    "tokens": "tokens",
}  # fmt: skip


def bases(given: dict) -> dict:
    n = int(given["n"]) if "n" in given else 0
    n = n or (int(given["binary"], 2) if "binary" in given else int(given["hex"], 16))
    parts = [str(2**bit) for bit in range(7, -1, -1) if n // 2**bit % 2]
    assert len(parts) > 1 and n // 16 > 1  # or the answers' plurals are wrong
    shown = {"binary": bin(n)[2:], "hex": hex(n)[2:], "parts": " + ".join(parts)}
    return {"n": n, "high": n // 16, "low": n % 16, "sixteens": n - n % 16, **shown}


def powers(given: dict) -> dict:
    values = [2**bits for bits in range(40)]
    n = int(given["n"]) if "n" in given else 0
    if "count" in given:
        n = next(bits for bits in range(40) if values[bits] >= int(given["count"]))
    top = int("1" * n, 2)
    count = int(given.get("count", 0))
    power, half = values[n], values[n - 1]
    return {"n": n, "power": power, "top": top, "half": half, "less": n - 1, "count": count}


RWX = {stat.filemode(stat.S_IFREG | mode)[1:]: f"{mode:03o}" for mode in range(0o1000)}


def modes(given: dict) -> dict:
    mode = given.get("mode") or RWX[given["rwx"]]
    rwx = stat.filemode(stat.S_IFREG | int(mode, 8))[1:]
    worth, names = {"r": "4", "w": "2", "x": "1"}, {"r": "read", "w": "write", "x": "execute"}
    threes = [[letter for letter in rwx[place : place + 3] if letter != "-"] for place in (0, 3, 6)]
    assert all(int(a) | int(b) == int(a) for a, b in (mode[:2], mode[1:]))
    sums = [" + ".join(worth[letter] for letter in three) or "0" for three in threes]
    assert [str(sum(map(int, part.split(" + ")))) for part in sums] == list(mode)
    may = [" and ".join(names[x] for x in three) or "do nothing" for three in threes]
    may = [words.replace(" and ", ", ", 1) if words.count(" and ") == 2 else words for words in may]
    return {
        "mode": mode, "rwx": rwx, "sums": f"{sums[0]}, {sums[1]} and {sums[2]}",
        "owner": may[0], "group": may[1], "others": may[2],
    }  # fmt: skip


def dotted(number: int) -> str:
    return ".".join(str(number // 256**place % 256) for place in (3, 2, 1, 0))


def subnets(given: dict) -> dict:
    prefix = int(given["prefix"])
    addresses = 2 ** (32 - prefix)
    host = given.get("host", "")
    octets = zip(map(int, (host or "0.0.0.0").split(".")), (3, 2, 1, 0), strict=True)
    number = sum(octet * 256**place for octet, place in octets)
    first = number - number % addresses
    assert not host or first < number < first + addresses - 1
    return {
        "prefix": prefix, "free": 32 - prefix, "addresses": addresses, "usable": addresses - 2,
        "mask": dotted(2**32 - addresses), "host": host, "network": dotted(first),
        "broadcast": dotted(first + addresses - 1),
    }  # fmt: skip


def duration(seconds: int) -> str:
    words = []
    for unit, size in (("hour", 3600), ("minute", 60), ("second", 1)):
        count, seconds = seconds // size, seconds % size
        words += [f"{count} {unit}" + ("" if count == 1 else "s")] if count else []
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def transfers(given: dict) -> dict:
    rate, size = int(given["rate"]), int(given.get("size", 0))
    seconds = Fraction(size * 10**9 * 8, rate * 10**6)
    assert seconds.denominator == 1
    return {
        "rate": rate, "size": size, "seconds": int(seconds), "megabits": size * 10**9 * 8 // 10**6,
        "duration": duration(int(seconds)) if seconds else "", "bytes_rate": rate * 0.125,
    }  # fmt: skip


def sizes(given: dict) -> dict:
    unit = given.get("unit") or given["iunit"].replace("i", "").replace("K", "k")
    power, k = "kMG".index(unit[0]) + 1, int(given["k"])
    decimal, binary = int(f"{k}{'000' * power}"), k << 10 * power
    iunit = unit[0].upper() + "iB"
    assert given.get("iunit", iunit) == iunit
    return {
        "k": k, "unit": unit, "iunit": iunit, "istep": 1 << 10 * power, "decimal": decimal,
        "binary": binary, "more": binary - decimal,
    }  # fmt: skip


def weights(given: dict) -> dict:
    name = given["name"]
    count = Fraction(name[:-1]) * {"B": 10**9, "M": 10**6}[name[-1]]
    sizes = {}
    for kind, size in (("fp32", 4), ("fp16", 2), ("int8", 1), ("adam", 4 + 4)):
        scale, unit = (10**9, "GB") if count * size >= 10**9 else (10**6, "MB")
        sizes[kind] = f"{float(count * size / scale)} {unit}".replace(".0 ", " ")
    return {"name": name, **sizes}


def searches(given: dict) -> dict:
    n, steps = int(given["n"]), 0
    while n >> steps:  # halvings until nothing is left
        steps += 1
    return {"n": n, "less": n - 1, "steps": steps, "power": pow(2, steps), "pairs": comb(n, 2)}


def codes(given: dict) -> dict:
    code = int(given["code"]) if "code" in given else given["c"].encode("ascii")[1]
    bits = "".join(str(code // 2**place % 2) for place in range(7, -1, -1))
    return {"c": f"'{chr(code)}'", "code": code, "hex": hex(code), "bits": bits}


def escapes(given: dict) -> dict:
    words = {word: character for character, word in ESCAPED.items()}
    character = words[given["word"]] if "word" in given else unquote(given["escape"])
    encoded = "%" + character.encode().hex().upper()
    assert quote(character, safe="") in (encoded, character) and unquote(encoded) == character
    word = ESCAPED[character]
    return {"word": word, "escape": encoded, "hex": encoded[1:], "code": ord(character)}


def integers(given: dict) -> dict:
    a, b, low = int(given["a"]), int(given["b"]), int(given.get("low", 0))
    whole = int(Fraction(a, b))
    listed = list(range(low, a, b))
    return {
        "a": a, "b": b, "low": low, "whole": whole, "rest": a - whole * b, "product": whole * b,
        "loops": len(listed), "last": listed[-1],
    }  # fmt: skip


def bitwise(given: dict) -> dict:
    a, b, s = (int(given.get(name, 0)) for name in "abs")
    pairs = list(zip(f"{a:06b}", f"{b:06b}", strict=True))
    found = {
        "a": f"{a:06b}", "b": f"{b:06b}",
        "both": "".join("1" if x == y == "1" else "0" for x, y in pairs),
        "either": "".join("1" if "1" in pair else "0" for pair in pairs),
        "odd": "".join("1" if x != y else "0" for x, y in pairs),
    }  # fmt: skip
    values = {name: int(bits, 2) for name, bits in found.items()}
    shown = {f"{name}bits": bits for name, bits in found.items()}
    return {**values, **shown, "s": s, "times": 2**s, "shifted": a * 2**s}


def colors(given: dict) -> dict:
    if "color" in given:
        r, g, b = bytes.fromhex(given["color"][1:])
    else:
        r, g, b = (int(given[name]) for name in "rgb")
    color = bytes([r, g, b]).hex()
    pairs = {"rhex": color[:2], "ghex": color[2:4], "bhex": color[4:]}
    return {"r": r, "g": g, "b": b, "color": f"#{color}", **pairs}


def times(given: dict) -> dict:
    if "seconds" in given:
        whole = timedelta(seconds=int(given["seconds"]))
    else:
        whole = timedelta(hours=int(given["h"]), minutes=int(given["m"]))
    h, rest = divmod(whole, timedelta(hours=1))
    m = rest // timedelta(minutes=1)
    assert whole == timedelta(hours=h, minutes=m)
    seconds = int(whole.total_seconds())
    return {"h": h, "m": m, "hours": h * 3600, "minutes": m * 60, "seconds": seconds}


def uptimes(given: dict) -> dict:
    days, down = int(given["days"]), 100 - Fraction(given["up"])
    minutes = days * 1440 * down / 100
    hours = minutes / 60
    allowed = f"{float(minutes)} minutes" if minutes < 120 else f"{float(hours)} hours"
    shown = str(float(down)).removesuffix(".0")
    return {"days": days, "up": given["up"], "down": shown, "allowed": allowed.replace(".0 ", " "),
            "total": days * 1440}  # fmt: skip


def images(given: dict) -> dict:
    w, h = int(given["w"]), int(given["h"])
    pixels = len(range(w)) * h
    return {"w": w, "h": h, "pixels": pixels, "rgb": 3 * pixels, "rgba": 4 * pixels}


def epochs(given: dict) -> dict:
    n, batch, length = (int(given.get(name, 0)) for name in ("n", "batch", "length"))
    steps = ceil(Fraction(n, batch))
    assert not n or (steps - 1) * batch < n < steps * batch
    return {"n": n, "batch": batch, "length": length, "steps": steps, "full": steps - 1,
            "covered": (steps - 1) * batch, "tokens": batch * length}  # fmt: skip


SOLVERS: dict[str, Callable[[dict], dict]] = {
    "bases": bases, "powers": powers, "modes": modes, "subnets": subnets, "transfers": transfers,
    "sizes": sizes, "weights": weights, "searches": searches, "ascii": codes, "escapes": escapes,
    "integers": integers, "bitwise": bitwise, "colors": colors, "times": times,
    "uptimes": uptimes, "images": images, "epochs": epochs,
}  # fmt: skip


VALUES = {"word": ".+?", "unit": "[kMG]B", "iunit": "[KMG]iB", "host": r"[\d.]+"}


def pattern(wording: str) -> re.Pattern[str]:
    """A pattern that finds in a question the values that stand in its wording."""
    found, parts = set(), []
    for literal, name in zip(*[iter([*PLACE.split(wording), None])] * 2, strict=True):
        parts.append(re.escape(literal))
        if name:
            value = VALUES.get(name, r"\S+?")
            parts.append(f"(?P={name})" if name in found else f"(?P<{name}>{value})")
            found.add(name)
    return re.compile("".join(parts))


@pytest.fixture(scope="module")
def patterns(kinds: dict[str, list[Kind]]) -> list[tuple[str, str, str, re.Pattern[str]]]:
    """Family, kind, key and pattern of every wording of a question."""
    return [
        (family, kind.name, key, pattern(wording))
        for family, members in kinds.items()
        for kind in members
        for key in QUESTIONS
        for wording in kind.wordings[key]
    ]


def understood(question: str, before: tuple[str, str] | None, patterns: list) -> tuple:
    """Family, kind, key and values of a question, as one hears it after the sum before it."""
    found = []
    for family, kind, key, wording in patterns:
        heard = wording.fullmatch(question)
        alone = before is None and key == "ask"
        later = before and before[0] == family and (key != "ask_again" or before[1] == kind)
        if heard and (alone or later):
            given = {name: value.replace(",", "") for name, value in heard.groupdict().items()}
            found.append((family, kind, key, given))
    assert found, question
    return min(found, key=lambda each: QUESTIONS.index(each[2]))


def test_every_sum_is_right_and_none_comes_twice(
    sums: list[list[str]], patterns: list, kinds: dict[str, list[Kind]]
) -> None:
    for texts in sums:
        before, known = None, {}
        told: set[str] = set()
        said: set[str] = set()
        asked: set[str] = set()  # what was asked about the present values
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            family, kind, key, given = understood(question, before, patterns)
            assert given or key == "ask_on"
            if any(known.get(name) != value for name, value in given.items()):
                known, asked = given, set()
            values = SOLVERS[family](known)
            wordings = next(each.wordings["say"] for each in kinds[family] if each.name == kind)
            spoken_so = [wording for wording in wordings if wording.format(**values) == answer]
            assert spoken_so, (question, answer)
            assert spoken_so[0] not in said or len(wordings) < 3, texts
            said.add(spoken_so[0])
            assert kind.split("_")[0] not in asked, texts
            assert wordings[0].format(**values) not in told, texts
            asked.add(kind.split("_")[0])
            told.add(wordings[0].format(**values))
            before, known = (family, kind), {k: str(v) for k, v in values.items() if v}


@pytest.mark.parametrize("family", SOLVERS)
def test_values_agree_with_a_second_reckoning(family: str) -> None:
    rng = random.Random(8)
    for _ in range(150):
        drawn = {name: str(value) for name, value in DRAWS[family](rng).items()}
        solved = SOLVERS[family](drawn)
        assert {name: str(solved[name]) for name in drawn} == drawn


def test_every_answer_names_its_result(kinds: dict[str, list[Kind]]) -> None:
    for members in kinds.values():
        for kind in members:
            for wording in kind.wordings["say"]:
                assert set(RESULTS[kind.name].split()) <= set(PLACE.findall(wording)), wording
            assert len(kind.wordings["ask"]) >= 3 and len(kind.wordings["ask_again"]) >= 2
            assert len(kind.wordings["say"]) >= 2


@pytest.mark.parametrize(
    ("family", "kind", "given", "needed"),
    [
        ("bases", "binary_of", {"n": "45"}, "101101"),
        ("bases", "hex_from", {"hex": "2d"}, "45"),
        ("powers", "bits", {"count": "257"}, "9 bits"),
        ("modes", "mode_of", {"rwx": "rwxr-x---"}, "750"),
        ("modes", "may", {"mode": "740"}, "everyone else do nothing"),
        ("subnets", "size", {"prefix": "24"}, "256 addresses, 254 of them"),
        ("subnets", "network", {"host": "192.168.1.77", "prefix": "26"}, "192.168.1.64/26"),
        ("transfers", "time", {"size": "3", "rate": "50"}, "8 minutes, at best"),
        ("sizes", "more", {"k": "1", "unit": "MB"}, "48,576"),
        ("weights", "fp16", {"name": "7B"}, "14 GB"),
        ("searches", "binary_search", {"n": "1000"}, "10. "),
        ("ascii", "code_of", {"c": "'a'"}, "97"),
        ("escapes", "escape_of", {"word": "a space"}, "%20"),
        ("uptimes", "down", {"up": "99.9", "days": "30"}, "43.2 minutes"),
    ],
)
def test_the_check_itself(
    family: str, kind: str, given: dict, needed: str, kinds: dict[str, list[Kind]]
) -> None:
    wordings = next(each.wordings for each in kinds[family] if each.name == kind)
    assert needed in wordings["say"][0].format(**SOLVERS[family](given))


def test_sums_are_varied(
    sums: list[list[str]], patterns: list, kinds: dict[str, list[Kind]]
) -> None:
    starts = Counter(understood(texts[0], None, patterns)[:2] for texts in sums)
    families = Counter(family for family, _ in starts.elements())
    assert set(families) == set(SOLVERS) and max(families.values()) - min(families.values()) <= 1
    assert len(starts) == sum(map(len, kinds.values()))
    assert len({bare(texts[0]) for texts in sums}) == len(sums)
    assert {len(texts) for texts in sums} == {4, 6}
    assert all(len(set(map(bare, texts[::2]))) == len(texts) // 2 for texts in sums)


def test_the_generator_decides_alone() -> None:
    first, again, other = (
        Reckoner(random.Random(seed), SHARES).conversations(60) for seed in (7, 7, 8)
    )
    assert first == again
    assert len({texts[0] for texts in first} & {texts[0] for texts in other}) < 30


@pytest.mark.parametrize(("shares", "turns"), [({2: 1.0, 3: 0.0}, 2), ({2: 0.0, 3: 0.1}, 3)])
def test_shares_of_lengths(shares: dict[int, float], turns: int) -> None:
    talks = Reckoner(random.Random(1), shares).conversations(40)
    assert {len(texts) for texts in talks} == {2 * turns}


def test_lengths_keep_to_their_shares(sums: list[list[str]]) -> None:
    assert 0.12 < sum(len(texts) == 4 for texts in sums) / len(sums) < 0.21


# --- the file of wordings -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def entries() -> list[dict]:
    return yaml.safe_load(WORDINGS.read_text(encoding="utf-8"))


def put(folder: Path, entries: Any) -> Path:
    path = folder / "sums.yaml"
    path.write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
    return path


def test_wordings_are_read_as_they_stand(
    entries: list[dict], kinds: dict[str, list[Kind]], tmp_path: Path
) -> None:
    read = [(family, kind) for family, members in kinds.items() for kind in members]
    named = {(family, kind.name): kind.wordings for family, kind in read}
    assert len(named) == len(entries) == len(RESULTS)
    for entry in entries:
        wordings = named[entry["family"], entry["kind"]]
        for key in (*QUESTIONS, "say"):
            assert list(wordings[key]) == entry.get(key, [])
    wide = [{**entry, "say": [f" {text} \n" for text in entry["say"]]} for entry in entries]
    assert read_kinds(put(tmp_path, wide)) == kinds


def changed(entry: dict, **changes: Any) -> dict:
    return {key: value for key, value in {**entry, **changes}.items() if value is not None}


FAULTS: list[tuple[dict, list[str]]] = [
    ({"say": None}, ["sum no. 2", "no 'say'", "add it"]),
    ({"ask_again": None}, ["sum no. 2", "no 'ask_again'", "add it"]),
    ({"ask_onn": ["a?"]}, ["sum no. 2", "'ask_onn'", "did you mean 'ask_on'?"]),
    ({"family": "basis"}, ["sum no. 2", "'basis'", "did you mean 'bases'?", "subnets"]),
    ({"family": ["bases"]}, ["sum no. 2", "['bases']", "give one of bases, powers"]),
    ({"kind": 7}, ["sum no. 2", "the kind 7", "in quotes"]),
    ({"kind": " "}, ["sum no. 2", "the kind ' '", "in quotes"]),
    ({"kind": "binary_of"}, ["'binary_of' stands twice", "change or drop one"]),
    ({"kind": " binary_of "}, ["'binary_of' stands twice", "change or drop one"]),
    ({"ask": "What?"}, ["sum no. 2: 'ask'", "'What?'", "list of texts"]),
    ({"ask": []}, ["sum no. 2: 'ask'", "[]", "list of texts"]),
    ({"ask_on": [3]}, ["sum no. 2: 'ask_on'", "[3]", "in quotes"]),
    ({"say": ["It's {m}."]}, ["sum no. 2", '"It\'s {m}."', "('m')", "only n, binary, hex"]),
    ({"ask": ["What is {}?"]}, ["sum no. 2", "'What is {}?'", "n, binary, hex"]),
    ({"say": ["{"]}, ["sum no. 2", "'{'", "can't be filled in", "n, binary, hex"]),
    ({"ask_again": ["{hex:,}?"]}, ["sum no. 2", "'{hex:,}?'", "can't be filled in"]),
    ({"ask_on": ["{n.x}?"]}, ["sum no. 2", "'{n.x}?'", "can't be filled in"]),
    ({"ask_on": ["{n[0]}?"]}, ["sum no. 2", "'{n[0]}?'", "can't be filled in"]),
]


@pytest.mark.parametrize(("changes", "needed"), FAULTS)
def test_faults_are_named_with_file_sum_and_fix(
    tmp_path: Path, entries: list[dict], changes: dict, needed: list[str]
) -> None:
    path = put(tmp_path, [entries[0], changed(entries[1], **changes), *entries[2:]])
    with pytest.raises(UserError) as caught:
        read_kinds(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert all(words in message for words in needed), message


def test_a_family_without_sums(tmp_path: Path, entries: list[dict]) -> None:
    others = [entry for entry in entries if entry["family"] != "uptimes"]
    with pytest.raises(UserError, match=r"sums.yaml holds no sum of the family 'uptimes'; add one"):
        read_kinds(put(tmp_path, others))


@pytest.mark.parametrize("key", ["ask", "say"])
def test_wordings_that_run_out(tmp_path: Path, entries: list[dict], key: str) -> None:
    dull = [changed(e, **{key: ["Five."] if e["family"] == "colors" else e[key]}) for e in entries]
    reckoner = Reckoner(random.Random(1), SHARES, put(tmp_path, dull))
    with pytest.raises(UserError, match=r"sums.yaml: the family 'colors' makes too few .*; add"):
        reckoner.conversations(60)


def test_files_that_hold_no_sums(tmp_path: Path, entries: list[dict]) -> None:
    with pytest.raises(UserError, match=r"nowhere.yaml can't be read .*; mend it"):
        read_kinds(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match=r"sums.yaml is no YAML list; begin"):
        read_kinds(put(tmp_path, {"bases": entries}))
    with pytest.raises(UserError, match=r"sums.yaml, sum no. 1 is 'bases'; give it the keys ask "):
        read_kinds(put(tmp_path, ["bases"]))
