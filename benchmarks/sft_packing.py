"""Fine-tuning on packed rows beside fine-tuning on padded ones: useful tokens a second.

    python benchmarks/sft_packing.py --recipe tiny              # after prepare_sft_data.py
    python benchmarks/sft_packing.py --recipe v4 --data FOLDER  # jsonl or parquet with `messages`

Useful are the tokens of the conversations, and among them the labelled ones, the assistant's;
padding isn't. Each round takes some packed rows as the SFT stage makes them, and trains on the
very same conversations in three ways: packed, each padded to the row's length, and each padded to
the longest of its batch. Model, optimizer and rows a step are the same. Padding needs no mask
(nothing looks ahead), and only labelled positions get logits, in all three. Then the model that
was trained on packed rows gives the loss of the first round's conversations in each way.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common import (
    OurStepper,
    Stepper,
    add_json_option,
    add_recipe_options,
    keep,
    median_ratio,
    narrow_table,
    positive,
    read_recipe,
    seconds_of,
    shuffled_rounds,
    spread,
    usual_precision,
)
from rich.console import Console
from rich.table import Table

from hamner.batches import Example, MicroBatch, PackedBatches, on_device, packed_tensors
from hamner.errors import UserError, run
from hamner.machine import PRECISIONS, pick_device
from hamner.optim import make_optimizer
from hamner.recipe import Recipe
from hamner.sources import read_file
from hamner.stage import check_vocabulary, open_tokenizer
from hamner.tokenization import Tokenizer
from model import IGNORE_INDEX, Transformer
from train_sft import fit

ENDINGS = (".jsonl", ".parquet")
LOSS_TOLERANCE = 1e-5


@dataclass
class Speeds:
    """Tokens a second of every round."""

    useful: list[float] = field(default_factory=list)
    labelled: list[float] = field(default_factory=list)


# ------------------------------------------------------------------------------- conversations


def conversation_files(recipe: Recipe, data: Path | None) -> list[Path]:
    """The recipe's prepared file, or all that --data holds.

    Raises:
        UserError: there is none.
    """
    if data is None:
        path = Path(recipe.sft.data.folder) / "train.jsonl"
        if path.is_file():
            return [path]
        raise UserError(f"{path} doesn't exist: run prepare_sft_data.py first, or give --data")
    found = sorted(path for path in data.glob("*") if path.suffix in ENDINGS)
    if not found:
        raise UserError(f"--data {data}: no {' or '.join(ENDINGS)} file in this folder")
    return found


def read_examples(
    paths: Sequence[Path], tokenizer: Tokenizer, room: int, tokens: int
) -> list[Example]:
    """Conversations of so many tokens, drawn from all files, cut to the turns that fit the room.

    Raises:
        UserError: a row that isn't a conversation, or none with an answer.
    """
    rows = [(path, number, row) for path in paths for number, row in read_file(path)]
    random.Random(0).shuffle(rows)
    examples: list[Example] = []
    for path, number, row in rows:
        try:
            example = fit(tokenizer, row["messages"], room)
        except (KeyError, TypeError, UserError) as error:
            raise UserError(f"{path}, row {number + 1}: not a conversation ({error})") from None
        if example is not None and (example.labels != IGNORE_INDEX).any():
            examples.append(example)
            tokens -= len(example)
        if tokens <= 0:
            break
    if not examples:
        raise UserError(f"{paths[0].parent}: not one conversation with an answer to learn from")
    return examples


def labelled_tokens(examples: Sequence[Example]) -> int:
    return sum(int((example.labels != IGNORE_INDEX).sum()) for example in examples)


# ------------------------------------------------------------------------------- three ways


def packed_rows(examples: Sequence[Example], recipe: Recipe) -> list[list[Example]]:
    """An epoch's rows, as the SFT stage packs them."""
    settings = recipe.sft
    batches = PackedBatches(
        examples,
        [1] * len(examples),
        epochs=1,
        row_length=settings.sequence_length,
        rows_per_step=settings.sequences_per_step,
        micro_batch=settings.micro_batch,
        seed=recipe.seed,
    )
    return [[examples[i] for i in row] for _, row in batches.plan]


def batches_of(way: str, rows: Sequence[list[Example]], size: int, length: int) -> list[MicroBatch]:
    """The conversations of packed rows as batches of `size` rows of at most `length` tokens."""
    if way == "packed":
        return [packed_tensors(rows[i : i + size], length) for i in range(0, len(rows), size)]
    examples = [example for row in rows for example in row]
    batches = []
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        longest = length if way == "padded" else max(map(len, part))
        batch = packed_tensors([[example] for example in part], longest)
        batches.append({key: value for key, value in batch.items() if key != "sequence_ids"})
    return batches


WAYS = ("packed", "padded", "padded to longest")


def make_stepper(recipe: Recipe, precision: str, device: torch.device) -> Stepper:
    torch.manual_seed(recipe.seed)
    model = Transformer(recipe.model.config()).to(device).train()
    settings = recipe.sft.optimizer
    optimizer = make_optimizer(model, settings)
    return OurStepper(model, optimizer, precision, device, settings.clip)


