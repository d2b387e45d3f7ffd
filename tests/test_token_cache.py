"""Tests of the token cache: the same tokens, none tokenised twice, nothing stale or broken."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import some_text, write_lines

from hamner import tokenization
from hamner.batches import TokenStream
from hamner.recipe import check_recipe
from hamner.sources import DocumentStream, open_stream
from hamner.token_cache import TokenCache
from hamner.tokenization import Tokenizer

Raw = dict[str, Any]


@pytest.fixture
def tokenizer() -> Tokenizer:
    rng = random.Random(4)
    return tokenization.train([some_text(rng, 50) for _ in range(40)], 300)


class Counting:
    """A tokenizer that counts the documents it is given, and may refuse them."""

    def __init__(self, tokenizer: Tokenizer, limit: float = float("inf")):
        self._tokenizer, self.limit, self.count = tokenizer, limit, 0
        self.vocab_size, self.to_json = tokenizer.vocab_size, tokenizer.to_json

    def documents(self, documents: Sequence[str]) -> list[list[int]]:
        self.count += len(documents)
        assert self.count <= self.limit, "tokenised again"
        return self._tokenizer.documents(documents)


class Shelf:
    """Streams of the micro recipe's books, with a cache."""

    def __init__(self, raw: Raw, folder: Path, shard_tokens: int = 2_000):
        self.raw, self.folder, self.shard_tokens = raw, folder, shard_tokens

    def documents(self, lane: int = 0, lanes: int = 1) -> DocumentStream:
        return open_stream("books", check_recipe(self.raw, "test"), lane=lane, lanes=lanes)

    def stream(
        self, tokenizer: Any, state: Any = None, cached: bool = True, **lane: int
    ) -> TokenStream:
        cache = TokenCache(self.folder, self.shard_tokens) if cached else None
        return TokenStream(self.documents(**lane), tokenizer, state, cache=cache, read_ahead=500)

    def take(self, tokenizer: Any, sizes: Sequence[int], state: Any = None, **how: Any) -> Any:
        """Tokens taken in these sizes, and the state after each; then the stream is closed."""
        stream = self.stream(tokenizer, state, **how)
        taken, states = [], []
        for size in sizes:
            taken.append(stream.take(size))
            states.append(json.loads(json.dumps(stream.state)))
        stream.close()
        return np.concatenate(taken), states

    def shards(self) -> list[Path]:
        return sorted(self.folder.rglob("*.tokens"))


