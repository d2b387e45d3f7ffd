"""What --plan says before a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hamner.plan import memory_bytes, planned_tokens, print_plan
from hamner.recipe import STAGES, check_recipe, load_recipe
from model import Transformer


def test_v4_plans_13_81_billion_tokens_over_its_three_streams() -> None:
    recipe = load_recipe("v4")
    tokens = [planned_tokens(recipe, stage) for stage in STAGES]
    assert tokens == [9_830_400_000, 2_998_272_000, 983_040_000, None, None]


def test_weights_gradients_and_optimizer_are_counted_to_the_byte(raw: dict[str, Any]) -> None:
    recipe = check_recipe(raw, "test")
    model = Transformer(recipe.model.config())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = memory_bytes(recipe, "base")
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (size, size, 2 * size)


def test_checkpointing_saves_activations_and_nothing_else(raw: dict[str, Any]) -> None:
    raw["model"]["num_hidden_layers"] = 12
    plain = memory_bytes(check_recipe(raw, "test"), "base")
    saving = memory_bytes(check_recipe({**raw, "gradient_checkpointing": True}, "test"), "base")
    assert saving["activations"] < plain["activations"] / 2
    assert {**saving, "activations": 0} == {**plain, "activations": 0}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_prints_parameters_and_memory(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_plan(load_recipe("v4"), stage, torch.device("cpu"))
    printed = capsys.readouterr().out
    assert "163,609,344" in printed
    assert "GiB" in printed


def test_a_plan_trains_nothing(workshop: Any) -> None:
    printed = workshop.run("train_pretrain.py", "--plan", "--steps", "100")
    assert "25,600 (100 steps)" in printed
    assert not (workshop.folder / "checkpoints").exists()
    assert not (workshop.folder / "logs").exists()
