"""Data sets of the Hugging Face hub, streamed with `datasets` through a network that fails.

A data set is a list of shards (files), a Parquet shard a list of parts (row groups). Shards, and
the parts of each, come in an order that the seed and the epoch give; within a part rows come as
they are. A position says how many shards, parts and rows are gone, so that a stream opened at it
reads no more than that part again. When the network fails the stream is rebuilt at its place.

With a mirror the same data sets are read from a folder laid out like the hub: owner/name/files.
"""

from __future__ import annotations

import functools
import logging
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import errors as hub_errors
from tqdm import tqdm

from hamner.errors import UserError, first_line
from hamner.recipe import HubSource

Row = dict[str, Any]
PLACE = {"shard": 0, "part": 0, "row": 0}
ROWS_AT_ONCE = 256
CHECK_SECONDS = 10.0  # how long a source may fail before the first step
REQUEST_WAITS = (0.5, 1.0)  # seconds between the tries of one request
REQUEST_SECONDS = 10.0  # without an answer, where the client itself would wait for ever
BLOCK = 1 << 20  # bytes that are read on in a file beyond what was asked for; 5 MB by default
IN_TROUBLE = (408, 429, 500, 502, 503, 504)  # HTTP statuses that another try may mend
TRIES = 5  # at one place, for errors that don't look like the network's
PREPARING = threading.Lock()
NETWORK_ERRORS = (httpx.TransportError, TimeoutError, ConnectionError)


