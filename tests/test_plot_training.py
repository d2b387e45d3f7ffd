"""The pictures of a run: what they show, what they bear, and the command line that draws them."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from made_runs import write_run, write_stage
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

import plot_training
from hamner.errors import run
from hamner.plots.drawing import COLOURS, STYLE, duration, one_line, short
from hamner.plots.panels import PANELS
from hamner.recipe import load_recipe

V4 = load_recipe("v4")
BASE = V4.log("base", "metrics.csv")


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the logs of a whole v4 run, 16,500 rows, resumed once in every stage."""
    folder = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_run(V4)
    return folder


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the logs of the first three hundredths of the base stage, 240 rows."""
    folder = tmp_path_factory.mktemp("part")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_stage(V4, "base", 0.03, resumed_at=0.02)
    return folder


@pytest.fixture
def copied(part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `part` to work in."""
    shutil.copytree(part, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def drawn(name: str = "dashboard") -> Figure:
    """The dashboard, or a single plot, of the v4 run in the current folder."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("error")
        matplotlib.rcParams.update(STYLE)
        state = plot_training.read_run(V4)
        dashboard = name == "dashboard"
        figure = plot_training.dashboard(state) if dashboard else plot_training.plot(name, state)
        FigureCanvasAgg(figure).draw()
    return figure


@pytest.fixture(scope="module")
def full_dashboard(full: Path) -> Figure:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(full)
        return drawn()


def call(*arguments: str) -> int:
    """Run the script in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["plot_training.py", *arguments])
        run(plot_training.main)
    return int(stop.value.code or 0)


def texts(figure: Figure) -> list[Text]:
    """Every text that can be seen."""
    found = [*figure.texts]
    for axes in figure.axes:
        found += [axes._left_title, axes._right_title, *axes.texts]  # type: ignore[attr-defined]
        if axes.axison:
            found += [axes.xaxis.label, axes.yaxis.label, *axes.findobj(Text)]
        for axis, low, high in ((axes.xaxis, *axes.get_xlim()), (axes.yaxis, *axes.get_ylim())):
            ticks = (*axis.get_major_ticks(), *axis.get_minor_ticks())
            unseen = [tick for tick in ticks if not low <= tick.get_loc() <= high]
            labels = {id(label) for tick in unseen for label in (tick.label1, tick.label2)}
            found = [text for text in found if id(text) not in labels]
    by_id = {id(text): text for text in found if text.get_visible() and text.get_text().strip()}
    return list(by_id.values())


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in texts(figure)]


def panel(figure: Figure, title: str) -> Axes:
    (found,) = (axes for axes in figure.axes if axes.get_title(loc="left") == title)
    return found


def table(figure: Figure) -> dict[str, list[str]]:
    """The rows of the table of stages, by stage."""
    rows: dict[float, list[tuple[float, str]]] = {}
    for text in figure.axes[0].texts:
        x, y = text.get_position()
        rows.setdefault(y, []).append((x, text.get_text()))
    cells = [[cell for _, cell in sorted(row)] for _, row in sorted(rows.items())]
    return {row[0]: row[1:] for row in cells[1:]}


def boxes(found: list[Text]) -> list[Bbox]:
    return [text.get_window_extent() for text in found]


# ------------------------------------------------------------------------------ the dashboard


def test_the_dashboard_of_a_whole_run_shows_where_each_stage_stands(full_dashboard: Figure) -> None:
    figure = full_dashboard
    rows = table(figure)
    assert list(rows) == ["base", "anneal", "chat", "SFT", "DPO", "all"]
    assert rows["base"][:3] == ["100%", "400,000 of 400,000", "9.83B"]
    assert rows["base"][5:] == ["4 d 9 h", "-", "\N{CHECK MARK} finished"]
    assert rows["DPO"][1] == "30,000 of 30,000"
    assert rows["all"][2] == "14B" and rows["all"][5] == "6 d 6 h"
    losses = [line.get_color() for line in panel(figure, "Loss by step").lines]
    assert set(COLOURS.values()) <= set(losses)
    assert panel(figure, "Base loss, projected from half way")
    said = " ".join(words(figure))
    assert "9.83B tokens: 3.0" in said and "not started" not in said
    assert "Paris. It lies on the Seine" in said


