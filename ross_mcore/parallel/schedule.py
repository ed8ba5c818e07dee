"""The time of pipeline schedules, by simulating them. Pure functions.

A chunk is at a position of the model, 0 to chunks - 1, and on rank position % stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Pass(NamedTuple):
    """The forward or backward pass of one micro-batch through one chunk."""

    forward: bool
    position: int
    micro_batch: int


def order_of(stages: int, virtual_stages: int, micro_batches: int, rank: int) -> list[Pass]:
    """The passes of a rank, in order: 1F1B, or interleaved, as in mcore's schedules.py.

    Interleaved, `micro_batches` is a multiple of `stages`: groups of as many micro-batches as stages go through chunk
    after chunk (Narayanan et al. 2021, section 2.2).
    """
    total = micro_batches * virtual_stages
    after = stages - 1 - rank
    warm_up = after if virtual_stages == 1 else 2 * after + (virtual_stages - 1) * stages

    def at(number: int, forward: bool) -> Pass:
        if virtual_stages == 1:
            return Pass(forward, rank, number)
        group, within = divmod(number, stages * virtual_stages)
        chunk = within // stages
        chunk = chunk if forward else virtual_stages - 1 - chunk
        return Pass(forward, chunk * stages + rank, group * stages + within % stages)

    warm_up = min(warm_up, total)
    order = [at(number, True) for number in range(warm_up)]
    for number in range(total - warm_up):
        order += [at(warm_up + number, True), at(number, False)]
    return order + [at(number, False) for number in range(total - warm_up, total)]


def makespan(
    forward: Sequence[float], backward: Sequence[float], stages: int, micro_batches: int, sent: float
) -> float:
    """Time from the first pass to the last; forward and backward: of the chunk at each position; sent: of a transfer.

    Raises ValueError for a schedule that cannot end: interleaved with micro-batches that are no multiple of `stages`.
    """
    chunks = len(forward)
    orders = [order_of(stages, chunks // stages, micro_batches, rank) for rank in range(stages)]
    ended: dict[Pass, float] = {}
    clocks, places = [0.0] * stages, [0] * stages
    remaining = sum(map(len, orders))
    while remaining:
        before = remaining
        for rank, order in enumerate(orders):
            while places[rank] < len(order):
                this = order[places[rank]]
                needs = _needs(this, chunks)
                if any(need not in ended for need in needs):
                    break
                ready = [ended[need] + (sent if need.position % stages != rank else 0.0) for need in needs]
                begins = max([clocks[rank], *ready])
                clocks[rank] = begins + (forward if this.forward else backward)[this.position]
                ended[this] = clocks[rank]
                places[rank] += 1
                remaining -= 1
        if remaining == before:
            raise ValueError(f"{micro_batches} micro-batches do not fit {chunks} chunks on {stages} stages")
    return max(clocks)


def _needs(this: Pass, chunks: int) -> list[Pass]:
    """The passes that must have ended before."""
    if this.forward:
        return [Pass(True, this.position - 1, this.micro_batch)] if this.position else []
    own = Pass(True, this.position, this.micro_batch)
    return [own, Pass(False, this.position + 1, this.micro_batch)] if this.position < chunks - 1 else [own]
