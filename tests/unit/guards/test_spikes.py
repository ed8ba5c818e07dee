"""Loss spikes."""

from __future__ import annotations

from ross_mcore.engine.state import RECENT_LOSSES, remembered
from ross_mcore.guards.spikes import LEAST, find_spike


def test_a_loss_is_compared_with_the_median_before_it() -> None:
    recent = (1.0,) * (LEAST - 1) + (50.0,)  # a spike does not change the median
    assert find_spike("vm_loss", 3.0, recent, factor=3.0) is None
    spike = find_spike("vm_loss", 3.1, recent, factor=3.0)
    assert spike is not None and str(spike) == f"vm_loss 3.1 is 3.1 times the median 1 of {LEAST} steps"
    assert find_spike("vm_loss", 3.1, recent, factor=0.0) is None
    assert find_spike("vm_loss", 3.1, recent[1:], factor=3.0) is None, "too few to compare with"
    assert find_spike("vm_loss", 0.1, (0.0,) * LEAST, factor=3.0) is not None
    assert find_spike("vm_loss", None, recent, factor=3.0) is None, "a loss over nothing"


def test_only_the_newest_are_remembered() -> None:
    recent: tuple[float, ...] = ()
    for number in range(RECENT_LOSSES + 5):
        recent = remembered(remembered(recent, float(number)), None)
    assert recent == tuple(map(float, range(5, RECENT_LOSSES + 5)))
