"""How many of the questions that a model was fine-tuned on does it answer as it was taught?

    python benchmarks/trained_prompts.py --recipe tiny                  # the likeliest answers
    python benchmarks/trained_prompts.py --recipe tiny --temp 0 0.7 --samples 3 --json asked.json
    python benchmarks/trained_prompts.py --recipe tiny --after 4        # as fifth questions
    python benchmarks/trained_prompts.py --recipe tiny --checkpoint \\
        checkpoints/tiny/sft/best.pt checkpoints/tiny/dpo/best.pt

Asks what the conversations of the prepared training file begin with, each question once, and
counts by category. With --after N each is asked as a later question: N others, drawn, with the
answers that training gives to them, stand before it. Above temperature 0 the rest of the sampling
is the recipe's own, and each question is asked --samples times. An answer that doesn't end is
wrong; it has the recipe's max_new_tokens, or as many as what is wanted needs, where that is more.
Of the others there are:

- word for word: it is one of the answers that training gives to this very question;
- right: that, or, of a sum, its last number is the last number of such an answer;
- category's: it is one of the category's answers, which training gives to this or another question
  of the same category. One greeting may do where another was given; sums aren't counted so.

"95 % sure" is Wilson's interval of "right", in percent, for questions like these; the samples of a
question count as one. --json also writes the other intervals, and every answer that isn't word for
word.

The prepared file names no categories: a conversation has the one of its copy in the recipe's local
sources, or else the label of its source. Where several questions were chained into a conversation,
its category is the last one's; the first has that of the single questions with the same answer, if
there are any. Products, the times table, are what is answered "a x b is c" (or "a times b is c").
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import add_json_option, add_recipe_options, narrow_table, positive, read_recipe
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from hamner.conversation import HIGHEST_TEMPERATURE, Speaker, open_speaker
from hamner.errors import UserError, run
from hamner.files import write_report
from hamner.generation import Sampling, generate_batch
from hamner.recipe import FileSource, Recipe
from hamner.sources import open_source, read_file, said
from hamner.tokenization import Message
from prepare_sft_data import Messages, clean, key_of
from test_ood import interval

MATH = "math"
PRODUCTS, OTHER_SUMS = "math: products", "math: other"
PRODUCT = re.compile(r"\b\d+ (?:x|times) \d+ is \d+")
NUMBER = re.compile(r"-?\d+")
BATCH = 128  # prompts side by side
KINDS = ("word_for_word", "right", "of_category")

Result = dict[str, Any]  # plain data, as the JSON file holds it


# ------------------------------------------------------------------------------- the questions


@dataclass
class Categories:
    """What the recipe's sources say about a conversation's category."""

    of_copy: dict[str, str] = field(default_factory=dict)  # by the conversation's key
    of_answer: dict[str, set[str]] = field(default_factory=dict)  # by the answer to one question

    def add(self, messages: Messages, category: str) -> None:
        self.of_copy.setdefault(key_of(messages), category)
        if sum(message["role"] == "user" for message in messages) == 1:
            self.of_answer.setdefault(messages[-1]["content"], set()).add(category)

    def of_first(self, messages: Messages, answer: str) -> str | None:
        """That of the first question, which is answered so; None if the sources have no copy."""
        own = self.of_copy.get(key_of(messages))
        found = self.of_answer.get(answer, set()) if own else set()
        return next(iter(found)) if len(found) == 1 else own


def read_categories(recipe: Recipe) -> Categories:
    """Those of the rows of stage 4's local files, held-out ones too.

    Raises:
        UserError: a file is missing or can't be read.
    """
    found = Categories()
    for name in dict.fromkeys(source.name for source in recipe.sft.data.sources):
        spec = recipe.sources[name]
        if not isinstance(spec, FileSource):
            continue
        for row, _ in open_source(name, recipe).rows(0, None):
            messages, category = clean(row.get(spec.column) or ""), row.get("category")
            if isinstance(messages, list) and isinstance(category, str):
                found.add(messages, category)
    return found


@dataclass
class Question:
    """What a conversation begins with, and all the answers that training gives to it."""

    messages: Messages  # a system prompt, if there is one, and what the user says
    category: str
    wanted: list[str]

    @property
    def group(self) -> str:
        """The category, but products, which are the times table, apart from other sums."""
        if self.category != MATH:
            return self.category
        return PRODUCTS if any(map(PRODUCT.search, self.wanted)) else OTHER_SUMS


def read_questions(path: Path, categories: Categories) -> list[Question]:
    """The first questions of the prepared conversations, in their order, each once.

    Raises:
        UserError: there is no such file, or a row holds no conversation.
    """
    if not path.is_file():
        raise UserError(f"{path} doesn't exist: run prepare_sft_data.py first")
    found: dict[tuple[tuple[str, str], ...], Question] = {}
    for number, row in read_file(path):
        messages = clean(row.get("messages") or "")
        if isinstance(messages, str):
            again = "run prepare_sft_data.py again"
            raise UserError(f"{path}, row {number + 1}: not a conversation ({messages}); {again}")
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        before, answer = messages[:first], messages[first]["content"]
        category = categories.of_first(messages, answer) or row.get("source") or "no category"
        question = found.setdefault(tuple(map(said, before)), Question(before, category, []))
        if answer not in question.wanted:
            question.wanted.append(answer)
    return list(found.values())


def answers_by_category(questions: Sequence[Question]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for question in questions:
        found.setdefault(question.category, set()).update(question.wanted)
    return found


def of_categories(questions: Sequence[Question], names: Sequence[str]) -> list[Question]:
    """Raises UserError for a category that there isn't."""
    there = sorted({question.category for question in questions})
    if unknown := [name for name in names if name not in there]:
        raise UserError(f"--category {unknown[0]}: there are {', '.join(there)}")
    return [question for question in questions if question.category in names]


