"""How many preference pairs a second stage 5 trains on, beside TRL's DPOTrainer in the same run.

    python benchmarks/dpo_step.py --data FOLDER            # with train* files of preference pairs
    python benchmarks/dpo_step.py --recipe small --set data_dir=FOLDER

The same model, pairs, order, batches, optimizer, learning rates and clipping for all, in fp32 on
the CPU, without activation checkpointing. Each runs in its own training loop, ours in
`hamner.training.Trainer`, with what that does around a step: batches, metrics, logs. They take
turns of some steps each; the first turn warms up and isn't counted. TRL stands there twice: as it
comes, with the reference model beside the policy, and with precompute_ref_log_probs.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import torch
from common import add_json_option, keep
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from hamner import tokenization
from hamner.batches import Example, MicroBatch
from hamner.errors import UserError, run
from hamner.files import write_json_lines
from hamner.machine import Machine
from hamner.optim import learning_rate
from hamner.recipe import Recipe, check_recipe, load_recipe
from hamner.sources import open_source
from hamner.stage import Start, check_vocabulary, new_model, open_tokenizer
from hamner.tokenization import Tokenizer
from hamner.training import Trainer
from model import IGNORE_INDEX, Transformer
from train_dpo import Pair, PairBatches, dpo_task, read_pairs

NAMES = ("ours", "TRL", "TRL, precomputed")
PAIRS = "pairs_of_the_benchmark"
SOURCE = 100_000  # rows looked at
SAMPLE = 2_000  # rows drawn from them, of which the first usable ones are trained on


class Turns:
    """Lets several loops run by turns, so many steps each, and times the turns.

    Loop 0 runs in the main thread, as ours handles signals; the others have threads of their own.
    """

    def __init__(self, loops: int, steps: int):
        self.steps = steps
        self.seconds: list[list[float]] = [[] for _ in range(loops)]  # of every turn
        self.error: BaseException | None = None
        self._go = [threading.Event() for _ in range(loops)]
        self._done = [-1] * loops
        self._begin = 0.0
        self._go[0].set()

    def step_begins(self, number: int) -> None:
        """Called before each of a loop's steps: where a turn is over it waits for the next."""
        self._done[number] += 1
        if self._done[number] % self.steps == 0:
            if self._done[number]:
                self.seconds[number].append(time.perf_counter() - self._begin)
                self.hand_over(number)
            self._go[number].wait()
            self._go[number].clear()
            if self.error is not None:
                raise SystemExit(1)
            self._begin = time.perf_counter()

    def hand_over(self, number: int) -> None:
        self._go[(number + 1) % len(self._go)].set()

    def fail(self, error: BaseException) -> None:
        """Ends every loop: one of them can't go on."""
        self.error = self.error or error
        for go in self._go:
            go.set()


# ------------------------------------------------------------------------------ the task


def some_rows(recipe: Recipe) -> list[dict[str, Any]]:
    """Rows drawn from all over the source of pairs: files often hold like beside like."""
    rows = [row for row, _ in islice(open_source(recipe.dpo.train, recipe).rows(0, None), SOURCE)]
    kept = random.Random(recipe.seed).sample(rows, min(len(rows), SAMPLE))
    return [{side: row[side] for side in ("chosen", "rejected")} for row in kept]


