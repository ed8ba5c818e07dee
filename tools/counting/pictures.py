"""How pictures load the ranks of a tensor-parallel group, and how often the frozen parts run."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from counting import Row
from ross_mcore.engine.frozen import PICTURES, groups
from ross_mcore.parallel.layout import PairShare, share_of

DRAWS = 4
MICRO_BATCHES = 32


class Busiest(NamedTuple):
    """The load of the busiest rank in means, over 100 micro-batches of 1 to 4 pictures.

    unsplit: of the denoiser with whole pictures, the first ranks with one more; denoiser: with (picture, draw) pairs in
    turn; its ranks wait for each other in every micro-batch. frozen: of tower and VAE, which run ahead of the
    micro-batches, so that the sum of a rank's shares counts.
    """

    unsplit: float
    denoiser: float
    frozen: float


def busiest(size: int) -> Busiest:
    """In a tensor-parallel group of `size` ranks."""
    random = Random(0)
    numbers = [random.randint(1, 4) for _ in range(100)]

    def loads(share: Callable[[int, int, int], range]) -> NDArray[np.float64]:
        """[micro-batches, ranks], in units of a rank's mean over all micro-batches."""
        found = [[len(share(count, rank, turn)) for rank in range(size)] for turn, count in enumerate(numbers)]
        return size * np.array(found) / np.sum(found)

    unsplit = loads(lambda count, rank, _: share_of(count, rank, size))
    pairs = loads(lambda count, rank, turn: PairShare.of(count, DRAWS, rank, size, turn).pairs)
    pictures = loads(lambda count, rank, turn: share_of(count, rank, size, turn))
    return Busiest(unsplit.max(1).sum(), pairs.max(1).sum(), pictures.sum(0).max())


def frozen_calls(pictures: int) -> int:
    """Calls of the tower in a step of 32 micro-batches with so many pictures on this rank, on a GPU."""
    batches: list[Any] = [SimpleNamespace(pixels=range(pictures)) for _ in range(MICRO_BATCHES)]
    return len(list(groups(batches, PICTURES)))


def rows() -> list[Row]:
    found = []
    for size in (2, 4, 8):
        loads = busiest(size)
        meaning = f"of the mean; {loads.unsplit:.2f} with whole pictures"
        found.append(Row(f"busiest rank of the denoiser, TP{size}", f"{loads.denoiser:.2f}", "1", meaning))
        found.append(Row(f"busiest rank of tower and VAE, TP{size}", f"{loads.frozen:.2f}", "1", meaning))
    for pictures in (1, 2):
        name = f"calls of the tower, {pictures} picture(s) a micro-batch"
        found.append(Row(name, str(frozen_calls(pictures)), "", f"of {MICRO_BATCHES} micro-batches"))
    return found
