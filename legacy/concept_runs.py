"""What both concept experiments do alike: the command line, the checkpoint, the results file.

Every trial is written down as soon as it is over; the same command goes on with those missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common import positive, usual_precision
from hamner import checkpoints
from hamner.errors import UserError, nearest
from hamner.files import write_text_whole
from hamner.machine import pick_device
from hamner.recipe import Recipe, load_recipe
from legacy.concept_report import Phase
from legacy.concept_settings import Settings, load_settings
from legacy.concept_training import Outcome, School, Schooling, Trial
from legacy.concepts import COMPOSITIONS, MAKERS, concept

NO_MATTER = {"seeds"}  # the settings that no trial follows from


@dataclass(frozen=True)
class Experiment:
    """One of the two scripts: its name, and its phases in order."""

    name: str
    phases: Sequence[Phase]


# ------------------------------------------------------------------------------ the file


@dataclass
class Results:
    """The results file: what was run, on which checkpoint, with which numbers, and what came."""

    path: Path
    about: dict[str, Any]  # `same` and `also`: what has to be as it was, and what may change
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def take_over(self) -> None:
        """Go on from the file at `path`, if there is one.

        Raises:
            UserError: it can't be read, or is of another checkpoint or other numbers.
        """
        if not self.path.exists():
            return
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            theirs = saved["same"]
            outcomes = [outcome_from(data) for data in saved["outcomes"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path}: not the results of a concept experiment ({error})"
            ) from None
        ours = json.loads(json.dumps(self.about["same"]))
        different = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
        if different:
            raise UserError(
                f"{self.path} was made with another {', '.join(different)}: name another folder "
                "with --out, or begin anew with --fresh"
            )
        self.outcomes = {outcome.key: outcome for outcome in outcomes}

    def add(self, outcome: Outcome) -> None:
        self.outcomes[outcome.key] = outcome
        self.write()

    def write(self) -> None:
        """One outcome a line, so that the file can be read and compared.

        Raises:
            UserError: the disk is full, or the folder not to be written to.
        """
        rows = ",\n".join(json.dumps(asdict(one)) for one in self.outcomes.values())
        about = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in self.about.items())
        with writable(self.path):
            write_text_whole(self.path, ["{\n", about, ',\n"outcomes": [\n', rows, "\n]}\n"])


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Raises UserError where the disk is full, or the folder not to be written to."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"can't write {path} ({error.strerror}); name a folder with --out"
        ) from None


def outcome_from(data: Mapping[str, Any]) -> Outcome:
    """The outcome that `asdict` made plain, as JSON gives it back."""
    after = [scores_from(scores) for scores in data["after"]]
    curve = [(int(step), scores_from(scores)) for step, scores in data["curve"]]
    return Outcome(**{**data, "after": after, "curve": curve})


def scores_from(data: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    return {name: (right, of) for name, (right, of) in data.items()}


# ------------------------------------------------------------------------------ the run


def open_school(
    path: Path, recipe: Recipe, settings: Settings, device: torch.device
) -> tuple[School, dict[str, Any]]:
    """The model of a checkpoint with all that teaching it takes; and which one it is.

    Raises:
        UserError: no checkpoint there, or a damaged one.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: train one first, or name one with --checkpoint")
    checkpoint = checkpoints.load(path)
    model = checkpoints.load_model(checkpoint, path)
    ways = Schooling(
        settings.optimizer, settings.items_per_step, settings.row_length, settings.schedule,
        settings.measure_every, usual_precision(recipe, device),
    )  # fmt: skip
    school = School(model, checkpoints.load_tokenizer(checkpoint), device, ways)
    identity = {
        "stage": checkpoint["stage"],
        "step": checkpoint["step"],
        "parameters": model.config.num_parameters(),
        "weights": fingerprint(model),
    }
    return school, identity


