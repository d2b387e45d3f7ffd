"""What the steps leave behind: their losses, kept on the device until many can be read at once."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from hamner.errors import UserError
from hamner.machine import Machine

MAX_SKIPPED = 100  # steps in a row without a finite gradient before the run gives up
WINDOW = 100  # losses that a new one is compared with
ENOUGH = 20  # of them before anything is called a spike
SPIKE_DEVIATIONS, SPIKE_SHARE = 6, 0.1  # above their mean, both: standard deviations, and share

Record = dict[str, float]


class StepRecords:
    """One row of numbers for every step since the last reading, in the device's memory."""

    def __init__(self, machine: Machine):
        self._machine = machine
        self._names: list[str] = []
        self._rows: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._rows)

    def total(self, sums: Mapping[str, Tensor]) -> Tensor:
        """The sums (scalars; `loss` first) over all ranks, as one row."""
        self._names = list(sums)
        return self._machine.total(torch.stack(list(sums.values())))

    def add(self, row: Tensor, grad_norm: Tensor, finite: Tensor) -> None:
        extra = torch.stack([grad_norm.float(), finite.float()])
        self._rows.append(torch.cat([row, extra]))

    def read(self) -> list[Record]:
        """The steps since the last reading; waits for the device."""
        if not self._rows:
            return []
        names = [*self._names, "grad_norm", "finite"]
        rows = torch.stack(self._rows).tolist()
        self._rows = []
        return [dict(zip(names, row, strict=True)) for row in rows]


class HealthState(Protocol):
    skipped: int
    skipped_in_a_row: int
    spikes: int
    recent: list[float]


class Health:
    """Counts steps that were skipped and losses that jump up, and says so."""

    def __init__(self, stage: str, state: HealthState):
        self._stage, self._state = stage, state

    def look_at(self, record: Record, step: int) -> str | None:
        """Take note of a step; what there is to tell about it, if anything.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        state = self._state
        if not record["finite"]:
            state.skipped += 1
            state.skipped_in_a_row += 1
            if state.skipped_in_a_row >= MAX_SKIPPED:
                raise UserError(
                    f"{self._stage}: no finite loss and gradient in {MAX_SKIPPED} steps in a row, "
                    f"stopped at step {step:,}; go on from an earlier checkpoint (--checkpoint) "
                    "with a lower learning rate or precision=fp32, or look for broken data"
                )
            return None
        state.skipped_in_a_row = 0
        loss, before = record["loss"], state.recent[-WINDOW:]
        state.recent = [*before, loss][-WINDOW:]
        if len(before) < ENOUGH:
            return None
        mean, deviation = statistics.fmean(before), statistics.pstdev(before)
        if loss <= mean + max(SPIKE_DEVIATIONS * deviation, SPIKE_SHARE * abs(mean)):
            return None
        state.spikes += 1
        return (
            f"{self._stage} step {step:,}: the loss jumped to {loss:.4g}, from {mean:.4g} in the "
            f"{len(before)} steps before it; gradient norm {record['grad_norm']:.3g}"
        )


def means(records: list[Record]) -> Record:
    """Of the steps that weren't skipped; loss nan if all were."""
    taken = [record for record in records if record["finite"]]
    if not taken:
        return {"loss": math.nan}
    names = [name for name in taken[0] if name not in ("grad_norm", "finite")]
    return {name: statistics.fmean(record[name] for record in taken) for name in names}
