"""Tests of the technical conversations: the texts, how they are composed, the command line."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import generate_sft_data as tech
from generate_sft_data import casual, conversations, read_topics
from hamner.errors import UserError
from hamner.sources import fingerprint
from technical_sums import Reckoner

ROOT = Path(__file__).resolve().parent.parent
AREAS = {"hardware", "learning", "programming", "systems", "web"}
FENCE = re.compile(r"```(\w*)\n(.*?)\n```", re.DOTALL)


def bare(text: str) -> str:
    """The letters and digits of a text, and the signs that tell one question from another."""
    return re.sub(r"[\s.?!]+", " ", text.lower()).strip()


def spoken(row: dict) -> list[str]:
    return [m["content"] for m in row["messages"] if m["role"] != "system"]


@pytest.fixture(scope="module")
def entries() -> list[dict]:
    """All topics as they stand in the files, each with its area."""
    found = []
    for path in sorted(tech.FOLDER.glob("*.yaml")):
        loaded = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
        found += [{**entry, "area": path.name.split("_")[0].split(".")[0]} for entry in loaded]
    return found


@pytest.fixture(scope="module")
def prepared() -> tuple[list, dict]:
    topics = read_topics()
    return topics, tech.related_topics(topics)


def spare(patch: pytest.MonkeyPatch, prepared: tuple[list, dict]) -> None:
    """Do what takes longer than all the rest only once: read the files and compare the topics."""
    patch.setattr(tech, "read_topics", lambda folder: prepared[0])
    patch.setattr(tech, "related_topics", lambda topics: prepared[1])


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen, Path]]:
    """The script at work in a folder of its own, with another hash seed; begun early, read late."""
    folder = tmp_path_factory.mktemp("elsewhere")
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "generate_sft_data.py")], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    yield process, folder
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def rows(elsewhere: tuple[subprocess.Popen, Path], prepared: tuple[list, dict]) -> list[dict]:
    with pytest.MonkeyPatch.context() as patch:
        spare(patch, prepared)
        return conversations()


@pytest.fixture(scope="module")
def written(rows: list[dict]) -> list[dict]:
    """The conversations that come from the files."""
    return [row for row in rows if row["category"] != "sums"]


def exchanges_of(entry: dict) -> list[tuple[list[str], str]]:
    """Every question with its answer, in whatever part of a topic they stand."""
    pairs = [(part["ask"], part["say"]) for part in entry["open"] + entry["then"]]
    turns = [turn for talk in entry.get("talk", []) for turn in talk]
    return pairs + [(turn["user"], turn["al"]) for turn in turns]


# --- the files ------------------------------------------------------------------------------------


def test_files_keep_to_the_format(entries: list[dict]) -> None:
    assert {entry["area"] for entry in entries} == AREAS
    names = [entry["topic"].lower() for entry in entries]
    assert len(set(names)) == len(names)
    for entry in entries:
        name = entry["topic"]
        assert 2 <= len(entry["open"]) <= 4, name
        assert 5 <= len(entry["then"]) <= 6, name
        assert all(3 <= len(part["ask"]) <= 4 for part in entry["open"]), name
        assert all(2 <= len(part["ask"]) <= 3 for part in entry["then"]), name
        for talk in entry.get("talk", []):
            assert 2 <= len(talk) <= 3, name
            assert all(2 <= len(turn["user"]) <= 3 for turn in talk), name
    assert sum("talk" in entry for entry in entries) >= len(entries) // 5


def test_no_question_opens_two_conversations_and_none_has_two_answers_in_its_topic(
    entries: list[dict],
) -> None:
    firsts: Counter[str] = Counter()
    for entry in entries:
        starts = [part["ask"] for part in entry["open"]]
        starts += [talk[0]["user"] for talk in entry.get("talk", [])]
        firsts.update(bare(text) for texts in starts for text in texts)
        standing = [part["ask"] for part in entry["open"] + entry["then"]]
        inside = Counter(bare(text) for texts in standing for text in texts)
        assert not [text for text, count in inside.items() if count > 1], entry["topic"]
    assert not [text for text, count in firsts.items() if count > 1]


def test_written_texts_are_plain_and_of_fair_length(entries: list[dict]) -> None:
    corporate = re.compile(r"as an ai\b|i'd be happy to|great question|certainly!|delve", re.I)
    for entry in entries:
        for asks, answer in exchanges_of(entry):
            assert all(text.isascii() and text.strip() for text in (*asks, answer)), answer
            assert 40 <= len(answer.strip()) <= 760, answer
            assert all(len(text) <= 240 for text in asks), asks
            assert not corporate.search(answer), answer
    answers = [answer for entry in entries for _, answer in exchanges_of(entry)]
    assert len(set(answers)) == len(answers)


def test_code_in_answers_is_sound(entries: list[dict]) -> None:
    found: Counter[str] = Counter()
    for entry in entries:
        for _, answer in exchanges_of(entry):
            assert answer.count("```") == 2 * len(FENCE.findall(answer)), answer
            for language, code in FENCE.findall(answer):
                found[language] += 1
                if language == "python":
                    ast.parse(code)
                elif language in ("bash", "sh"):
                    done = subprocess.run(["bash", "-n"], input=code, text=True, check=False)
                    assert done.returncode == 0, code
    assert found["python"] >= 3 and found["bash"] + found["sh"] >= 3


# --- the whole set --------------------------------------------------------------------------------


def test_there_are_6010_and_no_two_alike(rows: list[dict]) -> None:
    assert len(rows) == tech.TOTAL == 6010
    assert len({fingerprint(row["messages"]) for row in rows}) == 6010
    assert len({tuple(map(bare, spoken(row))) for row in rows}) == 6010


def test_roles_alternate_and_texts_are_clean(rows: list[dict]) -> None:
    marks = re.compile(r"<\|[^|]*\|>|\[/?INST\]|^(user|assistant|system|al|human|ai):", re.I | re.M)
    for row in rows:
        assert list(row) == ["messages", "category"]
        roles = [message["role"] for message in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        for message in row["messages"]:
            text = message["content"]
            assert text and text == text.strip() and text.isascii(), text
            assert not marks.search(text), text
        assert sum(len(message["content"]) for message in row["messages"]) < 3600


def test_lengths_in_turns(rows: list[dict]) -> None:
    turns = Counter(len(spoken(row)) // 2 for row in rows)
    assert set(turns) <= {2, 3, 4}
    assert 0.80 <= turns[3] / 6010 <= 0.86
    assert 0.14 <= turns[2] / 6010 <= 0.18


def test_system_prompts(rows: list[dict]) -> None:
    texts = yaml.safe_load((ROOT / "personality" / "system_prompts.yaml").read_text())
    heads = [row["messages"][0] for row in rows]
    used = Counter(head["content"] for head in heads if head["role"] == "system")
    assert set(used) == set(texts)
    assert 0.82 <= used.total() / 6010 <= 0.86
    assert used[texts[0]] / used.total() > 0.7


def test_any_beginning_is_a_fair_sample(rows: list[dict]) -> None:
    whole = Counter(row["category"] for row in rows)
    assert set(whole) == {*AREAS, "sums"}
    assert 0.08 <= whole["sums"] / 6010 <= 0.10
    for size, margin in ((2000, 0.03), (500, 0.06)):
        part = Counter(row["category"] for row in rows[:size])
        assert all(abs(part[a] / size - whole[a] / 6010) < margin for a in whole)


def test_sums_stand_among_them_as_they_were_made(rows: list[dict]) -> None:
    sums = [spoken(row) for row in rows if row["category"] == "sums"]
    made = Reckoner(random.Random(42), tech.TURN_SHARES).conversations(len(sums))
    assert sorted(sums) == sorted(made) and sums != made


def test_everything_written_is_used_and_topics_evenly(
    entries: list[dict], written: list[dict]
) -> None:
    said = {text for row in written for text in spoken(row)[1::2]}
    began = Counter(spoken(row)[1] for row in written)
    topics = []
    for entry in entries:
        assert all(answer.strip() in said for _, answer in exchanges_of(entry)), entry["topic"]
        starts = [part["say"] for part in entry["open"]]
        starts += [talk[0]["al"] for talk in entry.get("talk", [])]
        topics.append(sum(began[text.strip()] for text in starts))
        assert all(began[text.strip()] for text in starts), entry["topic"]
    assert sum(topics) == len(written)
    assert max(topics) - min(topics) <= 1


def composition(entries: list[dict]) -> tuple[dict[str, Any], dict[str, Any], set]:
    """Openings and follow-ups by answer, as (topic, area, wordings), and all scripted talks."""
    openings, follow_ups, talks = {}, {}, set()
    for entry in entries:
        for key, parts in ((openings, entry["open"]), (follow_ups, entry["then"])):
            for part in parts:
                asks = {bare(text) for text in part["ask"]}
                key[part["say"].strip()] = (entry["topic"], entry["area"], asks)
        for talk in entry.get("talk", []):
            talks.add(tuple(turn["al"].strip() for turn in talk))
    return openings, follow_ups, talks


def test_conversations_stay_with_their_topic_or_move_on_within_the_area(
    entries: list[dict], written: list[dict]
) -> None:
    openings, follow_ups, talks = composition(entries)
    moved, lengths, leads = Counter(), Counter(), Counter()
    for row in written:
        asks, answers = spoken(row)[::2], spoken(row)[1::2]
        if tuple(answers) in talks:
            continue
        topic, area, wordings = openings[answers[0]]
        assert area == row["category"] and bare(asks[0]) in wordings
        moves_on = answers[-1] in openings
        middle = zip(asks[1:-1] if moves_on else asks[1:], answers[1:], strict=False)
        for ask, answer in middle:
            assert follow_ups[answer][0] == topic and bare(ask) in follow_ups[answer][2]
        assert len(set(answers)) == len(answers)
        if moves_on:
            moved[answers[-1]] += 1
            lengths[len(asks)] += 1
            other, same, wordings = openings[answers[-1]]
            assert other != topic and same == area
            lead_ins = [lead_in for lead_in in map(bare, tech.LEAD_INS) if lead_in]
            starts = [x for x in lead_ins if bare(asks[-1]).startswith(x + " ")]
            assert any(bare(asks[-1]).removeprefix(x).strip() in wordings for x in starts), asks
            leads[starts[0]] += 1
    assert 0.07 <= moved.total() / len(written) <= 0.13
    assert len(leads) == len(tech.LEAD_INS) and max(leads.values()) - min(leads.values()) <= 2
    assert len(moved) > 0.5 * moved.total() and max(moved.values()) <= 5
    firsts = {entry["open"][0]["say"].strip() for entry in entries}
    assert (
        0.2
        < sum(count for answer, count in moved.items() if answer in firsts) / moved.total()
        < 0.8
    )
    assert set(lengths) == {3, 4} and lengths[3] > 5 * lengths[4]


def test_wordings_and_company_are_varied(entries: list[dict], written: list[dict]) -> None:
    firsts = Counter(bare(spoken(row)[0]) for row in written)
    for entry in entries:
        for part in entry["open"]:
            uses = [firsts[bare(text)] for text in part["ask"]]
            assert 1 <= max(uses) <= 2 * min(uses) + 2, part["ask"]
    talks = composition(entries)[2]
    answers = Counter(tuple(spoken(row)[1::2]) for row in written)
    composed = {key: count for key, count in answers.items() if key not in talks}
    assert max(composed.values()) <= 2
    assert sum(count > 1 for count in composed.values()) < len(composed) / 20
    exact = Counter(fingerprint(spoken(row)[0]) for row in written)
    assert len(exact) / len(written) > 0.3


def test_follow_ups_come_in_any_order(entries: list[dict], written: list[dict]) -> None:
    follow_ups = composition(entries)[1]
    after: dict[str, Counter[int]] = defaultdict(Counter)
    for row in written:
        for place, answer in enumerate(spoken(row)[1::2]):
            if answer in follow_ups:
                after[answer][place] += 1
    assert len(after) == len(follow_ups)
    assert sum(places[1] > 0 and places[2] > 0 for places in after.values()) > 0.9 * len(after)


def test_a_handful_opened_at_random_reads_varied(entries: list[dict], rows: list[dict]) -> None:
    topic_of = {}
    for entry in entries:
        for asks, _ in exchanges_of(entry):
            topic_of.update(dict.fromkeys(map(bare, asks), entry["topic"]))
    rng = random.Random(3)
    topics, repeats = [], []
    for _ in range(200):
        ten = [spoken(row) for row in rng.sample(rows, 10)]
        names = {topic_of.get(bare(texts[0]), re.sub(r"\W|\d", "", texts[0])) for texts in ten}
        topics.append(len(names))
        said = Counter(text for texts in ten for text in texts[1::2])
        repeats.append(sum(count > 1 for count in said.values()))
    assert sum(count >= 8 for count in topics) >= 198
    assert sum(count <= 1 for count in repeats) >= 180


def test_some_turns_are_typed_in_haste(entries: list[dict], written: list[dict]) -> None:
    neat = {text for entry in entries for asks, _ in exchanges_of(entry) for text in asks}
    typed = [text for row in written for text in spoken(row)[::2]]
    made = [text for text in typed if text not in neat]
    hasty = [text for text in made if not text[0].isupper() and text[-1] not in "?.!"]
    assert 0.1 <= len(hasty) / len(typed) <= 0.5
    kept = {text for asks in neat for text in re.findall(r"`[^`]*`", asks)}
    assert all(code in kept for text in typed for code in re.findall(r"`[^`]*`", text))


@pytest.mark.parametrize(
    ("text", "hasty"),
    [
        ("What does git rebase do?", "what does git rebase do"),
        ("I keep hearing about DNS. What is it?", "i keep hearing about DNS. what is it"),
        ("Is GitHub the same as Git?!", "is GitHub the same as git"),
        ("Should I learn C or R?", "should i learn C or R"),
        ("A Linux box won't boot. What now?", "a linux box won't boot. what now"),
        ("I'm lost, what's TCP?", "i'm lost, what's TCP"),
        ("What does `ls -R` do?", "What does `ls -R` do?"),
        ("What does chmod -R do?", "What does chmod -R do?"),
        ("What is __init__ for?", "What is __init__ for?"),
        ("Where is /etc/Fstab?", "Where is /etc/Fstab?"),
        ("What does 'Permission denied' mean?", "What does 'Permission denied' mean?"),
        ("What's None in Python? And a True one?", "what's None in python? and a True one"),
        ("already small", "already small"),
    ],
)
def test_casual(text: str, hasty: str) -> None:
    assert casual(text) == hasty


# --- seeds, files and faults ----------------------------------------------------------------------


def entry_of(topic: str, /, **changes: Any) -> dict:
    """A small but whole topic; its texts differ from those of any other."""

    def part(kind: str, wordings: int) -> dict:
        asks = [f"What is {topic} {kind} {number}?" for number in range(wordings)]
        return {"ask": asks, "say": f"It is the answer to {topic} {kind}."}

    entry = {
        "topic": topic,
        "open": [part("open one", 3), part("open two", 3)],
        "then": [part(f"then {number}", 2) for number in range(4)],
    }
    return {**entry, **changes}


def put(folder: Path, name: str, topics: list) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(yaml.safe_dump(topics, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, prepared: tuple[list, dict]) -> None:
    spare(monkeypatch, prepared)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Make the whole set a small one."""
    monkeypatch.setattr(tech, "TOTAL", 200)
    return 200