def fingerprint(model: torch.nn.Module) -> str:
    """Of a model's weights: the same model has the same, wherever its file lies."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(name.encode())
        hashed.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


def fingerprint_of_items() -> str:
    """Of what there is to learn, as this version of concepts.py makes it."""
    made = [concept(name, 0) for name in MAKERS], [make(0) for make in COMPOSITIONS.values()]
    return hashlib.sha256(repr(made).encode()).hexdigest()[:16]


def run_trials(school: School, trials: Sequence[Trial], results: Results) -> list[Outcome]:
    """The outcomes of trials: those on file, and those that are run now."""
    for number, trial in enumerate(trials, 1):
        if trial.key in results.outcomes:
            continue
        outcome = school.run(trial)
        results.add(outcome)
        last = ", ".join(f"{test} {r}/{n}" for test, (r, n) in outcome.after[-1].items())
        print(f"{number}/{len(trials)} {trial.key}: {last}", flush=True)
    return [results.outcomes[trial.key] for trial in trials]


def arguments_of(doc: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="v4", help="whose base checkpoint and precision (v4)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="begin with this one")
    parser.add_argument("--small", action="store_true", help="the small form, for recipe tiny")
    parser.add_argument("--seeds", type=positive, metavar="N", help="how many; the settings say 3")
    parser.add_argument("--only", nargs="+", metavar="PHASE", help="these phases alone")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a number of legacy/concepts.yaml; repeatable",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for results and pictures")
    parser.add_argument("--fresh", action="store_true", help="begin anew; moves the old one aside")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser.parse_args()


def chosen_phases(experiment: Experiment, only: Sequence[str] | None) -> list[Phase]:
    """All phases, or those that `only` names."""
    known = [phase.name for phase in experiment.phases]
    for name in only or ():
        if name not in known:
            raise UserError(
                f"--only: no phase is called {name!r}{nearest(name, known)}: choose from "
                f"{', '.join(known)}"
            )
    return [phase for phase in experiment.phases if not only or phase.name in only]


def about(
    experiment: Experiment, settings: Settings, path: Path, identity: Mapping[str, Any],
    device: torch.device, precision: str,
) -> dict[str, Any]:  # fmt: skip
    return {
        "experiment": experiment.name,
        "same": {
            "checkpoint": dict(identity),
            "settings": settings.model_dump(mode="json", exclude=NO_MATTER),
            "items": fingerprint_of_items(),
            "device": device.type,
            "precision": precision,
        },
        "also": {
            "path": str(path),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }


def main_of(experiment: Experiment, doc: str | None) -> Callable[[], int]:
    """The main of an experiment's script."""

    def main() -> int:
        run_experiment(experiment, arguments_of(doc))
        return 0

    return main


def run_experiment(experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Run what isn't on file yet, and show every phase as soon as it is complete.

    Raises:
        UserError: whatever is wrong with the arguments, the numbers, the checkpoint or the file.
    """
    phases = chosen_phases(experiment, arguments.only)
    settings = read_settings(arguments)
    recipe, device = load_recipe(arguments.recipe), pick_device(arguments.device)
    path = arguments.checkpoint or recipe.folder("base") / "latest.pt"
    school, identity = open_school(path, recipe, settings, device)
    seeds = range(recipe.seed, recipe.seed + settings.seeds)
    todo = [[trial for n in seeds for trial in phase.trials(settings, n)] for phase in phases]
    for trial in chain.from_iterable(todo):  # before hours go by
        school.check_lengths(trial)
    out = folder_of(experiment, recipe, arguments)
    said = about(experiment, settings, path, identity, device, school.ways.precision)
    results = Results(out / "results.json", said)
    results.take_over()
    print(f"{path} (stage {identity['stage']}, step {identity['step']:,}), "
          f"{identity['parameters']:,} parameters on {device}")  # fmt: skip
    for phase, trials in zip(phases, todo, strict=True):
        report(phase, run_trials(school, trials, results), settings, out)
    print(f"written to {results.path}")


def read_settings(arguments: argparse.Namespace) -> Settings:
    overrides = list(arguments.overrides)
    if arguments.seeds is not None:
        overrides.append(f"seeds={arguments.seeds}")
    return load_settings(small=arguments.small, overrides=overrides)


def folder_of(experiment: Experiment, recipe: Recipe, arguments: argparse.Namespace) -> Path:
    """Where results go; with --fresh, what lies there is moved aside."""
    name = experiment.name + ("_small" if arguments.small else "")
    out: Path = arguments.out or Path("logs", recipe.name, name)
    if arguments.fresh and (aside := checkpoints.move_aside(out)):
        print(f"moved {out} to {aside}")
    return out


def report(phase: Phase, outcomes: Sequence[Outcome], settings: Settings, out: Path) -> None:
    Console().print(phase.table(outcomes, settings))
    path = out / f"concepts_{phase.name}.png"
    with writable(path):
        phase.draw(outcomes, settings, path)
    print(f"drawn: {path}\n", flush=True)
