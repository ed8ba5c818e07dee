"""The global order of samples: a pure function of (seed, epoch, position), the same in every layout.

The training stream is an endless sequence of positions 0, 1, 2, ...; position p lies in epoch p // N at place p % N,
and each epoch is a keyed permutation of the N samples. The permutation is computed, never stored: a balanced Feistel
network over the smallest even number of bits that holds N, walked along its cycle until it lands below N (Black and
Rogaway 2002, "Ciphers with arbitrary finite domains"). Only fixed 64-bit integer arithmetic is used, so an order does
not depend on the version of numpy's generators. Legend: P positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 8


@dataclass(frozen=True)
class SampleOrder:
    """The order over `num_samples` samples; `shuffle=False` is the order of the shards (evaluation)."""

    num_samples: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"an order needs at least one sample, not {self.num_samples}")

    def sample_at(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Sample numbers [P] at stream positions [P]. Raises ValueError for a negative position."""
        stream = np.atleast_1d(np.asarray(positions, dtype=np.int64))
        if stream.size and stream.min() < 0:
            raise ValueError(f"position {stream.min()} is before the start of the stream")
        epoch, place = np.divmod(stream, self.num_samples)
        if not self.shuffle:
            return place
        size = np.uint64(self.num_samples)
        half_bits = np.uint64(max(1, ((self.num_samples - 1).bit_length() + 1) // 2))
        keys = _mix(np.full(1, self.seed % 2**64, np.uint64)) ^ epoch.astype(np.uint64)
        keys = np.stack([_mix(keys + np.uint64(turn << 56)) for turn in range(ROUNDS)])
        number = _feistel(place.astype(np.uint64), keys, half_bits)
        while (outside := number >= size).any():
            number[outside] = _feistel(number[outside], keys[:, outside], half_bits)
        return number.astype(np.int64)


def _feistel(value: NDArray[np.uint64], keys: NDArray[np.uint64], half_bits: np.uint64) -> NDArray[np.uint64]:
    """A bijection on 2 * half_bits bits; value [P], keys [ROUNDS, P]."""
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


def micro_batch_positions(
    consumed_samples: int, micro_batch: int, dp_rank: int, dp_size: int, micro_batch_size: int
) -> NDArray[np.int64]:
    """Stream positions [micro_batch_size] of micro-batch number `micro_batch` of a step on a data-parallel rank.

    Any split of a global batch into ranks and micro-batches covers the same positions, consumed_samples onwards.
    """
    start = consumed_samples + (micro_batch * dp_size + dp_rank) * micro_batch_size
    return np.arange(start, start + micro_batch_size, dtype=np.int64)


def sample_digest(keys: Iterable[str]) -> str:
    """First 16 hex digits of the SHA-256 of a step's sample keys, in global order, joined by newlines."""
    return hashlib.sha256("\n".join(keys).encode("utf-8")).hexdigest()[:16]
