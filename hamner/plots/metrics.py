"""Reading what runs wrote: metrics CSVs and samples, as they are found while a run goes on.

A file may end in the middle of a line, hold steps that a resumed run went through again, lack
columns, or be replaced while it is read. What is read here is what counts of it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv as arrow_csv

from hamner.errors import UserError, first_line

Floats = NDArray[np.float64]
NUMBER = r"(?i)^[+-]?(\d+\.?\d*([eE][+-]?\d+)?|nan|inf)$"


class Series(NamedTuple):
    """A column over steps, tokens or hours; nan where something not finite was logged."""

    x: Floats
    y: Floats

    def finite(self) -> Series:
        return self.where(np.isfinite(self.y))

    def where(self, chosen: NDArray[np.bool_]) -> Series:
        return Series(self.x[chosen], self.y[chosen])


EMPTY = Series(np.empty(0), np.empty(0))


@dataclass(frozen=True)
class Metrics:
    """The rows of a metrics file, one a step; each column as steps and values, where it has any."""

    step: int  # the last one
    columns: dict[str, Series]
    written: datetime  # when the last row was

    def series(self, name: str) -> Series:
        """A column over the steps; empty if there is none of that name."""
        return self.columns.get(name, EMPTY)

    def over(self, counter: str, name: str) -> Series:
        """A column over one that only grows (tokens, hours), which is interpolated by steps."""
        steps, counts = self.series(counter).finite()
        column = self.series(name)
        if not len(steps) or not len(column.x):
            return EMPTY
        return Series(np.interp(column.x, steps, np.maximum.accumulate(counts)), column.y)

    def last(self, name: str) -> float | None:
        """The last finite value of a column."""
        values = self.series(name).finite().y
        return float(values[-1]) if len(values) else None


def read_metrics(path: Path) -> Metrics | None:
    """The rows of a metrics file that count; None if there are none yet.

    Left out: a last line without an end, lines with too few or too many values, rows without a
    step, and rows from a step on to which a resumed run went back.

    Raises:
        UserError: the file isn't a table of metrics.
    """
    header, _, rows = whole_lines(path).partition("\n")
    names = next(csv.reader([header]), [])
    if not rows:
        return None
    if "step" not in names:
        raise UserError(f"{path}: not a metrics file, it has no column 'step'")
    try:
        table = as_table(rows, len(names))
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a metrics file: {first_line(error)}") from None
    columns = dict(zip(names, table.columns, strict=True))
    steps = as_numbers(columns.pop("step"))
    chosen = np.flatnonzero(still_true(steps))
    if not len(chosen):
        return None
    written = last_time(columns.pop("timestamp", None), int(chosen[-1]), path)
    numbers = {name: column_series(column, steps, chosen) for name, column in columns.items()}
    return Metrics(int(steps[chosen[-1]]), numbers, written)


def whole_lines(path: Path) -> str:
    """A file up to its last end of line; nothing if it isn't there."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    return data[: data.rfind(b"\n") + 1].decode("utf-8-sig", "replace")


def as_table(rows: str, width: int) -> pa.Table:
    """The values as text; null where there is none. Lines of another width are skipped."""
    names = [str(number) for number in range(width)]
    return arrow_csv.read_csv(
        pa.BufferReader(rows.encode()),
        read_options=arrow_csv.ReadOptions(column_names=names),
        parse_options=arrow_csv.ParseOptions(
            quote_char=False, invalid_row_handler=lambda row: "skip"
        ),
        convert_options=arrow_csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            strings_can_be_null=True,
            null_values=[""],
        ),
    )


def as_numbers(column: pa.ChunkedArray) -> Floats:
    """The column as numbers: nan where there is none, inf where it isn't finite."""
    try:
        values = pc.cast(column, pa.float64())
    except pa.ArrowInvalid:
        numeric = pc.match_substring_regex(column, NUMBER)
        values = pc.cast(pc.if_else(numeric, column, None), pa.float64())
    written = pc.is_valid(values).to_numpy()
    found: Floats = values.to_numpy().copy()
    found[written & ~np.isfinite(found)] = np.inf
    return found


