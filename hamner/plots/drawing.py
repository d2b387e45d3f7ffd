"""How the pictures of a run look: colours, axes, curves, and words that can't break them.

Colours are Okabe and Ito's, which colour-blind eyes tell apart; a stage has the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import FuncFormatter, Locator, NullLocator

from hamner.plots.metrics import Metrics, Series, binned

COLOURS = {
    "base": "#0072B2", "anneal": "#009E73", "chat": "#E69F00", "sft": "#D55E00", "dpo": "#CC79A7",
}  # fmt: skip
NAMES = {"base": "base", "anneal": "anneal", "chat": "chat", "sft": "SFT", "dpo": "DPO"}
CHOSEN, REJECTED = "#0072B2", "#D55E00"
INK, GREY, PALE = "#222222", "#6b6b6b", "#e4e4e4"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "text.parse_math": False,  # texts of models and names of people may hold a $
    "text.color": INK,
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": GREY,
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "legend.fontsize": 11.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
SMALL = 11.5
LINE_POINTS, ENVELOPE_POINTS = 120, 400  # along a panel
FEW = 12  # points that get a mark each


# ------------------------------------------------------------------------------ words and numbers


def short(value: float, _: object = None) -> str:
    """1234567 as 1.23M, 0.0002 as 2e-4."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    if 0 < abs(value) < 0.9995e-2:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def duration(hours: float) -> str:
    """Hours as 3 d 4 h, 4.2 h, 12 min or 40 s."""
    if hours >= 47.5:
        days, rest = divmod(round(hours), 24)
        return f"{days} d {rest} h"
    if hours >= 0.995:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours * 60 >= 0.995 else f"{hours * 3600:.0f} s"


def one_line(text: str) -> str:
    """The text with its white space made single spaces, and only characters that the font has."""
    known = glyphs()
    visible = (c for c in " ".join(text.split()) if c.isprintable())
    return "".join(c if ord(c) in known else "\N{WHITE SQUARE}" for c in visible)


@cache
def glyphs() -> frozenset[int]:
    fonts = (findfont(FontProperties(family=name)) for name in ("DejaVu Sans", "DejaVu Sans Mono"))
    first, second = (frozenset(get_font(font).get_charmap()) for font in fonts)
    return first & second


def darker(colour: str, share: float = 0.6) -> str:
    red, green, blue = to_rgb(colour)
    return to_hex((share * red, share * green, share * blue))


def of_text(stage: str) -> str:
    """A stage's colour, dark enough to be read on white."""
    return darker(COLOURS[stage], 0.78)


# ------------------------------------------------------------------------------ axes and curves


def new_axes(figure: Figure, spec: SubplotSpec, title: str, x: str = "", unit: str = "") -> Axes:
    axes = figure.add_subplot(spec)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=14, pad=10)
    if unit:
        axes.set_title(unit, loc="right", color=GREY, fontsize=SMALL, pad=10)
    axes.set_xlabel(x)
    axes.tick_params(length=0, labelsize=SMALL)
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    return axes


def log_x(axes: Axes) -> None:
    axes.set_xscale("log")
    mark_logarithms(axes.xaxis)


def log_y(axes: Axes) -> None:
    axes.set_yscale("log")
    mark_logarithms(axes.yaxis)


def mark_logarithms(axis: Axis) -> None:
    axis.set_major_locator(LogMarks())
    axis.set_major_formatter(FuncFormatter(short))
    axis.set_minor_locator(NullLocator())


class LogMarks(Locator):
    """Marks at powers of ten, and at 2 and 5 or 3 times them where few would be seen."""

    def __call__(self) -> list[float]:
        assert isinstance(self.axis, Axis)
        low, high = self.axis.get_view_interval()
        decades = math.log10(max(high, 1e-300) / max(low, 1e-300))
        steps = (1, 2, 5) if decades < 1.7 else (1, 3) if decades < 3.5 else (1,)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [step * 10.0**power for power in powers for step in steps]
        return [mark for mark in marks if low <= mark <= high]

    def tick_values(self, low: float, high: float) -> list[float]:
        return self()


