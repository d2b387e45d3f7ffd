"""Concept experiments, second series: what does it change where the loss is taken?

    python legacy/concept_experiments_v2.py                          on v4's base checkpoint, a GPU
    python legacy/concept_experiments_v2.py --recipe tiny --small    minutes on a CPU
    python legacy/concept_experiments_v2.py --checkpoint FILE --only loss rates

loss     the same items in the same order for as many steps, in three forms: loss on the answer
         alone; loss on every token; the same as plain text, many items packed into a row
rates    whether another learning rate changes that
chains   a concept after another, against the same one from the start
multi    all concepts mixed, in one training

An answer is right if it is word for word what it should be and then ends. Trained and held-out
items are counted apart; several seeds split and order them. Results go to logs/RECIPE/concepts_v2*.
Stopped anywhere, the same command goes on. The numbers stand in legacy/concepts.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from itertools import product

from matplotlib.figure import Figure
from rich.table import Table

from hamner.errors import run
from legacy.concept_report import (
    Outcomes,
    Phase,
    asked,
    by_name,
    chain_ends,
    curve_points,
    dots_picture,
    in_style,
    known_after,
    legend_below,
    line,
    panels,
    percent,
    shares,
    table_of,
)
from legacy.concept_runs import Experiment, main_of
from legacy.concept_settings import Settings
from legacy.concept_training import Form, Lesson, Trial
from legacy.concepts import concept

FORMS: dict[Form, str] = {"answer": "answer only", "all": "every token", "packed": "packed text"}
EXTREMES: dict[Form, str] = {form: FORMS[form] for form in ("answer", "packed")}


# ------------------------------------------------------------------------------ loss


def loss_trials(settings: Settings, seed: int) -> list[Trial]:
    return [
        one_concept("loss", f"{name}/{form}", name, form, settings, seed)
        for name, form in product(settings.loss, FORMS)
    ]


def one_concept(
    phase: str, trial: str, name: str, form: Form, settings: Settings, seed: int,
    rate: float | None = None,
) -> Trial:  # fmt: skip
    """A concept learnt in one form."""
    it = concept(name, seed)
    lesson = Lesson(name, it.train, settings.steps, form)
    tests = {"trained": it.train, "held_out": it.held_out}
    return Trial(phase, trial, seed, [lesson], tests, rate, watched=["trained"])


def loss_table(outcomes: Outcomes, settings: Settings) -> Table:
    groups, rows = by_name(outcomes), []
    for name, (form, label) in product(settings.loss, FORMS.items()):
        group = groups[f"{name}/{form}"]
        rows.append([
            name, label, asked(group, "trained"), percent(group, "trained", 0),
            percent(group, "trained"), known_after(group, "trained"),
            asked(group, "held_out"), percent(group, "held_out"),
        ])  # fmt: skip
    headings = ["concept", "loss on", "n", "before", "trained", "steps until all right",
                "n", "held out"]  # fmt: skip
    return table_of(f"Where the loss is, {settings.steps:,} steps each", headings, rows)


def draw_loss(outcomes: Outcomes, settings: Settings, path: Path) -> None:
    groups = by_name(outcomes)

    def picture() -> Figure:
        figure, axes = panels(len(settings.loss))
        for name, panel in zip(settings.loss, axes, strict=True):
            for number, (form, label) in enumerate(FORMS.items()):
                line(panel, curve_points(groups[f"{name}/{form}"], "trained"), number, label)
            panel.set_title(name.replace("_", " "), loc="left", fontsize=11)
            panel.set_xlabel("steps")
        figure.suptitle("Trained items right, by where the loss is (band: all seeds)", fontsize=11)
        legend_below(figure, axes[0], 3)
        return figure

    in_style(picture, path)


# ------------------------------------------------------------------------------ rates


def rates_trials(settings: Settings, seed: int) -> list[Trial]:
    part = settings.rates
    return [
        one_concept("rates", f"{name}/{form}/{rate:g}", name, form, settings, seed, rate)
        for name, form, rate in product(part.concepts, EXTREMES, part.values)
    ]


def rates_table(outcomes: Outcomes, settings: Settings) -> Table:
    groups, values = by_name(outcomes), settings.rates.values
    rows = [
        [name, label, *(percent(groups[f"{name}/{form}/{rate:g}"], "trained") for rate in values)]
        for name, (form, label) in product(settings.rates.concepts, EXTREMES.items())
    ]
    title = f"Trained items right after {settings.steps:,} steps, by learning rate"
    return table_of(title, ["concept", "loss", *(f"{rate:g}" for rate in values)], rows)


def draw_rates(outcomes: Outcomes, settings: Settings, path: Path) -> None:
    groups, part = by_name(outcomes), settings.rates

    def picture() -> Figure:
        figure, axes = panels(len(part.concepts))
        for name, panel in zip(part.concepts, axes, strict=True):
            for number, (form, label) in enumerate(EXTREMES.items()):
                points = [
                    (rate, shares(groups[f"{name}/{form}/{rate:g}"], "trained"))
                    for rate in part.values
                ]
                line(panel, points, number, label)
            panel.set_xscale("log")
            panel.set_xticks(part.values, [f"{rate:g}" for rate in part.values])
            panel.minorticks_off()
            panel.set_title(name.replace("_", " "), loc="left", fontsize=11)
            panel.set_xlabel("learning rate")
        steps = f"after {settings.steps:,} steps"
        figure.suptitle(f"Trained items right {steps}, by learning rate", fontsize=11)
        legend_below(figure, axes[0], 3)
        return figure

    in_style(picture, path)


# ------------------------------------------------------------------------------ chains


def chains_trials(settings: Settings, seed: int) -> list[Trial]:
    """Every chain, and its second concept alone, from the checkpoint."""
    found = []
    for first, second in settings.chains:
        concepts = [concept(name, seed) for name in (first, second)]
        lessons = [Lesson(it.name, it.train, settings.steps) for it in concepts]
        tests = {it.name: it.train for it in concepts}
        name = f"{first} > {second}"
        found += [
            Trial("chains", name, seed, lessons, tests, watched=list(tests)),
            Trial("chains", f"{name}/alone", seed, lessons[1:], tests, watched=[second]),
        ]
    return found


def chains_table(outcomes: Outcomes, settings: Settings) -> Table:
    groups, rows = by_name(outcomes), []
    for first, second in settings.chains:
        chained, alone = (groups[f"{first} > {second}{end}"] for end in ("", "/alone"))
        rows.append([
            f"{first} > {second}", percent(chained, first, 1), percent(chained, first),
            percent(chained, second), percent(alone, second),
            known_after(chained, second, settings.steps), known_after(alone, second),
        ])  # fmt: skip
    headings = ["A > B", "A, after A", "A, after B", "B after A", "B alone", "B after A: steps",
                "B alone: steps"]  # fmt: skip
    title = f"One concept after another, {settings.steps:,} steps each; steps until B was all right"
    return table_of(title, headings, rows)


def draw_chains(outcomes: Outcomes, settings: Settings, path: Path) -> None:
    groups, steps = by_name(outcomes), settings.steps

    def picture() -> Figure:
        figure, axes = panels(len(settings.chains))
        for pair, panel in zip(settings.chains, axes, strict=True):
            first, second = pair
            chained, alone = (groups[f"{first} > {second}{end}"] for end in ("", "/alone"))
            line(panel, curve_points(chained, first), 0, "A")
            line(panel, curve_points(chained, second), 1, "B, after A")
            moved = [(steps + x, values) for x, values in curve_points(alone, second)]
            line(panel, moved, 2, "B alone, from the checkpoint")
            chain_ends(panel, [f"A: {first}", f"B: {second}"], [steps, steps])
            panel.set_xlabel("steps")
        legend_below(figure, axes[0], 3)
        return figure

    in_style(picture, path)


# ------------------------------------------------------------------------------ multi


def multi_trials(settings: Settings, seed: int) -> list[Trial]:
    concepts = [concept(name, seed) for name in settings.multi.concepts]
    items = [item for it in concepts for item in it.train]
    tests = {f"{it.name}, {test}": items for it in concepts for test, items in it.tests().items()}
    lesson = Lesson("all", items, settings.multi.steps)
    return [Trial("multi", "all", seed, [lesson], tests)]


def multi_table(outcomes: Outcomes, settings: Settings) -> Table:
    rows = [
        [
            name,
            *(asked(outcomes, f"{name}, {test}") for test in ("trained", "held_out")),
            *(percent(outcomes, f"{name}, {test}") for test in ("trained", "held_out")),
        ]
        for name in settings.multi.concepts
    ]
    title = f"All concepts at once, {settings.multi.steps:,} steps"
    return table_of(title, ["concept", "n trained", "held out", "trained", "held out"], rows)


def draw_multi(outcomes: Outcomes, settings: Settings, path: Path) -> None:
    rows = [
        (
            name.replace("_", " "),
            [shares(outcomes, f"{name}, {t}") for t in ("trained", "held_out")],
        )
        for name in settings.multi.concepts
    ]
    title = "All concepts learnt at once"
    in_style(lambda: dots_picture(title, rows, ["trained items", "held-out items"]), path)


PHASES = [
    Phase("loss", loss_trials, loss_table, draw_loss),
    Phase("rates", rates_trials, rates_table, draw_rates),
    Phase("chains", chains_trials, chains_table, draw_chains),
    Phase("multi", multi_trials, multi_table, draw_multi),
]
EXPERIMENT = Experiment("concepts_v2", PHASES)
main = main_of(EXPERIMENT, __doc__)

if __name__ == "__main__":
    run(main)
