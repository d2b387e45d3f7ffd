"""The report of one hour on a rented GPU: speed and memory beside Hugging Face, AdamW beside Muon.

    python benchmarks/gpu_report.py --tokens ids.npy --out report.json
    python benchmarks/gpu_report.py --device cpu --layers 1 --batch 4 --length 64 --rounds 2 \\
        --optimizer-steps 20 --tokens ids.npy --out report.json \\
        --set model.hidden_size=64 --set model.num_attention_heads=4      # a try-out

First `train_step.py`'s comparison at v4's shape in fp16 and bf16, no more than 24 GB of memory
allowed. Then both optimizers train from the same weights on the same sequences in the same order,
each with every one of --learning-rates, warm-up then flat like v4's base stage. What counts is how
many tokens Muon's best run takes to the validation loss at which AdamW's best run ends.

--tokens are token ids in one row (uint16 or int32, as numpy.save writes them); the last of them are
kept for validation. Needs neither the network nor the package `datasets`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from common import (
    GB,
    OurStepper,
    add_batch_options,
    add_recipe_options,
    batch_and_length,
    compile_blocks,
    limit_memory,
    more_than_zero,
    narrow_table,
    optional,
    positive,
    read_recipe,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from train_step import VARIANTS, Comparison, Job, compare, device_name, table_of

from hamner.errors import UserError, first_line, run
from hamner.files import write_report
from hamner.machine import PRECISIONS, autocast, pick_device, why_not_compile
from hamner.optim import make_optimizer
from hamner.recipe import Recipe
from model import Transformer

CAP = 24.0  # GB of an RTX 3090
TARGETS = {"of_hf": 1.25, "mfu": 0.45, "peak_gb": 22.0}
OURS = "ours-compiled"
OPTIMIZERS = ("adamw", "muon")


# ------------------------------------------------------------------------------- token files


@dataclass
class Sequences:
    """Sequences of token ids (N, T), int64: for training in the order of training, and held out."""

    train: Tensor
    held_out: Tensor


def read_ids(path: Path) -> np.ndarray:
    """The token ids of a .npy file, in one row.

    Raises:
        UserError: not a .npy file of whole numbers.
    """
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--tokens {path}: not a .npy file ({first_line(error)})") from None
    if not isinstance(ids, np.ndarray) or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"--tokens {path}: must hold whole numbers, the ids of tokens")
    return ids.reshape(-1)


def read_sequences(
    paths: Sequence[Path], vocab_size: int, length: int, train: int, held_out: int
) -> Sequences:
    """`train` sequences in a fixed random order, and the `held_out` last ones of the files.

    Raises:
        UserError: too few tokens, or an id that the model doesn't know.
    """
    ids = np.concatenate([read_ids(path) for path in paths])
    needed = (train + held_out) * length
    if len(ids) < needed:
        raise UserError(
            f"--tokens hold {len(ids):,} tokens, {needed:,} are needed: give more of them, or "
            "fewer --optimizer-steps or --validation-sequences"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise UserError(
            f"--tokens hold ids from {ids.min()} to {ids.max()}, the model knows 0 to "
            f"{vocab_size - 1}: set model.vocab_size to that of their tokenizer"
        )
    rows = torch.from_numpy(ids[: len(ids) // length * length].astype(np.int64)).view(-1, length)
    order = torch.randperm(len(rows) - held_out, generator=torch.Generator().manual_seed(0))
    return Sequences(rows[order[:train]], rows[len(rows) - held_out :])


# ------------------------------------------------------------------------------- AdamW and Muon


@dataclass
class Curve:
    """Validation losses of a run, by the tokens it was trained on."""

    optimizer: str
    learning_rate: float
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def tokens_to(self, loss: float) -> float | None:
        """Tokens at which the curve first is that low, between two validations on a line."""
        before: tuple[int, float] | None = None
        for tokens, value in zip(self.tokens, self.losses, strict=True):
            if value <= loss:
                if before is None or value == before[1]:
                    return float(tokens)
                share = (before[1] - loss) / (before[1] - value)
                return before[0] + share * (tokens - before[0])
            before = tokens, value
        return None


def validation_loss(model: nn.Module, sequences: Tensor, job: Job) -> float:
    """Mean over the tokens of held-out sequences."""
    model.eval()
    losses = []
    with torch.no_grad(), autocast(job.precision, job.device):
        for ids in sequences.split(job.batch):
            ids = ids.to(job.device)
            losses.append(float(model(ids, labels=ids).loss) * len(ids))
    model.train()
    return sum(losses) / len(sequences)


def train_curve(name: str, rate: float, job: Job, sequences: Sequences, every: int) -> Curve:
    """Train from nothing; validate every so many steps and at the end. Ends at a loss of nan."""
    torch.manual_seed(0)
    model = Transformer(job.config).to(job.device).train()
    settings = job.optimizer.model_copy(update={"learning_rate": rate, "kind": name})
    optimizer = make_optimizer(model, settings)
    if job.device.type == "cuda" and why_not_compile(job.device) is None:
        compile_blocks(model)
    step = OurStepper(model, optimizer, job.precision, job.device, settings.clip)
    curve, batches = Curve(name, rate), sequences.train.split(job.batch)
    warmup = max(1, len(batches) // 20)
    for number, ids in enumerate(batches, start=1):
        optimizer.set_learning_rate(rate * min(1.0, number / warmup))
        ids = ids.to(job.device)
        step(input_ids=ids, labels=ids)
        if number % every == 0 or number == len(batches):
            curve.tokens.append(number * job.tokens)
            curve.losses.append(validation_loss(model, sequences.held_out, job))
            if math.isnan(curve.losses[-1]):
                break
    print(f"{name}, learning rate {rate:g}: validation loss {curve.losses[-1]:.4f}", flush=True)
    return curve


def best_curve(curves: Sequence[Curve], optimizer: str) -> Curve:
    """The run of an optimizer that ends lowest; nan is last."""
    found = [curve for curve in curves if curve.optimizer == optimizer]
    return min(found, key=lambda c: math.inf if math.isnan(c.losses[-1]) else c.losses[-1])


def compare_optimizers(curves: Sequence[Curve]) -> dict[str, Any]:
    """Tokens that each optimizer's best run takes to the loss at which AdamW's best run ends."""
    adamw, muon = (best_curve(curves, name) for name in OPTIMIZERS)
    loss = adamw.losses[-1]
    tokens, muon_tokens = adamw.tokens_to(loss), muon.tokens_to(loss)
    return {
        "loss": loss,
        "adamw_learning_rate": adamw.learning_rate,
        "muon_learning_rate": muon.learning_rate,
        "adamw_tokens": tokens,
        "muon_tokens": muon_tokens,
        "muon_loss": muon.losses[-1],
        "muon_to_adamw": muon_tokens / tokens if muon_tokens and tokens else None,
    }


# ------------------------------------------------------------------------------- the report


def speed_figures(comparison: Comparison) -> dict[str, Any]:
    """What the JSON says of a comparison; null for what couldn't be measured."""
    figures: dict[str, Any] = {"matmul_flops": comparison.matmul, "own_flops": comparison.own}
    for name, result in comparison.results.items():
        ran = not result.problem
        figures[name] = {
            "problem": result.problem or None,
            "tokens_per_second": result.speeds if ran else None,
            "of_hf": comparison.ratio(name) if ran else None,
            "of_matmul": comparison.of_matmul(name) if ran else None,
            "of_own_products": comparison.of_own(name) if ran else None,
            "mfu": comparison.mfu(name) if ran else None,
            "peak_gb": result.peak / GB if ran and result.peak else None,
            "first_step_seconds": result.first_step if ran else None,
        }
    return figures


