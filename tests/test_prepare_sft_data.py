"""Tests of the gathering of conversations for stage 4: filters, copies, split, files."""

from __future__ import annotations

import io
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import Workshop, some_text, write_lines

import prepare_sft_data
from hamner.errors import UserError
from hamner.recipe import Recipe, SFTSource, check_recipe
from hamner.sources import fingerprint, is_held_out, open_stream
from prepare_sft_data import Gathered, Parts, clean, gather, keep

Message = dict[str, Any]


def system(content: Any) -> Message:
    return {"role": "system", "content": content}


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def answer(content: Any) -> Message:
    return {"role": "assistant", "content": content}


def talk(number: int) -> list[Message]:
    rng = random.Random(number)
    return [user(f"Question {number}? {some_text(rng, 3)}"), answer(some_text(rng, 6))]


def fresh(at_most: int | None = None, **limits: Any) -> Gathered:
    return Gathered(SFTSource(name="talk", label="talk", at_most=at_most, repeat=1, **limits))


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


class Shop:
    """A recipe whose conversations a test writes; the script's main runs in this process."""

    def __init__(self, raw: dict[str, Any], data: Path, monkeypatch: pytest.MonkeyPatch):
        self.raw, self.data, self._monkeypatch = raw, data, monkeypatch
        self.folder = Path(raw["sft"]["data"]["folder"])
        self.options: list[str] = []

    def add(self, name: str, conversations: list[Any], **settings: Any) -> None:
        """A further source of conversations; the first call does away with the fixture's."""
        spec = {"name": name, "label": f"label of {name}", "repeat": 1, **settings}
        listed = self.raw["sft"]["data"]["sources"]
        if listed == [{"name": "talk", "label": "talk", "repeat": 1}]:
            listed.clear()
        listed.append(spec)
        self.raw["sources"].setdefault(name, {**self.raw["sources"]["talk"]})
        self.raw["sources"][name]["paths"] = [f"{name}.jsonl"]
        write_lines(self.data / f"{name}.jsonl", [{"messages": c} for c in conversations])

    def recipe(self) -> Recipe:
        return check_recipe(self.raw, "r.yaml")

    def gather(self, name: str) -> Gathered:
        (spec,) = [s for s in self.recipe().sft.data.sources if s.name == name]
        return gather(self.recipe(), spec, set(), Parts(self.folder / "parts" / name, "key"))

    def run(self) -> None:
        path = self.data / "recipe.yaml"
        path.write_text(json.dumps(self.raw), encoding="utf-8")
        self._monkeypatch.setattr(
            sys, "argv", ["prepare_sft_data.py", "--recipe", str(path), *self.options]
        )
        assert prepare_sft_data.main() == 0
        assert not (self.folder / "parts").exists()

    def written(self) -> dict[str, list[dict[str, Any]]]:
        return {side: rows_in(self.folder / f"{side}.jsonl") for side in ("train", "validation")}

    def all_written(self) -> list[dict[str, Any]]:
        return [row for rows in self.written().values() for row in rows]


@pytest.fixture
def shop(raw: dict[str, Any], data: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    raw["held_out_fraction"] = 0.2
    return Shop(raw, data, monkeypatch)


# ------------------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ("a plain text", "not a conversation"),
        ([user("hi"), answer("")], "empty message"),
        ([user(" \n\t"), answer("hello")], "empty message"),
        ([system(""), user("hi"), answer("hello")], "empty message"),
        ([user("hi"), {"role": "bot", "content": "hello"}], "malformed message"),
        ([user("hi"), {"content": "hello"}], "malformed message"),
        ([user("hi"), {"role": "assistant"}], "malformed message"),
        ([user("hi"), answer(None)], "malformed message"),
        ([user("hi"), answer(["hello"])], "malformed message"),
        ([user("hi")], "no answer"),
        ([system("be brief"), user("hi")], "no answer"),
        ([system("be brief")], "no answer"),
        ([], "no answer"),
        ([answer("hello"), user("hi"), answer("yes")], "turns out of order"),
        ([user("hi"), user("hi?"), answer("yes")], "turns out of order"),
        ([user("hi"), answer("hello"), answer("yes")], "turns out of order"),
        ([user("hi"), system("be brief"), answer("yes")], "turns out of order"),
        ([system("a"), system("b"), user("hi"), answer("yes")], "turns out of order"),
        ([answer("hello")], "turns out of order"),
    ],
)
def test_a_conversation_that_cannot_be_learnt_from_is_dropped(document: Any, reason: str) -> None:
    assert clean(document) == reason


