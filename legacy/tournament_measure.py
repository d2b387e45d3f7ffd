"""What a tournament's entrants take, before it is played: planned, or measured over a few steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from benchmarks.common import OurStepper, narrow_table, optional, seconds_of
from hamner.machine import Machine, prepare_model
from hamner.optim import make_optimizer
from hamner.plan import UTILISATION, Target
from hamner.plots.drawing import duration
from hamner.recipe import Recipe
from legacy.tournament_report import counted, gibibytes
from legacy.tournament_rules import Entrant, Rules
from legacy.tournament_runs import balanced_loss, free_memory, is_out_of_memory, new_model

WARM_UP = 3  # steps that aren't timed: the optimizer's momenta appear in the first


@dataclass(frozen=True)
class Measured:
    """Tokens a second, and on CUDA the peak of torch's memory in bytes; what failed says why."""

    tokens_per_second: float | None
    peak_memory: int | None
    failure: str


def measure(
    entrant: Entrant, steps: int, recipe: Recipe, rules: Rules, machine: Machine
) -> Measured:
    """So many whole steps of the tournament's size, on random tokens; nothing is written."""
    cuda, speed, failure = machine.device.type == "cuda", None, ""
    if cuda:
        torch.cuda.reset_peak_memory_stats(machine.device)
    try:
        speed = tokens_per_second(entrant, steps, recipe, rules, machine)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = "out of memory"
    peak = torch.cuda.max_memory_allocated(machine.device) if cuda else None
    free_memory(compiled=rules.compile)
    return Measured(speed, peak, failure)


def tokens_per_second(
    entrant: Entrant, steps: int, recipe: Recipe, rules: Rules, machine: Machine
) -> float:
    step = step_of(entrant, recipe, rules, machine)
    repeat(step, WARM_UP)
    seconds = seconds_of(lambda: repeat(step, steps), machine.device)
    return steps * rules.sequences_per_step * rules.sequence_length / seconds


def repeat(work: Callable[[], None], times: int) -> None:
    for _ in range(times):
        work()


def step_of(entrant: Entrant, recipe: Recipe, rules: Rules, machine: Machine) -> Callable[[], None]:
    """A function that does one optimizer step: every micro-batch, clipping, update."""
    device, part = machine.device, rules.rounds[0]
    model = new_model(entrant, recipe.seed)
    prepare_model(model, recipe, machine)  # type: ignore[arg-type]
    optimizer = make_optimizer(model, rules.optimizer.at(part.learning_rate))
    stepper = OurStepper(model, optimizer, recipe.precision, device, rules.optimizer.clip)
    shape = (rules.sequences_per_step, rules.sequence_length)
    rows = torch.randint(entrant.config.vocab_size, shape, device=device)
    loss = balanced_loss(rules.load_balancing)
    parts = rows.split(rules.micro_batch)

    def step() -> None:
        for number, ids in enumerate(parts, 1):
            with stepper.autocast:
                mean = loss(model, {"input_ids": ids})[0] / (rows.numel() - len(rows))
            if number < len(parts):
                (mean * stepper.loss_scale.scale).backward()
            else:
                stepper.backward_and_update(mean)
        optimizer.zero_grad()

    return step


def measured_table(entrants: Sequence[Entrant], found: Sequence[Measured], rules: Rules) -> Table:
    size = f"{rules.sequences_per_step} x {rules.sequence_length} tokens a step"
    table = narrow_table(f"Measured, {size}", ("", "params", "active", "tokens/s", "peak GiB"))
    for entrant, one in zip(entrants, found, strict=True):
        speed = one.failure or optional(one.tokens_per_second, ",.0f")
        table.add_row(*described(entrant), speed, optional(gibibytes(one.peak_memory), ".2f"))
    return table


def planned_table(entrants: Sequence[Entrant], rules: Rules, target: Target) -> Table:
    """What each entrant would take if it went all the way, on a device, with all seeds."""
    rounds = [f"round {number + 1}" for number in range(len(rules.rounds))]
    headings = ("", "params", "active", "GFLOP", "GiB", *rounds)
    table = narrow_table(f"Planned for {target.name}, {rules.seeds} seed(s)", headings)
    for entrant in entrants:
        flops = entrant.config.flops_per_token(rules.sequence_length)
        tokens = [rules.seeds * tokens_of(rules, number) for number in range(len(rounds))]
        times = [shown_time(count * flops, target) for count in tokens]
        state = optional(gibibytes(16 * entrant.parameters), ".1f")
        table.add_row(*described(entrant), f"{flops / 1e9:.2g}", state, *times)
    table.caption = (
        f"at {UTILISATION:.0%} of the device's peak, which small and recurrent models don't reach; "
        "a round has only those who are still in it. GFLOP: of a token in training; GiB: weights, "
        "gradients and AdamW's moments, activations not counted"
    )
    return table


def tokens_of(rules: Rules, number: int) -> int:
    return rules.rounds[number].steps * rules.sequences_per_step * rules.sequence_length


def shown_time(flops: float, target: Target) -> str:
    return duration(flops / (target.flops * UTILISATION) / 3600) if target.flops else "-"


def described(entrant: Entrant) -> tuple[str, str, str]:
    counts = counted(entrant.parameters, entrant.active_parameters)
    return f"{entrant.name} {entrant.title}", *counts
