"""What ranks send in a step is at most a twentieth more than the layout needs; and everything they send is counted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from counting.wire import LAYOUTS, WireCount, count_layouts, half, ring, totals

from ross_mcore import platform
from tests.distributed.harness import run_ranks

BOUND = 1.05


def send_known_bytes() -> dict[str, tuple[float, float]]:
    """Name of each way to communicate between four ranks -> bytes that this rank sent, and should have."""
    platform.initialize_process_group(1)
    rank, size = dist.get_rank(), dist.get_world_size()
    numbers, everything = torch.zeros(1000), torch.zeros(4000)  # 4 bytes each
    after, before = (rank + 1) % size, (rank - 1) % size
    pair = dist.new_group([0, 1])

    def together() -> None:
        with dist._coalescing_manager(async_ops=True) as pending:
            dist.all_reduce(numbers)
            dist.all_reduce(everything)
        pending.wait()

    def to_neighbours(batched: bool) -> None:
        steps = [dist.P2POp(dist.isend, numbers, after), dist.P2POp(dist.irecv, torch.empty(1000), before)]
        pending = dist.batch_isend_irecv(steps) if batched else [step.op(step.tensor, step.peer) for step in steps]
        for request in pending:
            request.wait()

    ways: dict[str, tuple[Callable[[], object], float]] = {
        "all-reduce": (lambda: dist.all_reduce(numbers), ring(4000, 4)),
        "all-reduce, later": (lambda: dist.all_reduce(numbers, async_op=True).wait(), ring(4000, 4)),
        "all-reduce, coalesced": (together, ring(20000, 4)),
        "all-reduce of two ranks": (
            lambda: rank < 2 and dist.all_reduce(numbers, group=pair),
            ring(4000, 2) * (rank < 2),
        ),
        "all-gather": (lambda: dist.all_gather_into_tensor(everything, numbers), half(16000, 4)),
        "all-gather into a list": (lambda: dist.all_gather(list(everything.chunk(4)), numbers), half(16000, 4)),
        "reduce-scatter": (lambda: dist.reduce_scatter_tensor(numbers, everything), half(16000, 4)),
        "broadcast": (lambda: dist.broadcast(numbers, 0), half(4000, 4)),
        "send": (lambda: to_neighbours(False), 4000),
        "sends in a batch": (lambda: to_neighbours(True), 4000),
        "barrier": (dist.barrier, 0),
    }
    found = {}
    for name, (way, expected) in ways.items():
        with WireCount() as wire:
            way()
        found[name] = wire.total, expected
    with WireCount() as wire:  # the pickle's length, and the longest pickle of all ranks
        dist.all_gather_object([None] * size, "x" * 1000)
    found["objects"] = wire.total // 3000 * 3000, 3000
    dist.destroy_process_group()
    return found


def count_on_rank(base: Path, shards: Path, folder: Path, layouts: list[str]) -> None:
    known = send_known_bytes()
    wires = count_layouts(base, shards, folder / "runs", layouts)
    summed = {name: totals([wire]) for name, wire in wires.items()}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps([known, summed]))


COVERING = ["TP2 with sequence parallelism", "DP2, distributed optimizer", "TP2 x PP2"]
"""Layouts in which every way to communicate occurs."""


@pytest.mark.parametrize(
    "layouts",
    [COVERING, pytest.param([name for name in LAYOUTS if name not in COVERING], marks=pytest.mark.slow)],
    ids=["every way to communicate", "the others"],
)
def test_ranks_send_what_their_layout_needs(
    layouts: list[str], base: Callable[[str], Path], shards: Callable[[str], Path], tmp_path: Path
) -> None:
    run_ranks(count_on_rank, 4, base("qwen2_siglip"), shards("mixed"), tmp_path, layouts)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    for known, _ in found:
        assert {name: sent for name, (sent, _) in known.items()} == pytest.approx({n: e for n, (_, e) in known.items()})
    for name in layouts:
        sent, least = (sum(column) for column in zip(*(counts[name] for _, counts in found if name in counts)))
        assert least <= sent <= BOUND * least, (name, sent, least)
