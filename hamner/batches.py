"""Documents to batches: the weighted mix of token streams, and packed conversations.

Every batch carries the data position after it. Training that starts again from the position in a
checkpoint gets the very batches that an uninterrupted run would have got.
"""

from __future__ import annotations

import bisect
import hashlib
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hamner.prefetching import Prefetched
from hamner.sources import Document, DocumentStream, size_of
from hamner.token_cache import Piece, TokenCache
from hamner.tokenization import Tokenizer
from model import IGNORE_INDEX, count_labels

MicroBatch = dict[str, Any]  # tensors, and numbers that the device needn't be asked for
State = dict[str, Any]
READ_AHEAD = 256  # documents tokenised together, on all cores: many, as their lengths differ
READ_AHEAD_CHARACTERS = 1_000_000  # or so many
LEAST = 200
OPEN_ROWS = 64  # rows that packing keeps open at once


@dataclass
class Batch:
    """All that one optimizer step sees."""

    micro_batches: list[MicroBatch]
    weight: float  # what the summed loss is divided by: labelled tokens, or pairs
    tokens: int  # tokens the model reads, padding not counted
    state: State  # the data position after this batch
    epoch: float = 0.0


def on_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch with its tensors on a device; from page-locked memory without a wait."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in micro_batch.items()
    }


# ------------------------------------------------------------------------------ token streams


class TokenStream:
    """The tokens of a source's documents, one document after the other.

    `state` says where the next token stands: the position of its document, and how many of the
    document's tokens are gone already. With `read_ahead`, a background thread keeps so many tokens
    ready; with a cache, documents that it holds are not tokenised again.
    """

    def __init__(
        self,
        documents: DocumentStream,
        tokenizer: Tokenizer,
        state: State | None = None,
        *,
        read_ahead: int = 0,
        cache: TokenCache | None = None,
    ):
        if state is not None:
            documents.state = state["documents"]
        self._documents = documents
        self._pieces: Iterator[list[Piece]] = tokenized(documents, tokenizer)
        if cache is not None:
            self._pieces = cache.through(documents, tokenizer, tokenized)
        if read_ahead:
            self._pieces = Prefetched(self._pieces, read_ahead, tokens_in)
        self._ahead: deque[Piece] = deque()
        self._token = state["token"] if state is not None else 0

    @property
    def state(self) -> State:
        return {"documents": self._next().place, "token": self._token}

    def take(self, count: int) -> np.ndarray:
        """The next `count` tokens (count,), int64."""
        parts, missing = [], count
        while missing:
            ids = self._next().ids
            part = ids[self._token : self._token + missing]
            parts.append(part)
            missing -= len(part)
            self._token += len(part)
            if self._token >= len(ids):
                self._ahead.popleft()
                self._token = 0
        return np.concatenate(parts, dtype=np.int64)

    def begin(self) -> None:
        """Have the background thread begin, if there is one."""
        if isinstance(self._pieces, Prefetched):
            self._pieces.wait(0)

    def close(self) -> None:
        """End what runs in the background; from any thread."""
        self._documents.close()
        if isinstance(self._pieces, Prefetched):
            self._pieces.close()

    def _next(self) -> Piece:
        while not self._ahead:
            self._ahead.extend(next(self._pieces))
        return self._ahead[0]


def tokenized(documents: DocumentStream, tokenizer: Tokenizer) -> Iterator[list[Piece]]:
    """The stream's documents from where it stands, tokenised many at a time."""
    iterator = iter(documents)
    while True:
        places: list[State] = []
        texts: list[Document] = []
        size = 0
        while len(texts) < READ_AHEAD and size < READ_AHEAD_CHARACTERS:
            texts.append(next(iterator))
            size += size_of(texts[-1])
            # The iterator has just moved past the document: its own place is one before.
            after = documents.state
            before = {"document": after["document"] - 1, "number": after["number"] - 1}
            places.append({**after, **before})
        tokens = tokenizer.documents(texts)
        yield [
            Piece(place, np.asarray(ids, dtype=np.int32))
            for place, ids in zip(places, tokens, strict=True)
        ]


def tokens_in(pieces: list[Piece]) -> int:
    """Tokens of the documents; a short one counts as LEAST, for it takes memory of its own."""
    return sum(max(len(piece.ids), LEAST) for piece in pieces)


