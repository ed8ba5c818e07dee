"""What a run tells, from the rank that speaks: files of figures and of bad samples, TensorBoard, the console."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from ross_mcore.engine.state import TrainState
from ross_mcore.guards.bad_samples import BadSample, QuarantineLog
from ross_mcore.guards.incidents import INCIDENTS_FILE, Incident
from ross_mcore.reporting.console import Console
from ross_mcore.reporting.logs import JsonLines
from ross_mcore.reporting.metrics import MetricsLog, StepMetrics, Validation
from ross_mcore.training.run import Run


class Report:
    """Every rank has one and calls it alike; those that do not speak (`Groups.speaks`) write and print nothing."""

    def __init__(self, run: Run, state: TrainState) -> None:
        folder = run.save_folder
        self._log: MetricsLog | None = None
        self._quarantine: QuarantineLog | None = None
        self._incidents: JsonLines | None = None
        if run.groups.speaks:
            board = Path(run.config.logging.tensorboard_dir or folder / "tensorboard")
            self._log = MetricsLog(folder, board, state.iteration)
            self._quarantine = QuarantineLog(folder, state.iteration)
            self._incidents = JsonLines(folder / INCIDENTS_FILE, state.iteration)
        self.console = Console(
            self._log,
            run.config,
            run.model_config,
            run.groups.layout,
            run.rows_per_step,
            run.train_iters,
            run.precomputed,
        )

    @property
    def speaks(self) -> bool:
        return self._log is not None

    def step(self, metrics: StepMetrics, row_tokens: int) -> None:
        """One iteration, of `row_tokens` that are not padding."""
        if self._log is not None:
            self._log.write(metrics)
        self.console.step(metrics, row_tokens)

    def incidents(self, found: Sequence[Incident]) -> None:
        """What of an iteration somebody should look at, which is listed for good."""
        if self._incidents is not None:
            self._incidents.add(*map(asdict, found))
        for incident in found:
            self.console.say(str(incident))

    def bad_samples(self, bad: Sequence[BadSample]) -> None:
        """Bad samples of a training step, which are listed for good."""
        if self._quarantine is not None:
            self._quarantine.write(bad)
        self.console.bad_samples(bad)

    def validated(self, found: Validation, bad: Sequence[BadSample]) -> None:
        self.console.bad_samples(bad)
        self.console.validated(found)

    def picture(self, iteration: int, grid: Tensor | None) -> None:
        """Originals over reconstructions [3, H, W] in [0, 1], where this rank has them."""
        if self._log is not None and grid is not None:
            self._log.picture(iteration, "reconstruction", grid)

    def close(self) -> None:
        """The summary of bad samples."""
        if self._quarantine is not None and (summary := self._quarantine.summary()):
            self.console.say(summary)
