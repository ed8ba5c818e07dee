"""The order: a permutation in every epoch, the same for every division, fast at any size."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ross_mcore.data.order import (
    BlockOrder,
    ModalityLengthOrder,
    SampleOrder,
    modality_length_order,
    sample_digest,
)
from ross_mcore.data.rows import micro_batches


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


def test_the_order_never_changes() -> None:
    """Changing these numbers changes every run that is resumed."""
    assert SampleOrder(10, 0).sample_at(np.arange(20)).tolist() == RECORDED
    assert SampleOrder(10**9, 123).sample_at([0, 1, 10**9]).tolist() == RECORDED_LARGE
    assert BlockOrder(10, 0, 3, 2).sample_at(np.arange(20)).tolist() == RECORDED_BLOCKS
    assert BlockOrder(10**9, 123).sample_at([0, 1, 10**9]).tolist() == RECORDED_LARGE_BLOCKS


def test_places_are_spread_evenly() -> None:
    """Over many seeds, all samples are equally likely at each place, within 4.5 standard deviations."""
    size, seeds = 7, 500
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
    began = time.process_time()
    SampleOrder(10**9, 1).sample_at(np.arange(10**11, 10**11 + 256))
    assert time.process_time() - began < 20


def test_without_shuffling_the_order_is_that_of_the_shards() -> None:
    assert SampleOrder(3, 0, shuffle=False).sample_at(range(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]


@settings(max_examples=75, deadline=None)
@given(
    size=st.integers(1, 3000),
    seed=st.integers(-(2**63), 2**64),
    epoch=st.integers(0, 10**6),
    block_samples=st.integers(1, 4000),
    window_blocks=st.integers(1, 60),
)
def test_every_epoch_in_blocks_is_a_permutation(
    size: int, seed: int, epoch: int, block_samples: int, window_blocks: int
) -> None:
    order = BlockOrder(size, seed, block_samples, window_blocks)
    numbers = order.sample_at(np.arange(size) + epoch * size)
    assert np.array_equal(np.sort(numbers), np.arange(size))


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 3000),
    seed=st.integers(0, 2**64),
    block_samples=st.integers(10, 100),
    window_blocks=st.integers(1, 20),
)
@pytest.mark.slow
def test_a_window_reads_few_places_to_their_ends(size: int, seed: int, block_samples: int, window_blocks: int) -> None:
    """A window reads its blocks, and one more place where the rotated samples wrap around."""
    order = BlockOrder(size, seed, block_samples, window_blocks)
    starts = range(0, size // order.window_samples * order.window_samples, order.window_samples)
    for start in starts:
        end = size if start == starts[-1] else start + order.window_samples
        numbers = np.sort(order.sample_at(np.arange(start, end)))
        assert np.count_nonzero(np.diff(numbers) > 1) + 1 <= -(-(end - start) // block_samples) + 1


def test_a_block_order_of_a_thousand_million_samples() -> None:
    """At any position: in range, no number twice in a window, from 32 places, and fast."""
    order = BlockOrder(10**9, 4)
    for start in (0, 10**8 // order.window_samples * order.window_samples, 7 * 10**9):
        began = time.process_time()
        numbers = np.sort(order.sample_at(np.arange(start, start + order.window_samples)))
        assert time.process_time() - began < 20
        assert numbers[0] >= 0 and numbers[-1] < 10**9
        assert np.unique(numbers).size == numbers.size
        if start < 10**9:
            assert np.count_nonzero(np.diff(numbers) > 1) < order.window_blocks + 1
    anywhere = np.unique(np.random.default_rng(0).integers(0, 10**9, 20_000))
    assert np.unique(order.sample_at(anywhere)).size == anywhere.size


def test_blocks_and_the_samples_in_them_are_shuffled_anew_every_epoch() -> None:
    size = 100_000
    order = BlockOrder(size, 3, 50, 40)
    first, second = order.sample_at(np.arange(2 * size)).reshape(2, size)
    assert (first == second).sum() < 20
    for numbers in (first, second):
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.1
        means = numbers.reshape(-1, order.window_samples).mean(1)
        assert abs(np.corrcoef(means, np.arange(means.size))[0, 1]) < 0.5
    one_window, next_window = first[: 2 * order.window_samples].reshape(2, -1)
    assert np.unique((one_window - next_window) % 50).size > 25  # another permutation of the samples in their blocks
    others = BlockOrder(size, 4, 50, 40).sample_at(np.arange(size))
    assert (first == others).sum() < 20


def test_places_in_blocks_are_spread_evenly() -> None:
    """All samples are equally likely at each place, though one block is short and one window is long."""
    size, seeds = 7, 500
    counts = np.zeros((size, size))
    for seed in range(seeds):
        counts[np.arange(size), BlockOrder(size, seed, 2, 1).sample_at(np.arange(size))] += 1
    spread = np.sqrt(seeds / size * (1 - 1 / size))
    assert np.abs(counts - seeds / size).max() < 4.5 * spread


def test_malformed_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="block_samples=0"):
        BlockOrder(3, 1, block_samples=0)
    with pytest.raises(ValueError, match="before the start"):
        BlockOrder(3, 1).sample_at([-1])
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
    rows = range(consumed, consumed + dp_size * micro_batch_size * count)
    ranks = [micro_batches(rows, micro_batch_size, rank, dp_size) for rank in range(dp_size)]
    parts = [ranks[rank][number] for number in range(count) for rank in range(dp_size)]
    assert np.concatenate(parts).tolist() == list(rows)


def test_digest() -> None:
    assert sample_digest(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()[:16]
    assert sample_digest(["b", "a"]) != sample_digest(["a", "b"])


def recorded_orders() -> list[dict[str, Any]]:
    """Compared with recorded output of the reference's LengthGroupedSampler."""
    path = Path(__file__).parents[2] / "golden" / "data" / "sampler.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", recorded_orders())
