"""A checkpoint for tests to export: small, but it has learnt to answer and to stop."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
import yaml
from conftest import some_text
from test_chat import call

import export_hf
from hamner import checkpoints, tokenization
from hamner.recipe import check_recipe
from hamner.tokenization import Tokenizer
from model import ModelConfig, Transformer

ANSWERS = {
    "hello": "Hi! I'm Al.",
    "who are you?": "Al, and I'm not sorry.",
    "what is 12 + 30?": "42.",
}
SHAPE = {
    "vocab_size": 448, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 160,
    "rope_theta": 5000.0, "rms_norm_eps": 2e-5, "initializer_range": 0.05,
    "tie_word_embeddings": True,
}  # fmt: skip
SYSTEM = "Be Al."


def made_tokenizer() -> Tokenizer:
    """With fewer tokens than the model has room for."""
    rng = random.Random(2)
    texts = [some_text(rng, 50) for _ in range(20)]
    return tokenization.train([*texts, *ANSWERS, *ANSWERS.values()] * 3, 400)


def made_model(**changes: Any) -> Transformer:
    """Untrained, of SHAPE but for the changes."""
    torch.manual_seed(3)
    return Transformer(ModelConfig(**{**SHAPE, **changes})).eval()


def taught_model(tokenizer: Tokenizer) -> Transformer:
    """A model that says ANSWERS word for word."""
    model = made_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    talks = [tokenizer.chat(talk(question, answer)) for question, answer in ANSWERS.items()]
    ids, labels = (torch.tensor([[*chain(*parts)]]) for parts in zip(*talks, strict=True))
    row = torch.tensor([[n for n, (part, _) in enumerate(talks) for _ in part]])
    for _ in range(40):
        model(ids, labels=labels, sequence_ids=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def talk(question: str, *answer: str) -> list[dict[str, str]]:
    """A conversation, up to the question or with the answer to it."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return messages + [{"role": "assistant", "content": text} for text in answer]


def made_run(folder: Path) -> Path:
    """A folder with checkpoints of the stages base and dpo, and a log of dpo; its recipe."""
    raw = inspect.unwrap(conftest.raw)(inspect.unwrap(conftest.data)(folder))
    raw["model"] = SHAPE
    raw["system_prompt"] = SYSTEM
    raw["sampling"] = {
        "temperature": 0.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1,
        "max_new_tokens": 40,
    }  # fmt: skip
    raw["dpo"]["prompts"] = list(ANSWERS)
    recipe = check_recipe(raw, "test")
    tokenizer = made_tokenizer()
    for stage, model in (("base", made_model()), ("dpo", taught_model(tokenizer))):
        state = {"step": 12, "steps": 20, "position": {"step": 12, "tokens": 3_000}}
        checkpoint = checkpoints.make_checkpoint(
            model, tokenizer, stage, recipe.model_dump(), **state
        )
        checkpoints.write_whole(folder / recipe.folder(stage) / "best.pt", checkpoint)
    path = folder / "micro.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


Export = Callable[..., tuple[int, str, str]]


def run_export(run_folder: Path, *arguments: str) -> int:
    """Run export_hf.py in this process, in the folder of `made_run`; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run_folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        return call(export_hf.main, "--recipe", "micro.yaml", *arguments)


def exporter(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> Export:
    """Runs export_hf.py; gives exit code, output and errors."""

    def export(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_export(run_folder, *arguments)
        return (code, *capsys.readouterr())

    return export
