"""Simulated pipeline schedules."""

from __future__ import annotations

import pytest

from ross_mcore.parallel.schedule import makespan, order_of


@pytest.mark.parametrize("virtual_stages", [1, 2, 3])
@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 4), (4, 4), (4, 16)])
def test_the_bubble_of_equal_stages(stages: int, micro_batches: int, virtual_stages: int) -> None:
    """(P - 1) / (m v) of the work (Narayanan et al. 2021, section 2.2)."""
    chunks = stages * virtual_stages if stages > 1 else 1
    found = makespan([1.0] * chunks, [2.0] * chunks, stages, micro_batches, sent=0.0)
    assert found == pytest.approx(3 * (micro_batches * chunks / stages + stages - 1))


def test_the_slowest_stage_and_transfers() -> None:
    # the first stage forward, then the second eight times, the last backward of the first
    assert makespan([1, 2], [1, 2], 2, 8, sent=0.0) == 1 + 8 * 4 + 1
    assert makespan([1, 2], [1, 2], 2, 1, sent=0.25) == 6 + 2 * 0.25


@pytest.mark.parametrize("rank", range(4))
def test_the_order_is_that_of_megatron(rank: int) -> None:
    """Every chunk has every micro-batch once each way; warm-up and order as in mcore's schedules.py."""
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    order = order_of(stages=4, virtual_stages=2, micro_batches=8, rank=rank)
    table = get_schedule_table(8, 2, 4)
    assert [(this.micro_batch, this.position // 4) for this in order if this.forward] == table
    assert [(this.micro_batch, 1 - this.position // 4) for this in order if not this.forward] == table
    assert next(n for n, this in enumerate(order) if not this.forward) == 2 * (3 - rank) + 4 + 1


def test_interleaving_needs_a_multiple_of_the_stages() -> None:
    with pytest.raises(ValueError, match="3 micro-batches do not fit 4 chunks on 2 stages"):
        makespan([1.0] * 4, [1.0] * 4, 2, 3, sent=0.0)
