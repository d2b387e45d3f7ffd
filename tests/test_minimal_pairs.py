"""The minimal pairs: right by rules of the tests' own, not decided by word counts, and run."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from conftest import ROOT
from test_chat import call
from test_lm_eval_model import opinionated_model, small_tokenizer

sys.path.insert(0, str(ROOT / "benchmarks"))

import minimal_pairs
from minimal_pairs import PARADIGMS, Pair, make_pairs

import evaluate_model
from hamner import checkpoints
from hamner.evaluation import lm_eval_tasks
from hamner.recipe import check_recipe
from hamner.tokenization import Tokenizer
from model import Transformer

torch.set_num_threads(1)  # more would wait for each other where cores are shared
CONTEXT = 128
COUNT = 400
EVERY = pytest.mark.parametrize("paradigm", PARADIGMS)


@pytest.fixture(scope="module")
def made() -> dict[str, list[Pair]]:
    """More pairs than the usual 200, so that more of the words get their turn."""
    return {paradigm: make_pairs(paradigm, COUNT, seed=3) for paradigm in PARADIGMS}


def pieces(sentence: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", sentence)


# ------------------------------------------------------------------------------ form


@EVERY
def test_no_sentence_comes_twice(made: dict[str, list[Pair]], paradigm: str) -> None:
    sentences = [each for pair in made[paradigm] for each in pair]
    assert len(set(sentences)) == len(sentences) == 2 * COUNT


@EVERY
def test_a_pair_differs_in_one_word_or_in_order(made: dict[str, list[Pair]], paradigm: str) -> None:
    for good, bad in made[paradigm]:
        ours, theirs = pieces(good), pieces(bad)
        assert len(ours) == len(theirs) and ours[0] == theirs[0] and ours[-1] == theirs[-1]
        differing = sum(one != other for one, other in zip(ours, theirs, strict=True))
        assert differing == 1 or Counter(ours) == Counter(theirs), (good, bad)


@EVERY
def test_sentences_are_plain_text(made: dict[str, list[Pair]], paradigm: str) -> None:
    form = re.compile(r"[A-Z][a-z]*( ([a-z]+|I|[A-Z][a-z]+))+[.?]")
    for pair in made[paradigm]:
        for each in pair:
            assert form.fullmatch(each) and 4 <= len(each.split()) <= 20, each


# ------------------------------------------------------------------------------ balance


def score_share(pairs: Sequence[Pair], weigh: Callable[[str], int]) -> float:
    """The share of the pairs whose good sentence weighs more; ties count half."""
    signs = [(weigh(good) > weigh(bad)) + 0.5 * (weigh(good) == weigh(bad)) for good, bad in pairs]
    return sum(signs) / len(signs)


class Unigrams:
    """Adds up random weights of the parts: whole numbers, whose sum no order changes."""

    def __init__(self, cut: Callable[[str], list[Any]], seed: int):
        self._cut, self._draw = cut, random.Random(seed)
        self._weights: dict[Any, int] = {}

    def __call__(self, sentence: str) -> int:
        parts = self._cut(sentence)
        return sum(self._weights.setdefault(p, -self._draw.randrange(10**6)) for p in parts)


@EVERY
def test_no_count_of_words_decides(made: dict[str, list[Pair]], paradigm: str) -> None:
    """Unigram models of any weights, in words and in tokens, on a whole set and its beginnings."""
    for cut in (pieces, small_tokenizer().encode):
        for seed in range(3):
            unigrams = Unigrams(cut, seed)
            for count in (2, 20, COUNT):
                assert score_share(made[paradigm][:count], unigrams) == 0.5


@EVERY
def test_no_length_decides(made: dict[str, list[Pair]], paradigm: str) -> None:
    tokenizer = small_tokenizer()
    assert score_share(made[paradigm], lambda sentence: -len(sentence)) == 0.5
    assert score_share(made[paradigm], lambda sentence: -len(tokenizer.encode(sentence))) == 0.5


@pytest.mark.parametrize("paradigm", ["subject_verb_attractor", "subject_verb_relative"])
def test_agreement_with_the_nearest_noun_is_always_wrong(
    made: dict[str, list[Pair]], paradigm: str
) -> None:
    def agrees_with_nearest(sentence: str) -> int:
        words = sentence.split()
        place = next(i for i, word in enumerate(words) if word in BE)
        near = next(word for word in reversed(words[:place]) if word not in NO_NOUNS)
        return (words[place] in ("is", "was")) != plural(near)

    assert score_share(made[paradigm], agrees_with_nearest) == 0


# ------------------------------------------------------------------------------ grammar

# Each rule looks at a sentence alone, and shares no word list with the script.

IRREGULAR = ("men", "women", "children", "gentlemen")
BE = ("is", "are", "was", "were")
NO_NOUNS = "helped followed met loved visited watched called saved".split()
MALE = set("""man boy king father brother son prince uncle husband nephew gentleman grandfather
John Peter James Thomas Robert David Paul George William Henry""".split())  # fmt: skip
SLEEPING = set("""slept arrived smiled laughed died came disappeared vanished listened hesitated
talked yawned sneezed dined""".split())  # fmt: skip


def plural(noun: str) -> bool:
    return (noun.endswith("s") and noun != "princess") or noun in IRREGULAR


def determiner_fits(sentence: str) -> bool:
    ends = "in|on|at|near|behind|before|after"
    found = re.search(rf"(this|these|that|those) ([a-z]+ )??([a-z]+) ({ends}) ", sentence)
    assert found
    return (found[1] in ("these", "those")) == plural(found[3])


def article_fits(sentence: str) -> bool:
    found = re.search(r" (an?) ([a-z])", sentence, re.IGNORECASE)
    assert found
    return (found[1] == "an") == (found[2].lower() in "aeiou")


def second_verb_fits(sentence: str) -> bool:
    """The verb stands after `The noun`; in the third person it ends in s."""
    _, noun, verb, *_ = sentence.split()
    return verb.endswith("s") != plural(noun)


def be_fits(sentence: str) -> bool:
    words = sentence.split()
    verb = next(word for word in words if word in BE)
    return (verb in ("is", "was")) != plural(words[1])


def gender_fits(sentence: str) -> bool:
    male = bool(MALE & set(pieces(sentence)[:2]))
    return ("himself" in sentence) == male != ("herself" in sentence)


def number_fits(sentence: str) -> bool:
    return ("themselves" in sentence) == plural(sentence.split()[1])


def case_fits(sentence: str) -> bool:
    found = re.search(r"\b(he|she|they|we|I|him|her|them|us|me)\b(\.?)", sentence)
    assert found
    return (found[1] in ("him", "her", "them", "us", "me")) == (found[2] == ".")


def past_fits(sentence: str) -> bool:
    found = re.search(r"^The \w+ (had (?:already |never )?)?(\w+)", sentence)
    assert found
    participle = re.search(r"([eurw]n|one|une|drunk|[sr]ung|swum)$", found[2])
    return bool(found[1]) == bool(participle)


def comparison_fits(sentence: str) -> bool:
    found = re.search(r"(\w+) (than|as) the", sentence)
    assert found
    return found[1].endswith("er") == (found[2] == "than")


def object_fits(sentence: str) -> bool:
    words = sentence.split()
    return (words[1] in SLEEPING) != (words[2] == "the")


def filler_fits(sentence: str) -> bool:
    found = re.search(r"^\w+ \w+ (what|that) the \w+ had \w+ (the )?", sentence)
    assert found
    return (found[1] == "what") != bool(found[2])


def quantifier_fits(sentence: str) -> bool:
    found = re.search(r"there were (\w+)|(\w+) the \w+ were", sentence)
    assert found
    return found[1] not in ("all", "both") if found[1] else found[2] in ("all", "both")


def matches(pattern: str) -> Callable[[str], bool]:
    return lambda sentence: re.search(pattern, sentence) is not None


RULES: dict[str, Callable[[str], bool]] = {
    "determiner_noun": determiner_fits,
    "determiner_adjective_noun": determiner_fits,
    "article": article_fits,
    "subject_verb": second_verb_fits,
    "subject_verb_attractor": be_fits,
    "subject_verb_relative": be_fits,
    "anaphor_gender": gender_fits,
    "anaphor_number": number_fits,
    "pronoun_case": case_fits,
    "irregular_past": past_fits,
    "comparative": comparison_fits,
    "transitivity": object_fits,
    "filler_gap": filler_fits,
    "adjunct_island": matches(r"^What did (the )?\w+ \w+ (after|before) \w+ing the \w+\?$"),
    "coordination": matches(r"^What \w+ the \w+ and the \w+ [a-z]+ (in|on|near|behind) the"),
    "ellipsis": matches(r" (two|three|four|five|six|ten|several)\.$"),
    "there_quantifiers": quantifier_fits,
    "npi_scope": matches(r"that no \w+ who|have not found any"),
}


@EVERY
def test_a_rule_of_grammar_tells_good_from_bad(made: dict[str, list[Pair]], paradigm: str) -> None:
    fits = RULES[paradigm]
    assert [pair for pair in made[paradigm] if not fits(pair[0]) or fits(pair[1])] == []


@pytest.mark.parametrize(
    ("word", "form"),
    [("king", "kings"), ("knife", "knives"), ("lady", "ladies"),
     ("boy", "boys"), ("guy", "guys"), ("box", "boxes"),
     ("church", "churches"), ("princess", "princesses"), ("gentleman", "gentlemen"),
     ("watch", "watches"), ("play", "plays"), ("have", "has"), ("go", "goes")],
)  # fmt: skip
def test_forms_in_s(word: str, form: str) -> None:
    assert minimal_pairs.with_s(word) == form


@pytest.mark.parametrize(("word", "form"), [("old", "older"), ("large", "larger"),
                                            ("heavy", "heavier")])  # fmt: skip
def test_comparatives(word: str, form: str) -> None:
    assert minimal_pairs.with_er(word) == form


# ------------------------------------------------------------------------------ files


def rows_in(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.jsonl")}


def test_the_same_options_give_the_same_rows_and_more_pairs_begin_with_the_fewer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options in {
        "one": ["--pairs", "6"], "same": ["--pairs", "6"], "more": ["--pairs", "10"],
        "other": ["--pairs", "6", "--seed", "1"],
    }.items():  # fmt: skip
        assert call(minimal_pairs.main, "--out", str(tmp_path / name), *options) == 0
    assert capsys.readouterr().out.startswith("18 paradigms of 6 pairs written to ")
    one, same, more, other = (rows_in(tmp_path / n) for n in ("one", "same", "more", "other"))
    assert one == same and set(one) == set(PARADIGMS)
    for paradigm, text in one.items():
        assert text.count("\n") == 6 and more[paradigm].count("\n") == 10
        assert more[paradigm].startswith(text)
        assert other[paradigm] != text
        rows = [json.loads(line) for line in text.splitlines()]
        pairs = [(row["sentence_good"], row["sentence_bad"]) for row in rows]
        assert pairs == make_pairs(paradigm, 6, seed=0)


def test_the_group_holds_every_paradigm_and_takes_the_mean(tmp_path: Path) -> None:
    minimal_pairs.write_set(tmp_path, 2, seed=0)
    group = yaml.safe_load((tmp_path / "minimal_pairs.yaml").read_text(encoding="utf-8"))
    assert group["task"] == [f"minimal_pairs_{paradigm}" for paradigm in PARADIGMS]
    assert lm_eval_tasks.Catalogue(tmp_path).own_tasks() == ["minimal_pairs"]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--pairs", "7"], "--pairs must be an even number from 2 on, got 7: pairs come in twos"),
        (["--pairs", "0"], "--pairs must be an even number from 2 on, got 0: pairs come in twos"),
        (["--pairs", "100000"], "--pairs 100000: subject_verb has only about "),
        (["--out", "file"], "can't write to file: "),
    ],
    ids=" ".join,
)
def test_bad_input_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: list[str], told: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("", encoding="utf-8")
    few = {name: PARADIGMS[name] for name in ("subject_verb", "article")}
    monkeypatch.setattr(minimal_pairs, "PARADIGMS", few)
    assert call(minimal_pairs.main, "--out", "made", *options) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {told}") and err.count("\n") == 1
    assert not Path("made").exists()


# ------------------------------------------------------------------------------ the harness


@pytest.fixture
def checkpoint(tmp_path: Path, raw: dict[str, Any]) -> Path:
    """An untrained model's."""
    recipe = check_recipe(raw, "micro").model_dump(mode="json")
    content = checkpoints.make_checkpoint(
        opinionated_model(CONTEXT), small_tokenizer(), "base", recipe,
        step=4, steps=4, position={"tokens": 100},
    )  # fmt: skip
    checkpoints.write_whole(tmp_path / "base.pt", content)
    return tmp_path / "base.pt"