def judged(value: float | None, target: float, at_least: bool) -> str:
    if value is None:
        return "-"
    return "yes" if (value >= target if at_least else value < target) else "NO"


def summary(report: dict[str, Any]) -> Table:
    table = narrow_table(report["device"], ("measured", "value", "target", "met"))
    for precision, figures in report["speed"].items():
        ours = figures[OURS]
        speed = ours["tokens_per_second"]
        shown = ours["problem"] or f"{median(speed):,.0f}"
        table.add_row(f"{precision}: {OURS}, tokens/s", shown, "", "")
        for key, label, form, least in (
            ("of_hf", "over Hugging Face's faster variant", ".2f", True),
            ("mfu", "MFU", ".1%", True),
            ("peak_gb", "peak memory, GB", ".1f", False),
        ):
            sign, target = ">=" if least else "<", TARGETS[key]
            value = optional(ours[key], form)
            met = judged(ours[key], target, least)
            table.add_row(f"{precision}: {label}", value, f"{sign} {target:{form}}", met)
    if report["optimizers"]:
        add_optimizers(table, report["optimizers"])
    return table


def add_optimizers(table: Table, figures: dict[str, Any]) -> None:
    table.add_section()
    loss = figures["loss"]
    for name in OPTIMIZERS:
        tokens = optional(figures[f"{name}_tokens"], ",.0f")
        rate = figures[f"{name}_learning_rate"]
        table.add_row(f"{name} at {rate:g}: tokens to loss {loss:.4f}", tokens, "", "")
    table.add_row("muon's tokens over adamw's", optional(figures["muon_to_adamw"], ".2f"), "", "")


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe_options(parser, "v4")
    add_batch_options(parser)
    parser.add_argument("--tokens", type=Path, nargs="+", metavar="FILE", help="default: no Muon")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON")
    parser.add_argument(
        "--precisions",
        nargs="*",
        choices=PRECISIONS,
        help="default fp16 bf16, on a CPU fp32; may be none",
    )
    parser.add_argument("--cap", type=more_than_zero, metavar="GB", help=f"default {CAP:g} on CUDA")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--steps", type=positive, default=10, help="a round")
    parser.add_argument("--optimizer-steps", type=positive, default=800)
    parser.add_argument("--validation-sequences", type=positive, default=240)
    parser.add_argument(
        "--learning-rates", type=more_than_zero, nargs="+", default=[5e-4, 1e-3, 2e-3]
    )
    return parser