def after_others(
    asked: Sequence[Question], questions: Sequence[Question], count: int, seed: int
) -> list[Question]:
    """Each with so many other questions before it, answered as in training.

    Raises:
        UserError: there are too few others.
    """
    if len(questions) <= count:
        raise UserError(f"--after {count}: there are only {len(questions)} questions")
    rng, found = random.Random(seed), []
    for one in asked:
        others = [other for other in rng.sample(questions, count + 1) if other is not one][:count]
        *system, question = one.messages
        before = [
            message
            for other in others
            for message in (other.messages[-1], {"role": "assistant", "content": other.wanted[0]})
        ]
        found.append(replace(one, messages=[*system, *before, question]))
    return found


# ------------------------------------------------------------------------------- asking


class Answer(NamedTuple):
    text: str
    ended: bool = True


class Prompt(NamedTuple):
    number: int  # of the question
    ids: list[int]
    need: int  # tokens of the longest answer that is wanted, with the one that ends it


def make_prompts(speaker: Speaker, questions: Sequence[Question]) -> list[Prompt]:
    """Prompts of the questions that fit into the context with what is wanted.

    Raises:
        UserError: none does.
    """
    context, tokenizer = speaker.model.config.max_position_embeddings, speaker.tokenizer
    prompts = []
    for number, question in enumerate(questions):
        messages: Sequence[Message] = question.messages
        ids, _ = tokenizer.chat(messages, answer_next=True)
        need = 1 + max(len(tokenizer.encode(answer)) for answer in question.wanted)
        if len(ids) + need <= context:
            prompts.append(Prompt(number, ids, need))
    if not prompts:
        raise UserError(
            f"{speaker.path}: of {len(questions):,} questions none fits with its answer into the "
            f"context of {context:,} tokens; ask a checkpoint that was trained on them"
        )
    return prompts


def in_groups(prompts: Sequence[Prompt], context: int) -> Iterator[list[Prompt]]:
    """The shortest first, at most BATCH together; the longest leaves room for what all need."""
    group: list[Prompt] = []
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.ids)):
        need = max(other.need for other in (*group, prompt))
        if group and (len(group) == BATCH or len(prompt.ids) + need > context):
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


def ask(
    speaker: Speaker, questions: Sequence[Question], sampling: Sampling, samples: int
) -> list[list[Answer]]:
    """So many answers to each question; none to one that doesn't fit into the context.

    They follow from the seed, the questions and how many samples there are.
    """
    context, tokenizer = speaker.model.config.max_position_embeddings, speaker.tokenizer
    stop = (tokenizer.im_end, tokenizer.end_of_text)
    answers: list[list[Answer]] = [[] for _ in questions]
    prompts = make_prompts(speaker, questions) * samples
    with tqdm(total=len(prompts), unit="answer", disable=None, leave=False) as bar:
        for number, group in enumerate(in_groups(prompts, context)):
            room = context - len(group[-1].ids)
            limit = min(room, max(sampling.max_new_tokens, *(prompt.need for prompt in group)))
            seed = random.Random(f"{sampling.seed}/{number}").getrandbits(60)
            how = replace(sampling, max_new_tokens=limit, seed=seed)
            asked = [prompt.ids for prompt in group]
            made = generate_batch(speaker.model, asked, how, stop, tokenizer.control_ids)
            for prompt, ids in zip(group, made, strict=True):
                text = tokenizer.decode(ids).strip()
                answers[prompt.number].append(Answer(text, len(ids) < limit))
            bar.update(len(group))
    return answers


