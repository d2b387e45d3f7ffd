"""Where documents come from: hub data sets, local files, generators, the installed packages.

A source yields documents one after another, each with the position after it; a position is plain
data, and a source opened at it goes on exactly there. `DocumentStream` makes of it what training
wants: filtered, split, shuffled in blocks, epoch after epoch, with a state of a few numbers.

A document is a text, or a conversation (a list of {"role", "content"} messages).
"""

from __future__ import annotations

import ast
import functools
import glob
import hashlib
import importlib
import json
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from hamner.errors import UserError
from hamner.hub import Hub, Row
from hamner.recipe import (
    AnySource,
    FileSource,
    GeneratorSource,
    HubSource,
    PackagesSource,
    Recipe,
    SourcePart,
)

Document = str | list[dict[str, str]]
Position = Any  # plain data: what JSON can hold
State = dict[str, Any]  # likewise
FILES_TOGETHER = 16  # files of a source that are read side by side
PIECE = 4_000  # characters: about so long are the documents that a .txt file is cut into


class Source(Protocol):
    def rows(self, epoch: int, position: Position) -> Iterator[tuple[Row, Position]]:
        """Rows of one epoch from a position on (None: the beginning), each with the next position.

        The same epoch gives the same rows in the same order, always.
        """

    def identity(self, position: Position) -> Any:
        """What its rows follow from, as plain data; None if there is no saying."""
        return None

    def close(self) -> None:
        """Stop waiting for whatever the source waits for; called from another thread."""
        return None


# ------------------------------------------------------------------------------- local files


@dataclass
class Files(Source):
    """Parquet, JSON lines and text files, also compressed (.gz .bz2 .zst .lz4), as globs."""

    name: str
    spec: FileSource
    folder: str
    seed: int

    def paths(self) -> list[Path]:
        found: set[str] = set()
        for pattern in self.spec.paths:
            matches = glob.glob(str(Path(self.folder, pattern)), recursive=True)
            if not matches:
                setting = f"sources.{self.name}.folder" if self.spec.folder else "data_dir"
                raise UserError(
                    f"source {self.name!r}: no file matches {Path(self.folder, pattern)}; "
                    "put it there (data/README.md says what writes it), or say where your data "
                    f"lies with --set {setting}=FOLDER"
                )
            found.update(matches)
        return [Path(path) for path in sorted(found)]

    def identity(self, position: Position) -> Any:
        files = ([str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in self.paths())
        return [FILES_TOGETHER, *files]

    def rows(self, epoch: int, position: Position) -> Iterator[tuple[Row, Position]]:
        """Files are read side by side, FILES_TOGETHER of them, each in step with its size.

        One after another, they would be a mix that drifts: the model forgets the first file's kind
        of text while it reads the second (docs/EXPERIMENTS.md).
        """
        paths = self.paths()
        random.Random(f"{self.seed}/{self.name}/files/{epoch}").shuffle(paths)
        first, done = self._checked(position)
        for start in range(first, len(paths), FILES_TOGETHER):
            yield from self._side_by_side(start, paths[start : start + FILES_TOGETHER], done)
            done = []

    def _side_by_side(
        self, start: int, paths: list[Path], done: list[list[int]]
    ) -> Iterator[tuple[Row, Position]]:
        """Always the next row of the file of which the smallest share has been read.

        `done` are rows and characters read of each file, if any was. Compressed files and others
        in one group come to their ends at different times.
        """
        done = [list(each) for each in done] or [[0, 0] for _ in paths]
        sizes = [max(1, path.stat().st_size) for path in paths]
        readers = {i: read_file(path, done[i][0]) for i, path in enumerate(paths)}
        while readers:
            i = min(readers, key=lambda i: done[i][1] / sizes[i])
            found = next(readers[i], None)
            if found is None:
                del readers[i]
                continue
            number, row = found
            document = row.get(self.spec.column)
            length = size_of(document) if isinstance(document, (str, list)) else 0
            done[i] = [number + 1, done[i][1] + length + 1]
            yield row, [start, [list(each) for each in done]]

    def _checked(self, position: Position) -> tuple[int, list[list[int]]]:
        """The first file of a group, and what has been read of the group's files.

        Raises:
            UserError: the position is of a version that read the files one after another.
        """
        first, done = position or (0, [])
        if not isinstance(done, list):
            raise UserError(
                f"source {self.name!r}: this run began with an older version, which read files in "
                "another order, and can't go on with this one: begin anew with --fresh"
            )
        return first, done


def read_file(path: Path, skip: int = 0) -> Iterator[tuple[int, Row]]:
    """Rows of a file with their numbers, from row `skip` on.

    Raises:
        UserError: a file that can't be read as what its ending says, with the line where known.
    """
    ending = "".join(path.suffixes[-2:] if path.suffix in COMPRESSED else path.suffixes[-1:])
    reader = READERS.get(ending.split(".")[1] if "." in ending else "")
    if reader is None:
        raise UserError(f"{path}: can't read this kind of file; known are {', '.join(READERS)}")
    try:
        yield from reader(path, skip)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as {ending}: {error}") from None


def _parquet_rows(path: Path, skip: int) -> Iterator[tuple[int, Row]]:
    with pq.ParquetFile(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if first + size > skip:
                number = first
                for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                    if number + len(batch) > skip:
                        for offset, row in enumerate(batch.to_pylist()):
                            if number + offset >= skip:
                                yield number + offset, row
                    number += len(batch)
            first += size


def _lines(path: Path) -> Iterator[str]:
    with pa.input_stream(str(path), compression="detect") as raw:
        pending = b""
        while chunk := raw.read(1 << 20):
            *lines, pending = (pending + chunk).split(b"\n")
            yield from (line.decode("utf-8") for line in lines)
        if pending:
            yield pending.decode("utf-8")


def _json_rows(path: Path, skip: int) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(_lines(path)):
        if number < skip or not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number + 1}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number + 1}: expected an object with named fields")
        yield number, row