def test_nothing_in_the_dashboard_is_cut_off_or_written_over(full_dashboard: Figure) -> None:
    figure = full_dashboard
    width, height = figure.canvas.get_width_height()
    for text, box in zip(texts(figure), boxes(texts(figure)), strict=True):
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, text
    of_table = boxes(figure.axes[0].texts)
    assert not [1 for i, a in enumerate(of_table) for b in of_table[:i] if a.overlaps(b)]
    titles = [title for axes in figure.axes for title in (axes._left_title, axes._right_title)]  # type: ignore[attr-defined]
    shown = boxes([title for title in titles if title.get_text()])
    assert not [1 for i, a in enumerate(shown) for b in shown[:i] if a.overlaps(b)]


def test_a_half_finished_run_is_projected_and_its_later_stages_have_not_started(
    copied: Path,
) -> None:
    figure = drawn()
    rows = table(figure)
    assert rows["base"][:2] == ["3%", "12,000 of 400,000"]
    assert rows["base"][-1] == "\N{BLACK SQUARE} stopped"
    assert rows["anneal"][1:5] == ["122,000", "-", "-", "-"]
    assert rows["anneal"][6] == "32.0 h"  # at the speed of the base stage
    assert rows["SFT"][1] == "3 epochs" and rows["SFT"][6] == "-"
    assert rows["all"][6].startswith("over ")
    assert words(figure).count("not started") == 2  # the two halves of the DPO panel
    assert panel(figure, "Projection of the base loss").get_xlim()[1] > 9.8e9
    (dot,) = (line for line in panel(figure, "Projection of the base loss").lines
              if line.get_marker() == "o")  # fmt: skip
    assert dot.get_xdata()[0] == pytest.approx(400_000 * 24 * 1024)  # type: ignore[index]


def test_rows_that_a_resume_repeated_and_half_lines_are_not_drawn(copied: Path) -> None:
    """The file holds seven rows of a lost attempt with a loss of 99, and half a line."""
    assert ",99," in BASE.read_text(encoding="utf-8")
    with open(BASE, "a", encoding="utf-8") as file:
        file.write("2026-03-01T03:30:00+00:00,12050,0,55")
    line, *_ = panel(drawn("loss"), "Loss by step").lines
    steps = np.asarray(line.get_xdata())
    assert (np.diff(steps) > 0).all()
    assert 3 < float(np.nanmax(np.asarray(line.get_ydata(), dtype=float))) < 10
    assert max(steps) <= 12_000


def changed_losses(change: Callable[[int, str], str]) -> None:
    """Replace the losses of the base stage, by the numbers of their rows."""
    header, *lines = BASE.read_text(encoding="utf-8").splitlines()
    rows = [line.split(",") for line in lines]
    rows = [row for row in rows if len(row) == header.count(",") + 1]
    for number, row in enumerate(rows):
        row[3] = change(number, row[3])
    text = "\n".join([header, *map(",".join, rows)]) + "\n"
    BASE.write_text(text, encoding="utf-8")


def test_spikes_stay_in_the_band_and_do_not_set_the_scale(copied: Path) -> None:
    before = panel(drawn("loss"), "Loss by step").get_ylim()
    changed_losses(lambda number, loss: "4e5" if number == 200 else loss)
    axes = panel(drawn("loss"), "Loss by step")
    assert axes.get_ylim() == pytest.approx(before, rel=0.02)
    (band,) = axes.collections
    assert max(path.vertices[:, 1].max() for path in band.get_paths()) > 1e5


def keys(axes: Axes) -> list[str]:
    """What the legend tells."""
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_rows_without_a_finite_loss_leave_a_gap_and_a_cross(copied: Path) -> None:
    changed_losses(lambda number, loss: "nan" if 100 <= number < 140 else loss)
    figure = drawn("loss")
    axes = panel(figure, "Loss by step")
    assert np.isnan(np.asarray(axes.lines[0].get_ydata(), dtype=float)).any()
    (crosses,) = (line for line in axes.lines if line.get_marker() == "x")
    steps = np.asarray(crosses.get_xdata())
    assert 4_500 < steps.min() < steps.max() < 8_000
    assert "no finite loss" in keys(axes) and "loss jumped up" not in keys(axes)


