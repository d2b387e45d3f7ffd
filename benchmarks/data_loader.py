"""How fast the loader makes tokens, beside the bare tokenizer on the same text in the same run.

    python benchmarks/data_loader.py --recipe small --set data_dir=FOLDER
    python benchmarks/data_loader.py --recipe v4 --set mirror=DIR     # or straight from the hub

Loader: the base stage's mix as the trainer gets it, from the files to batches of token ids: read,
filtered, split, shuffled, tokenised, cut into sequences. Bare: the same documents, already in
memory, through the tokenizer's batch encoding and nothing else. Both use all cores. Rounds
alternate, and the ratio is the median of theirs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import add_json_option, keep
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer as HFTokenizer

from hamner.batches import MixedBatches
from hamner.errors import run
from hamner.prefetching import Prefetched
from hamner.recipe import Recipe, load_recipe
from hamner.sources import open_stream
from hamner.stage import open_tokenizer, open_tokens
from hamner.tokenization import Message, Tokenizer

DOCUMENTS_TOGETHER = 1_000  # what the bare tokenizer gets at once; more is no faster


def open_mix(recipe: Recipe, tokenizer: Tokenizer) -> MixedBatches:
    settings, lanes = recipe.base, range(recipe.lanes)
    return MixedBatches(
        {
            s.name: {lane: open_tokens(s.name, recipe, tokenizer, None, lane) for lane in lanes}
            for s in settings.sources
        },
        {s.name: s.weight for s in settings.sources},
        sequence_length=settings.sequence_length,
        sequences_per_step=settings.sequences_per_step,
        micro_batch=settings.micro_batch,
        lanes=recipe.lanes,
    )


class Counting(Tokenizer):
    """Counts the tokens of the documents that it is given."""

    tokens = 0

    def documents(self, documents: Sequence[str | Sequence[Message]]) -> list[list[int]]:
        found = super().documents(documents)
        self.tokens += sum(map(len, found))
        return found


def loader_speed(recipe: Recipe, tokenizer: Tokenizer, wanted: int) -> float:
    """Tokens a second that the loader makes, from the first batch on: opening is not timed.

    Tokens made are counted, not those handed out: what was read ahead before would flatter.
    """
    counting = Counting(HFTokenizer.from_str(tokenizer.to_json()))
    batches = Prefetched(open_mix(recipe, counting))
    next(batches)
    begin, made = time.perf_counter(), counting.tokens
    while counting.tokens - made < wanted:
        next(batches)
    speed = (counting.tokens - made) / (time.perf_counter() - begin)
    batches.close()
    return speed


def texts_of(recipe: Recipe, tokens: int) -> list[str]:
    """About as many documents of each source as the loader reads for so many tokens."""
    texts = []
    for source in recipe.base.sources:
        missing = tokens * source.weight * 4.3  # characters a token, about
        for document in islice(open_stream(source.name, recipe).one_epoch(), 1_000_000):
            texts.append(str(document))
            missing -= len(texts[-1])
            if missing <= 0:
                break
    return texts


def bare_speed(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Tokens a second of the tokenizer alone."""
    backend = HFTokenizer.from_str(tokenizer.to_json())
    begin, tokens = time.perf_counter(), 0
    for start in range(0, len(texts), DOCUMENTS_TOGETHER):
        part = texts[start : start + DOCUMENTS_TOGETHER]
        for encoding in backend.encode_batch_fast(part, add_special_tokens=False):
            tokens += len(encoding)
    return tokens / (time.perf_counter() - begin)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="a round; default 2,000,000")
    parser.add_argument("--rounds", type=int, default=5)
    add_json_option(parser)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, ["read_ahead=100_000", *arguments.overrides])
    tokenizer = open_tokenizer(recipe)
    texts = texts_of(recipe, arguments.tokens)
    rounds = [
        (loader_speed(recipe, tokenizer, arguments.tokens), bare_speed(tokenizer, texts))
        for _ in range(arguments.rounds)
    ]
    table = Table(title=f"Tokens a second, vocabulary {tokenizer.vocab_size:,}")
    for heading in ("round", "loader", "bare tokenizer", "ratio"):
        table.add_column(heading, justify="right")
    for number, (loader, bare) in enumerate(rounds, start=1):
        table.add_row(str(number), f"{loader:,.0f}", f"{bare:,.0f}", f"{loader / bare:.3f}")
    table.add_section()
    loaders, bares = zip(*rounds, strict=True)
    ratio = median(loader / bare for loader, bare in rounds)
    table.add_row("median", f"{median(loaders):,.0f}", f"{median(bares):,.0f}", f"{ratio:.3f}")
    Console().print(table)
    keep(arguments, {
        "tokens_per_second": {"loader": median(loaders), "bare_tokenizer": median(bares)},
        "loader_over_bare": ratio,
        "rounds": [{"loader": loader, "bare_tokenizer": bare} for loader, bare in rounds],
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    run(main)
