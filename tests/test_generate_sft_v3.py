"""Tests of the chat data: counts, right sums, one answer per question, the pairs and the CLI."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import generate_sft_v3 as sft  # noqa: E402

STORY_TIMES = re.compile(r"boxes|bags|ticket|rows of|hours a day|legs")
STORY_MINUS = re.compile(r"left|fly away|to go|are sick|take \d+ away|take away|subtract|minus")
STORY_PLUS = re.compile(r"sum of|plus|\badd\b|more\.|in all|get on|both cost|years old")
STORY_DIVIDE = re.compile(r"divide|go into|share|split|teams of|per day")


@pytest.fixture(scope="module")
def talks() -> list[dict]:
    return sft.conversations()


@pytest.fixture(scope="module")
def pairs(talks: list[dict]) -> list[dict]:
    return sft.preference_pairs(talks)


def spoken(talk: dict) -> list[str]:
    return [m["content"] for m in talk["messages"] if m["role"] != "system"]


def expected_result(text: str) -> int:
    """Work out a sum from the words of the user alone."""
    text = text.lower()
    a, b = (int(number) for number in re.findall(r"\d+", text))
    if "%" in text or "percent" in text:
        if "bill" in text or "jacket" in text:
            a, b = b, a
        assert a * b % 100 == 0
        return a * b // 100
    if re.search(r"\d\s*/\s*\d", text) or STORY_DIVIDE.search(text):
        high, low = max(a, b), min(a, b)
        assert high % low == 0
        return high // low
    if STORY_TIMES.search(text) or re.search(r"\d\s*(x|\*)\s*\d|times|multipl", text):
        return a * b
    if re.search(r"\d\s*-\s*\d", text) or STORY_MINUS.search(text):
        return max(a, b) - min(a, b)
    assert re.search(r"\d\s*\+\s*\d", text) or STORY_PLUS.search(text), text
    return a + b


def last_number(text: str) -> int:
    return int(re.findall(r"\d+", text)[-1])


def single_answers(talks: list[dict]) -> dict[str, set[str]]:
    answers = defaultdict(set)
    for talk in talks:
        if len(spoken(talk)) == 2:
            question, answer = spoken(talk)
            answers[question.strip().lower()].add(answer)
    return answers


def test_exact_count_and_all_distinct(talks: list[dict]) -> None:
    assert len(talks) == 2129
    keys = {tuple(text.strip().lower() for text in spoken(talk)) for talk in talks}
    assert len(keys) == 2129
    counts = Counter(talk["category"] for talk in talks)
    assert set(counts) == set(sft.CATEGORIES)
    assert min(counts.values()) >= 40
    assert counts.most_common(1)[0][0] == "math"


def test_first_turns_are_varied(talks: list[dict]) -> None:
    assert len({spoken(talk)[0].lower() for talk in talks}) >= 1600
    bare = Counter(re.sub(r"\W", "", spoken(talk)[0].lower()) for talk in talks)
    assert len(bare) >= 1600


def test_every_sum_is_right(talks: list[dict]) -> None:
    for talk in talks:
        if talk["category"] == "math":
            question, answer = spoken(talk)
            assert last_number(answer) == expected_result(question), (question, answer)
            assert len(answer) < 90


@pytest.mark.parametrize(
    ("question", "result"),
    [
        ("what is 7 times 8?", 56),
        ("subtract 4 from 9", 5),
        ("take 3 away from 10", 7),
        ("How many times does 5 go into 30?", 6),
        ("what is 15% of 200?", 30),
        ("2 friends share 8 cookies evenly. How many does each get?", 4),
    ],
)
def test_the_check_itself(question: str, result: int) -> None:
    assert expected_result(question) == result


def test_all_ordered_products(talks: list[dict]) -> None:
    seen = set()
    for talk in talks:
        text = spoken(talk)[0].lower()
        found = re.search(
            r"(\d+)\s*(?:x|\*|times|multiplied by)\s*(\d+)|multiply (\d+) by (\d+)", text
        )
        if talk["category"] == "math" and found:
            seen.add(tuple(int(number) for number in found.groups() if number))
    assert {(a, b) for a in range(2, 13) for b in range(2, 13)} <= seen


@pytest.mark.parametrize(
    ("question", "needed"),
    [
        ("who made you?", "David Hamner"),
        ("what is 15 + 23?", "38"),
        ("hello", ""),
        ("hi", ""),
        ("what is your name?", "Al"),
        ("what is 7 times 8?", "56"),
        ("how are you?", ""),
        ("what are you?", "language model"),
    ],
)
@pytest.mark.parametrize("seed", [42, 1])
def test_required_turns(question: str, needed: str, seed: int) -> None:
    found = [t for t in sft.conversations(seed) if t["messages"][0]["content"] == question]
    assert len(found) == 1
    roles = [message["role"] for message in found[0]["messages"]]
    assert roles == ["user", "assistant"]
    assert needed in found[0]["messages"][1]["content"]


def test_same_seed_same_output_other_seed_other_order(talks: list[dict]) -> None:
    assert sft.conversations(42) == talks
    other = sft.conversations(7)
    assert len(other) == len(talks)
    assert [spoken(t)[0] for t in other] != [spoken(t)[0] for t in talks]


def test_system_prompts(talks: list[dict]) -> None:
    prompts = sft.system_prompts()
    assert len(prompts) == 4
    used = Counter(t["messages"][0]["content"] for t in talks if len(t["messages"]) % 2)
    assert set(used) == set(prompts)
    assert used.most_common(1)[0][0] == prompts[0]
    assert 0.4 <= sum(used.values()) / len(talks) <= 0.6


def test_roles_and_texts(talks: list[dict]) -> None:
    for talk in talks:
        assert set(talk) == {"messages", "category"}
        roles = [message["role"] for message in talk["messages"]]
        body = roles[1:] if roles[0] == "system" else roles
        assert body == ["user", "assistant"] * (len(body) // 2) and body
        for message in talk["messages"]:
            text = message["content"]
            assert text == text.strip() and text
            assert "<|" not in text and "{" not in text.replace("{'Tom': 30}", "")
            assert text.isascii()


def test_turn_counts(talks: list[dict]) -> None:
    for talk in talks:
        exchanges = len(spoken(talk)) // 2
        allowed = {"followups": {2}, "multi_turn": {2, 3}}.get(talk["category"], {1})
        assert exchanges in allowed


def test_answers_are_short_and_never_corporate(talks: list[dict]) -> None:
    banned = ("as an ai", "as a language model", "i'm here to help", "i cannot assist", "delve")
    for talk in talks:
        for answer in spoken(talk)[1::2]:
            assert not any(words in answer.lower() for words in banned), answer
            assert len(answer) <= 200, answer


def test_one_answer_per_question(talks: list[dict]) -> None:
    assert all(len(answers) == 1 for answers in single_answers(talks).values())
    after: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for talk in talks:
        texts = [text.lower() for text in spoken(talk)]
        for end in range(1, len(texts), 2):
            after[tuple(texts[:end])].add(texts[end])
    assert all(len(answers) == 1 for answers in after.values())


@pytest.mark.parametrize(
    ("topic", "needed"),
    [("maker", "David Hamner"), ("name", "Al"), ("company", "David Hamner")],
)
def test_identity_topics_agree(topic: str, needed: str) -> None:
    entries = yaml.safe_load((sft.FOLDER / "identity.yaml").read_text(encoding="utf-8"))
    answers = next(entry["say"] for entry in entries if entry["topic"] == topic)
    assert all(re.search(rf"\b{needed}\b", answer) for answer in answers)


def test_every_maker_question_names_the_maker(talks: list[dict]) -> None:
    asked = re.compile(r"\bwho('s| is| has)? ?(made|built|created|trained|programmed) you\b")
    found = 0
    for talk in talks:
        texts = spoken(talk)
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            if asked.search(question.lower()):
                found += 1
                assert "David Hamner" in answer
    assert found >= 8


def test_categories_are_a_part_of_the_full_set(talks: list[dict]) -> None:
    part = sft.conversations(categories={"math", "facts"})
    assert part == [talk for talk in talks if talk["category"] in {"math", "facts"}]
    with pytest.raises(ValueError, match="multi_turn"):
        sft.conversations(categories=["nonsense"])


def test_pairs_differ_in_the_last_message_only(talks: list[dict], pairs: list[dict]) -> None:
    assert len(pairs) == len(talks)
    for talk, pair in zip(talks, pairs, strict=True):
        assert set(pair) == {"prompt", "chosen", "rejected", "category"}
        assert pair["chosen"] == talk["messages"]
        assert pair["prompt"] == talk["messages"][-2]["content"]
        assert pair["rejected"][:-1] == pair["chosen"][:-1]
        assert pair["rejected"][-1]["role"] == "assistant"
        assert pair["rejected"][-1]["content"] != pair["chosen"][-1]["content"]


def test_rejected_sums_are_wrong(pairs: list[dict]) -> None:
    for pair in pairs:
        if pair["category"] == "math":
            right, wrong = (pair[side][-1]["content"] for side in ("chosen", "rejected"))
            assert last_number(wrong) != expected_result(pair["prompt"])
            assert re.sub(r"\d+", "", wrong) == re.sub(r"\d+", "", right)


def test_rejected_identity_is_no_true_answer(pairs: list[dict]) -> None:
    for pair in pairs:
        if pair["category"] in {"identity", "greetings"}:
            assert "Hamner" not in pair["rejected"][-1]["content"]
            assert not re.search(r"\bAl\b", pair["rejected"][-1]["content"])


def test_pairs_depend_on_the_seed(talks: list[dict], pairs: list[dict]) -> None:
    assert sft.preference_pairs(talks) == pairs
    assert sft.preference_pairs(talks, seed=1) != pairs


def test_a_pair_of_a_lonely_conversation(talks: list[dict]) -> None:
    for name in sft.CATEGORIES:
        talk = next(talk for talk in talks if talk["category"] == name)
        (pair,) = sft.preference_pairs([talk])
        assert pair["rejected"][-1] != pair["chosen"][-1]


@pytest.fixture
def other_persona(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "personality"
    shutil.copytree(sft.FOLDER, folder)
    monkeypatch.setattr(sft, "FOLDER", folder)
    sft._read.cache_clear()
    sft._topics.cache_clear()
    yield folder
    sft._read.cache_clear()
    sft._topics.cache_clear()


def test_math_fills_up_for_another_persona(other_persona: Path) -> None:
    (other_persona / "identity.yaml").write_text(
        '- {topic: name, ask: ["what is your name?"], say: ["I am Eve."]}\n'
    )
    talks = sft.conversations()
    assert len(talks) == 2129
    assert [t["messages"][-1]["content"] for t in talks if t["category"] == "identity"] == [
        "I am Eve."
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('- {topic: a, ask: ["hello"], say: ["Hey."]}\n', "stands twice"),
        ("- {topic: a, ask: [no], say: [x]}\n", "topic a"),
        ("- {topic: a, ask: [b]}\n", "topic a"),
        ("- {topic: [\n", "not valid YAML"),
    ],
)
def test_faults_in_the_files_are_named(other_persona: Path, content: str, message: str) -> None:
    (other_persona / "identity.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        sft.conversations()


def run_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "generate_sft_v3.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_cli_writes_jsonl(tmp_path: Path, talks: list[dict], pairs: list[dict]) -> None:
    done = run_cli("--pairs", "deep/pairs.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = tmp_path / "data" / "personal" / "sft_diverse_only.jsonl"
    assert [json.loads(line) for line in written.read_text().splitlines()] == talks
    lines = (tmp_path / "deep" / "pairs.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == pairs
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [
        "pairs.jsonl",
        "sft_diverse_only.jsonl",
    ]


def test_cli_refuses_an_unknown_category(tmp_path: Path) -> None:
    done = run_cli("--categories", "math,cooking", "--out", "x.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert "cooking" in done.stderr and "edge_cases" in done.stderr
    assert not list(tmp_path.iterdir())


def test_stats_and_show_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sft.main(["--stats"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in sft.CATEGORIES) and "2129" in table
    assert sft.main(["--show", "3", "--categories", "facts"]) == 0
    assert capsys.readouterr().out.count("[facts]") == 3
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old\n")

    def full_disk(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full_disk)
    assert sft.main(["--out", str(out)]) == 2
    assert "disk full" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert out.read_text() == "old\n"


def test_the_same_file_twice_is_refused(tmp_path: Path) -> None:
    name = str(tmp_path / "a.jsonl")
    with pytest.raises(SystemExit) as stopped:
        sft.main(["--out", name, "--pairs", name])
    assert stopped.value.code == 2


# --- the plain set --------------------------------------------------------------------------------


def exchanges(talks: list[dict]) -> list[tuple[str, str]]:
    """Every question with the answer that follows it, wherever in a conversation they stand."""
    texts = [spoken(talk) for talk in talks]
    return [pair for turns in texts for pair in zip(turns[::2], turns[1::2], strict=True)]


def test_the_plain_set_asks_every_question_once_and_answers_each_topic_in_one_way() -> None:
    pairs = exchanges(sft.plain_conversations())
    questions = [question.lower() for question, _ in pairs]
    assert len(set(questions)) == len(questions)
    who = re.compile(r"who (made|built) you\??")
    maker = [answer for question, answer in pairs if who.fullmatch(question)]
    assert len(maker) >= 2
    assert len(set(maker)) == 1
    assert "David Hamner" in maker[0]


def test_the_plain_set_holds_all_products_in_several_phrasings_and_no_wrong_sum() -> None:
    asked: dict[tuple[int, int], int] = {}
    for _, answer in exchanges(sft.plain_conversations(categories=["math"])):
        found = re.fullmatch(r"(\d+) ([x+]) (\d+) is (\d+)\.|(\d+) times (\d+) is (\d+)\.", answer)
        assert found, answer
        a, sign, b, result = found.group(1, 2, 3, 4)
        assert int(result) == (int(a) * int(b) if sign == "x" else int(a) + int(b))
        if sign == "x":
            asked[int(a), int(b)] = asked.get((int(a), int(b)), 0) + 1
    assert {(a, b) for a in range(2, 13) for b in range(2, 13)} <= asked.keys()
    assert min(asked.values()) >= 3


def test_the_plain_set_has_no_system_prompts_and_some_longer_conversations() -> None:
    talks = sft.plain_conversations()
    assert {message["role"] for talk in talks for message in talk["messages"]} == {
        "user",
        "assistant",
    }
    longer = [talk for talk in talks if len(talk["messages"]) > 2]
    assert 0.02 < len(longer) / len(talks) < 0.3
    alone = {spoken(talk)[0] for talk in talks if len(talk["messages"]) == 2}
    assert {"who made you?", "what is 15 + 23?", "hello", "what is your name?"} <= alone
    assert sft.plain_conversations() == talks
