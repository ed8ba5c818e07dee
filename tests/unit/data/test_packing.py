"""Packing: every sample in one row, no row too long, few rows, rows that never change."""

from __future__ import annotations

import time

import numpy as np
import pytest
from counting import slots
from hypothesis import given, settings
from hypothesis import strategies as st

from ross_mcore.data.packing import even_shares, longest_first, pack, unpacked
from ross_mcore.data.rows import PlannedRow, by_length

NOTHING = np.empty(0, np.int64)
WINDOWS = st.integers(1, 60).flatmap(
    lambda row: st.tuples(st.just(row), st.lists(st.integers(1, row), min_size=0, max_size=200))
)


@settings(max_examples=100, deadline=None)
@given(window=WINDOWS, key=st.integers(0, 2**40))
def test_every_sample_is_in_one_row_that_holds_it(window: tuple[int, list[int]], key: int) -> None:
    row_tokens, lengths = window
    rows = pack(lengths, row_tokens, key)
    assert sorted(rows.items.tolist()) == list(range(len(lengths)))
    assert rows.offsets[0] == 0 and rows.offsets[-1] == len(lengths) and len(rows) == rows.offsets.size - 1
    for number in range(len(rows)):
        items = rows.items[rows.offsets[number] : rows.offsets[number + 1]]
        assert items.size and (np.diff(items) > 0).all()
        assert rows.tokens[number] == sum(lengths[item] for item in items) <= row_tokens
    if lengths:
        assert len(rows) <= 11 / 9 * fewest(lengths, row_tokens) + 1 or not exact(lengths)


def exact(lengths: list[int]) -> bool:
    return len(lengths) <= 7


def fewest(lengths: list[int], row_tokens: int) -> int:
    """The minimum number of rows, by exhaustive search."""
    if not exact(lengths):
        return 0
    best = len(lengths)

    def place(number: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if number == len(lengths):
            best = len(rooms)
            return
        for row, room in enumerate(rooms):
            if room >= lengths[number]:
                place(number + 1, [*rooms[:row], room - lengths[number], *rooms[row + 1 :]])
        place(number + 1, [*rooms, row_tokens - lengths[number]])

    place(0, [])
    return best


@settings(max_examples=100, deadline=None)
@given(window=WINDOWS)
def test_longest_first_is_best_fit(window: tuple[int, list[int]]) -> None:
    """The rows have the same numbers of tokens as from a plain search over all rows."""
    row_tokens, lengths = window
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(row_tokens - length)
    row_of = longest_first(np.array(lengths, np.int64), row_tokens)
    filled = np.bincount(row_of, weights=lengths) if lengths else np.empty(0)
    assert sorted(filled) == sorted(row_tokens - room for room in rooms)


def test_each_rule_wins_somewhere() -> None:
    """Even shares wins if every sample is long, longest first if short ones fill the gaps; the better one is used."""
    rng = np.random.default_rng(0)
    both = {longest_first: [0, 0], even_shares: [0, 0]}
    pictures = 729 + rng.integers(20, 400, 4000)
    mixed = np.where(rng.random(4000) < 0.5, rng.integers(700, 1100, 4000), rng.integers(10, 100, 4000))
    for rule, counts in both.items():
        counts[:] = [int(rule(lengths, 4096).max()) + 1 for lengths in (pictures, mixed)]
    assert both[even_shares][0] < both[longest_first][0]
    assert both[longest_first][1] < both[even_shares][1]
    for lengths, counts in zip((pictures, mixed), zip(*both.values())):
        assert len(pack(lengths, 4096, 0)) == min(counts)


def test_even_shares_by_hand() -> None:
    """10 opens a row; two of mean 5 fit in its room of 10: 5 is added, then 5 closes it. 8 opens; then three of 4."""
    lengths = np.array([5, 10, 5, 4, 4, 4, 8])
    filled = np.bincount(even_shares(lengths, 20), weights=lengths)
    assert filled.tolist() == [20, 20]


def test_rows_do_not_come_by_length() -> None:
    lengths = np.random.default_rng(1).integers(1, 1000, 5000)
    rows = pack(lengths, 1024, key=3)
    longest = [lengths[rows.items[a:b]].max() for a, b in zip(rows.offsets[:-1], rows.offsets[1:])]
    assert abs(np.corrcoef(longest, np.arange(len(rows)))[0, 1]) < 0.1
    assert pack(lengths, 1024, key=4).items.tolist() != rows.items.tolist()
    assert pack(lengths.tolist(), 1024, key=3).items.tolist() == rows.items.tolist()


def test_the_rows_never_change() -> None:
    """Changing these numbers changes every run that is resumed."""
    rows = pack([3, 9, 4, 4, 1, 6, 2, 7], 10, key=5)
    assert (rows.items.tolist(), rows.offsets.tolist(), rows.tokens.tolist()) == RECORDED


@pytest.mark.slow
def test_the_rows_of_the_recipes_are_full() -> None:
    """On realistic lengths, planned in seconds."""
    began = time.process_time()
    fills = list(slots.of_recipes())
    assert time.process_time() - began < 5 * len(fills)
    assert len(fills) == 4 and min(fill for *_, fill in fills) > 0.95


def test_rows_of_one_sample_are_full_when_they_are_dealt_by_length() -> None:
    """Steps of 128 samples, micro-batches of two rows on each of two ranks: 42% and then 96% of the slots are real."""
    steps = slots.realistic("finetune", 729, 64 * 128).reshape(64, 128)
    assert 0.40 < slots.padded_to_step(steps) < 0.45
    assert slots.padded_to_micro_batch(steps, rows=2, ranks=2) > 0.95


def test_rows_of_one_length_keep_their_order() -> None:
    lengths = [3, 9, 3, 9, 3, 1]
    assert by_length([PlannedRow(NOTHING, NOTHING, tokens) for tokens in lengths]) == [1, 3, 0, 2, 4, 5]


def test_a_plan_is_small() -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, 10_000)
    for rows in (pack(lengths, 4096, 0), unpacked(lengths)):
        assert rows.items.nbytes + rows.offsets.nbytes + rows.tokens.nbytes < 16 * lengths.size


def test_unpacked_is_a_row_for_every_sample() -> None:
    rows = unpacked([5, 2, 9])
    assert rows.items.tolist() == [0, 1, 2] and rows.offsets.tolist() == [0, 1, 2, 3]
    assert rows.tokens.tolist() == [5, 2, 9]


@pytest.mark.parametrize("length", [0, -1, 11])
def test_a_sample_that_fits_no_row_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"sample 2 of the window has {length} tokens, and a row holds 1 to 10"):
        pack([5, 10, length], 10, 0)


RECORDED = ([2, 5, 3, 6, 0, 7, 1, 4], [0, 2, 4, 6, 8], [10, 6, 10, 10])
