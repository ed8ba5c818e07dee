"""A bar below the console's lines, where standard output is a terminal."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ross_mcore.engine.run import Run
from ross_mcore.engine.state import TrainState
from ross_mcore.reporting.averages import Averages
from ross_mcore.reporting.metrics import StepMetrics, duration, loss_text
from ross_mcore.reporting.reporter import Reporter

SECONDS = 0.25
"""The bar is drawn at most this often, after a step: no thread draws it."""


class ProgressBar(Reporter):
    """Step, losses, samples a second and the remaining time. In a file or a pipe it draws nothing."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self._progress: Progress | None = None
        self._speed, self._drawn = "", 0.0
        console = Console(file=sys.stdout)
        if not sys.stdout.isatty() or not console.is_terminal or console.is_dumb_terminal:
            return
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}")
        self._progress = Progress(*columns, TextColumn("{task.fields[figures]}"), console=console, auto_refresh=False)
        self._task = self._progress.add_task("training", total=run.train_iters, completed=state.iteration, figures="")

    def start(self, run: Run, state: TrainState) -> None:
        if self._progress is not None:
            self._progress.start()
            self._progress.console.show_cursor(True)  # a process that is killed leaves the terminal as it was

    def averages(self, found: Averages) -> None:
        self._speed = f" | {found.samples_per_second:.1f} samples/s | ETA {duration(found.remaining_seconds)}"

    def step(self, metrics: StepMetrics) -> None:
        if self._progress is None:
            return
        figures = f"lm_loss {loss_text(metrics.lm_loss)} | vm_loss {loss_text(metrics.vm_loss)}{self._speed}"
        self._progress.update(self._task, completed=metrics.iteration, figures=figures)
        if time.monotonic() - self._drawn > SECONDS:
            self._drawn = time.monotonic()
            self._progress.refresh()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