def test_modality_and_length_order_is_the_reference_s(case: dict[str, Any]) -> None:
    lengths, batch, world, seed = (case[name] for name in ("lengths", "batch_size", "world_size", "torch_seed"))
    assert modality_length_order(lengths, batch, world, torch.Generator().manual_seed(seed)) == case["indices"]


def test_one_megabatch_is_divided_evenly() -> None:
    """By decreasing length to the shortest of two devices; in turn if the number is odd; also without pictures."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        assert modality_length_order([4, 9, 2, 8], 2, 2, generator) == [1, 2, 3, 0]
        assert modality_length_order([4, 9, 2], 2, 2, generator) == [1, 2, 0]
        assert modality_length_order([-4, -9, -2, -8], 2, 2, generator) == [2, 0, 3, 1]


@pytest.mark.parametrize("case", recorded_orders())
def test_steps_of_the_first_epoch_have_the_reference_s_rows(case: dict[str, Any]) -> None:
    """The reference, with its devices, and ours have the same samples in every step, in any order."""
    size, rows = len(case["lengths"]), case["batch_size"] * case["world_size"]
    found = ModalityLengthOrder(case["lengths"], rows, case["torch_seed"]).sample_at(range(size)).tolist()
    for start in range(0, size, rows):
        assert sorted(found[start : start + rows]) == sorted(case["indices"][start : start + rows])


LENGTHS = st.lists(st.integers(-60, 60).filter(bool), min_size=1, max_size=150)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, rows=st.integers(1, 12), seed=st.integers(-(2**63), 2**63), epoch=st.integers(0, 10**6))
def test_epochs_by_modality_are_permutations_of_pure_steps(
    lengths: list[int], rows: int, seed: int, epoch: int
) -> None:
    size, values = len(lengths), np.array(lengths)
    numbers = ModalityLengthOrder(lengths, rows, seed).sample_at(np.arange(size) + epoch * size)
    assert np.array_equal(np.sort(numbers), np.arange(size))
    both = (values > 0).any() and (values < 0).any()
    full = sum((count - 1) // rows for count in ((values > 0).sum(), (values < 0).sum()) if count)
    for step in range(full if both else size // rows):
        signs = values[numbers[step * rows : (step + 1) * rows]]
        assert (signs > 0).all() or (signs < 0).all()
        assert (np.diff(np.abs(signs) if both else signs) <= 0).all()
    if both:
        assert (np.diff(numbers[full * rows :]) > 0).all()


def test_a_modality_order_does_not_depend_on_earlier_calls() -> None:
    lengths = [(-1) ** n * (n + 1) for n in range(50)]
    whole = ModalityLengthOrder(lengths, 4, 9).sample_at(range(200))
    assert len({tuple(whole[start : start + 50]) for start in (0, 50, 100, 150)}) == 4
    again = ModalityLengthOrder(lengths, 4, 9)
    assert again.num_samples == 50
    assert again.sample_at(range(90, 110)).tolist() == whole[90:110].tolist()
    assert again.sample_at([3]).tolist() == [whole[3]]
    assert ModalityLengthOrder(lengths, 4, 10).sample_at(range(200)).tolist() != whole.tolist()
    assert whole[50:58].tolist() == SECOND_EPOCH  # changing these numbers changes every run that is resumed


def test_computing_an_epoch_takes_proportional_time() -> None:
    lengths = np.arange(1, 200_001)
    began = time.process_time()
    ModalityLengthOrder(lengths, 128, 0).sample_at([0])
    assert time.process_time() - began < 20


def test_malformed_modality_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="sample 1 has length 0"):
        modality_length_order([3, 0, -2], 2, 1, torch.Generator())
    with pytest.raises(ValueError, match="at least one"):
        ModalityLengthOrder([], 2, 1)
    with pytest.raises(ValueError, match="before the start"):
        ModalityLengthOrder([1], 2, 1).sample_at([-1])


RECORDED = [8, 2, 6, 1, 7, 4, 5, 9, 0, 3, 4, 3, 8, 6, 9, 2, 5, 7, 0, 1]
RECORDED_LARGE = [791974193, 885724410, 975560554]
RECORDED_BLOCKS = [6, 9, 4, 0, 2, 3, 7, 8, 5, 1, 3, 1, 6, 2, 9, 8, 7, 5, 0, 4]
RECORDED_LARGE_BLOCKS = [500307285, 308764298, 569044333]
SECOND_EPOCH = [49, 35, 17, 15, 48, 40, 34, 6]
