"""Held-out preferences by kind: what counts as agreeing, and that a run's figures are right."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, some_text, write_lines
from test_chat import call
from test_train_dpo import ROOM, new_model, usable, varied_pairs

sys.path.insert(0, str(ROOT / "benchmarks"))

import preferences
from preferences import by_kind, judge, marks_of

from hamner import checkpoints, tokenization
from hamner.recipe import check_recipe
from hamner.tokenization import Tokenizer
from model import Transformer
from test_ood import interval
from train_dpo import Pair

KINDS = ["tone", "harm", "tone", "harm", "harm", "tone", "harm"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = random.Random(3)
    return tokenization.train([some_text(rng, 40) for _ in range(50)], 320)


def alone(model: Transformer, pair: Pair) -> tuple[float, float]:
    """log p of a pair's answers, each by itself, from the logits."""
    found = []
    for example in (pair.chosen, pair.rejected):
        ids = torch.from_numpy(example.input_ids).long()
        log_p = model(ids[None]).logits[0].log_softmax(-1).detach()
        told = [t for t in range(1, len(ids)) if example.labels[t] >= 0]
        found.append(sum(float(log_p[t - 1, ids[t]]) for t in told))
    return found[0], found[1]


def tokens_of(pair: Pair) -> tuple[int, int]:
    chosen, rejected = ((answer.labels >= 0).sum() for answer in (pair.chosen, pair.rejected))
    return int(chosen), int(rejected)


def test_marks_are_one_nothing_or_a_half() -> None:
    assert marks_of(torch.tensor([0.2, -3.0, 0.0])).tolist() == [1, 0, 0.5]


def test_every_measure_asks_something_else(tokenizer: Tokenizer) -> None:
    """The policy moves towards the rejected answers, which are the shorter ones."""
    pairs = [p for p in usable(varied_pairs(40), tokenizer) if tokens_of(p)[0] > tokens_of(p)[1]]
    lengths = torch.tensor([tokens_of(pair) for pair in pairs]).T
    reference = -0.5 * lengths  # as likely, token by token
    reference[0] += 0.01
    policy = reference + torch.tensor([[-1.0], [2.0]])
    judged = judge(pairs, policy, reference, beta=0.2)
    means = {name: float(marks.mean()) for name, marks in judged.marks.items()}
    assert means == {"reward": 0, "before": 1, "longer": 1}
    assert judged.margins.tolist() == pytest.approx([-0.6] * len(pairs))


def test_kinds_are_counted_apart_and_the_most_frequent_stands_first(tokenizer: Tokenizer) -> None:
    pairs = usable(varied_pairs(7), tokenizer)
    ahead = torch.tensor([kind == "tone" for kind in KINDS])
    policy = torch.stack([ahead.float(), torch.zeros(7)]) - 50
    policy[1, 1] += 1  # one of harm's is worse, the other three are as before
    found = by_kind(KINDS, judge(pairs, policy, torch.full((2, 7), -50.0), beta=0.1))
    assert list(found) == ["harm", "tone", "all"]
    assert [found[kind]["pairs"] for kind in found] == [4, 3, 7]
    assert [found[kind]["reward"] for kind in found] == pytest.approx([37.5, 100, 450 / 7])
    assert found["tone"]["margin"] == pytest.approx(0.1)
    low, high = interval(3, 3)
    assert found["tone"]["interval"] == pytest.approx([100 * low, 100 * high])


@pytest.fixture
def trained(
    tmp_path: Path, raw: dict[str, Any], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """A folder with checkpoints of the stages sft and dpo; the held-out rows of its recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    rows: list[dict[str, Any]] = [dict(row) for row in varied_pairs(7, seed=3)]
    for row, kind in zip(rows, KINDS, strict=True):
        row["source"] = kind
    del rows[6]["source"]
    write_lines(Path(raw["data_dir"]) / "held.jsonl", rows)
    raw["sources"]["held"] = {**raw["sources"]["pairs"], "paths": ["held.jsonl"]}
    raw["dpo"] |= {"validation": "held", "sequence_length": ROOM}
    raw["model"]["max_position_embeddings"] = ROOM
    (tmp_path / "micro.yaml").write_text(json.dumps(raw), encoding="utf-8")
    recipe = check_recipe(raw, "test")
    for seed, (stage, name) in enumerate((("sft", "best"), ("dpo", "latest"))):
        checkpoint = checkpoints.make_checkpoint(
            new_model(recipe, seed), tokenizer, stage, recipe.model_dump(mode="json"),
            step=5, steps=5, position={},
        )  # fmt: skip
        checkpoints.write_whole(recipe.folder(stage) / f"{name}.pt", checkpoint)
    return rows


def measure(*arguments: str) -> int:
    return call(preferences.main, "--recipe", "micro.yaml", "--device", "cpu", *arguments)


def test_figures_are_those_of_each_answer_by_itself(
    trained: list[dict[str, Any]], raw: dict[str, Any], tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert measure("--json", "out.json") == 0
    out = capsys.readouterr().out
    assert "7 pairs, 0 left out" in out and "no source" in out
    found = json.loads(Path("out.json").read_text(encoding="utf-8"))["kinds"]
    recipe = check_recipe(raw, "test")
    reference, policy = new_model(recipe, 0), new_model(recipe, 1)
    agree, before, longer, margins = [], [], [], []
    for pair in usable([{k: row[k] for k in ("chosen", "rejected")} for row in trained], tokenizer):
        old, new, (long, short) = alone(reference, pair), alone(policy, pair), tokens_of(pair)
        margins.append(recipe.dpo.beta * ((new[0] - old[0]) - (new[1] - old[1])))
        agree.append(margins[-1] > 0)
        before.append(old[0] / long > old[1] / short)
        longer.append(0.5 if long == short else long > short)
    assert found["all"]["reward"] == pytest.approx(100 * sum(agree) / 7)
    assert found["all"]["before"] == pytest.approx(100 * sum(before) / 7)
    assert found["all"]["longer"] == pytest.approx(100 * sum(longer) / 7)
    assert found["all"]["margin"] == pytest.approx(sum(margins) / 7, abs=1e-4)
    tone = [agree[i] for i in (0, 2, 5)]
    assert found["tone"]["reward"] == pytest.approx(100 * sum(tone) / 3)


def test_pairs_that_dont_fit_are_left_out_and_none_at_all_is_an_error(
    trained: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure("--set", "dpo.sequence_length=45") == 0
    line = capsys.readouterr().out.splitlines()[0]
    kept, left_out = (int(line.split()[i]) for i in (-5, -3))
    assert left_out > 0 and kept + left_out == 7
    assert measure("--set", "dpo.sequence_length=3") == 2
    assert "no usable preference pair" in capsys.readouterr().err


def test_a_missing_stage_is_told(
    trained: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("checkpoints/micro/sft/best.pt").unlink()
    assert measure() == 2
    assert "no checkpoint in" in capsys.readouterr().err