def mean_loss(model: Transformer, batches: Sequence[MicroBatch], device: torch.device) -> float:
    """Mean over all labelled tokens, in fp32 whatever the training's precision."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            loss = model(**on_device(batch, device), reduction="sum").loss
            assert loss is not None
            total += float(loss)
            count += int((batch["labels"] != IGNORE_INDEX).sum())
    return total / count


def losses_by_way(
    model: Transformer, rows: Sequence[list[Example]], recipe: Recipe, device: torch.device
) -> dict[str, float]:
    """The loss that a model has on the same conversations, each way."""
    model.eval()
    size, length = recipe.sft.micro_batch, recipe.sft.sequence_length
    return {way: mean_loss(model, batches_of(way, rows, size, length), device) for way in WAYS}


def measure(
    steppers: dict[str, Stepper],
    parts: Sequence[list[list[Example]]],
    recipe: Recipe,
    device: torch.device,
) -> dict[str, Speeds]:
    """Train on each part's conversations in every way, one after the other in varying order."""
    size, length = recipe.sft.micro_batch, recipe.sft.sequence_length
    for way, step in steppers.items():  # the first step is slower
        step(**on_device(batches_of(way, parts[0][:1], size, length)[0], device))
    speeds = {way: Speeds() for way in WAYS}
    for number, order in enumerate(shuffled_rounds(WAYS, len(parts)), start=1):
        rows = parts[number - 1]
        examples = [example for row in rows for example in row]
        for way in order:
            batches = [on_device(batch, device) for batch in batches_of(way, rows, size, length)]
            seconds = seconds_of(partial(train, steppers[way], batches), device)
            speeds[way].useful.append(sum(map(len, examples)) / seconds)
            speeds[way].labelled.append(labelled_tokens(examples) / seconds)
        print(f"round {number} of {len(parts)}: {len(examples)} conversations", flush=True)
    return speeds


def train(step: Stepper, batches: Sequence[MicroBatch]) -> None:
    for batch in batches:
        step(**batch)


# ------------------------------------------------------------------------------- the table


def table_of(ways: dict[str, dict[str, Any]], title: str) -> Table:
    """The table of `figures`."""
    headings = (
        "rows", "useful\ntokens/s", "lowest", "highest", "labelled\ntokens/s",
        "packed to\nthis, times", "loss",
    )  # fmt: skip
    table = narrow_table(title, headings)
    for way, found in ways.items():
        labelled, ratio = spread(found["rounds_labelled"])[0], f"{found['packed_over_this']:.2f}"
        table.add_row(way, *spread(found["rounds"]), labelled, ratio, f"{found['loss']:.6f}")
    return table


def figures(speeds: dict[str, Speeds], losses: dict[str, float]) -> dict[str, Any]:
    """Speed, ratio and loss of every way, and its rounds, in tokens/s."""
    return {
        way: {
            "useful_tokens_per_second": median(speed.useful),
            "packed_over_this": median_ratio(speeds["packed"].useful, speed.useful),
            "loss": losses[way],
            "rounds": speed.useful,
            "rounds_labelled": speed.labelled,
        }
        for way, speed in speeds.items()
    }


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe_options(parser, "tiny")
    add_json_option(parser)
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="default: the recipe's SFT file"
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--rows", type=positive, help="packed rows a round; default: a step's")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="default: fp32, on CUDA the recipe's"
    )
    return parser


def parts_of(
    examples: Sequence[Example], recipe: Recipe, rounds: int, each: int
) -> list[list[list[Example]]]:
    """`each` packed rows for every round.

    Raises:
        UserError: the conversations don't fill so many.
    """
    rows = packed_rows(examples, recipe)
    if len(rows) < rounds * each:
        raise UserError(
            f"the conversations fill {len(rows)} rows, and {rounds} rounds of {each} need "
            f"{rounds * each}: give fewer --rounds or --rows"
        )
    return [rows[i * each : (i + 1) * each] for i in range(rounds)]


def main() -> int:
    arguments = command_line().parse_args()
    recipe, device = read_recipe(arguments), pick_device(arguments.device)
    precision = arguments.precision or usual_precision(recipe, device)
    files = conversation_files(recipe, arguments.data)
    tokenizer = open_tokenizer(recipe)
    check_vocabulary(tokenizer, recipe)
    room, each = recipe.sft.sequence_length, arguments.rows or recipe.sft.sequences_per_step
    enough = 2 * arguments.rounds * each * room  # rows are packed from more than one round's
    examples = read_examples(files, tokenizer, room, enough)
    parts = parts_of(examples, recipe, arguments.rounds, each)
    steppers = {way: make_stepper(recipe, precision, device) for way in WAYS}
    speeds = measure(steppers, parts, recipe, device)
    losses = losses_by_way(steppers["packed"].model, parts[0], recipe, device)
    length = mean(len(example) for part in parts for row in part for example in row)
    title = f"Rows of {room}, {precision}, conversations of {length:.0f} tokens on average"
    ways = figures(speeds, losses)
    Console().print(table_of(ways, title))
    worst = max(losses.values()) - min(losses.values())
    same = worst <= LOSS_TOLERANCE
    print(f"same loss: {'yes' if same else 'NO'}, {worst:.1e} apart (at most {LOSS_TOLERANCE:g})")
    keep(arguments, {"tokens_a_conversation": length, "ways": ways})
    return 0 if same else 1


if __name__ == "__main__":
    run(main)
