"""Concept experiments, third series: what of it generalises, and what of it lasts?

    python legacy/concept_experiments_v3.py                          on v4's base checkpoint, a GPU
    python legacy/concept_experiments_v3.py --recipe tiny --small    minutes on a CPU
    python legacy/concept_experiments_v3.py --checkpoint FILE --only forgetting

generalisation   held-out items, and trained ones asked the other way round (4 + 3 for 3 + 4)
composition      two skills in one task: learnt one after the other, together, with some of the
                 tasks, and the tasks alone
forgetting       concepts one after another, with a replay of those before and without
scaling          how many facts are learnt
curriculum       five skills one after another, with replay

An answer is right if it is word for word what it should be and then ends. Loss is on the answer
alone. No fact is both trained and held out; several seeds split and order them. Results go to
logs/RECIPE/concepts_v3*. Stopped anywhere, the same command goes on. The numbers stand in
legacy/concepts.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


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
    mean_and_spread,
    panels,
    percent,
    shares,
    table_of,
)
from legacy.concept_runs import Experiment, main_of
from legacy.concept_settings import Settings
from legacy.concept_training import Lesson, Trial
from legacy.concepts import COMPOSITIONS, Composition, Item, concept, constant_score

# ------------------------------------------------------------------------------ generalisation


def generalisation_trials(settings: Settings, seed: int) -> list[Trial]:
    found = []
    for name in settings.generalisation:
        it = concept(name, seed)
        lesson = Lesson(name, it.train, settings.steps)
        found.append(Trial("generalisation", name, seed, [lesson], it.tests()))
    return found


def generalisation_table(outcomes: Outcomes, settings: Settings) -> Table:
    rows = []
    for name, group in by_name(outcomes).items():
        constant = mean_and_spread([constant_percent(name, outcome.seed) for outcome in group])
        turned = "turned" in group[0].after[0]
        rows.append([
            name, asked(group, "trained"), asked(group, "held_out"), percent(group, "trained"),
            percent(group, "held_out", 0), percent(group, "held_out"), constant,
            percent(group, "turned") if turned else "-",
        ])  # fmt: skip
    headings = ["concept", "n trained", "held out", "trained", "held out, before",
                "held out", "one answer", "turned round"]  # fmt: skip
    title = f"Trained and held-out items after {settings.steps:,} steps"
    table = table_of(title, headings, rows)
    table.caption = f"{table.caption}; one answer: what the commonest one alone gets right"
    return table


def constant_percent(name: str, seed: int) -> float:
    it = concept(name, seed)
    return 100 * constant_score(it.train, it.held_out)


def draw_generalisation(outcomes: Outcomes, settings: Settings, path: Path) -> None:
    rows = [
        (name.replace("_", " "), [
            shares(group, test) if test in group[0].after[0] else None
            for test in ("trained", "held_out", "turned")
        ])
        for name, group in by_name(outcomes).items()
    ]  # fmt: skip
    labels = ["trained items", "held-out items", "trained, turned round"]
    title = "What is remembered, and what is understood"
    in_style(lambda: dots_picture(title, rows, labels), path)


# ------------------------------------------------------------------------------ composition


def composition_trials(settings: Settings, seed: int) -> list[Trial]:
    return [
        trial
        for name in settings.composition
        for trial in ways_to_compose(COMPOSITIONS[name](seed), settings.steps, seed)
    ]


def ways_to_compose(it: Composition, steps: int, seed: int) -> list[Trial]:
    """All read as many items: those of two lessons."""
    skills = [*it.first, *it.second]
    ways = {
        "one after the other": [
            Lesson("first", it.first, steps), Lesson("second", it.second, steps)
        ],
        "together": [Lesson("both", skills, 2 * steps)],
        "with tasks": [Lesson("all", [*skills, *it.tasks.train], 2 * steps)],
        "tasks alone": [Lesson("tasks", it.tasks.train, 2 * steps)],
    }  # fmt: skip
    tests: dict[str, list[Item]] = {
        "first": it.first, "second": it.second,
        "tasks": it.tasks.train, "held_out": it.tasks.held_out,
    }  # fmt: skip
    return [
        Trial("composition", f"{it.name}/{way}", seed, lessons, tests)
        for way, lessons in ways.items()
    ]


def composition_table(outcomes: Outcomes, settings: Settings) -> Table:
    tests = ("first", "second", "tasks", "held_out")
    groups = by_name(outcomes)
    sizes = [f"{name}: {', '.join(asked(groups[f'{name}/together'], test) for test in tests)}"
             for name in settings.composition]  # fmt: skip
    rows = [
        [*name.split("/"), *(percent(group, test) for test in tests)]
        for name, group in groups.items()
    ]
    headings = ["composition", "learnt", "skill 1", "skill 2", "tasks", "held-out tasks"]
    title = f"Two skills in one task, {2 * settings.steps:,} steps"
    table = table_of(title, headings, rows)
    table.caption = (
        f"{table.caption}; the tasks are trained in the ways that name them; items of each column: "
        + "; ".join(sizes)
    )
    return table


def draw_composition(outcomes: Outcomes, settings: Settings, path: Path) -> None:
    tests = ("first", "second", "tasks", "held_out")
    rows = [
        (name.replace("_", " ").replace("/", "\n"), [shares(group, test) for test in tests])
        for name, group in by_name(outcomes).items()
    ]
    labels = ["skill 1", "skill 2", "tasks", "held-out tasks"]
    in_style(lambda: dots_picture("Two skills in one task", rows, labels), path)


# ------------------------------------------------------------------------------ forgetting


def chain_trial(
    phase: str, name: str, names: list[str], share: float, settings: Settings, seed: int
) -> Trial:
    """Concepts one after another, with a share of each step's items from those before."""
    concepts = [concept(one, seed) for one in names]
    groups = [it.train for it in concepts]
    lessons = [
        Lesson(it.name, it.train, settings.steps, earlier=groups[:place], replay_share=share)
        for place, it in enumerate(concepts)
    ]
    tests = {it.name: it.train for it in concepts}
    return Trial(phase, name, seed, lessons, tests, watched=list(tests))


