"""The list of bad samples of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from ross_mcore.data.replacement import BadSample
from ross_mcore.engine.run import Run
from ross_mcore.engine.state import TrainState
from ross_mcore.logs import QUARANTINE_FILE, JsonLines, read_entries, say
from ross_mcore.reporting.reporter import Reporter


class QuarantineFile(Reporter):
    """quarantine.jsonl: one line per replaced sample; at the end of the run, a summary on the console."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self.path = run.save_folder / QUARANTINE_FILE
        self._file = JsonLines(self.path, state.iteration)
        self._reasons: Counter[str] = Counter()
        if self.path.exists():
            self._reasons.update(kind(str(entry.get("reason"))) for entry in read_entries(self.path))

    def bad_samples(self, bad: Sequence[BadSample]) -> None:
        self._reasons.update(kind(entry.reason) for entry in bad)
        self._file.add(*map(asdict, bad))

    def finish(self, state: TrainState, stopped_by: str | None) -> None:
        if summary := self.summary():
            say(summary)

    def summary(self) -> str | None:
        """Counts of the five most frequent reasons; None for a run without bad samples."""
        if not self._reasons:
            return None
        counts = ", ".join(f"{count} x {reason}" for reason, count in self._reasons.most_common(5))
        return f"{self._reasons.total()} samples were replaced: {counts}; all of them are in {self.path}"


def kind(reason: str) -> str:
    """A reason without its details."""
    return reason.partition(":")[0]
