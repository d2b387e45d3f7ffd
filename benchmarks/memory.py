"""Memory of training steps, predicted by `hamner/memory.py` beside measured.

Each shape is measured in a process of its own: on a CPU (Linux) the highest resident size of two
steps, less what the program had before the model was built; on CUDA what torch's allocator gave out
at most. The ratio is of the prediction to the median: malloc's part differs from run to run.

    python benchmarks/memory.py                 fp32, as a CPU trains; on CUDA in 16 bits too
    python benchmarks/memory.py --repeats 5 --shapes "weights; v4 cut, recomputed"
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common import OurStepper, add_json_option, keep, narrow_table, positive
from rich.console import Console
from rich.table import Table

from hamner.errors import UserError, nearest, run
from hamner.machine import Machine, pick_device, prepare_model
from hamner.memory import Work, memory_bytes, peak_bytes
from hamner.optim import make_optimizer
from hamner.recipe import Recipe, load_recipe
from model import ModelConfig, Transformer

MIB = 2**20
STEPS = 2  # the second is the first that finds the optimizer's moments in memory


def shape(hidden: int, layers: int, vocab: int, inner: int, heads: int, kv: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv,
    )  # fmt: skip


WEIGHTS = shape(512, 8, 16_384, 1_408, 8, 4)
ACTIVATIONS = shape(256, 6, 4_096, 704, 4, 2)
V4_CUT = replace(ModelConfig(), num_hidden_layers=4)
SHAPES = {
    "weights": Work(WEIGHTS, 1, 128),
    "activations": Work(ACTIVATIONS, 16, 512),
    "recomputed": Work(ACTIVATIONS, 16, 512, checkpointing=True),
    "v4 cut": Work(V4_CUT, 4, 512),
    "v4 cut, recomputed": Work(V4_CUT, 4, 1_024, checkpointing=True),
    "two micro-batches": Work(WEIGHTS, 2, 512, micro_batches=2),
    "packed": Work(ACTIVATIONS, 8, 512, packed=True),
    "muon": Work(WEIGHTS, 1, 128, muon=True),
}
HALF = {  # on CUDA only
    "v4": Work(ModelConfig(), 24, 1_024),
    "v4, recomputed": Work(ModelConfig(), 24, 1_024, checkpointing=True),
    "v4, packed": Work(ModelConfig(), 8, 1_024, packed=True),
    "v4, compiled": Work(ModelConfig(), 24, 1_024, compiled=True),
    "v4, compiled, recomputed": Work(ModelConfig(), 24, 1_024, compiled=True, checkpointing=True),
}


def recipe_of(work: Work) -> Recipe:
    """A recipe that asks for the work."""
    return load_recipe(
        "v4",
        [
            *(f"model.{key}={json.dumps(value)}" for key, value in asdict(work.config).items()),
            f"precision={'fp16' if work.half else 'fp32'}",
            f"compile={json.dumps(work.compiled)}",
            f"gradient_checkpointing={json.dumps(work.checkpointing)}",
            f"base.optimizer.kind={'muon' if work.muon else 'adamw'}",
        ],
    )


# ------------------------------------------------------------------------ in the process itself


def train(work: Work, device: torch.device, steps: int) -> None:
    """So many optimizer steps on random tokens, as training does them."""
    recipe = recipe_of(work)
    model = Transformer(work.config).train()
    prepare_model(model, recipe, Machine(device))
    optimizer = make_optimizer(model, recipe.base.optimizer)
    stepper = OurStepper(model, optimizer, recipe.precision, device, recipe.base.optimizer.clip)
    for _ in range(steps):
        for _ in range(work.micro_batches - 1):
            with stepper.autocast:
                loss = model(**batch(work, device)).loss
            loss.backward()
        stepper(**batch(work, device))


def batch(work: Work, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.randint(work.config.vocab_size, (work.rows, work.length), device=device)
    if not work.packed:
        return {"input_ids": ids, "labels": ids}
    halves = torch.arange(work.length, device=device).expand_as(ids) // (work.length // 2 + 1)
    return {"input_ids": ids, "labels": ids, "sequence_ids": halves}


def measured_bytes(work: Work, device: torch.device) -> int:
    """The memory that training took more than the program had."""
    small = shape(64, 1, 512, 128, 2, 1)
    train(replace(work, config=small, rows=1, length=64), device, STEPS)  # loads the libraries
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        train(work, device, STEPS)
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("only Linux tells the highest resident size: measure there, or on CUDA")
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size begins anew
    before = status_bytes("VmRSS")
    train(work, device, STEPS)
    return status_bytes("VmHWM") - before


def status_bytes(key: str) -> int:
    """A size that Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


# ------------------------------------------------------------------------ from outside


def measure(work: Work) -> int:
    """`measured_bytes` in a process of its own.

    Raises:
        UserError: it failed, as it does where memory doesn't suffice.
    """
    arguments = [sys.executable, __file__, "--work", json.dumps(asdict(work))]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"measuring failed: {lines[-1]}")
    return int(done.stdout.split()[-1])


def work_from(text: str) -> Work:
    fields = json.loads(text)
    return Work(**{**fields, "config": ModelConfig(**fields["config"])})


def measure_all(works: dict[str, Work], repeats: int) -> dict[str, dict[str, Any]]:
    """Bytes of every shape, by name: predicted, of which weights and activations; measured."""
    found: dict[str, dict[str, Any]] = {}
    for name, work in works.items():
        parts = memory_bytes(work)
        found[name] = {
            "weights": parts["weights"],
            "activations": parts["activations"],
            "predicted": peak_bytes(work),
            "measured": [measure(work) for _ in range(repeats)],
        }
        print(f"{name}: done", file=sys.stderr, flush=True)
    return found


def table_of(found: dict[str, dict[str, Any]]) -> Table:
    headings = ("shape", "weights", "activations", "predicted", "measured", "highest", "ratio")
    table = narrow_table("MiB at the peak", headings)
    for name, sizes in found.items():
        measured, predicted = sizes["measured"], sizes["predicted"]
        row = [sizes["weights"], sizes["activations"], predicted, median(measured), max(measured)]
        cells = [f"{value / MIB:,.0f}" for value in row]
        table.add_row(name, *cells, f"{predicted / median(measured):.2f}")
    return table


def chosen(names: Sequence[str], works: dict[str, Work]) -> dict[str, Work]:
    for name in names:
        if name not in works:
            raise UserError(f"--shapes {name}: no such shape{nearest(name, works)}; there are "
                            f"{', '.join(works)}")  # fmt: skip
    return {name: works[name] for name in names or works}


def works_for(device: torch.device) -> dict[str, Work]:
    """The shapes that suit a device."""
    works = {name: replace(work, device_type=device.type) for name, work in SHAPES.items()}
    if device.type == "cuda":
        works |= {name: replace(w, device_type="cuda", half=True) for name, w in HALF.items()}
    return works


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--shapes", default="", help="names, with ; between them; default all")
    add_json_option(parser)
    parser.add_argument("--work", type=work_from, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        print(measured_bytes(arguments.work, torch.device(arguments.work.device_type)))
        return 0
    names = [name.strip() for name in arguments.shapes.split(";") if name.strip()]
    works = chosen(names, works_for(pick_device(arguments.device)))
    found = measure_all(works, arguments.repeats)
    Console().print(table_of(found))
    keep(arguments, {"bytes": found})
    return 0


if __name__ == "__main__":
    run(main)
