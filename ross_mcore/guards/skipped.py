"""Reports the iterations of --skip-iterations as incidents."""

from __future__ import annotations

from collections.abc import Sequence

from ross_mcore.engine.run import StepResult
from ross_mcore.guards.guard import Guard
from ross_mcore.guards.incidents import Incident


class SkippedIterations(Guard):
    def incidents(self, result: StepResult) -> Sequence[Incident]:
        if result.trained is not None:
            return ()
        return [Incident(result.state.iteration, "skipped", "named by --skip-iterations", [])]