def test_a_good_conversation_stays_as_it_is() -> None:
    messages = [system("be brief"), user("hi"), answer("hello"), user("bye"), answer("see you")]
    assert clean(messages) == messages
    assert clean(messages[1:]) == messages[1:]


def test_white_space_around_messages_and_further_fields_go() -> None:
    document = [{**user("  hi\n"), "id": "7"}, answer("\n\n one\n\n two ")]
    assert clean(document) == [user("hi"), answer("one\n\n two")]


def test_turns_after_the_last_answer_are_cut_off() -> None:
    messages = [user("hi"), answer("hello")]
    assert clean([*messages, user("and then?")]) == messages
    assert clean([*messages, user("and then?"), user("well?"), system("x")]) == messages


def test_conversations_too_short_or_too_long_are_dropped() -> None:
    gathered = fresh(min_characters=6, max_characters=8)
    reasons = [
        keep([user("ab"), answer("c" * size)], gathered, 0.0, set()) for size in (3, 4, 6, 7)
    ]
    assert reasons == ["too short", None, None, "too long"]
    assert [len(messages[1]["content"]) for messages in gathered.train] == [4, 6]


def test_without_a_limit_any_length_is_taken() -> None:
    for size in (1, 100_000):
        assert keep([user("a"), answer("b" * size)], fresh(), 0.0, set()) is None


def test_what_was_dropped_is_counted_by_reason(shop: Shop) -> None:
    good = [talk(i) for i in range(20)]
    bad = [
        [user("hi")],
        [user("hi"), answer(" ")],
        [user("hi"), answer(None)],
        [*talk(50), *talk(51)],
    ]
    shop.add("mine", [*good, *bad, *good[:5], [user("hey"), {"role": "bot", "content": "x"}]])
    gathered = shop.gather("mine")
    assert len(gathered.kept) == 21
    assert gathered.dropped == {
        "no answer": 1, "empty message": 1, "malformed message": 2, "copy": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    "message", [answer(5), answer(True), answer({"text": "x"}), "words", 5, None, ["x"]]
)
def test_a_message_of_any_wrong_kind_is_dropped_without_a_crash(shop: Shop, message: Any) -> None:
    shop.add("mine", [talk(1), [user("what is this?"), message], talk(2)])
    assert len(shop.gather("mine").kept) == 2


def test_half_a_character_in_a_text_does_not_end_the_gathering(shop: Shop) -> None:
    """JSON may hold one half of an emoji, as where a text was cut by length."""
    shop.add("mine", [talk(i) for i in range(30)] + [[user("cut \ud83d"), answer("here")]])
    shop.run()
    assert len(shop.all_written()) in (30, 31)


def test_a_source_of_which_nothing_is_left_is_an_error(shop: Shop) -> None:
    shop.add("mine", [[user("no answer")]] * 3)
    with pytest.raises(UserError, match="source 'mine': not one conversation passed the filters"):
        shop.gather("mine")


# ------------------------------------------------------------------------------- copies


def variants(messages: list[Message]) -> list[list[Message]]:
    """The same conversation in other looks."""
    return [
        messages,
        [{**m, "content": m["content"].upper()} for m in messages],
        [{**m, "content": f"  {m['content']}\n"} for m in messages],
        [{**m, "content": m["content"].replace(" ", "\n  ")} for m in messages],
    ]


def test_copies_that_differ_in_case_and_white_space_are_dropped(shop: Shop) -> None:
    shop.add("mine", [variant for i in range(30) for variant in variants(talk(i))])
    gathered = shop.gather("mine")
    assert len(gathered.kept) == 30 and gathered.dropped == {"copy": 90}
    assert {m[0]["content"].lower().split()[1] for m in gathered.kept} == {
        f"{i}?" for i in range(30)
    }


def test_copies_with_a_system_prompt_in_other_looks_are_dropped() -> None:
    seen: set[str] = set()
    looks = [[system(prompt), *talk(1)] for prompt in ("Be brief.", "BE BRIEF.", "be  brief.")]
    assert [keep(messages, fresh(), 0.0, seen) for messages in looks] == [None, "copy", "copy"]