def test_a_spike_gets_a_triangle_that_the_key_tells(copied: Path) -> None:
    assert "loss jumped up" not in keys(panel(drawn("loss"), "Loss by step"))
    header, *rows = BASE.read_text(encoding="utf-8").splitlines()
    place = header.split(",").index("spikes")
    for number, row in enumerate(rows):
        cells = row.split(",")
        if len(cells) > place:  # one is torn off
            cells[place] = str(int(number >= 100))
        rows[number] = ",".join(cells)
    BASE.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    axes = panel(drawn("loss"), "Loss by step")
    assert keys(axes).count("loss jumped up") == 1
    triangles = [line.get_xdata() for line in axes.lines if line.get_marker() == "v"]
    (step,) = (step for steps in triangles for step in steps)  # type: ignore[union-attr]
    assert step == int(rows[100].split(",")[header.split(",").index("step")])


def test_a_missing_column_is_said_and_the_rest_is_drawn(copied: Path) -> None:
    lines = BASE.read_text(encoding="utf-8").splitlines()
    few = [",".join(line.split(",")[:4]) for line in lines]  # up to the loss
    BASE.write_text("\n".join(few) + "\n", encoding="utf-8")
    figure = drawn()
    said = words(figure)
    assert "no tokens_total in the metrics" in said
    assert "no tokens_per_sec or elapsed_hours in the metrics" in said
    assert "no learning_rate in the metrics" in said
    assert len(panel(figure, "Loss by step").lines[0].get_xdata()) > 50  # type: ignore[arg-type]
    assert table(figure)["base"][2] == "-"


def test_every_single_plot_bears_a_run_of_one_row(copied: Path) -> None:
    header, first, *_ = BASE.read_text(encoding="utf-8").splitlines(keepends=True)
    BASE.write_text(header + first, encoding="utf-8")
    assert call("--plot", "all", "--out", "pictures") == 0
    written = {path.name for path in Path("pictures").iterdir()}
    assert written == {f"{name}_v4.png" for name in PANELS}


# ------------------------------------------------------------------------------ samples


def with_samples(*said: dict[str, str]) -> None:
    path = V4.log("base", "samples.jsonl")
    records = [{"step": 500 * i, "samples": texts} for i, texts in enumerate(said, 1)]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


