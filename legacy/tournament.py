"""The architecture tournament: ten transformers, three rounds, at the same tokens and on one score.

    python legacy/tournament.py                          the real one: a GPU, the recipe v4's data
    python legacy/tournament.py --recipe small --small   the same ten, shrunk, on a CPU
    python legacy/tournament.py --field architectures    Mamba, RWKV, xLSTM ... meet the winner
    python legacy/tournament.py --plan                   what it would take
    python legacy/tournament.py --measure 60             memory and speed of each, nothing else

Everybody trains on the same tokens of the recipe's base mix, in the same order. After each round
the best by held-out bits per byte go on where they stood. Bits per byte are all nats of the
held-out text over ln 2 and its bytes in UTF-8: what the experts' load costs in training isn't among
them. With several seeds (of weights and of the data's order) means decide, and the spread is shown.

What runs out of memory is recorded as such, gives back what it held, and the tournament goes on.
Stopped anywhere, the same command goes on; runs that are done stand in results.json and are not
played again, whoever else takes part. The rules stand in legacy/tournament.yaml; `--set
tournament.KEY=VALUE` changes them, `--set KEY=VALUE` the recipe.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from benchmarks.common import limit_memory, more_than_zero, positive
from hamner import checkpoints, tokenization
from hamner.errors import UserError, nearest, run
from hamner.files import write_text_whole
from hamner.machine import Machine, pick_device
from hamner.plan import target_of
from hamner.recipe import Recipe, load_recipe
from hamner.sources import source_problems
from hamner.stage import (
    check_vocabulary,
    open_tokenizer,
    resolved,
    stage_sources,
    tokenizer_problems,
)
from hamner.tokenization import Tokenizer
from legacy.tournament_measure import measure, measured_table, planned_table
from legacy.tournament_report import draw, results_table
from legacy.tournament_results import Results, Run, failed, survivors, table
from legacy.tournament_rules import (
    Entrant,
    Rules,
    architecture_entrant,
    load_rules,
    split_overrides,
    variant_entrant,
)
from legacy.tournament_runs import Ground, held_out_text, play

FIELDS = ("variants", "architectures")
# Rules that a run doesn't follow from; who plays stands beside the settings.
NO_MATTER = {"variants", "architectures", "winner", "seeds", "log_every", "checkpoint_every"}


@dataclass(frozen=True)
class Place:
    """Where a tournament keeps what it makes."""

    recipe: str
    small: bool
    field: str

    @property
    def _name(self) -> str:
        return f"{self.recipe}/tournament{'_small' if self.small else ''}/{self.field}"

    @property
    def checkpoints(self) -> Path:
        return Path("checkpoints", self._name)

    @property
    def logs(self) -> Path:
        return Path("logs", self._name)

    @property
    def results(self) -> Path:
        return self.logs / "results.json"

    @property
    def tokenizer(self) -> Path:
        return self.checkpoints / "tokenizer.json"

    def set_aside(self) -> None:
        for path in (self.checkpoints, self.logs):
            if aside := checkpoints.move_aside(path):
                print(f"moved {path} to {aside}")


# ------------------------------------------------------------------------------ who plays


def find_entrants(
    arguments: argparse.Namespace, recipe: Recipe, rules: Rules, place: Place
) -> list[Entrant]:
    """Those of a field who play, all or the chosen ones; with the architectures their opponent.

    Raises:
        UserError: nobody is called so.
    """
    known = list(rules.variants if place.field == "variants" else rules.architectures)
    names = known if arguments.variants is None else arguments.variants.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"--variants: nobody is called {name!r}{nearest(name, known)}: "
                            f"choose from {', '.join(known)}")  # fmt: skip
    names = list(dict.fromkeys(names))
    if place.field == "variants":
        return [variant_entrant(name, recipe, rules) for name in names]
    named = opponent(place, rules, arguments.against)
    first = replace(variant_entrant(named, recipe, rules), number=0)
    return [first, *(architecture_entrant(name, recipe, rules, first) for name in names)]


def opponent(place: Place, rules: Rules, named: str | None) -> str:
    """The variant that the architectures meet: as named, the winner here, or the rules' own."""
    if named is not None:
        if named not in rules.variants:
            raise UserError(f"--against: no variant is called {named!r}"
                            f"{nearest(named, rules.variants)}")  # fmt: skip
        return named
    path = Place(place.recipe, place.small, "variants").results
    for row in Results.saved_table(path):
        if row["verdict"] == "winner" and row["entrant"] in rules.variants:
            print(f"the winner is {row['entrant']}, says {path}")
            return str(row["entrant"])
    print(f"no winner in {path}: the architectures meet {rules.winner}")
    return rules.winner


