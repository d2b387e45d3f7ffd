"""The model card: what recipe, checkpoint and logs say, and nothing that a name can break."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_exports import SHAPE

from hamner.export.model_card import Exported, code, model_card, table
from hamner.recipe import Recipe, check_recipe, load_recipe
from hamner.tracking import MetricsCSV
from model import ModelConfig

COLUMNS = ("timestamp", "step", "loss", "tokens_total", "val_loss", "val_web")


def about(recipe: Recipe, stage: str = "dpo", **changes: Any) -> Exported:
    shape = changes.pop("shape", ModelConfig(**SHAPE))
    facts = {"step": 38, "tokens": 23_671, "dtype": "float32", "answers": {"hello": "Hi."}}
    return Exported(recipe=recipe, stage=stage, shape=shape, **{**facts, **changes})


def front(card: str) -> dict[str, Any]:
    """What the YAML before the card says."""
    return yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))


def rows(card: str, title: str) -> list[list[str]]:
    """The cells of the table under a title."""
    body = card.split(f"## {title}\n\n")[1].split("\n\n")[0]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body.splitlines()]
    return [[cell.strip() for cell in line] for line in cells][2:]


@pytest.fixture
def recipe(raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """In a folder of its own, where its logs would lie."""
    monkeypatch.chdir(tmp_path)
    return check_recipe(raw, "test")


def log(recipe: Recipe, stage: str, *logged: tuple[int, float, int, str]) -> None:
    csv = MetricsCSV(recipe.log(stage, "metrics.csv"), COLUMNS, 0)
    for step, loss, tokens, val_loss in logged:
        csv.write({"step": step, "loss": loss, "tokens_total": tokens, "val_loss": val_loss})


# ------------------------------------------------------------------------------ what it says


def test_v4s_card_names_its_data_and_its_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("v4")
    monkeypatch.chdir(tmp_path)
    card = model_card(about(recipe, shape=recipe.model.config(), dtype="bfloat16"))
    assert front(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "gpl-3.0",
        "tags": ["llama", "conversational"],
        "datasets": [
            "HuggingFaceFW/fineweb-edu", "mlfoundations/dclm-baseline-1.0",
            "bigcode/starcoderdata", "HuggingFaceTB/finemath", "HuggingFaceTB/smoltalk",
            "HuggingFaceH4/ultrafeedback_binarized",
        ],
    }  # fmt: skip
    assert "163,609,344 parameters" in card
    shape = dict(rows(card, "What it is"))
    assert (shape["layers"], shape["context"], shape["stored as"]) == (
        "20", "1,024 tokens", "bfloat16",
    )  # fmt: skip
    data = [row[:3] for row in rows(card, "What it was trained on")]
    assert ["`base`", "`fineweb_edu`", "60%"] in data
    assert ["`anneal`", "`math`", "15%"] in data
    assert ["`sft`", "`smoltalk`", "100,000 conversations"] in data
    assert ["`sft`", "`tech`", "2,000 conversations, 2 times an epoch"] in data
    assert ["`dpo`", "`ultrafeedback`", "up to 60,000 pairs"] in data
    assert "You are Al Hamner" in card.split("```")[1]
    assert "repetition penalty of 1.15" in card


def test_losses_are_the_last_logged_up_to_the_checkpoint(recipe: Recipe) -> None:
    log(recipe, "base", (10, 3.25, 1_000, ""), (20, 2.5, 2_000, "2.75"), (30, 2.125, 3_000, ""))
    log(recipe, "dpo", (30, 0.75, 20_000, "0.625"), (40, 0.5, 26_000, "0.5"))
    table = rows(model_card(about(recipe)), "How it was trained")
    assert table[0] == ["`base`", "30", "3,000", "2.12", "2.75"]
    assert table[1] == ["`anneal`", "-", "-", "-", "-"]  # no log, and nothing made up
    assert table[-1] == ["`dpo`", "38", "23,671", "0.75", "0.625"]


def test_the_log_of_another_run_is_not_taken_for_this_ones(recipe: Recipe) -> None:
    log(recipe, "dpo", (30, 0.75, 999_000, "0.625"))
    table = rows(model_card(about(recipe)), "How it was trained")
    assert table[-1] == ["`dpo`", "38", "23,671", "-", "-"]


def test_a_log_that_is_none_is_left_aside(recipe: Recipe) -> None:
    path = recipe.log("dpo", "metrics.csv")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff\xfejunk,\n1,2,3\n")
    assert rows(model_card(about(recipe)), "How it was trained")[-1][3:] == ["-", "-"]


def test_a_model_that_cannot_talk_yet_is_not_said_to(recipe: Recipe) -> None:
    card = model_card(about(recipe, "anneal"))
    assert front(card)["tags"] == ["llama"]
    assert "apply_chat_template" not in card
    assert "Stage `anneal` comes before conversations" in card
    assert [row[0] for row in rows(card, "How it was trained")] == ["`base`", "`anneal`"]
    assert "pairs" not in card


def test_a_gguf_file_is_told_of_if_there_is_one(recipe: Recipe) -> None:
    assert "llama" not in model_card(about(recipe)).split("## Limits")[1]
    assert "llama-server -m x.gguf" in model_card(about(recipe, gguf="x.gguf"))


# ------------------------------------------------------------------------------ what can't break it

NASTY = [
    "a | b || c",
    "``` \n# Heading\n---\n- list",
    "`code` ``more`` and <script>alert(1)</script>",
    "---\nlicense: mit\n---\n",
    "ends with `",
    "[link](javascript:x) ![image](x) & &lt; \\ \\| \\`",
    "'\"\n\t\u2028{messages!r} %s {{x}}",
]


@pytest.mark.parametrize("nasty", NASTY)
def test_names_paths_and_prompts_stay_text(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nasty: str
) -> None:
    monkeypatch.chdir(tmp_path)
    raw["sources"]["web"] = {"kind": "hub", "dataset": nasty, "split": "train"}
    raw["sources"]["books"]["paths"] = [nasty]
    raw["sources"][nasty] = raw["sources"].pop("talk")
    raw["chat"]["sources"][0]["name"] = nasty
    raw["sft"]["data"]["sources"][0]["name"] = nasty
    raw["tokenizer"]["train"]["train_on"] = ["web"]
    raw["system_prompt"] = nasty
    plain = {**raw, "system_prompt": "x"}
    card = model_card(about(check_recipe(raw, "test"), answers={nasty: nasty}))
    other = model_card(about(check_recipe(plain, "test"), answers={"x": "y"}))
    assert front(card) == {**front(other), "datasets": [nasty]}
    headings = [line for line in card.splitlines() if line.startswith("#")]
    assert headings == [line for line in other.splitlines() if line.startswith("#")]
    for title in ("What it answers, always taking the likeliest token", "What it was trained on"):
        assert [len(row) for row in rows(card, title)] == [len(row) for row in rows(other, title)]
    sample = re.search(r"```python\n(.*?)\n```\n", card, re.DOTALL)
    assert sample is not None
    messages = re.search(r"messages = (\[.*?\n\])", sample[1], re.DOTALL)
    assert messages is not None
    assert eval(messages[1]) == [
        {"role": "system", "content": nasty},
        {"role": "user", "content": nasty},
    ]


@pytest.mark.parametrize("text", [*NASTY, "", "`", "``", " x ", "a`b``c```d"])
def test_a_code_span_can_not_be_left(text: str) -> None:
    """By CommonMark: it ends at the next run of as many backticks as it began with."""
    span = code(text)
    assert "\n" not in span
    fence = re.match("`+", span)
    assert fence is not None and span.endswith(fence[0])
    inside = span[len(fence[0]) : -len(fence[0])]
    assert fence[0] not in re.findall("`+", inside)
    assert inside.strip() == " ".join(text.split())


def test_bars_do_not_make_cells() -> None:
    assert table(["a", "b"], [["x | y", "`|`"]]).splitlines()[-1] == "| x \\| y | `\\|` |"
