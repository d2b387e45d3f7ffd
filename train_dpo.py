"""Stage 5: direct preference optimisation (Rafailov et al., arXiv 2305.18290).

The reference is the SFT model itself: what it thinks of every pair is computed once, before the
first step, and kept in the checkpoint, and beside it for other runs over the same pairs. Chosen and
rejected answers are packed into common rows, as short as they can be.

    python train_dpo.py                        from stage 4's best checkpoint, or continue
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor
from tqdm import tqdm

from hamner.batches import (
    Batch,
    Example,
    MicroBatch,
    digest,
    filled_share_of,
    make_example,
    on_device,
    pack,
    packed_tensors,
)
from hamner.errors import UserError, run
from hamner.machine import autocast
from hamner.recipe import DPOStage, Recipe
from hamner.reference_cache import ReferenceCache
from hamner.sources import Row, is_held_out, open_source
from hamner.stage import Start, open_stage, stage_parser
from hamner.tokenization import Message, Tokenizer, check_message
from hamner.training import Task, Validation
from model import IGNORE_INDEX, Transformer

METRICS = ("chosen_reward", "rejected_reward", "margin", "accuracy", "chosen_logp", "rejected_logp")
ATTENTION_LENGTH = 2_048  # in rows so long attention costs as much as all the rest, about
TOGETHER = 1_000  # rows tokenised together, on all cores


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


class PreparedTokenizer(Tokenizer):
    """The same tokenizer with the ids of many texts made ready together, on all cores."""

    def __init__(self, tokenizer: Tokenizer):
        self._ready: dict[str, list[int]] = {}
        super().__init__(HFTokenizer.from_str(tokenizer.to_json()))

    def prepare(self, rows: Iterable[Row]) -> None:
        """Tokenise what is said in these rows, each text once; forget the rows before."""
        messages = (m for row in rows for m in (*row["chosen"], *row["rejected"]))
        texts = list(dict.fromkeys(message["content"].strip() for message in messages))
        self._ready = dict(zip(texts, self.encode_batch(texts), strict=True))

    def encode(self, text: str) -> list[int]:
        ids = self._ready.get(text)
        return super().encode(text) if ids is None else ids


def check_row(row: Row) -> None:
    """Raises a UserError that says why this is no preference pair at all."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not (isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected):
        raise UserError("preference rows need message lists in columns chosen and rejected")
    for message in (*chosen, *rejected):
        check_message(message)


def make_pair(row: Row, tokenizer: Tokenizer, room: int) -> Pair | str:
    """A checked row's pair, or the reason why it is of no use."""
    chosen, rejected = row["chosen"], row["rejected"]
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


def side_rows(recipe: Recipe, side: str) -> Iterator[Row]:
    """Rows of a side, `train` or `validation`; one source for both is split by the prompt's hash.

    Raises:
        UserError: the source can't be read, or holds something else than preference pairs.
    """
    settings = recipe.dpo
    name = settings.train if side == "train" else settings.validation
    shared = settings.train == settings.validation
    for row, _ in open_source(name, recipe).rows(0, None):
        try:
            check_row(row)
        except UserError as error:
            raise UserError(f"source {name!r}: not a preference pair ({error})") from None
        if not shared or is_validation(row, recipe.held_out_fraction) == (side == "validation"):
            yield row


def is_validation(row: Row, fraction: float) -> bool:
    return is_held_out(row["chosen"][:-1], fraction)


def read_pairs(recipe: Recipe, tokenizer: Tokenizer, side: str, at_most: int) -> list[Pair]:
    """Usable pairs of a side, up to `at_most`; prints what was left out.

    Raises:
        UserError: the source can't be read, or holds no usable pair.
    """
    rows, prepared = side_rows(recipe, side), PreparedTokenizer(tokenizer)
    pairs: list[Pair] = []
    left_out: Counter[str] = Counter()
    while wanted := at_most - len(pairs):
        together = list(itertools.islice(rows, min(wanted, TOGETHER)))
        if not together:
            break
        prepared.prepare(together)
        for row in together:
            pair = make_pair(row, prepared, recipe.dpo.sequence_length)
            if isinstance(pair, Pair):
                pairs.append(pair)
            else:
                left_out[pair] += 1
    reasons = "".join(f"; {count:,} left out: {reason}" for reason, count in left_out.items())
    print(f"{side}: {len(pairs):,} preference pairs{reasons}", flush=True)
    if not pairs:
        name = recipe.dpo.train if side == "train" else recipe.dpo.validation
        raise UserError(f"source {name!r}: no usable preference pair for {side}")
    return pairs


# ------------------------------------------------------------------------------ batches