def _text_rows(path: Path, skip: int) -> Iterator[tuple[int, Row]]:
    """Pieces of about PIECE characters, cut at blank lines."""
    number, size = 0, 0
    piece: list[str] = []
    for line in _lines(path):
        if size >= PIECE and not line.strip():
            if number >= skip:
                yield number, {"text": "\n".join(piece)}
            number, piece, size = number + 1, [], 0
        else:
            piece.append(line.rstrip("\r"))
            size += len(line) + 1
    if size and number >= skip:
        yield number, {"text": "\n".join(piece)}


COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
READERS: dict[str, Callable[[Path, int], Iterator[tuple[int, Row]]]] = {
    "parquet": _parquet_rows,
    "jsonl": _json_rows,
    "json": _json_rows,
    "txt": _text_rows,
    "md": _text_rows,
}


# ------------------------------------------------------------------------------- made here


@dataclass
class Generated(Source):
    """Documents without end from a function of ours, or of yours: `module:function`."""

    name: str
    spec: GeneratorSource
    seed: int

    def rows(self, epoch: int, position: Position) -> Iterator[tuple[Row, Position]]:
        make = self._function()
        number = position or 0
        while True:
            rng = random.Random(f"{self.seed}/{self.name}/{number}")
            number += 1
            yield {self.spec.column: make(rng, **self.spec.options)}, number

    def _function(self) -> Callable[..., Document]:
        module, _, function = self.spec.function.partition(":")
        try:
            make = getattr(importlib.import_module(module), function)
            make(random.Random(0), **self.spec.options)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"source {self.name!r}: can't call {self.spec.function!r} with options "
                f"{self.spec.options}: {error}; it must be module:function, taking (rng, **options)"
            ) from None
        return make


