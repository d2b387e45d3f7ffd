"""Short runs: the steps that fit, the settings that are passed on, what is kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import short_runs

from hamner.errors import UserError

TEXT = {"prose": {"bits_per_byte": 2.0}, "docs": {"bits_per_byte": 3.0}}


class Scripts:
    """Stands for our scripts: remembers how they were called, writes a report."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[str, ...]]] = []

    def __call__(self, script: str, *options: str) -> None:
        self.calls.append((script, options))
        if "--json" in options:
            path = Path(options[options.index("--json") + 1])
            path.write_text(json.dumps({"models": [{"text": TEXT}]}))


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Scripts:
    made = Scripts()
    monkeypatch.setattr(short_runs, "call", made)
    return made


def test_a_variant_gets_the_steps_that_fit_and_its_own_fields(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_runs, "step_seconds", lambda recipe: 0.5)
    found = short_runs.measure("wide", "tiny", ["model.num_hidden_layers=2"], 100)
    assert found["steps"] == 200 and found["tokens"] == 200 * 8 * 256
    assert found["bits_per_byte"]["mixed"] == pytest.approx(0.7 * 2 + 0.3 * 3)
    assert [script for script, _ in scripts.calls] == ["train_pretrain.py", "evaluate_model.py"]
    for _, options in scripts.calls:  # the same recipe for both
        assert "model.num_hidden_layers=2" in options and "base.steps=200" in options
    schedule = next(o for o in scripts.calls[0][1] if o.startswith("base.schedule="))
    assert "linear" in schedule and "warmup: 10" in schedule and "floor: 0.0" in schedule


def test_steps_that_are_given_hold_whatever_time_they_take(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_runs, "step_seconds", lambda recipe: 1e9)
    found = short_runs.measure("few", "tiny", [], 100, 30)
    assert found["steps"] == 30 and "base.steps=30" in scripts.calls[0][1]


def test_a_larger_model_takes_longer_for_a_step() -> None:
    threads = torch.get_num_threads()
    settings = ["base.sequences_per_step=2", "precision=auto"]
    try:
        small, large = (
            short_runs.step_seconds(
                short_runs.load_recipe("tiny", [f"model.num_hidden_layers={layers}", *settings]),
                steps=2,
            )
            for layers in (1, 10)
        )
    finally:
        torch.set_num_threads(threads)
    assert 0 < small < large


def test_variants_become_settings(tmp_path: Path) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text("first: {}\nadam: {common.optimizer.kind: adamw, base.steps: 3}\n")
    assert short_runs.read_variants(path) == {
        "first": [],
        "adam": ['common.optimizer.kind="adamw"', "base.steps=3"],
    }
    path.write_text("- a list\n")
    with pytest.raises(UserError, match="a mapping of names"):
        short_runs.read_variants(path)


def test_a_script_that_fails_is_told_with_what_it_said() -> None:
    with pytest.raises(UserError, match="nowhere"):
        short_runs.call("train_pretrain.py", "--recipe", "nowhere")


def test_the_table_begins_with_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    run: dict[str, Any] = {
        "parameters": 10, "seconds_per_step": 0.1, "steps": 5, "tokens": 50,
    }  # fmt: skip
    runs = [
        run | {"name": "worse", "bits_per_byte": {"mixed": 2.5}},
        run | {"name": "better", "bits_per_byte": {"mixed": 2.25}},
    ]
    short_runs.show(runs, "5 steps")
    said = capsys.readouterr().out
    assert said.index("better") < said.index("worse") and "2.2500" in said
