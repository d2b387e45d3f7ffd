"""Stage 4: supervised fine-tuning on the conversations that prepare_sft_data.py gathered.

Conversations are packed into full rows, attention stays within each, and only the assistant's
words (and the `<|im_end|>` after them) carry loss.

    python train_sft.py                        from stage 3's latest checkpoint, or continue
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hamner.batches import Batch, Example, PackedBatches, digest, make_example, pack, packed_batch
from hamner.errors import UserError, run
from hamner.sources import read_file
from hamner.stage import Start, command, open_stage, stage_parser
from hamner.tokenization import Tokenizer, check_message
from hamner.training import Task, Validation, language_modelling
from model import IGNORE_INDEX


@dataclass
class Conversations:
    """Tokenised conversations, how often an epoch shows each, and what was refused."""

    examples: list[Example]
    repeats: list[int]
    without_answer: int = 0
    shortened: int = 0


def fit(tokenizer: Tokenizer, messages: list[dict[str, str]], room: int) -> Example | None:
    """The conversation with as many of its turns, from the first on, as fit; None if no answer."""
    roles = [check_message(message)[0] for message in messages]
    for end in range(len(messages), 0, -1):
        if roles[end - 1] == "assistant":
            ids, labels = tokenizer.chat(messages[:end])
            if len(ids) <= room:
                return make_example(ids, labels)
    return None


def read_conversations(path: Path, tokenizer: Tokenizer, room: int, command: str) -> Conversations:
    """Read a prepared file: lines with `messages` and `repeat`.

    Raises:
        UserError: no such file, a malformed line, or no conversation that can be learnt from.
    """
    if not path.is_file():
        raise UserError(f"{path} doesn't exist: run `{command}` first")
    found = Conversations([], [])
    for number, row in read_file(path):
        try:
            example = fit(tokenizer, row["messages"], room)
            repeat = int(row.get("repeat", 1))
        except (KeyError, TypeError, ValueError, UserError) as error:
            raise UserError(f"{path}, line {number + 1}: not a conversation ({error})") from None
        if example is None or (example.labels == IGNORE_INDEX).all():
            found.without_answer += 1
            continue
        found.shortened += len(example) < len(tokenizer.chat(row["messages"])[0])
        found.examples.append(example)
        found.repeats.append(repeat)
    if not found.examples:
        raise UserError(f"{path}: not one conversation with an answer to learn from")
    return found


def report(path: Path, found: Conversations, room: int) -> None:
    text = f"{path}: {len(found.examples):,} conversations"
    if found.shortened:
        text += f", {found.shortened:,} of them cut to whole turns within {room} tokens"
    if found.without_answer:
        text += f"; {found.without_answer:,} refused, no assistant turn within {room} tokens"
    print(text, flush=True)


def sft_task(start: Start) -> Task:
    recipe, settings = start.recipe, start.recipe.sft
    room = settings.sequence_length
    train, held_out = (load_side(start, side) for side in ("train", "validation"))

    def packed(state: dict[str, Any] | None) -> PackedBatches:
        return PackedBatches(
            train.examples,
            train.repeats,
            epochs=settings.epochs,
            row_length=room,
            rows_per_step=settings.sequences_per_step,
            micro_batch=settings.micro_batch,
            seed=recipe.seed,
            state=state,
            rank=start.machine.rank,
            ranks=start.machine.ranks,
        )

    def batches(state: dict[str, Any] | None) -> Iterator[Batch]:
        return iter(packed(state))

    began_with = {"conversations": digest(train.examples), "repeats": train.repeats}
    if start.resume is not None and start.resume["extra"] != began_with:
        raise UserError(
            f"{settings.data.folder}/train.jsonl is not what this run began with: bring it back, "
            "or begin anew with --fresh"
        )
    steps = packed(None).steps
    rows = pack([len(example) for example in held_out.examples], room)
    validation = packed_batch(
        [[held_out.examples[i] for i in row] for row in rows], room, settings.micro_batch
    )
    return Task(
        stage="sft",
        batches=batches,
        steps=min(steps, settings.steps or steps),
        loss=language_modelling,
        validation={"sft": Validation(validation)},
        keep_best=True,
        patience=settings.patience,
        chat_prompts=True,
        extra=began_with,
    )


def load_side(start: Start, side: str) -> Conversations:
    path = Path(start.recipe.sft.data.folder) / f"{side}.jsonl"
    room = start.recipe.sft.sequence_length
    prepare = command("prepare", start.recipe_name)
    found = read_conversations(path, start.tokenizer, room, prepare)
    report(path, found, room)
    return found


def main() -> int:
    start = open_stage("sft", stage_parser(__doc__).parse_args())
    return start.run(sft_task(start)) if start else 0


if __name__ == "__main__":
    run(main)