@dataclass
class Packages(Source):
    """Documentation or source code of the Python packages that are installed here."""

    name: str
    spec: PackagesSource
    seed: int

    def rows(self, epoch: int, position: Position) -> Iterator[tuple[Row, Position]]:
        paths = list(package_files())
        random.Random(f"{self.seed}/{self.name}/files/{epoch}").shuffle(paths)
        read = docstrings if self.spec.content == "prose" else source_code
        for index in range(position or 0, len(paths)):
            text = read(paths[index])
            if text:
                yield {self.spec.column: text}, index + 1


@functools.cache
def package_files() -> tuple[Path, ...]:
    """Python files of the standard library and of the installed packages, tests left out."""
    skipped = {"test", "tests", "testing", "_vendor", "idlelib", "lib2to3", "__pycache__"}
    files = set()
    for kind, left_out in (("stdlib", skipped | {"site-packages"}), ("purelib", skipped)):
        root = Path(sysconfig.get_path(kind))
        for path in root.rglob("*.py"):
            if not left_out & set(path.relative_to(root).parts) and path.stat().st_size < 50_000:
                files.add(path)
    return tuple(sorted(files))


def source_code(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (UnicodeDecodeError, OSError):
        return ""


def docstrings(path: Path) -> str:
    """The docstrings of a Python file that are prose (several lines, no doctest), as one text."""
    try:
        tree = ast.parse(source_code(path))
    except (SyntaxError, ValueError, RecursionError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in texts if text and len(text) > 80 and ">>>" not in text)


# ------------------------------------------------------------------------------- for training


def open_source(name: str, recipe: Recipe) -> Source:
    """The recipe's source of that name."""
    spec: AnySource = recipe.sources[name]
    if isinstance(spec, FileSource):
        return Files(name, spec, spec.folder or recipe.data_dir, recipe.seed)
    if isinstance(spec, HubSource):
        return Hub(name, spec, recipe.seed, recipe.mirror)
    if isinstance(spec, GeneratorSource):
        return Generated(name, spec, recipe.seed)
    return Packages(name, spec, recipe.seed)


def hashed_fraction(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def fingerprint(document: Document) -> str:
    """The same for documents that differ only in case, white space and system prompt."""
    if isinstance(document, str):
        return " ".join(document.lower().split())
    turns = [(role, text) for role, text in map(said, document) if role != "system"]
    answers = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
    turns = turns[: answers[-1] + 1] if answers else turns  # stage 4 cuts off what has no answer
    return "\n".join(f"{role}: {fingerprint(text)}" for role, text in turns)


def said(message: Any) -> tuple[str, str]:
    """Role and words of a message; empty where it isn't one."""
    if not isinstance(message, dict):
        return "", ""
    role, content = message.get("role"), message.get("content")
    return str(role), content if isinstance(content, str) else ""


def size_of(document: Document) -> int:
    """Characters of a text, or of all that is said in a conversation."""
    if isinstance(document, str):
        return len(document)
    return sum(len(said(message)[1]) for message in document)


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document belongs to validation, in whatever stage it is met.

    Copies fall on the same side, and so do conversations that differ in their system prompt alone.
    """
    return hashed_fraction(fingerprint(document)) < fraction


@dataclass
class DocumentStream:
    """Documents of one side of a source's split, shuffled in blocks, epoch after epoch, endlessly.

    `state` is the position before the next document, as plain data; `DocumentStream(..., state)`
    goes on from there with the same documents. A block is read ahead, ordered by the seed, and
    handed out; after a resume it is read again and what was handed out is passed over. `number`
    counts the documents since the beginning, over all epochs.

    Of several `lanes` a stream has the documents of one; a hash of the text deals them out.
    """

    name: str
    source: Source
    spec: SourcePart
    seed: int
    held_out_fraction: float
    held_out: bool = False
    lane: int = 0
    lanes: int = 1
    state: State = field(
        default_factory=lambda: {
            "epoch": 0, "position": None, "block": 0, "document": 0, "number": 0,
        }
    )  # fmt: skip

    def __iter__(self) -> Iterator[Document]:
        while True:
            yield from self.one_epoch()
            if self.state["block"] == 0:
                where = f" in lane {self.lane} of {self.lanes}" if self.lanes > 1 else ""
                raise UserError(
                    f"source {self.name!r} is empty: no {'held-out ' * self.held_out}document with "
                    f"at least {self.spec.min_characters} characters{where}"
                )
            again = {"position": None, "block": 0, "document": 0}
            self.state = {**self.state, **again, "epoch": self.state["epoch"] + 1}

    def one_epoch(self) -> Iterator[Document]:
        """What is left of the current epoch; may be nothing."""
        for block, following in self._blocks():
            for document in block[self.state["document"] :]:
                handed_out = self.state["document"] + 1
                number = self.state["number"] + 1
                self.state = {**self.state, "document": handed_out, "number": number}
                yield document
            after = {"position": following, "block": self.state["block"] + 1, "document": 0}
            self.state = {**self.state, **after}

    def close(self) -> None:
        """Stop waiting for a source that doesn't answer; from any thread."""
        self.source.close()

    def in_order(self) -> Iterator[Document]:
        """The documents of the current epoch as they come, without reading a block ahead."""
        for row, _ in self.source.rows(self.state["epoch"], self.state["position"]):
            document = self._document(row)
            if document is not None:
                yield document

    def _blocks(self) -> Iterator[tuple[list[Document], Position]]:
        """Shuffled blocks of the current epoch, each with the position after it."""
        number, block, following = self.state["block"], [], None
        for row, following in self.source.rows(self.state["epoch"], self.state["position"]):
            document = self._document(row)
            if document is not None:
                block.append(document)
            if len(block) == self.spec.shuffle_block:
                yield self._shuffled(block, number), following
                number, block = number + 1, []
        if block:
            yield self._shuffled(block, number), following

    def _shuffled(self, block: list[Document], number: int) -> list[Document]:
        key = f"{self.seed}/{self.name}/{self.state['epoch']}/{number}"
        random.Random(key).shuffle(block)
        return block

    def _document(self, row: Row) -> Document | None:
        """The row's document if it passes the filters and lies on our side of the split."""
        document = row.get(self.spec.column)
        if document is None and self.spec.column in row:
            return None
        if not isinstance(document, (str, list)):
            raise UserError(
                f"source {self.name!r}: its rows have no text or messages in column "
                f"{self.spec.column!r}; they have {', '.join(sorted(row))}"
            )
        if isinstance(document, str):
            document = document.strip()
        if size_of(document) < max(1, self.spec.min_characters):
            return None
        fraction = hashed_fraction(fingerprint(document))
        if (fraction < self.held_out_fraction) != self.held_out:
            return None
        return document if int(fraction * 2**40) % self.lanes == self.lane else None


def open_stream(
    name: str, recipe: Recipe, *, held_out: bool = False, lane: int = 0, lanes: int = 1
) -> DocumentStream:
    """Documents of the recipe's source `name` (those of one lane), from the beginning."""
    return DocumentStream(
        name=name,
        source=open_source(name, recipe),
        spec=recipe.sources[name],
        seed=recipe.seed,
        held_out_fraction=recipe.held_out_fraction,
        held_out=held_out,
        lane=lane,
        lanes=lanes,
    )


def check_sources(names: Iterable[str], recipe: Recipe) -> None:
    """Open every source and read one document; report all problems at once.

    Raises:
        UserError: with a line for each source that can't be used.
    """
    problems = source_problems(names, recipe)
    if problems:
        raise UserError("\n       ".join(problems))


def source_problems(names: Iterable[str], recipe: Recipe) -> list[str]:
    """What is wrong with the sources of these names, looked at side by side."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _source_problem(name, recipe), dict.fromkeys(names))
        return [problem for problem in found if problem is not None]


def _source_problem(name: str, recipe: Recipe) -> str | None:
    stream = replace(open_stream(name, recipe), held_out_fraction=0.0)  # either side will do
    if isinstance(stream.source, Hub):
        stream.source.hurry()
    try:
        empty = next(stream.in_order(), None) is None
    except UserError as error:
        return str(error)
    return f"source {name!r} is empty: no document passes its filters" if empty else None
