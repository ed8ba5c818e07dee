"""Steps that somebody should look at: not applied, skipped on request, or of a loss that stands out; and their samples.

incidents.jsonl has a line for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ross_mcore.data.loader import Step
from ross_mcore.data.sources import MixtureDataset
from ross_mcore.engine.step import MicroBatchLosses
from ross_mcore.parallel.collectives import gather
from ross_mcore.parallel.groups import Groups

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


def samples_behind(
    loss: Literal["lm_loss", "vm_loss"] | None,
    parts: Sequence[MicroBatchLosses],
    step: Step,
    groups: Groups,
    dataset: MixtureDataset,
) -> list[SampleLosses]:
    """The samples of a step that make most of `loss`, on every rank alike; with None, those that are not finite.

    Collective. `parts` are what the last stage kept. Where no sample is by itself not finite, those with most of both
    losses stand in.
    """

    def size(row: _Row) -> float:
        return {"lm_loss": row[1], "vm_loss": row[3], None: row[1] + row[3]}[loss]

    rows = [row for part in parts for row in _rows(part)] if groups.tensor_rank == 0 else []
    broken = [row for row in rows if not math.isfinite(row[1] + row[3])]
    whole = sorted((row for row in rows if math.isfinite(row[1] + row[3])), key=size, reverse=True)
    everyone = gather((broken[:MOST_SAMPLES], whole[:MOST_SAMPLES]))
    found = sorted(row for broken, _ in everyone for row in broken)
    if loss is not None or not found:
        found += sorted((row for _, whole in everyone for row in whole), key=size, reverse=True)
    numbers = {int(p): int(n) for row in step.rows for p, n in zip(row.positions, row.samples)}
    return [
        SampleLosses(
            position,
            dataset.keys([numbers[position]])[0],
            dataset.shard(numbers[position]),
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
