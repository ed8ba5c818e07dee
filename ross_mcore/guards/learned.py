"""A run of which no step changed what the model knows does not end as a finished one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ross_mcore.engine.run import Run, StepResult
from ross_mcore.errors import TrainingError
from ross_mcore.guards.guard import Guard
from ross_mcore.guards.incidents import Incident
from ross_mcore.logs import INCIDENTS_FILE

SKIPPED, NOT_FINITE, EMPTY = "named by --skip-iterations", "not finite", "without any label or image"
REMEDIES = {
    SKIPPED: "name fewer iterations in --skip-iterations",
    NOT_FINITE: f"lower --lr, or look at the samples that {INCIDENTS_FILE} in the folder of --save names",
    EMPTY: "raise --seq-length, or look at the samples with tools/inspect_shards.py",
}


class Learned(Guard):
    """Ends the run after its last iteration, before that is saved, when no step since its start was learned from.

    A resumed run that has learned before may end with iterations of --skip-iterations.
    """

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        super().__init__(run, say)
        self._lost = Counter[str]()
        self._has_learned = False

    def after_step(self, result: StepResult, incidents: Sequence[Incident]) -> None:
        trained, state = result.trained, result.state
        if trained is None:
            self._lost[SKIPPED] += 1
        elif not trained.applied:
            self._lost[NOT_FINITE] += 1
        elif trained.losses.lm_loss is None and trained.losses.vm_loss is None:
            self._lost[EMPTY] += 1
        else:
            self._has_learned = True
        if state.iteration < self.run.train_iters or self._has_learned:
            return
        learned_before = bool(state.recent_lm_losses or state.recent_vm_losses)
        if learned_before and set(self._lost) == {SKIPPED}:
            return
        (kind, _), *_ = self._lost.most_common()
        counts = ", ".join(f"{count} {name}" for name, count in self._lost.most_common())
        steps = f"iterations {state.iteration - self._lost.total() + 1} to {state.iteration}"
        raise TrainingError(
            f"nothing was learned in {steps}: {counts}; the last iteration is not saved. To train, {REMEDIES[kind]}"
        )