def say(axes: Axes, text: str, at: tuple[float, float]) -> None:
    """Write a remark into a panel, in its upper right corner or, `at` (0.5, 0.5), its middle."""
    x, y = at
    axes.text(
        x, y, text, transform=axes.transAxes, color=GREY, ha="center" if x == 0.5 else "right",
        va="center" if y == 0.5 else "top",
    )  # fmt: skip


def say_empty(axes: Axes, text: str = "not started") -> None:
    """A panel without anything to draw says why."""
    say(axes, text, (0.5, 0.5))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


def draw_curve(
    axes: Axes, series: Series, colour: str, label: str | None = None, *, log: bool = False
) -> list[float]:
    """The spread of a series as a pale band, its median as a line; returns the median's heights."""
    band = binned(series, ENVELOPE_POINTS, log=log)
    axes.fill_between(band.x, band.low, band.high, color=colour, alpha=0.22, linewidth=0)
    line = binned(series, LINE_POINTS, log=log)
    mark = "o" if len(line.x) == 1 else ""
    axes.plot(line.x, line.middle, mark + "-", color=colour, lw=2, ms=4, label=label)
    return list(line.middle[np.isfinite(line.middle)])


def draw_validation(axes: Axes, series: Series, colour: str, *, log: bool = False) -> list[float]:
    line = binned(series.finite(), LINE_POINTS, log=log)
    mark = "o" if len(line.x) <= FEW else ""
    axes.plot(
        line.x, line.middle, mark + "--", color=darker(colour), lw=1.4, ms=4.5, mfc="white", mew=1.2
    )
    return list(line.middle)


def fit_y(axes: Axes, heights: Iterable[float], share: float = 1.0, room: float = 0.05) -> None:
    """Limit the y-axis to the heights (the lowest `share` of them), whatever spikes there are."""
    found = np.array([height for height in heights if math.isfinite(height)])
    if not len(found):
        return
    low, high = float(found.min()), float(np.quantile(found, share))
    if axes.get_yscale() == "log":
        low, high = (max(value, 1e-12) for value in (low, high))
        factor = max((high / low) ** room, 1.05)
        axes.set_ylim(low / factor, high * factor)
        return
    margin = room * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)


def legend(axes: Axes) -> None:
    if entries := len(axes.get_legend_handles_labels()[0]):
        look = {"frameon": True, "facecolor": "white", "framealpha": 0.8, "edgecolor": "none"}
        columns = 1 if entries <= 6 else 2  # a tall one finds no place beside the lines
        # Readable where a line runs behind it.
        axes.legend(loc="best", ncols=columns, columnspacing=1.0, handlelength=1.4, **look)


def validation_key(axes: Axes) -> None:
    """What the dashed lines are, for the legend."""
    axes.plot([], [], "--", color=GREY, lw=1.4, label="validation")


def mark_trouble(axes: Axes, metrics: Metrics) -> None:
    """Crosses at the bottom where no step had a finite loss, triangles at the top at spikes."""
    loss, spikes = metrics.series("loss"), metrics.series("spikes").finite()
    broken = loss.x[np.isnan(loss.y)]
    jumped = spikes.x[np.diff(spikes.y, prepend=0) > 0]
    told = axes.get_legend_handles_labels()[1]  # once, though several stages have some
    for places, marker, height, label in (
        (broken, "x", 0.02, "no finite loss"), (jumped, "v", 0.98, "loss jumped up"),
    ):  # fmt: skip
        seen = binned(Series(places, places), ENVELOPE_POINTS, log=True).x
        axes.plot(
            seen, np.full(len(seen), height), marker, color="#b00020", ms=6,
            transform=axes.get_xaxis_transform(), clip_on=False,
            label=label if len(seen) and label not in told else None,
        )  # fmt: skip