def test_seeds(loaded: None, few: int) -> None:
    first, again, other = (conversations(seed) for seed in (1, 1, 2))
    assert first == again
    prints, others = ({fingerprint(row["messages"]) for row in rows} for rows in (first, other))
    assert len(prints) == len(others) == few and len(prints & others) < few / 2


def test_order_and_names_of_files_do_not_matter(tmp_path: Path, few: int) -> None:
    topics = [entry_of(f"thing {letter}") for letter in "abcdefghijkl"]
    put(tmp_path / "a", "tools_one.yaml", topics[:5])
    put(tmp_path / "a", "tools_two.yaml", topics[5:])
    turned = [dict(reversed(topic.items())) for topic in reversed(topics)]
    put(tmp_path / "b", "tools_zzz.yaml", turned[:3])
    put(tmp_path / "b", "tools.yaml", turned[3:])
    rows = conversations(5, tmp_path / "a")
    assert rows == conversations(5, tmp_path / "b")
    assert {row["category"] for row in rows} == {"tools", "sums"}


def test_texts_lose_the_space_around_them(tmp_path: Path) -> None:
    wide = [{"ask": [" What? ", "Which?\n"], "say": "\n That. "}]
    put(tmp_path, "tools.yaml", [entry_of("saw", open=wide)])
    opening = read_topics(tmp_path)[0].openings[0]
    assert (opening.ask, opening.say) == (("What?", "Which?"), "That.")


