"""Stage 5: direct preference optimisation (Rafailov et al., arXiv 2305.18290).

The reference is the SFT model itself: what it thinks of every pair is computed once, before the
first step, and kept in the checkpoint. Chosen and rejected answers are packed into common rows.

    python train_dpo.py                        from stage 4's best checkpoint, or continue
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from hamner.batches import Batch, Example, MicroBatch, digest, make_example, pack, packed_tensors
from hamner.errors import UserError, run
from hamner.recipe import Recipe
from hamner.sources import Row, is_held_out, open_source
from hamner.stage import Start, open_stage, stage_parser
from hamner.tokenization import Message, Tokenizer, check_message
from hamner.training import Task, Validation, autocast
from model import IGNORE_INDEX, Transformer

METRICS = ("chosen_reward", "rejected_reward", "margin", "accuracy", "chosen_logp", "rejected_logp")


@dataclass
class Pair:
    """A preference pair, tokenised; labels cover the last assistant turn alone."""

    chosen: Example
    rejected: Example


# ------------------------------------------------------------------------------ reading pairs


def last_answer(tokenizer: Tokenizer, messages: Sequence[Message]) -> Example:
    """A conversation as an example whose labels cover its last turn only."""
    prompt, _ = tokenizer.chat(messages[:-1], answer_next=True)
    ids, labels = tokenizer.chat(messages)
    return make_example(ids, [IGNORE_INDEX] * len(prompt) + labels[len(prompt) :])


def make_pair(row: Row, tokenizer: Tokenizer, room: int) -> Pair | str:
    """A row's pair, or the reason why it is of no use."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not (isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected):
        raise UserError("preference rows need message lists in columns chosen and rejected")
    for message in (*chosen, *rejected):
        check_message(message)
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        return "not ending with an answer"
    if chosen[:-1] != rejected[:-1]:
        return "answers to different prompts"
    if chosen[-1]["content"].strip() == rejected[-1]["content"].strip():
        return "the same answer twice"
    pair = Pair(last_answer(tokenizer, chosen), last_answer(tokenizer, rejected))
    if max(len(pair.chosen), len(pair.rejected)) > room:
        return f"longer than {room} tokens"
    return pair


def read_pairs(recipe: Recipe, tokenizer: Tokenizer, side: str, at_most: int) -> list[Pair]:
    """Usable pairs of a side, `train` or `validation`, up to `at_most`; prints what was left out.

    If both sides name the same source, it is split by a hash of the prompt.

    Raises:
        UserError: the source can't be read, or holds no usable pair.
    """
    settings = recipe.dpo
    name = settings.train if side == "train" else settings.validation
    shared = settings.train == settings.validation
    pairs: list[Pair] = []
    left_out: Counter[str] = Counter()
    for row, _ in open_source(name, recipe).rows(0, None):
        try:
            pair = make_pair(row, tokenizer, settings.sequence_length)
        except UserError as error:
            raise UserError(f"source {name!r}: not a preference pair ({error})") from None
        if shared and is_validation(row, recipe.held_out_fraction) != (side == "validation"):
            continue
        if isinstance(pair, str):
            left_out[pair] += 1
            continue
        pairs.append(pair)
        if len(pairs) == at_most:
            break
    reasons = "".join(f"; {count:,} left out: {reason}" for reason, count in left_out.items())
    print(f"{side}: {len(pairs):,} preference pairs{reasons}", flush=True)
    if not pairs:
        raise UserError(f"source {name!r}: no usable preference pair for {side}")
    return pairs


def is_validation(row: Row, fraction: float) -> bool:
    return is_held_out(row["chosen"][:-1], fraction)


# ------------------------------------------------------------------------------ batches


def pair_tensors(pairs: Sequence[Pair], reference: Tensor, row_length: int) -> MicroBatch:
    """Pairs packed into rows.

    Besides the packed rows: `slots` (2, P), where each pair's chosen and rejected sequence lies
    among all (row, sequence) places, and `reference` (2, P), its log-probabilities.
    """
    examples = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    rows = pack([len(example) for example in examples], row_length)
    places = max(len(row) for row in rows) + 1  # the last one of each row takes the padding
    slots = torch.empty(len(examples), dtype=torch.int64)
    for r, row in enumerate(rows):
        for number, item in enumerate(row):
            slots[item] = r * places + number
    tensors = packed_tensors([[examples[i] for i in row] for row in rows], row_length)
    tensors["places"] = torch.tensor(places)
    tensors["slots"] = slots.view(2, len(pairs))
    tensors["reference"] = reference
    return tensors