class MixedBatches:
    """Batches of full sequences, each sequence from one source, sources mixed by weight.

    The source of a sequence is the one that has fallen furthest behind its weight, so that after
    any number of sequences each source's share of a lane is exact to within one sequence.

    Every source comes dealt into lanes. The first sequences of a step are drawn from the first
    lane and trained on by the first rank, and so on, equally many each: what a step consists of has
    nothing to do with how many ranks there are.
    """

    def __init__(
        self,
        streams: Mapping[str, Mapping[int, TokenStream]],  # by source and lane: `lanes_of` tells
        weights: Mapping[str, float],
        *,
        sequence_length: int,
        sequences_per_step: int,
        micro_batch: int,
        drawn: Mapping[str, int] | None = None,
        lanes: int = 1,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.streams = {name: dict(lanes) for name, lanes in streams.items()}
        self.weights = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        self.sequence_length = sequence_length
        self.sequences_per_step = sequences_per_step
        self.micro_batch = micro_batch
        self.drawn = {name: (drawn or {}).get(name, 0) for name in self.streams}
        self.lanes, self.rank, self.ranks = lanes, rank, ranks

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        for stream in self._all_streams():
            stream.begin()
        drawn = [self._take(number, name) for number, name in enumerate(self._sources_of_step())]
        mine = [row for row in share_of(drawn, self.rank, self.ranks) if row is not None]
        input_ids = torch.from_numpy(np.stack(mine))
        return Batch(
            micro_batches=[{"input_ids": ids} for ids in input_ids.split(self.micro_batch)],
            weight=self.sequences_per_step * (self.sequence_length - 1),
            tokens=self.sequences_per_step * self.sequence_length,
            state=self.state,
        )

    def close(self) -> None:
        """End what the streams have running in the background; from any thread."""
        for stream in self._all_streams():
            stream.close()

    @property
    def state(self) -> State:
        """The data position; of several ranks, each knows the lanes that it draws from."""
        places = {
            name: {lane: stream.state for lane, stream in lanes.items()}
            for name, lanes in self.streams.items()
        }
        return {"sources": places, "drawn": dict(self.drawn)}

    def _all_streams(self) -> list[TokenStream]:
        return [stream for lanes in self.streams.values() for stream in lanes.values()]

    def _sources_of_step(self) -> list[str]:
        """The source of each of a step's sequences.

        A lane follows the same pattern of sources as the lane before it, one sequence ahead: each
        lane draws from each source by its weight, and so do all lanes together at any moment.
        """
        each, ahead, pattern = self.sequences_per_step // self.lanes, dict(self.drawn), []
        for number in range(1, each + self.lanes):
            total = number + sum(self.drawn.values())
            behind = [name for name in ahead if ahead[name] < self.weights[name] * total]
            name = min(behind, key=lambda name: (ahead[name] + 1) / self.weights[name])
            ahead[name] += 1
            pattern.append(name)
        self.drawn = {
            name: count + pattern[:each].count(name) for name, count in self.drawn.items()
        }
        return [pattern[n // each + n % each] for n in range(self.sequences_per_step)]

    def _take(self, number: int, name: str) -> np.ndarray | None:
        """The tokens of a step's sequence; None from a lane that only other ranks need."""
        stream = self.streams[name].get(number * self.lanes // self.sequences_per_step)
        return stream.take(self.sequence_length) if stream is not None else None


def lanes_of(rank: int, ranks: int, lanes: int, sequences_per_step: int) -> list[int]:
    """The lanes that a rank's sequences come from; see `MixedBatches`."""
    numbers = share_of(range(sequences_per_step), rank, ranks)
    return sorted({number * lanes // sequences_per_step for number in numbers})


def merged_states(states: Sequence[Any]) -> Any:
    """The data position of a run from what its ranks know of it."""
    if not isinstance(states[0], dict):
        return states[0]
    keys = dict.fromkeys(key for state in states for key in state)
    return {key: merged_states([state[key] for state in states if key in state]) for key in keys}


T = TypeVar("T")


def share_of(items: Sequence[T], rank: int, ranks: int) -> list[T]:
    """A rank's part of a step's items: the first part for the first, and so on."""
    each = -(-len(items) // ranks)
    return list(items[rank * each : (rank + 1) * each])


def filled_share_of(items: Sequence[T], rank: int, ranks: int, filler: T) -> list[T]:
    """A rank's part of items, with fillers where the last ones have fewer.

    Under FSDP the ranks compute in step: one with less to do would keep the others waiting.
    """
    mine = share_of(items, rank, ranks)
    return mine + [filler] * (-(-len(items) // ranks) - len(mine))


def held_out_sequences(
    documents: DocumentStream, tokenizer: Tokenizer, sequence_length: int, count: int
) -> Tensor:
    """Up to `count` sequences (N, T) from the held-out documents of a stream's first epoch."""
    tokens: list[int] = []
    for document in documents.in_order():
        tokens += tokenizer.document(document)
        if len(tokens) >= count * sequence_length:
            break
    rows = min(count, len(tokens) // sequence_length)
    return torch.tensor(tokens[: rows * sequence_length]).view(rows, sequence_length)


# ------------------------------------------------------------------------------ packing


@dataclass
class Example:
    """A tokenised conversation with its labels, -100 where no loss is wanted."""

    input_ids: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)


def make_example(input_ids: Sequence[int], labels: Sequence[int]) -> Example:
    return Example(np.asarray(input_ids, np.int32), np.asarray(labels, np.int32))


def digest(examples: Iterable[Example]) -> str:
    """A fingerprint of the tokens of examples, in order."""
    blake = hashlib.blake2b(digest_size=16)
    for example in examples:
        blake.update(len(example).to_bytes(4, "little") + example.input_ids.tobytes())
    return blake.hexdigest()


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Put items into rows of at most `row_length`: best fit among the open rows, in given order.

    Returns the item numbers of each row; every item is in exactly one.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free space, row number) of the open rows, sorted
    for item, length in enumerate(lengths):
        if not 0 < length <= row_length:
            raise ValueError(f"item {item} has length {length}; rows hold 1 to {row_length}")
        place = bisect.bisect_left(room, (length, -1))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = row_length, len(rows)
            rows.append([])
        rows[row].append(item)
        if free > length:
            bisect.insort(room, (free - length, row))
        if len(room) > OPEN_ROWS:
            del room[0]  # the fullest
    return rows


def packed_tensors(
    rows: Sequence[Sequence[Example]], row_length: int, padding: int = 0
) -> MicroBatch:
    """Rows of examples -> input_ids, labels and sequence_ids, each (rows, row_length) int64.

    sequence_ids count 0, 1, 2 ... through a row; the padding at its end is a sequence of its own,
    without labels. num_labels is how many labels there are to predict.
    """
    shape = (len(rows), row_length)
    input_ids = torch.full(shape, padding)
    labels = torch.full(shape, IGNORE_INDEX)
    sequence_ids = torch.full(shape, -1)
    for r, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row):
            end = start + len(example)
            input_ids[r, start:end] = torch.from_numpy(example.input_ids)
            labels[r, start:end] = torch.from_numpy(example.labels)
            sequence_ids[r, start:end] = number
            start = end
    return {
        "input_ids": input_ids,
        "labels": labels,
        "sequence_ids": sequence_ids,
        "num_labels": count_labels(labels, sequence_ids),
    }


class PackedBatches:
    """Epochs over examples, packed into rows; each example comes `repeats` times an epoch.

    Order and packing of an epoch follow from the seed and the epoch alone, so the position is a
    single number: how many rows have been handed out since the beginning.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        repeats: Sequence[int],
        *,
        epochs: int,
        row_length: int,
        rows_per_step: int,
        micro_batch: int,
        seed: int,
        state: State | None = None,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.examples = examples
        self.row_length = row_length
        self.rows_per_step = rows_per_step
        self.micro_batch = micro_batch
        self.rank, self.ranks = rank, ranks
        self.plan: list[tuple[float, list[int]]] = []  # epoch and example numbers of every row
        for epoch in range(epochs):
            rows = self._epoch_rows(repeats, f"{seed}/epoch/{epoch}")
            self.plan += [(epoch + (i + 1) / len(rows), row) for i, row in enumerate(rows)]
        self.row = state["row"] if state is not None else 0

    @property
    def steps(self) -> int:
        return -(-len(self.plan) // self.rows_per_step)

    def _epoch_rows(self, repeats: Sequence[int], key: str) -> list[list[int]]:
        rng = random.Random(key)
        order = [i for i, times in enumerate(repeats) for _ in range(times)]
        rng.shuffle(order)
        packed = pack([len(self.examples[i]) for i in order], self.row_length)
        rng.shuffle(packed)
        return [[order[place] for place in row] for row in packed]

    def __iter__(self) -> Iterator[Batch]:
        while self.row < len(self.plan):
            planned = self.plan[self.row : self.row + self.rows_per_step]
            rows = [[self.examples[i] for i in row] for _, row in planned]
            self.row += len(rows)
            batch = packed_batch(
                rows, self.row_length, self.micro_batch, rank=self.rank, ranks=self.ranks
            )
            batch.state, batch.epoch = {"row": self.row}, planned[-1][0]
            yield batch


def packed_batch(
    rows: Sequence[Sequence[Example]],
    row_length: int,
    micro_batch: int,
    *,
    rank: int = 0,
    ranks: int = 1,
) -> Batch:
    """A rank's share of one step's rows as micro-batches; weight and tokens are the whole step's.

    The weight is the number of labelled tokens.
    """
    mine = filled_share_of(rows, rank, ranks, filler=[])
    starts = range(0, len(mine), micro_batch)
    examples = [example for row in rows for example in row]
    return Batch(
        [packed_tensors(mine[i : i + micro_batch], row_length) for i in starts],
        weight=sum(int((example.labels[1:] != IGNORE_INDEX).sum()) for example in examples),
        tokens=sum(map(len, examples)),
        state={},
    )
