"""Loss spikes: losses far above those of the steps before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ross_mcore.engine.run import StepResult
from ross_mcore.guards.guard import Guard
from ross_mcore.guards.incidents import Incident, LossName, samples_behind

LEAST = 20
"""Minimum number of previous steps; with fewer, no step is judged."""


@dataclass(frozen=True)
class Spike:
    """A loss far above the median of the last `steps` steps."""

    loss: LossName
    value: float
    median: float
    steps: int

    def __str__(self) -> str:
        times = f"{self.value / self.median:.3g} times" if self.median else "above"
        return f"{self.loss} {self.value:.4g} is {times} the median {self.median:.4g} of {self.steps} steps"


def find_spike(loss: LossName, value: float | None, recent: Sequence[float], factor: float) -> Spike | None:
    """A spike if `value` is above `factor` (0: never) times the median of the `recent` values, newest last.

    value: None for a loss over nothing, which is no spike.
    """
    if value is None or not factor or len(recent) < LEAST:
        return None
    middle = median(recent)
    return Spike(loss, value, middle, len(recent)) if value > factor * middle else None


class LossSpikes(Guard):
    """Reports steps whose lm_loss or vm_loss is above --loss-spike-factor times the median of the last steps."""

    def incidents(self, result: StepResult) -> Sequence[Incident]:
        before, trained = result.read.before, result.trained
        if trained is None or not trained.applied:
            return ()
        losses, factor = trained.losses, self.run.config.training.loss_spike_factor
        spikes = [
            find_spike("lm_loss", losses.lm_loss, before.recent_lm_losses, factor),
            find_spike("vm_loss", losses.vm_loss, before.recent_vm_losses, factor),
        ]
        return [
            Incident(result.state.iteration, "spike", str(spike), samples_behind(spike.loss, self.run, result))
            for spike in spikes
            if spike is not None
        ]
