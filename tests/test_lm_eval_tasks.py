"""Tests of the harness's tasks: found, loaded from folder, hub and mirror, run, and their scores.

The hub is a server on the loopback interface; the data sets there are made up, in the layout of the
real ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import WORDS, some_text, write_lines
from hub_server import HubServer, use_hub
from lm_eval.models.huggingface import HFLM
from test_lm_eval_model import (
    hugging_face_folder,
    open_folder,
    opinionated_model,
    small_tokenizer,
)

from hamner.errors import UserError
from hamner.evaluation import lm_eval_tasks
from hamner.evaluation.lm_eval_model import HamnerLM
from hamner.evaluation.lm_eval_tasks import (
    DEFAULT_TASKS,
    Catalogue,
    Loaded,
    Setting,
    TaskScore,
    load_tasks,
    run_tasks,
    task_scores,
)

ROWS = 8
FRACTION = {"aggregation": "mean", "higher_is_better": True}


def write_own_tasks(folder: Path) -> Path:
    """Five tasks of all the kinds that the harness has, and the rows that they read."""
    draw = random.Random(8)
    questions = [
        {"question": some_text(draw, 6), "choices": [some_text(draw, n) for n in (1, 2, 4)]}
        for _ in range(ROWS)
    ]
    choice = [{**each, "label": draw.randrange(3)} for each in questions]
    pairs = [{"good": some_text(draw, 5), "bad": some_text(draw, 4)} for _ in range(ROWS)]
    texts = [{"text": some_text(draw, 12), "last": draw.choice(WORDS)} for _ in range(ROWS)]
    for name, rows in (("choice", choice), ("pairs", pairs), ("texts", texts)):
        write_lines(folder / f"{name}.jsonl", rows)
    metrics = [{"metric": name, **FRACTION} for name in ("acc", "acc_norm")]
    tasks: dict[str, dict[str, Any]] = {
        "own_choice": {
            "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "choices", "doc_to_target": "label", "metric_list": metrics,
        },
        "own_pairs": {
            "output_type": "multiple_choice", "doc_to_text": "", "doc_to_target": 0,
            "doc_to_choice": "{{[good, bad]}}", "metric_list": metrics[:1], "num_fewshot": 0,
        },
        "own_cloze": {
            "output_type": "loglikelihood", "doc_to_text": "{{text}}",
            "doc_to_target": "{{' ' + last}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                metrics[0],
            ],
        },
        "own_rolling": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "own_answers": {
            "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{last}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
            "metric_list": [{"metric": "exact_match", **FRACTION}],
        },
    }  # fmt: skip
    files = {"own_choice": "choice", "own_pairs": "pairs"}
    for name, config in tasks.items():
        data = str(folder / f"{files.get(name, 'texts')}.jsonl")
        config |= {"task": name, "dataset_path": "json", "test_split": "test"}
        config["dataset_kwargs"] = {"data_files": {"test": data}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own_tasks(tmp_path_factory.mktemp("own"))


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp() / "datasets_cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(lm_eval_tasks, "DRAWS", 10)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # takes 3 s


@pytest.fixture(scope="module")
def lm() -> HamnerLM:
    return HamnerLM(opinionated_model(128), small_tokenizer(), batch_size=8)


# ------------------------------------------------------------------------------ scores

NAMES = ["own_choice", "own_pairs", "own_cloze", "own_rolling", "own_answers"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> HFLM:
    folder = tmp_path_factory.mktemp("hf")
    return open_folder(hugging_face_folder(opinionated_model(128), small_tokenizer(), folder))


@pytest.mark.parametrize(
    "setting", [Setting(), Setting(shots=2, limit=5), Setting(chat=True)], ids=str
)
def test_scores_are_those_of_the_harness_for_the_same_model_in_hugging_face(
    own: Path, lm: HamnerLM, theirs: HFLM, setting: Setting
) -> None:
    """Shares of right answers exactly, other figures to rounding."""
    found = run_tasks(lm, load_tasks(Catalogue(own), NAMES, None), setting)
    manager = lm_eval.tasks.TaskManager(include_path=own, include_defaults=False)
    expected = lm_eval.simple_evaluate(
        model=theirs, tasks=NAMES, task_manager=manager, num_fewshot=setting.shots,
        limit=setting.limit, bootstrap_iters=10, log_samples=False,
        apply_chat_template=setting.chat,
    )  # fmt: skip
    assert set(found["results"]) == set(expected["results"]) == set(NAMES)
    for name, metrics in expected["results"].items():
        for metric, value in metrics.items():
            ours = found["results"][name][metric]
            if metric.startswith(("acc", "exact")):
                assert ours == value, (name, metric)
            elif isinstance(value, float):
                assert ours == pytest.approx(value, rel=1e-4), (name, metric)
    assert found["n-shot"] == expected["n-shot"]
    assert setting.limit or 0 < found["results"]["own_choice"]["acc,none"] < 1


def test_results_are_plain_data_and_come_again(own: Path, lm: HamnerLM) -> None:
    loaded = load_tasks(Catalogue(own), NAMES[:3], None)
    setting = Setting(shots=1, limit=4)
    first, second = run_tasks(lm, loaded, setting), run_tasks(lm, loaded, setting)
    assert json.loads(json.dumps(first, allow_nan=False)) == first == second
    assert first["configs"]["own_choice"]["dataset_path"] == "json"
    assert first["n-samples"]["own_choice"] == {"original": ROWS, "effective": 4}


def test_a_task_that_wants_no_examples_gets_none(own: Path, lm: HamnerLM) -> None:
    loaded = load_tasks(Catalogue(own), ["own_pairs", "own_choice"], None)
    for wanted in (None, 3):
        found = scores_of(lm, loaded, Setting(shots=wanted, limit=2))
        shots = {score.task: score.shots for score in found}
        assert shots == {"own_pairs": 0, "own_choice": wanted or 0}


def scores_of(lm: HamnerLM, loaded: Loaded, setting: Setting) -> list[TaskScore]:
    return task_scores(run_tasks(lm, loaded, setting), loaded.names)


def test_scores_come_by_task_and_metric_in_the_order_asked_for(own: Path, lm: HamnerLM) -> None:
    names = ["own_cloze", "own_choice"]
    found = scores_of(lm, load_tasks(Catalogue(own), names, None), Setting())
    order = [(score.task, score.metric) for score in found]
    assert order == [
        ("own_cloze", "perplexity"), ("own_cloze", "acc"),
        ("own_choice", "acc"), ("own_choice", "acc_norm"),
    ]  # fmt: skip
    acc = found[2]
    expected = (acc.value * (1 - acc.value) / (ROWS - 1)) ** 0.5
    assert acc.error == pytest.approx(expected)


# ------------------------------------------------------------------------------ finding tasks


def test_a_name_that_no_task_has_is_told_with_the_nearest(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval_tasks, "HARNESS", own)  # to look through all takes seconds
    with pytest.raises(UserError, match=r"no task 'own_choise' \(did you mean 'own_choice'\?\)"):
        load_tasks(Catalogue(own), ["own_pairs", "own_choise"], None)


def test_a_folder_without_tasks_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.yaml").write_text("just: notes", encoding="utf-8")
    with pytest.raises(UserError, match="no YAML file there describes a task"):
        Catalogue(tmp_path)


def test_the_usual_tasks_are_there_with_their_parts() -> None:
    catalogue = Catalogue()
    catalogue.check(DEFAULT_TASKS)
    assert len(catalogue.parts("blimp")) == 67
    assert catalogue.data_sets("blimp") == {"nyu-mll/blimp"}
    assert catalogue.data_sets("arc_easy") == {"allenai/ai2_arc"}
    assert set(catalogue.parts("ai2_arc")) == {"arc_easy", "arc_challenge"}
    assert catalogue.own_tasks() == []


def test_the_tasks_of_a_folder_are_its_groups_and_those_in_none(tmp_path: Path) -> None:
    write_own_tasks(tmp_path)
    assert Catalogue(tmp_path).own_tasks() == sorted(NAMES)
    group = {"group": "own_group", "task": ["own_choice", "own_pairs"]}
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    found = Catalogue(tmp_path).own_tasks()
    assert found == ["own_group", "own_answers", "own_cloze", "own_rolling"]


def test_a_file_that_a_task_lacks_is_told_and_the_others_are_loaded(
    own: Path, tmp_path: Path
) -> None:
    for file in own.iterdir():
        text = file.read_text(encoding="utf-8").replace("pairs.jsonl", "gone.jsonl")
        (tmp_path / file.name).write_text(text, encoding="utf-8")
    loaded = load_tasks(Catalogue(tmp_path), ["own_pairs", "own_choice"], None)
    assert list(loaded.tasks) == loaded.names == ["own_choice"]
    assert "gone.jsonl" in loaded.problems["own_pairs"]


# ------------------------------------------------------------------------------ hub and mirror

Repository = dict[str, list[dict[str, Any]]]  # rows by configuration


def benchmark_rows() -> dict[str, tuple[list[str], Repository]]:
    """Splits and rows of the usual benchmarks, by data set, with the columns of the real ones."""
    draw, count = random.Random(9), range(4)

    def text(words: int = 5) -> str:
        return some_text(draw, words)

    hellaswag = [
        {"activity_label": text(2), "ctx_a": text(), "ctx_b": text(2), "label": str(i),
         "endings": [text() for _ in range(4)]}
        for i in count
    ]  # fmt: skip
    arc = [
        {"question": text(), "answerKey": "ABCD"[i],
         "choices": {"text": [text(2) for _ in range(4)], "label": list("ABCD")}}
        for i in count
    ]  # fmt: skip
    piqa = [{"goal": text(), "sol1": text(), "sol2": text(), "label": i % 2} for i in count]
    lambada = [{"text": text(12)} for _ in count]
    keys = ("question", "support", "correct_answer", "distractor1", "distractor2", "distractor3")
    sciq = [{key: text(3) for key in keys} for _ in count]
    pairs = [{"sentence_good": text(), "sentence_bad": text()} for _ in count]
    trained = ["train", "validation", "test"]
    return {
        "Rowan/hellaswag": (trained, {"default": hellaswag}),
        "allenai/ai2_arc": (trained, {"ARC-Easy": arc, "ARC-Challenge": arc}),
        "baber/piqa": (trained, {"default": piqa}),
        "EleutherAI/lambada_openai": (["test"], {"default": lambada, "de": lambada}),
        "allenai/sciq": (trained, {"default": sciq}),
        "nyu-mll/blimp": (["train"], {"adjunct_island": pairs, "causative": pairs}),
    }


HUB_TASKS = [*DEFAULT_TASKS[:5], "blimp_adjunct_island"]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    for name, (splits, rows) in benchmark_rows().items():
        configs = []
        for config, table in rows.items():
            folder = root / "datasets" / name / config
            folder.mkdir(parents=True)
            for split in splits:
                pq.write_table(pa.Table.from_pylist(table), folder / f"{split}.parquet")
            files = [{"split": split, "path": f"{config}/{split}.parquet"} for split in splits]
            configs.append({"config_name": config, "data_files": files})
        card = root / "datasets" / name / "README.md"
        card.write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n", encoding="utf-8")
    return root


@pytest.fixture
def hub(repositories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(lm_eval_tasks, "PROBE_SECONDS", 0.5)
    monkeypatch.setattr("hamner.hub.REQUEST_WAITS", (0.0, 0.0))
    with HubServer(repositories) as server:
        use_hub(monkeypatch, server, tmp_path / "home")
        yield server


def test_the_usual_tasks_come_from_the_hub_and_then_from_the_cache(
    hub: HubServer, lm: HamnerLM
) -> None:
    catalogue = Catalogue()
    loaded = load_tasks(catalogue, HUB_TASKS, None)
    assert not loaded.problems and loaded.names == HUB_TASKS
    found = scores_of(lm, loaded, Setting())
    assert {score.task for score in found} == set(HUB_TASKS)
    assert {score.metric for score in found} == {"acc", "acc_norm", "perplexity"}
    hub.down = True
    again = load_tasks(catalogue, HUB_TASKS, None)
    assert not again.problems and questions(again) == questions(loaded)


def questions(loaded: Loaded) -> dict[str, list[Any]]:
    return {name: list(task.eval_docs) for name, task in loaded.tasks.items()}


def test_without_hub_and_cache_it_is_soon_told_what_can_not_be_had(
    hub: HubServer, own: Path
) -> None:
    hub.down = True
    names = [*DEFAULT_TASKS, "own_choice"]
    before = len(hub.requests)
    loaded = load_tasks(Catalogue(own), names, None)
    assert loaded.problems == dict.fromkeys(DEFAULT_TASKS, "the hub can't be reached")
    assert list(loaded.tasks) == ["own_choice"]
    assert len(hub.requests) == before


def test_a_hub_that_is_to_be_left_alone_is_not_asked(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert list(load_tasks(Catalogue(), ["sciq"], None).problems) == ["sciq"]
    assert not hub.requests


def test_a_mirror_stands_in_for_the_hub(hub: HubServer, repositories: Path) -> None:
    expected = questions(load_tasks(Catalogue(), HUB_TASKS, None))
    before = len(hub.requests)
    hub.down = True
    mirrored = load_tasks(Catalogue(), HUB_TASKS, str(repositories / "datasets"))
    assert not mirrored.problems and len(hub.requests) == before
    assert questions(mirrored) == expected


def test_a_group_of_the_mirror_has_a_score_of_its_own(
    repositories: Path, tmp_path: Path, lm: HamnerLM
) -> None:
    parts = ["blimp_adjunct_island", "blimp_causative"]
    group = {
        "group": "own_group", "task": parts,
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean"}],
    }  # fmt: skip
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    loaded = load_tasks(Catalogue(tmp_path), ["own_group"], str(repositories / "datasets"))
    assert not loaded.problems and set(loaded.tasks) == set(parts)
    results = run_tasks(lm, loaded, Setting())
    (score,) = task_scores(results, ["own_group"])
    single = [results["results"][part]["acc,none"] for part in parts]
    assert score.value == pytest.approx(sum(single) / 2)
    with_parts = [each.task for each in task_scores(results, ["own_group"], parts=True)]
    assert with_parts == ["own_group", *parts]
