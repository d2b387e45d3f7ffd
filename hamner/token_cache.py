"""Tokens kept on disk, so that a run can be repeated without tokenising again.

Below the cache's folder every stream has a folder of its own, named by a fingerprint of all that
its tokens follow from: tokenizer, source, filters, split and seed. In it lie shards, each a file of
tokens that is mapped into memory and an index of its documents; a shard counts once its index is
there. A run reads what there is, tokenises what there isn't, and writes that down.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from hamner.files import write_bytes_whole, write_text_whole

if TYPE_CHECKING:
    from hamner.sources import DocumentStream
    from hamner.tokenization import Tokenizer

State = dict[str, Any]
FORMAT = 1
SHARD_TOKENS = 16_000_000  # 32 MB of two-byte tokens
TOGETHER = 32  # documents handed over at once


@dataclass
class Piece:
    """A document's tokens (n,), int32, and the stream's state before the document."""

    place: State
    ids: np.ndarray


class TokenCache:
    """The tokens of one stream of documents, in a folder of their own below `folder`."""

    def __init__(self, folder: Path, shard_tokens: int = SHARD_TOKENS):
        self._folder, self._shard_tokens = folder, shard_tokens

    def through(
        self,
        documents: DocumentStream,
        tokenizer: Tokenizer,
        tokenized: Callable[[DocumentStream, Tokenizer], Iterator[list[Piece]]],
    ) -> Iterator[list[Piece]]:
        """The stream's tokenised documents: from the cache where it has them, else `tokenized`."""
        identity = documents.source.identity(documents.state["position"])
        if identity is None:
            yield from tokenized(documents, tokenizer)
            return
        key = fingerprint(documents, tokenizer, identity)
        folder = self._folder / f"{documents.name}-{key}"
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
        shards = Shards(folder, dtype)
        recorder = Recorder(folder, dtype, self._shard_tokens)
        live = None
        try:
            while True:
                shard = shards.at(documents.state)
                if shard is not None:
                    recorder.flush()
                    yield from shard.pieces(documents.state["number"])
                    documents.state, live = shard.after, None
                    continue
                live = live or tokenized(documents, tokenizer)
                before = documents.state
                group = next(live)
                recorder.add(group, before, documents.state)
                yield group
        finally:
            recorder.flush()


def fingerprint(documents: DocumentStream, tokenizer: Tokenizer, identity: Any) -> str:
    """Sixteen hexadecimal digits of all that the tokens of a stream follow from."""
    told = {
        "format": FORMAT,
        "tokenizer": tokenizer.to_json(),
        "name": documents.name,
        "source": identity,
        "spec": documents.spec.model_dump(mode="json"),
        "seed": documents.seed,
        "held_out": [documents.held_out_fraction, documents.held_out],
        "lane": [documents.lane, documents.lanes],
    }
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass
class Shard:
    """A run of documents on disk, from number `first` on."""

    tokens: Path
    dtype: type
    first: int
    lengths: list[int]  # tokens of each document
    blocks: list[tuple[int, State]]  # where a block of the stream begins, and its place
    before: State
    after: State
    checksum: int

    def place(self, number: int) -> State:
        """The stream's state before document `number`."""
        item = number - self.first
        begin, place = self.blocks[bisect.bisect(self.blocks, item, key=lambda b: b[0]) - 1]
        return {**place, "document": place["document"] + item - begin, "number": number}

    def pieces(self, number: int) -> Iterator[list[Piece]]:
        """The documents from `number` on."""
        tokens = np.memmap(self.tokens, self.dtype, "r")
        start = number - self.first
        ends = np.cumsum(self.lengths)
        begins = ends - self.lengths
        for item in range(start, len(self.lengths), TOGETHER):
            yield [
                Piece(self.place(self.first + i), tokens[begins[i] : ends[i]].astype(np.int32))
                for i in range(item, min(item + TOGETHER, len(self.lengths)))
            ]

    def is_whole(self) -> bool:
        try:
            return zlib.crc32(self.tokens.read_bytes()) == self.checksum
        except OSError:
            return False


class Shards:
    """The shards in a folder."""

    def __init__(self, folder: Path, dtype: type):
        self._dtype = dtype
        self._index = {int(path.stem): path for path in folder.glob("*.json")}
        self._firsts = sorted(self._index)
        self._looked_at: Shard | None = None

    def at(self, state: State) -> Shard | None:
        """The shard that holds the next document, if it is whole and agrees on its place."""
        number: int = state["number"]
        at = bisect.bisect(self._firsts, number) - 1
        if at < 0:
            return None
        shard = self._read(self._firsts[at])
        if shard is None or number >= shard.first + len(shard.lengths):
            return None
        return shard if state == shard.place(number) or state == shard.before else None

    def _read(self, first: int) -> Shard | None:
        if self._looked_at is not None and self._looked_at.first == first:
            return self._looked_at
        path = self._index[first]
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            blocks = [(begin, place) for begin, place in index.pop("blocks")]
            shard = Shard(path.with_suffix(".tokens"), self._dtype, blocks=blocks, **index)
        except (OSError, ValueError, TypeError, KeyError):
            shard = None
        if shard is None or not shard.is_whole():
            tqdm.write(f"{path}: damaged, its documents are tokenised again")
            self._firsts.remove(first)
            return None
        self._looked_at = shard
        return shard


@dataclass
class Recorder:
    """Collects documents and writes them as a shard when there are enough."""

    folder: Path
    dtype: type
    shard_tokens: int
    _pieces: list[Piece] = field(default_factory=list)
    _tokens: int = 0
    _before: State | None = None
    _after: State | None = None
    _broken: bool = False

    def add(self, group: list[Piece], before: State, after: State) -> None:
        """Take documents that stand between two states of the stream."""
        if self._broken:
            return
        if not self._pieces:
            self._before = before
        self._pieces += group
        self._after = after
        self._tokens += sum(len(piece.ids) for piece in group)
        if self._tokens >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what there is. A disk that is full ends the writing, not the training."""
        if not self._pieces:
            return
        try:
            self._write()
        except OSError as error:
            tqdm.write(f"{self.folder}: {error.strerror}; tokens are cached no further")
            self._broken = True
        self._pieces, self._tokens = [], 0

    def _write(self) -> None:
        first = self._pieces[0].place["number"]
        path = self.folder / f"{first:012d}.json"
        tokens = np.concatenate([piece.ids for piece in self._pieces]).astype(self.dtype).tobytes()
        index = {
            "first": first,
            "lengths": [len(piece.ids) for piece in self._pieces],
            "blocks": self._blocks(),
            "before": self._before,
            "after": self._after,
            "checksum": zlib.crc32(tokens),
        }
        write_bytes_whole(path.with_suffix(".tokens"), [tokens])
        write_text_whole(path, [json.dumps(index)])

    def _blocks(self) -> list[tuple[int, State]]:
        """Where the stream's blocks begin among the documents, with the place of the first."""
        found: list[tuple[int, State]] = []
        last = None
        for item, piece in enumerate(self._pieces):
            block = (piece.place["epoch"], piece.place["block"])
            if block != last:
                found.append((item, piece.place))
            last = block
        return found
