"""Gather the conversations for stage 4: filter, drop copies, split, write `messages` as JSON lines.

    python prepare_sft_data.py                 -> data/sft/train.jsonl and validation.jsonl

What is gathered stands in the recipe under sft.data. A conversation goes to train or validation by
a hash of its words, the one that splits every stage's documents: copies never stand on both sides,
and what validates here was not trained on in stage 3.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from hamner.errors import UserError, run
from hamner.files import write_json_lines
from hamner.recipe import Recipe, SFTSource, load_recipe
from hamner.sources import Document, Row, fingerprint, is_held_out, open_stream
from hamner.tokenization import check_message, whole_characters

Messages = list[dict[str, str]]


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


def gather(recipe: Recipe, spec: SFTSource, seen: set[str]) -> Gathered:
    """Conversations of one source that pass the filters and were not seen before."""
    gathered = Gathered(spec)
    stream = dataclasses.replace(open_stream(spec.name, recipe), held_out_fraction=0.0)
    bar = tqdm(desc=spec.label, total=spec.at_most, unit="conv", disable=None)
    with bar:
        for document in stream.one_epoch():
            reason = keep(clean(document), gathered, recipe.held_out_fraction, seen)
            if reason is not None:
                gathered.dropped[reason] += 1
                continue
            bar.update(1)
            if len(gathered.kept) == spec.at_most:
                break
    if not gathered.kept:
        raise UserError(f"source {spec.name!r}: not one conversation passed the filters")
    return gathered


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
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    words = f"{fingerprint(system)}\n{fingerprint(messages)}"
    key = hashlib.blake2b(words.encode(), digest_size=16).hexdigest()
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
    table = Table(title="Conversations for supervised fine-tuning")
    for heading in ("source", "train", "validation", "repeat", "mean turns", "mean chars"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    table.add_column("dropped")
    for part in gathered:
        sizes = [sum(len(m["content"]) for m in messages) for messages in part.kept]
        turns = [sum(m["role"] == "user" for m in messages) for messages in part.kept]
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in part.dropped.most_common())
        table.add_row(
            part.spec.label, f"{len(part.train):,}", f"{len(part.validation):,}",
            str(part.spec.repeat), f"{mean(turns):.1f}", f"{mean(sizes):.0f}", dropped,
        )  # fmt: skip
    return table


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="v4", help="name in recipes/, or path (default: v4)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a field of the recipe; repeatable",
    )  # fmt: skip
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    seen: set[str] = set()
    gathered = [gather(recipe, spec, seen) for spec in recipe.sft.data.sources]
    folder = Path(recipe.sft.data.folder)
    for side in ("train", "validation"):
        if not any(getattr(part, side) for part in gathered):
            raise UserError(f"no conversation for {side}: change held_out_fraction in the recipe")
    for side in ("train", "validation"):
        write_json_lines(folder / f"{side}.jsonl", rows(gathered, side))
    Console().print(summary(gathered))
    print(f"written to {folder}/train.jsonl and validation.jsonl")
    return 0


if __name__ == "__main__":
    run(main)
