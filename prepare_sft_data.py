"""Gather the conversations for stage 4: filter, drop copies, split, write `messages` as JSON lines.

    python prepare_sft_data.py                 -> data/sft/train.jsonl and validation.jsonl

What is to be gathered stands in the recipe under sft.data. A conversation goes to train or
validation by a hash of its words, the one that splits every stage's documents: copies never stand
on both sides, and what validates here was not trained on in stage 3. What is gathered is kept in
parts until all of it is there: a run that was stopped goes on where it was. A source of single
questions can give conversations of several, too (`chained`).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from hamner.errors import UserError, run
from hamner.files import write_json_lines, write_text_whole
from hamner.hub import Row
from hamner.recipe import HubSource, Recipe, SFTSource, load_recipe
from hamner.sources import (
    Document,
    State,
    check_sources,
    fingerprint,
    is_held_out,
    open_source,
    open_stream,
)
from hamner.tokenization import check_message, whole_characters

Messages = list[dict[str, str]]
SIDES = ("train", "validation")
PART = 1_000  # conversations


@dataclass
class Gathered:
    """What came of one source."""

    spec: SFTSource
    train: list[Messages] = field(default_factory=list)
    validation: list[Messages] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def kept(self) -> list[Messages]:
        return self.train + self.validation

    @property
    def count(self) -> int:
        return len(self.train) + len(self.validation)


def clean(document: Document) -> Messages | str:
    """The conversation, stripped and ending with an answer, or the reason to drop it."""
    if isinstance(document, str):
        return "not a conversation"
    messages = []
    for message in document:
        try:
            role, content = check_message(message)
        except UserError:
            return "malformed message"
        if not content.strip():
            return "empty message"
        messages.append({"role": role, "content": whole_characters(content).strip()})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns:
        return "no answer"
    if turns != ["user", "assistant"] * (len(turns) // 2):
        return "turns out of order"
    return messages


def gather(recipe: Recipe, spec: SFTSource, seen: set[str], parts: Parts) -> Gathered:
    """Conversations of one source that pass the filters and were not seen before.

    Every PART of them is written to `parts`, and what is there already is not read again.
    """
    stream = dataclasses.replace(open_stream(spec.name, recipe), held_out_fraction=0.0)
    gathered, stream.state, finished = parts.restore(spec, stream.state)
    seen.update(map(key_of, gathered.kept))
    count = gathered.count
    with tqdm(desc=spec.label, total=spec.at_most, initial=count, unit="conv", disable=None) as bar:
        for document in () if finished else stream.one_epoch():
            reason = keep(clean(document), gathered, recipe.held_out_fraction, seen)
            if reason is not None:
                gathered.dropped[reason] += 1
                continue
            bar.update(1)
            if gathered.count == spec.at_most:
                break
            if gathered.count % PART == 0:
                parts.add(gathered, stream.state)
    if not gathered.count:
        raise UserError(f"source {spec.name!r}: not one conversation passed the filters")
    if not finished:
        parts.add(gathered, stream.state, finished=True)
    return gathered


def key_of(messages: Messages) -> str:
    """The same for copies: conversations that differ in case and white space at most."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    words = f"{fingerprint(system)}\n{fingerprint(messages)}"
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()


class Parts:
    """What a source has given so far, on disk, so that a stopped run loses little.

    A part is a file with the conversations since the part before and the stream's state after
    them. `key` is all that they follow from: parts with another key are put away.
    """

    def __init__(self, folder: Path, key: str):
        self._folder, self._key = folder, key
        self._written = dict.fromkeys(SIDES, 0)
        self._count = 0

    def restore(self, spec: SFTSource, state: State) -> tuple[Gathered, State, bool]:
        """What was gathered, the stream's state after it, and whether that was all."""
        gathered, finished = Gathered(spec), False
        while (part := self._read(self._path(self._count))) is not None:
            for side in self._written:
                getattr(gathered, side).extend(part[side])
            gathered.dropped = Counter(part["dropped"])
            state, finished = part["state"], part["finished"]
            self._count += 1
        for stale in self._folder.glob("*.json"):
            if stale >= self._path(self._count):
                stale.unlink()
        self._note(gathered)
        return gathered, state, finished

    def add(self, gathered: Gathered, state: State, *, finished: bool = False) -> None:
        """Write what has come since the last part."""
        new = {side: getattr(gathered, side)[count:] for side, count in self._written.items()}
        rest = {"key": self._key, "dropped": gathered.dropped, "state": state, "finished": finished}
        write_text_whole(self._path(self._count), [json.dumps({**new, **rest})])
        self._count += 1
        self._note(gathered)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.json"

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            part = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return part if isinstance(part, dict) and part.get("key") == self._key else None

    def _note(self, gathered: Gathered) -> None:
        self._written = {side: len(getattr(gathered, side)) for side in self._written}


def gather_all(recipe: Recipe, folder: Path) -> list[Gathered]:
    """Conversations of all sources, one after the other; copies stay where they came first."""
    specs = recipe.sft.data.sources
    check_sources([spec.name for spec in specs], recipe)
    seen: set[str] = set()
    gathered, key = [], ""
    for number, spec in enumerate(specs):
        key = key_of_source(recipe, spec, key)
        gathered.append(gather(recipe, spec, seen, Parts(folder / str(number), key)))
    return gathered


