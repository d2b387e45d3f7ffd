"""Draw how training goes, from the metrics and samples in logs/.

python plot_training.py --v4                      the dashboard of all five stages
python plot_training.py --recipe tiny             that of the demo
python plot_training.py --plot loss --plot dpo    single plots, larger; --plot all draws each
python plot_training.py --v4 --live               again every minute, until Ctrl-C

The pictures are written beside the metrics, v4's into logs/plots/; they can be drawn at any time,
while the run goes on too. Dashed lines are held-out data, pale bands the spread between rows, red
triangles spikes, red crosses rows without one finite loss. How the projection is made, and what its
band means: hamner/plots/projection.py.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path
from typing import Any, NoReturn

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from PIL import Image

from hamner.errors import UserError, nearest, run
from hamner.files import write_bytes_whole
from hamner.plots.drawing import GREY, STYLE
from hamner.plots.metrics import read_metrics, read_samples
from hamner.plots.panels import PANELS, Run
from hamner.plots.standing import standings
from hamner.recipe import STAGES, Recipe, load_recipe
from hamner.stage import command

DASHBOARD_INCHES, PLOT_INCHES, TABLE_INCHES = (16.0, 16.0), (14.0, 8.0), (16.0, 2.7)
DPI = 100
ROW_HEIGHTS = (2.6, 2.1, 2.8)  # of the rows below the table, in proportion
DASHBOARD = {  # panel: its row, and its columns of twelve
    "loss": (0, slice(0, 6)),
    "tokens": (0, slice(6, 12)),
    "learning_rate": (1, slice(0, 4)),
    "throughput": (1, slice(4, 8)),
    "dpo": (1, slice(8, 12)),
    "projection": (2, slice(0, 4)),
    "samples": (2, slice(4, 12)),
}


def read_run(recipe: Recipe) -> Run:
    """What the stages of a recipe have written so far.

    Raises:
        UserError: a file that isn't what it should be.
    """
    found = {stage: read_metrics(recipe.log(stage, "metrics.csv")) for stage in STAGES}
    metrics = {stage: rows for stage, rows in found.items() if rows is not None}
    samples = {stage: read_samples(recipe.log(stage, "samples.jsonl")) for stage in STAGES}
    return Run(recipe, metrics, samples, standings(recipe, metrics))


def check_begun(state: Run, recipe_name: str) -> None:
    if state.metrics:
        return
    paths = ", ".join(str(state.recipe.log(stage, "metrics.csv")) for stage in STAGES)
    raise UserError(
        f"nothing to draw yet, no rows in any of {paths}: train with "
        f"`{command('base', recipe_name)}` first, or name another recipe with --recipe"
    )


# ------------------------------------------------------------------------------ figures


def new_figure(inches: tuple[float, float], state: Run) -> Figure:
    figure = Figure(figsize=inches, dpi=DPI)
    width, height = inches
    size = state.recipe.model.config().num_parameters()
    last = max(rows.written for rows in state.metrics.values())
    top = 1 - 0.32 / height
    title = f"Chat Hamner, recipe {state.recipe.name}"
    figure.text(0.55 / width, top, title, fontsize=19, fontweight="bold", va="center")
    about = f"{size / 1e6:,.1f}M parameters, as of {last:%Y-%m-%d %H:%M} UTC"
    figure.text(1 - 0.3 / width, top, about, color=GREY, ha="right", va="center")
    return figure


def grid(
    figure: Figure, rows: int, columns: int, top: float, bottom: float, **more: Any
) -> GridSpec:
    """A grid from `top` to `bottom` (inches from the top), with room for the marks of the axes."""
    width, height = figure.get_size_inches()
    return figure.add_gridspec(
        rows, columns, left=0.55 / width, right=1 - 0.3 / width, top=1 - top / height,
        bottom=1 - bottom / height, **more,
    )  # fmt: skip


def dashboard(state: Run) -> Figure:
    figure = new_figure(DASHBOARD_INCHES, state)
    table_end, end = TABLE_INCHES[1], DASHBOARD_INCHES[1] - 0.65
    PANELS["stages"](figure, grid(figure, 1, 1, 0.6, table_end)[0, 0], state)
    panels = grid(
        figure, len(ROW_HEIGHTS), 12, table_end + 0.55, end, height_ratios=ROW_HEIGHTS,
        hspace=0.3, wspace=1.0,
    )  # fmt: skip
    for name, (row, columns) in DASHBOARD.items():
        PANELS[name](figure, panels[row, columns], state)
    return figure


def plot(name: str, state: Run) -> Figure:
    inches = TABLE_INCHES if name == "stages" else PLOT_INCHES
    top, below = (0.6, 0.0) if name == "stages" else (1.1, 0.65)
    figure = new_figure(inches, state)
    PANELS[name](figure, grid(figure, 1, 1, top, inches[1] - below)[0, 0], state)
    return figure


def write_pictures(state: Run, names: list[str], folder: Path) -> list[Path]:
    """Draw the dashboard (of that name) and single plots; returns their files, written whole."""
    paths = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what somebody's matplotlibrc says
        matplotlib.rcParams.update(STYLE)
        for name in names:
            figure = dashboard(state) if name == "dashboard" else plot(name, state)
            paths.append(folder / f"{name}_{state.recipe.name}.png")
            write_picture(paths[-1], png(figure))
    return paths


def png(figure: Figure) -> bytes:
    """The picture in 256 colours, each within some 5 % of its own: a third of the size."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    few = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    few.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def write_picture(path: Path, data: bytes) -> None:
    try:
        write_bytes_whole(path, [data])
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}; see --out") from None


