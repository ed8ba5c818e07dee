"""The order: a permutation in every epoch, the same however it is divided, cheap at any size."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ross_mcore.data.order import SampleOrder, micro_batch_positions, sample_digest


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(-(2**63), 2**64), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = SampleOrder(size, seed)
    numbers = order.sample_at(np.arange(size) + epoch * size)
    assert np.array_equal(np.sort(numbers), np.arange(size))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first = SampleOrder(1000, 7).sample_at(np.arange(2000))
    assert not np.array_equal(first[:1000], first[1000:])
    assert not np.array_equal(first, SampleOrder(1000, 8).sample_at(np.arange(2000)))
    assert np.array_equal(first, SampleOrder(1000, 7).sample_at(np.arange(2000)))


def test_the_order_is_fixed_for_ever() -> None:
    """Changing these numbers changes every run that is resumed."""
    assert SampleOrder(10, 0).sample_at(np.arange(20)).tolist() == RECORDED
    assert SampleOrder(10**9, 123).sample_at([0, 1, 10**9]).tolist() == RECORDED_LARGE


def test_places_are_spread_evenly() -> None:
    """Over many seeds each sample is as likely as any other at each place, within 4.5 binomial deviations."""
    size, seeds = 7, 1500
    counts = np.zeros((size, size))
    for seed in range(seeds):
        counts[np.arange(size), SampleOrder(size, seed).sample_at(np.arange(size))] += 1
    spread = np.sqrt(seeds / size * (1 - 1 / size))
    assert np.abs(counts - seeds / size).max() < 4.5 * spread


def test_neighbours_are_unrelated() -> None:
    numbers = SampleOrder(100_000, 3).sample_at(np.arange(100_000))
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers, np.arange(100_000))[0, 1]) < 0.02


def test_a_far_position_costs_no_more_than_a_near_one() -> None:
    began = time.perf_counter()
    SampleOrder(10**9, 1).sample_at(np.arange(10**11, 10**11 + 256))
    assert time.perf_counter() - began < 0.2


def test_without_shuffling_the_order_is_that_of_the_shards() -> None:
    assert SampleOrder(3, 0, shuffle=False).sample_at(range(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_what_is_no_order_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        SampleOrder(0, 1)
    with pytest.raises(ValueError, match="before the start"):
        SampleOrder(3, 1).sample_at([-1])


@given(
    dp_size=st.integers(1, 6),
    micro_batch_size=st.integers(1, 5),
    count=st.integers(1, 4),
    consumed=st.integers(0, 10**9),
)
def test_every_split_covers_the_same_global_batch(
    dp_size: int, micro_batch_size: int, count: int, consumed: int
) -> None:
    parts = [
        micro_batch_positions(consumed, number, rank, dp_size, micro_batch_size)
        for number in range(count)
        for rank in range(dp_size)
    ]
    total = dp_size * micro_batch_size * count
    assert np.concatenate(parts).tolist() == list(range(consumed, consumed + total))


def test_digest() -> None:
    assert sample_digest(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()[:16]
    assert sample_digest(["b", "a"]) != sample_digest(["a", "b"])


RECORDED = [8, 2, 6, 1, 7, 4, 5, 9, 0, 3, 4, 3, 8, 6, 9, 2, 5, 7, 0, 1]
RECORDED_LARGE = [791974193, 885724410, 975560554]
