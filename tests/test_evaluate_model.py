"""Tests of the measuring script: its figures, its tables, its JSON, and what can go wrong."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import conftest
import datasets
import lm_eval
import pytest
import torch
import yaml
from conftest import ROOT, Workshop
from test_chat import call
from test_lm_eval_model import open_folder, opinionated_model, small_tokenizer
from test_lm_eval_tasks import write_own_tasks

import evaluate_model
import export_hf
from evaluate_model import PUBLISHED, Subject, notes, published, tasks_table, text_table
from hamner import checkpoints
from hamner.evaluation import lm_eval_tasks
from hamner.evaluation.lm_eval_tasks import DEFAULT_TASKS, Loaded
from hamner.evaluation.scoring import TextScore, score_documents
from hamner.recipe import check_recipe
from hamner.sources import is_held_out

torch.set_num_threads(1)  # more would wait for each other where cores are shared
CONTEXT = 128
SOURCES = ["web", "books", "talk", "pairs"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A workshop with checkpoints of the stages base and dpo, and a folder of tasks."""
    folder = tmp_path_factory.mktemp("measured")
    raw = inspect.unwrap(conftest.raw)(inspect.unwrap(conftest.data)(folder))
    recipe = check_recipe(raw, "micro").model_dump(mode="json")
    model, tokenizer = opinionated_model(CONTEXT), small_tokenizer()
    for stage, step in (("base", 4), ("dpo", 7)):
        checkpoint = checkpoints.make_checkpoint(
            model, tokenizer, stage, recipe, step=step, steps=step, position={"tokens": 100}
        )
        checkpoints.write_whole(folder / f"checkpoints/micro/{stage}/best.pt", checkpoint)
        torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight, std=0.4)
    write_own_tasks(folder / "tasks")
    return Workshop(folder, raw)


Measure = Callable[..., tuple[int, str, str]]