def test_a_single_system_prompt(monkeypatch: pytest.MonkeyPatch, loaded: None, few: int) -> None:
    monkeypatch.setattr(tech, "system_prompts", lambda: ["Be Al."])
    heads = [row["messages"][0] for row in conversations()]
    prompts = [head["content"] for head in heads if head["role"] == "system"]
    assert set(prompts) == {"Be Al."} and 0.7 < len(prompts) / few < 0.95


def test_a_folder_that_holds_too_little(tmp_path: Path) -> None:
    put(tmp_path, "tools.yaml", [entry_of("hammer"), entry_of("saw")])
    with pytest.raises(UserError) as caught:
        conversations(folder=tmp_path)
    found = re.fullmatch(
        r".* holds 2 topics, which make ([\d,]+) distinct conversations, and 6,010 are needed; "
        r"add topics, follow-ups or wordings",
        str(caught.value),
    )
    assert found and 700 < int(found[1].replace(",", "")) < 6010


def test_a_topic_alone_in_its_area_never_moves_on(tmp_path: Path, few: int) -> None:
    put(tmp_path, "tools.yaml", [entry_of("hammer")])
    put(tmp_path, "fruit.yaml", [entry_of("apple")])
    for row in conversations(folder=tmp_path):
        text = " ".join(spoken(row))
        assert not ("hammer" in text and "apple" in text)
        assert len(spoken(row)) <= 6


