"""How the model answers what it was never trained on: some 160 prompts, each with a scorer.

    python test_ood.py --recipe tiny                    the best checkpoint there is
    python test_ood.py --recipe tiny --temp 0 --quiet   the likeliest answers, the table alone
    python test_ood.py --recipe tiny --say "No."        what one answer to everything would get

The prompts stand in ood/prompts.yaml. About half say something trained in other words, the others
are of a kind that was never trained; the two are scored apart. Prompts that the training data hold
are named and left out. How an answer is judged is written in ood_scoring.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hamner.conversation import HIGHEST_TEMPERATURE, Speaker, open_speaker, printable, prompt_of
from hamner.errors import UserError, run
from hamner.files import write_report
from hamner.generation import Sampling, generate_ids
from hamner.recipe import load_recipe
from hamner.sources import read_file, said
from hamner.tokenization import Message
from ood_scoring import (
    CATEGORIES,
    PROMPTS,
    Answer,
    Prompt,
    Row,
    folded,
    numbers,
    read_prompts,
    triples,
)

KINDS = ("paraphrase", "unseen")
TOO_NEAR = 0.5  # share of an unseen prompt's word triples that one trained turn may not reach
A_SUM = 40  # words: longer turns with two numbers in them are no sums
Z = 1.96  # standard deviations, for 95 %

# --------------------------------------------------------------------------------- training data


@dataclass
class Trained:
    """What users say in training data, as far as some prompts are concerned."""

    count: int  # of turns that differ
    turns: set[Row]  # those that are questions of the prompts, or what these say in other words
    pairs: set[tuple[float, ...]]  # neighbours in the prompts' sums that are a turn's two numbers
    nearest: dict[str, tuple[float, str]]  # see `trained_on`; by question

    def holds(self, text: str) -> bool:
        return folded(text) in self.turns


def trained_on(turns: Iterable[str], prompts: Sequence[Prompt]) -> Trained:
    """What is to be known of trained turns, to check the prompts against them.

    `nearest` gives for a question the trained turn that holds most of its word triples, and the
    share of them that it holds.
    """
    texts = {folded(t) for prompt in prompts for t in (*prompt.questions, *prompt.paraphrase_of)}
    sums = {pair for prompt in prompts for pair in prompt.pairs}
    sizes = {q: len(triples(folded(q))) for prompt in prompts for q in prompt.questions}
    holders: dict[Row, list[str]] = {}
    for question in sizes:
        for triple in triples(folded(question)):
            holders.setdefault(triple, []).append(question)
    seen: set[int] = set()  # hashes: there may be a million turns
    trained = Trained(0, set(), set(), {})
    for turn in turns:
        row = folded(turn)
        if hash(row) in seen:
            continue
        seen.add(hash(row))
        if row in texts:
            trained.turns.add(row)
        if len(row) <= A_SUM and (pair := tuple(sorted(numbers(turn)))) in sums:
            trained.pairs.add(pair)
        for question, count in Counter(_holders(row, holders)).items():
            near = (count / sizes[question], turn)
            trained.nearest[question] = max(near, trained.nearest.get(question, near))
    trained.count = len(seen)
    return trained


def _holders(row: Row, holders: Mapping[Row, list[str]]) -> Iterator[str]:
    """The questions that each triple of a turn stands in."""
    for triple in triples(row):
        if triple in holders:
            yield from holders[triple]


def user_turns(path: Path) -> Iterator[str]:
    """What users say in a file of conversations, in whatever column these stand.

    Raises:
        UserError: the file can't be read, or nobody says anything in it.
    """
    found = False
    for _, row in read_file(path):
        for conversation in row.values():
            for role, text in map(said, conversation if isinstance(conversation, list) else ()):
                if role == "user":
                    found = True
                    yield text
    if not found:
        raise UserError(f"{path} holds no user's turn: give what prepare_sft_data.py wrote")


def kind_of(prompt: Prompt, trained: Trained | None) -> str:
    """`paraphrase` only if something that the prompt says in other words was trained."""
    if not prompt.paraphrase_of:
        return "unseen"
    known = trained is None or any(map(trained.holds, prompt.paraphrase_of))
    return "paraphrase" if known else "unseen"


def contamination(prompt: Prompt, trained: Trained) -> str:
    """Why a prompt is not out of distribution; "" if it is."""
    for question in prompt.questions:
        if trained.holds(question):
            return f"{question!r} is trained"
        share, turn = trained.nearest.get(question, (0.0, ""))
        if not prompt.paraphrase_of and share >= TOO_NEAR:
            return f"{question!r} is too near to {turn!r}"
    if not prompt.paraphrase_of and (pairs := prompt.pairs & trained.pairs):
        a, b = min(pairs)
        return f"{prompt.sum}: {a:g} and {b:g} are trained together"
    return ""


@dataclass
class Checked:
    """Prompts to ask, with their kinds, and why others are left out."""

    kept: list[tuple[Prompt, str]]
    left_out: list[str]
    about: str


def checked(prompts: Sequence[Prompt], files: Sequence[Path]) -> Checked:
    """Sort out the prompts that occur in files of training data.

    Raises:
        UserError: a file can't be read, or nothing is left.
    """
    if not files:
        kept = [(prompt, kind_of(prompt, None)) for prompt in prompts]
        return Checked(kept, [], "not checked against training data: --check-data FILE does that")
    names = ", ".join(map(str, files))
    trained = trained_on(itertools.chain.from_iterable(map(user_turns, files)), prompts)
    reasons = [contamination(prompt, trained) for prompt in prompts]
    kept = [(p, kind_of(p, trained)) for p, why in zip(prompts, reasons, strict=True) if not why]
    if not kept:
        raise UserError(f"{names}: all {len(prompts)} prompts are trained there; write others")
    about = f"checked against {trained.count:,} distinct user turns of {names}"
    strange = sum(bool(prompt.paraphrase_of) and kind == "unseen" for prompt, kind in kept)
    if strange:
        about += f"\n{strange} paraphrases of what isn't trained there count as unseen"
    left_out = [f"{p.category}: {why}" for p, why in zip(prompts, reasons, strict=True) if why]
    return Checked(kept, left_out, about)


# ------------------------------------------------------------------------------- asking, counting


@dataclass
class Result:
    prompt: Prompt
    kind: str
    answers: list[Answer]

    @cached_property
    def faults(self) -> list[str]:
        """What is wrong with each answer; "" if it is right."""
        return [self.prompt.fault(answer) for answer in self.answers]

    @property
    def score(self) -> float:
        """The share of right answers."""
        return fmean(not fault for fault in self.faults)


def answer(speaker: Speaker, messages: Sequence[Message], sampling: Sampling) -> Answer:
    """What the model says next.

    Raises:
        UserError: the last message is longer than the context.
    """
    try:
        ids, _ = prompt_of(speaker, messages, sampling.max_new_tokens)
    except ValueError as error:
        raise UserError(f"{messages[-1]['content']!r:.60}: {error}") from None
    tokenizer = speaker.tokenizer
    room = speaker.model.config.max_position_embeddings - len(ids)
    stop = (tokenizer.im_end, tokenizer.end_of_text)
    new = list(generate_ids(speaker.model, ids, sampling, stop, tokenizer.control_ids))
    return Answer(tokenizer.decode(new).strip(), len(new) < min(room, sampling.max_new_tokens))


def seed_of(prompt: Prompt, seed: int, sample: int) -> int:
    """A seed for every prompt and sample, the same whichever other prompts are asked."""
    key = json.dumps([seed, sample, prompt.ask])
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big")


def answers(
    speaker: Speaker, prompt: Prompt, sampling: Sampling, system: str, samples: int
) -> list[Answer]:
    """So many sampled answers to a prompt; they follow from the sampling's seed."""
    messages = prompt.messages(system)
    seeds = [seed_of(prompt, sampling.seed or 0, sample) for sample in range(samples)]
    return [answer(speaker, messages, dataclasses.replace(sampling, seed=seed)) for seed in seeds]