def test_copies_in_different_sources_are_kept_once(shop: Shop) -> None:
    shop.add("one", [talk(i) for i in range(40)])
    shop.add("two", [variants(talk(i))[1] for i in range(30, 70)])
    shop.run()
    rows = shop.all_written()
    assert len({fingerprint(row["messages"]) for row in rows}) == len(rows) == 70
    assert Counter(row["source"] for row in rows) == {"label of one": 40, "label of two": 30}


def test_conversations_that_differ_in_their_words_or_roles_are_no_copies() -> None:
    seen: set[str] = set()
    different = [
        [user("a b"), answer("c")],
        [user("ab"), answer("c")],
        [user("a"), answer("b c")],
        [user("a b"), answer("c"), user("d"), answer("e")],
        [system("be brief"), user("a b"), answer("c")],
        [system("be long"), user("a b"), answer("c")],
    ]
    gathered = fresh()
    assert [keep(messages, gathered, 0.0, seen) for messages in different] == [None] * 6


# ------------------------------------------------------------------------------- the split


def test_planted_copies_never_stand_on_both_sides(shop: Shop) -> None:
    """Neither in one run, nor where one run sees one copy and the next run another."""
    conversations = [variant for i in range(150) for variant in variants(talk(i))]
    conversations += [[system("be brief"), *talk(i)] for i in range(150)]
    random.Random(0).shuffle(conversations)
    shop.add("one", conversations[::2])
    shop.add("two", conversations[1::2])
    shop.run()
    prints = {side: {fingerprint(row["messages"]) for row in rows}
              for side, rows in shop.written().items()}  # fmt: skip
    assert not prints["train"] & prints["validation"]
    assert len(prints["train"] | prints["validation"]) == 150
    for i in range(150):
        sides = set()
        for variant in [*variants(talk(i)), [system("be brief"), *talk(i)]]:
            gathered, messages = fresh(), clean(variant)
            keep(messages, gathered, 0.2, set())
            sides.add(bool(gathered.validation))
        assert len(sides) == 1


def test_about_the_held_out_fraction_goes_to_validation(shop: Shop) -> None:
    shop.add("mine", [talk(i) for i in range(1_000)])
    shop.run()
    written = shop.written()
    assert len(written["train"]) + len(written["validation"]) == 1_000
    assert 150 < len(written["validation"]) < 250


def test_what_validates_here_was_held_out_in_the_stages_before(shop: Shop) -> None:
    """Also where looks differ, or a question without an answer was cut off at the end."""
    conversations = [[system("be brief"), *talk(i)] if i % 2 else talk(i) for i in range(200)]
    for i in range(0, 200, 4):
        conversations[i] = [*conversations[i], user(f"And then {i}?")]
    shop.add("mine", conversations)
    shop.run()
    trained_on = {fingerprint(clean(d)) for d in open_stream("mine", shop.recipe()).one_epoch()}
    leaked = [r for r in shop.written()["validation"] if fingerprint(r["messages"]) in trained_on]
    assert not leaked
    assert all(is_held_out(row["messages"], 0.2) for row in shop.written()["validation"])