def source_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe as given; its pairs may lie in --data."""
    overrides = ["dpo.optimizer.learning_rate=3e-4", "dpo.schedule.warmup=2"]  # the loss must move
    overrides += arguments.overrides
    if arguments.data is not None:
        source = "{kind: files, column: chosen, paths: ['train*']}"
        overrides += [f"data_dir={arguments.data}", f"sources.{PAIRS}={source}"]
        overrides += [f"dpo.train={PAIRS}"]
    return load_recipe(arguments.recipe, overrides)


def benchmark_recipe(recipe: Recipe, arguments: argparse.Namespace, folder: str) -> Recipe:
    """The recipe with what makes the loops comparable, over the pairs in a file in `folder`.

    One step follows the last turn: with it come saving and validating, which aren't timed.
    """
    steps = (arguments.rounds + 1) * arguments.steps + 1
    per_step, part = recipe.dpo.pairs_per_step, recipe.dpo.micro_batch
    if per_step % part:
        raise UserError(f"dpo.pairs_per_step is {per_step}: give a multiple of the {part} together")
    if arguments.pairs * recipe.dpo.epochs < steps * per_step:
        raise UserError(
            f"{arguments.rounds} rounds, one to warm up and a last step see {steps * per_step:,} "
            f"pairs; --pairs {arguments.pairs} in {recipe.dpo.epochs} epochs are too few: give more"
        )
    raw = recipe.model_dump(mode="json") | {
        "precision": "fp32", "compile": False, "gradient_checkpointing": False, "data_dir": folder,
    }  # fmt: skip
    pairs = {"kind": "files", "column": "chosen", "paths": ["pairs.jsonl"]}
    raw["sources"] |= {PAIRS: pairs, f"{PAIRS}_again": pairs}
    raw["dpo"] |= {
        "folder": f"{folder}/dpo", "log": f"{folder}/log", "steps": steps, "patience": None,
        "train": PAIRS, "validation": f"{PAIRS}_again", "validation_pairs": 1, "prompts": [],
        "max_pairs": arguments.pairs, "validate_every": steps + 1, "log_every": steps + 1,
        "loss": "sigmoid", "label_smoothing": 0.0, "sft_weight": 0.0,
    }  # fmt: skip
    raw["dpo"]["checkpoint"]["every"] = steps + 1
    return check_recipe(raw, arguments.recipe)


def tokenizer_of(recipe: Recipe, rows: list[dict[str, Any]]) -> Tokenizer:
    """The recipe's tokenizer; where it trains one, one trained on the pairs' own texts."""
    if recipe.tokenizer.train is None:
        return open_tokenizer(recipe)
    texts = [m["content"] for row in rows for m in (*row["chosen"], row["rejected"][-1])]
    return tokenization.train(texts, recipe.tokenizer.train.vocab_size)


# ------------------------------------------------------------------------------ ours


def our_loop(
    recipe: Recipe, model: Transformer, tokenizer: Tokenizer, turns: Turns, losses: list[float]
) -> Callable[[], int]:
    """Stage 5 as it is run, up to its first step; call the result to go on."""
    machine = Machine(torch.device("cpu"))
    start = Start("dpo", recipe, recipe.name, machine, model, tokenizer, None, None)
    task = dpo_task(start)
    per_step = recipe.dpo.pairs_per_step // recipe.dpo.micro_batch
    sums: list[Tensor] = []

    def timed(model: nn.Module, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        if not model.training:
            return loss_of(model, batch)
        if len(sums) % per_step == 0:
            turns.step_begins(0)
        loss, metrics = loss_of(model, batch)
        sums.append(loss.detach())
        if len(sums) % per_step == 0:
            losses.append(float(sum(sums[-per_step:])) / recipe.dpo.pairs_per_step)
        return loss, metrics

    loss_of, task.loss = task.loss, timed
    return Trainer(task, recipe, model, tokenizer, machine).run


# ------------------------------------------------------------------------------ TRL's


class Timed(TrainerCallback):
    """Tells of every step that begins."""

    def __init__(self, turns: Turns, number: int):
        self.turns, self.number = turns, number

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.turns.step_begins(self.number)


class Comparable(DPOTrainer):
    """TRL's trainer with our tokens and our learning rates; it notes the loss of every step."""

    def __init__(self, rate: Callable[[int], float], losses: list[float], *args: Any, **more: Any):
        self._rate, self._losses = rate, losses
        self._parts: list[float] = []  # losses of the micro-batches so far
        super().__init__(*args, **more)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # tokenised already

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        peak = self.args.learning_rate
        assert self.optimizer is not None
        self.lr_scheduler = LambdaLR(self.optimizer, lambda step: self._rate(step) / peak)
        return self.lr_scheduler

    def compute_loss(self, *args: Any, **more: Any) -> Tensor:
        loss = super().compute_loss(*args, **more)
        self._parts.append(float(loss.detach()))
        if len(self._parts) == self.args.gradient_accumulation_steps:
            self._losses.append(sum(self._parts) / len(self._parts))
            self._parts = []
        return loss


def trl_options(recipe: Recipe, folder: str, steps: int) -> dict[str, Any]:
    """Our settings in TRL's names; what isn't named is as TRL has it."""
    settings, optimizer = recipe.dpo, recipe.dpo.optimizer
    return {
        "output_dir": folder, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "max_length": None, "beta": settings.beta, "max_steps": steps,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.pairs_per_step // settings.micro_batch,
        "train_sampling_strategy": "sequential", "learning_rate": optimizer.learning_rate,
        "adam_beta1": optimizer.betas[0], "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.eps, "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.clip, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def trl_row(pair: Pair) -> dict[str, list[int]]:
    """A pair as TRL's tokenisation leaves it; answers end where their labels do."""

    def split(example: Example) -> tuple[list[int], list[int]]:
        labelled = (example.labels != IGNORE_INDEX).nonzero()[0]
        ids = example.input_ids.tolist()
        return ids[: labelled[0]], ids[labelled[0] : labelled[-1] + 1]

    prompt, chosen = split(pair.chosen)
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": split(pair.rejected)[1]}


def as_llama(model: Transformer) -> LlamaForCausalLM:
    config = asdict(model.config)
    rope = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    llama = LlamaForCausalLM(LlamaConfig(**config, rope_parameters=rope, attention_bias=False))
    llama.load_state_dict(model.state_dict())
    return llama


def as_fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=HFTokenizer.from_str(tokenizer.to_json()),
        eos_token=tokenization.IM_END,
        pad_token=tokenization.END_OF_TEXT,
    )