@dataclass
class Answerer:
    """Who answers: a model, or the same words whatever is asked."""

    title: str
    about: dict[str, Any]  # for the report
    answers: Callable[[Prompt], list[Answer]]


def model_answers(arguments: argparse.Namespace) -> Answerer:
    """The checkpoint that the arguments choose.

    Raises:
        UserError: there is none, or a sampling that can't be.
    """
    speaker = open_speaker(arguments.recipe, arguments.checkpoint, arguments.device or "auto")
    sampling = chosen_sampling(speaker, arguments)
    system = speaker.system if arguments.system is None else arguments.system
    samples = arguments.samples or 1
    about = {
        "checkpoint": str(speaker.path), "stage": speaker.stage, "step": speaker.step,
        "system": system, "sampling": dataclasses.asdict(sampling), "samples": samples,
    }  # fmt: skip

    def ask(prompt: Prompt) -> list[Answer]:
        return answers(speaker, prompt, sampling, system, samples)

    return Answerer(f"{speaker}\ntemperature {sampling.temperature:g}", about, ask)


def same_answers(text: str) -> Answerer:
    """A text as every answer; {question} in it stands for what was asked last."""

    def say(prompt: Prompt) -> list[Answer]:
        return [Answer(text.replace("{question}", prompt.ask[-1]).strip())]

    return Answerer(f"no model: {text!r} is the answer to everything", {"say": text}, say)


