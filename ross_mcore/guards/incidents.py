"""Incidents: steps that were not applied, were skipped on request or have a loss spike, and their samples."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ross_mcore.engine.losses import MicroBatchLosses
from ross_mcore.engine.run import Run, StepResult
from ross_mcore.logs import INCIDENTS_FILE
from ross_mcore.parallel.collectives import gather

LossName = Literal["lm_loss", "vm_loss"]

MOST_SAMPLES = 32
"""Maximum number of samples in an incident."""


@dataclass(frozen=True)
class SampleLosses:
    """The losses of one trained sample: means over its labels and its images, None where it has none.

    A loss that is not finite is null in JSON. position: in the stream of samples; key, shard: names in the data set.
    """

    position: int
    key: str
    shard: str
    lm_loss: float | None
    vm_loss: float | None


@dataclass(frozen=True)
class Incident:
    """One line of incidents.jsonl.

    kind: `spike`, `not finite` (the update was not applied) or `skipped` (--skip-iterations); reason: text for people;
    samples: those with the largest losses, largest first, at most MOST_SAMPLES.
    """

    iteration: int
    kind: Literal["spike", "not finite", "skipped"]
    reason: str
    samples: list[SampleLosses]

    def __str__(self) -> str:
        names = ", ".join(sample.key for sample in self.samples[:3])
        more = len(self.samples) - 3
        shown = f"; samples {names}" + (f" and {more} more" if more > 0 else "") if names else ""
        update = ": update skipped" if self.kind in ("not finite", "skipped") else ""
        return f"iteration {self.iteration}{update}: {self.reason}{shown} ({INCIDENTS_FILE})"


_Row = tuple[int, float, float, float, float]
"""A sample's position, sum of lm losses, labels, sum of vm losses, images."""


def samples_behind(loss: LossName | None, run: Run, result: StepResult) -> list[SampleLosses]:
    """The samples of a step with the largest terms of `loss`, the same list on every rank. Collective.

    With None, the samples whose losses are not finite; if there are none, those with the largest terms of both losses.
    """

    def size(row: _Row) -> float:
        return {"lm_loss": row[1], "vm_loss": row[3], None: row[1] + row[3]}[loss]

    kept = [] if result.trained is None or run.groups.tensor_rank else result.trained.kept
    rows = [row for part in kept for row in _rows(part)]
    broken = [row for row in rows if not math.isfinite(row[1] + row[3])]
    finite = sorted((row for row in rows if math.isfinite(row[1] + row[3])), key=size, reverse=True)
    everyone = gather((broken[:MOST_SAMPLES], finite[:MOST_SAMPLES]))
    found = sorted(row for broken, _ in everyone for row in broken)
    if loss is not None or not found:
        found += sorted((row for _, finite in everyone for row in finite), key=size, reverse=True)
    planned = result.read.step.loaded.rows
    numbers = {int(p): int(n) for row in planned for p, n in zip(row.positions, row.samples)}
    return [
        SampleLosses(
            position,
            run.dataset.keys([numbers[position]])[0],
            run.dataset.shard(numbers[position]),
            lm_sum / labels if labels else None,
            vm_sum / images if images and run.model_config.denoiser else None,
        )
        for position, lm_sum, labels, vm_sum, images in found[:MOST_SAMPLES]
    ]


def _rows(part: MicroBatchLosses) -> Iterable[_Row]:
    """The trained samples of a micro-batch."""
    losses, counts = part.sums.tolist(), part.counts.tolist()
    for position, (lm_sum, vm_sum), (trained, labels, images, blank) in zip(part.positions, losses, counts):
        if trained:
            yield position, lm_sum, labels, vm_sum, images + blank
