"""Reading metrics and samples as runs leave them, and thinning curves to what can be seen."""

from __future__ import annotations

import csv
import io
import json
import math
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hamner.errors import UserError
from hamner.plots.metrics import Metrics, Samples, Series, binned, read_metrics, read_samples
from hamner.tracking import MetricsCSV, SamplesJSONL

HEADER = "timestamp,step,loss,tokens_total,val_loss\n"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs") / "base_metrics.csv"


def read(path: Path, text: str) -> Metrics | None:
    path.write_bytes(text.encode())
    return read_metrics(path)


def columns(metrics: Metrics | None) -> dict[str, dict[float, float]]:
    """Values by step of the columns that have any."""
    assert metrics is not None
    pairs = {name: dict(zip(*series, strict=True)) for name, series in metrics.columns.items()}
    return {name: values for name, values in pairs.items() if values}


# ------------------------------------------------------------------------------ metrics


def test_what_the_training_loop_writes_is_read(path: Path) -> None:
    writer = MetricsCSV(path, ["timestamp", "step", "loss", "tokens_total", "mfu", "val_loss"], 0)
    time = "2026-03-01T12:30:00+02:00"
    writer.write({"timestamp": time, "step": 10, "loss": 2.5, "tokens_total": 100, "mfu": ""})
    writer.write({"timestamp": time, "step": 15, "val_loss": 2.75})
    writer.write({"timestamp": time, "step": 20, "loss": 1.23456789e-7, "tokens_total": 1_000_000})
    metrics = read_metrics(path)
    assert columns(metrics) == {
        "loss": {10: 2.5, 20: 1.23457e-7},
        "tokens_total": {10: 100, 20: 1_000_000},
        "val_loss": {15: 2.75},
    }
    assert metrics is not None
    assert metrics.step == 20
    assert metrics.written == datetime(2026, 3, 1, 10, 30, tzinfo=timezone.utc)
    assert metrics.written.tzinfo is timezone.utc
    assert metrics.last("val_loss") == 2.75
    assert metrics.last("mfu") is None and metrics.last("unheard_of") is None
    assert len(metrics.series("unheard_of").x) == 0


def as_it_stands(rows: list[tuple[int, str]]) -> dict[float, float]:
    """What a run's file means: at a row of step N, all that was written of later steps is void."""
    true: dict[float, float] = {}
    for step, loss in rows:
        true = {earlier: value for earlier, value in true.items() if earlier <= step}
        if loss:
            true[step] = float(loss)
    return true


ROWS = st.lists(st.tuples(st.integers(1, 12), st.sampled_from(["", "1.5", "2", "3e-4", "-7"])))


@given(ROWS)
@settings(max_examples=150, deadline=None)
def test_rows_that_a_resumed_run_went_back_behind_do_not_count(
    path: Path, rows: list[tuple[int, str]]
) -> None:
    metrics = read(path, HEADER + "".join(f",{step},{loss},,\n" for step, loss in rows))
    assert (metrics is None) == (not rows)
    if metrics is not None:
        assert metrics.step == rows[-1][0]
        assert columns(metrics).get("loss", {}) == as_it_stands(rows)


def test_a_file_cut_at_any_byte_gives_the_rows_before_the_cut(path: Path) -> None:
    text = HEADER + ",10,2.5,100,\n,20,nan,200,2.25\n,30,1.125,300,\n"
    ends = [i + 1 for i, character in enumerate(text) if character == "\n"]
    for length in range(len(text)):
        whole = text[: max([end for end in ends if end <= length], default=0)]
        expected = [row["step"] for row in csv.DictReader(io.StringIO(whole))]
        metrics = read(path, text[:length])
        assert (metrics and str(metrics.step)) == (expected[-1] if expected else None)


@pytest.mark.parametrize("line", [
    "2026-01-01,15,9", ",15,9,9,9,9", ",,9,9,9", ",step,loss,tokens_total,val_loss", "\0\0\0\0",
    ",15.x,9,9,9", ',"15,9,9', "", ",nan,9,9,9", ",15,9,9,2026-01-01T00:00:00+00:00,20,9,9,9",
])  # fmt: skip
def test_a_damaged_line_is_left_out_alone(path: Path, line: str) -> None:
    metrics = read(path, f"{HEADER},10,2.5,100,3\n{line}\n,20,2.25,200,2\r\n")
    assert columns(metrics) == {
        "loss": {10: 2.5, 20: 2.25}, "tokens_total": {10: 100, 20: 200}, "val_loss": {10: 3, 20: 2},
    }  # fmt: skip


def test_what_is_not_finite_is_kept_as_nan_and_what_is_no_number_is_missing(path: Path) -> None:
    rows = ",1,nan,,\n,2,inf,,\n,3,-inf,,\n,4,NaN,,\n,5,,,\n,6,abc,,\n,7,1e3,,\n"
    metrics = read(path, HEADER + rows)
    assert metrics is not None
    steps, losses = metrics.series("loss")
    assert list(steps) == [1, 2, 3, 4, 7]
    assert [math.isnan(loss) for loss in losses] == [True] * 4 + [False]
    assert metrics.series("loss").finite().y.tolist() == [1000]


