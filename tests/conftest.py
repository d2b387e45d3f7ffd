"""Fixtures that the tests share: a recipe so small that each of its stages takes seconds."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # workers share the cores

WORDS = (
    "the a red old small dog cat bird tree house river stone sees finds takes keeps likes near "
    "under over behind beside morning evening rain sun wind and but then soon again"
).split()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def some_text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "."


def some_conversation(rng: random.Random) -> list[dict[str, str]]:
    a, b = rng.randrange(10), rng.randrange(10)
    turns = [
        {"role": "user", "content": f"what is {a} + {b}? {some_text(rng, 3)}"},
        {"role": "assistant", "content": f"{a + b}. {some_text(rng, 4)}"},
    ]
    return [{"role": "system", "content": "be brief"}] * rng.randrange(2) + turns


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with web.jsonl, books.jsonl, talk.jsonl and pairs.jsonl, small and made up."""
    rng = random.Random(1)
    folder = tmp_path / "texts"
    web = [{"text": f"{i} {some_text(rng, 30)}"} for i in range(300)]
    books = [{"text": f"book {i} {some_text(rng, 60)}"} for i in range(150)]
    talk = [{"messages": some_conversation(rng)} for _ in range(120)]
    pairs = []
    for _ in range(60):
        chosen = some_conversation(rng)
        rejected = [*chosen[:-1], {"role": "assistant", "content": some_text(rng, 5)}]
        pairs.append({"chosen": chosen, "rejected": rejected})
    for name, rows in (("web", web), ("books", books), ("talk", talk), ("pairs", pairs)):
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def raw(data: Path) -> dict[str, Any]:
    """A complete recipe, as plain data, over the files of `data`."""

    def files(name: str, column: str = "text") -> dict[str, Any]:
        return {"kind": "files", "paths": [f"{name}.jsonl"], "column": column, "shuffle_block": 20}

    stage = {
        "steps": 12,
        "sequences_per_step": 4,
        "validation_sequences": 2,
        "optimizer": {"learning_rate": 0.003},
        "schedule": {"kind": "cosine", "warmup": 2, "floor": 0.1},
        "prompts": ["the dog"],
    }
    epochs = {k: v for k, v in stage.items() if k not in ("steps", "validation_sequences")}
    return {
        "name": "micro",
        "seed": 7,
        "precision": "fp32",
        "compile": False,
        "gradient_checkpointing": False,
        "data_dir": str(data),
        "held_out_fraction": 0.1,
        "model": {
            "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96,
            "rope_theta": 10000, "rms_norm_eps": 1e-5, "initializer_range": 0.02,
            "tie_word_embeddings": True,
        },
        "tokenizer": {
            "train": {"train_on": ["web", "talk"], "vocab_size": 320, "characters": 10_000}
        },
        "system_prompt": "",
        "sampling": {
            "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1,
            "max_new_tokens": 8,
        },
        "sources": {
            "web": files("web"), "books": files("books"), "talk": files("talk", "messages"),
            "pairs": files("pairs", "chosen"),
        },
        "common": {
            "sequence_length": 64, "micro_batch": 2,
            "optimizer": {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0},
            "log_every": 2, "validate_every": 5, "sample_every": 6,
            "checkpoint": {"every": 3, "keep_last": 2},
        },
        "base": {
            **stage,
            "sources": [{"name": "web", "weight": 0.6}, {"name": "books", "weight": 0.4}],
        },
        "anneal": {
            **stage,
            "sources": [{"name": "web", "weight": 0.5}, {"name": "books", "weight": 0.5}],
        },
        "chat": {
            **stage,
            "sources": [{"name": "talk", "weight": 0.75}, {"name": "web", "weight": 0.25}],
        },
        "sft": {
            **epochs,
            "sequence_length": 96,
            "epochs": 2,
            "data": {
                "folder": str(data.parent / "sft"),
                "sources": [{"name": "talk", "label": "talk", "repeat": 1}],
            },
        },
        "dpo": {
            **{k: v for k, v in epochs.items() if k != "sequences_per_step"},
            "sequence_length": 96, "epochs": 2, "pairs_per_step": 8, "micro_batch": 4,
            "max_pairs": 50, "validation_pairs": 6, "loss": "sigmoid", "beta": 0.1,
            "label_smoothing": 0.0, "sft_weight": 0.0, "train": "pairs",
            "validation": "pairs",
        },
    }  # fmt: skip


class Workshop:
    """A folder of its own in which the scripts are run, as a user would run them."""

    def __init__(self, folder: Path, raw: dict[str, Any]):
        self.folder, self.raw = folder, raw
        self.recipe = folder / "micro.yaml"
        self.write()

    def write(self) -> None:
        self.recipe.write_text(yaml.safe_dump(self.raw), encoding="utf-8")

    def start(self, script: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start a script of the repository in this folder; its output is text in a pipe."""
        command = [sys.executable, str(ROOT / script), "--recipe", str(self.recipe), *arguments]
        return subprocess.Popen(
            command, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, **options,
        )  # fmt: skip

    def run(self, script: str, *arguments: str, code: int = 0, stdin: str = "") -> str:
        """Run a script to its end; its output, standard error last. Checks the exit code."""
        process = self.start(script, *arguments, stdin=subprocess.PIPE)
        out, err = process.communicate(stdin, timeout=240)
        assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
        return out + err


@pytest.fixture
def workshop(tmp_path: Path, raw: dict[str, Any]) -> Workshop:
    return Workshop(tmp_path, raw)
