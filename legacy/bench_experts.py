"""How fast the experts are: one grouped product, beside a loop over them, ours and Hugging Face's.

    python legacy/bench_experts.py                     the tournament's small variant, v05
    python legacy/bench_experts.py --tokens 8192 --hidden 768 --inner 1536

Forward and backward of one layer's experts, router included, of the same weights and input. Rounds
alternate in a varying order; milliseconds are medians of the process's own time on a CPU, so that
others on the machine count little, and of the clock's on CUDA.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.common import narrow_table, positive, shuffled_rounds, synchronize
from hamner.errors import run
from hamner.machine import pick_device
from legacy import experts

GROUPED, LOOP, PEER = "ours, grouped product", "ours, one after another", "Hugging Face, loop"


def blocks_of(arguments: argparse.Namespace, device: torch.device) -> dict[str, nn.Module]:
    """Blocks of the same weights, by name."""
    settings: dict[str, Any] = {
        "hidden_size": arguments.hidden, "intermediate_size": arguments.inner,
        "num_local_experts": arguments.experts, "num_experts_per_tok": arguments.active,
        "experts_implementation": "eager",
    }  # fmt: skip
    theirs = MixtralSparseMoeBlock(MixtralConfig(**settings)).to(device)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.02)
    ours = experts.MixtureOfExperts(
        arguments.hidden, arguments.inner, arguments.experts, arguments.active
    ).to(device)
    ours.load_state_dict(theirs.state_dict())
    return {GROUPED: ours, LOOP: ours, PEER: theirs}


def work_of(name: str, block: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward of a block."""

    def work() -> None:
        block.zero_grad()
        block(x).sum().backward()

    def one_after_another() -> None:
        with patch.object(experts, "has_grouped_product", lambda rows: False):
            work()

    return one_after_another if name == LOOP else work


def seconds(work: Callable[[], None], device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    synchronize(device)
    begin = clock()
    work()
    synchronize(device)
    return clock() - begin


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"tokens": 2_048, "hidden": 512, "inner": 1_024, "experts": 8, "active": 2, "rounds": 7}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=positive, default=size, help=f"default {size}")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    torch.manual_seed(0)
    blocks = blocks_of(arguments, device)
    x = torch.randn(1, arguments.tokens, arguments.hidden, device=device, requires_grad=True)
    works = {name: work_of(name, block, x) for name, block in blocks.items()}
    found: dict[str, list[float]] = {name: [] for name in works}
    for names in shuffled_rounds(list(works), arguments.rounds + 1):
        for name in names:
            found[name].append(seconds(works[name], device))
    title = f"Experts {arguments.active} of {arguments.experts}, tokens {arguments.tokens:,}"
    table = narrow_table(title, ("", "ms", "of grouped"))
    for name, times in found.items():
        ratio = median(times[1:]) / median(found[GROUPED][1:])  # the first round warms up
        table.add_row(name, f"{1000 * median(times[1:]):,.1f}", f"{ratio:.2f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    run(main)
