"""The table of guards, in the order of their calls, and the one place that calls them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ross_mcore.engine.progress import at
from ross_mcore.engine.run import ReadStep, Run, StepResult
from ross_mcore.engine.state import TrainState
from ross_mcore.guards.bad_samples import BadSampleBudget
from ross_mcore.guards.finite import FiniteNumbers
from ross_mcore.guards.guard import Guard
from ross_mcore.guards.incidents import Incident
from ross_mcore.guards.learned import Learned
from ross_mcore.guards.replicas import ReplicaCheck
from ross_mcore.guards.skipped import SkippedIterations
from ross_mcore.guards.spikes import LossSpikes

GUARDS: Sequence[type[Guard]] = (BadSampleBudget, SkippedIterations, LossSpikes, ReplicaCheck, FiniteNumbers, Learned)


class Guards:
    """The guards of one run. Every method is collective and raises TrainingError on all ranks to end the run."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._guards = [guard(run, say) for guard in GUARDS]

    def at_start(self, state: TrainState) -> None:
        for guard in self._guards:
            guard.at_start(state)

    def after_read(self, read: ReadStep) -> None:
        for guard in self._guards:
            guard.after_read(read)

    def after_step(self, result: StepResult, report: Callable[[Sequence[Incident]], None]) -> None:
        """report: called with the incidents of the step, before a guard may end the run."""
        at("checking the step")
        incidents = [incident for guard in self._guards for incident in guard.incidents(result)]
        report(incidents)
        for guard in self._guards:
            guard.after_step(result, incidents)