def chained(part: Gathered, seed: int) -> Gathered:
    """Conversations of 2 to `chained_turns` questions, drawn from a source's single ones.

    Who learns single questions alone answers a later one with what stands before it in mind. The
    system prompt is the first question's. Only what is trained on is put together.

    Raises:
        UserError: there are too few single questions.
    """
    spec, rng = part.spec, random.Random(f"{seed} {part.spec.label}")
    single = [m for m in part.train if sum(message["role"] == "user" for message in m) == 1]
    if len(single) < spec.chained_turns:
        raise UserError(
            f"source {spec.name!r}: of its {len(single)} conversations of one question none can be "
            f"put together with {spec.chained_turns} turns: give a smaller chained_turns, or none"
        )
    found = Gathered(spec.model_copy(update={"label": f"{spec.label}, chained", "repeat": 1}))
    for _ in range(spec.chained):
        first, *others = rng.sample(single, rng.randint(2, spec.chained_turns))
        turns = (message for talk in others for message in talk if message["role"] != "system")
        found.train.append([*first, *turns])
    return found


def key_of_source(recipe: Recipe, spec: SFTSource, before: str) -> str:
    """A digest of all that a source's part of the result follows from, with what came before it."""
    source = recipe.sources[spec.name]
    told = [before, spec.model_dump(), source.model_dump(), recipe.seed, recipe.held_out_fraction]
    if not isinstance(source, HubSource):  # whose commit stands in the stream's state
        told.append(open_source(spec.name, recipe).identity(None))
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


def keep(
    messages: Messages | str, gathered: Gathered, held_out_fraction: float, seen: set[str]
) -> str | None:
    """File a conversation under train or validation; return the reason if it is dropped instead."""
    if isinstance(messages, str):
        return messages
    size = sum(len(message["content"]) for message in messages)
    if size < gathered.spec.min_characters:
        return "too short"
    if gathered.spec.max_characters is not None and size > gathered.spec.max_characters:
        return "too long"
    key = key_of(messages)
    if key in seen:
        return "copy"
    seen.add(key)
    held_out = is_held_out(messages, held_out_fraction)
    (gathered.validation if held_out else gathered.train).append(messages)
    return None


def rows(gathered: list[Gathered], side: str) -> Iterator[Row]:
    """One side of all sources, as the file's rows."""
    for part in gathered:
        for messages in getattr(part, side):
            yield {"messages": messages, "source": part.spec.label, "repeat": part.spec.repeat}


def summary(gathered: list[Gathered]) -> Table:
    """What was kept of each source, and how long it is in characters."""
    headings = ("source", "kept", "train", "held out", "repeat", "turns", "mean", "longest")
    table = Table(title="Conversations for supervised fine-tuning")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for part in gathered:
        table.add_row(part.spec.label, *counts([part]), str(part.spec.repeat), *lengths([part]))
    table.add_section()
    table.add_row("all", *counts(gathered), "", *lengths(gathered))
    return table


def dropped(gathered: list[Gathered]) -> Table:
    """What was dropped of each source, and why."""
    table = Table(title="Dropped")
    for heading in ("source", "reason", "conversations"):
        table.add_column(heading, justify="right" if heading == "conversations" else "left")
    for part in gathered:
        for reason, count in part.dropped.most_common():
            table.add_row(part.spec.label, reason, f"{count:,}")
    return table


def counts(gathered: list[Gathered]) -> list[str]:
    """Conversations kept, and those of each side."""
    sides = [sum(len(getattr(part, side)) for part in gathered) for side in SIDES]
    return [f"{number:,}" for number in (sum(sides), *sides)]


def lengths(gathered: list[Gathered]) -> list[str]:
    """Mean of the user's turns, and mean and longest of the characters."""
    kept = [messages for part in gathered for messages in part.kept]
    sizes = [sum(len(m["content"]) for m in messages) for messages in kept]
    turns = [sum(m["role"] == "user" for m in messages) for messages in kept]
    return [f"{mean(turns):.1f}", f"{mean(sizes):,.0f}", f"{max(sizes):,}"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="v4", help="name in recipes/, or path (default: v4)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a field of the recipe; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--fresh", action="store_true", help="forget what a run that was stopped had gathered"
    )
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    folder = Path(recipe.sft.data.folder)
    parts = folder / "parts"
    if arguments.fresh:
        shutil.rmtree(parts, ignore_errors=True)
    try:
        gathered = gather_all(recipe, parts)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        return 130
    gathered += [chained(part, recipe.seed) for part in gathered if part.spec.chained]
    for side in SIDES:
        if not any(getattr(part, side) for part in gathered):
            raise UserError(f"no conversation for {side}: change held_out_fraction in the recipe")
    for side in SIDES:
        write_json_lines(folder / f"{side}.jsonl", rows(gathered, side))
    shutil.rmtree(parts)
    Console().print(summary(gathered), dropped(gathered))
    print(f"written to {folder}/train.jsonl and validation.jsonl")
    return 0


if __name__ == "__main__":
    run(main)
