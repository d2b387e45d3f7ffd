"""The panels of the pictures that plot_training.py draws: each shows one thing about a run."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, cycle, islice
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from hamner.plan import planned_tokens
from hamner.plots.drawing import (
    CHOSEN,
    COLOURS,
    ENVELOPE_POINTS,
    GREY,
    INK,
    LINE_POINTS,
    NAMES,
    PALE,
    REJECTED,
    SMALL,
    draw_curve,
    draw_validation,
    duration,
    fit_y,
    legend,
    log_x,
    log_y,
    mark_trouble,
    new_axes,
    of_text,
    one_line,
    say,
    say_empty,
    short,
    validation_key,
)
from hamner.plots.metrics import Metrics, Samples, Series, binned
from hamner.plots.projection import ENOUGH, NoProjectionError, Projection, project
from hamner.plots.standing import FINISHED, FINISHED_EARLY, NOT_STARTED, RUNNING, STOPPED, Standing
from hamner.recipe import STAGES, Recipe, StreamStage

MARKS = {FINISHED: "✓", FINISHED_EARLY: "✓", RUNNING: "●", STOPPED: "■", NOT_STARTED: "○"}
NONE = "-"
LOSS_UNITS = "nats per token; DPO: per pair"
TABLE = {  # title of each column, and its right end
    "done": 0.36, "step": 0.51, "tokens": 0.575, "loss": 0.64, "validation": 0.72, "time": 0.79,
    "left, about": 0.88,
}  # fmt: skip
LINE = 1.4  # height of a line of samples, of the font's size; DejaVu Sans Mono's own is 1.164
MONO: dict[str, Any] = {
    "fontfamily": "DejaVu Sans Mono", "fontsize": SMALL, "linespacing": LINE / 1.164,
}  # fmt: skip
STEP_COLUMN, TEXT_COLUMN, GAP = 7, 15, 0.5  # letters from the left; lines between stages


@dataclass(frozen=True)
class Run:
    """All that is known of a recipe's run; `metrics` holds the stages that have begun."""

    recipe: Recipe
    metrics: dict[str, Metrics]
    samples: dict[str, list[Samples]]
    standings: dict[str, Standing]


# ------------------------------------------------------------------------------ loss


def loss_panel(figure: Figure, spec: SubplotSpec, run: Run) -> None:
    axes = new_axes(figure, spec, "Loss by step", "step of the stage", LOSS_UNITS)
    log_x(axes)
    heights = []
    for stage, metrics in run.metrics.items():
        loss, held_out = metrics.series("loss"), metrics.series("val_loss")
        heights += draw_curve(axes, loss, COLOURS[stage], NAMES[stage], log=True)
        heights += draw_validation(axes, held_out, COLOURS[stage], log=True)
        mark_trouble(axes, metrics)
    if not heights:
        return say_empty(axes, "no loss in the metrics")
    fit_y(axes, heights)
    validation_key(axes)
    legend(axes)


def before(run: Run, counter: str) -> dict[str, float]:
    """The tokens or hours of the stages before each."""
    own = [(m.last(counter) or 0.0) if (m := run.metrics.get(s)) else 0.0 for s in STAGES]
    return dict(zip(STAGES, accumulate(own, initial=0.0), strict=False))


def stage_labels(
    axes: Axes, stages: dict[str, Metrics], begins: dict[str, float], counter: str
) -> None:
    """The names of the stages above their parts of the x-axis, where there is room."""
    ends = {stage: begins[stage] + (m.last(counter) or 0) for stage, m in stages.items()}
    whole = max(ends.values(), default=0.0)
    for stage, end in ends.items():
        if begins[stage] and whole:
            axes.axvline(begins[stage], color="#bdbdbd", lw=1, ls=":")
        if end - begins[stage] > 0.06 * whole:
            axes.text(
                (begins[stage] + end) / 2, 0.99, NAMES[stage], color=of_text(stage), va="top",
                ha="center", fontweight="bold", transform=axes.get_xaxis_transform(),
            )  # fmt: skip


