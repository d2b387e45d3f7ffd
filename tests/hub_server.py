"""A loopback server that speaks the Hugging Face hub's HTTP API, and fails as it is told to.

It answers what `datasets` and `huggingface_hub` ask when they stream a data set or fetch a file:
repository info, trees, path info, and files whole or in ranges. A repository is a folder,
`root/datasets/OWNER/NAME` or `root/models/OWNER/NAME`; its commit is a digest of what lies there.

    with HubServer(root, gated={"bigcode/starcoderdata"}) as hub:
        hub.failures = in_turn(["503", "cut", "reset", "stall"], every=5)
        subprocess.run([...], env=hub.environment(home))

`write_v4_hub` lays out small repositories like those that recipes/v4.yaml names.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from hamner import tokenization

GOOD_TOKEN = "hf_good"  # has accepted the terms of every gated repository
EXPIRED_TOKEN = "hf_expired"  # refused everywhere; any other token is valid but on no list
COMMIT_DATE = "2025-01-01T00:00:00.000Z"
KINDS = ("cut", "reset", "stall", "timeout")

Row = dict[str, Any]
Query = dict[str, list[str]]
Failure = str  # one of KINDS, or an HTTP status such as "503"
Failures = Callable[[int, str, str], "Failure | None"]


def in_turn(kinds: Sequence[Failure], every: int = 5) -> Failures:
    """Each `every`-th request fails, with the next of `kinds`, round and round."""

    def failure(number: int, method: str, path: str) -> Failure | None:
        turn, place = divmod(number, every)
        return kinds[turn % len(kinds)] if place == every - 1 else None

    return failure


# ------------------------------------------------------------------------------- what is served


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """A request that gets an error, with the header by which the hub's clients tell which."""

    def __init__(self, status: int, code: str, message: str, **headers: str):
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        if code:
            names["X-Error-Code"] = code
        self.answer = in_json({"error": message}, status, {**names, "X-Error-Message": message})


def unknown_page() -> Refusal:
    return Refusal(404, "", "Sorry, we can't find the page you are looking for.")


def in_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    kind = {"Content-Type": "application/json; charset=utf-8"}
    return Answer(status, json.dumps(value).encode(), {**kind, **(headers or {})})


@dataclass(frozen=True)
class File:
    size: int
    oid: str  # 40 hex digits, as git names a blob


