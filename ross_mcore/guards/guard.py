"""What watches a run: the interface of a guard. guards/table.py lists all of them.

A guard runs on every rank at the same points, so its methods may be collective. It ends a run by raising TrainingError,
on all ranks alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ross_mcore.engine.run import ReadStep, Run, StepResult
from ross_mcore.engine.state import TrainState
from ross_mcore.guards.incidents import Incident


class Guard:
    """Watches nothing; a guard overrides the moments that it needs."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        """say: prints a line on the logging rank."""
        self.run, self.say = run, say

    def at_start(self, state: TrainState) -> None:
        """Before the step that follows `state`."""

    def after_read(self, read: ReadStep) -> None:
        """Before anything of a step is computed."""

    def incidents(self, result: StepResult) -> Sequence[Incident]:
        """What of a finished step somebody should look at; these are reported."""
        return ()

    def after_step(self, result: StepResult, incidents: Sequence[Incident]) -> None:
        """After a step and its incidents are reported, before anything of it is saved."""