def trl_loop(
    recipe: Recipe,
    model: Transformer,
    tokenizer: Tokenizer,
    turns: Turns,
    losses: list[float],
    number: int,
) -> Callable[[], Any]:
    """TRL's training up to its first step; loop 2 computes the reference before, now."""
    settings, steps = recipe.dpo, recipe.dpo.steps
    assert steps is not None
    pairs = read_pairs(recipe, tokenizer, "train", settings.max_pairs)
    order = PairBatches(pairs, torch.zeros(2, len(pairs)), recipe).order
    rows = [trl_row(pairs[i]) for i in order[: steps * settings.pairs_per_step]]
    options = trl_options(recipe, str(recipe.folder("dpo") / f"trl_{number}"), steps)
    options["precompute_ref_log_probs"] = number == 2
    peak = settings.optimizer.learning_rate
    trainer = Comparable(
        lambda step: learning_rate(step, steps, peak, settings.schedule), losses,
        as_llama(model), as_llama(model), DPOConfig(**options),
        train_dataset=Dataset.from_list(rows), processing_class=as_fast(tokenizer),
        callbacks=[Timed(turns, number)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer.train


# ------------------------------------------------------------------------------ side by side


def run_by_turns(loops: list[Callable[[], Any]], turns: Turns) -> None:
    def guarded(number: int) -> None:
        try:
            loops[number]()
            turns.hand_over(number)
        except BaseException as error:
            turns.fail(error)

    threads = [threading.Thread(target=guarded, args=[n]) for n in range(1, len(loops))]
    for thread in threads:
        thread.start()
    guarded(0)
    for thread in threads:
        thread.join()
    if turns.error is not None:
        raise turns.error


def result_table(recipe: Recipe, sides: dict[str, dict[str, Any]]) -> Table:
    """The table of `figures`."""
    ours = sides[NAMES[0]]["losses"]
    parameters = recipe.model.config().num_parameters()
    table = Table(
        title=f"Pairs a second, {parameters / 1e6:.1f}M parameters",
        caption=f"our loss: {ours[0]:.4f} at the first step, {ours[-1]:.4f} at the last",
    )
    for heading in ("", "median", "lowest", "highest", "ours / it", "loss differs by"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, side in sides.items():
        rounds, off = side["rounds"], side["loss_differs_by"]
        speeds = (side["pairs_per_second"], min(rounds), max(rounds))
        beside = [f"{side['ours_over_this']:.2f}", f"{off:.1e}"] if name != NAMES[0] else ["", ""]
        table.add_row(name, *(f"{speed:.2f}" for speed in speeds), *beside)
    return table


def figures(recipe: Recipe, turns: Turns, losses: list[list[float]]) -> dict[str, Any]:
    """Speed, ratio and losses of every side, and its rounds, in pairs a second."""
    pairs = turns.steps * recipe.dpo.pairs_per_step
    ours = turns.seconds[0][1:]  # the first turn warmed up
    return {
        name: {
            "pairs_per_second": median(pairs / second for second in seconds[1:]),
            "ours_over_this": median(b / a for a, b in zip(ours, seconds[1:], strict=True)),
            "loss_differs_by": max(abs(a - b) for a, b in zip(losses[0], curve, strict=True)),
            "rounds": [pairs / second for second in seconds[1:]],
            "losses": curve,
        }
        for name, seconds, curve in zip(NAMES, turns.seconds, losses, strict=True)
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--data", type=Path, help="folder with train* and test* files of pairs")
    parser.add_argument("--rounds", type=int, default=5, help="turns that count; default 5")
    parser.add_argument("--steps", type=int, default=2, help="of a turn; default 2")
    parser.add_argument("--pairs", type=int, default=120, help="pairs read; default 120")
    add_json_option(parser)
    arguments = parser.parse_args()
    for name in ("rounds", "steps", "pairs"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)  # TRL's and transformers', of their own options
    with tempfile.TemporaryDirectory() as folder:
        source = source_recipe(arguments)
        rows = some_rows(source)
        write_json_lines(Path(folder, "pairs.jsonl"), rows)
        recipe = benchmark_recipe(source, arguments, folder)
        tokenizer, model = tokenizer_of(recipe, rows), new_model(recipe)
        check_vocabulary(tokenizer, recipe)
        turns = Turns(len(NAMES), arguments.steps)
        losses: list[list[float]] = [[] for _ in NAMES]
        loops: list[Callable[[], Any]] = [
            trl_loop(recipe, model, tokenizer, turns, losses[number], number) for number in (1, 2)
        ]
        loops.insert(0, our_loop(recipe, model, tokenizer, turns, losses[0]))
        run_by_turns(loops, turns)
        sides = figures(recipe, turns, losses)
        Console().print(result_table(recipe, sides))
    keep(arguments, {"sides": sides})
    return 0


if __name__ == "__main__":
    run(main)