@dataclass
class Patience:
    """Waits between tries: 1 s, then twice as long each time, while the same place fails.

    Errors of the network are borne for `seconds`, others (a refusal, a damaged file) for `limit`
    tries. The second try, and the end of a longer wait, are told in a line.
    """

    name: str
    seconds: float
    limit: int
    longest_wait: float
    stopped: threading.Event
    quiet: bool
    began: float | None = None
    tries: int = 0

    def renew(self) -> None:
        """A row has come: whatever was wrong is over."""
        if self.began is not None and self.tries > 1:
            self._tell(f"goes on after {time.monotonic() - self.began:.0f} s")
        self.began, self.tries = None, 0

    def wait(self, error: Exception, *, lasting: bool) -> bool:
        """Sleep before the next try; False if there is to be none."""
        now = time.monotonic()
        self.began = self.began or now
        over = now - self.began > self.seconds
        if over or (lasting and self.tries >= self.limit):
            return False
        if self.tries == 1:
            self._tell(f"{first_line(error)}; trying again and again, nothing is lost")
        self.stopped.wait(min(2.0**self.tries, self.longest_wait))
        self.tries += 1
        return True

    def _tell(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(f"source {self.name!r}: {text}")


@dataclass
class Hub:
    """A data set of the hub, or of its mirror, as a source of rows."""

    name: str
    spec: HubSource
    seed: int
    mirror: str | None = None
    patience: float = 6 * 3600.0  # seconds without a row before the run gives up
    tries: int = TRIES
    longest_wait: float = 300.0
    quiet: bool = False
    stopped: threading.Event = field(default_factory=threading.Event)
    _opened: tuple[str | None, Any] | None = None  # revision and data set

    def rows(self, epoch: int, position: dict[str, Any] | None) -> Iterator[tuple[Row, Any]]:
        place = position or PLACE
        patience = self._patience()
        while not self.stopped.is_set():
            try:
                for row, following in self._rows(epoch, place):
                    patience.renew()
                    place = following
                    yield row, place
                return
            except UserError:
                raise
            except Exception as error:  # the client and its libraries raise many kinds
                if not patience.wait(error, lasting=self._hub_answers(error)):
                    raise UserError(f"source {self.name!r}: {self._explained(error)}") from None

    def identity(self, position: dict[str, Any] | None) -> Any:
        """The data set with its commit, or the mirror's files with their sizes."""
        told = self.spec.model_dump(include={"dataset", "config", "split", "data_dir"})
        if self.mirror:
            folder = Path(self.mirror, self.spec.dataset)
            sizes = {str(path): path.stat().st_size for path in folder.rglob("*")}
            return [told, sorted(sizes.items())]
        next(self.rows(0, position), None)  # bears with the network until the data set is open
        return [told, self._opened and self._opened[0]]

    def _patience(self) -> Patience:
        return Patience(
            self.name, self.patience, self.tries, self.longest_wait, self.stopped, self.quiet
        )

    def hurry(self) -> None:
        """Give up soon, and say nothing before: for the look at all sources before a run."""
        self.patience, self.tries, self.quiet = CHECK_SECONDS, 1, True

    def close(self) -> None:
        """Wait no longer for a network that doesn't answer."""
        self.stopped.set()

    def _rows(self, epoch: int, place: dict[str, Any]) -> Iterator[tuple[Row, dict[str, Any]]]:
        revision, dataset = self._open(place.get("revision"))
        count = dataset.num_shards
        if place.get("of", count) != count:
            raise UserError(
                f"source {self.name!r}: {self.spec.dataset} had {place['of']} files when this run "
                f"began and has {count} now; make it complete, or begin anew with --fresh"
            )
        key = f"{self.seed}/{self.name}/{epoch}"
        shards = shuffled(count, key)
        first_part, skip = place["part"], place["row"]
        for shard in range(place["shard"], count):
            parts = dataset.shard(num_shards=count, index=shards[shard]).reshard()
            order = shuffled(parts.num_shards, f"{key}/{shard}")
            for part in range(first_part, len(order)):
                table = parts.shard(num_shards=len(order), index=order[part])
                for number, row in numbered_rows(table, skip):
                    here = {"shard": shard, "part": part, "row": number + 1, "of": count}
                    yield row, {**here, "revision": revision}
                skip = 0
            first_part = 0

    def _open(self, revision: str | None) -> tuple[str | None, Any]:
        """The data set's revision (a commit, None for a mirror) and its stream, opened once."""
        if self._opened is None or revision not in (None, self._opened[0]):
            prepare_client()
            self._opened = self._open_mirror() if self.mirror else self._open_hub(revision)
        return self._opened

    def _open_hub(self, revision: str | None) -> tuple[str | None, Any]:
        sha = self._commit(revision or self.spec.revision)
        return sha, self._load(self.spec.dataset, sha)

    def _commit(self, revision: str | None) -> str | None:
        """The commit that the hub has for a revision; None asks for the newest."""
        from huggingface_hub import HfApi

        api, name = HfApi(), self.spec.dataset
        return api.dataset_info(name, revision=revision, timeout=10, expand=["sha"]).sha

    def _open_mirror(self) -> tuple[None, Any]:
        folder = Path(self.mirror or "", self.spec.dataset)
        if not folder.is_dir():
            raise UserError(
                f"source {self.name!r}: the mirror has no folder {folder}; fill it with "
                f"`hf download {self.spec.dataset} --repo-type dataset --local-dir {folder}`, or "
                "with a part of it: README.md says how"
            )
        return None, self._load(str(folder), None)

    def _load(self, path: str, revision: str | None) -> Any:
        spec = self.spec
        return load_dataset(path, spec.config, spec.split, spec.data_dir, revision)

    def _hub_answers(self, error: Exception) -> bool:
        """Whether an error has another cause than the network.

        `datasets` may call a file missing that can't be reached, so the hub itself is asked.
        """
        if self.mirror or is_network_error(error):
            return not is_network_error(error)
        try:
            self._commit(None)
        except Exception as another:
            return not is_network_error(another)
        return True

    def _explained(self, error: Exception) -> str:
        """What is wrong and what to do, in one sentence."""
        causes = chain(error)
        dataset, said = self.spec.dataset, first_line(error)
        if self.mirror:
            folder = Path(self.mirror, dataset)
            return f"can't read {folder} ({said}); is the download complete, with its README.md?"
        gated = "is a gated dataset" in said  # all that `datasets` tells
        if gated or any(isinstance(cause, hub_errors.GatedRepoError) for cause in causes):
            page = f"https://huggingface.co/datasets/{dataset}"
            return f"{dataset} is gated: accept its terms at {page}, then `hf auth login`"
        if any(isinstance(cause, hub_errors.RevisionNotFoundError) for cause in causes):
            return f"{dataset} has no revision {self.spec.revision!r}"
        if any(isinstance(cause, hub_errors.RepositoryNotFoundError) for cause in causes):
            return f"there is no data set {dataset!r} on the hub (misspelt, or private?)"
        if is_network_error(error):
            return (
                f"can't reach {dataset} on the hub ({said}); check the network, or set mirror=DIR"
            )
        return f"can't read {dataset} from the hub: {said}"


class PatientClient(httpx.Client):
    """A client that makes a request again when it fails.

    To open a data set takes dozens of requests, and the hub's client repeats only a few of them;
    others it sends without a time-out.
    """

    def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        limits = request.extensions.get("timeout", {})
        phases = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {
            phase: limits.get(phase) or REQUEST_SECONDS for phase in phases
        }
        for wait in REQUEST_WAITS:
            try:
                response = super().send(request, **options)
                if response.status_code not in IN_TROUBLE:
                    return response
                response.close()
            except httpx.TransportError:
                pass
            time.sleep(wait)
        return super().send(request, **options)


def prepare_client() -> None:
    """Make the hub's client patient, once; from any thread."""
    with PREPARING:
        _prepare_client()


@functools.cache
def _prepare_client() -> None:
    """A patient client in place of retries and warnings of its own."""
    import datasets
    import huggingface_hub.hf_file_system

    hooks = huggingface_hub.get_session().event_hooks
    huggingface_hub.set_client_factory(
        lambda: PatientClient(event_hooks=hooks, follow_redirects=True, timeout=None)
    )
    # In place of its own retries, of which there are up to a hundred, a stopped run would wait for.
    huggingface_hub.hf_file_system.http_backoff = functools.partial(
        huggingface_hub.utils.http_backoff, max_retries=0
    )
    for what in ("READ", "OPEN"):
        setattr(datasets.config, f"STREAMING_{what}_MAX_RETRIES", 1)
    for what in ("READ", "OPEN", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT"):
        setattr(datasets.config, f"STREAMING_{what}_RETRY_INTERVAL", 0)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # asks another host at every opening
    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub", "httpx"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


@functools.cache
def load_dataset(
    path: str, config: str | None, split: str, data_dir: str | None, revision: str | None
) -> Any:
    """A streamed data set in Arrow format; opened once, as listing its files may take minutes."""
    import datasets
    from huggingface_hub import HfFileSystem

    # A listing of files that the network cut short would be taken for the whole from its cache.
    HfFileSystem.clear_instance_cache()
    return datasets.load_dataset(
        path,
        config,
        split=split,
        data_dir=data_dir,
        revision=revision,
        streaming=True,
        storage_options={"hf": {"block_size": BLOCK}} if revision else None,
    ).with_format("arrow")


def shuffled(count: int, key: str) -> list[int]:
    """The numbers below count, in an order that the key gives."""
    order = list(range(count))
    random.Random(key).shuffle(order)
    return order


def numbered_rows(table: Any, skip: int) -> Iterator[tuple[int, Row]]:
    """Rows of a stream in Arrow format with their numbers, from row `skip` on."""
    first = 0
    for batch in table.iter(batch_size=ROWS_AT_ONCE):
        if first + len(batch) > skip:
            start = max(0, skip - first)
            yield from enumerate(batch.slice(start).to_pylist(), start=first + start)
        first += len(batch)


def chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, back to the first."""
    causes: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in causes:
        causes.append(following)
        following = following.__cause__ or following.__context__
    return causes


def is_network_error(error: Exception) -> bool:
    """Whether trying again later may help: no connection, no answer, or a server in trouble."""
    for cause in chain(error):
        response = getattr(cause, "response", None)
        if isinstance(cause, hub_errors.HfHubHTTPError) and response is not None:
            return response.status_code in IN_TROUBLE
        if isinstance(cause, NETWORK_ERRORS):
            return True
    return False
