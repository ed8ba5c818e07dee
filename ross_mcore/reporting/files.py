"""Files of a run with one line per step, validation or incident; a resumed run drops the lines after its iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from ross_mcore.data.replacement import BadSample
from ross_mcore.engine.run import Run
from ross_mcore.engine.state import TrainState
from ross_mcore.guards.incidents import Incident
from ross_mcore.logs import INCIDENTS_FILE, METRICS_FILE, VALIDATION_FILE, JsonLines
from ross_mcore.reporting.metrics import StepMetrics, Validation
from ross_mcore.reporting.reporter import Reporter


class MetricsFile(Reporter):
    """metrics.jsonl: one line per step. The file exists from the start, for programs that follow it."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self._file = JsonLines(run.save_folder / METRICS_FILE, state.iteration)
        self._file.append(b"")

    def step(self, metrics: StepMetrics) -> None:
        entry = asdict(metrics)
        if not entry["datasets"]:
            del entry["datasets"]
        self._file.add(entry)


class ValidationFile(Reporter):
    """validation.jsonl: one line per validation."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self._file = JsonLines(run.save_folder / VALIDATION_FILE, state.iteration)

    def validated(self, found: Validation, bad: Sequence[BadSample]) -> None:
        self._file.add(asdict(found))


class IncidentsFile(Reporter):
    """incidents.jsonl: one line per incident."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self._file = JsonLines(run.save_folder / INCIDENTS_FILE, state.iteration)

    def incidents(self, found: Sequence[Incident]) -> None:
        self._file.add(*map(asdict, found))
