"""Tests of the prose generator: the texts are read back with independent small checkers."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import generate_prose as prose

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"story", "description", "dialogue", "how_to", "everyday", "letter"}
SOUNDS_LIKE_YOU = ("one", "uni", "use", "usual", "euro")  # a vowel letter, but "a"
SILENT_H = ("hour", "honest", "honor", "heir")  # a consonant letter, but "an"
KIN = "grandmother|grandfather|mother|father|aunt|uncle|sister|brother"
SKY = {
    "sunny": "sun was bright|clear and blue|a cloud in the sky",
    "windy": "wind was",
    "cloudy": "gray clouds|clouds hung",
    "rainy": "rain was",
    "foggy": "fog lay|hidden in fog",
    "snowy": "snow covered|snow lay",
}
WRONG_FORMS = set(
    re.findall(
        r"\w+",
        """goed runned catched thinked throwed readed eated maked taked gived comed swimmed sended
        childs mouses mans breads rices finded heared selled shaked rided""",
    )
)


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str]]:
    rng = random.Random(2024)
    return [prose.compose(rng) for _ in range(3000)]


def texts_of(rows: list[tuple[str, str]], kind: str) -> list[str]:
    return [text for each, text in rows if each == kind]


def article_faults(text: str) -> list[str]:
    faults = []
    for article, word in re.findall(r"\b(an?) (\w+)", text, re.IGNORECASE):
        vowel = word[0].lower() in "aeiou" and not word.lower().startswith(SOUNDS_LIKE_YOU)
        vowel = vowel or word.lower().startswith(SILENT_H)
        if (article.lower() == "an") != vowel:
            faults.append(f"{article} {word}")
    return faults


def surface_faults(text: str) -> list[str]:
    patterns = {
        "double space": r"  ",
        "space at a line end": r" \n|\n | $",
        "space before a mark": r" [.,?!]",
        "doubled mark": r"[.,?!][.,]|[,;:][?!]",
        "doubled word": r"(?i)\b(\w+)\s+\1\b",
        "small letter after a sentence": r"[.?!]\s+[a-z]|\.\"\s+[a-z]",
        "trace of a template": r"[\[\]{}<>|@$~^#«»_]",
        "no mark at a paragraph end": r"[A-Za-z]\n\n",
    }
    faults = [name for name, pattern in patterns.items() if re.search(pattern, text)]
    return faults + (["open quotation"] if text.count('"') % 2 else [])


def hero_of(story: str) -> tuple[str, str]:
    """The first name of a story, and the pronoun that its list promises."""
    pronoun = {name: key for key in ("she", "he") for name in prose.RULES[key]}
    return next((word, pronoun[word]) for word in re.findall(r"\w+", story) if word in pronoun)


def is_alone(story: str) -> bool:
    """True when no second person of the story is named by name, family, or trade."""
    names = {*prose.RULES["she"], *prose.RULES["he"]} & set(re.findall(r"\w+", story))
    trades = "|".join(prose.RULES["job"])
    return len(names) == 1 and not re.search(
        rf"\b(?:his|her) (?:big )?(?:{KIN})|the (?:{trades})\b", story
    )


def pronoun_faults(story: str, pronoun: str) -> list[str]:
    wrong = {"she": r"he|him|his|himself", "he": r"she|her|hers|herself"}[pronoun]
    return re.findall(rf"(?i)\b(?:{wrong})\b", story)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def test_same_seed_same_document() -> None:
    first = [prose.document(random.Random(seed)) for seed in range(40)]
    assert first == [prose.document(random.Random(seed)) for seed in range(40)]
    assert len(set(first)) == 40


def test_global_random_state_is_not_used() -> None:
    random.seed(1)
    before = random.getstate()
    prose.document(random.Random(3))
    assert random.getstate() == before


def test_lengths_and_paragraphs(rows: list[tuple[str, str]]) -> None:
    for _, text in rows:
        assert 60 <= len(text.split()) <= 220, text
        assert 1 <= len(text.split("\n\n")) <= 4, text


def test_documents_are_distinct(rows: list[tuple[str, str]]) -> None:
    assert len({text for _, text in rows}) == len(rows)


def test_every_kind_occurs(rows: list[tuple[str, str]]) -> None:
    counts = Counter(kind for kind, _ in rows)
    assert set(counts) == KINDS
    assert min(counts.values()) > 250


def test_beginning_and_end(rows: list[tuple[str, str]]) -> None:
    for kind, text in rows:
        assert text.lstrip('"')[0].isupper(), text
        if kind == "letter":
            assert re.match(r"Dear [A-Z]\w+,\n\n", text), text
            assert re.search(r"\n\n[A-Z][\w ]+,\n[A-Z]\w+$", text), text
        else:
            assert text.endswith((".", "!", "?", '."', '!"', '?"')), text


def test_surface_checker_can_fail() -> None:
    assert surface_faults('He said, "Go." Then she ran.') == []
    for bad in (
        "A  b.",
        "He saw the the cat.",
        "He ran. then she ran.",
        'He said, "Go.',
        "A [b].",
        "A ,",
    ):
        assert surface_faults(bad), bad


def test_surface(rows: list[tuple[str, str]]) -> None:
    assert [(surface_faults(text), text) for _, text in rows if surface_faults(text)] == []


def test_article_checker_can_fail() -> None:
    assert article_faults("a owl, an dog, A apple") == ["a owl", "an dog", "A apple"]
    assert article_faults("an hour, a useful tool, a one-way street, an owl") == []


def test_articles(rows: list[tuple[str, str]]) -> None:
    assert [fault for _, text in rows for fault in article_faults(text)] == []
    assert sum(len(re.findall(r"\ban \w", text)) for _, text in rows) > 300


def test_no_wrong_forms(rows: list[tuple[str, str]]) -> None:
    assert not WRONG_FORMS & {word for _, text in rows for word in words_of(text)}


def test_hero_is_named_at_both_ends(rows: list[tuple[str, str]]) -> None:
    for story in texts_of(rows, "story"):
        name, _ = hero_of(story)
        words = re.findall(r"\w+", story)
        assert name in words[:25] and name in words[-35:], story


def test_pronouns_of_a_hero_alone(rows: list[tuple[str, str]]) -> None:
    assert pronoun_faults("Ben ran. She fell.", "he") == ["She"]
    alone = [story for story in texts_of(rows, "story") if is_alone(story)]
    assert len(alone) > 100
    for story in alone:
        name, pronoun = hero_of(story)
        assert pronoun_faults(story, pronoun) == [], (name, story)
        assert re.search(rf"(?i)\b{pronoun}\b", story), story


def test_pronouns_in_a_day(rows: list[tuple[str, str]]) -> None:
    for text in texts_of(rows, "everyday"):
        assert pronoun_faults(text, hero_of(text)[1]) == [], text


def test_story_keeps_weather_and_time(rows: list[tuple[str, str]]) -> None:
    seen: Counter[str] = Counter()
    for story in texts_of(rows, "story"):
        start, end = story[: len(story) // 2], story[len(story) // 2 :]
        if still := re.search(r"still (\w+y)\b", end):
            seen["weather"] += 1
            assert re.search(rf"(?i){still[1]}|{SKY[still[1]]}", start), story
        if re.search(r"At (noon|lunch)|not yet noon|wasn't yet noon", end):
            seen["morning"] += 1
            assert "morning" in start and "afternoon" not in start, story
        if "That evening" in end:
            seen["afternoon"] += 1
            assert "afternoon" in start and "morning" not in start, story
    assert min(seen[key] for key in ("weather", "morning", "afternoon")) > 30


def test_story_keeps_its_object(rows: list[tuple[str, str]]) -> None:
    toys = [story for story in texts_of(rows, "story") if "kite" in story]
    assert len(toys) > 20
    for story in toys:
        assert len(set(re.findall(r"(?:red|yellow|striped|paper) kite", story))) == 1, story
        assert len(set(re.findall(r"long (rake|pole|broom)", story))) == 1, story


def test_dialogue_has_two_speakers(rows: list[tuple[str, str]]) -> None:
    for text in texts_of(rows, "dialogue"):
        assert text.count('"') >= 12 and "?" in text, text
        assert re.search(r" and (?:his|her) (?:friend \w+|[a-z ]+) were ", text), text


def test_steps_stay_in_order(rows: list[tuple[str, str]]) -> None:
    eggs = [text.lower() for text in texts_of(rows, "how_to") if "boil an egg" in text]
    assert len(eggs) > 20
    for text in eggs:
        places = [
            text.find(word)
            for word in ("fill the pot", "bring", "lower", "minutes", "lift", "peel")
        ]
        assert places[0] >= 0 and places == sorted(places), text


def test_letters_join_two_people(rows: list[tuple[str, str]]) -> None:
    for text in texts_of(rows, "letter"):
        assert re.match(r"Dear (\w+)", text)[1] != text.rsplit("\n", 1)[1], text


def test_vocabulary(rows: list[tuple[str, str]]) -> None:
    assert 800 <= len({word for _, text in rows for word in words_of(text)}) <= 3000


def test_stories_use_many_plots_and_patterns(rows: list[tuple[str, str]]) -> None:
    stories = texts_of(rows, "story")
    starts = Counter(" ".join(words_of(story)[:2]) for story in stories)
    assert starts.most_common(1)[0][1] < len(stories) / 4
    plots = ("kite", "wheel", "duckling", "bicycle", "cellar", "seed", "kitten", "vase", "birthday")
    assert all(any(plot in story for story in stories) for plot in plots)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_one_kind(kind: str) -> None:
    rng = random.Random(7)
    assert {prose.compose(rng, kind)[0] for _ in range(20)} == {kind}
    assert (
        prose.document(random.Random(7), kinds=[kind]) == prose.compose(random.Random(7), kind)[1]
    )


@pytest.mark.parametrize("kinds", ["poem", ["story", "poem"], []])
def test_unknown_kind(kinds: str | list[str]) -> None:
    with pytest.raises(ValueError, match="valid kinds") as caught:
        prose.document(random.Random(1), kinds=kinds)
    assert all(kind in str(caught.value) for kind in KINDS)


def test_cli_prints_documents() -> None:
    command = [sys.executable, str(ROOT / "generate_prose.py"), "--count", "2", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = re.split(r"\n\n-{10,}\n\n", done.stdout.rstrip("\n"))
    rng = random.Random(5)
    assert [first, second] == [prose.document(rng), prose.document(rng)]


def test_import_is_silent() -> None:
    command = [sys.executable, "-c", "import generate_prose"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == done.stderr == ""


def test_cli_writes_json_lines(tmp_path: Path) -> None:
    target = tmp_path / "new" / "prose.jsonl"
    assert prose.main(["--count", "25", "--kind", "letter", "--out", str(target)]) == 0
    found = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert len(found) == 25 and all(set(row) == {"text", "kind"} for row in found)
    assert {row["kind"] for row in found} == {"letter"}
    assert os.listdir(target.parent) == ["prose.jsonl"]


def test_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "prose.jsonl"
    target.write_text("old\n", encoding="utf-8")

    def refuse(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", refuse)
    assert prose.main(["--out", str(target)]) == 2
    assert "no room" in capsys.readouterr().err
    assert target.read_text(encoding="utf-8") == "old\n"
    assert os.listdir(tmp_path) == ["prose.jsonl"]


@pytest.mark.parametrize("wrong", [["--kind", "poem"], ["--count", "0"]])
def test_cli_refuses(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert prose.main(wrong) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("generate_prose.py: ") and err.count("\n") == 1


def test_cli_stats(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(prose, "STATS_DOCUMENTS", 300)
    assert prose.main(["--stats"]) == 0
    table = capsys.readouterr().out
    assert all(re.search(rf"{kind} +\d+ +\d+\.\d", table) for kind in KINDS)
    assert "distinct documents: 300 of 300" in table
    assert "distinct words" in table and "distinct sentences" in table
