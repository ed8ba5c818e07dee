"""Bad samples of a run: the file that lists them, and how many a run bears."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ross_mcore.data.loader import Step
from ross_mcore.data.replacement import ASKED_FOR, EMPTY
from ross_mcore.data.sample import ShardDataset
from ross_mcore.reporting.logs import JsonLines, read_entries

QUARANTINE_FILE = "quarantine.jsonl"
FEW = 10
"""Bad samples that say nothing about their share yet."""


@dataclass(frozen=True)
class BadSample:
    """One line of quarantine.jsonl: a place of the stream whose own sample was not trained.

    position: its place in the stream; replaced_by: the key of the sample trained there, None when none could be. With
    the reason ASKED_FOR it is not bad, but named by --skip-samples.
    """

    iteration: int
    position: int
    shard: str
    key: str
    reason: str
    replaced_by: str | None

    @property
    def is_bad(self) -> bool:
        return self.reason != ASKED_FOR


def bad_samples(iteration: int, step: Step, dataset: ShardDataset) -> list[BadSample]:
    """What was replaced in a step, in the order of the stream; the same on all ranks."""

    def key(number: int) -> str:
        return dataset.keys([number])[0]

    return [
        BadSample(
            iteration,
            position,
            dataset.shard(entry.sample),
            key(entry.sample),
            entry.reason,
            None if entry.replacement == EMPTY else key(entry.replacement),
        )
        for position, entry in sorted(step.quarantined.items())
    ]


def is_over_budget(bad: int, consumed: int, max_bad_fraction: float) -> bool:
    """Whether more than `max_bad_fraction` of the `consumed` samples were bad.

    FEW bad samples are not judged, unless none is allowed.
    """
    return bad > max_bad_fraction * consumed and (bad > FEW or not max_bad_fraction)


class QuarantineLog:
    """Writes quarantine.jsonl from `iteration` on; one rank holds it. Raises LogError where it cannot be begun."""

    def __init__(self, save: Path, iteration: int) -> None:
        self.path = save / QUARANTINE_FILE
        self._file = JsonLines(self.path, iteration)
        self._reasons: Counter[str] = Counter()
        if self.path.exists():
            self._reasons.update(kind(str(entry.get("reason"))) for entry in read_entries(self.path))

    def write(self, bad: Sequence[BadSample]) -> None:
        """What of a step was replaced."""
        self._reasons.update(kind(entry.reason) for entry in bad)
        self._file.add(*map(asdict, bad))

    def summary(self) -> str | None:
        """Counts by reason, the most frequent first; None for a run without bad samples."""
        if not self._reasons:
            return None
        counts = ", ".join(f"{count} x {reason}" for reason, count in self._reasons.most_common(5))
        return f"{self._reasons.total()} samples were replaced: {counts}; all of them are in {self.path}"


def kind(reason: str) -> str:
    """A reason without its particulars, for counting."""
    return reason.partition(":")[0]