def test_related_topics_share_words(tmp_path: Path) -> None:
    names = ["cat food", "cat toys", "dog food", "steam engine", "steam boiler"]
    put(tmp_path, "things_one.yaml", [entry_of(name) for name in names])
    names = [f"big red {kind}" for kind in ("bus", "car", "van", "tram", "cart", "boat")]
    put(tmp_path, "cars.yaml", [entry_of(name) for name in [*names, "amphibious bus"]])
    put(tmp_path, "other.yaml", [entry_of("steam iron")])
    topics = read_topics(tmp_path)
    found = tech.related_topics(topics).items()
    related = {name: [topic.name for topic in others] for name, others in found}
    assert related["steam engine"][0] == "steam boiler"
    assert set(related["cat food"][:2]) == {"cat toys", "dog food"}
    assert related["steam iron"] == []
    assert related["big red bus"][0] == "amphibious bus"  # the rarer word counts for more


def without(key: str) -> dict:
    return {name: value for name, value in entry_of("hammer").items() if name != key}


GOOD, TURN = entry_of("saw")["open"], {"user": ["And now?"], "al": "Wait."}
FAULTS: list[tuple[Any, list[str]]] = [
    (without("then"), ["topic no. 2", "no 'then'", "add it"]),
    (without("topic"), ["topic no. 2", "no 'topic'", "add it"]),
    (entry_of("hammer", topic=7), ["topic no. 2", "name 7", "in quotes"]),
    (entry_of("hammer", tlak=[]), ["topic no. 2", "'tlak'", "did you mean 'talk'?"]),
    (entry_of("hammer", open=[]), ["topic 'hammer'", "'open'", "holds 0", "at least 1"]),
    (entry_of("hammer", then=GOOD[:1]), ["topic 'hammer'", "'then'", "holds 1", "at least 2"]),
    (entry_of("hammer", then="more"), ["topic 'hammer'", "'then'", "'more'"]),
    (entry_of("hammer", open=[{"ask": ["a?"]}]), ["topic 'hammer'", "'open'", "no 'say'"]),
    (entry_of("hammer", open=[{"ask": [], "say": "b"}]), ["topic 'hammer'", "'ask'", "[]"]),
    (entry_of("hammer", open=[{"ask": "a?", "say": "b"}]), ["'ask'", "'a?'", "list of texts"]),
    (entry_of("hammer", open=[{"ask": [" "], "say": "b"}]), ["'ask'", "[' ']", "list of texts"]),
    (entry_of("hammer", open=[{"ask": [True], "say": "b"}]), ["'ask'", "[True]", "in quotes"]),
    (entry_of("hammer", open=[{"ask": ["a?"], "say": ["b"]}]), ["'say'", "['b']", "one text"]),
    (entry_of("hammer", open=[{"ask": ["a?"], "say": " "}]), ["'say'", "one text"]),
    (entry_of("hammer", open=["what?"]), ["topic 'hammer'", "'what?'", "ask and say"]),
    (entry_of("hammer", talk=[[TURN]]), ["topic 'hammer'", "'talk'", "holds 1", "at least 2"]),
    (entry_of("hammer", talk=[[TURN] * 5]), ["topic 'hammer'", "'talk'", "5 turns", "at most 4"]),
    (entry_of("hammer", talk=[[TURN, {"user": ["a"]}]]), ["topic 'hammer'", "'talk'", "no 'al'"]),
    (entry_of("Saw"), ["the topic 'Saw' stands twice", "change or drop"]),
    (entry_of("hammer", open=GOOD), ["'What is saw open one 0?'", "topic 'saw'", "'hammer'"]),
    ("hammer", ["topic no. 2", "'hammer'", "open and then and topic"]),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "needed"), FAULTS)
