"""Tests of what a run leaves to look at: metrics, samples, progress, times."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from hamner import tracking
from hamner.files import write_text_whole
from hamner.tracking import MetricsCSV, Progress, SamplesJSONL, Stopwatch, TensorBoard

COLUMNS = ("timestamp", "step", "loss", "val_loss")


def row(step: int) -> dict[str, Any]:
    return {"timestamp": "2025-01-02T03:04:05+00:00", "step": step, "loss": 3.5 / step,
            "val_loss": 12.0625 + step}  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def steps(path: Path) -> list[int]:
    return [int(line["step"]) for line in read(path)]


def written(path: Path, *numbers: int) -> MetricsCSV:
    """A new metrics file with a row for each of the steps."""
    metrics = MetricsCSV(path, COLUMNS, step=0)
    for number in numbers:
        metrics.write(row(number))
    return metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "base_metrics.csv"


# ------------------------------------------------------------------------------- metrics


def test_metrics_have_one_row_per_step_under_one_header(path: Path) -> None:
    written(path, 1, 2, 3)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "timestamp,step,loss,val_loss"
    assert lines[1:] == [
        "2025-01-02T03:04:05+00:00,1,3.5,13.0625",
        "2025-01-02T03:04:05+00:00,2,1.75,14.0625",
        "2025-01-02T03:04:05+00:00,3,1.16667,15.0625",
    ]


def test_values_that_a_row_has_not_got_stay_empty(path: Path) -> None:
    written(path).write({"step": 4, "loss": float("inf")})
    assert read(path) == [{"timestamp": "", "step": "4", "loss": "inf", "val_loss": ""}]


def test_each_row_is_on_the_disk_as_soon_as_it_is_written(path: Path) -> None:
    metrics = written(path)
    for number in (1, 2, 3):
        metrics.write(row(number))
        assert steps(path) == list(range(1, number + 1))


def test_going_on_drops_the_rows_after_the_step_and_keeps_the_earlier_ones(path: Path) -> None:
    written(path, 2, 4, 6, 8, 10)
    before = read(path)
    metrics = MetricsCSV(path, COLUMNS, step=6)
    assert read(path) == before[:3]
    metrics.write(row(7))
    assert steps(path) == [2, 4, 6, 7]
    assert path.read_text(encoding="utf-8").count("timestamp") == 1


def test_going_on_again_and_again_changes_nothing_more(path: Path) -> None:
    written(path, 1, 2, 3)
    before = path.read_bytes()
    for _ in range(3):
        MetricsCSV(path, COLUMNS, step=3)
    assert path.read_bytes() == before


def test_beginning_anew_begins_with_an_empty_table(path: Path) -> None:
    written(path, 1, 2, 3)
    MetricsCSV(path, COLUMNS, step=0)
    assert path.read_text(encoding="utf-8").splitlines() == [",".join(COLUMNS)]


def test_going_on_without_a_file_begins_one(path: Path) -> None:
    MetricsCSV(path, COLUMNS, step=5).write(row(6))
    assert steps(path) == [6]


def test_going_on_with_other_columns_keeps_what_fits(path: Path) -> None:
    written(path, 1)
    metrics = MetricsCSV(path, ["step", "loss", "accuracy"], step=1)
    metrics.write({"step": 2, "loss": 0.5, "accuracy": 0.25})
    assert read(path) == [
        {"step": "1", "loss": "3.5", "accuracy": ""},
        {"step": "2", "loss": "0.5", "accuracy": "0.25"},
    ]


def test_a_last_row_cut_at_any_byte_never_leaves_a_wrong_row(path: Path) -> None:
    """A row that is not whole goes, whatever its step; all before it stay."""
    written(path, 1, 2)
    start = path.stat().st_size
    MetricsCSV(path, COLUMNS, step=2).write(row(123))
    whole, rows = path.read_bytes(), read(path)
    assert len(rows) == 3
    wrong = []
    for length in range(start, len(whole)):
        path.write_bytes(whole[:length])
        MetricsCSV(path, COLUMNS, step=1_000).write(row(1_001))
        kept = read(path)
        assert (kept[:2], kept[-1]["step"]) == (rows[:2], "1001")
        if kept[2:-1] not in ([], rows[2:]):
            wrong.append(kept[2:-1])
    assert not wrong


def test_a_file_cut_at_any_byte_before_its_rows_begins_anew(path: Path) -> None:
    written(path)
    header = path.read_bytes()
    for length in range(len(header)):
        path.write_bytes(header[:length])
        MetricsCSV(path, COLUMNS, step=5).write(row(6))
        assert steps(path) == [6]


# ------------------------------------------------------------------------------- samples


@pytest.fixture
def samples_path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "base_samples.jsonl"


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def with_samples(path: Path, texts: dict[int, str]) -> SamplesJSONL:
    samples = SamplesJSONL(path, step=0)
    for step, text in texts.items():
        samples.write(step, step * 1_000, {"Once upon": text})
    return samples


def test_samples_are_one_json_object_per_occasion(samples_path: Path) -> None:
    with_samples(samples_path, {10: 'a "time"\nand so', 20: "naïve 日本"})
    one, two = records(samples_path)
    assert set(one) == {"timestamp", "step", "tokens_total", "samples"}
    assert (one["step"], one["tokens_total"]) == (10, 10_000)
    assert one["samples"] == {"Once upon": 'a "time"\nand so'}
    assert two["samples"] == {"Once upon": "naïve 日本"}
    assert "日本" in samples_path.read_text(encoding="utf-8")


def test_samples_after_the_step_are_dropped_and_the_earlier_ones_kept(samples_path: Path) -> None:
    with_samples(samples_path, {10: "a", 20: "b", 30: "c"})
    before = records(samples_path)
    SamplesJSONL(samples_path, step=20).write(25, 25_000, {})
    assert records(samples_path)[:2] == before[:2]
    assert [record["step"] for record in records(samples_path)] == [10, 20, 25]


def test_samples_begin_anew_with_the_run(samples_path: Path) -> None:
    with_samples(samples_path, {10: "a"})
    SamplesJSONL(samples_path, step=0)
    assert samples_path.read_bytes() == b""
    samples_path.unlink()
    SamplesJSONL(samples_path, step=9)
    assert samples_path.read_bytes() == b""


@pytest.mark.parametrize("text", ["plain words", "naïve 日本 🙂"])
def test_samples_cut_at_any_byte_of_the_last_record_keep_the_earlier_ones(
    samples_path: Path, text: str
) -> None:
    with_samples(samples_path, {10: text})
    start = samples_path.stat().st_size
    SamplesJSONL(samples_path, step=10).write(20, 20_000, {"Once upon": text})
    whole, before = samples_path.read_bytes(), records(samples_path)
    for length in range(start, len(whole)):
        samples_path.write_bytes(whole[:length])
        SamplesJSONL(samples_path, step=1_000).write(1_001, 1, {})
        kept = records(samples_path)
        assert kept[0] == before[0] and kept[-1]["step"] == 1_001
        assert kept[1:-1] in ([], before[1:])


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_samples_with_odd_line_ends_in_them_are_kept(samples_path: Path, character: str) -> None:
    with_samples(samples_path, {10: f"one{character}two"})
    before = records(samples_path)
    SamplesJSONL(samples_path, step=10)
    assert records(samples_path) == before


# ------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_gets_the_numbers_of_a_row_and_samples_as_they_are(
    tmp_path: Path,
) -> None:
    board = TensorBoard(tmp_path, step=0)
    for step in (2, 4):
        board.write({"timestamp": "2025-01-02", "step": step, "loss": 2.5 * step, "mfu": ""})
        board.write_samples(step, {"Once": "# a\n* b"})
    seen = EventAccumulator(str(tmp_path)).Reload()  # what is written can be read at once
    assert set(seen.Tags()["tensors"]) == {"loss", "samples/Once/text_summary"}
    losses = {event.step: make_ndarray(event.tensor_proto) for event in seen.Tensors("loss")}
    assert losses == {2: 5, 4: 10}
    *_, text = seen.Tensors("samples/Once/text_summary")
    assert text.tensor_proto.string_val[0] == b"    # a\n    * b"  # Markdown for: as it is
    board.close()


# ------------------------------------------------------------------------------- whole files


def test_a_text_file_is_written_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    for text in ("one\r\ntwo\n日本", "shorter", ""):
        write_text_whole(path, text)
        assert path.read_bytes() == text.encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_text_file_stays_as_it_was_where_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file.txt"
    write_text_whole(path, "old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_text_whole(path, "new, and longer")
    assert path.read_text(encoding="utf-8") == "old"


# ------------------------------------------------------------------------------- times


class Clock:
    """Stands in for time.perf_counter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.time = 100.0
        monkeypatch.setattr(tracking.time, "perf_counter", lambda: self.time)

    def work(self, seconds: float, result: Any = None) -> Any:
        self.time += seconds
        return result


