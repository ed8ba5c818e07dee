"""Mixtures: exact shares in every epoch, close shares in every range, each data set in its own order."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ross_mcore.data.mixture import MOST_SAMPLES, MixtureOrder, counts_by_epochs, counts_by_weight
from ross_mcore.data.order import BlockOrder, SampleOrder
from ross_mcore.data.rows import RowStream


@st.composite
def mixtures(draw: Any) -> MixtureOrder:
    sizes = draw(st.lists(st.integers(1, 300), min_size=1, max_size=6))
    counts = draw(st.lists(st.integers(1, 300), min_size=len(sizes), max_size=len(sizes)))
    orders = tuple(BlockOrder(size, which, 7, 3) for which, size in enumerate(sizes))
    return MixtureOrder(orders, tuple(counts), draw(st.integers(0, 2**64)), draw(st.integers(1, 400)))


@settings(max_examples=40, deadline=None)
@given(mixture=mixtures(), epoch=st.integers(0, 10**4))
def test_an_epoch_takes_the_next_samples_of_every_data_set(mixture: MixtureOrder, epoch: int) -> None:
    positions = np.arange(mixture.num_samples) + epoch * mixture.num_samples
    datasets, local = mixture.source_at(positions)
    numbers = mixture.sample_at(positions)
    for which, (order, count) in enumerate(zip(mixture.orders, mixture.counts)):
        here = datasets == which
        assert sorted(local[here].tolist()) == list(range(epoch * count, (epoch + 1) * count))
        assert (numbers[here] - mixture.offsets[which]).tolist() == order.sample_at(local[here]).tolist()
    assert (datasets >= 0).all()
    assert mixture.offsets[-1] == sum(order.num_samples for order in mixture.orders)


@settings(max_examples=75, deadline=None)
@given(mixture=mixtures(), blocks=st.integers(0, 20))
def test_shares_are_close_after_any_number_of_blocks(mixture: MixtureOrder, blocks: int) -> None:
    """Within less than the number of data sets after any number of blocks; at any place with blocks of one."""
    end = min(blocks * mixture.block_samples, mixture.num_samples)
    datasets, _ = mixture.source_at(np.arange(end))
    for which, count in enumerate(mixture.counts):
        assert abs((datasets == which).sum() - end * count / mixture.num_samples) < len(mixture.counts)


@settings(max_examples=25, deadline=None)
@given(mixture=mixtures(), places=st.lists(st.integers(0, 10**9), min_size=1, max_size=12))
def test_a_position_is_found_without_its_neighbours(mixture: MixtureOrder, places: list[int]) -> None:
    together = mixture.sample_at(places)
    assert [int(mixture.sample_at(place)[0]) for place in places] == together.tolist()


@settings(max_examples=50, deadline=None)
@given(
    data=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 4)), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
)
def test_whole_epochs_pass_over_each_data_set_that_often(data: list[tuple[int, int]], seed: int) -> None:
    sizes, epochs = zip(*data)
    counts = counts_by_epochs(sizes, epochs)
    mixture = MixtureOrder(tuple(SampleOrder(size, seed) for size in sizes), counts, seed)
    assert mixture.num_samples == sum(size * times for size, times in data)
    for epoch in range(2):
        numbers = mixture.sample_at(np.arange(mixture.num_samples) + epoch * mixture.num_samples)
        often = np.bincount(numbers, minlength=sum(sizes))
        assert often.tolist() == np.repeat(epochs, sizes).tolist()


def test_data_sets_are_mixed_and_the_pattern_does_not_repeat() -> None:
    mixture = MixtureOrder((SampleOrder(500, 0), SampleOrder(900, 1)), (50_000, 150_000), seed=3)
    datasets, _ = mixture.source_at(np.arange(200_000))
    batches = datasets.reshape(-1, 100).sum(1)
    deviation = np.sqrt(100 * 0.25 * 0.75)
    assert 0.8 * deviation < batches.std() < 1.1 * deviation
    assert np.abs(batches - 75).max() < 5 * deviation
    assert abs(np.corrcoef(datasets[1:], datasets[:-1])[0, 1]) < 0.02
    assert abs(np.corrcoef(datasets[1024:], datasets[:-1024])[0, 1]) < 0.02
    again, _ = mixture.source_at(np.arange(200_000, 400_000))
    assert abs(np.corrcoef(datasets, again)[0, 1]) < 0.02


def test_rows_of_a_mixture_hold_each_position_once() -> None:
    mixture = MixtureOrder((BlockOrder(40, 0, 4, 2), BlockOrder(90, 1, 4, 2)), counts_by_epochs([40, 90], [2, 0.5]), 5)
    stream = RowStream(mixture, lambda numbers: 1 + numbers % 20, 20, packed=True, window_samples=50)
    rows = []
    while stream.cursor.consumed_samples < mixture.num_samples:
        rows += stream.take(1)
    assert sorted(np.concatenate([row.positions for row in rows]).tolist()) == list(range(125))
    numbers = np.concatenate([row.samples for row in rows])
    assert np.bincount(numbers, minlength=130)[:40].tolist() == [2] * 40
    assert np.bincount(numbers, minlength=130)[40:].max() == 1


def test_counts() -> None:
    assert counts_by_epochs([10, 300], [2, 0.5]) == (20, 150)
    assert counts_by_weight([10, 300], [1, 1]) == (155, 155)
    assert counts_by_weight([3, 4, 3], [0.1, 0.1, 0.1]) == (4, 3, 3)
    assert counts_by_weight([10, 90], [0.7, 0.3]) == (70, 30)
    assert sum(counts_by_weight([7, 11, 13, 17], [0.3, 1.7, 2.9, 1e-1])) == 48


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(100, 10**6), st.floats(0.5, 2.0)), min_size=1, max_size=6))
def test_counts_by_weight_are_whole_shares(data: list[tuple[int, float]]) -> None:
    sizes, weights = zip(*data)
    counts = counts_by_weight(sizes, weights)
    assert sum(counts) == sum(sizes)
    for count, weight in zip(counts, weights):
        assert abs(count - weight * sum(sizes) / sum(weights)) < 1 + 1e-6


def test_a_mixture_of_a_thousand_million_samples() -> None:
    sizes = [6 * 10**8, 10**9, 1000]
    mixture = MixtureOrder(tuple(BlockOrder(size, 0) for size in sizes), counts_by_epochs(sizes, [2, 1, 3]), 1)
    for start in (0, 10**8, mixture.num_samples - 5000, 7 * 10**10):
        began = time.process_time()
        positions = np.arange(start, start + 10_000)
        datasets, local = mixture.source_at(positions)
        numbers = mixture.sample_at(positions)
        assert time.process_time() - began < 5
        assert np.unique(np.stack([datasets, local]), axis=1).shape[1] == positions.size
        assert numbers.min() >= 0 and numbers.max() < sum(sizes)
        assert abs((datasets == 0).mean() - 12 / 22) < 0.05
    last, local = mixture.source_at(np.arange(mixture.num_samples - 2048, mixture.num_samples))
    assert (local < np.array(mixture.counts)[last]).all()


def test_malformed_mixtures_are_refused() -> None:
    order = SampleOrder(3, 0)
    with pytest.raises(ValueError, match="a count for every data set: 1 and 2"):
        MixtureOrder((order,), (1, 2), 0)
    with pytest.raises(ValueError, match="samples of every data set"):
        MixtureOrder((order,), (0,), 0)
    with pytest.raises(ValueError, match="lower epochs"):
        MixtureOrder((order,), (MOST_SAMPLES + 1,), 0)
    with pytest.raises(ValueError, match="data set 1: weight=0 is not above zero"):
        counts_by_weight([3, 4], [1, 0])
    with pytest.raises(ValueError, match="data set 1: epochs=nan is not above zero"):
        counts_by_epochs([3, 4], [1, float("nan")])
    with pytest.raises(ValueError, match="data set 0: epochs=0.1 leaves it no sample of the 4"):
        counts_by_epochs([3, 4], [0.1, 1])
    with pytest.raises(ValueError, match="2 data sets and 1 times weight"):
        counts_by_weight([3, 4], [1])
    with pytest.raises(ValueError, match="before the start"):
        MixtureOrder((order,), (3,), 0).sample_at([-1])
