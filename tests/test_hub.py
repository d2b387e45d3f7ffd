"""Tests of the hub's data sets: order, exact resuming, a failing network, the mirror, refusals.

The real `datasets` client asks a server on the loopback interface that speaks the hub's API.
"""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, in_turn, use_hub, write_v4_hub

from hamner import hub as hub_module
from hamner.errors import UserError
from hamner.hub import Hub
from hamner.recipe import HubSource, Recipe, load_recipe
from hamner.sources import check_sources, open_source, open_stream
from hamner.stage import check_needs, open_tokenizer

GATED = "bigcode/starcoderdata"
NAMES = (
    "fineweb_edu", "dclm", "code", "code_ungated", "math", "smoltalk", "ultrafeedback",
    "ultrafeedback_test",
)  # fmt: skip
DOCUMENTS = 90


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, list[Any]]]:
    """The folder of the hub's repositories, and the rows of each (data set, split)."""
    root = tmp_path_factory.mktemp("hub")
    return root, write_v4_hub(root, documents=DOCUMENTS)


class Sleepless:
    """The module `time`, whose sleep takes none: the client waits between tries of its own."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, 0.01))


@pytest.fixture
def hub(
    written: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HubServer]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.5)
    monkeypatch.setattr("huggingface_hub.constants.DEFAULT_REQUEST_TIMEOUT", 0.5)
    monkeypatch.setattr(hub_module, "REQUEST_WAITS", (0.0, 0.0))
    monkeypatch.setattr("huggingface_hub.utils._http.time", Sleepless())
    hub_module.load_dataset.cache_clear()
    hub_module.prepare_client()  # else the first test of a process would have the client's patience
    with HubServer(written[0], gated={GATED}) as server:
        server.stall_seconds = 3
        use_hub(monkeypatch, server, tmp_path / "home", token="hf_good")
        yield server


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("v4")


def json_round_trip(value: Any) -> Any:
    return json.loads(json.dumps(value))


def texts_of(rows: Any, column: str) -> list[str]:
    return [json.dumps(row[column]) for row, _ in rows]


def all_rows(source: Any, epoch: int = 0) -> list[tuple[Any, Any]]:
    return list(source.rows(epoch, None))


def patient(name: str, recipe: Recipe, **settings: Any) -> Hub:
    """A source of v4 whose waits are short."""
    source = open_source(name, recipe)
    assert isinstance(source, Hub)
    source.longest_wait = 0.05
    for key, value in settings.items():
        setattr(source, key, value)
    return source


# ------------------------------------------------------------------------------- order and place


@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_a_data_set_of_v4_comes_once_an_epoch_in_another_order_each_time(
    hub: HubServer, written: tuple[Path, Any], recipe: Recipe, name: str
) -> None:
    spec = recipe.sources[name]
    assert isinstance(spec, HubSource)
    rows = written[1][spec.dataset, spec.split]
    expected = [json.dumps(row[spec.column]) for row in rows]
    orders = [texts_of(all_rows(open_source(name, recipe), epoch), spec.column) for epoch in (0, 1)]
    assert expected
    for order in orders:
        assert sorted(order) == sorted(expected)
    assert orders[0] != orders[1] != expected


def test_the_order_depends_on_the_seed(hub: HubServer, recipe: Recipe) -> None:
    other = load_recipe("v4", ["seed=43"])
    orders = [texts_of(all_rows(open_source("math", r)), "text") for r in (recipe, other, recipe)]
    assert orders[0] != orders[1] and orders[0] == orders[2]


@pytest.mark.parametrize("name", ["fineweb_edu", "dclm", "smoltalk", "code_ungated"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_data_set_is_resumed_exactly_again_and_again(
    hub: HubServer, recipe: Recipe, name: str, epoch: int
) -> None:
    column = recipe.sources[name].column
    expected = texts_of(all_rows(open_source(name, recipe), epoch), column)
    rng, found, position = random.Random(name), [], None
    while len(found) < len(expected):
        rows = islice(open_source(name, recipe).rows(epoch, position), rng.randint(1, 25))
        for row, position in rows:  # noqa: B007  the last one counts
            found.append(json.dumps(row[column]))
        position = json_round_trip(position)
    assert found == expected
    assert list(open_source(name, recipe).rows(epoch, position)) == []


def test_resuming_in_the_middle_of_a_parquet_file_reads_its_row_group_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    write_v4_hub(tmp_path, documents=4_000, shards=1, row_groups=20)
    hub_module.load_dataset.cache_clear()
    with HubServer(tmp_path) as server:
        use_hub(monkeypatch, server, tmp_path / "home")
        rows = all_rows(open_source("fineweb_edu", recipe))
        whole = server.body_bytes
        next(open_source("fineweb_edu", recipe).rows(0, rows[3_500][1]))
        assert server.body_bytes - whole < whole / 4


def test_a_run_stays_with_the_commit_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    write_v4_hub(tmp_path, documents=60)
    hub_module.load_dataset.cache_clear()
    with HubServer(tmp_path) as server:
        use_hub(monkeypatch, server, tmp_path / "home")
        rows = all_rows(open_source("math", recipe))
        server.keep("HuggingFaceTB/finemath")
        for path in (tmp_path / "datasets/HuggingFaceTB/finemath").rglob("*00000-of*.parquet"):
            path.unlink()
        rest = list(open_source("math", recipe).rows(0, json_round_trip(rows[9][1])))
        assert rest == rows[10:]
        assert len(all_rows(open_source("math", recipe))) < len(rows)


def test_a_revision_can_be_asked_for(hub: HubServer, recipe: Recipe) -> None:
    sha = hub.sha("HuggingFaceTB/finemath")
    pinned = load_recipe("v4", [f"sources.math.revision='{sha}'"])
    assert all_rows(open_source("math", pinned)) == all_rows(open_source("math", recipe))
    lost = load_recipe("v4", ["sources.math.revision='" + "0" * 40 + "'"])
    with pytest.raises(UserError, match="has no revision '0000"):
        all_rows(patient("math", lost, tries=0))


# ------------------------------------------------------------------------------- a failing network


@pytest.mark.parametrize("name", ["fineweb_edu", "dclm", "code_ungated"])
def test_rows_are_the_same_when_a_fifth_of_all_requests_fails(
    hub: HubServer, recipe: Recipe, name: str
) -> None:
    expected = [all_rows(open_source(name, recipe), epoch) for epoch in range(5)]
    hub_module.load_dataset.cache_clear()
    hub.failures = in_turn(["503", "cut", "reset", "stall"], every=5)
    began = len(hub.requests)
    assert [all_rows(patient(name, recipe), epoch) for epoch in range(5)] == expected
    failures = [status for _, _, status in hub.requests[began:] if isinstance(status, str)]
    assert set(failures) == {"503", "cut", "reset", "stall"}
    assert len(failures) >= (len(hub.requests) - began) // 5


@pytest.mark.parametrize("name", ["fineweb_edu", "dclm"])
def test_a_stream_goes_on_at_its_place_after_the_network_was_gone(
    hub: HubServer, recipe: Recipe, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    expected = all_rows(open_source(name, recipe))
    source = patient(name, recipe, longest_wait=0.2)
    rows = source.rows(0, None)
    found = list(islice(rows, 20))
    hub.down = True
    threading.Timer(2.0, lambda: setattr(hub, "down", False)).start()
    found += rows
    assert found == expected
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2, told
    assert told[0].startswith(f"source '{name}': ") and "trying again" in told[0]
    assert told[1].startswith(f"source '{name}': goes on after ")


def test_a_list_of_files_that_was_cut_short_is_not_taken_for_the_whole(
    hub: HubServer, recipe: Recipe
) -> None:
    """The client keeps what it has listed, and would go on with the half of it."""
    expected = all_rows(open_source("dclm", recipe))
    hub.repositories.page_size = 2
    hub_module.load_dataset.cache_clear()
    broken = iter(range(7))  # more often than a request is tried again

    def later_pages_break(number: int, method: str, path: str) -> str | None:
        return "503" if "cursor=" in path and next(broken, None) is not None else None

    hub.failures = later_pages_break
    assert all_rows(patient("dclm", recipe)) == expected
    assert next(broken, None) is None


def test_a_list_of_files_that_never_comes_is_asked_for_again(
    hub: HubServer, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client would wait for it without end."""
    expected = all_rows(open_source("dclm", recipe))
    monkeypatch.setattr(hub_module, "REQUEST_SECONDS", 0.3)
    hub_module.load_dataset.cache_clear()
    hub.stall_seconds = 30
    once = iter([1])
    hub.failures = lambda number, method, path: (
        "timeout" if "/tree/" in path and next(once, None) else None
    )
    begin = time.monotonic()
    assert all_rows(patient("dclm", recipe)) == expected
    assert next(once, None) is None and time.monotonic() - begin < 20


