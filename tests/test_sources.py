"""Tests of the sources: readers, exact resuming, the held-out split, errors."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import sysconfig
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hamner import sources
from hamner.errors import UserError
from hamner.recipe import FileSource, SourcePart, check_recipe
from hamner.sources import (
    PIECE,
    Document,
    DocumentStream,
    Files,
    Source,
    check_sources,
    docstrings,
    hashed_fraction,
    is_held_out,
    open_source,
    open_stream,
    package_files,
    read_file,
)

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
ROWS = [{"text": f"row {i}: naïve 日本 {'x' * i}", "n": i} for i in range(10)]
ENDINGS = ["parquet", "jsonl", "json", *(f"jsonl{codec}" for codec in CODECS)]


def json_round_trip(value: Any) -> Any:
    return json.loads(json.dumps(value))


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file, compressed if its ending says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in CODECS:
        with pa.CompressedOutputStream(str(path), CODECS[path.suffix]) as file:
            file.write(content)
    else:
        path.write_bytes(content)
    return path


def write_rows(path: Path, rows: list[dict[str, Any]], row_group: int = 3) -> Path:
    """Write rows as what the ending says: parquet or JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group)
        return path
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return write_bytes(path, text.encode())


def message_of(iterator: Iterator[Any]) -> str:
    """What is said when the iterator is read."""
    with pytest.raises(UserError) as caught:
        list(islice(iterator, 1_000))
    return str(caught.value)


def assert_resumes_everywhere(path: Path) -> None:
    rows = list(read_file(path))
    assert rows
    for k in range(len(rows) + 1):
        skip = rows[k - 1][0] + 1 if k else 0
        assert list(read_file(path, skip)) == rows[k:]


# ------------------------------------------------------------------------------- readers


@pytest.mark.parametrize("ending", ENDINGS)
def test_rows_are_read_as_they_were_written(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path / f"some.data.{ending}", ROWS)
    assert list(read_file(path)) == list(enumerate(ROWS))


@pytest.mark.parametrize("ending", ENDINGS)
def test_reading_from_any_row_gives_exactly_the_rest(tmp_path: Path, ending: str) -> None:
    assert_resumes_everywhere(write_rows(tmp_path / f"d.{ending}", ROWS))


def test_a_parquet_file_larger_than_a_batch_is_read_from_any_row(tmp_path: Path) -> None:
    rows = [{"text": str(i)} for i in range(700)]
    path = write_rows(tmp_path / "d.parquet", rows, row_group=600)
    for skip in (0, 1, 255, 256, 257, 511, 512, 599, 600, 601, 699, 700):
        assert [row["text"] for _, row in read_file(path, skip)] == [
            str(i) for i in range(skip, 700)
        ]


def test_json_lines_longer_than_a_chunk_of_reading_stay_whole(tmp_path: Path) -> None:
    rows = [{"text": "é" * 600_000}, {"text": "a" + "日" * 500_000}, {"text": "end"}]
    path = write_rows(tmp_path / "long.jsonl.gz", rows)
    assert [row for _, row in read_file(path)] == rows


def test_empty_lines_between_json_lines_are_passed_over(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "d.jsonl", b'{"a": 1}\n\n  \n{"a": 2}\r\n{"a": 3}')
    assert list(read_file(path)) == [(0, {"a": 1}), (3, {"a": 2}), (4, {"a": 3})]
    assert_resumes_everywhere(path)


@pytest.mark.parametrize("ending", ["txt", "md", *(f"txt{codec}" for codec in CODECS)])
def test_text_files_are_cut_at_blank_lines_into_pieces(tmp_path: Path, ending: str) -> None:
    paragraphs = [f"{i} " + "naïve words\n" * (40 + 37 * i) + "end." for i in range(12)]
    text = "\n\n".join(paragraphs)
    path = write_bytes(tmp_path / f"book.{ending}", text.encode())
    pieces = [row["text"] for _, row in read_file(path)]
    assert len(pieces) > 5
    assert "\n\n".join(pieces) == text
    assert all(len(piece) >= PIECE for piece in pieces[:-1])
    assert_resumes_everywhere(path)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    st.lists(st.text("ab\n é\t", max_size=40).map(lambda t: t * 60), min_size=1, max_size=12),
    st.sampled_from(["\n", "\n\n", "\n\n\n"]),
)
def test_no_character_of_a_text_file_is_lost(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], between: str
) -> None:
    text = between.join(parts)
    path = tmp_path_factory.mktemp("texts") / "t.txt"
    path.write_bytes(text.encode())
    pieces = [row["text"] for _, row in read_file(path)]
    assert "".join("".join(pieces).split()) == "".join(text.split())
    for k in range(len(pieces)):
        assert [row["text"] for _, row in read_file(path, k)] == pieces[k:]


