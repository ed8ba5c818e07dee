"""Steps whose numbers were not finite. The engine does not apply them; too many in a row end the run."""

from __future__ import annotations

from collections.abc import Sequence

from ross_mcore.engine.finite import diagnose
from ross_mcore.engine.run import StepResult
from ross_mcore.errors import TrainingError
from ross_mcore.guards.guard import Guard
from ross_mcore.guards.incidents import Incident, samples_behind
from ross_mcore.logs import INCIDENTS_FILE


class FiniteNumbers(Guard):
    """Reports where numbers are not finite, and ends the run after --max-bad-steps such steps in a row."""

    def incidents(self, result: StepResult) -> Sequence[Incident]:
        trained = result.trained
        if trained is None or trained.applied:
            return ()
        losses = trained.losses
        named = {"lm_loss": losses.lm_loss, "vm_loss": losses.vm_loss, "gradient norm": trained.grad_norm}
        figures = ", ".join(f"{name} {'-' if value is None else value}" for name, value in named.items())
        reason = f"{figures}; {diagnose(self.run.engine.model)}"
        return [Incident(result.state.iteration, "not finite", reason, samples_behind(None, self.run, result))]

    def after_step(self, result: StepResult, incidents: Sequence[Incident]) -> None:
        state, folder = result.state, self.run.save_folder
        if result.trained is not None and state.bad_steps_in_a_row >= self.run.config.training.max_bad_steps:
            reasons = "; ".join(incident.reason for incident in incidents if incident.kind == "not finite")
            raise TrainingError(
                f"iteration {state.iteration}: numbers were not finite {state.bad_steps_in_a_row} times in a row "
                f"({reasons}); the last checkpoint under {folder} is intact. Lower --lr, or look at the samples "
                f"that {folder / INCIDENTS_FILE} names (tools/inspect_shards.py --sample) and leave them out "
                "with --skip-samples"
            )