# ------------------------------------------------------------------------------- how many


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [False, True])
def test_at_most_so_many_conversations_are_kept(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    """With a progress bar and without one, as under nohup."""
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    shop.add("mine", [talk(i) for i in range(60)], at_most=25)
    assert len(shop.gather("mine").kept) == 25


def test_dropped_conversations_do_not_count_towards_at_most(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    shop.add("mine", [[user("hi")]] * 50 + [talk(i) for i in range(30)], at_most=30)
    assert len(shop.gather("mine").kept) == 30


def test_fewer_than_at_most_are_all_kept(shop: Shop) -> None:
    shop.add("mine", [talk(i) for i in range(30)], at_most=31)
    assert len(shop.gather("mine").kept) == 30


# ------------------------------------------------------------------------------- the files


def test_rows_have_messages_source_and_repeat(shop: Shop) -> None:
    shop.add("one", [[user("naïve 日本?"), answer("🙂")], *(talk(i) for i in range(40))], repeat=2)
    shop.add("two", [talk(i) for i in range(100, 120)], repeat=3)
    shop.run()
    rows = shop.all_written()
    assert all(row.keys() == {"messages", "source", "repeat"} for row in rows)
    assert Counter((row["source"], row["repeat"]) for row in rows) == {
        ("label of one", 2): 41, ("label of two", 3): 20,
    }  # fmt: skip
    assert [user("naïve 日本?"), answer("🙂")] in [row["messages"] for row in rows]
    assert all(clean(row["messages"]) == row["messages"] for row in rows)
    for side in ("train", "validation"):
        assert (shop.folder / f"{side}.jsonl").read_bytes().endswith(b"}\n")


def test_single_questions_are_chained_on_top(
    shop: Shop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    talks = [[system(f"be {i}"), *talk(i)] if i % 2 else talk(i) for i in range(60)]
    talks.append([*talk(90), *talk(91)])  # of two questions: part of no other
    shop.add("mine", talks, chained=200, chained_turns=5, repeat=3)
    shop.run()
    train = shop.written()["train"]
    chains = [row["messages"] for row in train if row["source"] == "label of mine, chained"]
    singles = [row["messages"] for row in train if row["source"] == "label of mine"]
    assert len(chains) == 200 and len(shop.written()["validation"]) + len(singles) == len(talks)
    assert {row["repeat"] for row in train if row["messages"] in chains} == {1}
    starts = [tuple(map(str, m[:-1])) for m in singles if len(m) < 4]
    turns = Counter()
    for messages in chains:
        assert clean(messages) == messages  # one system prompt at most, and in turns
        begin = next(n for n, m in enumerate(messages) if m["role"] == "assistant")
        assert tuple(map(str, messages[:begin])) in starts  # as it is trained alone
        words = [m for m in messages if m["role"] != "system"]
        pairs = [words[n : n + 2] for n in range(0, len(words), 2)]
        assert all(any(pair == m[-2:] for m in singles if len(m) < 4) for pair in pairs)
        assert len(set(map(str, pairs))) == len(pairs)
        turns[len(pairs)] += 1
    assert set(turns) == {2, 3, 4, 5} and min(turns.values()) > 20
    row = next(line for line in capsys.readouterr().out.splitlines() if "chained" in line)
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["200", "200", "0"]


def test_too_few_single_questions_to_chain_are_told(shop: Shop) -> None:
    shop.add("mine", [talk(i) for i in range(8)], chained=3, chained_turns=9)
    with pytest.raises(
        UserError, match=r"'mine': of its \d conversations of one question none can"
    ):
        shop.run()
    assert not (shop.folder / "train.jsonl").exists()


def test_the_same_data_gives_the_same_files(shop: Shop) -> None:
    shop.add("mine", [talk(i) for i in range(200)], at_most=150, chained=20)
    contents = []
    for _ in range(2):
        shop.run()
        contents.append(
            [(shop.folder / f"{s}.jsonl").read_bytes() for s in ("train", "validation")]
        )
    assert contents[0] == contents[1]


def test_a_new_run_takes_the_place_of_the_old_files(shop: Shop) -> None:
    shop.add("mine", [talk(i) for i in range(100)])
    shop.run()
    write_lines(shop.data / "mine.jsonl", [{"messages": talk(i)} for i in range(500, 550)])
    shop.run()
    assert len(shop.all_written()) == 50
    assert sorted(p.name for p in shop.folder.iterdir()) == ["train.jsonl", "validation.jsonl"]


def test_a_summary_tells_what_came_of_each_source(
    shop: Shop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shop.add("mine", [*(talk(i) for i in range(50)), *(talk(i) for i in range(7))], repeat=4)
    shop.run()
    out = capsys.readouterr().out
    written = shop.written()
    lines = [line.strip("│ ").split("│") for line in out.splitlines() if "label of mine" in line]
    cells, dropped = ([cell.strip() for cell in line] for line in lines)
    sizes = [sum(len(m["content"]) for m in row["messages"]) for row in shop.all_written()]
    expected = ["50", str(len(written["train"])), str(len(written["validation"])), "4", "1.0"]
    assert cells[1:6] == expected
    assert cells[6:] == [f"{sum(sizes) / 50:.0f}", str(max(sizes))]
    assert dropped == ["label of mine", "copy", "7"]
    assert f"written to {shop.folder}/train.jsonl and validation.jsonl" in out


# ------------------------------------------------------------------------------- failures


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def test_nothing_is_written_when_a_later_source_fails(shop: Shop) -> None:
    shop.add("mine", [talk(i) for i in range(100)])
    shop.add("gone", [])
    (shop.data / "gone.jsonl").unlink()
    with pytest.raises(UserError, match="source 'gone': no file matches"):
        shop.run()
    assert files_below(shop.folder) == {}


def test_nothing_is_written_when_no_conversation_is_left_to_validate_on(shop: Shop) -> None:
    shop.add("mine", [talk(i) for i in range(100)])
    shop.run()
    before = files_below(shop.folder)
    shop.raw["held_out_fraction"] = 1e-9
    with pytest.raises(UserError, match="no conversation for validation: change held_out_fraction"):
        shop.run()
    assert files_below(shop.folder) == before


def test_nothing_is_written_when_no_conversation_is_left_to_train_on(shop: Shop) -> None:
    shop.add("mine", [talk(i) for i in range(20)])
    shop.raw["held_out_fraction"] = 1 - 1e-9
    with pytest.raises(UserError, match="no conversation for train"):
        shop.run()
    assert files_below(shop.folder) == {}


# ------------------------------------------------------------------------------- going on


class Killed(BaseException):
    """The end of a process, at a moment that nobody chose."""


def run_until(shop: Shop, calls: float, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run, but be killed at the given call of `keep`; the calls that there were."""
    count = 0

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise Killed
        return keep(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_sft_data, "keep", counted)
        if calls == float("inf"):
            shop.run()
        else:
            with pytest.raises(Killed):
                shop.run()
    return count


@pytest.fixture
def large(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """Three sources with copies within and between them, gathered in parts of ten."""
    monkeypatch.setattr(prepare_sft_data, "PART", 10)
    for number, name in enumerate(("first", "second", "third")):
        some = range(40 * number, 40 * number + 80)
        talks = [talk(i) for i in [*some, *list(some)[:9]]]
        shop.add(name, [*talks, [user("no answer")]], **({"at_most": 35} if number == 2 else {}))
        shop.raw["sources"][name]["shuffle_block"] = 16
    return shop


def test_killed_anywhere_it_goes_on_and_the_result_is_the_same(
    large: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_until(large, float("inf"), monkeypatch)
    expected = files_below(large.folder)
    rng, calls = random.Random(3), 0
    for path in large.folder.glob("*.jsonl"):
        path.unlink()
    for _ in range(5):
        calls += run_until(large, rng.randint(20, whole // 6), monkeypatch)
        assert files_below(large.folder) == {}
    calls += run_until(large, float("inf"), monkeypatch)
    assert files_below(large.folder) == expected
    assert calls < whole + 6 * 25  # what is gathered is not gathered again


def test_a_changed_recipe_does_not_go_on_with_what_another_gathered(
    large: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until(large, 150, monkeypatch)
    large.raw["sft"]["data"]["sources"][0]["min_characters"] = 30
    large.run()
    found = files_below(large.folder)
    large.run()
    assert files_below(large.folder) == found


def test_a_changed_file_is_read_anew(large: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    run_until(large, 150, monkeypatch)
    write_lines(large.data / "first.jsonl", [{"messages": talk(i)} for i in range(900, 980)])
    large.run()
    found = files_below(large.folder)
    large.run()
    assert files_below(large.folder) == found


def test_a_torn_part_is_gathered_again(large: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    large.run()
    expected = files_below(large.folder)
    run_until(large, 150, monkeypatch)
    parts = sorted((large.folder / "parts").rglob("*.json"))
    parts[2].write_bytes(parts[2].read_bytes()[:100])
    large.run()
    assert files_below(large.folder) == expected


def test_fresh_forgets_what_was_gathered(large: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_until(large, float("inf"), monkeypatch)
    run_until(large, 150, monkeypatch)
    large.options = ["--fresh"]
    assert run_until(large, float("inf"), monkeypatch) == whole


# ------------------------------------------------------------------------------- as a user runs it


def test_the_script_prepares_what_the_recipe_says(workshop: Workshop) -> None:
    out = workshop.run("prepare_sft_data.py", "--set", "sft.data.sources[0].repeat=5")
    folder = Path(workshop.raw["sft"]["data"]["folder"])
    rows = [row for s in ("train", "validation") for row in rows_in(folder / f"{s}.jsonl")]
    assert len(rows) > 50 and {(row["source"], row["repeat"]) for row in rows} == {("talk", 5)}
    assert "Conversations for supervised fine-tuning" in out and "written to" in out


def test_the_script_says_in_one_sentence_what_is_wrong(workshop: Workshop, data: Path) -> None:
    (data / "talk.jsonl").unlink()
    out = workshop.run("prepare_sft_data.py", code=2)
    (line,) = [line for line in out.splitlines() if line.strip()]
    assert line.startswith("error: source 'talk': no file matches ")
    assert not Path(workshop.raw["sft"]["data"]["folder"]).exists()