def tokens_panel(figure: Figure, spec: SubplotSpec, run: Run) -> None:
    axes = new_axes(
        figure, spec, "Loss by tokens", "tokens trained on, over all stages", "nats per token"
    )
    begins, heights = before(run, "tokens_total"), []
    without_pairs = {stage: m for stage, m in run.metrics.items() if stage != "dpo"}
    for stage, metrics in without_pairs.items():
        for name, draw in (("loss", draw_curve), ("val_loss", draw_validation)):
            series = metrics.over("tokens_total", name)
            heights += draw(axes, Series(series.x + begins[stage], series.y), COLOURS[stage])
    if not heights:
        return say_empty(axes, "no tokens_total in the metrics")
    fit_y(axes, heights, share=0.97, room=0.1)
    stage_labels(axes, without_pairs, begins, "tokens_total")


def validation_panel(figure: Figure, spec: SubplotSpec, run: Run) -> None:
    """Small multiples: of each stage the validation loss, of all its sources and each of them."""
    begun = {stage: m for stage, m in run.metrics.items() if len(m.series("val_loss").x)}
    if not begun:
        return say_empty(new_axes(figure, spec, "Validation loss"), "no validation yet")
    parts = spec.subgridspec(1, len(begun), wspace=0.25)
    for number, (stage, metrics) in enumerate(begun.items()):
        x = "tokens (loss per pair)" if stage == "dpo" else "tokens"
        axes = new_axes(figure, parts[number], f"{NAMES[stage]} validation", x)
        draw_validations(axes, metrics, source_names(run.recipe, stage))


def source_names(recipe: Recipe, stage: str) -> list[str]:
    settings = recipe.stage(stage)
    return [source.name for source in settings.sources] if isinstance(settings, StreamStage) else []


def draw_validations(axes: Axes, metrics: Metrics, sources: list[str]) -> None:
    heights: list[float] = []
    for name, colour in zip([*sources, "loss"], [*cycle_colours(len(sources)), INK], strict=True):
        series = metrics.over("tokens_total", f"val_{name}").finite()
        if len(series.x):
            line = binned(series, LINE_POINTS)
            label = "all" if name == "loss" else one_line(name)
            axes.plot(line.x, line.middle, ".-", color=colour, lw=1.4, ms=4, label=label)
            heights += list(line.middle)
    fit_y(axes, heights, share=0.97 if len(heights) > LINE_POINTS else 1.0, room=0.15)
    if sources:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.06 * len(sources) * (high - low))  # room for the legend
        legend(axes)


def cycle_colours(count: int) -> list[str]:
    return list(islice(cycle(COLOURS.values()), count))


def perplexity_panel(figure: Figure, spec: SubplotSpec, run: Run) -> None:
    axes = new_axes(figure, spec, "Perplexity", "step of the stage", "per token")
    log_x(axes)
    log_y(axes)
    heights = []
    for stage, metrics in run.metrics.items():
        if stage != "dpo":
            for name, draw in (("loss", draw_curve), ("val_loss", draw_validation)):
                x, y = metrics.series(name)
                perplexity = Series(x, np.exp(np.minimum(y, 50)))
                label = {"label": NAMES[stage]} if name == "loss" else {}
                heights += draw(axes, perplexity, COLOURS[stage], log=True, **label)
    fit_y(axes, heights)
    validation_key(axes)
    legend(axes)


# ------------------------------------------------------------------------------ how it is trained


def learning_rate_panel(figure: Figure, spec: SubplotSpec, run: Run) -> None:
    axes = new_axes(figure, spec, "Learning rate", "share of the stage")
    log_y(axes)
    peaks, heights = [], []
    for stage, metrics in run.metrics.items():
        rates = metrics.series("learning_rate").finite()
        if len(rates.x):
            steps = run.standings[stage].steps or metrics.step
            share = Series(rates.x / steps, np.where(rates.y > 0, rates.y, np.nan))
            heights += draw_curve(axes, share, COLOURS[stage], NAMES[stage])
            peaks.append(float(rates.y.max()))
    if not heights:
        return say_empty(axes, "no learning_rate in the metrics")
    # An anneal ends at zero, which a logarithm hasn't got.
    fit_y(axes, [max(height, min(peaks) / 20) for height in heights])
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    legend(axes)