@pytest.fixture
def measure(
    measured: Workshop,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Measure:
    """Runs the script in this process, without a hub; gives exit code, output and errors."""
    monkeypatch.chdir(measured.folder)
    monkeypatch.setattr(lm_eval_tasks, "DRAWS", 10)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    cache = tmp_path_factory.getbasetemp() / "datasets_cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)

    def measure(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = call(evaluate_model.main, "--device", "cpu", *arguments)
        return (code, *capsys.readouterr())

    return measure


def report_of(measured: Workshop, name: str = "report.json") -> dict[str, Any]:
    return json.loads((measured.folder / name).read_text(encoding="utf-8"))


RECIPE = ("--recipe", "micro.yaml")
NO_TASKS = ("--tasks", "none")


# ------------------------------------------------------------------------------ text


def held_out(measured: Workshop, name: str, column: str) -> list[Any]:
    lines = (measured.folder / "texts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)[column] for line in lines]
    return [row for row in rows if is_held_out(row, 0.1)]


def test_every_source_of_every_stage_is_measured_on_what_it_holds_out(
    measured: Workshop, measure: Measure
) -> None:
    code, out, err = measure(*RECIPE, *NO_TASKS, "--json", "report.json")
    assert (code, err) == (0, "")
    assert out.startswith("checkpoints/micro/dpo/best.pt (stage dpo, step 7), ")
    (model,) = report_of(measured)["models"]
    assert list(model["text"]) == SOURCES
    path = measured.folder / "checkpoints/micro/dpo/best.pt"
    checkpoint = checkpoints.load(path)
    subject = checkpoints.load_model(checkpoint, path).eval()
    for name, column in (("books", "text"), ("talk", "messages")):
        documents = held_out(measured, name, column)
        expected, answers = score_documents(subject, small_tokenizer(), documents, 4)
        found = model["text"][name]
        assert found["documents"] == len(documents) > 3
        assert found["bytes"] == sum(expected.bytes) and found["tokens"] == expected.tokens
        assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
        assert found["standard_error"] == pytest.approx(expected.standard_error, rel=1e-4)
        bits = found["nats_per_token"] * found["tokens"] / math.log(2)
        assert found["bits_per_byte"] == pytest.approx(bits / found["bytes"])
        assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
        assert ("assistant" in found) == (name == "talk")
        if answers:
            given = found["assistant"]["bits_per_byte"]
            assert given == pytest.approx(answers.bits_per_byte, rel=1e-5)
        assert f"{expected.bits_per_byte:.3f} ±{expected.standard_error:.3f}" in out


def test_so_much_text_as_is_asked_for_of_the_sources_asked_for(
    measured: Workshop, measure: Measure
) -> None:
    options = ("--sources", "web, talk", "--bytes-per-source", "500", "--json", "report.json")
    assert measure(*RECIPE, *NO_TASKS, *options)[0] == 0
    (model,) = report_of(measured)["models"]
    assert list(model["text"]) == ["web", "talk"]
    for found in model["text"].values():
        assert 500 <= found["bytes"] < 500 + 300


def test_checkpoints_stand_side_by_side_measured_on_the_same_text(
    measured: Workshop, measure: Measure
) -> None:
    paths = [f"checkpoints/micro/{stage}/best.pt" for stage in ("base", "dpo")]
    code, out, _ = measure("--checkpoint", *paths, *NO_TASKS, "--json", "report.json")
    assert code == 0
    (heading,) = [line for line in out.splitlines() if line.split()[:1] == ["source"]]
    assert heading.split() == ["source", "documents", "bytes", "base", "dpo"]
    base, dpo = report_of(measured)["models"]
    assert [base["stage"], base["step"], dpo["stage"], dpo["step"]] == ["base", 4, "dpo", 7]
    for name in SOURCES:
        assert base["text"][name]["bytes"] == dpo["text"][name]["bytes"]
        assert base["text"][name]["bits_per_byte"] != dpo["text"][name]["bits_per_byte"]


def test_the_recipe_in_a_checkpoint_says_what_to_read(measured: Workshop, measure: Measure) -> None:
    path = "checkpoints/micro/base/best.pt"
    found = measure("--checkpoint", path, *NO_TASKS, "--set", "data_dir=nowhere")
    assert found[0] == 2
    assert found[2].startswith("error: source 'web': no file matches nowhere/web.jsonl; ")
    named = [line.split("'")[1] for line in found[2].splitlines()[:-1]]
    assert named == SOURCES
    assert found[2].splitlines()[-1].endswith("to measure the others, name them with --sources")


def test_a_source_that_holds_nothing_out_is_told(measured: Workshop, measure: Measure) -> None:
    tiny = measured.folder / "texts" / "one.jsonl"
    tiny.write_text(json.dumps({"text": "a single text"}) + "\n", encoding="utf-8")
    assert not is_held_out("a single text", 0.1)
    more = ("--set", "sources.books.paths=[one.jsonl]", "--sources", "books,web")
    code, out, _ = measure(*RECIPE, *NO_TASKS, *more, "--json", "report.json")
    assert code == 0
    assert "source 'books': no document of it is held out" in out
    assert list(report_of(measured)["models"][0]["text"]) == ["web"]


def test_a_message_without_text_is_told_with_its_source(
    measured: Workshop, measure: Measure
) -> None:
    odd = [[{"role": "user", "content": None, "n": n}, {"role": "assistant", "content": f"{n}"}]
           for n in range(99)]  # fmt: skip
    conftest.write_lines(measured.folder / "texts" / "odd.jsonl", [{"messages": o} for o in odd])
    more = ("--set", "sources.talk.paths=[odd.jsonl]", "--sources", "talk")
    code, _, err = measure(*RECIPE, *NO_TASKS, *more)
    assert code == 2
    assert err == "error: source 'talk': a message's content must be text, got NoneType\n"


def test_a_checkpoint_is_not_measured_on_what_it_was_trained_on(measure: Measure) -> None:
    code, _, err = measure(*RECIPE, *NO_TASKS, "--set", "held_out_fraction=0.2")
    assert code == 2
    assert err == (
        "error: checkpoints/micro/dpo/best.pt was trained with held_out_fraction 0.1, and so on "
        "some of the text that 0.2 would measure it on: add --set held_out_fraction=0.1\n"
    )
    assert measure(*RECIPE, *NO_TASKS, "--set", "held_out_fraction=0.09")[0] == 0


# ------------------------------------------------------------------------------ benchmarks


def test_benchmarks_of_a_checkpoint_are_those_of_its_exported_folder(
    measured: Workshop, measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ("--task-folder", "tasks", "--no-text", "--json", "report.json")
    code, out, err = measure(*RECIPE, *tasks)
    assert (code, err) == (0, "")
    assert call(export_hf.main, *RECIPE, "--out", "exported") == 0
    manager = lm_eval.tasks.TaskManager(include_path="tasks", include_defaults=False)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # takes 3 s
    names = ["own_answers", "own_choice", "own_cloze", "own_pairs", "own_rolling"]
    theirs = lm_eval.simple_evaluate(
        model=open_folder(Path("exported")), tasks=names, task_manager=manager, bootstrap_iters=10
    )
    (model,) = report_of(measured)["models"]
    assert list(model["benchmarks"]["results"]) == names
    assert model["benchmarks"]["n-samples"] == theirs["n-samples"]
    for name, metrics in theirs["results"].items():
        ours = model["benchmarks"]["results"][name]
        exact = [metric for metric in metrics if metric.startswith(("acc", "exact_match"))]
        assert [ours[metric] for metric in exact] == [metrics[metric] for metric in exact]
    ours, their_results = model["benchmarks"]["results"], theirs["results"]
    for name, metric in (("own_cloze", "perplexity"), ("own_rolling", "bits_per_byte")):
        expected = their_results[name][f"{metric},none"]
        assert ours[name][f"{metric},none"] == pytest.approx(expected, rel=1e-4)
    acc, error = ours["own_choice"]["acc,none"], ours["own_choice"]["acc_stderr,none"]
    (row,) = [line for line in out.splitlines() if line.split()[:2] == ["own_choice", "acc"]]
    assert row.split()[2:] == [f"{100 * acc:.1f}", f"±{100 * error:.1f}"]


def test_limit_examples_and_chat_reach_the_harness(measured: Workshop, measure: Measure) -> None:
    options = ("--tasks", "own_choice", "--task-folder", "tasks", "--no-text", "--chat")
    more = ("--limit", "3", "--fewshot", "2", "--json", "report.json")
    code, out, _ = measure(*RECIPE, *options, *more)
    assert code == 0
    found = report_of(measured)["models"][0]["benchmarks"]
    assert found["n-samples"]["own_choice"]["effective"] == 3
    assert found["n-shot"]["own_choice"] == 2
    assert "here only the first 3 questions of each task" in out
    assert "here asked in the chat template" in out


def test_without_a_hub_the_text_is_measured_and_the_way_to_the_benchmarks_told(
    measured: Workshop, measure: Measure
) -> None:
    code, out, err = measure(*RECIPE, "--sources", "web", "--json", "report.json")
    assert (code, err) == (0, "")
    told = out.splitlines()[0]
    assert told.startswith(f"not run: {', '.join(DEFAULT_TASKS)} (the hub can't be reached); ")
    assert "hf download Rowan/hellaswag --repo-type dataset" in told
    assert "--task-folder" in told and "bits/byte" in out
    report = report_of(measured)
    assert set(report["not_run"]) == set(DEFAULT_TASKS)
    assert report["models"][0]["benchmarks"] is None


def test_a_task_asked_for_by_name_must_be_there(measure: Measure) -> None:
    code, out, err = measure(*RECIPE, "--tasks", "sciq,piqa")
    assert (code, out) == (2, "")
    assert err == (
        "error: task 'sciq' can't be loaded: the hub can't be reached\n"
        "       task 'piqa' can't be loaded: the hub can't be reached\n"
    )


def test_without_the_harness_only_benchmarks_are_missing(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "hamner.evaluation.lm_eval_tasks")
    monkeypatch.delattr("hamner.evaluation.lm_eval_tasks")
    code, out, _ = measure(*RECIPE, "--sources", "web")
    assert code == 0 and "bits/byte" in out
    assert out.startswith("benchmarks need lm-evaluation-harness (") and "pip install" in out
    code, _, err = measure(*RECIPE, "--tasks", "hellaswag")
    assert code == 2 and err.startswith("error: benchmarks need lm-evaluation-harness (")


# ------------------------------------------------------------------------------ tables


def subject(stage: str, results: dict[str, Any] | None = None) -> Subject:
    scores = (TextScore([30.0, 31.0], [40, 42], 25), TextScore([9.0], [11], 5))
    text = {"a_source_with_a_rather_long_name": scores, "web": (scores[0], TextScore([], [], 0))}
    return Subject(Path("x.pt"), {"stage": stage, "step": 1}, text, results)


def harness_results(shots: int) -> dict[str, Any]:
    metrics = {
        "hellaswag": {"acc,none": 0.25, "acc_stderr,none": 0.004, "acc_norm,none": 0.26},
        "lambada_openai": {"perplexity,none": 123.456, "perplexity_stderr,none": 4.56},
        "blimp": {"acc,none": 0.5, "acc_stderr,none": "N/A"},
        "blimp_causative": {"acc,none": 0.5},
    }
    return {
        "results": metrics, "group_subtasks": {"blimp": ["blimp_causative"]},
        "n-shot": dict.fromkeys(metrics, shots),
    }  # fmt: skip


def printed(table: Any, capsys: pytest.CaptureFixture[str]) -> list[str]:
    from rich.console import Console

    Console(markup=False, highlight=False, width=evaluate_model.WIDTH).print(table)
    return capsys.readouterr().out.splitlines()


NAMES = ["hellaswag", "lambada_openai", "blimp"]


def test_published_figures_stand_beside_the_same_task_and_metric(
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded = Loaded(names=NAMES)
    lines = printed(tasks_table([subject("dpo", harness_results(0))], loaded), capsys)
    rows = [line.split() for line in lines if line.strip()]
    assert rows[1] == ["task", "metric", "dpo", "GPT-2", "124M", "SmolLM2-135M"]
    assert rows[3:] == [
        ["hellaswag", "acc", "25.0", "±0.4", "28.9", "-"],
        ["hellaswag", "acc_norm", "26.0", "31.1", "42.1", "*"],
        ["lambada_openai", "perplexity", "123", "±4.56", "40.1", "-"],
        ["blimp", "acc", "50.0", "-", "-"],
    ]


def test_figures_without_examples_do_not_stand_beside_those_with(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = tasks_table([subject("dpo", harness_results(5))], Loaded(names=NAMES))
    assert "GPT-2" not in "".join(printed(table, capsys))


def test_notes_say_what_the_table_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    plain = argparse.Namespace(limit=None, chat=False)
    for shots, told in ((0, 3), (5, 1)):  # figures of others, and of another harness
        table = tasks_table([subject("dpo", harness_results(shots))], Loaded(names=NAMES))
        assert len(list(notes(plain, table))) == told
        more = list(notes(argparse.Namespace(limit=7, chat=True), table))
        assert len(more) == told + 2 and "first 7 questions" in more[-2]


@pytest.mark.parametrize(
    ("value", "told"), [(0.5, "0.5"), (2.98642, "2.99"), (1234.5, "1,234"), (2.5e11, "2.5e+11")]
)
def test_figures_that_are_no_shares_have_three_digits(value: float, told: str) -> None:
    assert evaluate_model.number(value) == told


def test_reasons_are_told_apart() -> None:
    problems = {"sciq": "gone", "piqa": "gone", "blimp": "damaged"}
    told = evaluate_model.not_run(problems, lm_eval_tasks.Catalogue())
    assert told.startswith("not run: sciq, piqa (gone), blimp (damaged); ")
    assert "hf download allenai/sciq " in told


def test_every_published_figure_has_its_source() -> None:
    models = published()
    assert [model["model"] for model in models] == ["GPT-2 124M", "SmolLM2-135M"]
    for model in models:
        used = {score["source"] for score in model["scores"]}
        assert used == set(model["sources"])
        assert all(url.startswith("https://") for url in model["sources"].values())
        for score in model["scores"]:
            assert set(score) == {"task", "metric", "value", "harness", "source"}
            assert score["harness"] in ("lm-eval", "lighteval")
            assert 1 < score["value"] < 100  # percent, or perplexity
    assert yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")) == models


def test_five_stages_fit_into_a_hundred_columns(capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["base", "anneal", "chat", "sft", "dpo"]
    subjects = [subject(stage, harness_results(0)) for stage in stages]
    for table in (text_table(subjects), tasks_table(subjects, Loaded(names=NAMES))):
        lines = printed(table, capsys)
        assert max(map(len, lines)) <= 100
        heading = next(line for line in lines if line.split()[:1] in (["source"], ["task"]))
        assert all(stage in heading.split() for stage in stages)
        rows = [line for line in lines if line.strip()]
        assert len(rows) == 3 + (3 if "source" in heading else 4)  # nothing is folded


def test_checkpoints_of_the_same_stage_are_numbered() -> None:
    assert evaluate_model.labels([subject("sft"), subject("sft")]) == ["1 sft", "2 sft"]


# ------------------------------------------------------------------------------ the script


def test_the_report_holds_what_is_needed_to_measure_again(
    measured: Workshop, measure: Measure
) -> None:
    out = measure(*RECIPE, *NO_TASKS, "--sources", "web", "--json", "new/report.json")[1]
    assert out.endswith("written to new/report.json\n")
    report = report_of(measured, "new/report.json")
    (model,) = report["models"]
    assert model["checkpoint"] == "checkpoints/micro/dpo/best.pt"
    assert model["parameters"] == opinionated_model(CONTEXT).config.num_parameters()
    assert model["vocabulary"] == 330 and model["context"] == CONTEXT
    assert report["recipe"] == model["recipe"] == "micro" and report["device"] == "cpu"
    assert report["versions"]["torch"] == str(torch.__version__)
    assert report["versions"]["lm_eval"] == lm_eval.__version__
    assert report["options"]["bytes_per_source"] == 100_000
    assert report["published"] == published() and report["seconds"] > 0


BAD: list[tuple[Sequence[str], str]] = [
    (["--limit", "0"], "--limit must be 1 or more, got 0"),
    (["--batch-size", "-2"], "--batch-size must be 1 or more, got -2"),
    (["--bytes-per-source", "0"], "--bytes-per-source must be 1 or more, got 0"),
    (["--fewshot", "-1"], "--fewshot must be 0 or more, got -1"),
    (["--no-text", "--tasks", "none"], "leave nothing to measure"),
    (["--task-folder", "tasks", "--tasks", "none"], "--task-folder and --tasks none don't go"),
    (["--sources", "web", "--no-text"], "--sources and --no-text don't go together"),
    (["--tasks", ","], "--tasks is empty: name some"),
    (["--tasks", "none", "--sources", "weeb"], "no source is called 'weeb' (did you mean 'web'?)"),
    (["--task-folder", "nowhere"], "--task-folder nowhere: no such folder"),
    (["--task-folder", "texts"], "--task-folder texts: no YAML file there describes a task"),
    (["--checkpoint", "gone.pt"], "no checkpoint at gone.pt"),
    (["--device", "abacus"], "--device abacus"),
    (["--json", "texts", "--tasks", "none"], "--json texts is a folder: name a file"),
]


@pytest.mark.parametrize(("arguments", "told"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_told_in_one_sentence(
    measure: Measure, arguments: Sequence[str], told: str
) -> None:
    code, out, err = measure(*RECIPE, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert told in err


def test_a_report_that_can_not_be_written_is_told_after_the_tables(
    measured: Workshop, measure: Measure
) -> None:
    (measured.folder / "file").write_text("", encoding="utf-8")
    options = (*NO_TASKS, "--sources", "web", "--json", "file/report.json")
    code, out, err = measure(*RECIPE, *options)
    assert code == 2 and "bits/byte" in out
    assert err.startswith("error: --json file/report.json: can't be written (")


def test_the_script_runs_and_imports_the_harness_only_for_benchmarks(measured: Workshop) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['evaluate_model.py', {', '.join(map(repr, [*RECIPE, *NO_TASKS]))}]\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'evaluate_model.py')!r}, run_name='__main__')\n"
        "finally:\n"
        "    print('harness:', 'lm_eval' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=measured.folder, text=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "bits/byte" in done.stdout and done.stdout.endswith("harness: False\n")
