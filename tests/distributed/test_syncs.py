"""Forward and backward never wait for the device, a step a few times; and what waits is counted."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from counting.syncs import CASES, SyncCount, Syncs, count_cases
from torch import Tensor

from ross_mcore import platform
from tests.distributed.harness import run_ranks

STEP = {
    "ross_mcore/engine/step.py": 1,  # the step's size
    "ross_mcore/engine/losses.py": 1,  # sums of losses, on the last stage
    "ross_mcore/parallel/collectives.py": 1,  # sums of losses of all ranks
    "ross_mcore/engine/optimizer.py": 1,  # the norms
    "ross_mcore/engine/finite.py": 1,
    "ross_mcore/engine/engine.py": 1,  # the end of the step
}
"""File -> its waits in a step; none depends on the number of micro-batches, layers or samples."""


def waits(change: Callable[[Tensor], object]) -> list[str]:
    """What is counted in `change` of a tensor of the device."""
    sync, tensor = SyncCount(), torch.arange(6.0)
    sync.mark(tensor)
    with sync.counting():
        change(tensor)
    return [kind for kind, _ in sync.found.elements()]


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (lambda t: (t * 2).sum().item(), ["_local_scalar_dense reads"]),
        (lambda t: bool(t.any()), ["_local_scalar_dense reads"]),
        (lambda t: (t * 2).tolist(), ["tolist reads"]),
        (lambda t: t[1:].nonzero(), ["nonzero reads"]),
        (lambda t: t[t > 2], ["a mask as an index"]),
        (lambda t: t.view(2, 3).cpu(), ["copy to the host"]),
        (lambda t: t.to("cpu"), ["copy to the host"]),
        (lambda t: torch.tensor([1.0, 2.0], device=platform.device()), ["copy to the device"]),
        (lambda t: t.new_tensor([1.0]), ["copy to the device"]),
        (lambda t: torch.zeros(6).to(t.device) + t, ["copy to the device"]),
        (lambda t: torch.tensor([t[0], t[1]]), ["a list of tensors reads"] * 2),
        (lambda t: t[[0, 2]], ["a tensor of the host in index"]),
        (lambda t: t + torch.ones(6), ["a tensor of the host in add"]),
        (lambda t: torch.zeros(6).copy_(t), ["copy to the host"]),
        (lambda t: t.clone().detach().requires_grad_().square().sum().backward(), []),
        (lambda t: torch.cat([t, torch.zeros(2, device=t.device)]).index_select(0, t.long()), []),
        (lambda t: t.masked_fill_(t > 2, 0), []),
        (lambda t: platform.upload(torch.ones(6), t.device) + t, []),
        (lambda t: torch.ones(6).tolist(), []),
    ],
)
def test_what_waits_is_counted(change: Callable[[Tensor], object], kinds: list[str]) -> None:
    assert waits(change) == kinds


def count_on_rank(base: Path, shards: Path, folder: Path, names: list[str], flags: dict[str, object]) -> None:
    found = count_cases(base, shards, folder / "runs", names, **flags)
    (folder / os.environ["RANK"]).write_bytes(pickle.dumps(found))


def counted(base: Path, shards: Path, folder: Path, names: list[str], **flags: object) -> Iterator[tuple[str, Syncs]]:
    """(case, count) of every rank."""
    world = max(CASES[name][0] for name in names)
    run_ranks(count_on_rank, world, base, shards, folder, names, flags)
    for rank in range(world):
        yield from pickle.loads((folder / str(rank)).read_bytes()).items()


def assert_few(name: str, found: Syncs) -> None:
    assert found.micro_batches >= 2 and found.uploads > found.micro_batches, name
    assert not found.schedule, (name, found.schedule)
    files: Counter[str] = Counter()
    for (_, place), count in found.step.items():
        files[place.partition(":")[0]] += count
    assert files <= Counter(STEP), (name, found.step)


def test_only_the_end_of_a_step_waits(
    base: Callable[[str], Path], shards: Callable[[str], Path], tmp_path: Path
) -> None:
    names = ["stage 1, a sample a row", "stage 2, packed, TP2 x PP2"]
    for name, found in counted(base("qwen2_siglip"), shards("mixed"), tmp_path, names):
        assert_few(name, found)


@pytest.mark.slow
def test_only_the_end_of_a_step_waits_in_other_cases(
    base: Callable[[str], Path], shards: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, found in counted(base("qwen2_siglip"), shards("mixed"), tmp_path, list(CASES)):
        assert_few(name, found)
