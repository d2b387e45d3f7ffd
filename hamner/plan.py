"""What a stage would take: parameters, tokens, FLOPs, memory and time, before it is run.

Memory is counted in `hamner/memory.py`, and compared with what was measured by
`benchmarks/memory.py`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hamner.errors import UserError
from hamner.gpus import GPU, find_gpu, gpu_of_driver
from hamner.machine import precision_on
from hamner.memory import (
    Work,
    copy_bytes,
    memory_bytes,
    optimizer_bytes,
    peak_bytes,
    sequences_per_step,
    work_of,
)
from hamner.recipe import STAGES, EpochStage, FileSource, Recipe, SFTStage, StreamStage
from hamner.tracking import peak_flops

UTILISATION = 0.4  # of the peak, in FLOPs of the model: recomputation isn't counted
UTILISATION_SOURCE = "assumed; v4's earlier runs logged 26,000 tokens/s on an RTX 3090, 43 %"
PROGRAM_BYTES = 350 * 2**20  # Python and its libraries on Linux, before a model is built
CHARACTERS_PER_TOKEN = 4  # of English, about
NODE = 8  # GPUs in a machine
NETWORK = 50e9  # bytes/s of each GPU between machines: 400 Gb/s, as in NVIDIA's DGX H100
MARGIN = 1.1  # memory that must be there, over memory that is planned
GIB = 2**30


# ------------------------------------------------------------------------------ tokens


@dataclass(frozen=True)
class Tokens:
    """How many tokens a stage trains on, and where an inexact figure comes from."""

    count: int
    source: str = ""  # empty: exact


def planned_tokens(recipe: Recipe, stage: str) -> int | None:
    """Tokens of a whole stage; None where only the data can tell."""
    settings = recipe.stage(stage)
    if isinstance(settings, StreamStage):
        return settings.steps * settings.sequences_per_step * settings.sequence_length
    return None


def expected_tokens(recipe: Recipe, stage: str) -> Tokens | None:
    """Exact where steps tell; else by the size of the data, or at most what the recipe allows.

    None where there is neither.
    """
    exact = planned_tokens(recipe, stage)
    if exact is not None:
        return Tokens(exact)
    settings = recipe.stage(stage)
    assert isinstance(settings, EpochStage)
    found = sft_tokens(recipe) if isinstance(settings, SFTStage) else dpo_tokens(recipe)
    if settings.steps is None:
        return found
    most = settings.steps * sequences_per_step(recipe, stage) * settings.sequence_length
    if found is None or found.count > most:
        return Tokens(most, f"at most, for {settings.steps:,} steps of full rows")
    return found


def sft_tokens(recipe: Recipe) -> Tokens | None:
    settings = recipe.sft
    path = Path(settings.data.folder) / "train.jsonl"
    if path.is_file():
        with open(path, "rb") as file:
            size = sum(len(line) * repeats(line) for line in file)
        count = settings.epochs * size / CHARACTERS_PER_TOKEN
        return Tokens(round(count), f"estimate: {path} at {CHARACTERS_PER_TOKEN} bytes a token")
    each = settings.epochs * settings.sequence_length
    limited = [source for source in settings.data.sources if source.at_most]
    rest = [source.label for source in settings.data.sources if not source.at_most]
    if not limited:
        return None
    count = each * sum((source.at_most or 0) * source.repeat for source in limited)
    without = f", {' and '.join(rest)} not counted" if rest else ""
    return Tokens(count, f"at most, by the recipe's at_most and sequence_length{without}")


def repeats(line: bytes) -> int:
    """How often an epoch shows a line of the prepared file."""
    found = re.search(rb'"repeat": ?(\d+)\s*[,}]', line)
    return int(found[1]) if found else 1


def dpo_tokens(recipe: Recipe) -> Tokens:
    settings = recipe.dpo
    most = 2 * settings.max_pairs * settings.epochs * settings.sequence_length
    size = files_bytes(recipe, settings.train)
    count = round(settings.epochs * size / CHARACTERS_PER_TOKEN)
    if size and count < most:
        where = f"the files of source {settings.train!r}"
        return Tokens(count, f"estimate: {where} at {CHARACTERS_PER_TOKEN} bytes a token")
    return Tokens(most, "at most, by the recipe's max_pairs and sequence_length")


def files_bytes(recipe: Recipe, name: str) -> int:
    """The size of a source's local files; 0 for other sources, or if there are none."""
    source = recipe.sources[name]
    if not isinstance(source, FileSource):
        return 0
    folder = Path(source.folder or recipe.data_dir)
    paths = (path for pattern in source.paths for path in folder.glob(pattern))
    return sum(path.stat().st_size for path in paths if path.is_file())


