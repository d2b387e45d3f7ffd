"""The n-gram benchmark: its probabilities beside the paper's formulas, and what it learns from."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from test_chat import call

sys.path.insert(0, str(ROOT / "benchmarks"))

import kneser_ney
from kneser_ney import NGrams, Source, count, discounts, replayed, score_documents

import evaluate_model
import train_pretrain
from hamner import checkpoints, tokenization, training
from hamner.errors import UserError
from hamner.evaluation.scoring import TextScore

END = 0
Words = tuple[int, ...]


# ------------------------------------------------------------------------------- the formulas


class Plain:
    """The same models, a word at a time: Chen and Goodman's formulas over dictionaries."""

    def __init__(self, streams: Sequence[np.ndarray], order: int, vocabulary: int):
        self.vocabulary = vocabulary
        self.real: Counter[Words] = Counter()
        for stream in streams:
            document = [END]
            for word in stream.tolist():
                document.append(word)
                for n in range(1, min(order, len(document)) + 1):
                    self.real[tuple(document[-n:])] += 1
                if word == END:
                    document = [END]
        before: dict[Words, set[int]] = {}
        for first, *rest in self.real:
            before.setdefault(tuple(rest), set()).add(first)
        self.lower = {
            words: times if len(words) > 1 and words[0] == END else len(before[words])
            for words, times in self.real.items()
            if len(words) < order
        }
        self.discount = cache(self._discount)

    def _discount(self, n: int, real: bool) -> tuple[float, ...]:
        table = self.real if real else self.lower
        times = Counter(table[words] for words in table if len(words) == n)
        if all(times[i] for i in (1, 2, 3, 4)):
            y = times[1] / (times[1] + 2 * times[2])
            found = [0, *(i - (i + 1) * y * times[i + 1] / times[i] for i in (1, 2, 3))]
            if min(found[1:]) > 0:
                return tuple(found)
        return (0, 0.5, 1, 1.5)

    def p(self, word: int, context: Words, real: bool) -> float:
        table = self.real if real else self.lower
        below = self.p(word, context[1:], False) if context else 1 / self.vocabulary
        found = {w: table.get((*context, w), 0) for w in range(self.vocabulary)}
        if not sum(found.values()):
            return below
        taken = {w: self.discount(len(context) + 1, real)[min(c, 3)] for w, c in found.items()}
        mass = sum(taken.values()) / sum(found.values())
        return max(found[word] - taken[word], 0) / sum(found.values()) + mass * below

    def probabilities(self, text: np.ndarray, order: int) -> list[float]:
        found, document = [], [END]
        for word in text.tolist():
            context = tuple(document[1 - order :]) if order > 1 else ()
            found.append(self.p(word, context, real=len(context) == order - 1))
            document = [END] if word == END else [*document, word]
        return found


def made_text(rng: np.random.Generator, vocabulary: int, length: int) -> np.ndarray:
    """Words of unlike frequency that hang together: each often follows from the one before."""
    weights = 1 / np.arange(1, vocabulary + 1)
    words = rng.choice(vocabulary, length, p=weights / weights.sum())
    follows = rng.random(length) < 0.5
    for i in range(1, length):
        if follows[i]:
            words[i] = (3 * words[i - 1] + 1) % vocabulary
    return words