@torch.no_grad()
def log_likelihood(model: Transformer, tokenizer: Tokenizer, sentence: str) -> float:
    """Of a document that holds the sentence, token by token."""
    ids = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode(sentence)]])  # (1, T)
    log_p = model(ids).logits.log_softmax(-1)  # (1, T, V)
    return sum(log_p[0, i, ids[0, i + 1]].item() for i in range(ids.shape[1] - 1))


def test_evaluate_model_gives_each_paradigm_the_share_of_good_sentences_that_are_likelier(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # takes 3 s
    assert call(minimal_pairs.main, "--out", "made", "--pairs", "6") == 0
    monkeypatch.chdir("/")  # the folder works from anywhere
    options = ["--task-folder", str(tmp_path / "made"), "--tasks", "minimal_pairs", "--no-text"]
    options += ["--checkpoint", str(checkpoint), "--limit", "4", "--device", "cpu"]
    capsys.readouterr()
    report = tmp_path / "report.json"
    assert call(evaluate_model.main, *options, "--json", str(report)) == 0
    out, err = capsys.readouterr()
    assert err == ""

    found = json.loads(report.read_text(encoding="utf-8"))["models"][0]["benchmarks"]
    model, tokenizer = opinionated_model(CONTEXT), small_tokenizer()
    shares = {}
    for paradigm in PARADIGMS:
        pairs = make_pairs(paradigm, 4, seed=0)
        likely = [[log_likelihood(model, tokenizer, each) for each in pair] for pair in pairs]
        shares[paradigm] = sum(good > bad for good, bad in likely) / 4
        task = f"minimal_pairs_{paradigm}"
        assert found["results"][task]["acc,none"] == shares[paradigm], paradigm
        assert found["n-samples"][task] == {"original": 6, "effective": 4}
    assert len(set(shares.values())) > 2
    mean = sum(shares.values()) / len(shares)
    assert found["results"]["minimal_pairs"]["acc,none"] == pytest.approx(mean)
    (row,) = [line for line in out.splitlines() if line.split()[:1] == ["minimal_pairs"]]
    assert row.split()[1:3] == ["acc", f"{100 * mean:.1f}"]