# ------------------------------------------------------------------------------ time and disk


@dataclass(frozen=True)
class Target:
    """What a plan is made for: a GPU by name, or the device at hand."""

    name: str
    device_type: str
    flops: float | None  # at its best; None is unknown
    memory: int | None  # bytes
    gpu: GPU | None = None
    precision: str = "16 bits"  # that the FLOP/s are of


def target_of(name: str, device: torch.device, recipe: Recipe) -> Target:
    """The target of `--plan` (name `here`) or `--plan NAME`.

    Raises:
        UserError: no GPU of this name is on record.
    """
    if name != "here":
        gpu = find_gpu(name)
        return Target(gpu.name, "cuda", gpu.flops, round(gpu.memory * GIB), gpu)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu_here = gpu_of_driver(properties.name)
        flops = gpu_here.flops if gpu_here else None
        return Target(properties.name, "cuda", flops, properties.total_memory, gpu_here)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    precision = precision_on(device.type, recipe)
    flops = peak_flops(device, precision)
    return Target(str(device), device.type, flops, memory, precision=precision)


def hours(recipe: Recipe, stage: str, tokens: int, target: Target) -> float | None:
    """Hours of a stage on one device; None if its speed isn't known."""
    if target.flops is None or (target.gpu and recipe.precision == "fp32"):
        return None
    each = recipe.model.config().flops_per_token(recipe.stage(stage).sequence_length)
    return tokens * each / (target.flops * UTILISATION) / 3600


def checkpoint_bytes(work: Work) -> int:
    """A step file: weights and optimizer."""
    return 4 * work.config.num_parameters() + optimizer_bytes(work)


def disk_bytes(recipe: Recipe, stage: str, tokens: int | None, work: Work) -> int:
    """What the checkpoints of a stage take at most: those kept, one being written, and best.pt."""
    kept, settings = recipe.stage(stage).checkpoint, recipe.stage(stage)
    files = kept.keep_last + 1
    if kept.keep_every and tokens is not None:
        per_step = sequences_per_step(recipe, stage) * settings.sequence_length
        files += tokens // per_step // kept.keep_every
    best = 4 * work.config.num_parameters() if isinstance(settings, EpochStage) else 0
    return files * checkpoint_bytes(work) + best


# ------------------------------------------------------------------------------ does it fit


def needed_bytes(work: Work) -> int:
    """What has to be there for a step: its peak, a tenth more, and on a CPU the program."""
    program = 0 if work.device_type == "cuda" else PROGRAM_BYTES
    return round(MARGIN * (peak_bytes(work) + copy_bytes(work))) + program


def fits_without_checkpointing(
    recipe: Recipe, stage: str, available_bytes: int, device_type: str, ranks: int = 1
) -> bool:
    """Whether a stage has room to keep all activations, with a tenth to spare.

    Args:
        available_bytes: of memory, before the model is there; on each of the `ranks`.
        device_type: `cuda`, `cpu` or `mps`.
    """
    work = work_of(recipe, stage, device_type, checkpointing=False, ranks=ranks)
    return needed_bytes(work) <= available_bytes


