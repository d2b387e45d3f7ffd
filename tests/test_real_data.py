"""The stages of v4 as they are run, on the hub's data sets, with a network that fails, and killed.

The scripts run in children of a fork server. They find the hub at HF_ENDPOINT: a server on the
loopback interface. Nothing of v4 is changed but its steps and the size of its model.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import multiprocessing
import os
import random
import runpy
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, some_conversation, some_text, write_lines
from hub_server import HubServer, in_turn, write_v4_hub
from test_hub import GATED, Sleepless
from test_resume import HEAVY

from hamner import tokenization, training
from hamner.batches import MixedBatches
from hamner.recipe import Recipe, StreamStage, check_recipe, load_recipe
from hamner.sources import open_stream
from hamner.stage import open_tokens
from hamner.tokenization import Tokenizer

SMALLER = [
    "model.vocab_size=400", "model.hidden_size=32", "model.intermediate_size=64",
    "model.num_hidden_layers=2", "model.num_attention_heads=4", "model.num_key_value_heads=2",
    "model.max_position_embeddings=256", "common.sequence_length=256",
    "precision=fp32", "compile=false", "sampling.max_new_tokens=4", "common.log_every=1",
    "sft.log_every=1", "dpo.log_every=1",
    "base.steps=4", "anneal.steps=3", "chat.steps=3", "sft.steps=3", "dpo.steps=3",
    "base.validation_sequences=2", "anneal.validation_sequences=2", "chat.validation_sequences=2",
]  # fmt: skip
PIPELINE = [
    ["train_pretrain.py", "--fresh"],
    ["train_pretrain.py", "--stage", "anneal"],
    ["train_chat_pretrain.py"],
    ["prepare_sft_data.py"],
    ["train_sft.py"],
    ["train_dpo.py"],
]
KINDS = ("503", "cut", "reset", "stall")
LOGS = ("pretrain_v4_base", "pretrain_v4_anneal", "chat_pretrain_v4", "sft_v4", "dpo")
FOLDERS = ("pretrain_v4", "pretrain_v4_anneal", "chat_pretrain", "sft", "dpo")


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    return context


def in_child(folder: str, environment: dict[str, str], work: Callable[[], None]) -> None:
    """What a child does: its output goes to the file `output`."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with open("output", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    training.peak_flops = lambda *_: None  # measuring it takes half a second
    hurry_the_client()
    work()


def hurry_the_client() -> None:
    """Time-outs and waits of a test's length."""
    import huggingface_hub.utils._http
    from huggingface_hub import constants

    from hamner import hub

    hub.REQUEST_WAITS = (0.01, 0.01)
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "DEFAULT_REQUEST_TIMEOUT"):
        setattr(constants, name, 0.5)
    huggingface_hub.utils._http.time = Sleepless()  # type: ignore[assignment]


def run_scripts(commands: list[list[str]]) -> None:
    """Run scripts one after the other, as `__main__`, until one fails."""
    for script, *arguments in commands:
        overrides = [part for value in SMALLER for part in ("--set", value)]
        device = [] if script == "prepare_sft_data.py" else ["--device", "cpu"]
        sys.argv = [script, *arguments, *device, *overrides]
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise


def own_files(folder: Path) -> None:
    """Small stand-ins for the files of v4 that scripts of ours write."""
    rng = random.Random(5)
    personal = folder / "data/personal"
    write_lines(
        personal / "training_samples.jsonl",
        [{"text": f"{i} {some_text(rng, 80)}"} for i in range(40)],
    )
    for name in ("sft_diverse_only", "sft_conversations"):
        rows = [{"messages": some_conversation(rng)} for _ in range(300)]
        write_lines(personal / f"{name}.jsonl", rows)


class Pipeline:
    """All stages of v4 in a folder, against a hub."""

    def __init__(self, server: ForkServerContext, folder: Path, hub: HubServer):
        own_files(folder)
        environment = hub.environment(folder / "home", token="hf_good")
        child = server.Process(
            target=in_child,
            args=(str(folder), environment, functools.partial(run_scripts, PIPELINE)),
        )
        child.start()
        child.join(240)
        self.folder, self.output = folder, (folder / "output").read_text(encoding="utf-8")
        assert child.exitcode == 0, self.output

    def losses(self, log: str) -> list[tuple[str, str, str]]:
        path = self.folder / "logs" / f"{log}_metrics.csv"
        with open(path, encoding="utf-8", newline="") as file:
            return [(row["step"], row["loss"], row["val_loss"]) for row in csv.DictReader(file)]

    def latest(self, stage: str) -> dict[str, Any]:
        return torch.load(self.folder / "checkpoints" / stage / "latest.pt", weights_only=True)