def test_a_stopwatch_measures_from_lap_to_lap(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watch = Stopwatch()
    laps = []
    for seconds in (3.0, 0.5, 0.0):
        clock.work(seconds)
        laps.append(watch.lap())
    assert laps == [3.0, 0.5, 0.0]


def test_paused_work_is_not_counted_and_its_result_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    watch = Stopwatch()
    clock.work(2)
    assert watch.paused(lambda: clock.work(50, "result")) == "result"
    clock.work(3)
    watch.paused(lambda: clock.work(70))
    assert watch.lap() == 5
    clock.work(1)
    assert watch.lap() == 1


# ------------------------------------------------------------------------------- progress


def test_progress_is_lines_of_text_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Progress("base", 41, 1_500)
    progress.advance()
    progress.report(2.34567, 12_345.6, 0.4)
    progress.report(1.0, 10.0, None)
    progress.say("base step 42: val_loss 2.5")
    progress.close()
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "base step 42/1,500: loss 2.3457, 12,346 tok/s, MFU 40%",
        "base step 42/1,500: loss 1.0000, 10 tok/s",
        "base step 42: val_loss 2.5",
    ]
    assert captured.err == ""


def test_the_time_now_says_its_zone() -> None:
    assert tracking.now().endswith("+00:00") and len(tracking.now()) == 25
