"""The concept experiments' results to look at: a table and a picture for every phase."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import fmean, stdev

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common import narrow_table
from hamner.files import write_bytes_whole
from hamner.plots.drawing import GREY, STYLE
from legacy.concept_settings import Settings
from legacy.concept_training import Outcome, Score, Trial

# Okabe and Ito's colours, told apart by all kinds of sight; each with a mark of its own.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
CAPTION = "percent of answers right, word for word: mean and standard deviation over the seeds"

Outcomes = Sequence[Outcome]
Groups = Mapping[str, Outcomes]  # by the trial's name: one outcome a seed


@dataclass(frozen=True)
class Phase:
    """A question: the trials that ask it for one seed, and how their outcomes are shown."""

    name: str
    trials: Callable[[Settings, int], list[Trial]]
    table: Callable[[Outcomes, Settings], Table]
    draw: Callable[[Outcomes, Settings, Path], None]


def by_name(outcomes: Outcomes) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.name, []).append(outcome)
    return groups


# ------------------------------------------------------------------------------ numbers


def shares(outcomes: Outcomes, test: str, lesson: int = -1) -> list[float]:
    """Percent right after a lesson, of every seed."""
    return [100 * outcome.share(test, lesson) for outcome in outcomes]


def mean_and_spread(values: Sequence[float], form: str = ".0f") -> str:
    """`96 ±3`; the spread is the sample standard deviation, and there is none of a single one."""
    spread = f" ±{stdev(values):{form}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{spread}"


def percent(outcomes: Outcomes, test: str, lesson: int = -1) -> str:
    return mean_and_spread(shares(outcomes, test, lesson))


def asked(outcomes: Outcomes, test: str) -> str:
    """How many questions a test has."""
    return str(outcomes[0].after[0][test][1])


def steps_until_known(outcome: Outcome, test: str, begin: int = 0) -> int | None:
    """Steps after `begin` until a test is all right for the first time; None if it never is."""
    for step, scores in outcome.curve:
        right, of = scores[test]
        if step >= begin and right == of:
            return step - begin
    return None


def known_after(outcomes: Outcomes, test: str, begin: int = 0) -> str:
    """Mean and spread of the steps it took, or in how many seeds it was never all right."""
    steps = [steps_until_known(outcome, test, begin) for outcome in outcomes]
    known = [step for step in steps if step is not None]
    if len(known) < len(steps):
        return f"not in {len(steps) - len(known)} of {len(steps)}"
    return mean_and_spread(known)


# ------------------------------------------------------------------------------ tables


def table_of(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = narrow_table(title, headings)
    for row in rows:
        table.add_row(*row)
    table.caption = CAPTION
    return table


# ------------------------------------------------------------------------------ pictures


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, each for percentages; the unused ones are not there."""
    columns = min(count, 2 if count <= 4 else 3)
    rows = -(-count // columns)
    size = (max(3.8 * columns, 6.5), 2.9 * rows + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for unused in axes[count:]:
        unused.remove()
    for each in axes[:count]:
        each.set_ylim(-4, 104)
    for first in axes[:count:columns]:
        first.set_ylabel("% right")
    return figure, axes[:count]


def in_style(draw: Callable[[], Figure], path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    image = BytesIO()
    with matplotlib.rc_context({**STYLE, "font.size": 10, "axes.labelsize": 10}):
        draw().savefig(image, format="png", dpi=100)
    write_bytes_whole(path, [image.getvalue()])


Points = Sequence[tuple[float, Sequence[float]]]  # x, and a value a seed


def line(axes: Axes, points: Points, number: int, label: str) -> None:
    """The mean over the seeds, and as a band the lowest and the highest seed."""
    colour, x = COLOURS[number % len(COLOURS)], [place for place, _ in points]
    axes.fill_between(
        x, [min(values) for _, values in points], [max(values) for _, values in points],
        color=colour, alpha=0.15, linewidth=0,
    )  # fmt: skip
    axes.plot(
        x, [fmean(values) for _, values in points], color=colour, label=label, linewidth=1.8,
        marker=MARKS[number % len(MARKS)], markersize=4.5,
    )  # fmt: skip


def curve_points(outcomes: Outcomes, test: str) -> Points:
    """A test's percentages while the lessons went on; the seeds are measured at the same steps."""
    steps = [step for step, _ in outcomes[0].curve]
    return [
        (step, [percentage(outcome.curve[place][1][test]) for outcome in outcomes])
        for place, step in enumerate(steps)
    ]


def percentage(score: Score) -> float:
    right, of = score
    return 100 * right / of


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=10)


def dots(axes: Axes, rows: Sequence[tuple[str, Sequence[Sequence[float] | None]]],
         labels: Sequence[str]) -> None:  # fmt: skip
    """A line a row: for each label the mean over the seeds, and every seed as a pale dot."""
    for place, (_, cells) in enumerate(rows):
        for number, values in enumerate(cells):
            if values is None:
                continue
            height = place + 0.22 * (number - (len(labels) - 1) / 2)
            colour, mark = COLOURS[number], MARKS[number]
            axes.plot(values, [height] * len(values), mark, color=colour, alpha=0.3, markersize=4,
                      linestyle="none")  # fmt: skip
            axes.plot(fmean(values), height, mark, color=colour, markersize=7)
    for number, label in enumerate(labels):
        axes.plot([], [], MARKS[number], color=COLOURS[number], label=label)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-4, 104)
    axes.set_xlabel("% right (pale: each seed)")
    axes.grid(axis="y", visible=False)


def dots_picture(
    title: str, rows: Sequence[tuple[str, Sequence[Sequence[float] | None]]],
    labels: Sequence[str],
) -> Figure:  # fmt: skip
    figure = Figure(figsize=(7.2, 1.7 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    dots(axes, rows, labels)
    axes.set_title(title, loc="left", fontsize=11)
    legend_below(figure, axes, len(labels))
    return figure


def chain_ends(axes: Axes, lessons: Sequence[str], steps: Sequence[int]) -> None:
    """Where one lesson ends and the next begins, and what each is about."""
    begin = 0
    for name, length in zip(lessons, steps, strict=True):
        if begin:
            axes.axvline(begin, color="0.6", linewidth=0.9, linestyle=":", zorder=0)
        axes.text(
            begin + length / 2, 1.02, name.replace("_", " "), ha="center", fontsize=8.5, color=GREY,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
        begin += length