def speeds(arguments: argparse.Namespace, jobs: Sequence[Job]) -> dict[str, Any]:
    found = {}
    for job in jobs:
        comparison = compare(job, VARIANTS, arguments.rounds, arguments.steps)
        Console().print(table_of(comparison))
        found[job.precision] = speed_figures(comparison)
    return found


def curves(arguments: argparse.Namespace, job: Job, sequences: Sequences) -> list[Curve]:
    torch.compiler.reset()
    every = max(1, arguments.optimizer_steps // 40)
    return [
        train_curve(name, rate, job, sequences, every)
        for rate in arguments.learning_rates
        for name in OPTIMIZERS
    ]


def make_job(arguments: argparse.Namespace, recipe: Recipe, precision: str) -> Job:
    device = pick_device(arguments.device)
    batch, length = batch_and_length(arguments, recipe, device)
    config, optimizer = recipe.model.config(), recipe.base.optimizer
    return Job(config, optimizer, batch, length, precision, device)


def precisions_of(arguments: argparse.Namespace, device: torch.device) -> list[str]:
    """The precisions to compare speeds in.

    Raises:
        UserError: none, and no tokens to train on either.
    """
    usual = ["fp16", "bf16"] if device.type == "cuda" else ["fp32"]
    chosen = usual if arguments.precisions is None else arguments.precisions
    if not chosen and not arguments.tokens:
        raise UserError("nothing to measure: name some --precisions, or --tokens to train on")
    return chosen


def read_tokens(arguments: argparse.Namespace, job: Job) -> Sequences | None:
    if not arguments.tokens:
        return None
    train, held_out = arguments.optimizer_steps * job.batch, arguments.validation_sequences
    return read_sequences(arguments.tokens, job.config.vocab_size, job.length, train, held_out)


def main() -> int:
    arguments = command_line().parse_args()
    recipe, device = read_recipe(arguments), pick_device(arguments.device)
    cuda = device.type == "cuda"
    limit_memory(arguments.cap or (CAP if cuda else None), device)
    precisions = precisions_of(arguments, device)
    training = make_job(arguments, recipe, "bf16" if cuda else "fp32")
    sequences = read_tokens(arguments, training)  # before all else: what is wrong shows at once
    report: dict[str, Any] = {
        "device": device_name(device), "torch": torch.__version__, "recipe": recipe.name,
        "model": recipe.model.model_dump(), "batch": training.batch, "length": training.length,
        "speed": {}, "curves": [], "optimizers": None,
    }  # fmt: skip
    write_report(arguments.out, report, "--out")
    jobs = [make_job(arguments, recipe, precision) for precision in precisions]
    report["speed"] = speeds(arguments, jobs)
    write_report(arguments.out, report, "--out")
    if sequences is not None:
        found = curves(arguments, training, sequences)
        report["curves"] = [vars(curve) for curve in found]
        report["optimizers"] = compare_optimizers(found)
        write_report(arguments.out, report, "--out")
    Console().print(summary(report))
    return 0


if __name__ == "__main__":
    run(main)
