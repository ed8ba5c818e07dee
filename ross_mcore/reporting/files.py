"""Files of a run with one line per step, validation or incident; a resumed run drops the lines after its iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from ross_mcore.data.replacement import BadSample
from ross_mcore.engine.run import Run
from ross_mcore.engine.state import TrainState
from ross_mcore.guards.incidents import Incident
from ross_mcore.logs import (
    ANSWERS_FILE,
    INCIDENTS_FILE,
    METRICS_FILE,
    VALIDATION_FILE,
    JsonLines,
    read_entries,
)
from ross_mcore.reporting.metrics import SampleAnswer, StepMetrics, Validation
from ross_mcore.reporting.reporter import Reporter


class MetricsFile(Reporter):
    """metrics.jsonl: one line per step. The file exists from the start, for programs that follow it."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self._file = JsonLines(run.save_folder / METRICS_FILE, state.iteration)
        self._file.append(b"")

    def step(self, metrics: StepMetrics) -> None:
        entry = asdict(metrics)
        self._file.add({key: value for key, value in entry.items() if value != {}})


class ValidationFile(Reporter):
    """validation.jsonl: one line per validation."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self._file = JsonLines(run.save_folder / VALIDATION_FILE, state.iteration)

    def validated(self, found: Validation, bad: Sequence[BadSample]) -> None:
        self._file.add(asdict(found))


class AnswersFile(Reporter):
    """answers.jsonl: one line per answer. A resumed run may give the answers of its checkpoint's iteration again."""

    def __init__(self, run: Run, state: TrainState) -> None:
        path = run.save_folder / ANSWERS_FILE
        self._file = JsonLines(path, state.iteration)
        self._last = max((entry["iteration"] for entry in read_entries(path)), default=-1) if path.exists() else -1

    def answers(self, iteration: int, found: Sequence[SampleAnswer]) -> None:
        if iteration > self._last:
            self._file.add(*map(asdict, found))


class IncidentsFile(Reporter):
    """incidents.jsonl: one line per incident."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self._file = JsonLines(run.save_folder / INCIDENTS_FILE, state.iteration)

    def incidents(self, found: Sequence[Incident]) -> None:
        self._file.add(*map(asdict, found))
