"""How the concept experiments teach and test: examples with their labels, lessons, measurements.

A trial is a chain of lessons, one after the other, that begins with a checkpoint's weights. The
hundreds of trainings here take seconds each and read a few dozen items over and over, so they don't
go through the stages' loop, which exists for streams of documents and writes checkpoints and logs;
model, label shift, optimizer, clipping and precision are the same.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Literal

import torch

from benchmarks.common import OurStepper
from hamner.batches import Example, make_example, pack
from hamner.errors import UserError
from hamner.generation import Sampling, generate_batch
from hamner.machine import autocast
from hamner.optim import learning_rate, make_optimizer
from hamner.recipe import OptimizerPart, SchedulePart
from hamner.tokenization import Tokenizer
from legacy.concepts import Item
from model import IGNORE_INDEX, Transformer, count_labels

Form = Literal["answer", "all", "packed"]  # see `batch_of`
Score = tuple[int, int]  # right answers, of so many
ASKED_TOGETHER = 256  # prompts
SPARE_TOKENS = 4  # the same words may be spelt with more tokens than they were trained with


# ------------------------------------------------------------------------------ examples, batches


def prompt_ids(tokenizer: Tokenizer, item: Item) -> list[int]:
    """What the model is given: a document's beginning. It is to go on with the answer."""
    return [tokenizer.end_of_text, *tokenizer.encode(item.prompt)]


def answer_ids(tokenizer: Tokenizer, item: Item) -> list[int]:
    """What it is to say, and the end after it."""
    return [*tokenizer.encode(f" {item.answer}"), tokenizer.end_of_text]


def example(tokenizer: Tokenizer, item: Item, form: Form) -> Example:
    """An item as `<|endoftext|>prompt answer<|endoftext|>`; the one place that sets its labels.

    Labels are the answer and its end in the form `answer`, and every token in the other two.
    """
    prompt, answer = prompt_ids(tokenizer, item), answer_ids(tokenizer, item)
    masked = [IGNORE_INDEX] * len(prompt) if form == "answer" else prompt
    return make_example(prompt + answer, masked + answer)


def batch_of(examples: Sequence[Example], form: Form, row_length: int) -> dict[str, torch.Tensor]:
    """Examples as input_ids and labels (rows, T).

    In the forms `answer` and `all` a row is an item. `packed` is plain text: as many items in a
    row of row_length tokens as fit, one after the other, each seeing all that stand before it.

    Raises:
        ValueError: an item is longer than a row.
    """
    if form != "packed":
        return padded([[each] for each in examples])
    # One <|endoftext|> is the end of one item and the beginning of the next.
    rows = pack([len(each) - 1 for each in examples], row_length - 1)
    return padded([[examples[i] for i in row] for row in rows])


def padded(rows: Sequence[Sequence[Example]]) -> dict[str, torch.Tensor]:
    """Rows of examples, without labels where a row is shorter than the longest."""
    ids = [list(chain(row[0].input_ids, *(e.input_ids[1:] for e in row[1:]))) for row in rows]
    labels = [list(chain(row[0].labels, *(e.labels[1:] for e in row[1:]))) for row in rows]
    longest = max(map(len, ids))
    return {
        "input_ids": torch.tensor(
            [row + [0] * (longest - len(row)) for row in ids], dtype=torch.int64
        ),
        "labels": torch.tensor(
            [row + [IGNORE_INDEX] * (longest - len(row)) for row in labels], dtype=torch.int64
        ),
    }


def shuffled_forever(items: Sequence[Item], rng: random.Random) -> Iterator[Item]:
    """Epoch after epoch, each item once in each."""
    while True:
        yield from rng.sample(items, len(items))


def in_turn(groups: Sequence[Sequence[Item]], rng: random.Random) -> Iterator[Item]:
    """An item of each group, again and again; each group goes through its own epochs."""
    streams = [shuffled_forever(group, rng) for group in groups]
    while True:
        for stream in streams:
            yield next(stream)


def replayed(step: int, size: int, share: float) -> int:
    """How many of a step's `size` items are replayed.

    Rounded so that after any number of steps the sum is as close to the share as can be.
    """
    return round((step + 1) * size * share) - round(step * size * share)


# ------------------------------------------------------------------------------ lessons


@dataclass(frozen=True)
class Lesson:
    """Items to learn for a number of steps; with a share of each step's from groups before."""

    name: str
    items: Sequence[Item]
    steps: int
    form: Form = "answer"
    earlier: Sequence[Sequence[Item]] = ()
    replay_share: float = 0.0

    def batches(self, size: int, rng: random.Random) -> Iterator[list[Item]]:
        """The items of each step, of which the first are new."""
        new, old = shuffled_forever(self.items, rng), in_turn(self.earlier, rng)
        share = self.replay_share if self.earlier else 0.0
        for step in range(self.steps):
            count = replayed(step, size, share)
            yield [*islice(new, size - count), *islice(old, count)]


@dataclass(frozen=True)
class Trial:
    """A chain of lessons, and what is asked before, between and after."""

    phase: str
    name: str  # unique among the phase's trials of a seed
    seed: int
    lessons: Sequence[Lesson]
    tests: Mapping[str, Sequence[Item]]
    learning_rate: float | None = None  # None: the settings'
    watched: Sequence[str] = ()  # tests that are asked while the lessons go on, too

    @property
    def key(self) -> str:
        return f"{self.phase}/{self.name}/seed {self.seed}"