@dataclass(frozen=True)
class Snapshot:
    """A repository as it is at one commit."""

    folder: Path
    sha: str
    files: Mapping[str, File]  # by path in the repository, sorted

    def entries(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders below a folder ("" is the root), as the tree API lists them."""
        prefix = f"{folder}/" if folder else ""
        found: dict[str, dict[str, Any]] = {}
        for path in self.files:
            if path.startswith(prefix):
                parts = path.split("/")
                ends = range(prefix.count("/") + 1, len(parts) + 1)
                for end in ends if recursive else ends[:1]:
                    parent = "/".join(parts[:end])
                    found.setdefault(parent, self.entry(parent))
        return list(found.values())

    def entry(self, path: str) -> dict[str, Any]:
        if path in self.files:
            file = self.files[path]
            return {"type": "file", "oid": file.oid, "size": file.size, "path": path}
        oid = hashlib.sha1(f"{self.sha}/{path}".encode()).hexdigest()
        return {"type": "directory", "oid": oid, "size": 0, "path": path}

    def has(self, path: str) -> bool:
        return path in self.files or any(file.startswith(f"{path}/") for file in self.files)


def snapshot(folder: Path) -> Snapshot:
    """What lies in the folder now; read again only where a size or a time has changed."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = ((path, path.stat()) for path in paths)
    return _snapshot(folder, tuple((path, at.st_size, at.st_mtime_ns) for path, at in stats))


@functools.lru_cache(maxsize=256)
def _snapshot(folder: Path, scan: tuple[tuple[Path, int, int], ...]) -> Snapshot:
    files = {}
    for path, size, _ in scan:
        oid = hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest()
        files[path.relative_to(folder).as_posix()] = File(size, oid)
    lines = "".join(f"{file.oid} {path}\n" for path, file in files.items())
    return Snapshot(folder, hashlib.sha1(lines.encode()).hexdigest(), files)


API = re.compile(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(.+))?")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass
class Repositories:
    """The folders under `root` as repositories: requests in, answers out; no network here."""

    root: Path
    gated: set[str]
    url: str = ""
    page_size: int = 1_000  # entries that one answer of the tree API holds at most

    def answer(self, method: str, target: str, headers: Message, body: bytes) -> Answer:
        url = urlsplit(target)
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        try:
            if token == EXPIRED_TOKEN:
                raise Refusal(401, "", "Invalid credentials in Authorization header")
            if match := API.fullmatch(url.path):
                return self._api(method, match, parse_qs(url.query), body, token)
            if (match := RESOLVE.fullmatch(url.path)) and method in ("GET", "HEAD"):
                return self._file(match, headers, token)
            raise unknown_page()
        except Refusal as refusal:
            return refusal.answer

    def _api(
        self, method: str, match: re.Match[str], query: Query, body: bytes, token: str
    ) -> Answer:
        kind, name, rest = match[1], match[2], match[3] or "revision/main"
        verb, _, place = rest.partition("/")
        revision, _, path = place.partition("/")
        if method != ("POST" if verb == "paths-info" else "GET"):
            raise unknown_page()
        found = self._find(kind, name, unquote(revision or "main"), token)
        if verb == "revision":
            return self._info(name, found)
        if verb == "tree":
            return self._tree(found, unquote(path), query, match[0])
        if verb == "paths-info":
            return self._paths(found, parse_qs(body.decode()))
        if rest == "auth-check":
            self._check_access(kind, name, found, token)
            return in_json({})
        raise unknown_page()

    def _find(self, kind: str, name: str, revision: str, token: str) -> Snapshot:
        """The repository's content at a revision: main, its commit, or a commit kept before."""
        folder = self.root / kind / name
        if not folder.is_dir() or not {".", ".."}.isdisjoint(name.split("/")):
            if not token:  # who isn't logged in isn't told what is private and what doesn't exist
                raise Refusal(401, "RepoNotFound", "Invalid username or password.")
            raise Refusal(404, "RepoNotFound", "Repository not found")
        now = snapshot(folder)
        if revision in ("main", now.sha):
            return now
        kept = self.root / "kept" / kind / name / revision
        if not re.fullmatch("[0-9a-f]{40}", revision) or not kept.is_dir():
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return snapshot(kept)

    def _check_access(self, kind: str, name: str, found: Snapshot, token: str) -> None:
        if name not in self.gated or token == GOOD_TOKEN:
            return
        subject = f"Access to {kind[:-1]} {name} is restricted"
        commit = {"X_Repo_Commit": found.sha}
        if not token:
            message = f"{subject}. You must have access to it and be authenticated to access it."
            raise Refusal(401, "GatedRepo", f"{message} Please log in.", **commit)
        page = f"https://huggingface.co/{'datasets/' * (kind == 'datasets')}{name}"
        message = f"{subject} and you are not in the authorized list."
        raise Refusal(403, "GatedRepo", f"{message} Visit {page} to ask for access.", **commit)

    def _info(self, name: str, found: Snapshot) -> Answer:
        return in_json(
            {
                "_id": found.sha[:24], "id": name, "author": name.split("/")[0], "sha": found.sha,
                "lastModified": COMMIT_DATE, "createdAt": COMMIT_DATE, "private": False,
                "gated": "auto" if name in self.gated else False, "disabled": False,
                "downloads": 0, "likes": 0, "tags": [],
                "siblings": [{"rfilename": path} for path in found.files],
            }
        )  # fmt: skip

    def _tree(self, found: Snapshot, folder: str, query: Query, path: str) -> Answer:
        options = {name: values[-1] for name, values in query.items()}
        entries = found.entries(folder, options.get("recursive") == "true")
        if not entries:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on this revision")
        limit = min(int(options.get("limit", self.page_size)), self.page_size)
        first = int(options.get("cursor", 0))
        headers = {}
        if first + limit < len(entries):
            options |= {"limit": str(limit), "cursor": str(first + limit)}
            asked = "&".join(f"{name}={quote(value)}" for name, value in options.items())
            headers = {"Link": f'<{self.url}{path}?{asked}>; rel="next"'}
        page = entries[first : first + limit]
        return in_json(expanded(page, found, options.get("expand") == "true"), headers=headers)

    def _paths(self, found: Snapshot, form: Query) -> Answer:
        known = [found.entry(path) for path in form.get("paths", []) if found.has(path)]
        return in_json(expanded(known, found, form.get("expand") == ["true"]))

    def _file(self, match: re.Match[str], headers: Message, token: str) -> Answer:
        kind = "datasets" if match[1] else "models"
        found = self._find(kind, match[2], unquote(match[3]), token)
        self._check_access(kind, match[2], found, token)
        path = unquote(match[4])
        if path not in found.files:
            raise Refusal(404, "EntryNotFound", "Entry not found", X_Repo_Commit=found.sha)
        file = found.files[path]
        names = {
            "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes",
            "ETag": f'"{file.oid}"', "X-Linked-ETag": f'"{file.oid}"',
            "X-Linked-Size": str(file.size), "X-Repo-Commit": found.sha,
        }  # fmt: skip
        return part_of_file(found.folder / path, file.size, headers.get("Range", ""), names)


def expanded(entries: list[dict[str, Any]], found: Snapshot, expand: bool) -> list[dict[str, Any]]:
    """Entries of a tree, with their last commit if asked for."""
    commit = {"lastCommit": {"id": found.sha, "title": "Upload", "date": COMMIT_DATE}}
    return [{**entry, **commit} for entry in entries] if expand else entries


def part_of_file(path: Path, size: int, asked: str, headers: dict[str, str]) -> Answer:
    """The bytes that a Range header asks for; the whole file where there is none (RFC 9110)."""
    match = RANGE.fullmatch(asked)
    if not match or not (match[1] or match[2]):
        return Answer(200, path.read_bytes(), headers)
    if match[1]:
        first, last = int(match[1]), min(int(match[2] or size), size - 1)
    else:
        first, last = max(size - int(match[2]), 0), size - 1
    if first > last:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{size}"})
    with path.open("rb") as file:
        file.seek(first)
        body = file.read(last - first + 1)
    return Answer(206, body, {**headers, "Content-Range": f"bytes {first}-{last}/{size}"})


# ------------------------------------------------------------------------------- the network


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are sent apart: would cost 40 ms a request
    server: _Server

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer, failure = self.server.hub.take(self.command, self.path, self.headers, body)
        if failure is None:
            self._send(answer, len(answer.body))
            return
        self.close_connection = True
        if failure == "reset":
            close_with_reset(self.connection)
        elif self.command == "HEAD" or not answer.body:
            self._wait(failure != "cut")  # headers alone would be the whole answer
        else:
            if failure != "timeout":
                self._send(answer, len(answer.body) // 2)
            self._wait(failure != "cut")

    do_HEAD = do_POST = do_GET

    def _send(self, answer: Answer, count: int) -> None:
        """The headers of the whole answer, and `count` bytes of its body."""
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.server.hub.count_bytes(count)  # before the client can see them
            self.wfile.write(answer.body[:count])

    def _wait(self, wanted: bool) -> None:
        if wanted:
            self.server.over.wait(self.server.hub.stall_seconds)

    def log_message(self, format: str, *args: Any) -> None:
        """The log is `HubServer.requests`."""


def close_with_reset(connection: socket.socket) -> None:
    """Have the connection's close send RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class _Server(ThreadingHTTPServer):
    """One life of the listening port: bound at once, listening from `start` to `end`."""

    daemon_threads = True  # a process that forgets to stop the server may end; `end` waits for them
    request_queue_size = 128

    def __init__(self, hub: HubServer, port: int):
        super().__init__(("127.0.0.1", port), _Handler, bind_and_activate=False)
        self.hub = hub
        self.over = threading.Event()
        self.connections: set[socket.socket] = set()
        self.server_bind()  # a port that is bound but doesn't listen refuses connections

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the name service, too

    def start(self) -> None:
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def end(self) -> None:
        """Reset all connections, end their threads, let go of the port."""
        self.shutdown()
        self.over.set()
        for connection in list(self.connections):
            try:
                close_with_reset(connection)
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
            except OSError:
                pass  # closed in the meantime
        deadline = time.monotonic() + 5
        while self.connections and time.monotonic() < deadline:
            time.sleep(0.002)
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        # Not the inherited one: its FIN would come before the RST.
        self.connections.discard(request)
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):
            self.hub.mistakes.append(error)


class HubServer:
    """The hub on 127.0.0.1; a context manager. What went wrong in it is raised at its end.

    requests: (method, path with query, status or failure) of each request, in order.
    failures: what to do with the n-th request (from 0, its place in `requests`); None is nothing.
        An HTTP status such as "503" is answered in place of the answer. "cut" sends the headers
        and half of the body and closes; "reset" closes with RST before any answer; "stall" sends
        headers and half, then nothing for `stall_seconds`, and closes; "timeout" is a stall before
        the headers. Where there is no body, "cut" closes and "stall" waits before any answer.
    down: while True no connection is accepted, and the open ones are reset.
    stall_seconds: longer than the 10 s that the clients wait.
    retry_after: seconds, sent along with a status that is a failure.
    body_bytes: bytes of bodies sent.
    """

    def __init__(self, root: Path, gated: Iterable[str] = ()):
        self.repositories = Repositories(Path(root), set(gated))
        self.requests: list[tuple[str, str, int | str]] = []
        self.failures: Failures | None = None
        self.stall_seconds = 30.0
        self.retry_after: int | None = None
        self.body_bytes = 0
        self.mistakes: list[BaseException] = []
        self._lock = threading.Lock()
        self._server = _Server(self, 0)
        self._port = self._server.server_address[1]
        self.url = self.repositories.url = f"http://127.0.0.1:{self._port}"
        self._down = True

    def __enter__(self) -> HubServer:
        self.down = False
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.down = True
        self._server.server_close()
        if self.mistakes and kind is None:
            raise self.mistakes[0]

    @property
    def down(self) -> bool:
        return self._down

    @down.setter
    def down(self, down: bool) -> None:
        if down and not self._down:
            self._server.end()
            self._server = _Server(self, self._port)
        elif self._down and not down:
            self._server.start()
        self._down = down

    def sha(self, name: str, kind: str = "datasets") -> str:
        """The repository's commit now."""
        return snapshot(self.repositories.root / kind / name).sha

    def keep(self, name: str, kind: str = "datasets") -> str:
        """Let the present commit be found after the folder has changed, too; the commit."""
        sha, root = self.sha(name, kind), self.repositories.root
        shutil.copytree(root / kind / name, root / "kept" / kind / name / sha, dirs_exist_ok=True)
        return sha

    def take(
        self, method: str, path: str, headers: Message, body: bytes
    ) -> tuple[Answer, Failure | None]:
        """Number a request, log it; its answer and which of KINDS is to be done to it."""
        with self._lock:
            failure = self.failures(len(self.requests), method, path) if self.failures else None
            if failure is not None and failure not in KINDS and not failure.isdigit():
                raise ValueError(f"unknown failure {failure!r}: one of {KINDS}, or a status")
            answer = self.repositories.answer(method, path, headers, body)
            self.requests.append((method, path, failure or answer.status))
        if failure is None or failure in KINDS:
            return answer, failure
        after = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return in_json({"error": f"This is failure {failure}"}, int(failure), after), None

    def count_bytes(self, count: int) -> None:
        with self._lock:
            self.body_bytes += count

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a process whose `datasets` and `huggingface_hub` ask this server."""
        ours = {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        if token:
            ours["HF_TOKEN"] = token
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
        return {k: v for k, v in os.environ.items() if not k.startswith(foreign)} | ours


def use_hub(
    patch: pytest.MonkeyPatch, hub: HubServer, home: Path, token: str | None = None
) -> None:
    """Have the clients of this process ask `hub`, with caches of their own in `home`.

    They read the environment when they are imported, so what they read is changed one by one.
    Call it anew to have them forget what they were told of the repositories.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import _detect_agent

    # Asked for once a process: would be in the log of whichever test comes first.
    patch.setattr(_detect_agent, "_registry", {"standardEnvVars": [], "harnesses": {}})
    huggingface_hub.HfFileSystem.clear_instance_cache()  # keeps listings, broken ones too
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setenv("HF_TOKEN", token or "")
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
    }.items():  # fmt: skip
        patch.setattr(constants, name, value)
    for name, value in {
        "HF_ENDPOINT": hub.url, "HF_DATASETS_CACHE": home / "datasets", "HF_HUB_OFFLINE": False,
        "USE_PARQUET_EXPORT": False,  # would look for the name datasets-server.127.0.0.1
    }.items():  # fmt: skip
        patch.setattr(datasets.config, name, value)


# ------------------------------------------------------------------------------- repositories


WORDS = (
    "water light stone river garden teacher history number animal music window market island "
    "question answer because between through without energy planet winter summer letter village "
    "make find give build learn carry follow measure describe small large early quiet useful"
).split()


@dataclass
class Writer:
    """Writes the repositories of one hub, and remembers the rows of each split in their order."""

    root: Path
    rng: random.Random
    shards: int
    row_groups: int
    rows: dict[tuple[str, str], list[Row]] = field(default_factory=dict)

    def write(self, dataset: str, split: str, pattern: str, rows: list[Row]) -> None:
        """Rows in `shards` files; {i}, {from1} and {n} in the pattern: which of how many."""
        for i, piece in enumerate(pieces(rows, self.shards)):
            path = (
                self.root / "datasets" / dataset / pattern.format(i=i, n=self.shards, from1=i + 1)
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                size = -(-len(piece) // self.row_groups)
                pq.write_table(pa.Table.from_pylist(piece), path, row_group_size=max(size, 1))
            else:
                path.write_bytes(compressed(path.suffix, piece))
        self.rows[dataset, split] = rows

    def card(self, dataset: str, configs: dict[str, dict[str, str]], **header: Any) -> None:
        """A data card: for each config its splits, each with a pattern of paths."""
        if configs:
            header["configs"] = [
                {
                    "config_name": config,
                    "data_files": [{"split": s, "path": p} for s, p in of.items()],
                }
                for config, of in configs.items()
            ]
        path = self.root / "datasets" / dataset / "README.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"---\n{yaml.safe_dump(header)}---\n\n# {dataset}\n", encoding="utf-8")

    def words(self, label: str, number: int, few: int = 20, many: int = 60) -> str:
        """A document that says where it belongs, such as "fineweb-edu 00017 stone river ..."."""
        count = self.rng.randrange(few, many)
        return " ".join([f"{label} {number:05d}", *self.rng.choices(WORDS, k=count)])

    def turns(self, label: str, number: int) -> list[dict[str, str]]:
        question, reply = (self.words(label, number, 5, 25) for _ in range(2))
        return [{"content": question, "role": "user"}, {"content": reply, "role": "assistant"}]


def pieces(rows: list[Row], count: int) -> Iterator[list[Row]]:
    """The rows in order, in `count` runs of about the same length."""
    for i in range(count):
        yield rows[len(rows) * i // count : len(rows) * (i + 1) // count]


def compressed(suffix: str, rows: list[Row]) -> bytes:
    """JSON lines as .gz or .zst."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".gz":
        return gzip.compress(text, mtime=0)
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as file:
        file.write(text)
    return bytes(out.getvalue())


def write_v4_hub(
    root: Path,
    *,
    documents: int = 240,
    shards: int = 3,
    row_groups: int = 4,
    vocab_size: int = 400,
    seed: int = 0,
) -> dict[tuple[str, str], list[Row]]:
    """Write what recipes/v4.yaml reads (and codeparrot-clean), small; the same for the same seed.

    Args:
        documents: rows of a train split; test splits have a fifth.
        shards: files of a split, at most 10; not more than there are rows.
        row_groups: of each Parquet file, at most.

    Returns:
        the rows of each (data set, split), in the order in which the files hold them.
    """
    writer = Writer(root, random.Random(seed), shards, row_groups)
    write_fineweb_edu(writer, documents)
    write_dclm(writer, documents)
    write_starcoderdata(writer, documents)
    write_finemath(writer, documents)
    write_smoltalk(writer, documents)
    write_ultrafeedback(writer, documents)
    write_codeparrot(writer, documents)
    write_cosmo2_tokenizer(writer, vocab_size)
    return writer.rows


def write_fineweb_edu(writer: Writer, documents: int) -> None:
    name = "HuggingFaceFW/fineweb-edu"
    configs = {"default": {"train": "data/*/*"}, "sample-10BT": {"train": "sample/10BT/*"}}
    writer.card(name, configs, license="odc-by")

    def row(label: str, number: int) -> Row:
        text = writer.words(label, number)
        score = writer.rng.uniform(2.5, 5.0)
        return {
            "text": text, "id": f"<urn:uuid:{number:08x}>", "dump": "CC-MAIN-2024-10",
            "url": f"https://example.org/{number}", "file_path": f"s3://commoncrawl/{number}.gz",
            "language": "en", "language_score": writer.rng.random(),
            "token_count": len(text.split()), "score": score, "int_score": round(score),
        }  # fmt: skip

    sample = [row("fineweb-edu", i) for i in range(documents)]
    writer.write(name, "train", "sample/10BT/{i:03d}_00000.parquet", sample)
    rest = [row("fineweb-edu-crawl", i) for i in range(writer.shards)]
    crawl = "data/CC-MAIN-2013-20/train-{i:05d}-of-{n:05d}.parquet"
    writer.write(name, "train of default", crawl, rest)


def write_dclm(writer: Writer, documents: int) -> None:
    name = "mlfoundations/dclm-baseline-1.0"
    files = "global-shard_01_of_10/local-shard_{i}_of_10/shard_00000000_processed.jsonl.zst"
    writer.card(name, {}, license="cc-by-4.0")

    def row(number: int) -> Row:
        text = writer.words("dclm-baseline-1.0", number)
        return {
            "bff_contained_ngram_count_before_dedupe": writer.rng.randrange(50),
            "language_id_whole_page_fasttext": {"en": writer.rng.random()},
            "metadata": {"Content-Length": str(len(text)), "Content-Type": "text/html"},
            "previous_word_count": len(text.split()), "text": text,
            "url": f"https://example.org/{number}", "warcinfo": "robots: classic",
            "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": writer.rng.random(),
        }  # fmt: skip

    writer.write(name, "train", files, [row(i) for i in range(documents)])


def write_starcoderdata(writer: Writer, documents: int) -> None:
    name = "bigcode/starcoderdata"
    writer.card(name, {}, license="other", extra_gated_prompt="## Terms of Use")

    def row(language: str, number: int) -> Row:
        label = "starcoderdata" if language == "python" else "starcoderdata-julia"
        lines = [f"# {writer.words(label, number)}", f"def f{number}(x):"]
        lines += [f"    {word} = x + {i}" for i, word in enumerate(writer.rng.choices(WORDS, k=6))]
        return {
            "max_stars_repo_path": f"src/{number}.txt", "max_stars_repo_name": f"user/{number}",
            "max_stars_count": number % 7, "id": str(number), "content": "\n".join(lines) + "\n",
        }  # fmt: skip

    for language, split in (("julia", "train of julia"), ("python", "train")):
        rows = [row(language, i) for i in range(documents)]
        writer.write(name, split, language + "/train-{i:05d}-of-{n:05d}.parquet", rows)


def write_finemath(writer: Writer, documents: int) -> None:
    name = "HuggingFaceTB/finemath"
    configs = ("finemath-3plus", "finemath-4plus")
    patterns = {config: {"train": f"{config}/train-*"} for config in configs}
    writer.card(name, patterns, license="odc-by")

    def row(label: str, number: int) -> Row:
        text = f"{writer.words(label, number)}\n\n$$x^2 = {number * number}$$"
        return {
            "url": f"https://example.org/{number}", "fetch_time": 1_700_000_000 + number,
            "content_mime_type": "text/html", "text": text, "token_count": len(text.split()),
            "char_count": len(text), "metadata": "{}", "score": writer.rng.uniform(4, 5),
            "int_score": 4, "crawl": "CC-MAIN-2024-18", "language": "en",
            "language_score": writer.rng.random(),
        }  # fmt: skip

    for config, label in zip(configs, ("finemath-3plus", "finemath"), strict=True):
        split = "train" if label == "finemath" else "train of 3plus"
        rows = [row(label, i) for i in range(documents)]
        writer.write(name, split, config + "/train-{i:05d}-of-{n:05d}.parquet", rows)


def write_smoltalk(writer: Writer, documents: int) -> None:
    name = "HuggingFaceTB/smoltalk"
    splits = {"train": range(documents), "test": range(documents, documents + documents // 5)}
    writer.card(name, {"all": {split: f"data/all/{split}-*" for split in splits}})
    for split, numbers in splits.items():
        rows = [{"messages": writer.turns("smoltalk", i), "source": "smol"} for i in numbers]
        writer.write(name, split, f"data/all/{split}-{{i:05d}}-of-{{n:05d}}.parquet", rows)


def write_ultrafeedback(writer: Writer, documents: int) -> None:
    name, label = "HuggingFaceH4/ultrafeedback_binarized", "ultrafeedback_binarized"
    end = documents + documents // 5
    splits = {"train_prefs": range(documents), "test_prefs": range(documents, end)}
    patterns = {"default": {split: f"data/{split}-*" for split in splits}}
    writer.card(name, patterns, license="mit")

    def row(number: int) -> Row:
        chosen = writer.turns(label, number)
        worse = f"{writer.words(label, number, 5, 25)} rejected"
        return {
            "prompt": chosen[0]["content"], "prompt_id": f"{number:064x}", "chosen": chosen,
            "rejected": [chosen[0], {"content": worse, "role": "assistant"}], "messages": chosen,
            "score_chosen": 8.5, "score_rejected": writer.rng.uniform(1, 8),
        }  # fmt: skip

    for split, numbers in splits.items():
        pattern = f"data/{split}-{{i:05d}}-of-{{n:05d}}.parquet"
        writer.write(name, split, pattern, [row(i) for i in numbers])


def write_codeparrot(writer: Writer, documents: int) -> None:
    def row(number: int) -> Row:
        text = f"# {writer.words('codeparrot-clean', number)}\nimport os\n"
        return {
            "repo_name": f"user/{number}", "path": "a.py", "copies": "1", "size": str(len(text)),
            "content": text, "license": "mit", "hash": number, "line_mean": 20.5, "line_max": 99,
            "alpha_frac": writer.rng.random(), "autogenerated": False,
        }  # fmt: skip

    rows = [row(i) for i in range(documents)]
    writer.write("codeparrot/codeparrot-clean", "train", "file-{from1:012d}.json.gz", rows)


def write_cosmo2_tokenizer(writer: Writer, vocab_size: int) -> None:
    """A byte-level BPE with cosmo2's special tokens, trained on what was written before."""
    rows = itertools.chain.from_iterable(writer.rows.values())
    texts = (row[column] for row in rows for column in ("text", "content") if column in row)
    folder = writer.root / "models" / "HuggingFaceTB" / "cosmo2-tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    trained = tokenization.train(texts, vocab_size).to_json()
    (folder / "tokenizer.json").write_text(trained, encoding="utf-8")
