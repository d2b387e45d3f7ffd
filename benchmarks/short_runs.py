"""Short base runs with one choice changed at a time, each for the same computing time.

    python benchmarks/short_runs.py --recipe small --set data_dir=FOLDER \\
        --variants benchmarks/small_variants.yaml --minutes 4 --jobs 2 --json short_runs.json

A variant is a name and the fields of the recipe that it changes. How many steps it gets is what
fits into the time: one step's seconds are measured first, in CPU time of one thread. Its learning
rate warms up over a twentieth of the steps and falls to zero over the rest, so that no variant is
judged in mid-flight. What counts is bits per byte of held-out text, which don't depend on the
tokenizer. Results are kept in the JSON file as they come; what stands there isn't run again.
Choices that don't change a step's time, such as the optimizer's numbers, compare better by --steps:
each gets the same tokens, and the measurement's noise stays out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml
from common import narrow_table, positive
from rich.console import Console

from hamner.errors import UserError, run
from hamner.files import write_report
from hamner.machine import autocast, precision_on
from hamner.optim import make_optimizer
from hamner.recipe import Recipe, load_recipe
from model import Transformer

ROOT = Path(__file__).resolve().parent.parent

Result = dict[str, Any]


def step_seconds(recipe: Recipe, steps: int = 4) -> float:
    """CPU seconds of one optimizer step of the base stage, on random tokens, in one thread."""
    torch.set_num_threads(1)
    stage, model = recipe.base, Transformer(recipe.model.config())
    optimizer = make_optimizer(model, stage.optimizer)
    shape = (min(stage.micro_batch, stage.sequences_per_step), stage.sequence_length)
    times = []
    for _ in range(steps + 1):
        begin = time.process_time()
        for _ in range(stage.sequences_per_step // shape[0]):
            ids = torch.randint(0, recipe.model.vocab_size, shape)
            with autocast(precision_on("cpu", recipe), ids.device):
                loss = model(ids, labels=ids).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - begin)
    return min(times[1:])


def call(script: str, *options: str) -> None:
    """Run one of our scripts in one thread.

    Raises:
        UserError: it failed; with the end of what it wrote.
    """
    command = [sys.executable, str(ROOT / script), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-2_000:]}")


def measure(
    name: str, base: str, overrides: list[str], seconds: float, steps: int | None = None
) -> Result:
    """Train a variant, for `steps` or what fits into `seconds`, and evaluate what came of it."""
    recipe = load_recipe(base, overrides)
    each = step_seconds(recipe)
    steps = steps or max(20, round(seconds / each))
    stage = recipe.base
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            *overrides, f"base.steps={steps}",
            f"base.folder={folder}/run", f"base.log={folder}/log",
            f"base.schedule={{kind: linear, warmup: {steps // 20}, floor: 0.0}}",
            "base.prompts=[]", f"base.validate_every={steps}", f"base.checkpoint.every={steps}",
        ]  # fmt: skip
        options = [word for setting in settings for word in ("--set", setting)]
        call("train_pretrain.py", "--recipe", base, "--fresh", "--device", "cpu", *options)
        report, sources = Path(folder) / "report.json", ",".join(s.name for s in stage.sources)
        call(
            "evaluate_model.py", "--recipe", base, "--tasks", "none", "--sources", sources,
            "--checkpoint", f"{folder}/run/latest.pt", "--bytes-per-source", "150000",
            "--device", "cpu", "--json", str(report), *options,
        )  # fmt: skip
        found = json.loads(report.read_text())
    bits = bits_per_byte(found)
    mixed = sum(source.weight * bits[source.name] for source in stage.sources)
    tokens = steps * stage.sequences_per_step * stage.sequence_length
    parameters = recipe.model.config().num_parameters()
    return {
        "name": name, "overrides": overrides, "parameters": parameters, "seconds_per_step": each,
        "steps": steps, "tokens": tokens, "bits_per_byte": {**bits, "mixed": mixed},
    }  # fmt: skip


def bits_per_byte(report: Any) -> dict[str, float]:
    """By source, of the only checkpoint of `evaluate_model.py --json`."""
    (model,) = report["models"]
    return {name: score["bits_per_byte"] for name, score in model["text"].items()}


def read_variants(path: Path) -> dict[str, list[str]]:
    variants = yaml.safe_load(path.read_text())
    if not isinstance(variants, dict):
        raise UserError(f"{path}: a mapping of names to fields of the recipe is needed")
    return {
        str(name): [f"{key}={json.dumps(value)}" for key, value in (fields or {}).items()]
        for name, fields in variants.items()
    }


def read_results(path: Path) -> list[Result]:
    return json.loads(path.read_text())["runs"] if path.exists() else []


def show(results: list[Result], each: str) -> None:
    table = narrow_table(
        f"{each} each",
        ("", "parameters", "s/step", "steps", "tokens", "bits per byte"),
    )
    for result in sorted(results, key=lambda result: result["bits_per_byte"]["mixed"]):
        table.add_row(
            result["name"], f"{result['parameters']:,}", f"{result['seconds_per_step']:.2f}",
            f"{result['steps']:,}", f"{result['tokens']:,}",
            f"{result['bits_per_byte']['mixed']:.4f}",
        )  # fmt: skip
    Console(width=100).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--variants", type=Path, required=True, help="YAML: name -> fields")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=4.0, help="of one thread, for a variant")
    length.add_argument("--steps", type=positive, help="for a variant, whatever time it takes")
    parser.add_argument("--jobs", type=positive, default=1, help="variants at once, a thread each")
    parser.add_argument("--json", type=Path, required=True, help="results are kept there")
    arguments = parser.parse_args()
    variants, results = read_variants(arguments.variants), read_results(arguments.json)
    have = {result["name"] for result in results}
    minutes, steps = arguments.minutes, arguments.steps
    each = f"{steps:,} steps" if steps else f"{minutes:g} minutes of one thread"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        waiting = [
            pool.submit(
                measure, name, arguments.recipe, [*arguments.overrides, *fields],
                60 * minutes, steps,
            )
            for name, fields in variants.items()
            if name not in have
        ]  # fmt: skip
        for done in as_completed(waiting):
            results.append(done.result())
            limit = {"steps": steps} if steps else {"minutes": minutes}
            write_report(arguments.json, {**limit, "torch": torch.__version__, "runs": results})
            show(results, each)
    return 0


if __name__ == "__main__":
    run(main)
