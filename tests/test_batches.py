"""Tests of the batches: nothing lost, nothing repeated, exact shares, exact resuming."""

from __future__ import annotations

import io
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from conftest import some_text
from hypothesis import given, settings
from hypothesis import strategies as st

from hamner import tokenization
from hamner.batches import (
    READ_AHEAD,
    Batch,
    Example,
    MixedBatches,
    PackedBatches,
    TokenStream,
    filled_share_of,
    held_out_sequences,
    lanes_of,
    make_example,
    merged_states,
    on_device,
    pack,
    packed_batch,
    packed_tensors,
    share_of,
)
from hamner.errors import UserError
from hamner.machine import Machine
from hamner.prefetching import Prefetched
from hamner.recipe import SourcePart, StreamStage, check_recipe, load_recipe
from hamner.sources import DocumentStream, Source, is_held_out
from hamner.stage import Start, held_out_tokens, new_model, open_mix

END = 0


class Numbers:
    """A tokenizer for documents that are numbers with spaces between; 0 ends a document."""

    def documents(self, documents: Sequence[str]) -> list[list[int]]:
        return [self.document(document) for document in documents]

    def document(self, document: str) -> list[int]:
        return [int(word) for word in document.split()] + [END]


class Listed(Source):
    """A source over a list of texts."""

    def __init__(self, documents: list[str]):
        self.documents = documents

    def rows(self, epoch: int, position: Any) -> Iterator[tuple[dict[str, Any], Any]]:
        for number in range(position or 0, len(self.documents)):
            yield {"text": self.documents[number]}, number + 1


def json_round_trip(value: Any) -> Any:
    return json.loads(json.dumps(value))


def kept(state: Any) -> Any:
    """A state as it comes back from a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def numbered(first: int, count: int, seed: int = 0) -> list[str]:
    """Documents that say their own number, one to nine times."""
    rng = random.Random(seed)
    return [f"{first + i} " * rng.randint(1, 9) for i in range(count)]


def documents_of(texts: list[str], block: int = 7, **options: Any) -> DocumentStream:
    fraction = options.pop("fraction", 0.0)
    return DocumentStream(
        "web", Listed(texts), SourcePart(shuffle_block=block), 3, fraction, **options
    )


def stream_of(texts: list[str], block: int = 7, state: Any = None, **options: Any) -> TokenStream:
    return TokenStream(documents_of(texts, block, **options), Numbers(), state)  # type: ignore[arg-type]


def tokens_of(texts: list[str], documents: int, block: int = 7) -> list[int]:
    """The tokens of a stream's first documents, put together without a TokenStream."""
    return [
        token
        for document in islice(documents_of(texts, block), documents)
        for token in Numbers().document(str(document))
    ]


# ------------------------------------------------------------------------------- token streams