# ------------------------------------------------------------------------------- counting


class Marks(NamedTuple):
    """Whether an answer is so; see the beginning of this file."""

    word_for_word: bool
    right: bool
    of_category: bool | None  # None of a sum


def judge(question: Question, answer: Answer, known: Collection[str]) -> Marks:
    """Marks of an answer; `known` are those that training gives anywhere in the category."""
    same = answer.ended and answer.text in question.wanted
    if question.category != MATH:
        return Marks(same, same, answer.ended and answer.text in known)
    results = [NUMBER.findall(wanted)[-1:] for wanted in question.wanted]
    number = NUMBER.findall(answer.text)[-1:]
    return Marks(same, same or bool(answer.ended and number and number in results), None)


@dataclass
class Asked:
    """A question, the answers to it, and what they are worth."""

    question: Question
    answers: list[Answer]
    marks: list[Marks]


def judge_all(
    questions: Sequence[Question], answers: Sequence[list[Answer]], known: dict[str, set[str]]
) -> list[Asked]:
    """All questions that were answered."""
    judged = []
    for question, own in zip(questions, answers, strict=True):
        marks = [judge(question, answer, known[question.category]) for answer in own]
        if marks:
            judged.append(Asked(question, own, marks))
    return judged


def share(asked: Sequence[Asked], kind: str) -> Result:
    """How many answers are of that kind, in percent too, with Wilson's interval of 95 %."""
    shares = [fmean(getattr(marks, kind) for marks in one.marks) for one in asked]
    count = sum(getattr(marks, kind) for one in asked for marks in one.marks)
    ends = [100 * end for end in interval(sum(shares), len(shares))]
    return {"count": count, "percent": 100 * fmean(shares), "interval": ends}


def count_up(asked: Sequence[Asked]) -> Result:
    """What is said about a category; of_category is None where sums are in it."""
    sums = any(one.question.category == MATH for one in asked)
    answers = sum(len(one.answers) for one in asked)
    counts = {kind: share(asked, kind) for kind in (KINDS[:2] if sums else KINDS)}
    about = {"questions": len(asked), "answers": answers, **counts}
    return {**about, "of_category": counts.get("of_category")}


def by_category(asked: Sequence[Asked]) -> dict[str, Result]:
    """Counts of every category, and of all."""
    groups: dict[str, list[Asked]] = {}
    for one in sorted(asked, key=lambda one: one.question.group):
        groups.setdefault(one.question.group, []).append(one)
    return {name: count_up(group) for name, group in groups.items()} | {"all": count_up(asked)}


def departures(asked: Sequence[Asked]) -> list[Result]:
    """Every answer that isn't word for word, by category."""
    found = []
    for one in sorted(asked, key=lambda one: one.question.group):
        first, question = one.question.messages[0], one.question.messages[-1]["content"]
        system = first["content"] if first["role"] == "system" else ""
        about = {"category": one.question.group, "system": system, "question": question}
        for answer, marks in zip(one.answers, one.marks, strict=True):
            if not marks.word_for_word:
                worth = {"right": marks.right, "of_category": marks.of_category}
                spoken = {"said": answer.text, "ended": answer.ended}
                found.append({**about, **spoken, "wanted": one.question.wanted, **worth})
    return found


def measure(
    speaker: Speaker, questions: Sequence[Question], known: dict[str, set[str]],
    temperature: float, samples: int, seed: int,
) -> Result:  # fmt: skip
    """One checkpoint at one temperature."""
    sampling = replace(speaker.sampling, temperature=temperature, seed=seed)
    samples = samples if temperature else 1
    begin = time.perf_counter()
    asked = judge_all(questions, ask(speaker, questions, sampling, samples), known)
    return {
        "checkpoint": str(speaker.path), "stage": speaker.stage, "step": speaker.step,
        "sampling": asdict(sampling), "samples": samples, "left_out": len(questions) - len(asked),
        "seconds": time.perf_counter() - begin, "categories": by_category(asked),
        "not_word_for_word": departures(asked),
    }  # fmt: skip