def throughput_panel(figure: Figure, spec: SubplotSpec, run: Run) -> None:
    mfu = [value for m in run.metrics.values() if (value := m.last("mfu")) is not None]
    unit = f"tokens a second; MFU {mfu[-1]:.0%}" if mfu else "tokens a second"
    axes = new_axes(figure, spec, "Throughput", "hours of training", unit)
    begins, heights = before(run, "elapsed_hours"), []
    for stage, metrics in run.metrics.items():
        speeds = metrics.over("elapsed_hours", "tokens_per_sec")
        heights += draw_curve(axes, Series(speeds.x + begins[stage], speeds.y), COLOURS[stage])
    if not heights:
        return say_empty(axes, "no tokens_per_sec or elapsed_hours in the metrics")
    axes.set_ylim(0, 1.2 * max(heights) or 1)
    stage_labels(axes, run.metrics, begins, "elapsed_hours")


def gradient_norm_panel(figure: Figure, spec: SubplotSpec, run: Run) -> None:
    axes = new_axes(figure, spec, "Gradient norm", "step of the stage", "before clipping")
    log_x(axes)
    log_y(axes)
    heights = []
    for stage, metrics in run.metrics.items():
        norms = metrics.series("grad_norm")
        positive = Series(norms.x, np.where(norms.y > 0, norms.y, np.nan))
        heights += draw_curve(axes, positive, COLOURS[stage], NAMES[stage], log=True)
        mark_trouble(axes, metrics)
    if not heights:
        return say_empty(axes, "no grad_norm in the metrics")
    for clip in {run.recipe.stage(stage).optimizer.clip for stage in run.metrics}:
        axes.axhline(clip, color=GREY, lw=1, ls=":", label=f"clipped at {clip:g}")
    fit_y(axes, heights)
    legend(axes)


def dpo_panel(figure: Figure, spec: SubplotSpec, run: Run) -> None:
    """Rewards above, accuracy below."""
    parts = spec.subgridspec(2, 1, hspace=0.16)
    above = new_axes(figure, parts[0], "DPO: rewards and accuracy")
    metrics = run.metrics.get("dpo")
    if metrics is None:
        say_empty(figure.add_subplot(parts[1]))
        return say_empty(above)
    heights = []
    for name, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
        heights += draw_curve(above, metrics.series(f"{name}_reward"), colour, name)
        heights += draw_validation(above, metrics.series(f"val_{name}_reward"), colour)
    if not heights:
        say_empty(above, "no rewards in the metrics")
    fit_y(above, heights, room=0.12)
    above.tick_params(labelbottom=False)
    legend(above)
    below = new_axes(figure, parts[1], "", "step")
    draw_curve(below, metrics.series("accuracy"), COLOURS["dpo"])
    draw_validation(below, metrics.series("val_accuracy"), COLOURS["dpo"])
    below.axhline(0.5, color=GREY, lw=1, ls=":")
    below.set_ylim(0.35, 1.02)
    below.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    below.text(
        0.02, 0.05, "pairs whose chosen answer it prefers", transform=below.transAxes, color=GREY,
        fontsize=SMALL,
    )  # fmt: skip


# ------------------------------------------------------------------------------ projection


def base_losses(run: Run) -> tuple[Series, str]:
    """By tokens, without the warm-up: of validation if those are enough, or else of training."""
    settings, metrics = run.recipe.base, run.metrics["base"]
    each = settings.sequences_per_step * settings.sequence_length
    held_out, trained = (
        losses.where(losses.x > settings.schedule.warmup * each)
        for losses in (metrics.over("tokens_total", name).finite() for name in ("val_loss", "loss"))
    )
    enough = len(held_out.x) >= ENOUGH
    return (held_out, "validation loss") if enough else (trained, "training loss")


def projection_panel(figure: Figure, spec: SubplotSpec, run: Run) -> None:
    """Where the base loss is heading; of a finished run, what its first half said of the second."""
    finished = run.standings["base"].finished
    title = "Base loss, projected from half way" if finished else "Projection of the base loss"
    axes = new_axes(figure, spec, title, "tokens")
    if "base" not in run.metrics:
        return say_empty(axes)
    losses, what = base_losses(run)
    seen = float(losses.x.max(initial=0))
    until, fitted = float(planned_tokens(run.recipe, "base") or 0), losses
    if finished:
        until, fitted = seen, losses.where(losses.x <= seen / 2)
    try:
        projection = project(fitted, until)
    except NoProjectionError as error:
        log_x(axes)
        draw_curve(axes, losses, COLOURS["base"], log=True)
        return say(axes, str(error), at=(0.97, 0.95))
    draw_projection(axes, losses, projection, float(fitted.x.max()), what)