@pytest.fixture(scope="module")
def v4_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    write_v4_hub(root, documents=600)
    return root


@pytest.fixture(scope="module")
def undisturbed(
    server: ForkServerContext, v4_hub: Path, tmp_path_factory: pytest.TempPathFactory
) -> Pipeline:
    with HubServer(v4_hub, gated={GATED}) as hub:
        return Pipeline(server, tmp_path_factory.mktemp("undisturbed"), hub)


# ------------------------------------------------------------------------------- the stages


def test_all_stages_of_v4_run_on_the_hubs_data_sets(undisturbed: Pipeline) -> None:
    for log, folder in zip(LOGS, FOLDERS, strict=True):
        steps = 4 if log == LOGS[0] else 3
        assert [step for step, _, _ in undisturbed.losses(log)] == [
            str(step) for step in range(1, steps + 1)
        ]
        assert undisturbed.latest(folder)["step"] == steps


def test_no_stage_reads_again_what_the_stage_before_has_read(undisturbed: Pipeline) -> None:
    sources = [undisturbed.latest(folder)["data"]["sources"] for folder in FOLDERS[:3]]
    places = [{name: lanes[0] for name, lanes in source.items()} for source in sources]
    for source in ("fineweb_edu", "dclm"):
        numbers = [place[source]["documents"]["number"] for place in places]
        assert 0 < numbers[0] < numbers[1] < numbers[2]


def test_the_same_run_with_a_fifth_of_all_requests_failing_is_the_same_run(
    server: ForkServerContext, v4_hub: Path, undisturbed: Pipeline, tmp_path: Path
) -> None:
    with HubServer(v4_hub, gated={GATED}) as hub:
        hub.failures = in_turn(["503", "cut", "reset", "stall"], every=5)
        hub.stall_seconds = 3
        disturbed = Pipeline(server, tmp_path, hub)
        failed = Counter(status for _, _, status in hub.requests if status in KINDS)
        assert min(failed[kind] for kind in KINDS) >= 10
        assert sum(failed.values()) >= len(hub.requests) // 5
    for log, folder in zip(LOGS, FOLDERS, strict=True):
        assert disturbed.losses(log) == undisturbed.losses(log)
        mine, expected = disturbed.latest(folder), undisturbed.latest(folder)
        assert mine["data"] == expected["data"]
        for name, weight in expected["model"].items():
            assert torch.equal(mine["model"][name], weight)
    for side in ("train", "validation"):
        path = Path("data/sft") / f"{side}.jsonl"
        assert (disturbed.folder / path).read_bytes() == (undisturbed.folder / path).read_bytes()


# ------------------------------------------------------------------------------- killed


def read_sequences(raw: dict[str, Any]) -> None:
    """Draw the sequences of a mix through two epochs, and note each with the state after it.

    A process that is started again goes on after the last whole line of the notebook.
    """
    from hamner import tokenization
    from hamner.batches import MixedBatches
    from hamner.stage import open_tokens

    recipe = check_recipe(raw, "test")
    tokenizer = tokenization.from_path(Path("tokenizer.json"))
    state = notes(Path("notebook.jsonl"))[-1]["state"]
    mix = MixedBatches(
        {
            name: {0: open_tokens(name, recipe, tokenizer, state["sources"].get(name))}
            for name in SOURCES
        },
        dict.fromkeys(SOURCES, 0.5),
        sequence_length=64,
        sequences_per_step=1,
        micro_batch=1,
        drawn=state["drawn"],
    )
    with open("notebook.jsonl", "a", encoding="utf-8") as file:
        for batch in mix:
            ids = batch.micro_batches[0]["input_ids"][0].tolist()
            places = {name: lanes[0] for name, lanes in batch.state["sources"].items()}
            state = {"sources": places, "drawn": batch.state["drawn"]}
            print("", file=file)  # ends a line that a killed process left unfinished
            print(json.dumps({"ids": ids, "state": state}), file=file, flush=True)
            time.sleep(0.002)
            if min(place["documents"]["epoch"] for place in places.values()) >= 2:
                break
    mix.close()


SOURCES = ("web", "books")
EMPTY = {"ids": [], "state": {"sources": {}, "drawn": dict.fromkeys(SOURCES, 0)}}