@pytest.mark.parametrize("failure", ["503", "cut", "reset", "timeout"])
def test_a_tokenizer_that_can_not_be_fetched_is_told_in_one_sentence(
    hub: HubServer, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    monkeypatch.setattr(hub_module, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.3)
    hub.failures = lambda number, method, path: failure if "tokenizer" in path else None
    with pytest.raises(UserError) as caught:
        open_tokenizer(recipe)
    message = str(caught.value)
    assert message.startswith("tokenizer 'HuggingFaceTB/cosmo2-tokenizer' can't be fetched")
    assert "\n" not in message


def test_patience_ends_in_one_sentence(hub: HubServer, recipe: Recipe) -> None:
    hub.down = True
    with pytest.raises(UserError) as caught:
        all_rows(patient("math", recipe, patience=0.3))
    message = str(caught.value)
    assert message.startswith("source 'math': can't reach HuggingFaceTB/finemath on the hub (")
    assert "mirror" in message and "\n" not in message


def test_the_waits_double_up_to_the_longest(
    hub: HubServer, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.down = True
    source, waits = patient("math", recipe, patience=60.0, longest_wait=300.0), []
    clock = iter(range(1_000))

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 12:
            source.close()

    monkeypatch.setattr(source.stopped, "wait", wait)
    monkeypatch.setattr(hub_module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(hub_module.time, "sleep", lambda seconds: None)
    assert all_rows(source) == []
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]


def test_a_stream_that_waits_for_the_network_can_be_closed(hub: HubServer, recipe: Recipe) -> None:
    hub.down = True
    source = patient("math", recipe, longest_wait=600.0, patience=3600.0)
    threading.Timer(1.0, source.close).start()
    begin = time.monotonic()
    assert all_rows(source) == []
    assert time.monotonic() - begin < 30


def test_a_file_that_stays_damaged_ends_the_stream_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    write_v4_hub(tmp_path, documents=60)
    for path in (tmp_path / "datasets/HuggingFaceTB/finemath").rglob("*.parquet"):
        path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    hub_module.load_dataset.cache_clear()
    with HubServer(tmp_path) as server:
        use_hub(monkeypatch, server, tmp_path / "home")
        with pytest.raises(UserError, match="source 'math': can't read HuggingFaceTB/finemath"):
            all_rows(patient("math", recipe))


# ------------------------------------------------------------------------------- refusals


def problems_of(overrides: list[str], names: list[str]) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_sources(names, load_recipe("v4", overrides))
    return str(caught.value).split("\n       ")


def test_all_sources_of_v4_pass_the_check(hub: HubServer, recipe: Recipe) -> None:
    check_sources(NAMES, recipe)


def test_all_problems_are_told_at_once_each_with_what_to_do(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    found = problems_of(
        [
            "sources.fineweb_edu.config=sample-1BT",
            "sources.dclm.split=training",
            "sources.math.dataset=HuggingFaceTB/fynemath",
            "sources.smoltalk.column=conversation",
            "sources.code_ungated.data_dir=nowhere",
        ],
        ["fineweb_edu", "dclm", "math", "smoltalk", "code", "code_ungated", "ultrafeedback"],
    )
    expected = {
        "fineweb_edu": "'sample-1BT' not found. Available: ['default', 'sample-10BT']",
        "dclm": "Bad split: training. Available splits: ['train']",
        "math": "there is no data set 'HuggingFaceTB/fynemath' on the hub",
        "smoltalk": "no text or messages in column 'conversation'; they have messages, source",
        "code": f"is gated: accept its terms at https://huggingface.co/datasets/{GATED}, then "
        "`hf auth login`",
        "code_ungated": "doesn't contain any data files",
    }
    assert len(found) == len(expected)
    for line, (name, said) in zip(found, expected.items(), strict=True):
        assert line.startswith(f"source {name!r}: "), line
        assert said in line


def test_the_first_stage_tells_what_a_later_one_will_want(
    hub: HubServer, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    check_needs("base", recipe, new=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("a later stage will need this: source 'code': ")
    assert "accept its terms" in line


def test_what_a_stage_wants_is_told_with_the_tokenizer_at_once(hub: HubServer) -> None:
    overrides = ["tokenizer.hub=HuggingFaceTB/cosmo3", "sources.dclm.split=training"]
    with pytest.raises(UserError) as caught:
        check_needs("base", load_recipe("v4", overrides), new=True)
    lines = str(caught.value).split("\n")
    assert len(lines) == 2
    assert "source 'dclm'" in lines[0] and "tokenizer 'HuggingFaceTB/cosmo3'" in lines[1]


def test_the_mirror_may_hold_the_tokenizer_too(
    written: tuple[Path, Any], tmp_path: Path, hub: HubServer
) -> None:
    shutil.copytree(written[0] / "datasets", tmp_path / "mirror")
    shutil.copytree(written[0] / "models", tmp_path / "mirror", dirs_exist_ok=True)
    hub.down = True
    check_needs("base", load_recipe("v4", [f"mirror={tmp_path / 'mirror'}"]), new=True)


def test_an_unreachable_hub_is_told_soon(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "CHECK_SECONDS", 0.2)
    hub.down = True
    begin = time.monotonic()
    found = problems_of([], list(NAMES))
    assert time.monotonic() - begin < 30
    assert len(found) == len(NAMES)
    assert all("can't reach" in line for line in found)


# ------------------------------------------------------------------------------- the mirror


@pytest.mark.parametrize("name", NAMES)
def test_a_mirror_gives_the_rows_of_the_hub_in_their_order_without_a_network(
    hub: HubServer, written: tuple[Path, Any], recipe: Recipe, name: str
) -> None:
    column = recipe.sources[name].column
    expected = [texts_of(all_rows(open_source(name, recipe), epoch), column) for epoch in (0, 1)]
    hub.down = True
    mirrored = load_recipe("v4", [f"mirror={written[0] / 'datasets'}"])
    for epoch, rows in enumerate(expected):
        assert texts_of(all_rows(open_source(name, mirrored), epoch), column) == rows


def test_a_run_can_go_on_from_the_hub_to_a_mirror(
    hub: HubServer, written: tuple[Path, Any], recipe: Recipe
) -> None:
    rows = all_rows(open_source("dclm", recipe))
    mirrored = load_recipe("v4", [f"mirror={written[0] / 'datasets'}"])
    rest = open_source("dclm", mirrored).rows(0, json_round_trip(rows[40][1]))
    assert texts_of(rest, "text") == texts_of(rows[41:], "text")


def test_a_folder_that_the_mirror_lacks_is_named_with_the_command_to_fill_it(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError) as caught:
        all_rows(open_source("math", load_recipe("v4", [f"mirror={tmp_path}"])))
    folder = tmp_path / "HuggingFaceTB/finemath"
    assert str(caught.value) == (
        f"source 'math': the mirror has no folder {folder}; fill it with `hf download "
        f"HuggingFaceTB/finemath --repo-type dataset --local-dir {folder}`, or with a part of it: "
        "README.md says how"
    )


def test_a_run_does_not_go_on_in_a_data_set_with_other_files(
    written: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copytree(written[0] / "datasets", tmp_path / "mirror")
    mirrored = load_recipe("v4", [f"mirror={tmp_path / 'mirror'}"])
    hub_module.load_dataset.cache_clear()
    rows = all_rows(open_source("math", mirrored))
    next((tmp_path / "mirror/HuggingFaceTB/finemath/finemath-4plus").glob("*.parquet")).unlink()
    hub_module.load_dataset.cache_clear()
    with pytest.raises(UserError, match="had 3 files when this run began and has 2 now"):
        list(open_source("math", mirrored).rows(0, rows[5][1]))


def test_documents_of_a_mirror_are_shuffled_beyond_the_order_of_their_files(
    written: tuple[Path, Any],
) -> None:
    mirrored = load_recipe("v4", [f"mirror={written[0] / 'datasets'}"])
    stream = open_stream("fineweb_edu", mirrored)
    rows = [row["text"].strip() for row, _ in all_rows(stream.source)]
    documents = list(stream.one_epoch())
    assert set(documents) <= set(rows)
    assert documents != [text for text in rows if text in set(documents)]