def draw_projection(
    axes: Axes, losses: Series, projection: Projection, fitted_to: float, what: str
) -> None:
    colour = COLOURS["base"]
    log_x(axes)
    shown = binned(losses.where(losses.x >= projection.tokens[0]), ENVELOPE_POINTS, log=True)
    known = shown.x <= fitted_to
    axes.plot(shown.x[known], shown.middle[known], ".", color=colour, ms=5, label=what)
    if not known.all():
        axes.plot(shown.x[~known], shown.middle[~known], ".", color=GREY, ms=5, label="what came")
    band = f"{projection.form}, and 90 % of fits"
    axes.plot(projection.tokens, projection.middle, color=INK, lw=1.5, label=band)
    axes.fill_between(
        projection.tokens, projection.low, projection.high, color=INK, alpha=0.15, linewidth=0
    )
    low, middle, high = projection.final
    axes.plot(projection.tokens[-1:], [middle], "o", color=INK, ms=6)
    told = f"{short(projection.tokens[-1])} tokens: {middle:.2f}\n({low:.2f} to {high:.2f})"
    axes.text(
        0.03, 0.05, told, transform=axes.transAxes, fontweight="bold", va="bottom",
    )  # fmt: skip
    fit_y(axes, [*shown.middle, *projection.low, *projection.high])
    legend(axes)


# ------------------------------------------------------------------------------ words


