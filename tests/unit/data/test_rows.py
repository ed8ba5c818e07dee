"""Rows: each sample of an epoch once, the same rows for every division, after resuming and skipping."""

from __future__ import annotations

import time
import tracemalloc
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ross_mcore.data.order import BlockOrder, SampleOrder
from ross_mcore.data.rows import PlannedRow, RowStream, micro_batches

ROW_TOKENS = 50


@st.composite
def streams(draw: Any) -> tuple[Any, int]:
    """A function that opens the same stream again, and the number of samples of an epoch."""
    lengths = np.array(draw(st.lists(st.integers(1, ROW_TOKENS), min_size=1, max_size=60)))
    seed, blocks = draw(st.integers(0, 2**32)), (draw(st.integers(1, 20)), draw(st.integers(1, 6)))
    packed, window = draw(st.booleans()), draw(st.integers(1, 80))

    def open_stream() -> RowStream:
        order = BlockOrder(lengths.size, seed, *blocks)
        return RowStream(order, lambda numbers: lengths[numbers], ROW_TOKENS, packed, window)

    return open_stream, lengths.size


def plain(rows: list[PlannedRow]) -> list[tuple[list[int], list[int], int]]:
    return [(row.samples.tolist(), row.positions.tolist(), row.tokens) for row in rows]


def rows_of(stream: RowStream, epochs: int) -> list[PlannedRow]:
    """The rows of the next epochs, one at a time."""
    rows = []
    while stream.cursor.consumed_samples < epochs * stream.order.num_samples:
        rows += stream.take(1)
    return rows


@settings(max_examples=25, deadline=None)
@given(streams())
def test_the_rows_of_every_epoch_hold_each_sample_once(made: tuple[Any, int]) -> None:
    open_stream, size = made
    stream = open_stream()
    for epoch in range(3):
        rows = rows_of(stream, epoch + 1)
        positions = np.concatenate([row.positions for row in rows])
        samples = np.concatenate([row.samples for row in rows])
        assert sorted(positions.tolist()) == list(range(epoch * size, (epoch + 1) * size))
        assert sorted(samples.tolist()) == list(range(size))
        assert samples.tolist() == stream.order.sample_at(positions).tolist()
        assert stream.cursor.consumed_samples == (epoch + 1) * size
        for row in rows:
            assert row.tokens == stream.lengths(row.samples).sum() <= ROW_TOKENS
            assert stream.packed or row.samples.size == 1
    if not stream.packed:
        assert positions.tolist() == list(range(2 * size, 3 * size))


@settings(max_examples=20, deadline=None)
@given(made=streams(), stop=st.integers(0, 50), count=st.integers(0, 20))
def test_resuming_anywhere_gives_the_tail(made: tuple[Any, int], stop: int, count: int) -> None:
    open_stream, _ = made
    whole = open_stream().take(stop + count)
    stopped = open_stream()
    assert plain(stopped.take(stop)) == plain(whole[:stop])
    resumed, skipped = open_stream(), open_stream()
    resumed.load_state_dict(stopped.state_dict())
    skipped.skip(stop)
    assert stopped.state_dict() == resumed.state_dict() == skipped.state_dict()
    assert stopped.state_dict()["consumed_rows"] == stop
    assert stopped.state_dict()["consumed_samples"] == sum(row.samples.size for row in whole[:stop])
    for stream in (stopped, resumed, skipped):
        assert plain(stream.take(count)) == plain(whole[stop:])


@settings(max_examples=20, deadline=None)
@given(
    made=streams(),
    stop=st.integers(0, 3),
    before=st.sampled_from([(1, 1), (1, 2), (2, 3), (4, 1), (6, 2), (12, 1)]),
    after=st.sampled_from([(1, 1), (1, 2), (2, 3), (4, 1), (6, 2), (12, 1)]),
    workers=st.integers(1, 4),
)
def test_every_division_trains_the_same_rows_in_every_step(
    made: tuple[Any, int], stop: int, before: tuple[int, int], after: tuple[int, int], workers: int
) -> None:
    """Steps of 12 rows on (ranks, rows of a micro-batch), continued on other ones, each rank with workers."""
    open_stream, _ = made
    whole, stream = open_stream().take(12 * (stop + 2)), open_stream()
    for step in range(stop + 2):
        dp_size, micro_batch_size = before if step < stop else after
        if step == stop:
            state = stream.state_dict()
            stream = open_stream()
            stream.load_state_dict(state)
        rows = stream.take(12)
        ranks = [micro_batches(rows, micro_batch_size, rank, dp_size) for rank in range(dp_size)]
        dealt = [[ranks[rank][worker::workers] for worker in range(workers)] for rank in range(dp_size)]
        for rank in range(dp_size):
            taken = [dealt[rank][n % workers][n // workers] for n in range(len(ranks[rank]))]
            assert [plain(batch) for batch in taken] == [plain(batch) for batch in ranks[rank]]
        in_order = chain.from_iterable(zip(*ranks))
        assert plain(list(chain.from_iterable(in_order))) == plain(whole[12 * step : 12 * (step + 1)])


def test_a_step_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match="10 rows of a step are not a multiple of micro_batch_size=2 x data-parallel"):
        micro_batches(range(10), 2, 0, 2)
    assert micro_batches(range(8), 2, 1, 2) == [[2, 3], [6, 7]]


def test_another_stream_s_state_is_refused() -> None:
    lengths = np.random.default_rng(0).integers(1, ROW_TOKENS + 1, 1000)
    stream = RowStream(SampleOrder(1000, 0), lambda numbers: lengths[numbers], ROW_TOKENS, True, 100)
    stream.take(77)
    state = stream.state_dict()
    other = RowStream(SampleOrder(1000, 1), lambda numbers: lengths[numbers], ROW_TOKENS, True, 100)
    for broken in (state | {"first_row": state["first_row"] + 1}, state | {"first_row": 10**6}):
        with pytest.raises(ValueError, match="no place in these rows"):
            stream.load_state_dict(broken)
    with pytest.raises(ValueError, match="no place in these rows"):
        other.load_state_dict(state)
    for value in (-1, None, 1.0, True):
        with pytest.raises(ValueError, match="window=.* not a count"):
            stream.load_state_dict(state | {"window": value})
    assert stream.state_dict() == state
    with pytest.raises(ValueError, match="window_samples of at least 1, not 0"):
        RowStream(SampleOrder(3, 0), lambda numbers: numbers, 10, True, 0)


def lengths_of_a_thousand_million(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    return 600 + numbers * 7919 % 700


def test_a_thousand_million_samples_are_resumed_in_under_a_second() -> None:
    """At position 10^8, holding one window: under 16 bytes per sample."""
    order = BlockOrder(10**9, 11)

    def open_stream() -> RowStream:
        return RowStream(order, lengths_of_a_thousand_million, 4096, True, order.window_samples)

    stream, window = open_stream(), 10**8 // order.window_samples
    before = stream.window_positions(window)
    assert 10**8 in before
    began = time.process_time()
    state = {"consumed_rows": 1, "consumed_samples": before.start, "window": window, "first_row": 0}
    stream.load_state_dict(state)
    rows = stream.take(256)
    assert time.process_time() - began < 10
    assert all(before.start <= row.positions.min() <= row.positions.max() < before.stop for row in rows)
    again = open_stream()
    tracemalloc.start()
    again.load_state_dict(state)
    again.skip(100)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 16 * order.window_samples
    assert plain(again.take(156)) == plain(rows[100:])
