"""What counting alone comes to: an n-gram model's bits per byte, beside those of a base model.

    python benchmarks/kneser_ney.py --recipe small --set data_dir=FOLDER \\
        --checkpoint checkpoints/small/base/latest.pt --json kneser_ney.json

Interpolated modified Kneser-Ney n-grams (Chen and Goodman, "An Empirical Study of Smoothing
Techniques for Language Modeling", Harvard TR-10-98, 1998; three discounts for each order, from
counts of counts) learn from the tokens that the base stage trained on up to the checkpoint, no more
and no fewer: the mix is drawn again from the beginning, and must end at the data position that the
checkpoint holds. They and the checkpoint's model are measured with evaluate_model.py's own
functions: same documents, tokens and bytes. Orders 1 to N are models of their own, each with real
counts at its highest order. "below" says by how much the model's bits are fewer than the highest
order's, with a standard error over documents; the row "(all)" adds up all sources' bits and bytes.

Where there was a choice it is the better one for the n-grams:
- The rows of a batch are cut from a stream of documents for each source. N-grams are counted over
  the stream, so that what a row's end cuts isn't lost; the neural model never sees over it.
- A context reaches back to the <|endoftext|> before the document and no further, in counting as in
  scoring, where it is otherwise the document's whole beginning. An n-gram that begins with this
  token has its real count at lower orders too, for it can't be continued to the left; so do
  Heafield et al. ("Scalable Modified Kneser-Ney Language Model Estimation", ACL 2013). A stream
  that begins with a document has one such token put before it, as context only.
- The lowest order is mixed with equal chances for the tokenizer's tokens, not for the rows of the
  model's embedding, which may be more.

Counts of counts that no discounts can be had from (one of the first four is zero, as with a
vocabulary of which every token is common; or a discount isn't above zero) give way to 0.5, 1, 1.5.
Documents that a source gave more than once count as often: a line says so, as counts of counts
are then not what the discounts are made for.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from common import add_json_option, narrow_table, positive
from data_loader import open_mix
from rich.console import Console

from evaluate_model import (
    Subject,
    check_held_out,
    chosen_sources,
    measure_text,
    read_sources,
    recipe_of,
    text_as_json,
)
from hamner import checkpoints
from hamner.batches import TokenStream
from hamner.checkpoints import Checkpoint
from hamner.errors import UserError, run
from hamner.evaluation.scoring import TextScore, bar, ratio_error, summed, tokenized
from hamner.files import write_report
from hamner.recipe import Recipe, load_recipe
from hamner.sources import Document, source_problems
from hamner.stage import stage_sources
from hamner.tokenization import Tokenizer
from hamner.tracking import now

STAGE = "base"
ALL = "(all)"
MOST = 3  # what counts more often has the same discount
BATCH = 16  # windows that the checkpoint's model reads at once
FALLBACK = (0.5, 1.0, 1.5)
UNKNOWN = -1  # the id of an n-gram that was never seen


# ------------------------------------------------------------------------------- discounts


@dataclass(frozen=True)
class Counts:
    """How often the n-grams of one length count (G,) int32, and what is taken off."""

    counts: np.ndarray
    discounts: np.ndarray  # (4,), of counts of 0, 1, 2, and 3 or more
    estimated: bool  # from these counts: not the fallback

    @classmethod
    def of(cls, counts: np.ndarray) -> Counts:
        found = discounts(counts)
        return cls(counts, np.array([0, *(found or FALLBACK)]), found is not None)


def discounts(counts: np.ndarray) -> tuple[float, float, float] | None:
    """D1, D2 and D3+ of Chen and Goodman; None where the counts of counts don't give them."""
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, MOST + 2), minlength=MOST + 3)[1:5].tolist()
    if not n1 * n2 * n3 * n4:
        return None
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return found if min(found) > 0 else None