# ------------------------------------------------------------------------------ the command line


def chosen_names(arguments: argparse.Namespace) -> list[str]:
    """The pictures that were asked for, each once."""
    names: list[str] = []
    for name in arguments.plot:
        if name not in (*PANELS, "all"):
            known = ", ".join(PANELS)
            guess = nearest(name, PANELS)
            raise UserError(f"--plot: there is no {name!r}{guess}: give one of {known}, or all")
        names += PANELS if name == "all" else [name]
    if arguments.dashboard or not names:
        names.insert(0, "dashboard")
    return list(dict.fromkeys(names))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="v4", help="name in recipes/, or path (default: v4)")
    parser.add_argument(
        "--v4", action="store_const", const="v4", dest="recipe", help="the same as --recipe v4"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a field of the recipe, as it was trained with; repeatable",
    )  # fmt: skip
    parser.add_argument("--dashboard", action="store_true", help="all in one picture (the default)")
    parser.add_argument(
        "--plot", action="append", default=[], metavar="NAME",
        help=f"a picture of one thing: {', '.join(PANELS)}, or all; repeatable",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the pictures go")
    parser.add_argument(
        "--live", nargs="?", const=60.0, type=float, metavar="SECONDS",
        help="draw again every so many seconds (60), until Ctrl-C",
    )  # fmt: skip
    return parser.parse_args()


def watch(recipe: Recipe, names: list[str], folder: Path, seconds: float) -> NoReturn:
    """Draw again and again, until Ctrl-C; what stands in the way may be gone the next time."""
    told = ""
    while True:
        try:
            state = read_run(recipe)
            news = "waiting for the first metrics"
            if state.metrics:
                paths = write_pictures(state, names, folder)
                news = f"every {seconds:g} seconds anew: {', '.join(map(str, paths))}"
        except UserError as error:
            news = str(error)
        if news != told:
            print(f"{news} (Ctrl-C leaves)", flush=True)
        told = news
        time.sleep(seconds)


def main() -> int:
    arguments = parse_arguments()
    names = chosen_names(arguments)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    folder = arguments.out or recipe.log("base", "metrics.csv").parent / "plots"
    if arguments.live is not None:
        if not 1 <= arguments.live <= 86_400:
            raise UserError(f"--live must be from 1 to 86400 seconds, got {arguments.live:g}")
        try:
            watch(recipe, names, folder, arguments.live)
        except KeyboardInterrupt:
            print("\nbye")
            return 0
    state = read_run(recipe)
    check_begun(state, arguments.recipe)
    for path in write_pictures(state, names, folder):
        print(path)
    return 0


if __name__ == "__main__":
    run(main)
