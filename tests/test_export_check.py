"""The self-check of an export: what is not the checkpoint's is found, and nothing of it stays."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_exports import Export, exporter, made_model, made_run, made_tokenizer

from hamner.errors import UserError
from hamner.export import export_check, gguf_file, hf_folder
from hamner.export.export_check import (
    CONTINUATION,
    Probe,
    Tolerance,
    check_logits,
    make_probes,
    parts_at_a_tie,
    tolerance_of,
)

torch.set_num_threads(1)  # more would wait for each other where cores are shared
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    made_run(folder)
    return folder


@pytest.fixture
def export(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> Export:
    return exporter(run_folder, capsys)


# ------------------------------------------------------------------------------ sabotage


def broken(patch: pytest.MonkeyPatch, name: str, change: Callable[[Any], Any]) -> None:
    """Have a function of hf_folder give something else."""
    original = getattr(hf_folder, name)
    patch.setattr(hf_folder, name, lambda *args: change(original(*args)))


def scaled(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "model.layers.1.self_attn.q_proj.weight"
    return {**weights, name: weights[name] * 1.01}


SABOTAGE = [
    ("weights", scaled, "gives other logits than the checkpoint"),
    ("config", lambda c: {**c, "rope_theta": 1e4, "rope_parameters": None}, "gives other logits"),
    ("config", lambda c: {**c, "model_type": "no such"}, "transformers can't load the export"),
    ("generation_config", lambda c: {**c, "eos_token_id": [0]}, "generate answers 'hello' with"),
    ("chat_template", lambda t: re.sub(r" \| replace\(.*\) %}", " %}", t), "renders"),
    ("chat_template", lambda t: t.replace("| trim", ""), "renders"),
    ("chat_template", hf_folder.without_generation_marks, "takes other tokens"),
    ("tokenizer_json", lambda t: {**t, "normalizer": None}, "renders"),
    ("tokenizer_json", lambda t: {**t, "normalizer": {"type": "NFKC"}}, "tokenises"),
    ("tokenizer_config", lambda c: {**c, "split_special_tokens": True}, "renders"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "told"), SABOTAGE)
def test_an_export_that_is_not_the_same_is_thrown_away(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, change: Callable[[Any], Any], told: str,
) -> None:  # fmt: skip
    broken(monkeypatch, name, change)
    code, _, err = export("--out", str(tmp_path / "x"))
    assert code == 2
    assert told in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_gguf_file_with_other_weights_is_thrown_away(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "neighbours", lambda weight, heads: weight)
    code, _, err = export("--gguf", "f32", "--out", str(tmp_path / "x"))
    assert code == 2
    assert "micro-dpo-f32.gguf holds another blk.0.attn_q.weight than the checkpoint" in err
    assert not list(tmp_path.iterdir())


def test_what_was_not_run_is_not_said_to_be(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_check, "has_llama_cpp", lambda: False)
    code, out, _ = export("--gguf", "f32", "--out", str(tmp_path / "x"))
    assert code == 0
    assert "weights read back; not run, llama-cpp-python isn't installed" in out


@needs_llama_cpp
def test_a_file_that_llama_cpp_cannot_load_is_thrown_away(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "pre_tokenizer", lambda content: "no such rule")
    code, _, err = export("--gguf", "f32", "--out", str(tmp_path / "x"))
    assert code == 2
    assert "llama.cpp can't load micro-dpo-f32.gguf" in err
    assert not list(tmp_path.iterdir())


@needs_llama_cpp
def test_llama_cpp_is_asked_whether_the_rows_stand_right(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one thing about weights that reading them back by the same code can't show."""
    monkeypatch.setattr(gguf_file, "neighbours", lambda weight, heads: weight)
    monkeypatch.setattr(gguf_file, "halves", lambda weight, heads: weight)
    code, _, err = export("--gguf", "q8_0", "--out", str(tmp_path / "x"))
    assert code == 2
    assert "llama.cpp gives other logits than the checkpoint" in err
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ by itself


def made_probe(*logits: list[float], begin: int = 1) -> Probe:
    """Of logits over three tokens, whose likeliest are the continuation."""
    table = torch.tensor(logits)
    ids = [0, *table.argmax(-1).tolist()]
    return Probe("x", "x", ids, begin, torch.cat([table, torch.zeros(1, 3)]))


def test_another_choice_is_an_error_and_a_tie_is_none() -> None:
    probe = made_probe([0.0, 1.0, 0.99], [2.0, 0.0, 0.0])
    assert probe.ids == [0, 1, 0]
    other = probe.logits.clone()
    other[0, 2] = 1.005
    assert check_logits("it", probe, other, Tolerance(0.1, tie=0.02)) == pytest.approx(0.015)
    with pytest.raises(UserError, match=r"it continues 'x' differently .* after 0 tokens"):
        check_logits("it", probe, other, Tolerance(0.1, tie=0.0))
    with pytest.raises(UserError, match=r"other logits than the checkpoint to 'x': .* by 0.015"):
        check_logits("it", probe, other, Tolerance(0.01, tie=0.02))
    other[1, 1] = torch.nan
    with pytest.raises(UserError, match="differ by nan"):
        check_logits("it", probe, other, Tolerance(100.0, tie=100.0))


def test_a_generated_answer_may_part_at_a_tie_only() -> None:
    probe = made_probe([0.0, 1.0, 0.99], [2.0, 0.0, 0.0])
    assert parts_at_a_tie(probe, [2, 0], Tolerance(1, tie=0.02))
    assert not parts_at_a_tie(probe, [0, 0], Tolerance(1, tie=0.02))
    assert not parts_at_a_tie(probe, [1], Tolerance(1, tie=0.02))  # ended too early


def test_probes_hold_the_models_own_greedy_words() -> None:
    model, tokenizer = made_model(), made_tokenizer()
    questions = {"the dog": "the dog", "long": "the dog " * 100, "empty": ""}
    probe, long = make_probes(model, tokenizer, questions)  # the other two have no place
    assert len(probe.ids) == probe.begin + CONTINUATION
    for place in range(probe.begin, len(probe.ids)):
        with torch.no_grad():
            logits = model(torch.tensor([probe.ids[:place]])).logits[0, -1]
        assert logits.argmax() == probe.ids[place]
    assert len(long.ids) == model.config.max_position_embeddings


def test_an_answer_ends_before_the_first_stop_id() -> None:
    probe = Probe("x", "x", [2, 1, 4, 3, 2], 1, torch.zeros(5, 5))
    assert probe.answer([2, 3]) == [1, 4]
    assert probe.answer([1]) == []
    assert probe.answer([0]) == [1, 4, 3, 2]


def test_rounding_is_measured_with_the_model_at_hand() -> None:
    model, tokenizer = made_model(), made_tokenizer()
    probes = make_probes(model, tokenizer, {"the dog": "the dog"})
    assert tolerance_of(probes, model, times=2) == Tolerance(1e-3, 0.0)
    coarse = made_model().to(torch.bfloat16)
    tolerance = tolerance_of(probes, coarse, times=2)
    assert 1e-3 < tolerance.logits < 1
    assert tolerance.tie == 2 * tolerance.logits