def with_rows(work: Work, rows: int) -> Work:
    """The same step in forward passes of so many rows."""
    return replace(work, rows=rows, micro_batches=-(-work.rows * work.micro_batches // rows))


def largest_micro_batch(work: Work, available: int, each: int = 1) -> int:
    """The largest micro-batch, `each` of so many rows, that fits; 0 if none does."""
    for number in range(work.rows // each, 0, -1):
        if needed_bytes(with_rows(work, number * each)) <= available:
            return number
    return 0


def fit_sentence(work: Work, available: int, where: str, each: int = 1) -> str:
    """Whether a step fits, and what to change if it doesn't."""
    size = f"{available / GIB:.0f} GB"
    if needed_bytes(work) <= available:
        return f"fits in {size} ({where})"
    advice = []
    if number := largest_micro_batch(work, available, each):
        advice.append(f"lower micro_batch to {number}")
    if not work.checkpointing:
        saving = replace(work, checkpointing=True)
        if needed_bytes(saving) <= available:
            advice.append("turn gradient_checkpointing on")
        elif number := largest_micro_batch(saving, available, each):
            advice.append(f"turn gradient_checkpointing on and lower micro_batch to {number}")
    if not work.sharded and not advice:
        advice.append("share it over several GPUs with parallel=fsdp, or take a smaller model")
    return f"doesn't fit in {size} ({where}): {' or '.join(advice) or 'take more GPUs'}"


# ------------------------------------------------------------------------------ several GPUs


@dataclass(frozen=True)
class Share:
    """What one of several GPUs holds, sends and waits for in a step."""

    parallel: str
    work: Work
    sent: float  # bytes that it sends, and as many that it receives
    rate: float  # bytes/s
    compute: float  # seconds
    overlap: float  # seconds of them that sending can hide behind

    @property
    def sending(self) -> float:
        return self.sent / self.rate

    @property
    def seconds(self) -> float:
        """Of a whole step, if all that can overlap does."""
        return self.compute + max(0.0, self.sending - self.overlap)


def share_of(recipe: Recipe, stage: str, gpu: GPU, gpus: int, parallel: str) -> Share:
    """One GPU's share of a step. Rings: each sends (N-1)/N of what is gathered or scattered.

    DDP sums gradients in fp32 (scatter and gather) during the last micro-batch's backward pass.
    FSDP2 gathers the weights twice in every micro-batch, for forward and backward, and scatters
    the gradients once, in fp32; all of it may overlap with computing.

    Raises:
        UserError: the GPUs can't share a step evenly.
    """
    each = 2 if stage == "dpo" else 1
    number = sequences_per_step(recipe, stage) // each
    if number % gpus:
        key = "pairs_per_step" if stage == "dpo" else "sequences_per_step"
        near = max(gpus, round(number / gpus) * gpus)
        raise UserError(
            f"--gpus {gpus}: {stage}.{key} ({number}) must be a multiple of it; "
            f"--set {stage}.{key}={near} is one"
        )
    recipe = recipe.model_copy(update={"parallel": parallel})
    work = chosen_work(recipe, stage, "cuda", round(gpu.memory * GIB), gpus)
    parameters, part = work.config.num_parameters(), (gpus - 1) / gpus
    tokens = number * each * work.length / gpus
    compute = tokens * work.config.flops_per_token(work.length) / (gpu.flops * UTILISATION)
    rate = gpu.link if gpus <= NODE else min(gpu.link, NETWORK)
    if parallel == "ddp":
        overlap = 2 / 3 * compute / work.micro_batches
        return Share(parallel, work, 2 * part * 4 * parameters, rate, compute, overlap)
    gathered = 2 * work.micro_batches * (2 if work.half else 4) * parameters
    return Share(parallel, work, part * (gathered + 4 * parameters), rate, compute, compute)


def chosen_work(
    recipe: Recipe, stage: str, device_type: str, memory: int | None, ranks: int = 1
) -> Work:
    """The work with `gradient_checkpointing: auto` decided for so much memory."""
    on = recipe.gradient_checkpointing
    if on == "auto":
        on = memory is not None and not fits_without_checkpointing(
            recipe, stage, memory, device_type, ranks
        )
    return work_of(recipe, stage, device_type, checkpointing=bool(on), ranks=ranks)


# ------------------------------------------------------------------------------ in words


def print_plan(
    recipe: Recipe, stage: str, device: torch.device, name: str = "here", gpus: int | None = None
) -> None:
    """Print what a stage takes, then a row for each stage of the recipe.

    Args:
        name: of a GPU on record; `here` is the device at hand.
        gpus: how many of them share the work.

    Raises:
        UserError: no such GPU, or so many can't share a step.
    """
    target = target_of(name, device, recipe)
    shares = share_lines(recipe, stage, target, gpus) if gpus is not None else []
    print("\n".join([*stage_lines(recipe, stage, target), *shares]))
    Console().print(stages_table(recipe, target))


def row(label: str, text: str) -> str:
    return f"  {label:<14}{text}"


def stage_lines(recipe: Recipe, stage: str, target: Target) -> list[str]:
    """Parameters, tokens, FLOPs, memory and hours of a stage."""
    config = recipe.model.config()
    flops = config.flops_per_token(recipe.stage(stage).sequence_length)
    tokens = expected_tokens(recipe, stage)
    lines = [
        f"{recipe.name}, stage {stage}, on {target.name}",
        row("parameters", f"{config.num_parameters():,}"),
        row("tokens", tokens_text(recipe, stage, tokens)),
        row("FLOPs/token", f"{flops / 1e9:.3f} G (forward and backward)"),
    ]
    if tokens is not None:
        lines.append(row("FLOPs", f"{tokens.count * flops:.3g} in all"))
    lines += memory_lines(recipe, stage, target)
    if tokens is not None:
        lines.append(row("time", time_text(recipe, stage, tokens, target)))
    return lines


def tokens_text(recipe: Recipe, stage: str, tokens: Tokens | None) -> str:
    settings = recipe.stage(stage)
    if tokens is None:
        assert isinstance(settings, EpochStage)
        return f"{settings.epochs} epochs of data that aren't prepared yet"
    if isinstance(settings, StreamStage):
        return f"{tokens.count:,} ({settings.steps:,} steps)"
    return f"{tokens.count:,} ({tokens.source})"


def memory_lines(recipe: Recipe, stage: str, target: Target) -> list[str]:
    """The peak by part, with and without checkpointing where the recipe leaves it open."""
    kind, each = target.device_type, 2 if stage == "dpo" else 1
    chosen, lines = chosen_work(recipe, stage, kind, target.memory), []
    auto = recipe.gradient_checkpointing == "auto"
    for on in (False, True) if auto else (chosen.checkpointing,):
        work = replace(chosen, checkpointing=on)
        lines.append(row("memory", f"{memory_text(work)}; gradient_checkpointing {on_off(on)}"))
    if auto:
        lines.append(row("", f"auto turns gradient_checkpointing {on_off(chosen.checkpointing)}"))
    if kind != "cuda":
        extra = f"{PROGRAM_BYTES / GIB:.2f} GiB for the program"
        lines.append(row("", f"{extra}, {copy_bytes(chosen) / GIB:.2f} while a checkpoint waits"))
    if target.memory is not None:
        lines.append(row("", fit_sentence(chosen, target.memory, target.name, each)))
    return lines


def on_off(value: bool) -> str:
    return "on" if value else "off"


def memory_text(work: Work) -> str:
    parts = {part: size for part, size in memory_bytes(work).items() if size}
    each = ", ".join(f"{part} {size / GIB:.2f}" for part, size in parts.items())
    return f"{sum(parts.values()) / GIB:.1f} GiB at the peak ({each})"


def time_text(recipe: Recipe, stage: str, tokens: Tokens, target: Target) -> str:
    took = hours(recipe, stage, tokens.count, target)
    if took is None:
        return "unknown: no peak speed on record for this device and precision"
    kind = "measured in" if target.device_type == "cpu" else "data sheet,"
    return (
        f"{took:,.1f} h at {UTILISATION:.0%} of {(target.flops or 0) / 1e12:.2f} TFLOP/s "
        f"({kind} {target.precision}); {UTILISATION_SOURCE}"
    )


def stages_table(recipe: Recipe, target: Target) -> Table:
    """A row for each stage, and their sum; ~ marks what isn't exact."""
    table = Table(title=f"{recipe.name} on one {target.name}", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage")
    for heading in ("tokens", "hours", "memory GiB", "disk GiB"):
        table.add_column(heading, justify="right")
    totals, complete = [0.0, 0.0, 0.0], True
    for stage in STAGES:
        tokens = expected_tokens(recipe, stage)
        work = chosen_work(recipe, stage, target.device_type, target.memory)
        count = tokens.count if tokens else None
        took = hours(recipe, stage, count, target) if count is not None else None
        disk = disk_bytes(recipe, stage, count, work) / GIB
        about = "~" if tokens and tokens.source else ""
        values = (count, took, disk)
        complete &= None not in values
        totals = [total + (value or 0) for total, value in zip(totals, values, strict=True)]
        peak = f"{peak_bytes(work) / GIB:.1f}"
        table.add_row(stage, *cells(count, took, about), peak, f"{disk:.1f}")
    table.add_section()
    name = "all" if complete else "all known"
    table.add_row(name, f"{totals[0]:,.0f}", f"{totals[1]:,.1f}", "", f"{totals[2]:.1f}")
    table.caption = "~ is an estimate or a bound: --plan of that stage says which"
    return table


def cells(tokens: int | None, took: float | None, about: str) -> tuple[str, str]:
    return (
        "?" if tokens is None else f"{about}{tokens:,}",
        "?" if took is None else f"{about}{took:,.1f}",
    )


def share_lines(recipe: Recipe, stage: str, target: Target, gpus: int) -> list[str]:
    """What DDP and FSDP2 each hold and send, and how long a step and the stage take.

    Raises:
        UserError: the target isn't a GPU on record, or so many can't share a step.
    """
    gpu = target.gpu
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: must be at least 1")
    if gpu is None:
        raise UserError(f"--gpus {gpus}: name the GPU too, such as --plan h100 --gpus {gpus}")
    link = gpu.link_name if gpus <= NODE else f"network, assumed; {NODE} GPUs a machine"
    lines = [f"{gpus:,} x {gpu.name}, a step:"]
    for parallel in ("ddp", "fsdp"):
        share = share_of(recipe, stage, gpu, gpus, parallel)
        lines += [
            row(parallel, f"{memory_text(share.work)} on each GPU; " + fit_of(share, stage, gpu)),
            row("", f"sends {share.sent / 1e9:.2f} GB in {share.sending * 1e3:,.1f} ms at "
                f"{share.rate / 1e9:.0f} GB/s ({link})"),
            row("", f"computes {share.compute * 1e3:,.1f} ms; sending can hide behind "
                f"{share.overlap * 1e3:,.1f} of them: {hidden_text(share)}"),
        ]  # fmt: skip
        tokens = expected_tokens(recipe, stage)
        if tokens is not None:
            per_step = sequences_per_step(recipe, stage) * share.work.length
            took = tokens.count / per_step * share.seconds / 3600
            lines.append(row("", f"{took:,.1f} h with {gpus:,} GPUs"))
    return lines


def fit_of(share: Share, stage: str, gpu: GPU) -> str:
    each = 2 if stage == "dpo" else 1
    return fit_sentence(share.work, round(gpu.memory * GIB), gpu.name, each)


def hidden_text(share: Share) -> str:
    waits = share.seconds - share.compute
    return "no waiting" if not waits else f"waits {waits / share.seconds:.0%} of the time"