@pytest.mark.parametrize(("vocabulary", "length"), [(7, 150), (60, 500)])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_are_those_of_the_formulas(order: int, vocabulary: int, length: int) -> None:
    rng = np.random.default_rng(vocabulary)
    streams = [made_text(rng, vocabulary, length // share) for share in (1, 2, 50)]
    text = np.array([END, *made_text(rng, vocabulary, 80)])
    model, plain = count(streams, order, vocabulary, END), Plain(streams, order, vocabulary)
    found = model.probabilities(text)
    for n in range(1, order + 1):
        expected = Plain(streams, n, vocabulary).probabilities(text[1:], n)
        np.testing.assert_allclose(found[n - 1, 1:], expected, rtol=0, atol=1e-9)
    for n, level in enumerate(model.levels, start=1):
        times = [times for words, times in plain.real.items() if len(words) == n]
        assert sorted(level.real.counts[level.real.counts > 0]) == sorted(times)
    if vocabulary == 60:
        assert all(level.real.estimated for level in model.levels)


def distribution(model: NGrams, context: Sequence[int]) -> np.ndarray:
    """p (N, V) of every token after a context, by each order."""
    words = range(model.vocabulary)
    return np.stack(
        [model.probabilities(np.array([*context, word]))[:, -1] for word in words], axis=1
    )


def test_probabilities_sum_to_one_after_any_context() -> None:
    rng, vocabulary = np.random.default_rng(1), 30
    streams = [made_text(rng, vocabulary - 1, 400), made_text(rng, vocabulary - 1, 300)]
    model = count(streams, 4, vocabulary, END)
    seen = [streams[0][i : i + 3].tolist() for i in range(0, 60, 5)]
    after_end = [[5, END], [END, 3], [END, 29], [5, END, 3]]
    unseen = [[29, 29, 29], [4, 29, 1], [29, 3, 10], [28, 27, 26]]
    for context in [[], *seen, *after_end, *unseen]:
        found = distribution(model, context)
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=0, atol=1e-12)
        assert found.min() > 0  # of 29 too, a token that the text never has


def test_a_small_case_by_hand() -> None:
    """One document, a b a b a: nothing comes three times, so 0.5 and 1 are taken off 1 and 2."""
    a, b = 1, 2
    model = count([np.array([a, b, a, b, a, END])], 2, 3, END)
    first, second = distribution(model, [])[0], distribution(model, [a])[1]
    # Of 6 tokens 3 are a, 2 b, 1 the end; 1.5 + 1 + 0.5 of 6 are shared among three.
    assert first == pytest.approx([0.5 / 6 + 1 / 6, 1.5 / 6 + 1 / 6, 1 / 6 + 1 / 6])
    # Before a stand two different tokens, before b and the end one each: 5/12, 7/24, 7/24.
    # After a: b twice, the end once; 1.5 of 3 go to those.
    assert second == pytest.approx([0.5 / 3 + 7 / 48, 5 / 24, 1 / 3 + 7 / 48])
    assert distribution(model, [END])[1, a] == pytest.approx(0.5 + 5 / 24)
    assert distribution(model, [b])[1, a] == pytest.approx((2 - 1) / 2 + 5 / 24)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((4, 2, 1, 1), (0.5, 1.25, 1.0)),
        ((4, 2, 1, 0), None),
        ((0, 2, 1, 1), None),
        ((10, 1, 5, 1), None),  # D2 would be below zero
    ],
)
def test_discounts_come_from_counts_of_counts(
    times: tuple[int, ...], expected: tuple[float, ...] | None
) -> None:
    counts = np.repeat([0, 1, 2, 3, 4, 9], [3, *times, 8])
    assert discounts(counts) == (pytest.approx(expected) if expected else None)


def test_a_document_knows_nothing_of_the_one_before() -> None:
    rng = np.random.default_rng(2)
    documents = [[*rng.integers(1, 9, 20), END] for _ in range(30)]
    in_order = count([np.concatenate(documents)], 4, 9, END)
    apart = count([np.array(document) for document in documents], 4, 9, END)
    text = np.array([*documents[3][-4:], *rng.integers(1, 9, 30)])
    np.testing.assert_array_equal(in_order.probabilities(text), apart.probabilities(text))
    alone = apart.probabilities(text[3:])
    np.testing.assert_array_equal(apart.probabilities(text)[:, 4:], alone[:, 1:])


# ------------------------------------------------------------------------------- bits per byte

LETTERS = "abcd"
CHAIN = np.array(  # p of a letter after another
    [[0.7, 0.1, 0.1, 0.1], [0.05, 0.05, 0.85, 0.05], [0.25, 0.25, 0.25, 0.25], [0.4, 0, 0, 0.6]]
)
USUAL = np.linalg.matrix_power(CHAIN, 200)[0]  # how often each comes


def chain_text(rng: np.random.Generator, length: int) -> str:
    place = rng.choice(4, p=USUAL)
    found = [place]
    for _ in range(length - 1):
        found.append(place := rng.choice(4, p=CHAIN[place]))
    return "".join(LETTERS[place] for place in found)


def test_bits_per_byte_approach_the_entropy() -> None:
    rng = np.random.default_rng(3)
    tokenizer = tokenization.train(["x"], 273)  # too small for any merge: a token is a byte
    written = [chain_text(rng, 200) for _ in range(150)]
    held_out = [chain_text(rng, 200) for _ in range(50)]
    bits = []
    for share in (5, 150):
        ids = np.concatenate(tokenizer.documents(written[:share]))
        model = count([ids], 3, tokenizer.vocab_size, tokenizer.end_of_text)
        bits.append([s.bits_per_byte for s in score_documents(model, tokenizer, held_out)])
    logs = np.log2(CHAIN, where=CHAIN > 0, out=np.zeros_like(CHAIN))
    rate, alone = -(USUAL[:, None] * CHAIN * logs).sum(), -(USUAL * np.log2(USUAL)).sum()
    assert bits[1][0] == pytest.approx(alone, abs=0.03)
    assert bits[1][1:] == pytest.approx([rate, rate], abs=0.03)
    assert all(more < less for less, more in zip(*bits, strict=True))
    assert bits[0][2] > rate + 0.05


# ------------------------------------------------------------------------------- training's tokens


