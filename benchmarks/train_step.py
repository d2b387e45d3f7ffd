"""How fast a training step is, ours beside Hugging Face's Llama of the same shape and weights.

    python benchmarks/train_step.py --recipe v4                        # 24 x 1024 on a GPU
    python benchmarks/train_step.py --recipe v4 --precision fp16 --cap 24
    python benchmarks/train_step.py --recipe tiny

A step is forward, loss, backward, clipping, fused AdamW and dropping the gradients. Each variant
runs as it is and compiled: ours block by block, Hugging Face's as a whole. Rounds alternate in a
varying order in one process, and in each the machine's own rate of matrix products is measured
beside them, in the same precision: "of matmul" is the model's FLOP/s over the fastest product's,
"of own" over those of the step's own products one after another, with nothing between them. Ratios
are medians of the rounds' own; "of HF" is over Hugging Face's faster variant. On CUDA a variant
leaves the GPU while others run, so that its peak is its own. The first step holds the compilation;
what PyTorch's cache on the disk has from an earlier run it doesn't compile again.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common import (
    GB,
    OurStepper,
    Stepper,
    add_batch_options,
    add_json_option,
    add_recipe_options,
    batch_and_length,
    compile_blocks,
    hugging_face_llama,
    keep,
    largest_products,
    limit_memory,
    matmul_flops,
    median_ratio,
    more_than_zero,
    narrow_table,
    optional,
    own_products_flops,
    positive,
    read_recipe,
    seconds_of,
    shuffled_rounds,
    spread,
    synchronize,
    usual_precision,
)
from rich.console import Console
from rich.table import Table
from torch import nn

from hamner.errors import UserError, run
from hamner.machine import PRECISIONS, pick_device, recomputing, why_not_compile
from hamner.optim import make_optimizer
from hamner.recipe import OptimizerPart
from hamner.tracking import peak_flops
from model import ModelConfig, Transformer

VARIANTS = ("ours", "ours-compiled", "hf", "hf-compiled")
MATMUL = "matmul"
UNTIMED_STEPS = 2  # after a move to the GPU, until the allocator has its memory again


@dataclass(frozen=True)
class Job:
    """What is measured."""

    config: ModelConfig
    optimizer: OptimizerPart
    batch: int
    length: int
    precision: str
    device: torch.device
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass
class Result:
    """What a variant showed; `problem` says why it has no speeds."""

    first_step: float = math.nan  # seconds, compilation included
    first_loss: float = math.nan
    speeds: list[float] = field(default_factory=list)  # tokens/s of every round
    peak: int | None = None  # bytes of GPU memory
    problem: str = ""


@dataclass
class Comparison:
    job: Job
    results: dict[str, Result]
    matmul: list[float] = field(default_factory=list)  # FLOP/s of every round: fastest product
    own: list[float] = field(default_factory=list)  # of all of a step's products

    def running(self) -> dict[str, Result]:
        return {name: result for name, result in self.results.items() if not result.problem}

    def best_hf(self) -> Result | None:
        found = [r for name, r in self.running().items() if name.startswith("hf")]
        return max(found, key=lambda result: median(result.speeds), default=None)

    def ratio(self, name: str) -> float | None:
        """Tokens/s over those of Hugging Face's fastest variant."""
        best = self.best_hf()
        return median_ratio(self.results[name].speeds, best.speeds) if best else None

    def of_matmul(self, name: str) -> float:
        return self._share(name, self.matmul)

    def of_own(self, name: str) -> float:
        return self._share(name, self.own)

    def _share(self, name: str, rates: Sequence[float]) -> float:
        flops = self.job.config.flops_per_token(self.job.length)
        return flops * median_ratio(self.results[name].speeds, rates)

    def mfu(self, name: str) -> float | None:
        """Share of the data sheet's 16-bit FLOP/s; None where it says nothing."""
        if self.job.device.type != "cuda" or self.job.precision == "fp32":
            return None
        flops = self.job.config.flops_per_token(self.job.length)
        peak = peak_flops(self.job.device)
        return median(self.results[name].speeds) * flops / peak if peak else None


# ------------------------------------------------------------------------------- variants


def our_model(job: Job) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(job.config)
    if job.checkpointing:
        for layer in model.model.layers:
            layer.forward = recomputing(layer.forward)
    return model


def hf_model(job: Job) -> nn.Module:
    """Hugging Face's Llama with the weights of `our_model`."""
    model = hugging_face_llama(our_model(job), use_cache=False)
    if job.checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # 5.23 has a new name for it
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_model(name: str, job: Job) -> nn.Module:
    return (our_model if name.startswith("ours") else hf_model)(job).train()