def still_true(steps: Floats) -> NDArray[np.bool_]:
    """Which rows are part of the run as it is now, not of an attempt that it went back behind."""
    known = np.isfinite(steps)
    lowest_to_come = np.minimum.accumulate(np.where(known, steps, np.inf)[::-1])[::-1]
    return known & (steps <= lowest_to_come)


def column_series(column: pa.ChunkedArray, steps: Floats, chosen: NDArray[np.intp]) -> Series:
    """A column's values by step; of several for a step the last."""
    values = as_numbers(column)
    rows = chosen[~np.isnan(values[chosen])]
    x, y = steps[rows], values[rows]
    y[np.isinf(y)] = np.nan
    last = np.append(np.diff(x) > 0, True)[: len(x)]
    return Series(x[last], y[last])


def last_time(timestamps: pa.ChunkedArray | None, row: int, path: Path) -> datetime:
    """When a row was written; where it doesn't say so, when the file was."""
    text = timestamps[row].as_py() if timestamps is not None else None
    try:
        return datetime.fromisoformat(text or "").astimezone(timezone.utc)
    except ValueError:
        changed = path.stat().st_mtime if path.exists() else 0.0
        return datetime.fromtimestamp(changed, timezone.utc)


# ------------------------------------------------------------------------------ samples


class Samples(NamedTuple):
    """What the model said at a step, by prompt."""

    step: int
    texts: dict[str, str]


def read_samples(path: Path) -> list[Samples]:
    """The samples of a run, by step, without damaged lines and those that it went back behind."""
    found: list[Samples] = []
    for samples in parsed_samples(whole_lines(path)):
        while found and found[-1].step >= samples.step:
            found.pop()
        found.append(samples)
    return found


def parsed_samples(lines: str) -> Iterator[Samples]:
    for line in lines.split("\n"):
        try:
            record = json.loads(line)
            texts = {str(prompt): str(text) for prompt, text in record["samples"].items()}
            step = int(record["step"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if texts:
            yield Samples(step, texts)


# ------------------------------------------------------------------------------ curves


class Curve(NamedTuple):
    """A series in as many points as can be seen: of each bin the median, lowest and highest."""

    x: Floats
    middle: Floats
    low: Floats
    high: Floats


def binned(series: Series, bins: int, *, log: bool = False) -> Curve:
    """Cut the x-axis, or its logarithm, into even bins; few points stay as they are.

    A bin in which nothing finite was logged is nan: the curve has a gap there.
    """
    x, y = series.where(series.x > 0) if log else series
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    if len(x) <= bins:
        return Curve(x, y, y, y)
    along = np.log(x) if log else x
    edges = np.linspace(along[0], along[-1], bins + 1)[:-1]
    starts = np.unique(np.searchsorted(along, edges))
    starts = starts[starts < len(x)]
    counts = np.diff(np.append(starts, len(x)))
    return Curve(
        np.add.reduceat(x, starts) / counts,
        medians(y, starts, counts),
        np.fmin.reduceat(y, starts),
        np.fmax.reduceat(y, starts),
    )


def medians(values: Floats, starts: NDArray[np.intp], counts: NDArray[np.intp]) -> Floats:
    """Of the finite values of each part; nan where there are none."""
    parts = np.repeat(np.arange(len(starts)), counts)
    by_height = values[np.lexsort((values, parts))]  # nan comes last
    finite = np.add.reduceat(np.isfinite(values).astype(int), starts)
    lower, upper = starts + np.maximum(finite - 1, 0) // 2, starts + finite // 2
    # Where none is finite, upper may be the next part's: lower is nan.
    middle: Floats = (by_height[lower] + by_height[np.minimum(upper, len(values) - 1)]) / 2
    return middle