@dataclass
class Outcome:
    """What came of a trial. `after[0]` is before the first lesson, `after[i]` after the i-th."""

    phase: str
    name: str
    seed: int
    lessons: list[str]
    after: list[dict[str, Score]] = field(default_factory=list)
    curve: list[tuple[int, dict[str, Score]]] = field(default_factory=list)  # steps of the trial
    tokens: int = 0  # that the model read, padding not counted
    labels: int = 0  # that it was to predict
    seconds: float = 0.0  # of training alone

    @property
    def key(self) -> str:
        return f"{self.phase}/{self.name}/seed {self.seed}"

    def share(self, test: str, lesson: int = -1) -> float:
        """Share of right answers after a lesson; the last one, if it isn't said."""
        right, of = self.after[lesson][test]
        return right / of


@dataclass(frozen=True)
class Schooling:
    """How lessons are given: all that trials have in common."""

    optimizer: OptimizerPart
    items_per_step: int
    row_length: int
    schedule: SchedulePart
    measure_every: int
    precision: str


class School:
    """A checkpoint's model that trials begin with; each gets a copy of its own."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, device: torch.device, ways: Schooling
    ):
        self.model, self.device = model.to(device), device
        self.tokenizer, self.ways = tokenizer, ways

    def run(self, trial: Trial) -> Outcome:
        """Give a trial's lessons, each with a fresh optimizer, and measure."""
        model = copy.deepcopy(self.model)
        outcome = Outcome(
            trial.phase, trial.name, trial.seed, [lesson.name for lesson in trial.lessons]
        )
        outcome.after.append(self.scores(model, trial.tests))
        watched = {name: trial.tests[name] for name in trial.watched}
        if watched:
            outcome.curve.append((0, {name: outcome.after[0][name] for name in watched}))
        before = 0
        for number, lesson in enumerate(trial.lessons):
            for step in self.given(model, trial, number, outcome):
                if watched and step % self.ways.measure_every == 0:
                    outcome.curve.append((before + step, self.scores(model, watched)))
            before += lesson.steps
            outcome.after.append(self.scores(model, trial.tests))
        return outcome

    def given(
        self, model: Transformer, trial: Trial, number: int, outcome: Outcome
    ) -> Iterator[int]:
        """Train the model for a lesson; yields how many steps are done, after each.

        Tokens, labels and seconds are added to the outcome.
        """
        ways, lesson = self.ways, trial.lessons[number]
        peak = trial.learning_rate or ways.optimizer.learning_rate
        optimizer = make_optimizer(model, ways.optimizer)
        step_with = OurStepper(model, optimizer, ways.precision, self.device, ways.optimizer.clip)
        rng = random.Random(f"{trial.seed}/{number}/{lesson.name}")
        for step, items in enumerate(lesson.batches(ways.items_per_step, rng)):
            begin = time.perf_counter()
            examples = [example(self.tokenizer, item, lesson.form) for item in items]
            batch = batch_of(examples, lesson.form, ways.row_length)
            rate = learning_rate(step, lesson.steps, peak, ways.schedule)
            optimizer.set_learning_rate(rate)
            step_with(**{key: value.to(self.device) for key, value in batch.items()})
            # a token between two items of a row is both's
            outcome.tokens += sum(len(each) - 1 for each in examples) + len(batch["input_ids"])
            outcome.labels += count_labels(batch["labels"])
            outcome.seconds += time.perf_counter() - begin
            yield step + 1

    def check_lengths(self, trial: Trial) -> None:
        """Raises UserError if an item doesn't fit into the model's context, or a packed row."""
        groups = [*(lesson.items for lesson in trial.lessons), *trial.tests.values()]
        items = list(chain.from_iterable(groups))
        prompts = [len(prompt_ids(self.tokenizer, item)) for item in items]
        answers = [len(answer_ids(self.tokenizer, item)) for item in items]
        context, row = self.model.config.max_position_embeddings, self.ways.row_length
        packed = any(lesson.form == "packed" for lesson in trial.lessons)
        if packed and row > context:
            raise UserError(f"row_length is {row}, but the model has room for {context} tokens")
        if (needed := max(prompts) + max(answers) + SPARE_TOKENS) > context:
            raise UserError(f"{trial.key}: it takes {needed} tokens, the model has room for "
                            f"{context}: take one with a longer context")  # fmt: skip
        longest = max(map(sum, zip(prompts, answers, strict=True)))
        if packed and longest > row:
            raise UserError(
                f"{trial.key}: an item has {longest} tokens, a row {row}: raise row_length"
            )

    def scores(self, model: Transformer, tests: Mapping[str, Sequence[Item]]) -> dict[str, Score]:
        return {name: self.score(model, items) for name, items in tests.items()}

    def score(self, model: Transformer, items: Sequence[Item]) -> Score:
        """How many of the items a model answers greedily, word for word and with an end."""
        answers = self.answers(model, items)
        pairs = zip(answers, items, strict=True)
        return sum(answer == item.answer for answer, item in pairs), len(items)

    def answers(self, model: Transformer, items: Sequence[Item]) -> list[str | None]:
        """Greedy answers; None is one that didn't end, or held a control token."""
        found: list[str | None] = []
        for start in range(0, len(items), ASKED_TOGETHER):
            part = items[start : start + ASKED_TOGETHER]
            prompts = [prompt_ids(self.tokenizer, item) for item in part]
            longest = max(len(answer_ids(self.tokenizer, item)) for item in part)
            limit = longest + SPARE_TOKENS
            greedy = Sampling(0.0, 0, 1.0, 1.0, max_new_tokens=limit)
            with autocast(self.ways.precision, self.device):
                said = generate_batch(model, prompts, greedy, (self.tokenizer.end_of_text,))
            found += [self.text_of(ids, limit) for ids in said]
        return found

    def text_of(self, ids: Sequence[int], limit: int) -> str | None:
        if len(ids) >= limit or not self.tokenizer.control_ids.isdisjoint(ids):
            return None
        return self.tokenizer.decode(ids).strip()
