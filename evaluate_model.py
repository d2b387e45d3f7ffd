"""Measure checkpoints: bits per byte of held-out text, and the field's benchmarks.

python evaluate_model.py                                       the best checkpoint of v4
python evaluate_model.py --recipe tiny --tasks none            held-out text alone
python evaluate_model.py --checkpoint checkpoints/tiny/*/latest.pt    the stages side by side
python evaluate_model.py --task-folder my_tasks --json result.json    tasks of your own

Bits per byte don't depend on the tokenizer (how they are measured: hamner/evaluation/scoring.py).
The text is what the recipe's sources hold out from training, of each source the same for all
checkpoints.

The benchmarks are run by lm-evaluation-harness (`pip install lm_eval==0.4.13`): HellaSwag,
ARC-Easy, PIQA, LAMBADA, SciQ and BLiMP, or any others of its tasks. All is computed in fp32.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hamner import checkpoints
from hamner.checkpoints import Checkpoint, without_training_state
from hamner.conversation import load_best
from hamner.errors import UserError, first_line, nearest, run
from hamner.evaluation.scoring import TextScore, held_out_documents, score_documents
from hamner.files import write_report
from hamner.hub import Hub
from hamner.machine import pick_device
from hamner.recipe import STAGES, Recipe, apply_override, check_recipe, load_recipe
from hamner.sources import Document, open_stream, source_problems
from hamner.stage import stage_sources
from hamner.tokenization import Tokenizer
from hamner.tracking import now
from model import Transformer

if TYPE_CHECKING:  # the harness takes seconds to import, and needn't be installed
    from hamner.evaluation.lm_eval_tasks import Catalogue, Loaded, Results, Setting, TaskScore

PUBLISHED = Path(__file__).resolve().parent / "docs" / "published_scores.yaml"
PERCENT = ("acc", "exact_match")  # metrics that begin so are shares
WIDTH = 100  # columns, where the output is no terminal


@dataclass
class Subject:
    """A checkpoint that is measured, and what came out."""

    path: Path
    checkpoint: Checkpoint
    # By source: the score of all words, and of the assistant's.
    text: dict[str, tuple[TextScore, TextScore]] = field(default_factory=dict)
    results: Results | None = None  # the harness's

    def __str__(self) -> str:
        about = f"stage {self.checkpoint['stage']}, step {self.checkpoint['step']:,}"
        return f"{self.path} ({about}), {self.parameters:,} parameters"

    @property
    def parameters(self) -> int:
        return checkpoints.model_config(self.checkpoint).num_parameters()


# ------------------------------------------------------------------------------- what to measure


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", help="name in recipes/, or path (default: the checkpoint's own, or v4)")
    add("--checkpoint", type=Path, nargs="+", action="extend", default=[], metavar="FILE",
        help="checkpoints, a column each (default: the recipe's best one)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a field of the recipe, such as data_dir=FOLDER; repeatable")  # fmt: skip
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--batch-size", type=int, default=16, metavar="N", help="texts at once (default: 16)")
    add("--sources", metavar="A,B", help="only these of the recipe's sources")
    add("--bytes-per-source", type=int, default=100_000, metavar="N",
        help="so much held-out text of each (default: 100000)")  # fmt: skip
    add("--no-text", action="store_true", help="no bits per byte")
    add("--tasks", metavar="A,B", help="benchmarks by the harness's names, or none")
    add("--task-folder", type=Path, metavar="DIR", help="with the harness's YAML files of your own")
    add("--parts", action="store_true", help="show the parts of groups of tasks, too")
    add("--limit", type=int, metavar="N", help="only the first N questions of each task")
    add("--fewshot", type=int, metavar="N", help="N examples before each question")
    add("--chat", action="store_true", help="ask the questions as a user would, in a chat")
    add("--json", type=Path, metavar="FILE", help="write all of it there")
    return parser.parse_args()


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises UserError for what can't be meant, before anything is computed."""
    for name, least in (("batch_size", 1), ("bytes_per_source", 1), ("limit", 1), ("fewshot", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            option = name.replace("_", "-")
            raise UserError(f"--{option} must be {least} or more, got {value}")
    if arguments.no_text and arguments.tasks == "none":
        raise UserError("--no-text and --tasks none leave nothing to measure: drop one of them")
    folder = arguments.task_folder
    if folder is not None and arguments.tasks == "none":
        raise UserError("--task-folder and --tasks none don't go together: drop one of them")
    if arguments.sources is not None and arguments.no_text:
        raise UserError("--sources and --no-text don't go together: drop one of them")
    if folder is not None and not folder.is_dir():
        raise UserError(f"--task-folder {folder}: no such folder")
    if arguments.json is not None and arguments.json.is_dir():
        raise UserError(f"--json {arguments.json} is a folder: name a file")


def find_subjects(arguments: argparse.Namespace) -> tuple[Recipe, list[Subject]]:
    """The recipe whose sources are measured, and the checkpoints.

    Raises:
        UserError: no checkpoint, a damaged one, or one that was trained on what is to be measured.
    """
    given = [
        (path, without_training_state(checkpoints.load(path))) for path in arguments.checkpoint
    ]
    if arguments.recipe is not None or not given:
        name = arguments.recipe or "v4"
        recipe = load_recipe(name, arguments.overrides)
        given = given or [load_best(name)]
    else:
        recipe = recipe_of(*given[0], arguments.overrides)
    for path, checkpoint in given:
        check_held_out(path, checkpoint, recipe)
    return recipe, [Subject(path, checkpoint) for path, checkpoint in given]


def recipe_of(path: Path, checkpoint: Checkpoint, overrides: Sequence[str]) -> Recipe:
    """The recipe that a checkpoint was trained with, with changes laid over it."""
    raw = dict(checkpoint["recipe"])
    for override in overrides:
        apply_override(raw, override)
    return check_recipe(raw, f"the recipe in {path}")


def check_held_out(path: Path, checkpoint: Checkpoint, recipe: Recipe) -> None:
    """A hash of the text holds out what lies below the fraction: a smaller one lies in a larger."""
    fraction = checkpoint["recipe"]["held_out_fraction"]
    if fraction < recipe.held_out_fraction:
        raise UserError(
            f"{path} was trained with held_out_fraction {fraction:g}, and so on some of the text "
            f"that {recipe.held_out_fraction:g} would measure it on: add "
            f"--set held_out_fraction={fraction:g}"
        )


# ------------------------------------------------------------------------------- text


def chosen_sources(recipe: Recipe, chosen: str | None) -> list[str]:
    """The names of the sources that any stage reads, or of those that are asked for."""
    names = list(dict.fromkeys(name for stage in STAGES for name in stage_sources(recipe, stage)))
    if chosen is None:
        return names
    wanted = [name.strip() for name in chosen.split(",") if name.strip()]
    for name in wanted:
        if name not in recipe.sources:
            guess = nearest(name, recipe.sources)
            raise UserError(
                f"--sources: no source is called {name!r}{guess}; there are {', '.join(names)}"
            )
    return wanted


def read_sources(names: Sequence[str], recipe: Recipe, size: int) -> dict[str, list[Document]]:
    """Held-out documents of each source, so many bytes of it.

    Raises:
        UserError: sources that can't be read, all of them named.
    """
    if problems := source_problems(names, recipe):
        lines = [*problems, "to measure the others, name them with --sources"]
        raise UserError("\n       ".join(lines))
    found = {}
    for name in names:
        stream = open_stream(name, recipe, held_out=True)
        if isinstance(stream.source, Hub):
            stream.source.hurry()
        found[name] = held_out_documents(stream, size)
        if not found[name]:
            print(f"source {name!r}: no document of it is held out", flush=True)
    return found


def measure_text(
    subject: Subject,
    model: Transformer,
    tokenizer: Tokenizer,
    documents: dict[str, list[Document]],
    batch_size: int,
) -> None:
    for name, texts in documents.items():
        try:
            scores = score_documents(model, tokenizer, texts, batch_size, sys.stderr, name)
        except UserError as error:
            raise UserError(f"source {name!r}: {error}") from None
        if scores[0]:
            subject.text[name] = scores


# ------------------------------------------------------------------------------- benchmarks


def find_tasks(arguments: argparse.Namespace, recipe: Recipe) -> Loaded | None:
    """The benchmarks, loaded; None if there are to be none, or can be none.

    Those that are asked for by name must be there. Of the usual ones that can't be had (without a
    network, say), a line tells how to get them.

    Raises:
        UserError: a task that is asked for doesn't exist or can't be loaded.
    """
    if arguments.tasks == "none":
        return None
    asked = arguments.tasks is not None or arguments.task_folder is not None
    try:
        from hamner.evaluation import lm_eval_tasks
    except ImportError as error:
        problem = f"benchmarks need lm-evaluation-harness ({error}): pip install lm_eval==0.4.13"
        if asked:
            raise UserError(problem) from None
        print(f"{problem}, or leave them out with --tasks none", flush=True)
        return None
    catalogue = lm_eval_tasks.Catalogue(arguments.task_folder)
    names = task_names(arguments, catalogue) or list(lm_eval_tasks.DEFAULT_TASKS)
    loaded = lm_eval_tasks.load_tasks(catalogue, names, recipe.mirror)
    if loaded.problems and asked:
        lines = [f"task {name!r} can't be loaded: {why}" for name, why in loaded.problems.items()]
        raise UserError("\n       ".join(lines))
    if loaded.problems:
        print(not_run(loaded.problems, catalogue), flush=True)
    return loaded


def task_names(arguments: argparse.Namespace, catalogue: Catalogue) -> list[str]:
    """The tasks that are asked for: by name, or all of a folder; none for the usual ones."""
    if arguments.tasks is None:
        return catalogue.own_tasks()
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks is empty: name some, such as hellaswag,piqa, or none")
    return list(dict.fromkeys(names))


def not_run(problems: dict[str, str], catalogue: Catalogue) -> str:
    """One sentence about the usual tasks that can't be had here."""
    reasons: dict[str, list[str]] = {}
    for name, why in problems.items():
        reasons.setdefault(why, []).append(name)
    told = ", ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
    path = next(iter(catalogue.data_sets(next(iter(problems)))))
    return (
        f"not run: {told}; run them once with a network, or fill a folder "
        f"with `hf download {path} --repo-type dataset --local-dir DIR/{path}` and so on and say "
        "--set mirror=DIR, or give tasks of your own with --task-folder"
    )


def measure_tasks(
    subject: Subject,
    model: Transformer,
    tokenizer: Tokenizer,
    loaded: Loaded,
    setting: Setting,
    batch_size: int,
) -> None:
    from hamner.evaluation.lm_eval_model import HamnerLM
    from hamner.evaluation.lm_eval_tasks import run_tasks

    lm = HamnerLM(model, tokenizer, batch_size, sys.stderr)
    try:
        subject.results = run_tasks(lm, loaded, setting)
    except UserError:
        raise
    except Exception as error:  # what a task's own templates and functions raise
        raise UserError(
            f"the harness failed: {type(error).__name__}: {first_line(error)}"
        ) from error


# ------------------------------------------------------------------------------- tables


def labels(subjects: Sequence[Subject]) -> list[str]:
    """A short name for each checkpoint: its stage, with its number where that isn't enough."""
    stages = [subject.checkpoint["stage"] for subject in subjects]
    if len(set(stages)) == len(stages):
        return stages
    return [f"{number} {stage}" for number, stage in enumerate(stages, start=1)]


def empty_table(title: str, headings: Sequence[str], columns: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for heading in headings:
        table.add_column(heading)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def text_table(subjects: Sequence[Subject]) -> Table:
    """Bits per byte; of a single checkpoint also their error, and how they come about."""
    alone = len(subjects) == 1
    details = ["nats/token", "perplexity", "tokens"] if alone else []
    columns = ["documents", "bytes", *(["bits/byte"] if alone else labels(subjects)), *details]
    table = empty_table("Held-out text, bits per byte", ["source"], columns)
    for name in dict.fromkeys(name for subject in subjects for name in subject.text):
        for part, label in enumerate((name, "  answers")):
            scores = [subject.text[name][part] for subject in subjects]
            if scores[0]:
                table.add_row(label, *text_row(scores, alone))
    return table


def text_row(scores: Sequence[TextScore], alone: bool) -> Iterator[str]:
    yield f"{len(scores[0].bytes):,}"
    yield f"{sum(scores[0].bytes):,}"
    for score in scores:
        error = score.standard_error if alone else None
        yield f"{score.bits_per_byte:.3f}" + plus_minus(error, ".3f")
    if alone:
        yield f"{scores[0].nats_per_token:.3f}"
        yield f"{scores[0].perplexity:,.2f}"
        yield f"{scores[0].tokens:,}"


def plus_minus(error: float | None, form: str) -> str:
    return "" if error is None else f" ±{error:{form}}"


def published() -> list[dict[str, Any]]:
    return yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))


def published_score(model: dict[str, Any], score: TaskScore) -> dict[str, Any] | None:
    """A model's figure for the same task and metric, asked in the same way: without examples."""
    same = [
        each
        for each in model["scores"]
        if (each["task"], each["metric"]) == (score.task, score.metric) and score.shots == 0
    ]
    return same[0] if same else None


def tasks_table(subjects: Sequence[Subject], loaded: Loaded, parts: bool = False) -> Table:
    from hamner.evaluation.lm_eval_tasks import task_scores

    scores = [task_scores(subject.results or {}, loaded.names, parts) for subject in subjects]
    models = [m for m in published() if any(published_score(m, each) for each in scores[0])]
    columns = [*labels(subjects), *(model["model"] for model in models)]
    table = empty_table("Benchmarks", ["task", "metric"], columns)
    for row in zip(*scores, strict=True):
        theirs = [published_cell(published_score(model, row[0])) for model in models]
        ours = row if len(row) == 1 else [replace(score, error=None) for score in row]
        table.add_row(row[0].task, row[0].metric, *map(task_cell, ours), *theirs)
    return table


def task_cell(score: TaskScore) -> str:
    if score.metric.startswith(PERCENT):
        error = None if score.error is None else 100 * score.error
        return f"{100 * score.value:.1f}" + plus_minus(error, ".1f")
    return number(score.value) + ("" if score.error is None else f" ±{number(score.error)}")


def number(value: float) -> str:
    """Three digits, or as many as there are before the point, up to a million."""
    return f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def published_cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "-"
    return f"{figure['value']:.1f}" + ("" if figure["harness"] == "lm-eval" else " *")


def notes(arguments: argparse.Namespace, table: Table) -> Iterator[str]:
    """What has to be known to read the table of benchmarks."""
    yield "acc and exact_match in percent, ± standard error; acc_norm weighs answers by length"
    names = [str(column.header) for column in table.columns]
    figures = [each for m in published() if m["model"] in names for each in m["scores"]]
    if figures:
        yield f"figures of others: as published, without examples; sources in docs/{PUBLISHED.name}"
    if any(each["harness"] != "lm-eval" for each in figures):
        yield "* by another harness, with prompts and rules of its own: near, not the same"
    if arguments.limit is not None:
        yield f"here only the first {arguments.limit:,} questions of each task (of each part)"
    if arguments.chat:
        yield "here asked in the chat template, unlike the figures of others"


def show(arguments: argparse.Namespace, subjects: Sequence[Subject], loaded: Loaded | None) -> None:
    width = None if sys.stdout.isatty() else WIDTH
    console = Console(markup=False, highlight=False, width=width)
    if any(subject.text for subject in subjects):
        console.print(text_table(subjects))
    if loaded is not None and loaded.tasks:
        table = tasks_table(subjects, loaded, arguments.parts)
        console.print(table)
        for note in notes(arguments, table):
            console.print(note)


# ------------------------------------------------------------------------------- JSON


def text_as_json(score: TextScore) -> dict[str, Any]:
    return {
        "bits_per_byte": score.bits_per_byte,
        "standard_error": score.standard_error,
        "nats_per_token": score.nats_per_token,
        "perplexity": score.perplexity,
        "tokens": score.tokens,
        "bytes": sum(score.bytes),
        "documents": len(score.bytes),
    }


def subject_as_json(subject: Subject, tokenizer: Tokenizer) -> dict[str, Any]:
    checkpoint = subject.checkpoint
    text = {
        name: {**text_as_json(words), **({"assistant": text_as_json(said)} if said else {})}
        for name, (words, said) in subject.text.items()
    }
    return {
        "checkpoint": str(subject.path),
        "stage": checkpoint["stage"],
        "step": checkpoint["step"],
        "recipe": checkpoint["recipe"]["name"],
        "parameters": subject.parameters,
        "vocabulary": tokenizer.vocab_size,
        "context": checkpoints.model_config(checkpoint).max_position_embeddings,
        "text": text,
        "benchmarks": subject.results,
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "tokenizers", "lm_eval", "datasets"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


# ------------------------------------------------------------------------------- all of it


def measure(
    subject: Subject,
    arguments: argparse.Namespace,
    documents: dict[str, list[Document]],
    loaded: Loaded | None,
    device: torch.device,
) -> dict[str, Any]:
    """Measure a checkpoint; what there is to know of it, as JSON has it."""
    print(f"{subject} on {device}", flush=True)
    tokenizer = checkpoints.load_tokenizer(subject.checkpoint)
    model = checkpoints.load_model(subject.checkpoint, subject.path).to(device).eval()
    measure_text(subject, model, tokenizer, documents, arguments.batch_size)
    if loaded is not None and loaded.tasks:
        from hamner.evaluation.lm_eval_tasks import Setting

        setting = Setting(arguments.fewshot, arguments.limit, arguments.chat)
        measure_tasks(subject, model, tokenizer, loaded, setting, arguments.batch_size)
    return subject_as_json(subject, tokenizer)


def main() -> int:
    arguments = parse_arguments()
    check_arguments(arguments)
    began = time.perf_counter()
    device = pick_device(arguments.device)
    recipe, subjects = find_subjects(arguments)
    names = [] if arguments.no_text else chosen_sources(recipe, arguments.sources)
    loaded = find_tasks(arguments, recipe)
    documents = read_sources(names, recipe, arguments.bytes_per_source)
    models = [measure(each, arguments, documents, loaded, device) for each in subjects]
    show(arguments, subjects, loaded)
    if arguments.json is not None:
        report = {"time": now(), "seconds": round(time.perf_counter() - began, 3)}
        report |= {"recipe": recipe.name, "device": str(device), "versions": versions()}
        report |= {"options": vars(arguments), "models": models, "published": published()}
        report |= {"not_run": loaded.problems if loaded is not None else {}}
        write_report(arguments.json, report)
        print(f"written to {arguments.json}")
    return 0


if __name__ == "__main__":
    run(main)
