"""What a run leaves to look at: metrics CSV, samples JSONL, progress on the terminal."""

from __future__ import annotations

import csv
import io
import json
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hamner.errors import UserError
from hamner.files import write_text_whole
from hamner.gpus import gpu_of_driver
from hamner.machine import PRECISIONS


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class MetricsCSV:
    """A CSV with one row per logged step.

    Opened to go on from `step`, it drops what was written after that step (a killed run repeats
    those steps) and a last line that was cut in the middle.
    """

    def __init__(self, path: Path, columns: Sequence[str], step: int):
        self.path = path
        self.columns = list(columns)
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self.columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(self._kept(step))
        write_text_whole(path, [buffer.getvalue()])

    def _kept(self, step: int) -> list[dict[str, str]]:
        if step == 0 or not self.path.exists():
            return []
        text = self.path.read_bytes().decode("utf-8", "replace")
        rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
        whole = [row for row in rows if None not in row and None not in row.values()]
        return [row for row in whole if row["step"].isdigit() and int(row["step"]) <= step]

    def write(self, row: Mapping[str, Any]) -> None:
        values = {key: _rounded(value) for key, value in row.items()}
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(values)


def _rounded(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


class SamplesJSONL:
    """Generated samples, one JSON object per occasion; goes on like `MetricsCSV`."""

    def __init__(self, path: Path, step: int):
        self.path = path
        write_text_whole(path, self._kept(step))

    def _kept(self, step: int) -> list[str]:
        if step == 0 or not self.path.exists():
            return []
        kept = []
        for line in self.path.read_bytes().decode("utf-8", "replace").split("\n")[:-1]:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        return kept

    def write(self, step: int, tokens: int, samples: Mapping[str, str]) -> None:
        record = {"timestamp": now(), "step": step, "tokens_total": tokens, "samples": samples}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


class TensorBoard:
    """The same rows and samples for `tensorboard --logdir logs`; goes on like `MetricsCSV`.

    What was written after `step` stays on the disk, and TensorBoard is told to forget it.
    """

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def write_samples(self, step: int, samples: Mapping[str, str]) -> None:
        for prompt, text in samples.items():
            as_it_is = textwrap.indent(text, "    ", lambda line: True)  # and no Markdown
            self._writer.add_text(f"samples/{prompt}", as_it_is, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def check_tensorboard() -> None:
    """
    Raises:
        UserError: TensorBoard isn't installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UserError(
            "--tensorboard needs TensorBoard, which isn't installed: `pip install tensorboard`"
        ) from None


class Progress:
    """A bar on a terminal; a line now and then where there is none."""

    def __init__(self, label: str, step: int, steps: int, *, shown: bool = True):
        self._bar = tqdm(
            total=steps, initial=step, desc=label, unit="step", dynamic_ncols=True,
            disable=not (shown and sys.stderr.isatty()),
        )  # fmt: skip
        self._label, self._step, self._steps = label, step, steps

    def advance(self) -> None:
        self._step += 1
        self._bar.update(1)

    def report(self, loss: float, tokens_per_second: float, mfu: float | None) -> None:
        text = f"loss {loss:.4f}, {tokens_per_second:,.0f} tok/s"
        if mfu is not None:
            text += f", MFU {mfu:.0%}"
        if self._bar.disable:
            print(f"{self._label} step {self._step:,}/{self._steps:,}: {text}", flush=True)
        else:
            self._bar.set_postfix_str(text)

    def say(self, text: str) -> None:
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()


class Stopwatch:
    """Seconds spent training: what runs inside `paused` (validating, saving) is not counted."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        end = time.perf_counter()
        seconds, self._begin = end - self._begin, end
        return seconds

    def paused(self, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = work()
        self._begin += time.perf_counter() - begin
        return result


def peak_flops(device: torch.device, precision: str = "fp32") -> float | None:
    """Peak FLOP/s: of 16 bits by a known GPU's data sheet, measured for a CPU, None for others."""
    if device.type == "cpu":
        return _measured_matmul_flops(PRECISIONS[precision])
    if device.type == "cuda":
        gpu = gpu_of_driver(torch.cuda.get_device_name(device))
        return gpu.flops if gpu else None
    return None


def _measured_matmul_flops(dtype: torch.dtype, size: int = 512, seconds: float = 0.5) -> float:
    """FLOP/s of matrix products on this CPU, the best when none was better for so many seconds.

    When a run begins, its sources are being read ahead on the same cores for a while.
    """
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best, settled = float("inf"), time.perf_counter()
    while True:
        begin = time.perf_counter()
        a @ b
        finished = time.perf_counter()
        if finished - begin < 0.98 * best:
            settled = finished
        best = min(best, finished - begin)
        if finished > settled + seconds:
            return 2 * size**3 / best
