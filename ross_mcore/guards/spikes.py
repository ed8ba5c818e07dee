"""PURE: losses that stand out of those before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

WINDOW = 100
"""Steps that a loss is compared with."""
LEAST = 20
"""Steps that must be there before any is judged."""


@dataclass(frozen=True)
class Spike:
    """A loss (`lm_loss` or `vm_loss`) above `factor` times the median of the last `steps` steps."""

    loss: str
    value: float
    median: float
    steps: int

    def __str__(self) -> str:
        times = f"{self.value / self.median:.3g} times" if self.median else "above"
        return f"{self.loss} {self.value:.4g} is {times} the median {self.median:.4g} of {self.steps} steps"


def find_spike(loss: str, value: float, recent: Sequence[float], factor: float) -> Spike | None:
    """The spike that `value` is among `recent` values of the same loss, the newest last; with a factor of 0, none."""
    if not factor or len(recent) < LEAST:
        return None
    middle = median(recent)
    return Spike(loss, value, middle, len(recent)) if value > factor * middle else None


def remembered(recent: Sequence[float], value: float) -> tuple[float, ...]:
    """`recent` with `value`, at most WINDOW of them."""
    return (*recent, value)[-WINDOW:]