# ------------------------------------------------------------------------------- showing


def describe(number: int, result: Result) -> str:
    """Which checkpoint was asked how; `number` stands for it in the table."""
    total, temperature = result["categories"]["all"], result["sampling"]["temperature"]
    how = f"sampled at {temperature:g}" if temperature else "the likeliest answers"
    about = f"(stage {result['stage']}, step {result['step']:,})"
    lines = [
        f"{number}  {result['checkpoint']} {about}, {how}",
        f"   answered word for word: {total['word_for_word']['count']:,} of {total['answers']:,}, "
        f"in {result['seconds']:.1f} seconds",
    ]
    if result["left_out"]:
        lines.append(f"   left out, since they don't fit into the context: {result['left_out']:,}")
    return "\n".join(lines)


def cells(counts: Result) -> list[str]:
    """Answers, those of each kind and their percent, and the interval of `right`."""
    kinds = [counts[kind] for kind in KINDS]
    word, right, own = (f"{k['count']:,} {k['percent']:5.1f}" if k else "-" for k in kinds)
    low, high = (f"{end:.1f}".replace("100.0", "100") for end in counts["right"]["interval"])
    return [f"{counts['answers']:,}", word, right, f"{low} to {high}", own]


def table_of(results: Sequence[Result]) -> Table:
    """The runs beneath each other in every category."""
    headings = ("", "", "asked", "word for word", "right", "95 % sure", "category's")
    table = narrow_table("Answers to trained questions, and percent", headings)
    categories = dict.fromkeys(chain(*(result["categories"] for result in results)))
    for category in sorted(categories, key=lambda name: (name == "all", name)):
        if category == "all" or len(results) > 1:
            table.add_section()
        for number, result in enumerate(results, 1):
            counts = result["categories"].get(category)
            name = category if number == 1 else ""
            table.add_row(name, str(number), *(cells(counts) if counts else []))
    return table


# ------------------------------------------------------------------------------- command line


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe_options(parser, "tiny")
    parser.add_argument(
        "--checkpoint", type=Path, nargs="+", metavar="FILE", default=[None],
        help="one or several; default: the one that chat.py takes",
    )  # fmt: skip
    parser.add_argument(
        "--category", nargs="+", metavar="NAME", help="only these, such as identity math"
    )
    parser.add_argument("--count", type=positive, help="so many questions, drawn; default: all")
    parser.add_argument(
        "--after", type=positive, default=0, metavar="N", help="N other questions before each"
    )
    parser.add_argument(
        "--temp", type=float, nargs="+", default=[0.0], help="one temperature or several; default 0"
    )
    parser.add_argument(
        "--samples", type=positive, default=1, help="answers a question, above temperature 0"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; default 0")
    add_json_option(parser)
    arguments = parser.parse_args()
    for temperature in arguments.temp:
        if not 0 <= temperature <= HIGHEST_TEMPERATURE:
            limit = f"from 0 to {HIGHEST_TEMPERATURE}"
            raise UserError(f"--temp must be {limit}, got {temperature:g}")
    return arguments


def main() -> int:
    arguments = read_arguments()
    recipe = read_recipe(arguments)
    path = Path(recipe.sft.data.folder) / "train.jsonl"
    questions = read_questions(path, read_categories(recipe))
    known = answers_by_category(questions)
    if arguments.category:
        questions = of_categories(questions, arguments.category)
    random.Random(arguments.seed).shuffle(questions)
    asked = questions[: arguments.count]
    if arguments.after:
        asked = after_others(asked, questions, arguments.after, arguments.seed)
    print(f"{len(asked):,} of the {len(questions):,} first questions of {path}", flush=True)
    results: list[Result] = []
    for checkpoint in arguments.checkpoint:
        speaker = open_speaker(arguments.recipe, checkpoint, arguments.device)
        for temperature in arguments.temp:
            result = measure(speaker, asked, known, temperature, arguments.samples, arguments.seed)
            results.append(result)
            print(describe(len(results), result), flush=True)
    Console(highlight=False).print(table_of(results))
    if arguments.json:
        about = {"recipe": recipe.name, "trained_on": str(path)}
        about |= {"seed": arguments.seed, "after": arguments.after}
        write_report(arguments.json, {**about, "questions": len(asked), "runs": results})
    return 0


if __name__ == "__main__":
    run(main)
