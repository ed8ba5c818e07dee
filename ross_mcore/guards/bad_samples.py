"""The budget of bad samples of a run."""

from __future__ import annotations

from ross_mcore.engine.run import ReadStep
from ross_mcore.errors import TrainingError
from ross_mcore.guards.guard import Guard
from ross_mcore.logs import QUARANTINE_FILE

FEW = 10
"""Up to this many bad samples, their share is not judged."""


def is_over_budget(bad: int, consumed: int, max_bad_fraction: float) -> bool:
    """Whether more than `max_bad_fraction` of the `consumed` samples were bad, and more than FEW (0: any)."""
    return bad > max_bad_fraction * consumed and (bad > FEW or not max_bad_fraction)


class BadSampleBudget(Guard):
    """Ends the run when more samples were bad than --max-bad-fraction allows."""

    def after_read(self, read: ReadStep) -> None:
        config, consumed = self.run.config, read.consumed_samples
        limit, so_far = config.data.max_bad_fraction, read.bad_samples_so_far
        if read.bad and is_over_budget(so_far, consumed, limit):
            last = read.bad[-1]
            raise TrainingError(
                f"iteration {read.iteration}: {so_far} of {consumed} samples so far were bad, more than "
                f"--max-bad-fraction {limit}; the last one is {last.key} of {last.shard}: {last.reason}. All are "
                f"in {config.checkpoint.save}/{QUARANTINE_FILE}. Index the shards again (tools/index_shards.py leaves "
                f"bad samples out), or raise the limit; the last checkpoint is intact"
            )