@pytest.fixture
def shelf(raw: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    monkeypatch.setattr("hamner.batches.READ_AHEAD", 32)  # so that there are many groups
    return Shelf(raw, tmp_path / "cache")


SIZES = [700] * 60  # about two epochs of the books


def test_a_second_run_tokenises_nothing_and_sees_the_same_tokens_and_states(
    shelf: Shelf, tokenizer: Tokenizer
) -> None:
    plain, plain_states = shelf.take(tokenizer, SIZES, cached=False)
    first, first_states = shelf.take(tokenizer, SIZES)
    assert len(shelf.shards()) > 5
    second, second_states = shelf.take(Counting(tokenizer, limit=0), SIZES)
    assert np.array_equal(first, plain) and np.array_equal(second, plain)
    assert first_states == plain_states == second_states


def test_a_run_that_goes_further_than_the_cache_tokenises_the_rest_and_keeps_it(
    shelf: Shelf, tokenizer: Tokenizer
) -> None:
    expected, _ = shelf.take(tokenizer, SIZES, cached=False)
    shelf.take(tokenizer, SIZES[:20])
    counting = Counting(tokenizer)
    assert np.array_equal(shelf.take(counting, SIZES)[0], expected)
    assert 0 < counting.count < 300
    assert np.array_equal(shelf.take(Counting(tokenizer, limit=0), SIZES)[0], expected)


def test_a_cached_run_resumes_exactly_from_any_checkpoint(
    shelf: Shelf, tokenizer: Tokenizer
) -> None:
    tokens, states = shelf.take(tokenizer, SIZES)
    for at in (0, 1, 7, 23, 40, 58):
        rest, _ = shelf.take(Counting(tokenizer, limit=0), SIZES[at + 1 :], states[at])
        assert np.array_equal(rest, tokens[700 * (at + 1) :])


def test_a_run_can_go_on_without_the_cache_that_it_began_with(
    shelf: Shelf, tokenizer: Tokenizer
) -> None:
    shelf.take(tokenizer, SIZES)
    tokens, states = shelf.take(tokenizer, SIZES)  # these states come from the cache
    for at in (0, 5, 31, 50):
        rest, _ = shelf.take(tokenizer, SIZES[at + 1 :], states[at], cached=False)
        assert np.array_equal(rest, tokens[700 * (at + 1) :])


def test_every_lane_has_a_cache_of_its_own(shelf: Shelf, tokenizer: Tokenizer) -> None:
    shelf.take(tokenizer, SIZES)  # all in one lane: of no use to the others
    counting = Counting(tokenizer)
    lanes: list[dict[str, int]] = [{"lane": lane, "lanes": 3} for lane in range(3)]
    first = [shelf.take(counting, SIZES[:30], **lane) for lane in lanes]
    assert counting.count > 100
    assert len(list(shelf.folder.iterdir())) == 4
    for lane, (tokens, states) in zip(lanes, first, strict=True):
        plain, plain_states = shelf.take(tokenizer, SIZES[:30], cached=False, **lane)
        again, again_states = shelf.take(Counting(tokenizer, limit=0), SIZES[:30], **lane)
        assert np.array_equal(tokens, plain) and np.array_equal(again, plain)
        assert states == plain_states == again_states
        for at in (0, 11, 28):
            rest, _ = shelf.take(
                Counting(tokenizer, limit=0), SIZES[at + 1 : 30], states[at], **lane
            )
            assert np.array_equal(rest, tokens[700 * (at + 1) :])
    assert not any(np.array_equal(a[0], b[0]) for a, b in itertools.pairwise(first))


def test_a_gap_that_a_killed_run_left_is_filled(shelf: Shelf, tokenizer: Tokenizer) -> None:
    tokens, states = shelf.take(tokenizer, SIZES)
    middle = shelf.shards()[3]
    middle.unlink()
    middle.with_suffix(".json").unlink()
    counting = Counting(tokenizer)
    assert np.array_equal(shelf.take(counting, SIZES)[0], tokens)
    assert 0 < counting.count < 150
    again, again_states = shelf.take(Counting(tokenizer, limit=0), SIZES)
    assert np.array_equal(again, tokens) and again_states == states


def harm(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "changed":
        path.write_bytes(content[:-3] + bytes(3))
    else:
        path.unlink()


@pytest.mark.parametrize("suffix", [".tokens", ".json"])
@pytest.mark.parametrize("how", ["cut", "changed", "lost"])
def test_a_damaged_shard_is_tokenised_again(
    shelf: Shelf, tokenizer: Tokenizer, suffix: str, how: str
) -> None:
    tokens, _ = shelf.take(tokenizer, SIZES)
    harm(shelf.shards()[2].with_suffix(suffix), how)
    assert np.array_equal(shelf.take(tokenizer, SIZES)[0], tokens)
    assert np.array_equal(shelf.take(Counting(tokenizer, limit=0), SIZES)[0], tokens)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"held_out_fraction": 0.2},
        {"sources": {"books": {"min_characters": 350}}},
        {"sources": {"books": {"shuffle_block": 21}}},
    ],
)
def test_whatever_changes_the_tokens_has_a_cache_of_its_own(
    shelf: Shelf, tokenizer: Tokenizer, change: Raw
) -> None:
    shelf.take(tokenizer, SIZES)
    for key, value in change.items():
        if isinstance(value, dict):
            shelf.raw[key]["books"].update(value["books"])
        else:
            shelf.raw[key] = value
    expected, _ = shelf.take(tokenizer, SIZES, cached=False)
    assert np.array_equal(shelf.take(tokenizer, SIZES)[0], expected)
    assert len(list(shelf.folder.iterdir())) == 2