def test_faults_are_named_with_file_topic_and_fix(
    tmp_path: Path, entry: Any, needed: list[str]
) -> None:
    put(tmp_path, "tools_a.yaml", [entry_of("saw"), entry])
    with pytest.raises(UserError) as caught:
        conversations(folder=tmp_path)
    message = str(caught.value)
    assert "tools_a.yaml" in message and "\n" not in message
    assert all(words in message for words in needed), message


def test_the_same_first_question_in_two_files(tmp_path: Path) -> None:
    put(tmp_path, "tools.yaml", [entry_of("saw")])
    talk = [{"user": ["what IS saw  open two 1"], "al": "Sharp."}, TURN]
    put(tmp_path, "wood.yaml", [entry_of("oak", talk=[talk])])
    with pytest.raises(UserError, match=r"stands twice, in .*tools.yaml, .*'saw' and .*'oak'; "):
        read_topics(tmp_path)


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("- {topic: [\n", r"bad.yaml, line \d+: not valid YAML .*; mend it"),
        ("topic: saw\n", r"bad.yaml is no YAML list; begin"),
        ("", r"bad.yaml is no YAML list; begin"),
        ("\x00", r"bad.yaml.*mend it"),
    ],
)
def test_files_that_are_no_lists_of_topics(tmp_path: Path, text: str, needed: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=needed):
        read_topics(tmp_path)


