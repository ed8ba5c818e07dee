"""Incidents: steps that were not applied, were skipped on request or have a loss spike, and the samples behind them.

incidents.jsonl has a line for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ross_mcore.engine.losses import MicroBatchLosses
from ross_mcore.engine.run import Run, StepResult
from ross_mcore.parallel.collectives import gather

LossName = Literal["lm_loss", "vm_loss"]

INCIDENTS_FILE = "incidents.jsonl"
MOST_SAMPLES = 32
"""Samples that an incident names."""


@dataclass(frozen=True)
class SampleLosses:
    """A trained sample's own losses: means over its labels and its images, None over nothing (null in JSON also where
    they are not finite).

    position: its place in the stream; key, shard: as tools/inspect_shards.py takes and shows them.
    """

    position: int
    key: str
    shard: str
    lm_loss: float | None
    vm_loss: float | None


@dataclass(frozen=True)
class Incident:
    """One line of incidents.jsonl.

    kind: `spike`, `not finite` (the update was not applied) or `skipped` (--skip-iterations); reason: in words;
    samples: those behind it, the largest part first, at most MOST_SAMPLES.
    """

    iteration: int
    kind: Literal["spike", "not finite", "skipped"]
    reason: str
    samples: list[SampleLosses]

    def __str__(self) -> str:
        names = ", ".join(sample.key for sample in self.samples[:3])
        more = len(self.samples) - 3
        shown = f"; samples {names}" + (f" and {more} more" if more > 0 else "") if names else ""
        update = "" if self.kind == "spike" else ": update skipped"
        return f"iteration {self.iteration}{update}: {self.reason}{shown} ({INCIDENTS_FILE})"


_Row = tuple[int, float, float, float, float]
"""position, lm_sum, labels, vm_sum, images of a sample."""


def samples_behind(loss: LossName | None, run: Run, result: StepResult) -> list[SampleLosses]:
    """The samples of a step with the largest terms of `loss`, on every rank alike; with None, those not finite.

    Collective. Where no sample is by itself not finite, those with the largest terms of both losses are named.
    """

    def size(row: _Row) -> float:
        return {"lm_loss": row[1], "vm_loss": row[3], None: row[1] + row[3]}[loss]

    kept = [] if result.trained is None or run.groups.tensor_rank else result.trained.kept
    rows = [row for part in kept for row in _rows(part)]
    broken = [row for row in rows if not math.isfinite(row[1] + row[3])]
    whole = sorted((row for row in rows if math.isfinite(row[1] + row[3])), key=size, reverse=True)
    everyone = gather((broken[:MOST_SAMPLES], whole[:MOST_SAMPLES]))
    found = sorted(row for broken, _ in everyone for row in broken)
    if loss is not None or not found:
        found += sorted((row for _, whole in everyone for row in whole), key=size, reverse=True)
    planned = result.read.step.step.rows
    numbers = {int(p): int(n) for row in planned for p, n in zip(row.positions, row.samples)}
    return [
        SampleLosses(
            position,
            run.dataset.keys([numbers[position]])[0],
            run.dataset.shard(numbers[position]),
            lm_sum / labels if labels else None,
            vm_sum / images if images else None,
        )
        for position, lm_sum, labels, vm_sum, images in found[:MOST_SAMPLES]
    ]


def _rows(part: MicroBatchLosses) -> Iterable[_Row]:
    """The samples of a micro-batch that were trained."""
    losses, counts = part.sums.tolist(), part.counts.tolist()
    for position, (lm_sum, vm_sum), (trained, labels, images, blank) in zip(part.positions, losses, counts):
        if trained:
            yield position, lm_sum, labels, vm_sum, images + blank