def interval(right: float, count: int) -> tuple[float, float]:
    """Where the true share lies, with 95 % confidence, if `right` of `count` are right.

    That is Wilson's interval, from "Probable inference, the law of succession" (1927).
    """
    share, spread = right / count, Z * Z / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


# ---------------------------------------------------------------------------------------- showing


def transcript(result: Result) -> str:
    """What was asked, what the model said, and whether that is right."""
    lines = list(zip(itertools.cycle(("user", "Al")), result.prompt.ask, strict=False))
    for reply, fault in zip(result.answers, result.faults, strict=True):
        lines.append(("answer", reply.text + " ..." * (not reply.ended)))
        lines.append(("WRONG", fault) if fault else ("right", ""))
    shown = [f"{who:>8}  {text}".rstrip().replace("\n", f"\n{'':10}") for who, text in lines]
    return printable("\n".join([f"{result.prompt.category}, {result.kind}", *shown]))


def _cells(results: Sequence[Result]) -> list[str]:
    """How many prompts, and the share of right answers."""
    if not results:
        return ["", ""]
    return [str(len(results)), f"{fmean(result.score for result in results):.0%}"]


def _row(name: str, results: Sequence[Result]) -> list[str]:
    kinds = [[result for result in results if result.kind == kind] for kind in KINDS]
    low, high = interval(sum(result.score for result in results), len(results))
    cells = [cell for group in (*kinds, results) for cell in _cells(group)]
    return [name, *cells, f"{100 * low:.0f} to {high:.0%}"]


def table(results: Sequence[Result]) -> Table:
    """Shares of right answers by category and kind; the last column holds where all of it lies."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("", "paraphrase", "right", "unseen", "right", "all", "right", "95 % sure"):
        made.add_column(head, justify="right" if head else "left", no_wrap=True)
    for category in CATEGORIES:
        if own := [result for result in results if result.prompt.category == category]:
            made.add_row(*_row(category, own))
    made.add_section()
    made.add_row(*_row("all", results))
    return made


def plain(result: Result) -> dict[str, Any]:
    """A result as plain data."""
    judged = zip(result.answers, result.faults, strict=True)
    return {
        "category": result.prompt.category,
        "kind": result.kind,
        "ask": list(result.prompt.ask),
        "score": result.score,
        "answers": [{"text": a.text, "ended": a.ended, "fault": fault} for a, fault in judged],
    }


def write_json(path: Path, about: dict[str, Any], results: Sequence[Result]) -> None:
    """Raises UserError if the file can't be written."""
    total = sum(result.score for result in results)
    scores = {"right": total / len(results), "interval": interval(total, len(results))}
    write_report(path, {**about, **scores, "prompts": [plain(result) for result in results]})


