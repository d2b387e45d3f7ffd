"""Which of two held-out answers does a model prefer, by where the pairs come from?

    python benchmarks/preferences.py --recipe tiny
    python benchmarks/preferences.py --recipe small --set data_dir=FOLDER --json preferences.json

A stage's log shows one accuracy over pairs of many kinds, and a model that has learnt one kind
alone may look as if it had learnt a little of all. Here every held-out pair that fits is judged
(--set dpo.sequence_length=N lets longer ones in), and counted under its row's `source`:

- reward: the policy, against its reference, makes the chosen answer more likely than the rejected
  one. This is the accuracy that train_dpo.py logs (equation 7 of arXiv 2305.18290);
- before: the reference alone finds the chosen answer likelier, token by token. So much was there
  before any preference was trained;
- longer: the chosen answer has more tokens. So much can be had without reading.

An equal pair counts half. "95 % sure" is Wilson's interval of "reward", in percent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common import add_json_option, add_recipe_options, narrow_table, read_recipe
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from hamner import checkpoints
from hamner.batches import on_device
from hamner.checkpoints import Checkpoint
from hamner.errors import UserError, run
from hamner.files import write_report
from hamner.machine import pick_device
from hamner.recipe import Recipe
from hamner.tokenization import Tokenizer
from test_ood import interval
from train_dpo import Pair, in_parts, make_pair, pair_log_probabilities, pair_tensors, side_rows

NO_SOURCE = "no source"
MEASURES = ("reward", "before", "longer")

Result = dict[str, Any]  # plain data, as the JSON file holds it


@dataclass
class Judged:
    """Held-out pairs of one kind, and for each 1, 0 or a half under every measure."""

    pairs: int
    marks: dict[str, Tensor]  # (P,) by measure
    margins: Tensor  # (P,) rewards of the chosen answers less those of the rejected ones

    def as_json(self) -> Result:
        shares = {name: float(marks.mean()) for name, marks in self.marks.items()}
        ends = [100 * end for end in interval(shares["reward"] * self.pairs, self.pairs)]
        percents = {name: 100 * share for name, share in shares.items()}
        margin = float(self.margins.mean())
        return {"pairs": self.pairs, **percents, "interval": ends, "margin": margin}


def read_held_out(recipe: Recipe, tokenizer: Tokenizer) -> tuple[list[Pair], list[str], int]:
    """The usable held-out pairs, the kind of each, and how many can't be used.

    Raises:
        UserError: the source can't be read, or holds no usable pair.
    """
    pairs, kinds, left_out = [], [], 0
    for row in side_rows(recipe, "validation"):
        pair = make_pair(row, tokenizer, recipe.dpo.sequence_length)
        if isinstance(pair, Pair):
            pairs.append(pair)
            kinds.append(str(row.get("source") or NO_SOURCE))
        else:
            left_out += 1
    if not pairs:
        raise UserError(f"source {recipe.dpo.validation!r}: no usable preference pair")
    return pairs, kinds, left_out


@torch.inference_mode()
def log_probabilities(
    checkpoint: Checkpoint, path: Path, pairs: Sequence[Pair], recipe: Recipe, device: torch.device
) -> Tensor:
    """(2, number of pairs), chosen above rejected, in fp32; pairs of like length go together."""
    model = checkpoints.load_model(checkpoint, path).to(device).eval()
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].chosen) + len(pairs[i].rejected))
    result = torch.empty(2, len(pairs))
    parts = in_parts(order, recipe.dpo.micro_batch)
    for part in tqdm(parts, checkpoint["stage"], disable=None, leave=False):
        unknown = torch.zeros(2, len(part))
        batch = pair_tensors([pairs[i] for i in part], unknown, recipe.dpo.sequence_length)
        found = pair_log_probabilities(model, on_device(batch, device))
        result[:, torch.tensor(part)] = found.float().cpu()
    return result


def marks_of(differences: Tensor) -> Tensor:
    """1 where the chosen answer is ahead, 0 where the rejected one is, a half where neither is."""
    return (differences.sign() + 1) / 2


def judge(pairs: Sequence[Pair], policy: Tensor, reference: Tensor, beta: float) -> Judged:
    """Both (2, P) log-probabilities of the same pairs."""
    lengths = torch.tensor(
        [[int((answer.labels >= 0).sum()) for answer in (p.chosen, p.rejected)] for p in pairs]
    ).T
    ratios, per_token = policy - reference, reference / lengths
    margins = beta * (ratios[0] - ratios[1])
    differences = {
        "reward": margins,
        "before": per_token[0] - per_token[1],
        "longer": lengths[0] - lengths[1],
    }
    return Judged(len(pairs), {name: marks_of(d) for name, d in differences.items()}, margins)


def by_kind(kinds: Sequence[str], judged: Judged) -> dict[str, Result]:
    """Counts of each kind, the most frequent first, and of all."""
    found = {}
    for kind in sorted(set(kinds), key=lambda kind: (-kinds.count(kind), kind)):
        own = torch.tensor([each == kind for each in kinds])
        marks = {name: marks[own] for name, marks in judged.marks.items()}
        found[kind] = Judged(int(own.sum()), marks, judged.margins[own]).as_json()
    return found | {"all": judged.as_json()}


def table_of(results: dict[str, Result]) -> Table:
    headings = ("", "pairs", "reward", "95 % sure", "before", "longer", "margin")
    table = narrow_table("Held-out pairs: percent that agree with the choice", headings)
    for name, result in results.items():
        if name == "all":
            table.add_section()
        low, high = result["interval"]
        reward, before, longer = (f"{result[measure]:.1f}" for measure in MEASURES)
        sure = f"{low:.1f} to {high:.1f}"
        table.add_row(
            name, f"{result['pairs']:,}", reward, sure, before, longer, f"{result['margin']:.3f}"
        )
    return table


def load(given: Path | None, folder: Path, names: Sequence[str]) -> tuple[Path, Checkpoint]:
    """The checkpoint that is given, or else the first of a stage's that is there and good.

    Raises:
        UserError: there is none.
    """
    return (given, checkpoints.load(given)) if given else checkpoints.load_newest(folder, names)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe_options(parser, "tiny")
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="default: the recipe's last of stage dpo")
    add("--reference", type=Path, metavar="FILE", help="what it began as; default: sft's best")
    add_json_option(parser)
    return parser.parse_args()


def main() -> int:
    arguments = read_arguments()
    recipe = read_recipe(arguments)
    device = pick_device(arguments.device)
    path, policy = load(arguments.checkpoint, recipe.folder("dpo"), ("latest.pt",))
    names = ("best.pt", "latest.pt")  # as stage 5 starts
    reference_path, reference = load(arguments.reference, recipe.folder("sft"), names)
    tokenizer = checkpoints.load_tokenizer(policy)
    if tokenizer.to_json() != checkpoints.load_tokenizer(reference).to_json():
        raise UserError(f"{path} and {reference_path} have different tokenizers: they are no pair")
    pairs, kinds, left_out = read_held_out(recipe, tokenizer)
    trained, before = (
        log_probabilities(checkpoint, where, pairs, recipe, device)
        for checkpoint, where in ((policy, path), (reference, reference_path))
    )
    results = by_kind(kinds, judge(pairs, trained, before, recipe.dpo.beta))
    print(f"{path} against {reference_path}: {len(pairs):,} pairs, {left_out:,} left out")
    Console(width=None if sys.stdout.isatty() else 100, highlight=False).print(table_of(results))
    if arguments.json:
        about = {
            "recipe": recipe.name, "checkpoint": str(path), "reference": str(reference_path),
            "step": policy["step"], "sequence_length": recipe.dpo.sequence_length,
            "beta": recipe.dpo.beta, "left_out": left_out, "kinds": results,
        }  # fmt: skip
        write_report(arguments.json, about)
        print(f"written to {arguments.json}")
    return 0


if __name__ == "__main__":
    run(main)