def test_an_empty_folder_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no topics; put"):
        read_topics(tmp_path)
    (tmp_path / "bad.yaml").write_bytes(b"- \xff\xfe")
    with pytest.raises(UserError, match=r"bad.yaml can't be read .*; mend it"):
        read_topics(tmp_path)


# --- the command line -----------------------------------------------------------------------------


def test_cli_writes_the_same_rows_in_another_process(
    rows: list[dict], elsewhere: tuple[subprocess.Popen, Path]
) -> None:
    process, folder = elsewhere
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "")
    assert out == "6,010 conversations in data/personal/sft_conversations.jsonl\n"
    path = folder / "data" / "personal" / "sft_conversations.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert [each for each in folder.rglob("*.*") if each.is_file()] == [path]


def test_stats_and_show_write_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    loaded: None,
    few: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tech.main(["--stats"]) == 0
    table = capsys.readouterr().out
    assert all(area in table for area in {*AREAS, "sums"})
    counted = next(line.split() for line in table.splitlines() if line.startswith(" all "))
    rows = conversations()
    turns = Counter(len(spoken(row)) // 2 for row in rows)
    sizes = [sum(map(len, spoken(row))) for row in rows]
    assert counted[1:5] == [str(n) for n in (few, turns[2], turns[3], turns[4])]
    assert counted[5:7] == [f"{round(sum(sizes) / few):,}", f"{max(sizes):,}"]
    assert int(counted[7]) == len({spoken(row)[0].lower() for row in rows})
    assert "200 conversations" in table and "all distinct: yes" in " ".join(table.split())
    assert tech.main(["--show", "3", "--seed", "9"]) == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"^\[\w+\]$", shown, re.M)) == 3
    picked = random.Random(9).sample(conversations(9), 3)
    assert shown == "\n\n".join(map(tech.readable, picked)) + "\n"
    for count, shown in (("999", few), ("0", 0), ("-1", 0)):
        assert tech.main(["--show", count]) == 0
        assert len(re.findall(r"^\[\w+\]$", capsys.readouterr().out, re.M)) == shown
    assert not list(tmp_path.iterdir())