HOSTILE = (
    "costs $\\frac{ or 5$ or so", "\x1b[31mred\x00\x07", "\U0001f642 and \u65e5\u672c", "_" * 400,
    "x" * 3_000, "a\nb\r\nc\td\u2028e", "\u202eright to left", "%s {0} \\n", "", " ", "<b>&amp;",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_words_of_a_model_can_not_break_the_picture(text: str, copied: Path) -> None:
    with_samples(*({text or "prompt": text, f"{text} again": text} for _ in range(30)))
    figure = drawn("samples")
    width, _ = figure.canvas.get_width_height()
    assert all(box.x1 <= width for box in boxes(texts(figure)))
    if "$" in text:
        assert any(text in said for said in words(figure))


def test_samples_go_from_the_first_to_the_last_and_then_to_other_prompts(copied: Path) -> None:
    with_samples(*({"One": f"answer {i}", "Two": f"other {i}"} for i in range(1, 101)))
    said = [word.strip() for word in words(drawn("samples"))]
    answers = [word for word in said if word.startswith("answer ")]
    assert answers[0] == "answer 1" and answers[-1] == "answer 100"
    assert 5 < len(answers) < 30
    assert [word for word in said if word.startswith("other ")] == ["other 100"]


def test_one_line_has_only_what_can_be_seen() -> None:
    assert one_line(" a\n\n b\t\x00\x1b[0m c\u202e ") == "a b [0m c"
    assert one_line("\u65e5 \U0001f642 \u00e9 \u03b1 \N{RIGHTWARDS ARROW}") == (
        "\N{WHITE SQUARE} \N{WHITE SQUARE} \u00e9 \u03b1 \N{RIGHTWARDS ARROW}"
    )


@pytest.mark.parametrize(("value", "expected"), [
    (0, "0"), (7, "7"), (0.25, "0.25"), (999, "999"), (1000, "1k"), (999_960, "1M"),
    (2_470_000_000, "2.47B"), (2e-4, "2e-4"), (-1.5, "-1.5"), (1e-6, "1e-6"), (0.01, "0.01"),
])  # fmt: skip
def test_numbers_are_short(value: float, expected: str) -> None:
    assert short(value) == expected


@pytest.mark.parametrize(("hours", "expected"), [
    (0, "0 s"), (0.01, "36 s"), (0.5, "30 min"), (0.999, "1.0 h"), (26.4, "26.4 h"),
    (71.8, "3 d 0 h"), (105.04, "4 d 9 h"),
])  # fmt: skip
def test_times_are_short(hours: float, expected: str) -> None:
    assert duration(hours) == expected


# ------------------------------------------------------------------------------ the command line


def test_v4s_pictures_are_written_where_its_metrics_are(
    full: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(full)
    assert call("--v4") == 0
    assert capsys.readouterr() == ("logs/plots/dashboard_v4.png\n", "")
    with Image.open("logs/plots/dashboard_v4.png") as picture:
        assert picture.size == (1600, 1600)
        colours = picture.convert("RGB").getcolors(10_000)
    assert colours is not None
    assert max(colours)[1] == (255, 255, 255)  # a light background
    near = np.array([colour for _, colour in colours])
    for colour in COLOURS.values():  # each stage's bar has its colour, or nearly
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert np.abs(near - wanted).max(axis=1).min() <= 14


def test_another_recipe_and_single_plots(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.rename("logs", "elsewhere")
    changed = "base.log=elsewhere/pretrain_v4_base"
    options = ("--set", changed, "--set", "name=mine", "--out", "pictures")
    assert call(*options, "--plot", "loss", "--plot", "samples", "--plot", "loss") == 0
    assert capsys.readouterr().out == "pictures/loss_mine.png\npictures/samples_mine.png\n"
    assert call(*options[:2], "--plot", "stages", "--dashboard") == 0
    assert capsys.readouterr().out.splitlines() == [
        "elsewhere/plots/dashboard_v4.png", "elsewhere/plots/stages_v4.png",
    ]  # fmt: skip


def test_an_unknown_plot_is_told_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--plot", "los") == 2
    assert capsys.readouterr().err == (
        "error: --plot: there is no 'los' (did you mean 'loss'?): give one of "
        f"{', '.join(PANELS)}, or all\n"
    )


def test_where_nothing_was_trained_it_says_what_it_looked_for_and_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("--recipe", "tiny") == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "error: nothing to draw yet, no rows in any of logs/tiny/base_metrics.csv"
    )
    assert "`python train_pretrain.py --fresh --recipe tiny`" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_metrics_file_and_a_folder_that_is_none_are_told(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--out", str(BASE), "--plot", "loss") == 2
    assert capsys.readouterr().err == (
        f"error: {BASE}/loss_v4.png: can't be written: File exists; see --out\n"
    )
    BASE.write_text("a,b\n1,2\n", encoding="utf-8")
    assert call() == 2
    assert capsys.readouterr().err == (
        f"error: {BASE}: not a metrics file, it has no column 'step'\n"
    )


@pytest.mark.parametrize("seconds", ["0", "-5", "nan", "1e9"])
def test_live_wants_a_sensible_time(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--live", seconds) == 2
    assert "--live must be from 1 to 86400 seconds" in capsys.readouterr().err


def test_live_waits_draws_anew_bears_trouble_and_leaves_politely(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = BASE.read_text(encoding="utf-8")
    half = text[: len(text) // 2]
    pictures: list[bytes] = []
    contents = iter(["not,metrics\n1,2\n", half, half, text])
    BASE.unlink()

    def sleep(seconds: float) -> None:
        assert seconds == 30
        if Path("logs/plots/loss_v4.png").exists():
            pictures.append(Path("logs/plots/loss_v4.png").read_bytes())
        content = next(contents, None)
        if content is None:
            raise KeyboardInterrupt
        BASE.write_text(content, encoding="utf-8")

    monkeypatch.setattr(time, "sleep", sleep)
    assert call("--live", "30", "--plot", "loss") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "waiting for the first metrics (Ctrl-C leaves)",
        f"{BASE}: not a metrics file, it has no column 'step' (Ctrl-C leaves)",
        "every 30 seconds anew: logs/plots/loss_v4.png (Ctrl-C leaves)",
        "",
        "bye",
    ]
    assert err == ""
    assert len(pictures) == 3 and pictures[0] == pictures[1] != pictures[2]