def good_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Item numbers of each row, for rows with little padding that aren't longer than need be.

    Every row length from the longest item's to `row_length` is tried, in steps of 64, and the rows
    that should take the least time are taken.
    """
    order = sorted(range(len(lengths)), key=lambda item: -lengths[item])
    longest_first = [lengths[item] for item in order]
    packings = [
        pack(longest_first, length)
        for length in (*range(longest_first[0], row_length, 64), row_length)
    ]

    def cost(rows: list[list[int]]) -> int:
        length = max(sum(longest_first[i] for i in row) for row in rows)
        return len(rows) * length * (ATTENTION_LENGTH + length)

    return [[order[i] for i in row] for row in min(packings, key=cost)]


def pair_tensors(pairs: Sequence[Pair], reference: Tensor, row_length: int) -> MicroBatch:
    """P pairs packed into rows, no longer than the fullest of them.

    Besides the packed rows (R, T): `answers` (R, T), the number of the answer that a token belongs
    to, chosen ones first, padding to any; `reference` (2, P), the answers' log-probabilities; and
    `answer_tokens` (2, P), how many tokens of each carry a label.
    """
    examples = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    lengths = [len(example) for example in examples]
    rows = good_rows(lengths, row_length) if examples else [[]]
    longest = max(2, *(sum(lengths[i] for i in row) for row in rows))
    tensors = packed_tensors([[examples[i] for i in row] for row in rows], longest)
    tensors["answers"] = torch.zeros(len(rows), longest, dtype=torch.int64)
    for r, row in enumerate(rows):
        numbers = np.repeat(row, [lengths[i] for i in row])
        tensors["answers"][r, : len(numbers)] = torch.from_numpy(numbers)
    labelled = [labelled_tokens(example) for example in examples]
    tensors["answer_tokens"] = torch.tensor(labelled, dtype=torch.int64).view(2, len(pairs))
    tensors["reference"] = reference
    return tensors


def labelled_tokens(example: Example) -> int:
    return int((example.labels != IGNORE_INDEX).sum())


class PairBatches:
    """Epochs over pairs, each in an order that follows from the seed and the epoch alone."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        reference: Tensor,  # (2, number of pairs)
        recipe: Recipe,
        state: dict[str, Any] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.pairs, self.reference, self.settings = pairs, reference, recipe.dpo
        self.rank, self.ranks = rank, ranks
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
            batch = pair_batch(
                self.pairs, chosen, self.reference, self.settings, rank=self.rank, ranks=self.ranks
            )
            batch.state, batch.epoch = {"pair": self.done}, self.done / len(self.pairs)
            yield batch


def pair_batch(
    pairs: Sequence[Pair],
    numbers: Sequence[int],
    reference: Tensor,
    settings: DPOStage,
    *,
    rank: int = 0,
    ranks: int = 1,
) -> Batch:
    """A rank's share of the pairs of these numbers, in micro-batches; the loss is a mean over all.

    `pairs_per_token` in each turns a sum over chosen tokens into what, divided by the number of
    pairs like all else, is the mean over all chosen tokens of the step.
    """
    chosen_tokens = sum(labelled_tokens(pairs[i].chosen) for i in numbers)
    micro_batches = []
    for part in in_parts(filled_share_of(numbers, rank, ranks, filler=-1), settings.micro_batch):
        part = [i for i in part if i >= 0]
        of_part = reference[:, torch.tensor(part, dtype=torch.int64)]
        tensors = pair_tensors([pairs[i] for i in part], of_part, settings.sequence_length)
        tensors["pairs_per_token"] = torch.tensor(len(numbers) / chosen_tokens)
        micro_batches.append(tensors)
    tokens = sum(len(pairs[i].chosen) + len(pairs[i].rejected) for i in numbers)
    return Batch(micro_batches, len(numbers), tokens, {})


