"""The interface of a guard, which watches a run; guards/table.py lists all guards.

A guard runs on every rank at the same points, so its methods may be collective. To end the run it raises TrainingError
on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ross_mcore.engine.run import ReadStep, Run, StepResult
from ross_mcore.engine.state import TrainState
from ross_mcore.guards.incidents import Incident


class Guard:
    """Watches nothing; a guard overrides the methods it needs."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        """say: prints a line on the logging rank."""
        self.run, self.say = run, say

    def at_start(self, state: TrainState) -> None:
        """Called before the first step, which follows `state`."""

    def after_read(self, read: ReadStep) -> None:
        """Called before a step is computed."""

    def incidents(self, result: StepResult) -> Sequence[Incident]:
        """The incidents of a finished step, to be reported."""
        return ()

    def after_step(self, result: StepResult, incidents: Sequence[Incident]) -> None:
        """Called after a step and its incidents are reported, before the step is saved."""