def way_of(share: float) -> str:
    return f"{100 * share:g} % replay" if share else "no replay"


def forgetting_trials(settings: Settings, seed: int) -> list[Trial]:
    return [
        chain_trial("forgetting", way_of(share), settings.forgetting, share, settings, seed)
        for share in dict.fromkeys((0.0, settings.replay_share))
    ]


def chain_table(title: str, outcomes: Outcomes, names: list[str]) -> Table:
    """What is known of every concept after each lesson."""
    groups = by_name(outcomes)
    rows = [
        [way, lesson.replace("_", " "), *(percent(group, name, number) for name in names)]
        for way, group in groups.items()
        for number, lesson in enumerate(["before", *(f"after {name}" for name in names)])
    ]
    sizes = [f"{name.replace('_', ' ')} (n {asked(outcomes, name)})" for name in names]
    return table_of(title, ["", "", *sizes], rows)


def draw_chain(title: str, outcomes: Outcomes, names: list[str], steps: int, path: Path) -> None:
    groups = by_name(outcomes)

    def picture() -> Figure:
        figure, axes = panels(len(groups))
        for (way, group), panel in zip(groups.items(), axes, strict=True):
            for number, name in enumerate(names):
                line(panel, curve_points(group, name), number, name.replace("_", " "))
            chain_ends(panel, names, [steps] * len(names))
            panel.set_xlabel(f"steps, {way}")
        figure.suptitle(f"{title} (band: all seeds)", fontsize=11)
        legend_below(figure, axes[0], len(names))
        return figure

    in_style(picture, path)


def forgetting_table(outcomes: Outcomes, settings: Settings) -> Table:
    title = f"Concepts one after another, {settings.steps:,} steps each"
    return chain_table(title, outcomes, settings.forgetting)


def draw_forgetting(outcomes: Outcomes, settings: Settings, path: Path) -> None:
    title = "Trained items right, one concept after another"
    draw_chain(title, outcomes, settings.forgetting, settings.steps, path)


# ------------------------------------------------------------------------------ scaling


def scaling_steps(settings: Settings, facts: int) -> int:
    return max(settings.steps, settings.scaling.steps_per_fact * facts)


def scaling_trials(settings: Settings, seed: int) -> list[Trial]:
    """More and more of the same facts."""
    it, found = concept("capitals", seed), []
    for facts in settings.scaling.facts:
        items = it.train[:facts]
        lesson = Lesson("capitals", items, scaling_steps(settings, facts))
        tests = {"trained": items, "held_out": it.held_out}
        found.append(Trial("scaling", str(facts), seed, [lesson], tests, watched=["trained"]))
    return found


def scaling_table(outcomes: Outcomes, settings: Settings) -> Table:
    groups = by_name(outcomes)
    rows = [
        [
            str(facts), f"{scaling_steps(settings, facts):,}",
            percent(groups[str(facts)], "trained"), known_after(groups[str(facts)], "trained"),
            percent(groups[str(facts)], "held_out"),
        ]
        for facts in settings.scaling.facts
    ]  # fmt: skip
    held_out = asked(outcomes, "held_out")
    headings = ["facts", "steps", "trained", "steps until all right", f"held out (n {held_out})"]
    return table_of("How many facts are learnt", headings, rows)


def draw_scaling(outcomes: Outcomes, settings: Settings, path: Path) -> None:
    groups = by_name(outcomes)

    def picture() -> Figure:
        figure, axes = panels(1)
        for number, facts in enumerate(settings.scaling.facts):
            line(axes[0], curve_points(groups[str(facts)], "trained"), number, f"{facts} facts")
        axes[0].set_xlabel("steps")
        axes[0].set_title("Facts right (band: all seeds)", loc="left", fontsize=11)
        legend_below(figure, axes[0], len(settings.scaling.facts))
        return figure

    in_style(picture, path)


# ------------------------------------------------------------------------------ curriculum


def curriculum_trials(settings: Settings, seed: int) -> list[Trial]:
    part, share = settings.curriculum, settings.curriculum.replay_share
    return [chain_trial("curriculum", way_of(share), part.chain, share, settings, seed)]


def curriculum_table(outcomes: Outcomes, settings: Settings) -> Table:
    title = f"A curriculum, {settings.steps:,} steps a skill"
    return chain_table(title, outcomes, settings.curriculum.chain)


def draw_curriculum(outcomes: Outcomes, settings: Settings, path: Path) -> None:
    draw_chain("A curriculum: trained items right", outcomes, settings.curriculum.chain,
               settings.steps, path)  # fmt: skip


PHASES = [
    Phase("generalisation", generalisation_trials, generalisation_table, draw_generalisation),
    Phase("composition", composition_trials, composition_table, draw_composition),
    Phase("forgetting", forgetting_trials, forgetting_table, draw_forgetting),
    Phase("scaling", scaling_trials, scaling_table, draw_scaling),
    Phase("curriculum", curriculum_trials, curriculum_table, draw_curriculum),
]
EXPERIMENT = Experiment("concepts_v3", PHASES)
main = main_of(EXPERIMENT, __doc__)

if __name__ == "__main__":
    run(main)