def compiled(name: str, model: nn.Module) -> Callable[..., Any]:
    """What to call for a forward pass of a variant."""
    if name == "hf-compiled":
        return torch.compile(model)
    if name == "ours-compiled":
        assert isinstance(model, Transformer)
        compile_blocks(model)
    return model


def make_adamw(name: str, model: nn.Module, settings: OptimizerPart) -> Any:
    """Fused AdamW: ours as training makes it, Hugging Face's with the same two groups."""
    if name.startswith("ours"):
        return make_optimizer(model, settings.model_copy(update={"kind": "adamw"}))
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True,
    )  # fmt: skip


def why_not(name: str, device: torch.device) -> str:
    """Why a variant can't run on this machine; empty if it can."""
    if name.endswith("compiled") and (reason := why_not_compile(device)):
        return reason
    if name.startswith("hf"):
        try:
            import transformers  # noqa: F401
        except ImportError:
            return "transformers isn't installed"
    return ""


class Variant:
    """A model with its optimizer; on CUDA it is on the GPU only while it is measured."""

    def __init__(self, name: str, job: Job):
        self.device = job.device
        self.model = make_model(name, job)
        self.optimizer = make_adamw(name, self.model, job.optimizer)
        forward = compiled(name, self.model)
        stepper = OurStepper if name.startswith("ours") else Stepper
        clip = job.optimizer.clip
        self.step = stepper(forward, self.optimizer, job.precision, self.device, clip)
        tokens = torch.Generator().manual_seed(0)  # the same for all
        shape = (job.batch, job.length)
        self.input_ids = torch.randint(job.config.vocab_size, shape, generator=tokens)

    def move(self, device: torch.device) -> None:
        self.model.to(device)
        self.input_ids = self.input_ids.to(device)
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # follows the parameters

    @contextmanager
    def present(self, result: Result) -> Iterator[None]:
        """On its device for a while; the peak of the memory goes into the result."""
        if self.device.type != "cuda":
            self.move(self.device)
            yield
            return
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self.move(self.device)
        yield
        synchronize(self.device)
        result.peak = max(result.peak or 0, torch.cuda.max_memory_allocated(self.device))
        self.move(torch.device("cpu"))
        torch.cuda.empty_cache()

    def run(self, steps: int) -> torch.Tensor:
        """So many steps on the same tokens; the last one's loss before its update."""
        for _ in range(steps):
            loss = self.step(input_ids=self.input_ids, labels=self.input_ids)
        return loss


# ------------------------------------------------------------------------------- rounds


def compare(job: Job, names: Sequence[str], rounds: int, steps: int) -> Comparison:
    """Measure the variants in alternation; one that can't run or runs out of memory is marked.

    Raises:
        UserError: not one of them runs.
    """
    torch.compiler.reset()  # what an earlier comparison compiled is not this one's
    comparison = Comparison(job, {name: Result() for name in names})
    variants: dict[str, Variant] = {}
    for name, result in comparison.results.items():
        result.problem = why_not(name, job.device)
        if not result.problem:
            guarded(name, result, variants, partial(first_step, name, job, result, variants))
        print(f"{name}: {result.problem or f'first step {result.first_step:.1f} s'}", flush=True)
    check_some_run(comparison)
    for number, order in enumerate(shuffled_rounds([*variants, MATMUL], rounds), start=1):
        one_round(order, comparison, variants, steps)
        speeds = [f"{name} {r.speeds[-1]:,.0f}" for name, r in comparison.running().items()]
        speeds.append(f"matmul {comparison.matmul[-1] / 1e12:.3f} TFLOP/s")
        print(f"round {number} of {rounds}: {', '.join(speeds)}", flush=True)
    check_some_run(comparison)
    return comparison


def check_some_run(comparison: Comparison) -> None:
    if not comparison.running():
        problems = ", ".join(f"{name} ({r.problem})" for name, r in comparison.results.items())
        raise UserError(f"no variant runs here: {problems}; try a smaller --batch")


def one_round(
    order: Sequence[str], comparison: Comparison, variants: dict[str, Variant], steps: int
) -> None:
    job = comparison.job
    for name in order:
        if name == MATMUL:
            shapes, dtype = largest_products(job.config, job.tokens), PRECISIONS[job.precision]
            comparison.matmul.append(matmul_flops(shapes, dtype, job.device))
            own = own_products_flops(job.config, job.tokens, dtype, job.device)
            comparison.own.append(own)
        elif name in variants:
            result = comparison.results[name]
            guarded(name, result, variants, partial(speed, job, variants[name], result, steps))