@pytest.fixture(scope="module", params=[1, 2], ids=["one lane", "two lanes"])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[torch.Tensor]]:
    """A folder with a recipe and a base run of 9 steps in two sittings, and the rows it saw."""
    folder = tmp_path_factory.mktemp("trained")
    raw = inspect.unwrap(conftest.raw)(inspect.unwrap(conftest.data)(folder))
    (folder / "micro.yaml").write_text(yaml.safe_dump({**raw, "lanes": request.param}))
    rows: list[torch.Tensor] = []
    step = training.Trainer._step

    def seen(self: training.Trainer, batch: Any) -> None:
        rows.extend(row for part in batch.micro_batches for row in part["input_ids"].clone())
        step(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(training.Trainer, "_step", seen)
        patch.setattr(training, "peak_flops", lambda *_: None)
        for steps in ("4", "9"):
            options = ("--recipe", "micro.yaml", "--device", "cpu", "--steps", steps)
            assert call(train_pretrain.main, *options) == 0
    return folder, rows


CHECKPOINT = Path("checkpoints/micro/base/latest.pt")


def read_again(folder: Path) -> tuple[dict[str, Source], tokenization.Tokenizer]:
    path = folder / CHECKPOINT
    checkpoint = checkpoints.load(path)
    recipe = evaluate_model.recipe_of(path, checkpoint, [])
    tokenizer = checkpoints.load_tokenizer(checkpoint)
    return replayed(path, checkpoint, recipe, tokenizer), tokenizer


def test_it_counts_the_tokens_that_training_consumed(
    trained: tuple[Path, list[torch.Tensor]],
) -> None:
    folder, rows = trained
    read, tokenizer = read_again(folder)
    assert list(read) == ["web", "books"] and len(rows) == 9 * 4
    streams = [ids for source in read.values() for ids in source.streams]
    assert all(len(ids) % 64 == 0 for ids in streams)
    ours = sorted(row.tolist() for ids in streams for row in ids.reshape(-1, 64))
    assert ours == sorted(row.tolist() for row in rows)
    model = count(streams, 3, tokenizer.vocab_size, tokenizer.end_of_text)
    times = np.bincount(torch.cat(rows).numpy(), minlength=tokenizer.vocab_size)
    np.testing.assert_array_equal(model.levels[0].real.counts, times)


def test_rows_of_a_source_are_in_the_order_of_its_documents(
    trained: tuple[Path, list[torch.Tensor]],
) -> None:
    read, tokenizer = read_again(trained[0])
    lines = (trained[0] / "texts/books.jsonl").read_text(encoding="utf-8").splitlines()
    written = {json.loads(line)["text"] for line in lines}
    for ids in read["books"].streams:
        ends = np.flatnonzero(ids == tokenizer.end_of_text)
        documents = [tokenizer.decode(part.tolist()) for part in np.split(ids, ends + 1)]
        assert len(documents) > 2 and written.issuperset(documents[:-1])


# ------------------------------------------------------------------------------- the script


def measure(*arguments: str) -> int:
    return call(kneser_ney.main, "--checkpoint", str(CHECKPOINT), *arguments)


def bits_of(score: dict[str, float]) -> float:
    return score["bits_per_byte"]


def test_below_is_of_sums_with_the_error_that_documents_drawn_anew_have() -> None:
    rng = np.random.default_rng(0)
    other = rng.uniform(50, 150, 400)
    own = other * rng.normal(0.9, 0.05, 400)

    def below(picked: np.ndarray) -> kneser_ney.Below:
        scores = (TextScore(each[picked].tolist(), [1] * 400, 400) for each in (own, other))
        return kneser_ney.Below.of(*scores)

    found = below(np.arange(400))
    assert found.percent == pytest.approx(100 * (1 - own.sum() / other.sum()))
    drawn = np.std([below(rng.integers(0, 400, 400)).percent for _ in range(1_000)])
    assert found.standard_error == pytest.approx(drawn, rel=0.1)
    assert kneser_ney.Below.of(*[TextScore([nats], [1], 1) for nats in (3.0, 4.0)]).percent == 25


def test_it_measures_the_documents_that_evaluate_model_measures(
    trained: tuple[Path, list[torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(trained[0])
    options = ("--recipe", "micro.yaml", "--sources", "web,talk", "--bytes-per-source", "900")
    assert measure(*options, "--order", "3", "--json", "ngrams.json") == 0
    out = capsys.readouterr().out
    neural = (*options, "--tasks", "none", "--device", "cpu", "--json", "model.json")
    assert call(evaluate_model.main, "--checkpoint", str(CHECKPOINT), *neural) == 0
    ours, theirs = (json.loads(Path(name).read_text()) for name in ("ngrams.json", "model.json"))
    assert (ours["step"], ours["tokens"], ours["order"]) == (9, 9 * 4 * 64, 3)
    assert sum(each["tokens"] for each in ours["sources"].values()) == ours["tokens"]
    together = ours["text"].pop("(all)")
    assert list(ours["text"]) == ["web", "talk"]
    for name, by_order in ours["text"].items():
        expected = theirs["models"][0]["text"][name]
        assert list(by_order) == ["1", "2", "3", "model", "below"]
        below, own = by_order.pop("below")["percent"], by_order["model"]
        assert below == pytest.approx(100 * (1 - own["bits_per_byte"] / bits_of(by_order["3"])))
        assert f"{below:.1f}" in out
        assert own["bits_per_byte"] == pytest.approx(expected["bits_per_byte"])
        for found in by_order.values():
            assert {k: found[k] for k in ("documents", "bytes", "tokens")} == {
                k: expected[k] for k in ("documents", "bytes", "tokens")
            }
            bits = found["nats_per_token"] * found["tokens"] / math.log(2)
            assert found["bits_per_byte"] == pytest.approx(bits / found["bytes"])
            assert f"{found['bits_per_byte']:.3f}" in out
    for order in "123":
        parts = [by_order[order] for by_order in ours["text"].values()]
        bits = sum(part["bits_per_byte"] * part["bytes"] for part in parts)
        assert bits_of(together[order]) == pytest.approx(bits / sum(p["bytes"] for p in parts))
    web = [bits_of(ours["text"]["web"][order]) for order in "123"]
    assert web[2] < web[1] < web[0] < expected["bits_per_byte"]  # of a model of 9 steps
    assert [level["ngrams"] for level in ours["levels"]] == sorted(
        level["ngrams"] for level in ours["levels"]
    )
    assert ours["levels"][2]["lower"] is None and len(ours["levels"][0]["lower"]["discounts"]) == 3


def test_without_a_recipe_and_sources_it_takes_those_of_the_checkpoint(
    trained: tuple[Path, list[torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(trained[0])
    assert measure("--order", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.strip()][-3:] == ["web", "books", "(all)"]


def test_what_was_read_twice_is_told() -> None:
    ids = np.array([1, 2, END])
    read = {"web": Source([ids, ids], 2), "books": Source([ids], 0)}
    told = list(kneser_ney.notes(read, count([ids], 1, 3, END)))
    assert told[0] == "counted 9 tokens: web 6, books 3"
    assert [line for line in told if "to its end" in line] == [
        "source 'web' was read to its end 2 times: its documents count again"
    ]
    assert told[-1] == "order 1: 3 n-grams, off 0.500, 1.000, 1.500 (fallback)"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stage": "chat"}, "is of stage chat: only a checkpoint of stage base"),
        ({"step": 0}, "is of step 0, before which nothing was read"),
        ({"data": None}, "holds weights only, and not what was read"),
        ({"step": 8}, "8 steps don't lead to the position that it holds in source web, books"),
    ],
)
def test_checkpoints_that_can_not_be_replayed_are_refused(
    trained: tuple[Path, list[torch.Tensor]],
    changes: dict[str, Any],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(trained[0])
    checkpoint = {**checkpoints.load(CHECKPOINT), **changes}
    kept = {key: value for key, value in checkpoint.items() if value is not None}
    checkpoints.write_whole(Path("other.pt"), kept)
    capsys.readouterr()
    assert call(kneser_ney.main, "--checkpoint", "other.pt") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: other.pt") and err.count("\n") == 1
    assert told in err


def test_sources_that_have_changed_are_told(
    trained: tuple[Path, list[torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(trained[0])
    for name in ("web", "books"):
        lines = Path(f"texts/{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[7 * (name == "books") :]))
    assert measure("--set", f"data_dir={tmp_path}") == 2
    assert "position that it holds in source books: say with --set" in capsys.readouterr().err


BAD = [
    (("--json", "texts"), "--json texts is a folder: name a file"),
    (("--sources", "weeb"), "no source is called 'weeb' (did you mean 'web'?)"),
    (("--set", "held_out_fraction=0.2"), "was trained with held_out_fraction 0.1"),
    (("--set", "data_dir=nowhere"), "nowhere"),
    (("--order", "0"), "must be at least 1, got 0"),
]


@pytest.mark.parametrize(("arguments", "told"), BAD, ids=lambda value: str(value)[:30])
def test_bad_input_is_told(
    trained: tuple[Path, list[torch.Tensor]],
    arguments: Sequence[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(trained[0])
    assert measure(*arguments) == 2
    assert told in capsys.readouterr().err


def test_a_bad_conversation_names_its_source() -> None:
    tokenizer = tokenization.train(["x"], 273)
    model = count([np.array([1, 2])], 1, 273, tokenizer.end_of_text)
    documents: Any = {"empty": [], "talk": [[{"role": "wizard", "content": "x"}]]}
    with pytest.raises(UserError, match="source 'talk': a message's role"):
        kneser_ney.measured(model, tokenizer, documents)
