"""Tests of the loopback hub: what the real clients read through it, and how it fails when told."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import fsspec.compression
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hub_server import (
    EXPIRED_TOKEN,
    GOOD_TOKEN,
    HubServer,
    Row,
    Writer,
    in_turn,
    snapshot,
    use_hub,
    write_v4_hub,
)
from huggingface_hub import HfApi, constants, errors

from hamner import tokenization

FINEWEB, DCLM = "HuggingFaceFW/fineweb-edu", "mlfoundations/dclm-baseline-1.0"
STARCODER, FINEMATH = "bigcode/starcoderdata", "HuggingFaceTB/finemath"
SMOLTALK, ULTRAFEEDBACK = "HuggingFaceTB/smoltalk", "HuggingFaceH4/ultrafeedback_binarized"
CODEPARROT, COSMO2 = "codeparrot/codeparrot-clean", "HuggingFaceTB/cosmo2-tokenizer"
GATED = {STARCODER}
CONFIGS = {FINEWEB: "sample-10BT", FINEMATH: "finemath-4plus", SMOLTALK: "all"}
SPLITS = (
    (FINEWEB, "train"), (DCLM, "train"), (STARCODER, "train"), (FINEMATH, "train"),
    (SMOLTALK, "train"), (SMOLTALK, "test"), (ULTRAFEEDBACK, "train_prefs"),
    (ULTRAFEEDBACK, "test_prefs"), (CODEPARROT, "train"),
)  # fmt: skip
DATA = "sample/10BT/000_00000.parquet"
FILE = f"/datasets/{FINEWEB}/resolve/main/{DATA}"

Rows = dict[tuple[str, str], list[Row]]
Reply = tuple[int, dict[str, str], bytes]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """The repositories of recipes/v4.yaml in a folder, not to be changed; and their rows."""
    root = tmp_path_factory.mktemp("hub")
    return root, write_v4_hub(root)


@pytest.fixture
def hub(written: tuple[Path, Rows]) -> Iterator[HubServer]:
    with HubServer(written[0], GATED) as server:
        yield server


@pytest.fixture
def own_hub(tmp_path: Path) -> Iterator[HubServer]:
    """A hub with one data set, o/d, that a test may change."""
    writer = Writer(tmp_path, rng=None, shards=7, row_groups=2)  # type: ignore[arg-type]
    writer.write("o/d", "train", "part-{i}.jsonl.gz", [{"text": f"d {i:03d}"} for i in range(70)])
    with HubServer(tmp_path) as server:
        yield server


def open_stream(name: str, split: str) -> Any:
    """A data set as recipes/v4.yaml opens it."""
    folder = "python" if name == STARCODER else None
    return datasets.load_dataset(
        name, CONFIGS.get(name), split=split, data_dir=folder, streaming=True
    )


def ask(
    hub: HubServer,
    path: str,
    method: str = "GET",
    token: str = "",
    body: str = "",
    range_: str = "",
) -> Reply:
    """One raw request; status, headers (names in lower case) and body of the reply."""
    headers = {"Range": range_} if range_ else {}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=5)
    try:
        connection.request(method, path, body or None, headers)
        reply = connection.getresponse()
        names = {name.lower(): value for name, value in reply.getheaders()}
        return reply.status, names, reply.read()
    finally:
        connection.close()


def connect(hub: HubServer, path: str = FILE, method: str = "GET") -> socket.socket:
    """A raw connection on which one request was sent."""
    host, port = hub.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=5)
    connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    return connection


def read_until_silence(connection: socket.socket, patience: float) -> tuple[bytes, str]:
    """What came, and how it ended: "closed", "reset", or "silence" while the connection is open."""
    connection.settimeout(patience)
    came = b""
    try:
        while more := connection.recv(1 << 16):
            came += more
    except TimeoutError:
        return came, "silence"
    except ConnectionResetError:
        return came, "reset"
    return came, "closed"


def without_waiting(patch: pytest.MonkeyPatch) -> list[float]:
    """Let the clients' retries come at once; the seconds that each would have slept."""
    slept: list[float] = []
    clock = SimpleNamespace(sleep=slept.append, time=time.time, monotonic=time.monotonic)
    patch.setattr("huggingface_hub.utils._http.time", clock)
    patch.setattr("huggingface_hub.file_download.time", clock)
    patch.setattr("datasets.utils.file_utils.time", clock)
    return slept


