"""The table of reporters, and the one place that calls them."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import Tensor

from ross_mcore.data.replacement import BadSample
from ross_mcore.engine.progress import at
from ross_mcore.engine.run import Run, StepResult
from ross_mcore.engine.state import TrainState
from ross_mcore.guards.incidents import Incident
from ross_mcore.parallel.collectives import all_or_none
from ross_mcore.reporting.averages import Window
from ross_mcore.reporting.console import Console
from ross_mcore.reporting.files import AnswersFile, IncidentsFile, MetricsFile, ValidationFile
from ross_mcore.reporting.metrics import SampleAnswer, StepMetrics, Validation
from ross_mcore.reporting.progress_bar import ProgressBar
from ross_mcore.reporting.quarantine import QuarantineFile
from ross_mcore.reporting.reporter import Reporter


def reporters() -> Sequence[type[Reporter]]:
    """The table, in the order of calls. ValidationFile comes after TensorBoard: its line marks a validation as done."""
    from ross_mcore.reporting.tensorboard import TensorBoard  # imported only on the logging rank
    from ross_mcore.reporting.trackers import Trackers

    return (
        MetricsFile,
        TensorBoard,
        Trackers,
        AnswersFile,
        ValidationFile,
        QuarantineFile,
        IncidentsFile,
        Console,
        ProgressBar,
    )


class Report:
    """Passes events to all reporters, and closes them at the end of a `with`. Every rank calls it; only that of the
    logging rank has reporters."""

    def __init__(self, run: Run, state: TrainState) -> None:
        """Raises LogError when a file cannot be created."""
        self._run = run
        self._reporters: list[Reporter] = []
        self._window = Window(run)
        try:
            for kind in reporters() if run.groups.is_logging_rank else ():
                self._reporters.append(kind(run, state))
            for reporter in self._reporters:
                reporter.start(run, state)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for reporter in self._reporters:
            reporter.close()

    def say(self, text: str) -> None:
        for reporter in self._reporters:
            reporter.say(text)

    def step(self, result: StepResult) -> None:
        if not self._reporters:
            return
        at("writing the log")
        metrics = StepMetrics.of(self._run, result)
        averages = self._window.add(metrics, result)
        for reporter in self._reporters:
            reporter.step(metrics)
            if averages is not None:
                reporter.averages(averages)

    def incidents(self, found: Sequence[Incident]) -> None:
        for reporter in self._reporters:
            reporter.incidents(found)

    def bad_samples(self, bad: Sequence[BadSample]) -> None:
        for reporter in self._reporters:
            reporter.bad_samples(bad)

    def validated(self, found: Validation, bad: Sequence[BadSample]) -> None:
        for reporter in self._reporters:
            reporter.validated(found, bad)

    def picture(self, iteration: int, grid: Tensor | None) -> None:
        """grid: None on ranks that do not have it, or without a picture."""
        if grid is None:
            return
        for reporter in self._reporters:
            reporter.picture(iteration, grid)

    def answers(self, iteration: int, found: Sequence[SampleAnswer]) -> None:
        """found: on every rank."""
        for reporter in self._reporters if found else ():
            reporter.answers(iteration, found)

    def finish(self, state: TrainState, stopped_by: str | None) -> None:
        for reporter in self._reporters:
            reporter.finish(state, stopped_by)


def open_report(run: Run, state: TrainState) -> Report:
    """The report of a run that continues after `state`. Collective; raises LogError or RankError on every rank."""
    return all_or_none(lambda: Report(run, state))
