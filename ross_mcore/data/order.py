"""The global order of samples: a pure function of (seed, epoch, position), the same in every layout.

The training stream is an endless sequence of positions 0, 1, 2, ...; position p is place p % N of epoch p // N, and
each epoch is a permutation of the N samples.

SampleOrder and BlockOrder compute every place and store nothing: a balanced Feistel network over the smallest even
number of bits that holds n, iterated until its value is below n, permutes n numbers (Black and Rogaway 2002, "Ciphers
with arbitrary finite domains"). It uses 64-bit integer arithmetic only, so an order does not depend on the version of a
random generator. SampleOrder shuffles all samples at once and reads from all shards at any time; BlockOrder shuffles
within windows that read from few places. ModalityLengthOrder is the reference's sampler, which computes a whole epoch
with torch's generator.
Legend: P positions, N samples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

ROUNDS = 8
_TURNS = np.arange(ROUNDS, dtype=np.uint64)[:, None] << np.uint64(56)


WINDOW_SAMPLES = 16_384
"""Number of samples packed together in an order without windows of its own."""


class Order(Protocol):
    """The interface of an order."""

    @property
    def num_samples(self) -> int:
        """Positions of an epoch."""
        ...

    @property
    def dataset_samples(self) -> int:
        """Number of samples in the data set."""
        ...

    @property
    def window_samples(self) -> int:
        """Positions that are packed together: the order's own windows, if it has any, so that rows read few places."""
        ...

    def sample_at(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Sample numbers [P] at stream positions [P]."""
        ...


class DatasetOrder:
    """An order over one data set, every sample once per epoch."""

    num_samples: int

    @property
    def dataset_samples(self) -> int:
        return self.num_samples

    @property
    def window_samples(self) -> int:
        return WINDOW_SAMPLES


@dataclass(frozen=True)
class SampleOrder(DatasetOrder):
    """The order over `num_samples` samples; `shuffle=False` is the order of the shards (evaluation)."""

    num_samples: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"an order needs at least one sample, not {self.num_samples}")

    def sample_at(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Sample numbers [P] at stream positions [P]. Raises ValueError for a negative position."""
        epoch, place = epochs_and_places(positions, self.num_samples)
        if not self.shuffle:
            return place
        return permute(place, self.num_samples, keys(self.seed) ^ epoch.astype(np.uint64))


@dataclass(frozen=True)
class BlockOrder(DatasetOrder):
    """A shuffled order that reads from few places at a time.

    An epoch's N samples are rotated by a random offset and cut into blocks of `block_samples` neighbours; the blocks
    are shuffled; `window_blocks` consecutive blocks are a window, whose samples are shuffled. So the `window_samples`
    positions of a window read from `window_blocks` places of the shards, and each place is read to the end. The last
    window also takes the remaining samples, less than a window's; the random offset moves the short block in every
    epoch.

    The cost: neighbours in the shards are trained in the same window. If the shards are sorted, the mean of a quantity
    over `b` samples of a batch varies more than under a full shuffle, by about sqrt(1 + b / window_blocks); shards in
    random order have no such cost. benchmarks/order.py measures both. A window of N samples is a full shuffle.
    """

    num_samples: int
    seed: int
    block_samples: int = 512
    window_blocks: int = 32

    def __post_init__(self) -> None:
        for name in ("num_samples", "block_samples", "window_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"an order needs at least one sample, block and window: {name}={getattr(self, name)}")

    @property
    def window_samples(self) -> int:
        """Positions of every window of an epoch except the last, which also takes the remaining ones."""
        return min(self.num_samples, self.block_samples * self.window_blocks)

    def sample_at(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Sample numbers [P] at stream positions [P]. Raises ValueError for a negative position."""
        epoch, place = epochs_and_places(positions, self.num_samples)
        key = keys(self.seed, epoch)
        last = self.num_samples // self.window_samples - 1
        window = np.minimum(place // self.window_samples, last)
        start = window * self.window_samples
        size = np.where(window == last, self.num_samples - start, self.window_samples)
        shuffled = start + permute(place - start, size, keys(self.seed, epoch, window + 1))
        block, inside = np.divmod(shuffled, self.block_samples)
        whole = block < self.num_samples // self.block_samples
        block[whole] = permute(block[whole], self.num_samples // self.block_samples, key[whole])
        offset = (_mix(~key) % np.uint64(self.num_samples)).astype(np.int64)
        return (block * self.block_samples + inside + offset) % self.num_samples


class ModalityLengthOrder(DatasetOrder):
    """The reference's order by modality and length: all samples of a step have pictures or none, and similar lengths.

    `lengths` [N]: words of every sample, negative without a picture. Samples are drawn for whole global batches, so the
    order depends on (lengths, global_batch_size, seed, epoch) and on no layout. The reference also distributes the rows
    of a global batch over its devices; the rows of a step are the same (if epochs begin with a step), here by
    decreasing length. The last batches of the two modalities are joined at the end of the epoch.

    An epoch is computed at its first position and kept: O(N) per epoch and process, 8 N bytes.
    """

    def __init__(self, lengths: ArrayLike, global_batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.num_samples = self.lengths.size
        self.global_batch_size, self.seed = global_batch_size, seed
        if not self.num_samples:
            raise ValueError("an order needs at least one sample, not 0")
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def sample_at(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Sample numbers [P] at stream positions [P]. Raises ValueError for a negative position."""
        epochs, places = epochs_and_places(positions, self.num_samples)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            numbers[here] = self._permutation(epoch)[places[here]]
        return numbers

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self._epoch_seed(epoch))
            order = modality_length_order(self.lengths.tolist(), self.global_batch_size, 1, generator)
            self._epoch = epoch, np.array(order, np.int64)
        return self._epoch[1]

    def _epoch_seed(self, epoch: int) -> int:
        """`seed` in the first epoch, as in the reference, then a hash of seed and epoch."""
        if epoch == 0:
            return self.seed
        return int(keys(self.seed, epoch)[0])


def modality_length_order(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator
) -> list[int]:
    """The reference's LengthGroupedSampler with group_by_modality (ross_trainer.py:60-130): sample numbers [N].

    `lengths`: positive for a sample with a picture, negative without; `world_size`: devices times accumulation steps,
    so that a megabatch of batch_size * world_size samples is one optimizer step. Each modality is shuffled and cut into
    megabatches; the last one of each is appended at the end, sorted by sample number; the others are shuffled. Raises
    ValueError for a length of zero.
    """
    if 0 in lengths:
        raise ValueError(f"sample {lengths.index(0)} has length 0, so its modality is unknown")
    with_picture = [number for number, length in enumerate(lengths) if length > 0]
    text_alone = [number for number, length in enumerate(lengths) if length < 0]
    if not with_picture or not text_alone:
        return list(chain.from_iterable(_length_grouped(lengths, batch_size, world_size, generator)))
    megabatches: list[list[int]] = []
    left: list[int] = []
    for numbers in (with_picture, text_alone):
        sizes = [abs(lengths[number]) for number in numbers]
        grouped = [
            [numbers[place] for place in group] for group in _length_grouped(sizes, batch_size, world_size, generator)
        ]
        megabatches += grouped[:-1]
        left += grouped[-1]
    shuffled = torch.randperm(len(megabatches), generator=generator).tolist()
    return [*chain.from_iterable(megabatches[place] for place in shuffled), *sorted(left)]


def _length_grouped(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator
) -> list[list[int]]:
    """Random megabatches of numbers below len(lengths), each split evenly over `world_size` devices."""
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    megabatches = []
    for start in range(0, len(shuffled), batch_size * world_size):
        falling = sorted(shuffled[start : start + batch_size * world_size], key=lambda number: -lengths[number])
        parts = _even_parts(falling, lengths, world_size)
        megabatches.append(list(chain.from_iterable(parts)))
    return megabatches


def _even_parts(numbers: list[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """`numbers` in `count` parts of equal size and similar total length: each goes to the shortest part so far.

    If the parts cannot have equal sizes, numbers go to the parts in turn.
    """
    if len(numbers) % count:
        return [numbers[part::count] for part in range(count)]
    parts: list[list[int]] = [[] for _ in range(count)]
    totals: list[float] = [0] * count
    for number in numbers:
        shortest = totals.index(min(totals))
        parts[shortest].append(number)
        full = len(parts[shortest]) == len(numbers) // count
        totals[shortest] = math.inf if full else totals[shortest] + lengths[number]
    return parts


def epochs_and_places(positions: ArrayLike, num_samples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Stream positions [P] -> (epoch [P], place in the epoch [P]). Raises ValueError for a negative position."""
    stream = np.atleast_1d(np.asarray(positions, dtype=np.int64))
    if stream.size and stream.min() < 0:
        raise ValueError(f"position {stream.min()} is before the start of the stream")
    return np.divmod(stream, num_samples)


def keys(seed: int, *numbers: ArrayLike) -> NDArray[np.uint64]:
    """Keys [1 or P], a hash of the seed and of numbers ([P] each, or one for all)."""
    key = _mix(np.full(1, seed % 2**64, np.uint64))
    for number in numbers:
        key = _mix(key ^ np.asarray(number, np.int64).astype(np.uint64))
    return key


def permute(place: NDArray[np.int64], size: ArrayLike, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The images [P] of place [P] under a permutation of range(size) for every key; size and key [P] or one for all."""
    below = np.broadcast_to(np.asarray(size, np.uint64), place.shape)
    bits = np.frexp((below - np.uint64(1)).astype(np.float64))[1]  # of the largest number, exact below 2^53
    half_bits = np.maximum(1, (bits + 1) // 2).astype(np.uint64)
    turns = np.broadcast_to(_mix(key + _TURNS), (ROUNDS, *place.shape))
    number = _feistel(place.astype(np.uint64), turns, half_bits)
    while (outside := number >= below).any():
        number[outside] = _feistel(number[outside], turns[:, outside], half_bits[outside])
    return number.astype(np.int64)


def _feistel(value: NDArray[np.uint64], keys: NDArray[np.uint64], half_bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection on 2 * half_bits bits; value [P], keys [ROUNDS, P], half_bits [P]."""
    low = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & low
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & low)
    return (left << half_bits) | right


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014); arrays of uint64 wrap around silently."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def evenly_spaced(num_samples: int, most: int) -> list[int]:
    """At most `most` sample numbers, evenly spaced from the first to the last of `num_samples`."""
    spaced = np.linspace(0, num_samples - 1, min(num_samples, most)).round().astype(np.int64)
    numbers: list[int] = np.unique(spaced).tolist()
    return numbers


def sample_digest(keys: Iterable[str]) -> str:
    """First 16 hex digits of the SHA-256 of a step's sample keys, in global order, joined by newlines."""
    return hashlib.sha256("\n".join(keys).encode("utf-8")).hexdigest()[:16]