def test_windows_line_ends_do_not_stay_in_text(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "t.txt", b"one\r\n\r\ntwo\r\n")
    assert [row["text"] for _, row in read_file(path)] == ["one\n\ntwo"]


def test_malformed_json_names_file_and_line(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "d.jsonl", b'{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n')
    assert message_of(read_file(path)).startswith(f"{path}, line 3: not valid JSON (")


@pytest.mark.parametrize("line", [b"[1, 2]", b'"words"', b"3", b"null"])
def test_a_json_line_that_is_no_object_names_file_and_line(tmp_path: Path, line: bytes) -> None:
    path = write_bytes(tmp_path / "d.jsonl.gz", b'{"text": "a"}\n' + line + b"\n")
    assert message_of(read_file(path)).startswith(f"{path}, line 2: expected an object")


@pytest.mark.parametrize("name", ["notes.pdf", "noending", "archive.gz", "notes.docx.gz", "x."])
def test_an_unknown_ending_is_refused_and_the_known_ones_are_named(
    tmp_path: Path, name: str
) -> None:
    path = write_bytes(tmp_path / name, b"words")
    message = message_of(read_file(path))
    assert message.startswith(f"{path}: ")
    assert all(known in message for known in ("parquet", "jsonl", "txt"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("d.parquet", b"no parquet"), ("d.parquet", b""), ("d.jsonl", b'{"text": "\xff\xfe"}\n')],
)
def test_a_file_that_is_not_what_its_ending_says_is_named(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = write_bytes(tmp_path / name, content)
    assert message_of(read_file(path)).startswith(f"{path}: can't be read as .")


@pytest.mark.parametrize("ending", ["parquet", "jsonl.gz", "jsonl.zst", "jsonl.bz2", "jsonl.lz4"])
def test_a_file_cut_short_is_named(tmp_path: Path, ending: str) -> None:
    rows = [{"text": hashlib.sha256(b"%d" % i).hexdigest()} for i in range(2_000)]
    path = write_rows(tmp_path / f"d.{ending}", rows, row_group=500)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert str(path) in message_of(row for _ in range(3) for row in read_file(path))


# ------------------------------------------------------------------------------- several files


@pytest.fixture
def library(tmp_path: Path) -> Files:
    """Four files of different kinds, 27 rows in all, as one source."""
    folder = tmp_path / "library"
    write_rows(folder / "a.parquet", [{"text": f"a{i}"} for i in range(7)])
    write_rows(folder / "b.jsonl", [{"text": f"b{i}"} for i in range(10)])
    write_rows(folder / "deep" / "c.jsonl.gz", [{"text": f"c{i}"} for i in range(9)])
    write_bytes(folder / "d.txt", b"d0\n")
    spec = FileSource(kind="files", paths=["*.parquet", "**/*.jsonl*", "d.txt", "b.*"])
    return Files("library", spec, str(folder), seed=3)


def texts(files: Files, epoch: int, position: Any = None) -> list[str]:
    return [row["text"] for row, _ in files.rows(epoch, position)]


def test_a_source_reads_every_row_of_every_file_once(library: Files) -> None:
    expected = [f"a{i}" for i in range(7)] + [f"b{i}" for i in range(10)]
    expected += [f"c{i}" for i in range(9)] + ["d0"]
    assert Counter(texts(library, 0)) == Counter(expected)


def test_the_files_come_in_another_order_in_other_epochs(library: Files) -> None:
    orders = {tuple(texts(library, epoch)) for epoch in range(6)}
    assert len(orders) > 1
    assert {frozenset(order) for order in orders} == {frozenset(texts(library, 0))}
    assert texts(library, 4) == texts(library, 4)


def test_files_are_read_in_step_with_their_sizes(tmp_path: Path) -> None:
    """At any time, of each the same share: what one file holds is nowhere left out for long."""
    for name, count, size in (("a", 300, 200), ("b", 60, 500), ("c", 30, 5_000)):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name * size} for _ in range(count)])
    files = Files("mix", FileSource(kind="files", paths=["*.jsonl"]), str(tmp_path), seed=3)
    whole = Counter(text[0] for text in texts(files, 0))
    seen: Counter[str] = Counter()
    for text in texts(files, 0):
        seen[text[0]] += 1
        shares = [seen[name] / whole[name] for name in "abc"]
        assert max(shares) - min(shares) <= 0.12, seen
    assert whole == {"a": 300, "b": 60, "c": 30}