def samples_panel(figure: Figure, spec: SubplotSpec, run: Run) -> None:
    """Of each stage, answers to its first prompt from first to last, then its other prompts'."""
    axes = new_axes(figure, spec, "What it says", unit="first to last, by step")
    said = {stage: run.samples[stage] for stage in STAGES if run.samples.get(stage)}
    if not said:
        return say_empty(axes, "no samples yet")
    axes.set_axis_off()
    page = Page(axes)
    for done, (stage, samples) in enumerate(said.items()):
        left = len(said) - done
        budget = int((page.lines - page.line - GAP * (left - 1)) / left)  # lines of a stage
        end = page.line + budget
        rows = sample_rows(samples, max(min(budget, 3), budget // 2))
        page.write(0, NAMES[stage], of_text(stage), bold=True)
        for number, (step, prompt, answer) in enumerate(rows):
            most = max(1, int((end - page.line) / (len(rows) - number)))
            page.write_sample(step, prompt, answer, of_text(stage), most)
        page.line += GAP


def sample_rows(samples: list[Samples], count: int) -> list[tuple[int, str, str]]:
    """At most so many samples: step, prompt and answer."""
    last = samples[-1]
    first_prompt, *others = last.texts or [""]
    over_time = [s for s in samples if first_prompt in s.texts]
    places = np.linspace(len(over_time) - 1, 0, max(min(count, 2), count - len(others)))
    chosen = [over_time[place] for place in np.unique(places.round().astype(int))]
    rows = [(s.step, first_prompt, s.texts[first_prompt]) for s in chosen]
    return [*rows, *((last.step, prompt, last.texts[prompt]) for prompt in others)][:count]


class Page:
    """Lines of letters of one width in a panel."""

    def __init__(self, axes: Axes):
        self.axes, self.line = axes, 0.0
        box = axes.get_window_extent()
        probe = axes.text(0, 0, "m" * 100, **MONO)
        self.columns = int(box.width / (probe.get_window_extent().width / 100))
        self.lines = box.height / (LINE * SMALL * axes.figure.dpi / 72)
        probe.remove()

    def write(self, column: int, text: str, colour: str, *, bold: bool = False) -> None:
        """Write on the current line, and stay there."""
        self.axes.text(
            column / self.columns, 1 - self.line / self.lines, text, va="top", color=colour,
            transform=self.axes.transAxes, fontweight="bold" if bold else "normal", **MONO,
        )  # fmt: skip

    def write_sample(self, step: int, prompt: str, answer: str, colour: str, most: int) -> None:
        """A step, and at most so many lines of a prompt and what the model made of it."""
        width = max(20, self.columns - TEXT_COLUMN)
        prompt = textwrap.shorten(one_line(prompt), width // 2, placeholder=" …")
        filler = "_" * len(prompt)  # wrapped with the answer, and then not written
        text = f"{filler}  {one_line(answer) or '(nothing)'}"
        lines = textwrap.wrap(text, width, max_lines=most, placeholder=" …")
        lines[0] = lines[0].replace(filler, " " * len(prompt), 1)
        self.write(STEP_COLUMN, f"{short(step):>6}", GREY)
        self.write(TEXT_COLUMN, prompt, colour)
        self.write(TEXT_COLUMN, "\n".join(lines), INK)
        self.line += len(lines)


# ------------------------------------------------------------------------------ the table


def stages_panel(figure: Figure, spec: SubplotSpec, run: Run) -> None:
    """Where each stage stands: a line and a bar for each, and their sum."""
    axes = figure.add_subplot(spec)
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(len(STAGES) + 1.5, -0.5)
    for title, place in TABLE.items():
        axes.text(place, 0, title, ha="right", va="center", color=GREY, fontsize=SMALL)
    for line, standing in enumerate(run.standings.values(), 1):
        colour = COLOURS[standing.stage]
        name = NAMES[standing.stage]
        axes.text(0, line, name, color=of_text(standing.stage), fontweight="bold", va="center")
        for width, fill in ((1.0, PALE), (standing.share, colour)):
            axes.add_patch(Rectangle((0.065, line - 0.2), 0.24 * width, 0.4, color=fill, lw=0))
        faint = standing.state == NOT_STARTED
        write_row(axes, line, table_row(standing), GREY if faint else INK)
        axes.text(0.9, line, f"{MARKS[standing.state]} {standing.state}", va="center", color=GREY)
    axes.axhline(len(STAGES) + 0.5, color=PALE, lw=1)
    axes.text(0, len(STAGES) + 1, "all", fontweight="bold", va="center")
    write_row(axes, len(STAGES) + 1, sum_row(list(run.standings.values())), INK)


def write_row(axes: Axes, line: int, cells: list[str], colour: str) -> None:
    for place, cell in zip(TABLE.values(), cells, strict=True):
        axes.text(place, line, cell, ha="right", va="center", color=colour)


def if_known(value: float | None, form: Callable[[float], str]) -> str:
    return NONE if value is None else form(value)


def loss_text(loss: float) -> str:
    return f"{loss:.3f}" if abs(loss) >= 0.01 else short(float(f"{loss:.1e}"))


def table_row(standing: Standing) -> list[str]:
    of = f"{standing.steps:,}" if standing.steps else f"{standing.epochs} epochs"
    begun = standing.state != NOT_STARTED
    return [
        f"{math.floor(100 * standing.share)}%",
        f"{standing.step:,} of {of}" if begun else of,
        if_known(standing.tokens, short),
        if_known(standing.loss, loss_text),
        if_known(standing.val_loss, loss_text),
        if_known(standing.hours, duration),
        NONE if standing.finished else if_known(standing.hours_left, duration),
    ]


def sum_row(standings: list[Standing]) -> list[str]:
    tokens = sum(standing.tokens or 0 for standing in standings)
    hours = sum(standing.hours or 0 for standing in standings)
    left = [standing.hours_left for standing in standings]
    more = "over " if None in left else ""
    rest = sum(filter(None, left))
    ahead = more + duration(rest) if rest or more else NONE
    return ["", "", short(tokens), "", "", duration(hours), ahead]


PANELS: dict[str, Callable[[Figure, SubplotSpec, Run], None]] = {
    "stages": stages_panel,
    "loss": loss_panel,
    "tokens": tokens_panel,
    "validation": validation_panel,
    "perplexity": perplexity_panel,
    "learning_rate": learning_rate_panel,
    "throughput": throughput_panel,
    "gradient_norm": gradient_norm_panel,
    "dpo": dpo_panel,
    "projection": projection_panel,
    "samples": samples_panel,
}
