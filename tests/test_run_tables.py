"""The pages that tell of the run hold what stands in its files."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import run_tables
from run_tables import RUN

from hamner.errors import UserError

README, RESULTS = "README.md", "docs/RESULTS.md"
OF_THE_MACHINE = {"timestamp", "tokens_per_sec", "mfu", "data_wait", "elapsed_hours"}  # columns
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in (README, RESULTS)}


@pytest.mark.parametrize(
    ("page", "table"),
    [
        (README, run_tables.short_table),
        (RESULTS, run_tables.text_table),
        (RESULTS, run_tables.answers_table),
        (RESULTS, run_tables.preferences_table),
    ],
)
def test_a_page_has_the_tables_of_the_run(
    page: str, table: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    lines = table(RUN)
    assert "\n".join(lines) in PAGES[page]
    assert len(lines) > 4 and len({line.count("|") for line in lines}) == 1
    folder = tmp_path / "run"
    shutil.copytree(RUN, folder)
    for path in folder.glob("*.json"):  # other figures, another table
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"\.(\d)", lambda found: f".{9 - int(found[1])}", text))
    assert table(folder) != lines


@pytest.mark.parametrize("page", PAGES)
def test_a_page_tells_how_far_the_base_model_is_below_the_n_gram_model(page: str) -> None:
    text = json.loads((RUN / "kneser_ney.json").read_text())["text"]
    told = re.sub(r"\s+", " ", PAGES[page])
    everything = text["(all)"]
    for figure in (everything["5"], everything["model"]):
        assert f"{figure['bits_per_byte']:.3f}" in told
    for source in text.values():
        assert f"{source['below']['percent']:.1f} %" in told


def test_a_page_tells_what_is_right_of_the_never_trained() -> None:
    sft, dpo = run_tables.unseen_lines(RUN)
    told = re.sub(r"\s+", " ", PAGES[RESULTS])
    after_sft, after_dpo = (re.findall(r"(\d+) %", line)[:2] for line in (sft, dpo))
    wanted = "{} % of the paraphrases and {} % of the others after SFT, {} and {} % after DPO"
    assert wanted.format(*after_sft, *after_dpo) in told


def test_without_the_files_it_says_which_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.json: can't be read"):
        run_tables.text_table(tmp_path)


@pytest.mark.parametrize("stage", ["base", "anneal", "chat"])
def test_two_runs_of_one_recipe_logged_the_same(stage: str) -> None:
    """docs/runs/small/README.md says so: all but the times, on two machines of one kind."""
    first, second = (
        list(csv.DictReader((folder / f"{stage}_metrics.csv").open(encoding="utf-8")))
        for folder in (RUN.with_name("small_single"), RUN)
    )
    assert len(first) >= 35 and first[0]["timestamp"] != second[0]["timestamp"]
    for rows in (first, second):
        for row in rows:
            for column in OF_THE_MACHINE:
                del row[column]
    assert first == second and {"loss", "grad_norm", "val_loss"} <= first[0].keys()