# ------------------------------------------------------------------------------------- the script


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", default="v4", help="name in recipes/, or path (default: v4)")
    add("--checkpoint", type=Path, metavar="FILE", help="ask this checkpoint")
    add("--device", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    add("--temp", type=float, help="temperature; 0 always takes the likeliest word")
    add("--system", metavar="TEXT", help="system prompt; '' for none")
    add(
        "--say", metavar="TEXT", help="score this as the answer to everything, without a model; "
        "{question} in it stands for what was asked",
    )  # fmt: skip
    add("--samples", type=int, metavar="N", help="answers to each prompt (default: 1)")
    add("--seed", type=int, help="the same seed gives the same answers (default: 0)")
    add("--category", action="append", choices=CATEGORIES, help="only this one; repeatable")
    add("--prompts", type=Path, default=PROMPTS, metavar="FILE", help="ask other prompts")
    add(
        "--check-data", nargs="*", type=Path, metavar="FILE",
        help="training data in which no prompt may occur (default: the recipe's, as "
        "prepare_sft_data.py wrote them, if they are there)",
    )  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write answers and scores into this file")
    add("--quiet", action="store_true", help="don't print what the model said")
    return parser.parse_args()


def chosen_prompts(arguments: argparse.Namespace) -> list[Prompt]:
    """Raises UserError if there are none of the wanted categories."""
    prompts = read_prompts(arguments.prompts)
    wanted = arguments.category or CATEGORIES
    chosen = [prompt for prompt in prompts if prompt.category in wanted]
    if not chosen:
        raise UserError(f"{arguments.prompts} holds no prompts of {' or '.join(wanted)}")
    return chosen


def training_files(arguments: argparse.Namespace) -> list[Path]:
    """The files to check the prompts against: those given, or the recipe's if it is there."""
    if arguments.check_data is None:
        path = Path(load_recipe(arguments.recipe).sft.data.folder) / "train.jsonl"
        return [path] if path.is_file() else []
    for path in arguments.check_data:
        if not path.is_file():
            raise UserError(f"--check-data {path}: no such file")
    return list(arguments.check_data)


def chosen_sampling(speaker: Speaker, arguments: argparse.Namespace) -> Sampling:
    """The checkpoint's, with what the arguments change."""
    sampling = dataclasses.replace(speaker.sampling, seed=arguments.seed or 0)
    if arguments.temp is not None:
        sampling = dataclasses.replace(sampling, temperature=arguments.temp)
    if (arguments.samples or 1) > 1 and sampling.temperature == 0:
        raise UserError("--samples: at temperature 0 all answers to a prompt are alike; ask for 1")
    return sampling


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises UserError for what would otherwise come out after minutes."""
    if arguments.temp is not None and not 0 <= arguments.temp <= HIGHEST_TEMPERATURE:
        raise UserError(f"--temp must be from 0 to {HIGHEST_TEMPERATURE}, got {arguments.temp:g}")
    if arguments.samples is not None and arguments.samples < 1:
        raise UserError(f"--samples must be at least 1, got {arguments.samples}")
    with_model = ("checkpoint", "device", "temp", "system", "samples", "seed")
    given = [f"--{name}" for name in with_model if getattr(arguments, name) is not None]
    if arguments.say is not None and given:
        raise UserError(f"--say asks no model: leave {' and '.join(given)} away")
    if arguments.json and (arguments.json.is_dir() or not arguments.json.name):
        raise UserError(f"--json {arguments.json}: is a folder; name a file")


def main() -> int:
    arguments = parse_arguments()
    check_arguments(arguments)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    prompts = checked(chosen_prompts(arguments), training_files(arguments))
    answerer = model_answers(arguments) if arguments.say is None else same_answers(arguments.say)
    console.print(f"{answerer.title}\n{prompts.about}")
    for line in prompts.left_out:
        print(f"left out, {printable(line)}", file=sys.stderr)
    started, results = time.perf_counter(), []
    for prompt, kind in prompts.kept:
        results.append(Result(prompt, kind, answerer.answers(prompt)))
        if not arguments.quiet:
            console.print(f"\n{transcript(results[-1])}")
    seconds = time.perf_counter() - started
    console.print(table(results))
    count = sum(len(result.answers) for result in results)
    console.print(f"{count} answers in {seconds:.1f} s")
    if arguments.json:
        write_json(arguments.json, {**answerer.about, "left_out": prompts.left_out}, results)
    return 0


if __name__ == "__main__":
    run(main)