# ------------------------------------------------------------------------------ the tournament


@dataclass
class Tournament:
    ground: Ground
    entrants: dict[str, Entrant]
    seeds: Sequence[int]
    results: Results

    def play(self) -> int:
        """All rounds, from wherever they stand; the exit code."""
        names = list(self.entrants)
        runs: list[Run] = []
        for number, part in enumerate(self.ground.rules.rounds):
            for name in names:
                for seed in self.seeds:
                    if name in failed(runs, number):
                        break
                    found = self.found_or_played(name, seed, number)
                    if found is None:
                        return 130
                    runs.append(found)
            names = survivors(runs, number, part.survivors)
            self.report(runs)
            self.discard(set(self.entrants) - set(names), number)
            if not names:
                raise UserError(
                    "nobody is left: all ran out of memory; try --set "
                    "tournament.gradient_checkpointing=true, or a smaller tournament.micro_batch"
                )
        return 0

    def found_or_played(self, name: str, seed: int, number: int) -> Run | None:
        """A run that the results know of, or else played now; None if it was asked to stop."""
        return self.results.find(name, seed, number) or self.played(name, seed, number)

    def played(self, name: str, seed: int, number: int) -> Run | None:
        """Play a run, and first what it goes on from if that was discarded."""
        ground, so_far = self.ground, (0, 0.0, 0.0)
        if number:
            before = self.results.find(name, seed, number - 1)
            if before is None or not self.can_go_on(name, seed, number):
                before = self.played(name, seed, number - 1)
                if before is None or before.failure:
                    return before
            so_far = before.curve[-1]
        entrant, rounds = self.entrants[name], len(ground.rules.rounds)
        what = f"{name} {entrant.title}, seed {seed}, round {number + 1} of {rounds}"
        print(f"\n{what}: {entrant.parameters:,} parameters", flush=True)
        found = play(ground, entrant, seed, number, so_far)
        if found is not None:
            self.results.add(found)
            print(f"{what}: {found.failure or f'{found.bits_per_byte:.4f} bits per byte'}")
            if number:
                remove(ground.checkpoints_of(name, seed, number - 1))
        return found

    def can_go_on(self, name: str, seed: int, number: int) -> bool:
        """Whether the checkpoints are there that a run, begun or not, needs."""
        folders = [self.ground.checkpoints_of(name, seed, n) for n in (number - 1, number)]
        return any(checkpoints.exist_in(folder) for folder in folders)

    def discard(self, names: set[str], number: int) -> None:
        """Remove the checkpoints of those who are out: gigabytes that nobody goes on from."""
        for name, seed, played in itertools.product(names, self.seeds, range(number + 1)):
            remove(self.ground.checkpoints_of(name, seed, played))

    def report(self, runs: Sequence[Run]) -> None:
        rounds = self.ground.rules.rounds
        rows = table(runs, list(self.entrants), [part.survivors for part in rounds])
        self.results.write(rows)
        mine = {name: self.results.entrants[name] for name in self.entrants}
        console = Console()
        console.print(results_table(rows, mine, len(rounds), console.width))
        paths = draw(self.results.path.parent, runs, rows, mine)
        print(f"written to {self.results.path}, {', '.join(map(str, paths))}", flush=True)


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def open_tournament(
    recipe: Recipe, rules: Rules, machine: Machine, place: Place, entrants: list[Entrant]
) -> Tournament:
    """The tournament as far as it has been played.

    Raises:
        UserError: whatever stands in the way: the data, the tokenizer, or earlier results of other
            rules.
    """
    problems = source_problems(stage_sources(recipe, "base"), recipe)
    if not place.tokenizer.exists():
        problems += tokenizer_problems(recipe)
    if problems:
        raise UserError("\n       ".join(problems))
    tokenizer = kept_tokenizer(recipe, place)
    check_vocabulary(tokenizer, recipe)
    held_out = held_out_text(recipe, rules, tokenizer)
    ground = Ground(recipe, rules, machine, tokenizer, held_out, place.checkpoints, place.logs)
    results = Results(
        place.results,
        settings_of(ground),
        {entrant.name: record_of(entrant) for entrant in entrants},
    )
    results.take_over()
    seeds = range(recipe.seed, recipe.seed + rules.seeds)
    return Tournament(ground, {entrant.name: entrant for entrant in entrants}, seeds, results)


