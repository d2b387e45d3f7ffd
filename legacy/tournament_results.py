"""What a tournament has found out: its runs, who goes on, and how they compare.

Pure functions of the runs, so that whatever was played in whatever order, and however often it was
interrupted, comes to the same table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hamner.errors import UserError
from hamner.files import write_text_whole

Point = tuple[int, float, float]  # step, seconds and held-out bits per byte, from the first round


@dataclass(frozen=True)
class Run:
    """One round of one entrant with one seed."""

    entrant: str
    seed: int
    round: int  # from 0
    failure: str = ""  # what torch said when memory ran out; then there is nothing else
    bits_per_byte: float = 0.0  # held out, when the round ended
    seconds: float = 0.0  # of training, this round's
    tokens: int = 0  # trained on in this round
    balance: float | None = None  # the experts' load, 1 is even; None without experts
    peak_memory: int | None = None  # bytes, on CUDA
    curve: list[Point] = field(default_factory=list)  # of this round, counted from the first one

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Score:
    """How an entrant did in a round: over its seeds, mean and sample standard deviation."""

    mean: float
    spread: float | None  # None of a single seed
    at_equal_time: float | None  # mean when the round's fastest had finished


@dataclass(frozen=True)
class Row:
    """An entrant's line in the final table."""

    entrant: str
    rank: int | None  # None if it failed
    scores: list[Score]  # of the rounds that it finished
    tokens_per_second: float | None
    peak_memory: int | None
    verdict: str


Runs = Sequence[Run]


def of_round(runs: Runs, number: int) -> list[Run]:
    return [run for run in runs if run.round == number]


def failed(runs: Runs, number: int) -> set[str]:
    """Entrants that ran out of memory, with any seed, in this round or before."""
    return {run.entrant for run in runs if run.failure and run.round <= number}


def means(runs: Runs, number: int) -> dict[str, float]:
    """Mean bits per byte over the seeds at the end of a round, best first."""
    found: dict[str, list[float]] = {}
    out = failed(runs, number)
    for run in of_round(runs, number):
        if run.entrant not in out:
            found.setdefault(run.entrant, []).append(run.bits_per_byte)
    averages = {name: fmean(values) for name, values in found.items()}
    return dict(sorted(averages.items(), key=lambda item: (item[1], item[0])))


def survivors(runs: Runs, number: int, count: int) -> list[str]:
    """The best `count` of a round, best first."""
    return list(means(runs, number))[:count]


def bits_at(points: Sequence[Point], seconds: float) -> float | None:
    """Bits per byte at a time, on straight lines between validations; None before the first."""
    before: Point | None = None
    for point in points:
        if point[1] >= seconds:
            if before is None:
                return point[2] if point[1] == seconds else None
            share = (seconds - before[1]) / (point[1] - before[1])
            return before[2] + share * (point[2] - before[2])
        before = point
    return None


def curve_of(runs: Runs, entrant: str, seed: int, number: int) -> list[Point]:
    """All points of an entrant with a seed, to the end of a round."""
    mine = [run for run in runs if (run.entrant, run.seed) == (entrant, seed)]
    mine = sorted((run for run in mine if run.round <= number), key=lambda run: run.round)
    return [point for run in mine for point in run.curve]


def equal_times(runs: Runs, number: int) -> dict[str, float | None]:
    """Each entrant's bits per byte when the fastest had finished the round, mean over seeds.

    Seconds of training since the tournament began, validating and saving not counted, and of each
    seed apart. The slower ones are caught in the middle of their cosine, whose end brings much of
    the gain: the comparison flatters the fastest.
    """
    found: dict[str, list[float | None]] = {name: [] for name in means(runs, number)}
    for seed in sorted({run.seed for run in of_round(runs, number)}):
        curves = {name: curve_of(runs, name, seed, number) for name in found}
        budget = min((curve[-1][1] for curve in curves.values()), default=0.0)
        for name, curve in curves.items():
            found[name].append(bits_at(curve, budget))
    return {name: mean_of_known(values) for name, values in found.items()}


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """None if any is not known."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def scores(runs: Runs, number: int) -> dict[str, Score]:
    """Every entrant's score of a round, best first; those that failed are left out."""
    times = equal_times(runs, number)
    result = {}
    for name, mean in means(runs, number).items():
        values = [run.bits_per_byte for run in of_round(runs, number) if run.entrant == name]
        spread = stdev(values) if len(values) > 1 else None
        result[name] = Score(mean, spread, times[name])
    return result