def test_stats_say_when_some_are_alike(rows: list[dict]) -> None:
    upper = {"messages": [{**m, "content": m["content"].upper()} for m in rows[0]["messages"]]}
    caption = tech.stats_table([*rows[:3], {**rows[0], **upper}]).caption
    assert "4 conversations" in caption and "all distinct: no" in caption


def test_shown_code_is_set_in() -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a:\n```\nb\n```"}]
    text = tech.readable({"messages": talk, "category": "web"})
    assert text == "[web]\n  user: hi\n    al: a:\n        ```\n        b\n        ```"


def test_an_output_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: None, few: int
) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match=r"x.jsonl can't be written .*; choose another --out"):
        tech.main(["--out", str(tmp_path / "file" / "x.jsonl")])
    out = tmp_path / "out.jsonl"
    out.write_text("old\n")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        tech.main(["--out", str(out)])
    assert out.read_text() == "old\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out.jsonl"]


def test_a_fault_ends_the_script_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script = shutil.copy(ROOT / "generate_sft_data.py", tmp_path)
    put(tmp_path / "personality", "system_prompts.yaml", ["Be Al."])
    put(tmp_path / "personality" / "technical", "tools.yaml", [entry_of("saw")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: .*technical holds 1 topics, .* wordings\n", said)
    assert not (tmp_path / "data").exists()
