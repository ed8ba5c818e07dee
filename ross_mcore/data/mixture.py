"""The order over several data sets: a fixed number of samples of each in an epoch of the mixture, evenly mixed.

An epoch of the mixture has the next `counts[d]` samples of data set d's own order, which continues in the next epoch of
the mixture. Positions are assigned as in Bresenham's line algorithm (1965): a data set with c of t samples gets
floor(n c / t) of the first n places; the next data set takes its share of the remaining places in the same way. So
every range of positions has each data set's share to within a few samples, an epoch has it exactly, a position is
computed directly and nothing is stored. Positions are first shuffled in blocks, so that the pattern does not repeat.
Legend: P positions, D data sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ross_mcore.data.order import WINDOW_SAMPLES, Order, epochs_and_places, keys, permute

MOST_SAMPLES = 3_037_000_499
"""Maximum number of samples in an epoch: its square must fit in 63 bits."""


@dataclass(frozen=True)
class MixtureOrder:
    """The order over data sets with their own `orders` [D]; an epoch has `counts` [D] samples of each.

    Sample n of data set d is number `offsets[d]` + n. Positions are shuffled in blocks of `block_samples`.
    """

    orders: tuple[Order, ...]
    counts: tuple[int, ...]
    seed: int
    block_samples: int = 1024

    def __post_init__(self) -> None:
        if not self.orders or len(self.orders) != len(self.counts):
            raise ValueError(f"a mixture needs a count for every data set: {len(self.orders)} and {len(self.counts)}")
        if min(self.counts) < 1 or self.block_samples < 1:
            raise ValueError(
                f"a mixture needs samples of every data set: {self.counts}, blocks of {self.block_samples}"
            )
        if self.num_samples > MOST_SAMPLES:
            raise ValueError(f"an epoch of {self.num_samples} samples is over {MOST_SAMPLES}: lower epochs")

    @property
    def num_samples(self) -> int:
        """Positions of an epoch of the mixture."""
        return sum(self.counts)

    @property
    def dataset_samples(self) -> int:
        """Samples of all data sets together."""
        return sum(order.dataset_samples for order in self.orders)

    @property
    def window_samples(self) -> int:
        return WINDOW_SAMPLES

    @property
    def offsets(self) -> NDArray[np.int64]:
        """[D + 1]: the first number of each data set, and the number of all samples."""
        return np.cumsum([0, *(order.num_samples for order in self.orders)])

    def sample_at(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Sample numbers [P] at stream positions [P]. Raises ValueError for a negative position."""
        dataset, local = self.source_at(positions)
        numbers = np.empty_like(local)
        for which, order in enumerate(self.orders):
            here = dataset == which
            numbers[here] = self.offsets[which] + order.sample_at(local[here])
        return numbers

    def source_at(self, positions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Stream positions [P] -> data sets [P], and positions [P] in their own streams."""
        epoch, place = epochs_and_places(positions, self.num_samples)
        block = place // self.block_samples
        start = block * self.block_samples
        size = np.minimum(self.block_samples, self.num_samples - start)
        left = start + permute(place - start, size, keys(self.seed, epoch, block))
        dataset = np.full_like(left, -1)
        local = np.empty_like(left)
        undealt = self.num_samples
        for which, count in enumerate(self.counts):
            before = left * count // undealt
            here = (dataset < 0) & ((left + 1) * count // undealt > before)
            dataset[here] = which
            local[here] = epoch[here] * count + before[here]
            left -= before
            undealt -= count
        return dataset, local


def counts_by_epochs(sizes: Sequence[int], epochs: Sequence[float], names: Sequence[str] = ()) -> tuple[int, ...]:
    """Samples [D] in an epoch of the mixture that passes `epochs` [D] times over data sets of `sizes` [D] samples.

    Rounded to whole samples. Raises ValueError, with the data set's name in `names`, if one has no samples.
    """
    shares = _positive("epochs", epochs, len(sizes), names)
    return _usable("epochs", epochs, [round(share * size) for share, size in zip(shares, sizes)], names)


def counts_by_weight(sizes: Sequence[int], weights: Sequence[float], names: Sequence[str] = ()) -> tuple[int, ...]:
    """Samples [D] in proportion to `weights`, in an epoch of the mixture with as many samples as all data sets.

    Rounded by largest remainder; the earlier of two equal data sets gets more. Weights are read as decimal numbers.
    Raises ValueError as `counts_by_epochs`.
    """
    shares = _positive("weight", weights, len(sizes), names)
    exact = [share * sum(sizes) / sum(shares) for share in shares]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda which: counts[which] - exact[which])
    for which in by_remainder[: sum(sizes) - sum(counts)]:
        counts[which] += 1
    return _usable("weight", weights, counts, names)


def _name(which: int, names: Sequence[str]) -> str:
    return names[which] if names else str(which)


def _positive(name: str, values: Sequence[float], count: int, names: Sequence[str]) -> list[Fraction]:
    if len(values) != count:
        raise ValueError(f"{count} data sets and {len(values)} times {name}")
    for which, value in enumerate(values):
        if not 0 < value < float("inf"):
            raise ValueError(f"data set {_name(which, names)}: {name}={value} is not above zero")
    return [Fraction(str(value)) for value in values]


def _usable(name: str, values: Sequence[float], counts: Sequence[int], names: Sequence[str]) -> tuple[int, ...]:
    for which, value in enumerate(values):
        if counts[which] < 1:
            raise ValueError(
                f"data set {_name(which, names)}: {name}={value} leaves it no sample of the {sum(counts)} of an "
                f"epoch; raise its {name}, or leave the data set out"
            )
    if sum(counts) > MOST_SAMPLES:
        most = max(range(len(counts)), key=lambda which: counts[which])
        raise ValueError(
            f"data set {_name(most, names)}: with {name}={values[most]} an epoch has {sum(counts):.3g} samples, over "
            f"{MOST_SAMPLES}; lower it"
        )
    return tuple(counts)