def in_parts(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


# ------------------------------------------------------------------------------ the loss


def pair_log_probabilities(model: Transformer, batch: MicroBatch) -> Tensor:
    """Summed log-probability of every answer: (2, P), chosen above rejected."""
    out = model(
        batch["input_ids"],
        batch["labels"],
        sequence_ids=batch["sequence_ids"],
        num_labels=batch["num_labels"],
        reduction="none",
    )
    count = batch["reference"].numel()
    sums = out.loss.new_zeros(max(1, count))  # padding needs a place where there is no answer
    sums = sums.index_add(0, batch["answers"].flatten(), -out.loss.flatten())  # 0 from padding
    return sums[:count].view_as(batch["reference"])


def preference_losses(log_ratios: Tensor, answer_tokens: Tensor, settings: DPOStage) -> Tensor:
    """Loss of each pair (P), from log(policy / reference) of its answers (2, P).

    sigmoid: equation 7 of the DPO paper, with label smoothing as if that share of the labels were
    the wrong way round ("conservative DPO", equation 3 of https://ericmitchell.ai/cdpo.pdf).
    ipo: equation 17 of arXiv 2310.12036, on log-ratios per token.
    """
    if settings.loss == "ipo":
        chosen, rejected = log_ratios / answer_tokens
        return (chosen - rejected - 1 / (2 * settings.beta)) ** 2
    margin = settings.beta * (log_ratios[0] - log_ratios[1])
    smoothing = settings.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def dpo_loss(
    model: Transformer, batch: MicroBatch, settings: DPOStage
) -> tuple[Tensor, dict[str, Tensor]]:
    """The preference loss, and `sft_weight` times that of the chosen answers; summed over pairs.

    A reward is beta times how much likelier the policy finds an answer than the reference does.
    """
    logps = pair_log_probabilities(model, batch)
    log_ratios = logps - batch["reference"]  # (2, P)
    rewards = settings.beta * log_ratios
    margin = rewards[0] - rewards[1]
    loss = preference_losses(log_ratios, batch["answer_tokens"], settings).sum()
    sums = {
        "chosen_reward": rewards[0].sum(),
        "rejected_reward": rewards[1].sum(),
        "margin": margin.sum(),
        "accuracy": (margin > 0).sum(),
        "chosen_logp": logps[0].sum(),
        "rejected_logp": logps[1].sum(),
    }
    if settings.sft_weight:
        sums["sft_loss"] = -logps[0].sum() * batch["pairs_per_token"]
        loss = loss + settings.sft_weight * sums["sft_loss"]
    return loss, sums


# ------------------------------------------------------------------------------ the reference


@torch.no_grad()
def reference_log_probabilities(start: Start, pairs: Sequence[Pair], side: str) -> Tensor:
    """(2, number of pairs), by the model as it stands before the first step.

    Pairs of like length go together, longest first: little padding, and a memory that is too small
    shows at once.
    """
    settings, model = start.recipe.dpo, start.model.to(start.device).eval()
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].chosen) - len(pairs[i].rejected))
    found = []
    for part in tqdm(in_parts(order, settings.micro_batch), f"reference, {side}", disable=None):
        unknown = torch.zeros(2, len(part))
        batch = pair_tensors([pairs[i] for i in part], unknown, settings.sequence_length)
        with autocast(start.recipe.precision, start.device):
            found.append(pair_log_probabilities(model, on_device(batch, start.device)).float())
    result = torch.empty(2, len(pairs))
    result[:, torch.tensor(order)] = torch.cat(found, dim=1).cpu()
    return result


def reference_folder(recipe: Recipe) -> Path:
    """Where runs leave their references for others: beside the checkpoints, which --fresh moves."""
    folder = recipe.folder("dpo")
    return folder.with_name(f"{folder.name}_reference")


def references(start: Start, sides: dict[str, list[Pair]]) -> dict[str, Any]:
    """Reference log-probabilities of both sides.

    They come from the checkpoint of this run, from another run over the same pairs, or are
    computed.

    Raises:
        UserError: the run began with other pairs.
    """
    digests = {
        side: digest(answer for pair in pairs for answer in (pair.chosen, pair.rejected))
        for side, pairs in sides.items()
    }
    if start.resume is not None:
        kept = start.resume["extra"]["reference"]
        check_same_pairs(kept, sides, digests)
        return kept
    arithmetic = f"{start.recipe.precision} on {start.device.type}"
    cache = ReferenceCache(reference_folder(start.recipe), start.model, arithmetic)
    found: dict[str, Any] = {f"{side}_pairs": digests[side] for side in sides}
    for side, pairs in sides.items():
        compute = functools.partial(reference_log_probabilities, start, pairs, side)
        found[side] = cache.log_probabilities(digests[side], len(pairs), compute)
    return found


def check_same_pairs(
    kept: dict[str, Any], sides: dict[str, list[Pair]], digests: dict[str, str]
) -> None:
    for side, pairs in sides.items():
        if kept[f"{side}_pairs"] != digests[side]:
            raise UserError(
                f"this run began with {kept[side].shape[1]:,} {side} pairs, and these "
                f"{len(pairs):,} are not the same: bring the old data back, or begin anew with "
                "--fresh"
            )


# ------------------------------------------------------------------------------ the stage


def dpo_task(start: Start) -> Task:
    recipe, settings, machine = start.recipe, start.recipe.dpo, start.machine
    sides = {
        "train": read_pairs(recipe, start.tokenizer, "train", settings.max_pairs),
        "validation": read_pairs(recipe, start.tokenizer, "validation", settings.validation_pairs),
    }
    reference = machine.from_leader(lambda: references(start, sides))
    held_out = sides["validation"]
    validation = pair_batch(held_out, range(len(held_out)), reference["validation"], settings)
    steps = PairBatches(sides["train"], reference["train"], recipe).steps
    return Task(
        stage="dpo",
        batches=lambda state: iter(
            PairBatches(
                sides["train"], reference["train"], recipe, state, machine.rank, machine.ranks
            )
        ),
        steps=min(steps, settings.steps or steps),
        loss=functools.partial(dpo_loss, settings=settings),
        validation={"dpo": Validation(validation)},
        metrics=(*METRICS, "sft_loss") if settings.sft_weight else METRICS,
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