def test_of_two_rows_for_a_step_the_later_one_counts_where_it_says_something(path: Path) -> None:
    metrics = read(path, HEADER + ",10,2.5,100,\n,10,,,3\n,20,2,200,\n,20,1,,4\n")
    assert columns(metrics) == {
        "loss": {10: 2.5, 20: 1}, "tokens_total": {10: 100, 20: 200}, "val_loss": {10: 3, 20: 4},
    }  # fmt: skip


def test_tokens_of_a_row_without_them_lie_between_those_of_its_neighbours(path: Path) -> None:
    metrics = read(path, HEADER + ",10,2.5,100,\n,15,,,3\n,20,2,200,\n,25,,,2\n")
    assert metrics is not None
    x, y = metrics.over("tokens_total", "val_loss")
    assert (x.tolist(), y.tolist()) == ([150, 200], [3, 2])
    assert len(metrics.over("elapsed_hours", "val_loss").x) == 0


def test_a_counter_that_another_writer_began_anew_does_not_run_backwards(path: Path) -> None:
    metrics = read(path, HEADER + ",10,3,100,\n,20,2,200,\n,30,2,50,\n,40,2,300,\n")
    assert metrics is not None
    assert metrics.over("tokens_total", "loss").x.tolist() == [100, 200, 200, 300]


def test_columns_in_another_order_and_without_timestamps(path: Path) -> None:
    metrics = read(path, "\ufeffloss,step\n2.5,10\n2.25,20\n")
    assert columns(metrics) == {"loss": {10: 2.5, 20: 2.25}}
    assert metrics is not None
    changed = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
    assert abs((metrics.written - changed).total_seconds()) < 1


@pytest.mark.parametrize("text", ["", "timestamp,st", HEADER, HEADER + ",10", "\n", ",,\n,,\n"[:3]])
def test_a_file_without_rows_is_a_run_that_has_not_begun(path: Path, text: str) -> None:
    assert read(path, text) is None


def test_no_file_is_a_run_that_has_not_begun(path: Path) -> None:
    assert read_metrics(path.with_name("none.csv")) is None
    assert read_samples(path.with_name("none.jsonl")) == []


def test_a_file_of_something_else_is_refused_by_name(path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(path, "name,age\nAl,1\n")
    assert str(error.value) == f"{path}: not a metrics file, it has no column 'step'"
    with pytest.raises(UserError, match=r"can't be read: Is a directory$"):
        read_metrics(path.parent)


# ------------------------------------------------------------------------------ samples


def test_samples_of_a_resumed_run_are_read_once_and_damaged_lines_left_out(path: Path) -> None:
    file = path.with_name("base_samples.jsonl")
    writer = SamplesJSONL(file, 0)
    for step, text in ((10, "a"), (20, "b\u2028c"), (30, "lost"), (20, "d"), (30, "e")):
        writer.write(step, step, {"Once": text})
    lines = file.read_text(encoding="utf-8")
    damage = ['{"step": 25, "sam', "[1]", '{"step": 26}', '{"step": 27, "samples": {}}', "\0", "1"]
    half = json.dumps({"step": 40, "samples": {"Once": "half"}})
    file.write_text(lines + "\n".join([*damage, half]), encoding="utf-8")
    texts = {10: "a", 20: "d", 30: "e"}
    assert read_samples(file) == [Samples(step, {"Once": text}) for step, text in texts.items()]


# ------------------------------------------------------------------------------ curves

VALUES = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=60)


@given(VALUES, st.integers(1, 20), st.booleans())
@settings(max_examples=200, deadline=None)
def test_each_bin_has_the_median_and_the_extremes_of_its_values(
    values: list[float], bins: int, log: bool
) -> None:
    x, y = np.arange(1.0, len(values) + 1), np.array(values)
    curve = binned(Series(x, y), bins, log=log)
    if len(values) <= bins:
        np.testing.assert_array_equal(curve.middle, y)
        return
    assert len(curve.x) <= bins
    along = np.log(x) if log else x
    edges = np.linspace(along[0], along[-1], bins + 1)[:-1]
    numbers = np.searchsorted(edges, along, side="right")
    parts = [y[numbers == number] for number in np.unique(numbers)]
    assert len(parts) == len(curve.x)
    for part, middle, low, high in zip(parts, *curve[1:], strict=True):
        finite = part[np.isfinite(part)]
        expected = [np.median(finite), finite.min(), finite.max()] if len(finite) else [np.nan] * 3
        np.testing.assert_allclose([middle, low, high], expected, rtol=1e-12)


def test_a_spike_widens_the_band_and_leaves_the_line_where_it_is() -> None:
    y = np.full(10_000, 3.0)
    y[5_000] = 900.0
    curve = binned(Series(np.arange(10_000.0), y), 100)
    assert curve.high.max() == 900 and (curve.middle == 3).all() and (curve.low == 3).all()


def test_on_a_logarithmic_axis_the_beginning_keeps_its_points() -> None:
    x = np.arange(0.0, 100_000, 50)
    curve = binned(Series(x, x), 120, log=True)
    assert curve.x[:3].tolist() == [50, 100, 150]  # 0 has no logarithm
    assert len(curve.x) <= 120 and curve.x[-1] > 95_000


def test_a_series_that_is_not_in_order_is_put_in_order() -> None:
    curve = binned(Series(np.array([3.0, 1.0, 2.0]), np.array([30.0, 10.0, 20.0])), 5)
    assert (curve.x.tolist(), curve.middle.tolist()) == ([1, 2, 3], [10, 20, 30])