# ------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Level:
    """The n-grams of one length that were seen. An n-gram's id is its place among them.

    Keys (G,) int64 are sorted: the id of all but the last token, times the vocabulary, plus the
    last token. So what follows a context stands together.
    """

    keys: np.ndarray
    vocabulary: int
    real: Counts  # for models of which this is the highest order
    lower: Counts | None  # for those of higher order: how many tokens were seen before

    def find(self, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Ids (T,) of the n-grams of contexts (T,) and tokens (T,); UNKNOWN for what isn't here."""
        keys = contexts * self.vocabulary + tokens
        places = np.searchsorted(self.keys, keys)
        seen = self.keys[np.minimum(places, len(self.keys) - 1)] == keys
        return np.where(seen, places, UNKNOWN)

    def mixed(
        self, used: Counts, contexts: np.ndarray, ids: np.ndarray, below: np.ndarray
    ) -> np.ndarray:
        """p (T,) of n-grams, given their contexts (T,), ids (T,), and p (T,) with shorter contexts.

        After a context that was never seen, or never with something following, p stays as it is.
        """
        asked, back = np.unique(contexts, return_inverse=True)
        begins, ends = (np.searchsorted(self.keys, (asked + n) * self.vocabulary) for n in (0, 1))
        kinds = np.minimum(used.counts, MOST)
        freed = sum(
            used.discounts[kind] * between(kinds == kind, begins, ends)
            for kind in range(1, MOST + 1)
        )
        total = between(used.counts, begins, ends)[back]
        own = np.where(ids != UNKNOWN, used.counts[ids], 0)
        own = own - used.discounts[np.minimum(own, MOST)]
        return np.where(total > 0, (own + freed[back] * below) / np.maximum(total, 1), below)


def between(values: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sums (N,) of values from begins (N,) up to ends (N,)."""
    sums = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=sums[1:])
    return sums[ends] - sums[begins]


@dataclass(frozen=True)
class NGrams:
    """Interpolated modified Kneser-Ney models of orders 1 to the number of levels."""

    levels: Sequence[Level]  # n-grams of 1, 2, ... tokens
    end: int  # the token between documents

    @property
    def vocabulary(self) -> int:
        return self.levels[0].vocabulary

    def probabilities(self, text: np.ndarray) -> np.ndarray:
        """p (N, T) of each token of a text (T,) after those before it, by the models of each order.

        The text may be several documents, each with the token between documents before it.
        """
        since, below = history(text, self.end), np.full(len(text), 1 / self.vocabulary)
        ids = np.zeros(len(text), np.int64)  # of the empty n-gram
        found = np.empty((len(self.levels), len(text)))
        for n, level in enumerate(self.levels, start=1):
            contexts = np.where(since >= n - 1, np.roll(ids, 1), UNKNOWN)
            ids = level.find(contexts, text)
            found[n - 1] = level.mixed(level.real, contexts, ids, below)
            if level.lower is not None:
                below = level.mixed(level.lower, contexts, ids, below)
        return found


def history(text: np.ndarray, end: int) -> np.ndarray:
    """How many tokens (T,) stand before each of a text (T,), up to and with the last `end`."""
    places = np.arange(len(text), dtype=np.int32)
    ends = np.maximum.accumulate(np.where(text == end, places, 0))
    places[1:] -= ends[:-1]
    return places


# ------------------------------------------------------------------------------- counting


@dataclass(frozen=True)
class Grams:
    """The n-grams of one length in a text (T,) of training: G different ones."""

    keys: np.ndarray  # (G,) int64, as in Level
    counts: np.ndarray  # (G,) int32
    at: np.ndarray  # (G,) int32: where in the text one of each ends
    ids: np.ndarray  # (T,) int32: of the n-gram that ends there


def count(streams: Sequence[np.ndarray], order: int, vocabulary: int, end: int) -> NGrams:
    """The models of orders 1 to `order` of streams of token ids, in which `end` ends a document."""
    text = np.concatenate([part for ids in streams for part in ([end], ids)], dtype=np.int32)
    since = history(text, end)
    since[np.cumsum([0, *(len(ids) + 1 for ids in streams[:-1])])] = UNKNOWN  # context only
    grams, levels = single_tokens(text, since, vocabulary), []
    for n in range(2, order + 1):
        longer = longer_grams(text, since, grams.ids, n, vocabulary)
        lower = Counts.of(lower_counts(grams, longer, since, n - 1))
        levels.append(Level(grams.keys, vocabulary, Counts.of(grams.counts), lower))
        grams = longer
    levels.append(Level(grams.keys, vocabulary, Counts.of(grams.counts), None))
    return NGrams(levels, end)


def single_tokens(text: np.ndarray, since: np.ndarray, vocabulary: int) -> Grams:
    """All tokens of the vocabulary, even those that the text hasn't: a token is its own id."""
    counts = np.bincount(text[since >= 0], minlength=vocabulary).astype(np.int32)
    return Grams(np.arange(vocabulary), counts, np.empty(0, np.int32), text)


def longer_grams(
    text: np.ndarray, since: np.ndarray, ids: np.ndarray, n: int, vocabulary: int
) -> Grams:
    """The n-grams of n tokens of a text (T,), given the ids (T,) of those of n - 1."""
    at = np.flatnonzero(since >= n - 1).astype(np.int32)
    keys = ids[at - 1] * np.int64(vocabulary) + text[at]
    order = np.argsort(keys)
    keys, at = keys[order], at[order]
    del order
    new = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=new[1:])
    firsts = np.flatnonzero(new)
    counts = np.diff(firsts, append=len(keys)).astype(np.int32)
    found = np.full(len(text), UNKNOWN, np.int32)
    found[at] = np.cumsum(new, dtype=np.int32) - 1
    return Grams(keys[firsts], counts, at[firsts], found)


def lower_counts(grams: Grams, longer: Grams, since: np.ndarray, n: int) -> np.ndarray:
    """What n-grams of n tokens count (G,) for higher orders: different tokens seen before them.

    What begins with the token between documents has none before it, and counts as it is.
    """
    counts = np.bincount(grams.ids[longer.at], minlength=len(grams.keys)).astype(np.int32)
    if n == 1:
        return counts
    return np.where(since[grams.at] == n - 1, grams.counts, counts)


# ------------------------------------------------------------------------------- training's tokens


class Kept(TokenStream):
    """A stream of tokens that keeps what is taken from it."""

    def __init__(self, stream: TokenStream):
        self._stream = stream
        self.taken: list[np.ndarray] = []

    @property
    def state(self) -> dict[str, Any]:
        return self._stream.state

    def take(self, count: int) -> np.ndarray:
        ids = self._stream.take(count)
        self.taken.append(ids.astype(np.int32))
        return ids

    def begin(self) -> None:
        self._stream.begin()

    def close(self) -> None:
        self._stream.close()


@dataclass(frozen=True)
class Source:
    """What training has read of a source."""

    streams: Sequence[np.ndarray]  # the token ids of each lane, in the order of its documents
    epochs: int  # times that it has been read to its end

    @property
    def tokens(self) -> int:
        return sum(map(len, self.streams))


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint whose training can be replayed.

    Raises:
        UserError: it is of a later stage, of no step, or weights only.
    """
    checkpoint = checkpoints.load(path)
    if checkpoint["stage"] != STAGE:
        raise UserError(
            f"{path} is of stage {checkpoint['stage']}: only a checkpoint of stage {STAGE}, the "
            "first, tells by itself all that its model has read; name one of those"
        )
    if "data" not in checkpoint:
        raise UserError(
            f"{path} holds weights only, and not what was read: name latest.pt or a step file of "
            "its folder"
        )
    if not checkpoint["step"]:
        raise UserError(f"{path} is of step 0, before which nothing was read: name a later one")
    return checkpoint


def replayed(
    path: Path, checkpoint: Checkpoint, recipe: Recipe, tokenizer: Tokenizer
) -> dict[str, Source]:
    """The tokens that the base stage trained on up to a checkpoint, by source.

    Raises:
        UserError: sources that can't be read, or that don't lead to where the checkpoint stands.
    """
    if problems := source_problems(stage_sources(recipe, STAGE), recipe):
        raise UserError("\n       ".join(problems))
    mix, kept = open_mix(recipe, tokenizer), {}
    for name, lanes in mix.streams.items():
        kept[name] = {lane: Kept(stream) for lane, stream in lanes.items()}
        lanes.update(kept[name])
    steps = checkpoint["step"]
    with contextlib.closing(mix), bar(steps, "training's tokens", sys.stderr) as shown:
        for _ in range(steps):
            next(mix)
            shown.update()
        state = mix.state
    if astray := not_as_kept(state["sources"], checkpoint["data"]["sources"]):
        raise UserError(
            f"{path}: {steps:,} steps don't lead to the position that it holds in source "
            f"{', '.join(astray)}: say with --set where the data lie (data_dir=FOLDER, mirror=DIR) "
            "and change nothing else; if they have changed since, train anew"
        )
    return {
        name: Source(
            [np.concatenate(stream.taken) for stream in lanes.values() if stream.taken],
            max(place["documents"]["epoch"] for place in state["sources"][name].values()),
        )
        for name, lanes in kept.items()
    }


def not_as_kept(found: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    """The sources whose positions aren't the same."""
    return [name for name in {**kept, **found} if found.get(name) != kept.get(name)]


# ------------------------------------------------------------------------------- measuring


def score_documents(
    model: NGrams, tokenizer: Tokenizer, documents: Sequence[Document]
) -> list[TextScore]:
    """The score of documents by the models of each order, counted as evaluate_model.py does.

    Raises:
        UserError: a conversation with a message that has no known role or no text.
    """
    texts = [tokenized(document, tokenizer) for document in documents]
    ids = np.concatenate([np.asarray(text.ids) for text in texts])
    sizes = [len(text.ids) for text in texts]
    log_p = torch.from_numpy(np.log(model.probabilities(ids)))
    return [summed(texts, each.split(sizes)) for each in log_p]


def measured(
    model: NGrams, tokenizer: Tokenizer, documents: Mapping[str, Sequence[Document]]
) -> dict[str, list[TextScore]]:
    """Scores by source and order."""
    found = {}
    for name, texts in documents.items():
        if not texts:
            continue
        try:
            found[name] = score_documents(model, tokenizer, texts)
        except UserError as error:
            raise UserError(f"source {name!r}: {error}") from None
    return found


@dataclass(frozen=True)
class Below:
    """By how many percent a model's bits for some documents are fewer than another's."""

    percent: float
    standard_error: float | None  # as of a ratio of sums over documents drawn at random

    @classmethod
    def of(cls, own: TextScore, other: TextScore) -> Below:
        error = ratio_error(own.nats, other.nats)
        percent = 100 * (1 - sum(own.nats) / sum(other.nats))
        return cls(percent, None if error is None else 100 * error)


def together(scores: Sequence[TextScore]) -> TextScore:
    """The score of all documents of some sources."""
    nats = [each for score in scores for each in score.nats]
    sizes = [each for score in scores for each in score.bytes]
    return TextScore(nats, sizes, sum(score.tokens for score in scores))


def with_all(scores: Mapping[str, Sequence[TextScore]]) -> dict[str, list[TextScore]]:
    """Scores by source and model, and those of all sources together where there are several."""
    found = {name: list(each) for name, each in scores.items()}
    if len(found) > 1:
        found[ALL] = [together(each) for each in zip(*found.values(), strict=True)]
    return found


# ------------------------------------------------------------------------------- what is shown


def notes(read: Mapping[str, Source], model: NGrams) -> Iterator[str]:
    parts = ", ".join(f"{name} {source.tokens:,}" for name, source in read.items())
    yield f"counted {sum(source.tokens for source in read.values()):,} tokens: {parts}"
    for name, source in read.items():
        if source.epochs:
            times = f"{source.epochs} time{'s' * (source.epochs > 1)}"
            yield f"source {name!r} was read to its end {times}: its documents count again"
    for n, level in enumerate(model.levels, start=1):
        taken = ", ".join(f"{discount:.3f}" for discount in level.real.discounts[1:])
        how = "" if level.real.estimated else " (fallback)"
        yield f"order {n}: {np.count_nonzero(level.real.counts):,} n-grams, off {taken}{how}"


def show(scores: Mapping[str, Sequence[TextScore]], order: int) -> None:
    """A row a source; of its scores the last is the checkpoint's model's."""
    orders = [f"order {n}" if n == 1 else str(n) for n in range(1, order + 1)]
    headings = ("source", "documents", "bytes", *orders, "model", "below, %")
    table = narrow_table("Held-out text, bits per byte by order and of the model", headings)
    for name, each in scores.items():
        sizes = each[0].bytes
        figures = [f"{score.bits_per_byte:.3f}" for score in each]
        below = Below.of(each[-1], each[-2])
        error = "" if below.standard_error is None else f" ±{below.standard_error:.1f}"
        figures.append(f"{below.percent:.1f}{error}")
        table.add_row(name, f"{len(sizes):,}", f"{sum(sizes):,}", *figures)
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def counts_as_json(counts: Counts | None) -> dict[str, Any] | None:
    if counts is None:
        return None
    return {"discounts": counts.discounts[1:].tolist(), "estimated": counts.estimated}


def level_as_json(n: int, level: Level) -> dict[str, Any]:
    return {
        "order": n,
        "ngrams": int(np.count_nonzero(level.real.counts)),
        "highest": counts_as_json(level.real),
        "lower": counts_as_json(level.lower),
    }


def as_json(
    checkpoint: Checkpoint,
    read: Mapping[str, Source],
    model: NGrams,
    scores: Mapping[str, Sequence[TextScore]],
) -> dict[str, Any]:
    return {
        "stage": checkpoint["stage"],
        "step": checkpoint["step"],
        "recipe": checkpoint["recipe"]["name"],
        "order": len(model.levels),
        "vocabulary": model.vocabulary,
        "tokens": sum(source.tokens for source in read.values()),
        "sources": {
            name: {"tokens": source.tokens, "epochs": source.epochs}
            for name, source in read.items()
        },
        "levels": [level_as_json(n, level) for n, level in enumerate(model.levels, start=1)],
        "text": {
            name: {str(n): text_as_json(score) for n, score in enumerate(each[:-1], start=1)}
            | {"model": text_as_json(each[-1]), "below": asdict(Below.of(each[-1], each[-2]))}
            for name, each in scores.items()
        },
    }


# ------------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="of stage base")
    add("--recipe", help="whose held-out text, as in evaluate_model.py (default: the checkpoint's)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="where the data lie, such as data_dir=FOLDER; repeatable")  # fmt: skip
    add("--order", type=positive, default=5, help="tokens of the longest n-grams (default: 5)")
    add("--sources", metavar="A,B", help="held-out text of these (default: the base stage's)")
    add("--bytes-per-source", type=positive, default=100_000, metavar="N",
        help="so much held-out text of each (default: 100000)")  # fmt: skip
    add_json_option(parser)
    arguments = parser.parse_args()
    return arguments


def main() -> int:
    arguments, began = parse_arguments(), time.perf_counter()
    path, overrides = arguments.checkpoint, arguments.overrides
    checkpoint = open_checkpoint(path)
    tokenizer = checkpoints.load_tokenizer(checkpoint)
    training = recipe_of(path, checkpoint, overrides)
    recipe = load_recipe(arguments.recipe, overrides) if arguments.recipe else training
    check_held_out(path, checkpoint, recipe)
    names = arguments.sources or ",".join(stage_sources(training, STAGE))
    size = arguments.bytes_per_source
    documents = read_sources(chosen_sources(recipe, names), recipe, size)
    read = replayed(path, checkpoint, training, tokenizer)
    streams = [ids for source in read.values() for ids in source.streams]
    model = count(streams, arguments.order, tokenizer.vocab_size, tokenizer.end_of_text)
    for note in notes(read, model):
        print(note, flush=True)
    counted = measured(model, tokenizer, documents)
    subject = Subject(path, checkpoint)
    neural = checkpoints.load_model(checkpoint, path).eval()
    measure_text(subject, neural, tokenizer, documents, BATCH)
    scores = with_all({name: [*counted[name], own] for name, (own, _) in subject.text.items()})
    show(scores, arguments.order)
    if arguments.json is not None:
        report = {"time": now(), "seconds": round(time.perf_counter() - began, 3)}
        report |= {"options": vars(arguments), **as_json(checkpoint, read, model, scores)}
        write_report(arguments.json, report)
        print(f"written to {arguments.json}")
    return 0


if __name__ == "__main__":
    run(main)