def test_another_tokenizer_has_a_cache_of_its_own(shelf: Shelf, tokenizer: Tokenizer) -> None:
    shelf.take(tokenizer, SIZES)
    other = tokenization.train(["quite other words, and other pieces of them"] * 3, 290)
    expected, _ = shelf.take(other, SIZES, cached=False)
    assert np.array_equal(shelf.take(other, SIZES)[0], expected)


def test_text_that_has_changed_is_tokenised_anew(
    shelf: Shelf, tokenizer: Tokenizer, data: Path
) -> None:
    shelf.take(tokenizer, SIZES)
    rng = random.Random(9)
    write_lines(data / "books.jsonl", [{"text": some_text(rng, 60)} for _ in range(150)])
    expected, _ = shelf.take(tokenizer, SIZES, cached=False)
    assert np.array_equal(shelf.take(tokenizer, SIZES)[0], expected)


def test_a_stream_numbered_by_other_settings_does_not_take_the_wrong_documents(
    shelf: Shelf, tokenizer: Tokenizer
) -> None:
    """A stage may go on in a source with a recipe whose filter let other documents through."""
    shelf.take(tokenizer, SIZES)
    shelf.raw["sources"]["books"]["min_characters"] = 330
    _, states = shelf.take(tokenizer, SIZES[:30], cached=False)
    shelf.raw["sources"]["books"]["min_characters"] = 1
    expected, _ = shelf.take(tokenizer, SIZES[:10], states[-1], cached=False)
    assert np.array_equal(shelf.take(tokenizer, SIZES[:10], states[-1])[0], expected)


def test_a_full_disk_ends_the_caching_and_not_the_run(
    shelf: Shelf,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    expected, _ = shelf.take(tokenizer, SIZES, cached=False)
    monkeypatch.setattr("hamner.token_cache.write_bytes_whole", full)
    assert np.array_equal(shelf.take(tokenizer, SIZES)[0], expected)
    assert capsys.readouterr().out.count("No space left on device") == 1


def test_what_a_function_makes_is_not_cached(raw: Raw, tmp_path: Path) -> None:
    """Its code may change, and nothing here would notice."""
    raw["sources"]["made"] = {"kind": "generator", "function": "synthetic_tasks:document",
                              "options": {"difficulty": 1}, "shuffle_block": 1}  # fmt: skip
    tokenizer = tokenization.train(["1 2 3 4 5 6 7 8 9 0 + - = the"] * 3, 290)
    documents = open_stream("made", check_recipe(raw, "test"))
    stream = TokenStream(documents, tokenizer, cache=TokenCache(tmp_path / "cache", 100))
    stream.take(2_000)
    stream.close()
    assert not (tmp_path / "cache").exists()


def test_tokens_are_kept_in_two_bytes_where_they_fit(shelf: Shelf, tokenizer: Tokenizer) -> None:
    tokens, _ = shelf.take(tokenizer, SIZES)
    size = sum(path.stat().st_size for path in shelf.shards())
    assert 2 * len(tokens) <= size < 3 * len(tokens)


def test_a_vocabulary_beyond_two_bytes_is_kept_whole(shelf: Shelf, tokenizer: Tokenizer) -> None:
    class Large(Counting):
        def documents(self, documents: Sequence[str]) -> list[list[int]]:
            return [[i + 100_000 for i in ids] for ids in super().documents(documents)]

    large = Large(tokenizer)
    large.vocab_size = 150_000
    tokens, _ = shelf.take(large, SIZES)
    assert tokens.min() >= 100_000
    large.limit = large.count
    assert np.array_equal(shelf.take(large, SIZES)[0], tokens)