def first_step(name: str, job: Job, result: Result, variants: dict[str, Variant]) -> None:
    variants[name] = variant = Variant(name, job)
    losses = []
    with variant.present(result):
        result.first_step = seconds_of(lambda: losses.append(variant.run(1)), job.device)
        result.first_loss = float(losses[0])


def speed(job: Job, variant: Variant, result: Result, steps: int) -> None:
    with variant.present(result):
        if job.device.type == "cuda":
            variant.run(UNTIMED_STEPS)
        seconds = seconds_of(lambda: variant.run(steps), job.device)
    result.speeds.append(job.tokens * steps / seconds)


def guarded(
    name: str, result: Result, variants: dict[str, Variant], work: Callable[[], None]
) -> None:
    """Do the work; a variant for which the memory doesn't suffice is marked and dropped."""
    try:
        work()
    except torch.OutOfMemoryError:
        result.problem = "out of memory"
        variants.pop(name, None)
    if result.problem and torch.cuda.is_available():  # after the exception let go of its tensors
        gc.collect()
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------- the table


def table_of(comparison: Comparison) -> Table:
    job = comparison.job
    title = (
        f"{job.config.num_parameters() / 1e6:.1f}M parameters, {job.batch} x {job.length} tokens, "
        f"{job.precision}, {device_name(job.device)}"
    )
    headings = (
        "variant", "tokens/s", "lowest", "highest", "of\nHF", "of\nmatmul", "of\nown", "MFU",
        "peak\nGB", "first\nstep",
    )  # fmt: skip
    table = narrow_table(title, headings)
    for name, result in comparison.results.items():
        table.add_row(name, *cells(comparison, name, result))
    table.add_section()
    for name, found in (("GFLOP/s", comparison.matmul), ("GFLOP/s, own", comparison.own)):
        table.add_row(name, *spread([rate / 1e9 for rate in found]), *"------")
    losses = [result.first_loss for result in comparison.running().values()]
    table.caption = f"loss of the first step: {min(losses):.4f} to {max(losses):.4f}"
    return table


def cells(comparison: Comparison, name: str, result: Result) -> list[str]:
    if result.problem:
        return [result.problem, *"--------"]
    return [
        *spread(result.speeds),
        optional(comparison.ratio(name), ".2f"),
        f"{comparison.of_matmul(name):.0%}",
        f"{comparison.of_own(name):.0%}",
        optional(comparison.mfu(name), ".1%"),
        optional(None if result.peak is None else result.peak / GB, ".1f"),
        f"{result.first_step:.1f} s",
    ]


def figures(comparison: Comparison) -> dict[str, Any]:
    """What the table shows, and every round: tokens/s, and FLOP/s of products."""
    variants: dict[str, Any] = {}
    for name, result in comparison.results.items():
        variants[name] = asdict(result)
        if not result.problem:
            variants[name] |= {
                "tokens_per_second": median(result.speeds),
                "of_hugging_face": comparison.ratio(name),
                "of_matmul": comparison.of_matmul(name),
                "of_own_products": comparison.of_own(name),
                "mfu": comparison.mfu(name),
            }
    rates = {"flops_of_matmul": comparison.matmul, "flops_of_own_products": comparison.own}
    return {"parameters": comparison.job.config.num_parameters(), "variants": variants, **rates}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else device.type


def variant_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; known are {', '.join(VARIANTS)}")
    return list(dict.fromkeys(names))


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe_options(parser, "v4")
    add_batch_options(parser)
    add_json_option(parser)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--steps", type=positive, help="a round; default 2, on CUDA 10")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="default fp32, on CUDA the recipe's"
    )
    parser.add_argument(
        "--cap", type=more_than_zero, metavar="GB", help="of GPU memory, in 10^9 bytes"
    )
    parser.add_argument(
        "--variants", type=variant_names, default=list(VARIANTS), help=",".join(VARIANTS)
    )
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    return parser


def main() -> int:
    arguments = command_line().parse_args()
    recipe, device = read_recipe(arguments), pick_device(arguments.device)
    limit_memory(arguments.cap, device)
    batch, length = batch_and_length(arguments, recipe, device)
    cuda = device.type == "cuda"
    job = Job(
        recipe.model.config(),
        recipe.base.optimizer,
        batch,
        length,
        arguments.precision or usual_precision(recipe, device),
        device,
        arguments.checkpointing,
    )
    steps = arguments.steps or (10 if cuda else 2)
    comparison = compare(job, arguments.variants, arguments.rounds, steps)
    Console().print(table_of(comparison))
    keep(arguments, figures(comparison))
    return 0


if __name__ == "__main__":
    run(main)
