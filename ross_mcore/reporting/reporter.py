"""The interface of a reporter. reporting/report.py lists all reporters; only the logging rank has any."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ross_mcore.data.replacement import BadSample
from ross_mcore.engine.run import Run
from ross_mcore.engine.state import TrainState
from ross_mcore.guards.incidents import Incident
from ross_mcore.reporting.averages import Averages
from ross_mcore.reporting.metrics import SampleAnswer, StepMetrics, Validation


class Reporter:
    """Reports nothing; a reporter overrides the events it needs."""

    def __init__(self, run: Run, state: TrainState) -> None:
        """Continues after `state`. Raises LogError when its file cannot be created."""

    def start(self, run: Run, state: TrainState) -> None:
        """Training begins after `state`."""

    def step(self, metrics: StepMetrics) -> None:
        """The figures of one iteration."""

    def averages(self, found: Averages) -> None:
        """Means over --log-interval iterations."""

    def incidents(self, found: Sequence[Incident]) -> None:
        """Incidents of one iteration."""

    def bad_samples(self, bad: Sequence[BadSample]) -> None:
        """The replaced samples of a training step."""

    def validated(self, found: Validation, bad: Sequence[BadSample]) -> None:
        """Losses on held-out data, and its bad samples."""

    def picture(self, iteration: int, grid: Tensor) -> None:
        """grid [3, H, W] in [0, 1]: originals above reconstructions."""

    def answers(self, iteration: int, found: Sequence[SampleAnswer]) -> None:
        """Answers to questions of held-out samples."""

    def say(self, text: str) -> None:
        """A line for people."""

    def finish(self, state: TrainState, stopped_by: str | None) -> None:
        """The run ended after `state`. stopped_by: the reason, None when it finished."""

    def close(self) -> None:
        """The report ends, after `finish` or an error."""
