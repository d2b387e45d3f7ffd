"""The tables of docs/RESULTS.md and README.md about a run, in Markdown, from the run's own files.

    python benchmarks/run_tables.py                    # docs/runs/small
    python benchmarks/run_tables.py FOLDER

FOLDER holds what docs/runs/small/README.md lists: evaluation.json, kneser_ney.json,
kneser_ney_200k.json, trained_prompts.json, preferences.json and ood_*.json. A test compares both
pages with what stands in these files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hamner.errors import UserError, run

RUN = Path(__file__).resolve().parent.parent / "docs/runs/small"
STAGES = {"base": "base", "anneal": "anneal", "chat": "chat", "sft": "SFT", "dpo": "DPO"}
SOURCES = {  # of evaluation.json; conversations by the assistant's words
    "edu": "edu: Wikipedia, textbooks",
    "general": "general: old books, web pages",
    "code": "code",
    "math": "math",
    "instruct": "instruct: the assistant's words",
    "dialog": "dialog: the assistant's words",
    "al": "Al's words",
}
PROMPTS = {  # of trained_prompts.json
    "greetings": "greetings",
    "identity": "identity",
    "math: products": "the times table",
    "math: other": "other sums",
}
PAIRS = {  # of preferences.json
    "hh-rlhf harmless-base (test split)": "hh-rlhf, harmless",
    "alpaca_eval": "AlpacaEval",
    "auto-j pairwise (human)": "auto-j, people's choice",
    "LLMs-from-scratch (tone)": "tone of voice",
    "counsel-chat (upvotes)": "counsel-chat",
    "LLaMA-Factory dpo_en_demo": "LLaMA-Factory",
    "all": "all that fit 512 tokens",
}
Report = dict[str, Any]


def read(folder: Path, name: str) -> Report:
    """A JSON file of the run.

    Raises:
        UserError: it isn't there, or isn't JSON.
    """
    path = folder / name
    try:
        found: Report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({error}); docs/runs/small/README.md has the "
                        "commands that write a run's files") from None  # fmt: skip
    return found


def markdown(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; the first row is its headings."""
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]
    return [lines[0], "|" + "---|" * (lines[0].count("|") - 1), *lines[1:]]


def share(percent: float) -> str:
    """With one digit; a whole 100 without."""
    return "100" if percent == 100 else f"{percent:.1f}"


# ------------------------------------------------------------------------------- what a run gave


def by_stage(folder: Path) -> dict[str, Report]:
    return {model["stage"]: model for model in read(folder, "evaluation.json")["models"]}


def bits_per_byte(model: Report, source: str) -> float:
    """Of all text of a source, or of the assistant's words in conversations."""
    text = model["text"][source]
    return float(text.get("assistant", text)["bits_per_byte"])


def minimal_pairs(model: Report) -> float:
    """Percent of the pairs that are right."""
    return 100 * float(model["benchmarks"]["groups"]["minimal_pairs"]["acc,none"])


def sampled_answers(folder: Path) -> dict[str, Report]:
    """By stage and category, what was right at the recipe's temperature."""
    runs = read(folder, "trained_prompts.json")["runs"]
    return {run["stage"]: run["categories"] for run in runs if run["sampling"]["temperature"] > 0}


# ------------------------------------------------------------------------------- tables


def text_table(folder: Path) -> list[str]:
    models = by_stage(folder)
    rows = [["source", *(STAGES[stage] for stage in models)]]
    for source, label in SOURCES.items():
        rows.append([label, *(f"{bits_per_byte(m, source):.3f}" for m in models.values())])
    rows.append(["minimal pairs, %", *(f"{minimal_pairs(m):.1f}" for m in models.values())])
    return markdown(rows)


def answers_table(folder: Path) -> list[str]:
    found = sampled_answers(folder)
    rows = [["right, %", "questions", *(STAGES[stage] for stage in found)]]
    for name, label in PROMPTS.items():
        questions = next(iter(found.values()))[name]["questions"]
        percents = (each[name]["right"]["percent"] for each in found.values())
        rows.append([label, str(questions), *map(share, percents)])
    return markdown(rows)


def preferences_table(folder: Path) -> list[str]:
    kinds = read(folder, "preferences.json")["kinds"]
    rows = [["agree, %", "pairs", "DPO", "the longer"]]
    for name, label in PAIRS.items():
        kind = kinds[name]
        rows.append([label, str(kind["pairs"]), share(kind["reward"]), share(kind["longer"])])
    return markdown(rows)


def short_table(folder: Path) -> list[str]:
    """README.md's: one line a stage."""
    answers = sampled_answers(folder)
    rows = [[
        "after", "bits per byte of Wikipedia and textbooks", "of code", "minimal pairs",
        "Al's greetings, identity, times table",
    ]]  # fmt: skip
    for stage, model in by_stage(folder).items():
        bits = [f"{bits_per_byte(model, source):.3f}" for source in ("edu", "code")]
        names = list(PROMPTS)[:3] if stage in answers else []
        right = ", ".join(share(answers[stage][name]["right"]["percent"]) for name in names)
        pairs = f"{minimal_pairs(model):.0f} %"
        rows.append([STAGES[stage], *bits, pairs, f"{right} %" if right else ""])
    return markdown(rows)


# ------------------------------------------------------------------------------- single figures


def kneser_ney_lines(folder: Path, name: str) -> list[str]:
    """The base model beside the n-gram model, of each source and of all."""
    report = read(folder, name)
    lines = []
    for source, text in report["text"].items():
        peer, own, below = text[str(report["order"])], text["model"], text["below"]
        lines.append(
            f"{source}: Kneser-Ney {peer['bits_per_byte']:.3f}, base {own['bits_per_byte']:.3f}, "
            f"{below['percent']:.1f} % below it (standard error {below['standard_error']:.1f}), "
            f"{own['bytes'] / 1e6:.1f} MB"
        )
    return lines


def unseen_lines(folder: Path) -> list[str]:
    """Prompts that no training data hold, by kind."""
    lines = []
    for stage in ("sft", "dpo"):
        prompts = read(folder, f"ood_{stage}.json")["prompts"]
        parts = []
        for kind in ("paraphrase", "unseen"):
            scores = [prompt["score"] for prompt in prompts if prompt["kind"] == kind]
            parts.append(f"{kind} {100 * sum(scores) / len(scores):.0f} % of {len(scores)}")
        right = 100 * sum(prompt["score"] for prompt in prompts) / len(prompts)
        lines.append(f"{STAGES[stage]}: {', '.join(parts)}, all {right:.0f} % of {len(prompts)}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=RUN)
    folder = parser.parse_args().folder
    for table in (text_table, answers_table, preferences_table, short_table):
        print("\n".join(table(folder)), end="\n\n")
    for name in ("kneser_ney.json", "kneser_ney_200k.json"):
        print(name, *kneser_ney_lines(folder, name), sep="\n", end="\n\n")
    print("never trained", *unseen_lines(folder), sep="\n")
    return 0


if __name__ == "__main__":
    run(main)