def kept_tokenizer(recipe: Recipe, place: Place) -> Tokenizer:
    """The tournament's tokenizer: opened or trained once, then kept."""
    if place.tokenizer.exists():
        return tokenization.from_path(place.tokenizer)
    tokenizer = open_tokenizer(recipe)
    write_text_whole(place.tokenizer, [tokenizer.to_json()])
    return tokenizer


def settings_of(ground: Ground) -> dict[str, Any]:
    """All that runs follow from, but their entrants and seeds; as plain data."""
    recipe, rules, held_out = ground.recipe, ground.rules, ground.held_out
    names = stage_sources(recipe, "base")
    return {
        "tournament": rules.model_dump(mode="json", exclude=NO_MATTER),
        "sources": {name: recipe.sources[name].model_dump(mode="json") for name in names},
        "mix": {source.name: source.weight for source in recipe.base.sources},
        "precision": recipe.precision,
        "seed": recipe.seed,
        "device": ground.machine.device.type,
        "held_out": {"sequences": len(held_out.rows), "predicted": held_out.predicted,
                     "bytes": held_out.bytes},
    }  # fmt: skip


def record_of(entrant: Entrant) -> dict[str, Any]:
    return {
        "number": entrant.number,
        "title": entrant.title,
        "parameters": entrant.parameters,
        "active_parameters": entrant.active_parameters,
        "config": asdict(entrant.config),
    }


# ------------------------------------------------------------------------------ command line


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="v4", help="whose data, tokenizer and precision (v4)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change the recipe, or with tournament.KEY=VALUE the rules; repeatable",
    )  # fmt: skip
    parser.add_argument("--small", action="store_true", help="the shrunken field, for a CPU")
    parser.add_argument("--field", choices=FIELDS, default="variants")
    parser.add_argument("--variants", metavar="A,B", help="only these of the field")
    parser.add_argument("--against", metavar="A", help="the variant that the architectures meet")
    parser.add_argument("--seeds", type=positive, metavar="N", help="how many; the rules say 3")
    parser.add_argument("--fresh", action="store_true", help="begin anew; moves the old one aside")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument(
        "--plan", nargs="?", const="here", metavar="GPU",
        help="print what it would take, here or on a GPU such as rtx3090, and stop",
    )  # fmt: skip
    parser.add_argument(
        "--measure", type=positive, metavar="STEPS",
        help="so many steps of each on random tokens: speed and memory, and stop",
    )  # fmt: skip
    parser.add_argument("--cap", type=more_than_zero, metavar="GB", help="of CUDA memory, no more")
    return parser.parse_args()


def read_rules(arguments: argparse.Namespace) -> tuple[Recipe, Rules]:
    of_recipe, of_rules = split_overrides(arguments.overrides)
    if arguments.seeds is not None:
        of_rules.append(f"tournament.seeds={arguments.seeds}")
    return load_recipe(arguments.recipe, of_recipe), load_rules(
        small=arguments.small, overrides=of_rules
    )


def measure_all(entrants: list[Entrant], steps: int, ground: tuple[Recipe, Rules, Machine]) -> None:
    recipe, rules, machine = ground
    changes = {"compile": rules.compile, "gradient_checkpointing": rules.gradient_checkpointing}
    recipe, found = recipe.model_copy(update=changes), []
    for entrant in entrants:
        found.append(measure(entrant, steps, recipe, rules, machine))
        print(f"measured {entrant.name}", flush=True)
    Console().print(measured_table(entrants, found, rules))


def main() -> int:
    arguments = arguments_of()
    recipe, rules = read_rules(arguments)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("a tournament is played on one device: start it without torchrun")
    machine = Machine(pick_device(arguments.device))
    place = Place(recipe.name, arguments.small, arguments.field)
    entrants = find_entrants(arguments, recipe, rules, place)
    if arguments.plan is not None:
        target = target_of(arguments.plan, machine.device, recipe)
        Console().print(planned_table(entrants, rules, target))
        return 0
    recipe = resolved(recipe, "base", machine)
    limit_memory(arguments.cap, machine.device)
    if arguments.measure is not None:
        measure_all(entrants, arguments.measure, (recipe, rules, machine))
        return 0
    if arguments.fresh:
        place.set_aside()
    return open_tournament(recipe, rules, machine, place, entrants).play()


if __name__ == "__main__":
    run(main)
