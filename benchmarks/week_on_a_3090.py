"""What a week on an RTX 3090 should give: the base loss that recipes/v4.yaml is heading for.

    python benchmarks/week_on_a_3090.py --json docs/runs/week_on_a_3090.json

The project's own earlier run of v4 on that card stopped after a quarter of its base stage; its
losses on held-out FineWeb-Edu are docs/runs/original_v4_base.csv. The curve through them is carried
on to all of the recipe's base tokens as the dashboard does it (hamner/plots/projection.py says what
its band means). The anneal's part is what it brought in the small run whose base stage, like v4's,
stayed at its peak rate (docs/runs/small_flat): the share by which it lowered the bits per byte of
the base stage's sources. The band is widened by that share's own range over these sources. Bits per
byte follow from the bytes that a token of cosmo2's tokenizer stands for, 4.2 to 4.8 in English
prose. Beside it stands what others have published of models of this size; losses are of their own
texts and tokenizers.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import yaml

from hamner.errors import run
from hamner.files import write_report
from hamner.plots.metrics import Series
from hamner.plots.projection import project
from hamner.recipe import load_recipe

DOCS = Path(__file__).resolve().parent.parent / "docs"
RUNS, SCORES = DOCS / "runs", DOCS / "published_scores.yaml"
BYTES_PER_TOKEN = (4.2, 4.8)
TOKENS_PER_SECOND = 26_037  # the median of the same log
PUBLISHED = [  # tokens that were read, and losses in nats per token
    {
        "model": "GPT-2 124M's shape, trained by llm.c",
        "tokens": 10_000_000_000,
        "loss": 3.2847,
        "text": "FineWeb",
        "source": "https://github.com/KellerJordan/modded-nanogpt",
    },
    {
        "model": "GPT-2 124M's shape, trained by LitGPT",
        "loss": 2.861,
        "text": "OpenWebText",
        "source": "https://github.com/Lightning-AI/litgpt/issues/1607",
    },
    {
        "model": "SmolLM2-135M",
        "tokens": 2_000_000_000_000,
        "source": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M",
    },
]


def logged_losses(path: Path) -> Series:
    with open(path, newline="") as file:
        rows = [(row["tokens_total"], row["val_loss"]) for row in csv.DictReader(file)]
    tokens, losses = np.array(rows, dtype=float).T
    return Series(tokens, losses)


def gains_of_anneal(path: Path, sources: list[str]) -> list[float]:
    """Of each source, bits per byte after the anneal over those before it."""
    models = {m["stage"]: m["text"] for m in json.loads(path.read_text())["models"]}
    return [
        models["anneal"][name]["bits_per_byte"] / models["base"][name]["bits_per_byte"]
        for name in sources
    ]


def stage_tokens(stage: Any) -> int:
    return stage.steps * stage.sequences_per_step * stage.sequence_length


def expected() -> dict[str, Any]:
    """The losses to be expected, in nats per token and bits per byte: low, middle, high."""
    recipe, small = load_recipe("v4"), load_recipe(str(RUNS / "small_flat/recipe.yaml"))
    losses = logged_losses(RUNS / "original_v4_base.csv")
    base = project(losses, stage_tokens(recipe.base)).final
    names = [source.name for source in small.base.sources]
    gains = gains_of_anneal(RUNS / "small_flat/evaluation.json", names)
    share = (min(gains), sum(gains) / len(gains), max(gains))
    annealed = [loss * gain for loss, gain in zip(base, share, strict=True)]
    bits = [
        loss / math.log(2) / size
        for loss, size in zip(
            annealed,
            (BYTES_PER_TOKEN[1], sum(BYTES_PER_TOKEN) / 2, BYTES_PER_TOKEN[0]),
            strict=True,
        )
    ]
    streams = (recipe.base, recipe.anneal, recipe.chat)
    tokens = [stage_tokens(stage) for stage in streams]
    return {
        "measured": {"tokens": losses.x[-1], "loss": float(losses.y[-1])},
        "tokens": {"base": tokens[0], "anneal": tokens[1], "chat": tokens[2]},
        "days_of_stages_1_to_3": sum(tokens) / TOKENS_PER_SECOND / 86_400,
        "base_nats_per_token": base,
        "anneal_over_base": share,
        "anneal_nats_per_token": annealed,
        "anneal_bits_per_byte": bits,
        "published": PUBLISHED,
        "published_scores": yaml.safe_load(SCORES.read_text(encoding="utf-8")),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write it there")
    arguments = parser.parse_args()
    found = expected()
    for name, values in found.items():
        print(f"{name:24}{json.dumps(values)}")
    if arguments.json is not None:
        write_report(arguments.json, found)
    return 0


if __name__ == "__main__":
    run(main)