@pytest.mark.parametrize("size", [1, 2, 5, 64, 300])
def test_a_token_stream_is_its_documents_one_after_the_other(size: int) -> None:
    texts = numbered(100, 50)
    expected = tokens_of(texts, 3 * len(texts))
    stream = stream_of(texts)
    found = np.concatenate([stream.take(size) for _ in range(len(expected) // size)])
    assert found.dtype == np.int64
    assert found.tolist() == expected[: len(found)]


@pytest.mark.parametrize("block", [1, 7, 1_000])
def test_a_token_stream_goes_on_exactly_from_any_token_of_two_epochs(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hamner.batches.READ_AHEAD", 64)  # every token times every token
    texts = numbered(100, 64 + 9)
    expected = tokens_of(texts, 2 * len(texts), block)
    for k in range(len(expected)):
        stream = stream_of(texts, block)
        if k:
            stream.take(k)
        resumed = stream_of(texts, block, json_round_trip(stream.state))
        assert json_round_trip(resumed.state) == json_round_trip(stream.state)
        assert resumed.take(len(expected) - k).tolist() == expected[k:]


def test_a_token_stream_goes_on_however_often_it_is_stopped() -> None:
    texts = numbered(100, 40)
    expected = tokens_of(texts, 3 * len(texts))
    rng, found, state = random.Random(2), [], None
    while len(found) < len(expected):
        stream = stream_of(texts, state=json_round_trip(state))
        for _ in range(rng.randrange(4)):
            found += stream.take(rng.randint(1, 30)).tolist()
        state = stream.state
    assert found[: len(expected)] == expected


def test_reading_the_state_changes_nothing() -> None:
    one, other = stream_of(numbered(100, 20)), stream_of(numbered(100, 20))
    for _ in range(60):
        before = json_round_trip(one.state)
        assert one.state == one.state
        assert one.take(5).tolist() == other.take(5).tolist()
        assert json_round_trip(one.state) != before


def test_a_token_stream_with_the_real_tokenizer_ends_every_document() -> None:
    rng = random.Random(0)
    texts = [some_text(rng, 20) for _ in range(60)]
    tokenizer = tokenization.train(texts, 300)
    stream = TokenStream(documents_of(texts), tokenizer)
    expected = [
        token
        for document in documents_of(texts).one_epoch()
        for token in tokenizer.document(document)
    ]
    assert stream.take(len(expected)).tolist() == expected
    assert expected.count(tokenizer.end_of_text) == 60


# ------------------------------------------------------------------------------- the mix

MIX = {"one": 0.5, "two": 0.3, "three": 0.2}
FIRST = {"one": 1_000, "two": 2_000, "three": 3_000}  # tokens tell their source by the thousand
COUNTS = {"one": 60, "two": 31, "three": 45}


def mixed(
    state: dict[str, Any] | None = None,
    length: int = 16,
    per_step: int = 5,
    lanes: int = 1,
    rank: int = 0,
    ranks: int = 1,
) -> MixedBatches:
    places = (state or {}).get("sources", {})
    streams = {
        name: {
            lane: stream_of(
                numbered(FIRST[name], COUNTS[name], seed), state=places.get(name, {}).get(lane),
                lane=lane, lanes=lanes,
            )
            for lane in lanes_of(rank, ranks, lanes, per_step)
        }
        for seed, name in enumerate(MIX)
    }  # fmt: skip
    return MixedBatches(
        streams, MIX, sequence_length=length, sequences_per_step=per_step, micro_batch=2,
        drawn=(state or {}).get("drawn"), lanes=lanes, rank=rank, ranks=ranks,
    )  # fmt: skip


def rows_of(batch: Batch) -> torch.Tensor:
    return torch.cat([micro_batch["input_ids"] for micro_batch in batch.micro_batches])


def source_of(row: torch.Tensor) -> str:
    thousands = {int(token) // 1_000 for token in row if token != END}
    assert len(thousands) == 1, "a sequence holds tokens of several sources"
    return list(MIX)[thousands.pop() - 1]


class Endless:
    """Stands in for a token stream where only the shares count."""

    state: dict[str, Any] = {}  # noqa: RUF012

    def begin(self) -> None:
        pass

    def take(self, count: int) -> np.ndarray:
        return np.zeros(count, np.int64)


def worst_deviation(weights: dict[str, float], sequences: int) -> float:
    """How many sequences a source is ever away from its share."""
    streams: dict[str, Any] = {name: {0: Endless()} for name in weights}
    mix = MixedBatches(streams, weights, sequence_length=1, sequences_per_step=1, micro_batch=1)
    worst = 0.0
    for total in range(1, sequences + 1):
        next(mix)
        gaps = [abs(mix.drawn[name] - weight * total) for name, weight in weights.items()]
        worst = max(worst, *gaps)
    assert sum(mix.drawn.values()) == sequences
    return worst


def test_every_sequence_comes_from_one_source() -> None:
    found = Counter(source_of(row) for b in islice(mixed(), 40) for row in rows_of(b))
    assert found == {"one": 100, "two": 60, "three": 40}


def test_batches_have_the_shape_that_was_asked_for() -> None:
    batch = next(iter(mixed()))
    shapes = [tuple(micro_batch["input_ids"].shape) for micro_batch in batch.micro_batches]
    assert shapes == [(2, 16), (2, 16), (1, 16)]
    assert rows_of(batch).dtype == torch.int64
    assert (batch.tokens, batch.weight) == (5 * 16, 5 * 15)  # the first token has no label


@pytest.mark.parametrize("stage", ["base", "anneal", "chat"])
@pytest.mark.parametrize("name", ["v4", "small", "tiny"])
def test_shares_in_the_recipes_never_leave_their_weights_by_a_sequence(
    name: str, stage: str
) -> None:
    weights = {s.name: s.weight for s in load_recipe(name).stage(stage).sources}  # type: ignore[attr-defined]
    assert worst_deviation(weights, 2_000) < 1


def test_shares_of_real_batches_after_2000_sequences_match_their_weights() -> None:
    mix = mixed(length=8)
    found = Counter(source_of(row) for batch in islice(mix, 400) for row in rows_of(batch))
    assert found == mix.drawn
    for name, weight in MIX.items():
        assert abs(found[name] - 2_000 * weight) < 1


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=8))
def test_shares_never_leave_any_weights_by_a_sequence(parts: list[int]) -> None:
    weights = {str(i): part / sum(parts) for i, part in enumerate(parts)}
    assert worst_deviation(weights, 150) < 1 + 1e-9


def test_shares_of_many_small_and_two_large_sources_stay_within_a_sequence() -> None:
    parts = [0.07, 0.40, 0.05, 0.01, 0.01, 0.01, 0.40, 0.05]
    assert worst_deviation({str(i): part for i, part in enumerate(parts)}, 200) < 1 + 1e-9


def test_rounded_weights_keep_their_shares_after_millions_of_sequences() -> None:
    """Recipes may write a third as 0.333333; the missing millionth must not add up."""
    weights = {"a": 0.333333, "b": 0.333333, "c": 0.333333}
    streams: dict[str, Any] = {name: {0: Endless()} for name in weights}
    mix = MixedBatches(
        streams, weights, sequence_length=1, sequences_per_step=1, micro_batch=1,
        drawn={name: 3_000_000 for name in weights},
    )  # fmt: skip
    for _ in range(300):
        next(mix)
    assert mix.drawn == {name: 3_000_100 for name in weights}


def test_the_mix_goes_on_exactly_from_the_state_in_any_batch() -> None:
    batches = list(islice(mixed(), 45))
    for k in range(0, 40, 3):
        resumed = list(islice(mixed(kept(batches[k].state)), 4))
        for expected, found in zip(batches[k + 1 : k + 5], resumed, strict=True):
            assert torch.equal(rows_of(expected), rows_of(found))
            assert json_round_trip(expected.state) == json_round_trip(found.state)


def test_the_mix_goes_on_exactly_after_two_resumes_in_a_row() -> None:
    batches = list(islice(mixed(), 20))
    once = list(islice(mixed(kept(batches[4].state)), 3))
    twice = list(islice(mixed(kept(once[2].state)), 12))
    for expected, found in zip(batches[8:], twice, strict=True):
        assert torch.equal(rows_of(expected), rows_of(found))


def test_the_state_in_a_batch_stays_what_it_was() -> None:
    iterator = iter(mixed())
    batch = next(iterator)
    before = json_round_trip(batch.state)
    list(islice(iterator, 30))
    assert json_round_trip(batch.state) == before


def test_no_document_is_lost_or_repeated_in_two_epochs_with_resumes_at_random_places() -> None:
    rng, state = random.Random(9), None
    tokens: dict[str, list[int]] = {name: [] for name in MIX}
    resumes = 0
    while min(len(tokens[name]) / COUNTS[name] for name in MIX) < 25:
        resumes += 1
        for batch in islice(mixed(kept(state)), rng.randrange(4)):
            state = batch.state
            for row in rows_of(batch):
                tokens[source_of(row)] += row.tolist()
    assert resumes > 30
    for seed, name in enumerate(MIX):
        lengths = {FIRST[name] + i: len(text.split())
                   for i, text in enumerate(numbered(FIRST[name], COUNTS[name], seed))}  # fmt: skip
        text = " ".join(map(str, tokens[name]))
        documents = [part.split() for part in text.split(f" {END}")][: 2 * COUNTS[name]]
        for epoch in (documents[: COUNTS[name]], documents[COUNTS[name] :]):
            assert sorted(int(words[0]) for words in epoch) == sorted(lengths)
            assert all(words == [words[0]] * lengths[int(words[0])] for words in epoch)


def test_what_a_state_says_of_other_sources_is_passed_over() -> None:
    """As when a recipe's mix is changed between two runs."""
    state = kept(next(iter(mixed())).state)
    state["drawn"]["gone"] = 1_000_000
    found = [rows_of(batch) for batch in islice(mixed(state), 2)]
    expected = [rows_of(batch) for batch in islice(mixed(), 3)][1:]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------- lanes and ranks

LAYOUTS = [(ranks, lanes) for ranks in (1, 2, 4) for lanes in (1, 3, 4)]


class AllRanks:
    """The mixes of several ranks, which take their steps together."""

    def __init__(self, ranks: int, state: dict[str, Any] | None = None, **options: Any):
        self.mixes = [mixed(state, rank=r, ranks=ranks, **options) for r in range(ranks)]

    def step(self) -> tuple[torch.Tensor, dict[str, Any], list[Batch]]:
        """The rows of all ranks put together, the position after them, and each rank's batch."""
        batches = [next(mix) for mix in self.mixes]
        state = kept(merged_states([batch.state for batch in batches]))
        return torch.cat([rows_of(batch) for batch in batches]), state, batches


@pytest.mark.parametrize(("ranks", "lanes"), LAYOUTS)
def test_what_the_ranks_draw_together_is_the_batch_of_one(ranks: int, lanes: int) -> None:
    one = mixed(per_step=12, lanes=lanes)
    together = AllRanks(ranks, per_step=12, lanes=lanes)
    for _ in range(40):
        whole, (rows, state, batches) = next(one), together.step()
        assert torch.equal(rows, rows_of(whole))
        assert state == kept(whole.state)
        for batch in batches:
            assert len(rows_of(batch)) == 12 // ranks
            assert all(len(micro["input_ids"]) <= 2 for micro in batch.micro_batches)
            assert (
                (batch.weight, batch.tokens) == (12 * 15, 12 * 16) == (whole.weight, whole.tokens)
            )


@pytest.mark.parametrize("lanes", [1, 3, 4])
def test_the_mix_goes_on_exactly_with_another_number_of_ranks(lanes: int) -> None:
    one = mixed(per_step=12, lanes=lanes)
    expected = [rows_of(batch) for batch in islice(one, 24)]
    found: list[torch.Tensor] = []
    state = None
    for ranks in (1, 2, 4, 1, 4, 2, 1, 3):
        together = AllRanks(ranks, state, per_step=12, lanes=lanes)
        for _ in range(3):
            rows, state, _ = together.step()
            found.append(rows)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_no_document_of_a_lane_is_lost_or_repeated_though_ranks_come_and_go(lanes: int) -> None:
    rng, state = random.Random(9), None
    tokens: dict[tuple[str, int], list[int]] = {
        key: [] for key in itertools.product(MIX, range(lanes))
    }
    of_lane = {
        (name, lane): list(
            documents_of(
                numbered(FIRST[name], COUNTS[name], seed), lane=lane, lanes=lanes
            ).one_epoch()
        )
        for seed, name in enumerate(MIX)
        for lane in range(lanes)
    }
    assert sum(map(len, of_lane.values())) == sum(COUNTS.values())
    while min(len(tokens[key]) / len(of_lane[key]) for key in tokens) < 25:
        together = AllRanks(rng.choice((1, 2, 4)), state, per_step=12, lanes=lanes)
        for _ in range(rng.randint(1, 5)):
            rows, state, _ = together.step()
            for number, row in enumerate(rows):
                tokens[source_of(row), number * lanes // 12] += row.tolist()
    for key, documents in of_lane.items():
        count = len(documents)
        read = [part.split() for part in " ".join(map(str, tokens[key])).split(f" {END}")]
        for epoch in (read[:count], read[count : 2 * count]):
            assert sorted(epoch) == sorted(str(document).split() for document in documents)


@pytest.mark.parametrize(("name", "lanes"), [("v4", 8), ("v4", 4), ("small", 8), ("tiny", 8)])
def test_a_source_is_drawn_from_all_its_lanes_alike(name: str, lanes: int) -> None:
    """Else some of its documents come again and again, and others never."""
    chat = load_recipe(name).chat
    taken: Counter[tuple[str, int]] = Counter()

    class Counted(Endless):
        def __init__(self, *key: Any):
            self.key = key

        def take(self, count: int) -> np.ndarray:
            taken[self.key] += 1
            return super().take(count)

    weights = {source.name: source.weight for source in chat.sources}
    streams: dict[str, Any] = {s: {n: Counted(s, n) for n in range(lanes)} for s in weights}
    mix = MixedBatches(
        streams, weights, sequence_length=1, sequences_per_step=chat.sequences_per_step,
        micro_batch=1, lanes=lanes,
    )  # fmt: skip
    for _ in range(600):
        next(mix)
    for source in weights:
        times = [taken[source, lane] for lane in range(lanes)]
        assert min(times) > 0.9 * max(times), (source, times)


def test_a_rank_draws_from_the_lanes_of_its_own_sequences() -> None:
    assert lanes_of(0, 1, 1, 8) == [0]
    assert [lanes_of(rank, 4, 4, 8) for rank in range(4)] == [[0], [1], [2], [3]]
    assert [lanes_of(rank, 2, 4, 8) for rank in range(2)] == [[0, 1], [2, 3]]
    assert [lanes_of(rank, 4, 2, 8) for rank in range(4)] == [[0], [0], [1], [1]]
    assert [lanes_of(rank, 2, 3, 6) for rank in range(2)] == [[0, 1], [1, 2]]


def start_of(raw: dict[str, Any], rank: int, ranks: int) -> Start:
    recipe = check_recipe(raw, "test")
    tokenizer = tokenization.train([some_text(random.Random(1), 400)], 300)
    machine = Machine(torch.device("cpu"), rank, ranks)
    return Start("base", recipe, "micro", machine, new_model(recipe), tokenizer, None, None)


def stage_mix(raw: dict[str, Any], rank: int, ranks: int, state: Any = None) -> MixedBatches:
    """The mix of the base stage as a rank opens it."""
    start = start_of(raw, rank, ranks)
    settings = start.recipe.stage("base")
    assert isinstance(settings, StreamStage)
    return open_mix(start, settings, (state or {}).get("sources", {}), state)


@pytest.mark.parametrize(("lanes", "opened"), [(1, [[0], [0]]), (4, [[0, 1], [2, 3]])])
def test_a_rank_of_a_stage_opens_its_lanes_and_no_others(
    lanes: int, opened: list[list[int]], raw: dict[str, Any]
) -> None:
    raw["lanes"] = lanes
    one = stage_mix(raw, 0, 1)
    mixes = [stage_mix(raw, rank, 2) for rank in range(2)]
    for mix, mine in zip(mixes, opened, strict=True):
        for streams in mix.streams.values():
            documents = [stream._documents for stream in streams.values()]
            assert list(streams) == [d.lane for d in documents] == mine
            assert {d.lanes for d in documents} == {lanes}
    for _ in range(3):
        whole, parts = next(one), [next(mix) for mix in mixes]
        assert torch.equal(torch.cat([rows_of(part) for part in parts]), rows_of(whole))
    state = kept(merged_states([part.state for part in parts]))
    again = stage_mix(raw, 0, 1, state)
    assert torch.equal(rows_of(next(again)), rows_of(next(one)))
    for mix in (one, again, *mixes):
        mix.close()


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 1), (4, 2)])
def test_sources_that_were_dealt_otherwise_are_refused(
    before: int, after: int, raw: dict[str, Any]
) -> None:
    raw["lanes"] = before
    mix = stage_mix(raw, 0, 1)
    state = kept(next(mix).state)
    mix.close()
    raw["lanes"] = after
    with pytest.raises(UserError, match=f"dealt into {before} lane.s. so far.*lanes: {after}: put"):
        stage_mix(raw, 0, 1, state)


def test_lanes_change_nothing_of_what_is_held_out(raw: dict[str, Any]) -> None:
    found = []
    for lanes in (1, 4):
        raw["lanes"] = lanes
        start = start_of(raw, 0, 1)
        found.append(held_out_tokens(start.recipe, start.recipe.base, start.tokenizer, {}))
    assert found[0].keys() == found[1].keys() == {"web", "books"}
    assert all(
        len(found[0][name]) and torch.equal(found[0][name], found[1][name]) for name in found[0]
    )


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_are_the_items_in_order_and_filled_ones_are_of_one_size(
    count: int, ranks: int
) -> None:
    items = list(range(count))
    shares = [share_of(items, rank, ranks) for rank in range(ranks)]
    assert [item for share in shares for item in share] == items
    filled = [filled_share_of(items, rank, ranks, filler=-1) for rank in range(ranks)]
    assert {len(share) for share in filled} == {-(-count // ranks)}
    assert [[item for item in share if item >= 0] for share in filled] == shares
    if count % ranks == 0:
        assert filled == shares


# ------------------------------------------------------------------------------- held out


def held_out_of(texts: list[str], length: int, count: int) -> torch.Tensor:
    documents = documents_of(texts, fraction=0.3, held_out=True)
    return held_out_sequences(documents, Numbers(), length, count)  # type: ignore[arg-type]


def test_validation_sequences_hold_held_out_documents_and_no_others() -> None:
    texts = numbered(100, 200)
    held_out = [text for text in texts if is_held_out(text.strip(), 0.3)]
    sequences = held_out_of(texts, length=8, count=20)
    assert sequences.shape == (20, 8) and sequences.dtype == torch.int64
    expected = [token for text in held_out for token in Numbers().document(text)]
    assert sequences.flatten().tolist() == expected[:160]


def test_validation_has_as_many_sequences_as_the_held_out_text_fills() -> None:
    texts = numbered(100, 60)
    held_out = [text for text in texts if is_held_out(text.strip(), 0.3)]
    whole = sum(len(Numbers().document(text)) for text in held_out) // 8
    assert 0 < whole < 1_000
    assert held_out_of(texts, length=8, count=1_000).shape == (whole, 8)
    assert held_out_of(["1 1 1"], length=8, count=4).shape == (0, 8)


# ------------------------------------------------------------------------------- packing

lengths_and_row = st.integers(1, 80).flatmap(
    lambda row: st.tuples(st.lists(st.integers(1, row), max_size=300), st.just(row))
)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(lengths_and_row)
def test_packing_puts_every_item_into_exactly_one_row_that_holds_it(
    case: tuple[list[int], int],
) -> None:
    lengths, row_length = case
    rows = pack(lengths, row_length)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in row) <= row_length for row in rows)
    assert rows == pack(lengths, row_length)


def test_packing_takes_the_fullest_row_that_has_room() -> None:
    assert pack([6, 5, 3, 5, 4], 10) == [[0, 2], [1, 3], [4]]
    assert pack([7, 8, 2, 3], 10) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("count", [1_500, 5_000])
def test_packing_many_random_lengths_wastes_less_than_five_percent(count: int) -> None:
    rng = random.Random(count)
    like_conversations = [min(1_024, int(rng.lognormvariate(5.2, 0.7)) + 5) for _ in range(count)]
    uniform = [rng.randint(1, 1_024) for _ in range(count)]
    for lengths in (like_conversations, uniform):
        rows = pack(lengths, 1_024)
        assert sum(lengths) / (1_024 * len(rows)) > 0.95


@pytest.mark.parametrize("wrong", [0, -1, 11])
def test_packing_refuses_an_item_that_fits_no_row(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"item 2 has length {wrong}; rows hold 1 to 10"):
        pack([3, 10, wrong], 10)


def test_packed_tensors_look_like_this() -> None:
    one = make_example([11, 12, 13], [-100, 12, 13])
    two = make_example([21, 22], [-100, 22])
    three = make_example([31, 32, 33, 34, 35, 36], [-100, -100, -100, 34, 35, 36])
    tensors = packed_tensors([[one, two], [three]], 6, padding=9)
    assert tensors.pop("num_labels") == 6
    assert {key: value.tolist() for key, value in tensors.items()} == {
        "input_ids": [[11, 12, 13, 21, 22, 9], [31, 32, 33, 34, 35, 36]],
        "labels": [[-100, 12, 13, -100, 22, -100], [-100, -100, -100, 34, 35, 36]],
        "sequence_ids": [[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 0]],
    }
    assert {value.dtype for value in tensors.values()} == {torch.int64}


def test_a_packed_batch_counts_labels_and_tokens_without_padding() -> None:
    one = make_example([11, 12, 13], [-100, 12, 13])
    two = make_example([21, 22], [-100, 22])
    batch = packed_batch([[one, two], [two], [one]], 6, 2)
    assert [len(m["input_ids"]) for m in batch.micro_batches] == [2, 1]
    assert [m["num_labels"] for m in batch.micro_batches] == [4, 2]
    assert (batch.weight, batch.tokens) == (6, 10)


def test_a_label_that_nothing_stands_before_counts_for_nothing() -> None:
    all_labelled = make_example([11, 12, 13], [11, 12, 13])
    batch = packed_batch([[all_labelled, all_labelled]], 8, 1)
    assert batch.weight == batch.micro_batches[0]["num_labels"] == 4


def test_on_a_device_tensors_move_and_numbers_stay() -> None:
    micro_batch = packed_tensors([[make_example([1, 2], [-100, 2])]], 3)
    moved = on_device(micro_batch, torch.device("meta"))
    assert moved.keys() == micro_batch.keys() and moved["num_labels"] == 1
    tensors = [value for value in moved.values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 3 and all(tensor.device.type == "meta" for tensor in tensors)


# ------------------------------------------------------------------------------- packed epochs


def some_examples(count: int = 43) -> list[Example]:
    """Example i consists of tokens i + 1, of which some have labels."""
    rng = random.Random(4)
    examples = []
    for i in range(count):
        ids = [i + 1] * rng.randint(2, 12)
        asked = rng.randint(1, len(ids) - 1)
        examples.append(make_example(ids, [-100] * asked + ids[asked:]))
    return examples


EXAMPLES = some_examples()
REPEATS = [1 + i % 3 for i in range(len(EXAMPLES))]


def packed_epochs(
    state: Any = None, rows_per_step: int = 4, seed: int = 1, **options: Any
) -> PackedBatches:
    return PackedBatches(
        EXAMPLES, REPEATS, epochs=3, row_length=24, rows_per_step=rows_per_step,
        micro_batch=options.pop("micro_batch", 3), seed=seed, state=state, **options,
    )  # fmt: skip


def examples_in(batch: Batch) -> list[int]:
    """The numbers of the examples in a batch, in order; checks that each is whole."""
    found = []
    for micro_batch in batch.micro_batches:
        rows = zip(*(micro_batch[k] for k in ("input_ids", "labels", "sequence_ids")), strict=True)
        for ids, labels, sequences in rows:
            for number in range(int(sequences.max()) + 1):
                place = sequences == number
                example = int(ids[place][0]) - 1
                assert ids[place].tolist() == EXAMPLES[example].input_ids.tolist()
                assert labels[place].tolist() == EXAMPLES[example].labels.tolist()
                found.append(example)
    return found


def test_every_example_comes_as_often_as_asked_in_every_epoch() -> None:
    epochs: dict[int, list[int]] = {1: [], 2: [], 3: []}
    for batch in packed_epochs(rows_per_step=1):
        epochs[int(np.ceil(batch.epoch))] += examples_in(batch)
    expected = {i: times for i, times in enumerate(REPEATS)}
    assert [Counter(examples) for examples in epochs.values()] == [expected] * 3


def test_every_epoch_has_another_order() -> None:
    found = [example for batch in packed_epochs() for example in examples_in(batch)]
    size = sum(REPEATS)
    orders = {tuple(found[i * size : (i + 1) * size]) for i in range(3)}
    assert len(found) == 3 * size and len(orders) == 3


def test_the_order_follows_from_the_seed() -> None:
    def order(seed: int) -> list[int]:
        return [i for batch in packed_epochs(seed=seed) for i in examples_in(batch)]

    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize("rows_per_step", [1, 4, 5, 1_000])
def test_the_number_of_steps_is_known_beforehand(rows_per_step: int) -> None:
    batches = packed_epochs(rows_per_step=rows_per_step)
    steps = batches.steps
    assert len(list(batches)) == steps > 0


def test_the_epoch_grows_to_the_last_one() -> None:
    epochs = [batch.epoch for batch in packed_epochs()]
    assert epochs == sorted(epochs) and 0 < epochs[0] < 1 and epochs[-1] == 3


def test_the_weight_of_a_packed_batch_is_its_number_of_labels() -> None:
    for batch in packed_epochs():
        examples = [EXAMPLES[i] for i in examples_in(batch)]
        assert batch.weight == sum(int((e.labels != -100).sum()) for e in examples)
        assert batch.tokens == sum(len(e) for e in examples)
        assert all(len(m["input_ids"]) <= 3 for m in batch.micro_batches)


def test_packed_batches_go_on_exactly_from_any_batch() -> None:
    batches = list(packed_epochs())
    for k, batch in enumerate(batches):
        resumed = list(packed_epochs(json_round_trip(batch.state)))
        assert [examples_in(b) for b in resumed] == [examples_in(b) for b in batches[k + 1 :]]
        assert [(b.state, b.epoch) for b in resumed] == [
            (b.state, b.epoch) for b in batches[k + 1 :]
        ]


def labels_in(micro_batch: dict[str, Any]) -> int:
    """Labels with a token of the same sequence before them, counted one by one."""
    count = 0
    for labels, sequences in zip(
        micro_batch["labels"].tolist(), micro_batch["sequence_ids"].tolist(), strict=True
    ):
        for t in range(1, len(labels)):
            count += labels[t] != -100 and sequences[t] == sequences[t - 1]
    return count


@pytest.mark.parametrize("last", range(1, 7))
@pytest.mark.parametrize("micro_batch", [1, 2, 6])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_packed_rows_of_every_step(ranks: int, micro_batch: int, last: int) -> None:
    """Also where the last step has `last` rows instead of six."""
    begin = {"row": (len(packed_epochs().plan) - last) % 6}
    how: dict[str, Any] = {"state": begin, "rows_per_step": 6, "micro_batch": micro_batch}
    whole = list(packed_epochs(**how))
    shares = [list(packed_epochs(**how, rank=rank, ranks=ranks)) for rank in range(ranks)]
    for step, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert [i for part in parts for i in examples_in(part)] == examples_in(step)
        shapes = {tuple(m["input_ids"].shape for m in part.micro_batches) for part in parts}
        assert len(shapes) == 1, "some ranks have more to compute than others"
        for part in parts:
            assert (part.weight, part.tokens) == (step.weight, step.tokens)
            assert (part.state, part.epoch) == (step.state, step.epoch)
        micro_batches = [m for part in parts for m in part.micro_batches]
        assert all(m["num_labels"] == labels_in(m) for m in micro_batches)
        assert sum(m["num_labels"] for m in micro_batches) == step.weight
    empty = [share[-1] for share in shares if not examples_in(share[-1])]
    assert len(empty) == ranks - -(-last // -(-last // ranks))
    assert all(int(m["labels"].max()) == -100 for batch in empty for m in batch.micro_batches)


def test_packed_batches_go_on_exactly_with_another_number_of_ranks() -> None:
    whole = list(packed_epochs(rows_per_step=6))
    for k, batch in enumerate(whole[:-1]):
        parts = [
            next(iter(packed_epochs(kept(batch.state), rows_per_step=6, rank=rank, ranks=3)))
            for rank in range(3)
        ]
        assert [i for part in parts for i in examples_in(part)] == examples_in(whole[k + 1])


# ------------------------------------------------------------------------------- in the background


def test_a_mix_read_ahead_in_the_background_goes_on_from_what_was_used() -> None:
    """The state in a batch is of that batch, however far the thread has run ahead."""
    expected = [rows_of(batch) for batch in islice(mixed(), 12)]
    iterator = Prefetched(mixed(), limit=6)
    used = [next(iterator) for _ in range(5)]
    time.sleep(0.05)
    iterator.close()
    resumed = islice(mixed(kept(used[-1].state)), 7)
    found = [rows_of(batch) for batch in [*used, *resumed]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("read_ahead", [1, 50, 10_000])
def test_a_token_stream_made_in_the_background_has_the_same_tokens_and_states(
    read_ahead: int,
) -> None:
    texts = numbered(100, 60)
    plain = stream_of(texts)
    ahead = TokenStream(documents_of(texts), Numbers(), read_ahead=read_ahead)  # type: ignore[arg-type]
    for size in [1, 30, 7] * 20:
        assert ahead.take(size).tolist() == plain.take(size).tolist()
        assert ahead.state == plain.state
    ahead.close()


def test_all_streams_of_a_mix_begin_at_once_and_end_with_it() -> None:
    names = ("web", "books", "code")
    streams = {
        name: {0: TokenStream(documents_of(numbered(100, 60)), Numbers(), read_ahead=100)}  # type: ignore[arg-type]
        for name in names
    }
    mix = MixedBatches(
        streams, {"web": 0.98, "books": 0.01, "code": 0.01}, sequence_length=8,
        sequences_per_step=1, micro_batch=1,
    )  # fmt: skip
    next(mix)
    assert len([t for t in threading.enumerate() if t.name == "prefetch"]) == 3
    mix.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_short_documents_do_not_fill_the_memory() -> None:
    """A document of ten tokens takes more memory than they do: far fewer are read ahead."""
    made = []

    class Recording(Numbers):
        def documents(self, documents: Sequence[str]) -> list[list[int]]:
            made.extend(documents)
            return super().documents(documents)

    documents = documents_of(numbered(100, 300))
    stream = TokenStream(documents, Recording(), read_ahead=100_000)  # type: ignore[arg-type]
    stream.take(10)
    time.sleep(0.3)
    stream.close()
    assert 100_000 / 200 <= len(made) <= 100_000 / 200 + 3 * READ_AHEAD
