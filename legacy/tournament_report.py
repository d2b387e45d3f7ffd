"""A tournament's results to look at: tables for the terminal, and two pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from rich.table import Table

from benchmarks.common import narrow_table, optional
from hamner.plan import GIB
from hamner.plots.drawing import STYLE
from legacy.tournament_results import Row, Runs, Score, curve_of, failed, scores

# Okabe and Ito's colours, told apart by all kinds of sight; a pair of entrants shares one.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
STYLES = ((0, (4, 1.5)), "-")  # the small one of a pair, and the medium
Entrants = Mapping[str, Mapping[str, Any]]  # by name: number in the field, title, parameters, ...

WIDE = 120  # columns, in which a line of the table has room
CAPTION = (
    "mean and standard deviation over the seeds; equal time: bits per byte when the fastest had "
    "finished the last round that this one played in"
)


def counted(parameters: int, active: int) -> tuple[str, str]:
    """Parameters in millions, and those that a token meets where they are fewer."""
    return f"{parameters / 1e6:.1f}M", f"{active / 1e6:.1f}M" if active < parameters else "all"


def gibibytes(size: int | None) -> float | None:
    return size / GIB if size else None


def shown(score: Score | None, space: str) -> str:
    """Mean and spread of a score, in bits per byte."""
    if score is None:
        return ""
    if not math.isfinite(score.mean):
        return "diverged"
    spread = f"{space}±{score.spread:.4f}" if score.spread is not None else ""
    return f"{score.mean:.4f}{spread}"


def results_table(rows: Sequence[Row], entrants: Entrants, rounds: int, width: int) -> Table:
    """All that there is to tell; where the terminal is narrow, an entrant takes two lines."""
    space = " " if width >= WIDE else "\n"
    memory = any(row.peak_memory for row in rows)
    names = [f"round {number + 1}" for number in range(rounds)]
    headings = ["", "", f"params{space}active", *names, f"equal{space}time", "tok/s"]
    table = narrow_table("Held-out bits per byte", [*headings, *["GiB"] * memory, "verdict"])
    for column in table.columns:
        column.no_wrap = True
    table.columns[1].no_wrap, table.columns[1].overflow = False, "fold"  # the titles give way
    table.columns[1].justify = table.columns[-1].justify = "left"
    for row in rows:
        entrant = entrants[row.entrant]
        played = [*row.scores, *[None] * (rounds - len(row.scores))]
        at_equal_time = row.scores[-1].at_equal_time if row.scores else None
        table.add_row(
            str(row.rank or "-"),
            label_of(row.entrant, entrants, space),
            space.join(counted(entrant["parameters"], entrant["active_parameters"])),
            *(shown(score, space) for score in played),
            optional(at_equal_time, ".4f"),
            optional(row.tokens_per_second, ",.0f"),
            *[optional(gibibytes(row.peak_memory), ".2f")] * memory,
            row.verdict.replace(" in ", f" in{space}").replace(" of ", f"{space}of "),
        )
    table.caption = CAPTION
    return table


# ------------------------------------------------------------------------------ pictures


def draw(folder: Path, runs: Runs, rows: Sequence[Row], entrants: Entrants) -> list[Path]:
    """Write curves.png and rankings.png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "curves.png", folder / "rankings.png"]
    with matplotlib.rc_context({**STYLE, "font.size": 10}):
        curves_picture(runs, rows, entrants).savefig(paths[0], dpi=110)
        rankings_picture(runs, rows, entrants).savefig(paths[1], dpi=110)
    return paths


def look_of(name: str, entrants: Entrants) -> dict[str, Any]:
    number = entrants[name]["number"]
    return {"color": COLOURS[number // 2 % len(COLOURS)], "linestyle": STYLES[number % 2]}


def label_of(name: str, entrants: Entrants, space: str = " ") -> str:
    return f"{name}{space}{entrants[name]['title']}"


def curves_picture(runs: Runs, rows: Sequence[Row], entrants: Entrants) -> Figure:
    """Bits per byte by step: the mean over seeds, a band from the lowest to the highest."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    seeds = sorted({run.seed for run in runs})
    for row in rows:
        curves = [curve_of(runs, row.entrant, seed, len(runs)) for seed in seeds]
        columns = list(zip(*curves, strict=False))  # the points of all seeds at a step
        values = [[point[2] for point in column] for column in columns]
        if not values:
            continue
        steps, look = [column[0][0] for column in columns], look_of(row.entrant, entrants)
        means = [fmean(value) for value in values]
        axes.plot(steps, means, **look, linewidth=1.6, label=label_of(row.entrant, entrants))
        low, high = map(min, values), map(max, values)
        axes.fill_between(steps, [*low], [*high], color=look["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="step", ylabel="held-out bits per byte", yscale="log")
    mark_rounds(axes, runs)
    plain_ticks(axes)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title="best first", fontsize=9)
    return figure


def mark_rounds(axes: Axes, runs: Runs) -> None:
    """A line where each round ended."""
    ends = sorted({run.curve[-1][0] for run in runs if run.curve})
    for number, end in enumerate(ends, 1):
        axes.axvline(end, color="0.7", linewidth=0.8, zorder=0)
        place = axes.get_xaxis_transform()
        axes.text(end, 1.01, f"round {number} ends", transform=place, ha="right", fontsize=8)


def plain_ticks(axes: Axes) -> None:
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def rankings_picture(runs: Runs, rows: Sequence[Row], entrants: Entrants) -> Figure:
    """A panel a round: everybody's score and spread, best on top; hollow is who goes out."""
    rounds = max((run.round for run in runs), default=0) + 1
    out = {row.entrant: len(row.scores) for row in rows if row.verdict.startswith("out in")}
    figure = Figure(figsize=(4 * rounds, 1.4 + 0.32 * len(rows)), layout="constrained")
    panels = figure.subplots(1, rounds, squeeze=False)[0]
    for number, axes in enumerate(panels):
        gone = {name for name, played in out.items() if played == number + 1}
        rank_panel(axes, scores(runs, number), gone, entrants)
        axes.set_title(f"after round {number + 1}", fontsize=10)
        axes.set_ylim(len(rows) - 0.5, -0.7)  # the same for all: who is left stands on top
        axes.tick_params(labelsize=8)
    missing = [f"{name} ran out of memory" for name in sorted(failed(runs, rounds))]
    words = ["held-out bits per byte, lower is better; hollow: goes out", *missing]
    figure.supxlabel("; ".join(words), fontsize=9)
    return figure


def rank_panel(axes: Axes, found: Mapping[str, Score], gone: set[str], entrants: Entrants) -> None:
    for place, (name, score) in enumerate(found.items()):
        colour = look_of(name, entrants)["color"]
        axes.errorbar(
            score.mean, place, xerr=score.spread or 0, fmt="o", color=colour, capsize=3,
            markersize=7, markerfacecolor="white" if name in gone else colour,
        )  # fmt: skip
        axes.annotate(
            f"{score.mean:.3f}", (score.mean, place), (0, 6), textcoords="offset points",
            ha="center", fontsize=7, color="0.3",
        )  # fmt: skip
    axes.set_yticks(range(len(found)), [label_of(name, entrants) for name in found])
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)