def test_many_files_are_read_in_groups(library: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FILES_TOGETHER", 2)
    order = "".join(text[0] for text in texts(library, 1))
    assert Counter(order) == {"a": 7, "b": 10, "c": 9, "d": 1}
    begins, ends = ([find(name) for name in "abcd"] for find in (order.index, order.rindex))
    assert sorted(begins)[2] > sorted(ends)[1]  # a third one begins when two are at their ends


def test_a_position_of_an_older_version_is_told(library: Files) -> None:
    assert "begin anew with --fresh" in message_of(library.rows(0, [1, 12]))


@pytest.mark.parametrize("together", [1, 2, 16])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_source_of_files_goes_on_at_any_position(
    library: Files, epoch: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "FILES_TOGETHER", together)
    rows = list(library.rows(epoch, None))
    for k, (_, position) in enumerate(rows):
        rest = list(library.rows(epoch, json_round_trip(position)))
        assert rest == rows[k + 1 :]


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    spec = FileSource(kind="files", paths=["no/*.jsonl"])
    message = message_of(Files("web", spec, str(tmp_path), seed=0).rows(0, None))
    assert message.startswith(f"source 'web': no file matches {tmp_path}/no/*.jsonl; ")
    assert "--set data_dir=" in message
    own = spec.model_copy(update={"folder": str(tmp_path)})
    assert "--set sources.web.folder=" in message_of(
        Files("web", own, str(tmp_path), 0).rows(0, None)
    )


# ------------------------------------------------------------------------------- made here


def with_source(raw: dict[str, Any], **spec: Any) -> Any:
    """The small recipe with one more source, called 'made'."""
    raw["sources"]["made"] = spec
    return check_recipe(raw, "r.yaml")


def test_a_source_with_a_folder_of_its_own_doesnt_look_into_data_dir(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    for place in ("there", "here"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_text(f"It lies {place}.")
    raw["data_dir"], folder = str(tmp_path / "there"), str(tmp_path / "here")
    recipe = with_source(raw, kind="files", paths=["*.txt"], folder=folder)
    assert [row["text"] for row, _ in open_source("made", recipe).rows(0, None)] == [
        "It lies here."
    ]


TASKS = {"kind": "generator", "function": "synthetic_tasks:document", "options": {"difficulty": 1}}


def test_generated_documents_are_the_same_each_time_and_unlike_each_other(
    raw: dict[str, Any],
) -> None:
    source = open_source("made", with_source(raw, **TASKS))
    first = [row["text"] for row, _ in islice(source.rows(0, None), 50)]
    assert first == [row["text"] for row, _ in islice(source.rows(0, None), 50)]
    assert len(set(first)) > 45


def test_generated_documents_depend_on_the_seed(raw: dict[str, Any]) -> None:
    first = next(open_source("made", with_source(raw, **TASKS)).rows(0, None))
    raw["seed"] += 1
    assert next(open_source("made", with_source(raw, **TASKS)).rows(0, None)) != first


def test_generated_documents_go_on_at_any_position(raw: dict[str, Any]) -> None:
    source = open_source("made", with_source(raw, **TASKS))
    rows = list(islice(source.rows(0, None), 40))
    for k, (_, position) in enumerate(rows):
        rest = list(islice(source.rows(0, json_round_trip(position)), 39 - k))
        assert rest == rows[k + 1 :]


def test_generated_conversations_come_as_messages(raw: dict[str, Any]) -> None:
    recipe = with_source(raw, kind="generator", function="synthetic_tasks:conversation", column="m")
    document = next(iter(open_stream("made", recipe)))
    assert isinstance(document, list) and {m["role"] for m in document} >= {"user", "assistant"}


@pytest.mark.parametrize(
    ("function", "options"),
    [
        ("no_such_module:document", {}),
        ("synthetic_tasks:no_such_function", {}),
        ("synthetic_tasks", {}),
        (":document", {}),
        ("synthetic_tasks:document", {"no_such_option": 1}),
        ("synthetic_tasks:document", {"difficulty": 99}),
    ],
)
def test_a_function_that_cannot_be_called_is_named(
    raw: dict[str, Any], function: str, options: dict[str, Any]
) -> None:
    recipe = with_source(raw, kind="generator", function=function, options=options)
    message = message_of(open_source("made", recipe).rows(0, None))
    assert message.startswith(f"source 'made': can't call {function!r} with options {options}: ")
    assert "module:function" in message


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A made-up standard library and site-packages."""
    long = '"""About a thing, in so many words that it is worth reading, and then some more."""\n'
    root = tmp_path / "lib"
    site = root / "site-packages"
    files = {
        root / "os.py": long,
        root / "test" / "test_os.py": long,
        root / "idlelib" / "editor.py": long,
        site / "pack" / "__init__.py": long,
        site / "pack" / "tests" / "test_pack.py": long,
        site / "pack" / "testing" / "util.py": long,
        site / "pack" / "_vendor" / "other.py": long,
        site / "pack" / "huge.py": long + "x = 1\n" * 50_000,
        site / "pack" / "latin.py": b'"""caf\xe9"""\n',
        site / "pack" / "data.txt": "words",
    }
    for path, content in files.items():
        write_bytes(path, content if isinstance(content, bytes) else content.encode())
    places = {"stdlib": str(root), "purelib": str(site)}
    monkeypatch.setattr(sysconfig, "get_path", places.__getitem__)
    package_files.cache_clear()
    yield root
    package_files.cache_clear()


def test_tests_vendored_copies_and_huge_files_of_packages_are_left_out(installed: Path) -> None:
    found = {str(path.relative_to(installed)) for path in package_files()}
    assert found == {"os.py", "site-packages/pack/__init__.py", "site-packages/pack/latin.py"}


def test_files_of_packages_that_are_not_utf_8_are_passed_over(
    installed: Path, raw: dict[str, Any]
) -> None:
    source = open_source("made", with_source(raw, kind="packages", content="code"))
    assert len(list(source.rows(0, None))) == 2


def test_docstrings_are_the_prose_of_a_module_and_nothing_else(tmp_path: Path) -> None:
    words = "Many words about what this does and why anyone should ever want to call it at all. "
    module = f'''"""{words}module"""
import os
class Thing:
    """{words}class"""
    def short(self):
        """Too short."""
    async def later(self):
        """{words}method"""
        return "not a docstring, however long it may be, and it is rather long: {words}"
def example():
    """{words}

    >>> example()
    """
'''
    path = tmp_path / "module.py"
    path.write_text(module, encoding="utf-8")
    assert docstrings(path).split("\n\n") == [
        f"{words}{kind}" for kind in ("module", "class", "method")
    ]


@pytest.mark.parametrize("text", ["def broken(:\n", "x = 1\n", "", "\x00"])
def test_files_without_docstrings_give_no_prose(tmp_path: Path, text: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(text, encoding="utf-8")
    assert docstrings(path) == ""


@pytest.mark.parametrize("content", ["prose", "code"])
def test_the_installed_packages_give_documents_and_go_on_at_any_position(
    raw: dict[str, Any], content: str
) -> None:
    source = open_source("made", with_source(raw, kind="packages", content=content))
    rows = list(islice(source.rows(0, None), 10))
    assert rows == list(islice(source.rows(0, None), 10))
    for k, (_, position) in enumerate(rows):
        rest = list(islice(source.rows(0, json_round_trip(position)), 9 - k))
        assert rest == rows[k + 1 :]
    assert rows != list(islice(source.rows(1, None), 10))
    documents = [row["text"] for row, _ in rows]
    if content == "code":
        assert all(isinstance(ast.parse(text), ast.Module) for text in documents)
    else:
        assert all(len(text) > 80 and ">>>" not in text for text in documents)


def test_no_file_of_an_installed_package_lies_in_a_tests_folder() -> None:
    files = package_files()
    assert len(files) > 500 and all(path.suffix == ".py" for path in files)
    folders = {part for path in files for part in path.parts[:-1]}
    assert not folders & {"tests", "idlelib", "__pycache__"}


# ------------------------------------------------------------------------------- document streams


class Listed(Source):
    """A source over a list, which counts how many rows were asked for."""

    def __init__(self, documents: list[Any], column: str = "text"):
        self.documents, self.column, self.read = documents, column, 0

    def rows(self, epoch: int, position: Any) -> Iterator[tuple[dict[str, Any], Any]]:
        for number in range(position or 0, len(self.documents)):
            self.read += 1
            yield {self.column: self.documents[number]}, number + 1


def stream_of(documents: list[Any], block: int = 5, fraction: float = 0.2, **options: Any) -> Any:
    spec = SourcePart(shuffle_block=block, min_characters=options.pop("min_characters", 1))
    return DocumentStream("web", Listed(documents), spec, 3, fraction, **options)


DOCUMENTS = [f"document {i}" for i in range(37)]


def side(documents: list[str], held_out: bool) -> list[str]:
    return [text for text in documents if is_held_out(text, 0.2) == held_out]


def with_states(stream: DocumentStream, count: int) -> tuple[list[Document], list[dict[str, Any]]]:
    """The next `count` documents, and the states before each and after the last."""
    documents: list[Document] = []
    states = [stream.state]
    for document in islice(stream, count):
        documents.append(document)
        states.append(stream.state)
    return documents, states


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("block", [1, 5, 37, 1_000])
def test_an_epoch_has_every_document_of_its_side_exactly_once(block: int, held_out: bool) -> None:
    expected = side(DOCUMENTS, held_out)
    found = list(islice(stream_of(DOCUMENTS, block, held_out=held_out), 3 * len(expected)))
    for epoch in range(3):
        documents = found[epoch * len(expected) : (epoch + 1) * len(expected)]
        assert Counter(documents) == Counter(expected)


def test_documents_are_shuffled_and_otherwise_in_the_next_epoch() -> None:
    expected = side(DOCUMENTS, held_out=False)
    found = list(islice(stream_of(DOCUMENTS, block=1_000), 2 * len(expected)))
    orders = [found[: len(expected)], found[len(expected) :]]
    assert orders[0] != orders[1] and expected not in orders


def test_the_order_depends_on_the_seed() -> None:
    spec = SourcePart(shuffle_block=100)
    orders = {
        tuple(islice(DocumentStream("web", Listed(DOCUMENTS), spec, seed, 0.2), 20))
        for seed in range(3)
    }
    assert len(orders) == 3


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("block", [1, 4, 10, 1_000])
def test_a_stream_goes_on_exactly_from_any_point_of_two_epochs(block: int, held_out: bool) -> None:
    count = 2 * len(side(DOCUMENTS, held_out))
    documents, states = with_states(stream_of(DOCUMENTS, block, held_out=held_out), count)
    for k, state in enumerate(states):
        resumed = stream_of(DOCUMENTS, block, held_out=held_out, state=json_round_trip(state))
        rest, later_states = with_states(resumed, count - k)
        assert rest == documents[k:]
        assert json_round_trip(later_states[1:]) == json_round_trip(states[k + 1 :])


@pytest.mark.parametrize("ending", ["parquet", "jsonl.zst", "txt"])
def test_a_stream_over_files_goes_on_exactly_from_any_point_of_two_epochs(
    tmp_path: Path, raw: dict[str, Any], ending: str
) -> None:
    rng = random.Random(0)
    for number in range(3):
        path = tmp_path / f"{number}.{ending}"
        if ending == "txt":
            words = "\n\n".join(f"{number}-{i} " + "word " * rng.randrange(400) for i in range(30))
            write_bytes(path, words.encode())
        else:
            write_rows(path, [{"text": f"{number}-{i}"} for i in range(7)])
    raw["sources"]["web"] |= {"paths": [f"*.{ending}"], "shuffle_block": 4}
    raw["data_dir"] = str(tmp_path)
    recipe = check_recipe(raw, "r.yaml")
    count = 2 * len(list(open_stream("web", recipe).one_epoch()))
    assert count > 10
    documents, states = with_states(open_stream("web", recipe), count)
    assert Counter(documents[: count // 2]) == Counter(documents[count // 2 :])
    for k, state in enumerate(states):
        resumed = open_stream("web", recipe)
        resumed.state = json_round_trip(state)
        assert list(islice(resumed, count - k)) == documents[k:]


def test_a_stream_stopped_again_and_again_loses_and_repeats_nothing() -> None:
    rng = random.Random(5)
    expected = list(islice(stream_of(DOCUMENTS, block=6), 90))
    found: list[Document] = []
    state = stream_of(DOCUMENTS).state
    while len(found) < 90:
        documents, states = with_states(
            stream_of(DOCUMENTS, block=6, state=json_round_trip(state)), rng.randrange(9)
        )
        found, state = found + documents, states[-1]
    assert found[:90] == expected


def test_a_state_does_not_grow() -> None:
    _, states = with_states(stream_of(DOCUMENTS * 20, block=100), 500)
    assert max(len(json.dumps(state)) for state in states) < 100


@pytest.mark.parametrize("lanes", [2, 3, 4])
@pytest.mark.parametrize("block", [1, 5, 1_000])
def test_every_document_lies_in_one_lane_and_comes_once_an_epoch(block: int, lanes: int) -> None:
    found: Counter[Document] = Counter()
    for lane in range(lanes):
        stream = stream_of(DOCUMENTS, block, lane=lane, lanes=lanes)
        mine = list(stream.one_epoch())
        assert mine and not set(mine) & found.keys()
        found += Counter(mine)
        again = list(islice(stream_of(DOCUMENTS, block, lane=lane, lanes=lanes), 3 * len(mine)))
        for epoch in range(3):
            assert Counter(again[epoch * len(mine) : (epoch + 1) * len(mine)]) == Counter(mine)
    assert found == Counter(side(DOCUMENTS, held_out=False))


@pytest.mark.parametrize("lane", [0, 1, 2])
@pytest.mark.parametrize("block", [1, 4, 1_000])
def test_a_lane_goes_on_exactly_from_any_point_of_two_epochs(block: int, lane: int) -> None:
    how: dict[str, Any] = {"lane": lane, "lanes": 3}
    count = 2 * len(list(stream_of(DOCUMENTS, block, **how).one_epoch()))
    documents, states = with_states(stream_of(DOCUMENTS, block, **how), count)
    for k, state in enumerate(states):
        resumed = stream_of(DOCUMENTS, block, state=json_round_trip(state), **how)
        rest, later = with_states(resumed, count - k)
        assert rest == documents[k:]
        assert json_round_trip(later[1:]) == json_round_trip(states[k + 1 :])


def test_a_single_lane_has_the_documents_in_the_order_that_they_always_had() -> None:
    """Runs that began before there were lanes go on with the same documents."""
    expected = [0, 1, 4, 3, 2, 5, 6, 8, 9, 7, 13, 14]
    assert [int(str(d).split()[1]) for d in islice(stream_of(DOCUMENTS), 12)] == expected
    one_of_one = list(islice(stream_of(DOCUMENTS, lane=0, lanes=1), 90))
    assert one_of_one == list(islice(stream_of(DOCUMENTS), 90))


def test_lanes_are_of_one_size_and_copies_lie_in_the_same() -> None:
    documents = [f"some text {i}" for i in range(4_000)]
    train = len(side(documents, held_out=False))
    for lanes in (2, 5):
        for lane in range(lanes):
            size = len(list(stream_of(documents, 1_000, lane=lane, lanes=lanes).one_epoch()))
            assert abs(size - train / lanes) < 4 * (train / lanes * (1 - 1 / lanes)) ** 0.5
    copies = [text for i in range(60) for text in (f"A text {i}", f" a  TEXT\n{i} ")]
    for lane in range(3):
        mine = list(stream_of(copies, 1_000, 0.0, lane=lane, lanes=3).one_epoch())
        times = Counter(" ".join(str(text).lower().split()) for text in mine)
        assert times and set(times.values()) == {2}


def test_lanes_of_a_recipes_source_leave_out_what_is_held_out(raw: dict[str, Any]) -> None:
    recipe = check_recipe(raw, "r.yaml")
    train = list(open_stream("web", recipe).one_epoch())
    lanes = [list(open_stream("web", recipe, lane=lane, lanes=4).one_epoch()) for lane in range(4)]
    assert Counter(d for lane in lanes for d in lane) == Counter(train)
    held_out = list(open_stream("web", recipe, held_out=True).one_epoch())
    assert held_out and not set(held_out) & set(train)


def test_an_empty_lane_is_named() -> None:
    one = [d for d in DOCUMENTS if not is_held_out(d, 0.2)][:1]
    messages = []
    for lane in range(2):
        stream = stream_of(one, lane=lane, lanes=2)
        if not list(stream_of(one, lane=lane, lanes=2).one_epoch()):
            messages.append((lane, message_of(iter(stream))))
    ((lane, message),) = messages
    assert message.endswith(f"at least 1 characters in lane {lane} of 2")


def test_one_epoch_ends_and_holds_what_the_endless_stream_holds() -> None:
    expected = side(DOCUMENTS, held_out=False)
    stream = stream_of(DOCUMENTS)
    assert list(stream.one_epoch()) == list(islice(stream_of(DOCUMENTS), len(expected)))


def test_in_order_reads_no_block_ahead() -> None:
    stream = stream_of(DOCUMENTS, block=1_000, fraction=0.0)
    assert list(islice(stream.in_order(), 3)) == DOCUMENTS[:3]
    assert stream.source.read == 3


def test_documents_shorter_than_asked_are_left_out() -> None:
    documents = ["", "   ", "ab", " ab ", "abc", "abcd", "\nabc\n"]
    stream = stream_of(documents, fraction=0.0, min_characters=3)
    assert list(stream.in_order()) == ["abc", "abcd", "abc"]
    assert list(stream_of(documents, fraction=0.0).in_order())[:2] == ["ab", "ab"]


def test_conversations_are_documents_and_measured_by_their_contents() -> None:
    short = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    long = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cde"}]
    silent = [{"role": "user", "content": None}, {"role": "assistant", "content": "abcde"}]
    stream = stream_of([short, long, silent, []], fraction=0.0, min_characters=5)
    assert list(stream.in_order()) == [long, silent]


def test_a_wrong_column_is_named_with_those_that_there_are(raw: dict[str, Any]) -> None:
    raw["sources"]["talk"]["column"] = "text"
    message = message_of(iter(open_stream("talk", check_recipe(raw, "r.yaml"))))
    assert message == (
        "source 'talk': its rows have no text or messages in column 'text'; they have messages"
    )


@pytest.mark.parametrize("held_out", [False, True])
def test_a_source_without_documents_is_an_error_and_no_endless_loop(held_out: bool) -> None:
    for documents in ([], ["", " "], ["too short"]):
        stream = stream_of(documents, held_out=held_out, min_characters=10)
        message = message_of(iter(stream))
        assert message.startswith("source 'web' is empty: no ") and "10 characters" in message
        assert ("held-out" in message) == held_out


# ------------------------------------------------------------------------------- the held-out split


def test_about_the_given_fraction_is_held_out() -> None:
    for fraction in (0.005, 0.02, 0.1, 0.5):
        held_out = sum(is_held_out(f"some text {i}", fraction) for i in range(20_000))
        deviation = (20_000 * fraction * (1 - fraction)) ** 0.5
        assert abs(held_out - 20_000 * fraction) < 4 * deviation


def test_held_out_and_training_documents_share_nothing_and_are_all(
    raw: dict[str, Any], data: Path
) -> None:
    recipe = check_recipe(raw, "r.yaml")
    lines = (data / "web.jsonl").read_text(encoding="utf-8").splitlines()
    train = list(open_stream("web", recipe).one_epoch())
    held_out = list(open_stream("web", recipe, held_out=True).one_epoch())
    assert len(held_out) > 10
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(json.loads(line)["text"] for line in lines)


def test_copies_of_a_text_fall_on_one_side() -> None:
    copies = [f"{space}document {i}{space}" for space in ("", " ", "\n") for i in range(60)]
    stream = stream_of(copies)
    train = Counter(stream.one_epoch())
    held_out = Counter(stream_of(copies, held_out=True).one_epoch())
    assert len(train) + len(held_out) == 60 and set((train + held_out).values()) == {3}


def test_texts_that_differ_in_case_and_white_space_fall_on_one_side() -> None:
    for i in range(50):
        copies = [f"A small text {i}", f"a SMALL text {i}", f"a  small\n\ttext {i}"]
        assert len({is_held_out(copy, 0.5) for copy in copies}) == 1


def conversation(i: int, system: str = "") -> list[dict[str, str]]:
    turns = [{"role": "user", "content": f"Question {i}?"}]
    turns += [{"role": "assistant", "content": f"Answer {i}."}]
    return [{"role": "system", "content": system}, *turns] if system else turns


def test_conversations_that_differ_in_looks_or_system_prompt_fall_on_one_side() -> None:
    for i in range(50):
        plain = conversation(i)
        other_order = [{"content": m["content"], "role": m["role"]} for m in plain]
        spaced = [{**m, "content": f" {m['content'].upper()}\n"} for m in plain]
        copies = [plain, other_order, spaced, conversation(i, "be brief"), conversation(i, "rhyme")]
        assert len({is_held_out(copy, 0.5) for copy in copies}) == 1


def test_conversations_that_say_other_things_are_split_independently() -> None:
    sides = [is_held_out(conversation(i), 0.5) for i in range(400)]
    assert 150 < sum(sides) < 250
    swapped = [[dict(m, role="user") for m in conversation(i)] for i in range(400)]
    assert sum(is_held_out(a, 0.5) == b for a, b in zip(swapped, sides, strict=True)) < 250


def test_the_side_of_a_text_depends_on_nothing_but_the_text() -> None:
    digest = hashlib.blake2b(b"hello", digest_size=8).hexdigest()
    assert hashed_fraction("hello") == int(digest, 16) / 2**64
    assert 0 <= hashed_fraction("broken \ud800 surrogate") < 1


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_what_a_small_fraction_holds_out_a_larger_one_does_too(
    text: str, one: float, other: float
) -> None:
    small, large = sorted((one, other))
    assert is_held_out(text, large) or not is_held_out(text, small)


# ------------------------------------------------------------------------------- checking


def test_sources_that_can_be_used_pass_the_check(raw: dict[str, Any]) -> None:
    check_sources(["web", "talk", "pairs", "web"], check_recipe(raw, "r.yaml"))


def test_all_problems_of_sources_are_reported_at_once(raw: dict[str, Any], data: Path) -> None:
    write_bytes(data / "broken.jsonl", b"{")
    raw["sources"]["books"]["paths"] = ["missing.jsonl"]
    raw["sources"]["pairs"]["column"] = "chosn"
    raw["sources"]["empty"] = {**raw["sources"]["web"], "min_characters": 10_000}
    raw["sources"]["broken"] = {**raw["sources"]["web"], "paths": ["broken.jsonl"]}
    raw["sources"]["made"] = {"kind": "generator", "function": "nowhere:document"}
    names = ["web", "books", "pairs", "empty", "books", "broken", "made"]
    with pytest.raises(UserError) as caught:
        check_sources(names, check_recipe(raw, "r.yaml"))
    lines = str(caught.value).split("\n       ")
    assert len(lines) == 5
    assert lines[0].startswith("source 'books': no file matches")
    assert lines[1].endswith("in column 'chosn'; they have chosen, rejected")
    assert lines[2] == "source 'empty' is empty: no document passes its filters"
    assert lines[3].startswith(f"{data}/broken.jsonl, line 1: not valid JSON")
    assert lines[4].startswith("source 'made': can't call 'nowhere:document'")