class PairBatches:
    """Epochs over pairs, each in an order that follows from the seed and the epoch alone."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        reference: Tensor,  # (2, number of pairs)
        recipe: Recipe,
        state: dict[str, Any] | None = None,
    ):
        self.pairs, self.reference, self.settings = pairs, reference, recipe.dpo
        self.order: list[int] = []
        for epoch in range(recipe.dpo.epochs):
            epoch_order = list(range(len(pairs)))
            random.Random(f"{recipe.seed}/dpo/{epoch}").shuffle(epoch_order)
            self.order += epoch_order
        self.done = state["pair"] if state is not None else 0

    @property
    def steps(self) -> int:
        return -(-len(self.order) // self.settings.pairs_per_step)

    def __iter__(self) -> Iterator[Batch]:
        while self.done < len(self.order):
            chosen = self.order[self.done : self.done + self.settings.pairs_per_step]
            self.done += len(chosen)
            batch = pair_batch(self.pairs, chosen, self.reference, self.settings)
            batch.state, batch.epoch = {"pair": self.done}, self.done / len(self.pairs)
            yield batch


def pair_batch(
    pairs: Sequence[Pair], numbers: Sequence[int], reference: Tensor, settings: Any
) -> Batch:
    """The pairs of these numbers, in micro-batches; the loss is a mean over pairs."""
    parts = [
        numbers[i : i + settings.micro_batch] for i in range(0, len(numbers), settings.micro_batch)
    ]
    micro_batches = [
        pair_tensors(
            [pairs[i] for i in part], reference[:, torch.tensor(part)], settings.sequence_length
        )
        for part in parts
    ]
    tokens = sum(len(pairs[i].chosen) + len(pairs[i].rejected) for i in numbers)
    return Batch(micro_batches, len(numbers), tokens, {})


# ------------------------------------------------------------------------------ the loss


def pair_log_probabilities(model: Transformer, batch: MicroBatch) -> Tensor:
    """Summed log-probability of every answer: (2, P), chosen above rejected."""
    sequence_ids = batch["sequence_ids"]  # (R, T)
    out = model(batch["input_ids"], batch["labels"], sequence_ids=sequence_ids, reduction="none")
    assert out.loss is not None
    rows, places = len(sequence_ids), int(batch["places"])
    place = sequence_ids % places  # padding, -1, becomes the last place
    place = place + torch.arange(rows, device=place.device)[:, None] * places
    sums = out.loss.new_zeros(rows * places)
    sums = sums.index_add(0, place.flatten(), -out.loss.flatten())
    return sums[batch["slots"]]


def dpo_loss(
    model: Transformer, batch: MicroBatch, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log sigmoid(beta * margin), summed over pairs (equation 7 of the paper).

    A reward is beta times how much likelier the policy finds an answer than the reference does.
    """
    logps = pair_log_probabilities(model, batch)
    rewards = beta * (logps - batch["reference"])  # (2, P)
    margin = rewards[0] - rewards[1]
    sums = {
        "chosen_reward": rewards[0].sum(),
        "rejected_reward": rewards[1].sum(),
        "margin": margin.sum(),
        "accuracy": (margin > 0).sum(),
        "chosen_logp": logps[0].sum(),
        "rejected_logp": logps[1].sum(),
    }
    return -F.logsigmoid(margin).sum(), sums


@torch.no_grad()
def reference_log_probabilities(start: Start, pairs: Sequence[Pair], side: str) -> Tensor:
    """(2, number of pairs), by the model as it stands before the first step."""
    settings, model = start.recipe.dpo, start.model.to(start.device).eval()
    unknown = torch.zeros(2, len(pairs))
    batch = pair_batch(pairs, range(len(pairs)), unknown, settings)
    parts = []
    for micro_batch in tqdm(batch.micro_batches, desc=f"reference, {side}", disable=None):
        on_device = {key: value.to(start.device) for key, value in micro_batch.items()}
        with autocast(start.recipe.precision, start.device):
            parts.append(pair_log_probabilities(model, on_device).float().cpu())
    return torch.cat(parts, dim=1)


def references(start: Start, sides: dict[str, list[Pair]]) -> dict[str, Any]:
    """Reference log-probabilities of both sides: from the checkpoint of this run, or computed.

    Raises:
        UserError: the run began with other pairs.
    """
    digests = {
        f"{side}_pairs": digest(answer for pair in pairs for answer in (pair.chosen, pair.rejected))
        for side, pairs in sides.items()
    }
    if start.resume is None:
        computed = {s: reference_log_probabilities(start, pairs, s) for s, pairs in sides.items()}
        return {**computed, **digests}
    kept = start.resume["extra"]["reference"]
    for side, pairs in sides.items():
        if kept[f"{side}_pairs"] != digests[f"{side}_pairs"]:
            raise UserError(
                f"this run began with {kept[side].shape[1]:,} {side} pairs, and these "
                f"{len(pairs):,} are not the same: bring the old data back, or begin anew with "
                "--fresh"
            )
    return kept


def dpo_task(start: Start) -> Task:
    recipe, settings = start.recipe, start.recipe.dpo
    sides = {
        "train": read_pairs(recipe, start.tokenizer, "train", settings.max_pairs),
        "validation": read_pairs(recipe, start.tokenizer, "validation", settings.validation_pairs),
    }
    reference = references(start, sides)
    held_out = sides["validation"]
    validation = pair_batch(held_out, range(len(held_out)), reference["validation"], settings)
    steps = PairBatches(sides["train"], reference["train"], recipe).steps
    return Task(
        stage="dpo",
        batches=lambda state: iter(PairBatches(sides["train"], reference["train"], recipe, state)),
        steps=min(steps, settings.steps or steps),
        loss=functools.partial(dpo_loss, beta=settings.beta),
        validation={"dpo": Validation(validation)},
        metrics=METRICS,
        keep_best=True,
        patience=settings.patience,
        chat_prompts=True,
        extra={"reference": reference},
    )


def main() -> int:
    start = open_stage("dpo", stage_parser(__doc__).parse_args())
    return start.run(dpo_task(start)) if start else 0


if __name__ == "__main__":
    run(main)