def is_data(path: str) -> bool:
    return "/resolve/" in path and not path.endswith((".md", ".py", ".yaml", "infos.json"))


# ------------------------------------------------------------------------------- the real clients


@pytest.mark.parametrize("name, split", SPLITS)
def test_datasets_streams_the_rows_that_were_written(
    name: str, split: str, hub: HubServer, written: tuple[Path, Rows],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    if name == DCLM and "zstd" not in fsspec.compression.compr:
        pytest.skip("`datasets` reads .zst with the package zstandard, which isn't installed")
    use_hub(monkeypatch, hub, tmp_path, token=GOOD_TOKEN)
    stream = open_stream(name, split)
    assert list(stream) == written[1][name, split]
    assert stream.num_shards == 3


def test_the_zstandard_files_hold_the_rows_in_the_order_of_their_names(
    hub: HubServer, written: tuple[Path, Rows], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_hub(monkeypatch, hub, tmp_path)
    files = sorted(f for f in HfApi().list_repo_files(DCLM, repo_type="dataset") if "shard" in f)
    assert all(
        re.fullmatch(r"global-shard_\d+_of_10/local-shard_\d_of_10/shard_\d+_\w+.jsonl.zst", f)
        for f in files
    )
    lines = []
    for file in files:
        path = huggingface_hub.hf_hub_download(DCLM, file, repo_type="dataset")
        with pa.input_stream(path, compression="zstd") as stream:
            lines += stream.read().splitlines()
    assert [json.loads(line) for line in lines] == written[1][DCLM, "train"]


def test_a_process_with_our_environment_asks_only_us(
    hub: HubServer, written: tuple[Path, Rows], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_foreign")
    script = """
import json
from datasets import load_dataset
from hamner.tokenization import from_hub
rows = load_dataset("bigcode/starcoderdata", data_dir="python", split="train", streaming=True)
print(json.dumps([from_hub("HuggingFaceTB/cosmo2-tokenizer").vocab_size, list(rows)]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], env=hub.environment(tmp_path, GOOD_TOKEN), cwd=ROOT,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == [400, written[1][STARCODER, "train"]]
    statuses = {status for _, _, status in hub.requests}
    assert statuses <= {200, 206, 404}
    assert (tmp_path / "hub").is_dir()  # its cache


def test_the_tokenizer_is_fetched_and_knows_the_texts(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_hub(monkeypatch, hub, tmp_path)
    tokenizer = tokenization.from_hub(COSMO2)
    assert tokenizer.vocab_size == 400
    assert len(list((tmp_path / "hub").rglob("tokenizer.json"))) == 1  # the cache is ours
    text = "fineweb-edu 00017 water light"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < len(text) * 0.7  # trained on these words
    assert [(m, p.rpartition("/")[2], s) for m, p, s in hub.requests] == [
        ("HEAD", "tokenizer.json", 200), ("GET", "tokenizer.json", 200)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "token, said",
    [("", "You must be authenticated"), ("hf_other", f"datasets/{STARCODER} to ask for access")],
)
def test_a_gated_data_set_is_refused_without_its_token(
    token: str, said: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_hub(monkeypatch, hub, tmp_path, token=token)
    with pytest.raises(datasets.exceptions.DatasetNotFoundError, match="gated dataset") as caught:
        open_stream(STARCODER, "train")
    assert said in str(caught.value)
    with pytest.raises(errors.GatedRepoError, match="is restricted"):
        HfApi().auth_check(STARCODER, repo_type="dataset")
    assert HfApi().dataset_info(STARCODER).gated == "auto"  # the info is public


def test_unknown_names_are_refused_as_the_hub_does(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_hub(monkeypatch, hub, tmp_path)
    with pytest.raises(datasets.exceptions.DatasetNotFoundError, match="doesn't exist"):
        datasets.load_dataset("no/such", streaming=True)
    with pytest.raises(ValueError, match=r"'sample-11BT' not found\. Available"):
        datasets.load_dataset(FINEWEB, "sample-11BT", streaming=True)
    with pytest.raises(ValueError, match="Bad split: validation"):
        open_stream(FINEWEB, "validation")
    with pytest.raises(datasets.exceptions.DatasetNotFoundError, match="Revision 'v9'"):
        datasets.load_dataset(FINEWEB, "sample-10BT", revision="v9", streaming=True)
    with pytest.raises(errors.RepositoryNotFoundError):
        HfApi().auth_check("no/such", repo_type="dataset")
    with pytest.raises(errors.RemoteEntryNotFoundError):
        huggingface_hub.hf_hub_download(COSMO2, "merges.txt")


def test_a_stream_survives_failures_of_every_kind(
    hub: HubServer, written: tuple[Path, Rows], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_hub(monkeypatch, hub, tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    without_waiting(monkeypatch)
    stream = open_stream(FINEWEB, "train")
    before = len(hub.requests)
    kinds = ["503", "cut", "reset", "stall", "timeout", "429", "500", "502"]
    hub.failures = lambda n, method, path: in_turn(kinds, every=2)(n - before, method, path)
    for _ in range(3):  # three files, twice as many requests
        assert list(stream) == written[1][FINEWEB, "train"]
    failed = [status for _, _, status in hub.requests[before:] if status != 206]
    assert set(failed) == set(kinds)


def test_a_listing_comes_in_pages_and_one_that_broke_can_be_asked_for_anew(
    own_hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_hub(monkeypatch, own_hub, tmp_path / "home")
    without_waiting(monkeypatch)
    own_hub.repositories.page_size = 3
    own_hub.failures = lambda n, method, path: "503" if "cursor=6" in path else None
    with pytest.raises(errors.HfHubHTTPError, match="503"):
        datasets.load_dataset("o/d", split="train", streaming=True)
    own_hub.failures = None
    use_hub(monkeypatch, own_hub, tmp_path / "home")  # or the pages that came would be the whole
    rows = list(datasets.load_dataset("o/d", split="train", streaming=True))
    assert [row["text"] for row in rows] == [f"d {i:03d}" for i in range(70)]


# ------------------------------------------------------------------------------- the API, raw


@pytest.mark.parametrize(
    "asked, first, last",
    [
        ("bytes=0-0", 0, 0),
        ("bytes=10-19", 10, 19),
        ("bytes=10-", 10, None),
        ("bytes=-7", -7, None),
        ("bytes=100-99999999", 100, None),
        ("bytes=-99999999", 0, None),
    ],
)
def test_a_range_gives_those_bytes(
    asked: str, first: int, last: int | None, hub: HubServer, written: tuple[Path, Rows]
) -> None:
    whole = (written[0] / "datasets" / FINEWEB / DATA).read_bytes()
    status, headers, body = ask(hub, FILE, range_=asked)
    expected = whole[first : None if last is None else last + 1]
    start = first % len(whole)
    assert (status, body) == (206, expected)
    assert headers["content-range"] == f"bytes {start}-{start + len(body) - 1}/{len(whole)}"
    assert headers["content-length"] == str(len(expected))


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=-0", "bytes=20-10"])
def test_a_range_outside_the_file_is_refused(
    asked: str, hub: HubServer, written: tuple[Path, Rows]
) -> None:
    size = (written[0] / "datasets" / FINEWEB / DATA).stat().st_size
    status, headers, body = ask(hub, FILE, range_=asked)
    assert (status, headers["content-range"], body) == (416, f"bytes */{size}", b"")


@pytest.mark.parametrize("asked", ["", "bytes=-", "lines=1-2", "bytes=0-1,4-5"])
def test_what_isnt_a_single_range_gives_the_whole_file(
    asked: str, hub: HubServer, written: tuple[Path, Rows]
) -> None:
    whole = (written[0] / "datasets" / FINEWEB / DATA).read_bytes()
    assert ask(hub, FILE, range_=asked)[::2] == (200, whole)
    assert hub.body_bytes == len(whole)


def test_a_head_has_the_headers_of_its_get_and_no_body(
    hub: HubServer, written: tuple[Path, Rows]
) -> None:
    size = str((written[0] / "datasets" / FINEWEB / DATA).stat().st_size)
    status, head, body = ask(hub, FILE, "HEAD")
    got = ask(hub, FILE)[1]
    assert (status, body, hub.body_bytes) == (200, b"", int(size))  # of the GET
    assert {k: v for k, v in head.items() if k != "date"} == {
        k: v for k, v in got.items() if k != "date"
    }
    assert (head["content-length"], head["x-linked-size"]) == (size, size)
    assert (head["accept-ranges"], head["x-repo-commit"]) == ("bytes", hub.sha(FINEWEB))
    assert re.fullmatch('"[0-9a-f]{40}"', head["etag"])
    other = ask(hub, FILE.replace("000_00000", "001_00000"), "HEAD")[1]
    assert other["etag"] != head["etag"]


def test_one_connection_serves_many_requests(hub: HubServer) -> None:
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=5)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for _ in range(3):
        connection.request("POST", f"/api/datasets/{FINEWEB}/paths-info/main", "paths=data", form)
        assert json.loads(connection.getresponse().read())[0]["type"] == "directory"
        connection.request("GET", f"/api/datasets/{FINEWEB}")
        assert json.loads(connection.getresponse().read())["id"] == FINEWEB
        mine = connection.sock
    assert connection.sock is mine is not None
    connection.close()


@pytest.mark.parametrize(
    "path, token, status, code",
    [
        ("/api/datasets/no/such", "", 401, "RepoNotFound"),
        ("/api/datasets/no/such", "hf_other", 404, "RepoNotFound"),
        ("/datasets/no/such/resolve/main/a", "hf_other", 404, "RepoNotFound"),
        (f"/datasets/../{FINEWEB}/resolve/main/a", "hf_other", 404, None),
        ("/datasets/../models/resolve/main/a", "hf_other", 404, "RepoNotFound"),
        (f"/{FINEWEB}/resolve/main/{DATA}", "hf_other", 404, "RepoNotFound"),  # not a model
        (f"/api/datasets/{FINEWEB}/revision/v9", "", 404, "RevisionNotFound"),
        (f"/api/datasets/{FINEWEB}/revision/refs%2Fconvert%2Fparquet", "", 404, "RevisionNotFound"),
        (f"/datasets/{FINEWEB}/resolve/{'0' * 40}/{DATA}", "", 404, "RevisionNotFound"),
        (f"/datasets/{FINEWEB}/resolve/main/none.parquet", "", 404, "EntryNotFound"),
        (f"/datasets/{FINEWEB}/resolve/main/sample", "", 404, "EntryNotFound"),
        (f"/api/datasets/{FINEWEB}/tree/main/none", "", 404, "EntryNotFound"),
        (f"/datasets/{STARCODER}/resolve/main/README.md", "", 401, "GatedRepo"),
        (f"/datasets/{STARCODER}/resolve/main/README.md", "hf_other", 403, "GatedRepo"),
        (f"/datasets/{STARCODER}/resolve/main/README.md", EXPIRED_TOKEN, 401, None),
        (f"/api/datasets/{STARCODER}/auth-check", "", 401, "GatedRepo"),
        (f"/api/datasets/{STARCODER}/auth-check", GOOD_TOKEN, 200, None),
        (f"/api/datasets/{STARCODER}/tree/main", "", 200, None),
        (f"/api/datasets/{FINEWEB}/auth-check", "", 200, None),
        (f"/api/datasets/{FINEWEB}/commits/main", "", 404, None),
        (f"/api/resolve-cache/datasets/{FINEWEB}/main/README.md", "", 404, None),
        ("/info?dataset=" + FINEWEB, "", 404, None),
        ("/api/whoami-v2", GOOD_TOKEN, 404, None),
    ],
)
def test_errors_carry_the_code_that_tells_what_is_missing(
    path: str, token: str, status: int, code: str | None, hub: HubServer
) -> None:
    got, headers, body = ask(hub, path, token=token)
    assert (got, headers.get("x-error-code")) == (status, code)
    if status != 200:
        assert json.loads(body) == {"error": headers["x-error-message"]}
    assert hub.requests == [("GET", path, status)]


def test_trees_and_paths_as_the_client_reads_them(
    hub: HubServer, written: tuple[Path, Rows], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_hub(monkeypatch, hub, tmp_path)
    api, folder = HfApi(), written[0] / "datasets" / FINEWEB
    here = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    hub.repositories.page_size = 2
    tree = list(api.list_repo_tree(FINEWEB, repo_type="dataset", recursive=True, expand=True))
    files = {entry.path: entry.size for entry in tree if hasattr(entry, "size")}
    folders = {entry.path for entry in tree if not hasattr(entry, "size")}
    assert files == here
    assert folders == {"data", "data/CC-MAIN-2013-20", "sample", "sample/10BT"}
    assert {entry.last_commit.oid for entry in tree} == {hub.sha(FINEWEB)}
    assert len([path for _, path, _ in hub.requests if "/tree/" in path]) == (len(tree) + 1) // 2
    top = {e.path: e.last_commit for e in api.list_repo_tree(FINEWEB, repo_type="dataset")}
    assert top == {"README.md": None, "data": None, "sample": None}
    below = api.list_repo_tree(FINEWEB, "sample", repo_type="dataset")
    assert [entry.path for entry in below] == ["sample/10BT"]
    infos = api.get_paths_info(FINEWEB, [DATA, "sample", "none"], repo_type="dataset")
    assert [info.path for info in infos] == [DATA, "sample"]
    assert infos[0].blob_id == ask(hub, FILE, "HEAD")[1]["etag"].strip('"')
    assert {s.rfilename for s in api.dataset_info(FINEWEB).siblings} == set(here)
    assert api.model_info(COSMO2).sha == hub.sha(COSMO2, "models")


def test_a_changed_folder_is_a_new_commit_and_the_old_one_is_gone_unless_kept(
    own_hub: HubServer, tmp_path: Path
) -> None:
    def get(revision: str) -> Reply:
        return ask(own_hub, f"/datasets/o/d/resolve/{revision}/note.txt")

    note = tmp_path / "datasets" / "o" / "d" / "note.txt"
    shas = []
    for text in ("one", "two", "three!"):
        note.write_text(text, encoding="utf-8")
        shas.append(own_hub.sha("o/d"))
        if text == "two":
            assert own_hub.keep("o/d") == shas[-1]
    assert len(set(shas)) == 3
    assert get("main")[1]["x-repo-commit"] == shas[2]
    assert get("main")[2] == get(shas[2])[2] == b"three!"
    assert get(shas[0])[1]["x-error-code"] == "RevisionNotFound"
    kept = get(shas[1])
    assert (kept[2], kept[1]["x-repo-commit"]) == (b"two", shas[1])


# ------------------------------------------------------------------------------- failures, raw


@pytest.mark.parametrize("status", ["429", "500", "502", "503", "504"])
def test_a_status_is_answered_in_place_of_the_answer(status: str, hub: HubServer) -> None:
    hub.failures = lambda n, method, path: status if n else None
    assert ask(hub, FILE)[0] == 200
    got, headers, body = ask(hub, FILE)
    assert (got, "retry-after" in headers) == (int(status), False)
    assert b"PAR1" not in body
    hub.retry_after = 7
    assert ask(hub, FILE, "HEAD")[1]["retry-after"] == "7"
    assert [entry[2] for entry in hub.requests] == [200, status, status]


def test_cut_sends_half_of_what_its_headers_promise_and_closes(
    hub: HubServer, written: tuple[Path, Rows]
) -> None:
    whole = (written[0] / "datasets" / FINEWEB / DATA).read_bytes()
    hub.failures = lambda n, method, path: "cut"
    came, end = read_until_silence(connect(hub), 5)
    head, _, body = came.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert f"Content-Length: {len(whole)}".encode() in head
    assert (body, end) == (whole[: len(whole) // 2], "closed")
    assert hub.body_bytes == len(body)


def test_stall_sends_half_and_falls_silent_until_its_time_is_over(
    hub: HubServer, written: tuple[Path, Rows]
) -> None:
    whole = (written[0] / "datasets" / FINEWEB / DATA).read_bytes()
    hub.failures = lambda n, method, path: "stall"
    hub.stall_seconds = 0.4
    connection = connect(hub)
    came, end = read_until_silence(connection, 0.2)
    assert came.partition(b"\r\n\r\n")[2] == whole[: len(whole) // 2]
    assert end == "silence"
    assert read_until_silence(connection, 5) == (b"", "closed")


def test_timeout_says_nothing_at_all(hub: HubServer) -> None:
    hub.failures = lambda n, method, path: "timeout"
    hub.stall_seconds = 0.4
    connection = connect(hub)
    assert read_until_silence(connection, 0.2) == (b"", "silence")
    assert read_until_silence(connection, 5) == (b"", "closed")


def test_reset_answers_with_rst(hub: HubServer) -> None:
    hub.failures = lambda n, method, path: "reset"
    assert read_until_silence(connect(hub), 5) == (b"", "reset")


@pytest.mark.parametrize("kind, end", [("cut", "closed"), ("stall", "silence")])
def test_what_has_no_body_fails_before_its_headers(kind: str, end: str, hub: HubServer) -> None:
    hub.failures = lambda n, method, path: kind
    assert read_until_silence(connect(hub, method="HEAD"), 0.2) == (b"", end)
    assert hub.requests == [("HEAD", FILE, kind)]


def test_failures_come_in_turn_and_the_log_has_every_request_in_order(hub: HubServer) -> None:
    hub.failures = in_turn(["503", "500"], every=3)
    statuses = [ask(hub, f"/api/datasets/{FINEWEB}?n={n}")[0] for n in range(9)]
    assert statuses == [200, 200, 503, 200, 200, 500, 200, 200, 503]
    assert [(method, path) for method, path, _ in hub.requests] == [
        ("GET", f"/api/datasets/{FINEWEB}?n={n}") for n in range(9)
    ]
    assert [status for *_, status in hub.requests[:3]] == [200, 200, "503"]


def test_requests_from_many_threads_are_numbered_once_each(hub: HubServer) -> None:
    hub.failures = lambda n, method, path: "503" if n % 2 else None
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda n: ask(hub, f"/api/datasets/{FINEWEB}?n={n}"), range(60)))
    assert sorted(status for status, _, _ in replies) == [200] * 30 + [503] * 30
    assert [status for *_, status in hub.requests] == [200, "503"] * 30
    assert {path.partition("=")[2] for _, path, _ in hub.requests} == set(map(str, range(60)))


def test_down_refuses_connections_ends_open_ones_and_comes_back_at_the_same_port(
    hub: HubServer,
) -> None:
    url, served = hub.url, connect(hub)
    assert served.recv(12) == b"HTTP/1.1 200"  # the connection is kept alive
    for _ in range(3):
        hub.down = True
        with pytest.raises(ConnectionRefusedError):
            ask(hub, FILE)
        assert read_until_silence(served, 5)[1] in ("closed", "reset")
        hub.down = False
        assert (hub.url, ask(hub, FILE)[0]) == (url, 200)
    assert len(hub.requests) == 4


@pytest.mark.parametrize("kind", ["stall", "timeout", None])
def test_stopping_ends_handlers_that_wait_at_once(
    kind: str | None, written: tuple[Path, Rows]
) -> None:
    with HubServer(written[0]) as hub:
        hub.failures = lambda n, method, path: kind
        hub.stall_seconds = 1_000
        connections = [connect(hub) for _ in range(5)]
        while len(hub.requests) < 5:
            time.sleep(0.001)
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert all(read_until_silence(c, 5)[1] in ("closed", "reset") for c in connections)
    with pytest.raises(ConnectionRefusedError):
        ask(hub, FILE)


def test_a_mistake_in_a_test_is_raised_when_the_server_stops(written: tuple[Path, Rows]) -> None:
    with pytest.raises(ValueError, match="unknown failure 'cutt'"), HubServer(written[0]) as hub:
        hub.failures = lambda n, method, path: "cutt"
        assert read_until_silence(connect(hub), 5)[1] == "closed"


# ------------------------------------------------------------------------------- what is laid out


def words_of(row: Row) -> str:
    """A row's own text: of a conversation, its first question."""
    for column in ("text", "content", "prompt"):
        if column in row:
            return str(row[column])
    return str(row["messages"][0]["content"])


def test_each_document_says_which_it_is(written: tuple[Path, Rows]) -> None:
    marks = []
    for (name, split), rows in written[1].items():
        assert len(rows) == (3 if "default" in split else 48 if "test" in split else 240)
        for row in rows:
            mark = re.match(r"(?:# )?([\w.-]+ \d{5}) ", words_of(row))
            assert mark, words_of(row)
            assert "of " in split or mark[1].startswith(name.split("/")[1] + " ")
            marks.append(mark[1])
    assert len(marks) == len(set(marks))
    for chosen in written[1][ULTRAFEEDBACK, "train_prefs"]:
        assert chosen["rejected"][-1] != chosen["chosen"][-1]


def test_sizes_and_seed_decide_what_is_written(tmp_path: Path) -> None:
    def sha(folder: str, seed: int) -> str:
        write_v4_hub(tmp_path / folder, documents=30, shards=2, row_groups=5, seed=seed)
        return snapshot(tmp_path / folder / "datasets" / FINEWEB).sha

    assert sha("a", 1) == sha("b", 1) != sha("c", 2)
    files = sorted((tmp_path / "a" / "datasets" / FINEWEB / "sample" / "10BT").iterdir())
    assert [file.name for file in files] == ["000_00000.parquet", "001_00000.parquet"]
    metadata = pq.read_metadata(files[0])
    assert (metadata.num_rows, metadata.num_row_groups) == (15, 5)
    names = sorted(p.name for p in (tmp_path / "a" / "datasets" / CODEPARROT).iterdir())
    assert names == ["file-000000000001.json.gz", "file-000000000002.json.gz"]