def notes(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a notebook, after one for the beginning."""
    found = [EMPTY]
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found += [json.loads(line)] if line else []
        except json.JSONDecodeError:
            continue  # its process was killed while writing it
    return found


def documents_read(tokenizer: Tokenizer, lines: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What the sequences of each source hold, document by document; the unfinished last one not."""
    tokens: dict[str, list[int]] = {name: [] for name in SOURCES}
    for before, line in itertools.pairwise(lines):
        (name,) = (n for n in SOURCES if line["state"]["drawn"][n] > before["state"]["drawn"][n])
        tokens[name] += line["ids"]
    found: dict[str, list[str]] = {}
    for name, ids in tokens.items():
        ends = [i for i, id_ in enumerate(ids) if id_ == tokenizer.end_of_text]
        starts = [0, *(end + 1 for end in ends)]
        found[name] = [tokenizer.decode(ids[a:b]) for a, b in zip(starts, ends, strict=False)]
    return found


@pytest.mark.parametrize("kind", ["hub", "files", "mirror"])
def test_killed_five_times_no_document_is_lost_and_none_comes_twice(
    server: ForkServerContext, raw: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    root = tmp_path / "hub"
    write_v4_hub(root, documents=150)
    tokenizer_file = root / "models/HuggingFaceTB/cosmo2-tokenizer/tokenizer.json"
    shutil.copy(tokenizer_file, tmp_path)
    if kind != "files":
        sources = load_recipe("v4").model_dump()["sources"]
        raw["sources"]["web"] = {**sources["fineweb_edu"], "shuffle_block": 20}
        raw["sources"]["books"] = {**sources["dclm"], "shuffle_block": 20}
    raw["mirror"] = str(root / "datasets") if kind == "mirror" else None
    raw["read_ahead"] = 3_000
    rng = random.Random(kind)
    with HubServer(root) as hub:
        hub.down = kind != "hub"
        environment = hub.environment(tmp_path / "home")
        work = functools.partial(read_sequences, raw)
        for kill in range(6):
            child = server.Process(target=in_child, args=(str(tmp_path), environment, work))
            child.start()
            if kill < 5:
                wanted = len(notes(tmp_path / "notebook.jsonl")) + rng.randint(5, 60)
                while len(notes(tmp_path / "notebook.jsonl")) < wanted and child.is_alive():
                    time.sleep(rng.random() / 50)
                child.kill()
            child.join(60)
            assert child.exitcode == (-9 if kill < 5 else 0), (tmp_path / "output").read_text()
    tokenizer = tokenization.from_path(tokenizer_file)
    read = documents_read(tokenizer, notes(tmp_path / "notebook.jsonl"))
    recipe = check_recipe(raw, "test")
    with HubServer(root):
        for name in SOURCES:
            expected = documents_of(recipe, name, root)
            times = Counter(read[name][: 2 * len(expected)])
            assert set(times) == expected
            assert set(times.values()) == {2}
            assert set(read[name][: len(expected)]) == expected
            assert read[name][: len(expected)] != read[name][len(expected) : 2 * len(expected)]


def documents_of(recipe: Recipe, name: str, root: Path) -> set[str]:
    """The training documents of a source, read from a mirror or from files."""
    mirrored = recipe.model_copy(update={"mirror": str(root / "datasets")})
    return {str(document) for document in open_stream(name, mirrored).one_epoch()}


# ------------------------------------------------------------------------------- the mix


def test_the_shares_of_the_mix_are_those_of_v4_within_a_percent(
    v4_hub: Path, tmp_path: Path
) -> None:
    """Over 2,000 sequences of each stage, measured by the documents they hold."""
    recipe = load_recipe("v4", [f"mirror={v4_hub / 'datasets'}", f"data_dir={tmp_path}"])
    own_files(tmp_path)
    tokenizer = tokenization.from_path(v4_hub / "models/HuggingFaceTB/cosmo2-tokenizer")
    marks = {
        "fineweb-edu": "fineweb_edu", "dclm": "dclm", "starcoderdata": "code",
        "finemath": "math", "smoltalk": "smoltalk",
    }  # fmt: skip
    for stage in ("base", "anneal", "chat"):
        settings = recipe.stage(stage)
        assert isinstance(settings, StreamStage)
        names = [source.name for source in settings.sources]
        mix = MixedBatches(
            {name: {0: open_tokens(name, recipe, tokenizer, None)} for name in names},
            {source.name: source.weight for source in settings.sources},
            sequence_length=256,
            sequences_per_step=20,
            micro_batch=20,
        )
        counted: Counter[str] = Counter()
        for _ in range(100):
            for ids in next(mix).micro_batches[0]["input_ids"]:
                text = tokenizer.decode(ids.tolist())
                found = {name for mark, name in marks.items() if mark in text}
                counted[found.pop() if len(found) == 1 else "other"] += 1
        mix.close()
        assert sum(counted.values()) == 2_000
        for source in settings.sources:
            if source.name in marks.values():
                assert abs(counted[source.name] / 2_000 - source.weight) < 0.015, (stage, counted)