def table(runs: Runs, names: Sequence[str], survivors_of: Sequence[int]) -> list[Row]:
    """The table so far, best first: later rounds before earlier ones, failures last."""
    rounds = [scores(runs, number) for number in range(len(survivors_of))]
    out = failed(runs, len(rounds))
    ranked: list[tuple[int, int, str]] = []  # minus the last round, place in it, name
    for name in names:
        played = [number for number, found in enumerate(rounds) if name in found]
        if played and name not in out:
            ranked.append((-played[-1], list(rounds[played[-1]]).index(name), name))
    rows = []
    for rank, (last, place, name) in enumerate(sorted(ranked), 1):
        verdict = verdict_of(-last, place, survivors_of)
        rows.append(row_of(runs, rounds, name, rank, verdict))
    for run in runs:
        if run.failure:
            verdict = f"out of memory in round {run.round + 1}"
            rows.append(row_of(runs, rounds, run.entrant, None, verdict))
    return rows


def row_of(
    runs: Runs, rounds: list[dict[str, Score]], name: str, rank: int | None, verdict: str
) -> Row:
    mine = [found[name] for found in rounds if name in found]
    return Row(name, rank, mine, speed(runs, name), peak(runs, name), verdict)


def verdict_of(number: int, place: int, survivors_of: Sequence[int]) -> str:
    """What became of who took a place (from 0) in a round, the last that it played."""
    if place >= survivors_of[number]:
        return f"out in round {number + 1}"
    return "winner" if number + 1 == len(survivors_of) else "goes on"


def speed(runs: Runs, name: str) -> float | None:
    """Tokens per second over all that an entrant has trained."""
    mine = [run for run in runs if run.entrant == name and not run.failure]
    if not mine:
        return None
    return sum(run.tokens for run in mine) / sum(run.seconds for run in mine)


def peak(runs: Runs, name: str) -> int | None:
    known = [run.peak_memory for run in runs if run.entrant == name and run.peak_memory]
    return max(known, default=None)


# ------------------------------------------------------------------------------ the file


@dataclass
class Results:
    """The results file: what was played, under which settings, and what came of it."""

    path: Path
    settings: dict[str, Any]  # all that the runs follow from, but the entrants' own
    entrants: dict[str, dict[str, Any]]  # by name: title, parameters, config
    runs: list[Run] = field(default_factory=list)

    @staticmethod
    def saved_table(path: Path) -> list[dict[str, Any]]:
        """The table that a results file ends with; empty if there is none."""
        try:
            return list(json.loads(path.read_text(encoding="utf-8"))["table"])
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def find(self, entrant: str, seed: int, number: int) -> Run | None:
        for run in self.runs:
            if (run.entrant, run.seed, run.round) == (entrant, seed, number):
                return run
        return None

    def add(self, run: Run) -> None:
        """Take a run in, in place of an earlier one of the same, and write the file."""
        key = (run.entrant, run.seed, run.round)
        self.runs = [r for r in self.runs if (r.entrant, r.seed, r.round) != key] + [run]
        self.write()

    def write(self, rows: Sequence[Row] = ()) -> None:
        order = list(self.entrants)
        runs = sorted(self.runs, key=lambda r: (r.round, order.index(r.entrant), r.seed))
        content = {
            "settings": self.settings,
            "entrants": self.entrants,
            "table": [asdict(row) for row in rows],
            "runs": [asdict(run) for run in runs],
        }
        write_text_whole(self.path, [json.dumps(content, indent=1), "\n"])

    def take_over(self) -> None:
        """Go on from the file at `path`, if there is one.

        Entrants and seeds may be others than last time: each run is one of its own. What they were
        played under may not.

        Raises:
            UserError: it was written under other settings, or can't be read.
        """
        if not self.path.exists():
            return
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            runs = [run_from(data) for data in saved["runs"]]
            theirs = {"settings": saved["settings"], **saved["entrants"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}: not a tournament's results ({error})") from None
        different = differences(self.settings, theirs["settings"], "")
        for name in {run.entrant for run in runs} & set(self.entrants):
            ours = self.entrants[name]["config"]
            different += differences(ours, theirs[name]["config"], f".{name}")
        if different:
            raise UserError(
                f"{self.path} was played under other settings: {', '.join(sorted(different))}; "
                "put them back, or begin anew with --fresh"
            )
        self.entrants = {**saved["entrants"], **self.entrants}
        self.runs = runs


def run_from(data: dict[str, Any]) -> Run:
    curve = [(int(step), float(seconds), float(bits)) for step, seconds, bits in data["curve"]]
    return Run(**{**data, "curve": curve})


def differences(ours: Any, theirs: Any, place: str) -> list[str]:
    """The places where two pieces of plain data differ, with both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = dict.fromkeys([*ours, *theirs])
        pairs = [(ours.get(key), theirs.get(key), f"{place}.{key}") for key in keys]
        return [found for pair in pairs for found in differences(*pair)]
    if json.loads(json.dumps(ours)) == theirs:
        return []
    return [f"{place.removeprefix('.')} is {ours}, and was {theirs}"]
