"""Several samples in one row: which samples of a window share a row of at most R tokens.

Two rules of best fit are tried and the one that needs fewer rows is taken. Longest first puts each sample in the
fullest row that still takes it, which uses at most 11/9 of the fewest rows possible, plus one (Johnson 1973,
"Near-optimal bin packing algorithms"), but ends with rows of short samples alone, and where every sample has a picture
these fill a row badly. Even shares fills one row after another with samples of about one length, and the last one
closes it. Sets of lengths are the bits of one integer, so that a step of either rule is a shift and a lowest or highest
set bit, and the time hardly depends on the window. benchmarks/packing.py measures both rules' rows.
Legend: n samples of the window, r rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ross_mcore.data.order import SampleOrder


@dataclass(frozen=True)
class Rows:
    """Rows of a window, in the order in which they are trained; at most 12 bytes a sample.

    items [n]: places in the window, row after row, rising in each row; row k has items[offsets[k]:offsets[k + 1]].
    offsets [r + 1]; tokens [r]: filled token slots of every row.
    """

    items: NDArray[np.int32]
    offsets: NDArray[np.int32]
    tokens: NDArray[np.int32]

    def __len__(self) -> int:
        return self.tokens.size


def pack(lengths: ArrayLike, row_tokens: int, key: int) -> Rows:
    """Rows of at most `row_tokens` tokens from the token lengths [n] of a window's samples, in stream order.

    A function of its arguments alone. Rows are shuffled by `key`, or else those of long samples would come first; in
    a row samples stand in stream order. Raises ValueError for a sample that has no token or does not fit a row.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    if tokens.size and not 1 <= tokens.min() <= tokens.max() <= row_tokens:
        item = int(np.argmax((tokens < 1) | (tokens > row_tokens)))
        raise ValueError(
            f"sample {item} of the window has {tokens[item]} tokens, and a row holds 1 to {row_tokens}: "
            "cut or drop such samples before they are packed"
        )
    row_of = min(longest_first(tokens, row_tokens), even_shares(tokens, row_tokens), key=_count)
    num_rows = _count(row_of)
    row_of = SampleOrder(max(1, num_rows), key).sample_at(row_of)
    filled = np.bincount(row_of, weights=tokens, minlength=num_rows)  # in float64, exact below 2^53
    ends = np.cumsum(np.bincount(row_of, minlength=num_rows))
    return Rows(_small(np.argsort(row_of, kind="stable")), _small(np.append(0, ends)), _small(filled))


def unpacked(lengths: ArrayLike) -> Rows:
    """A row for every sample, in stream order, from their token lengths [n]."""
    tokens = np.asarray(lengths)
    return Rows(_small(np.arange(tokens.size)), _small(np.arange(tokens.size + 1)), _small(tokens))


def longest_first(tokens: NDArray[np.int64], row_tokens: int) -> NDArray[np.int64]:
    """The row [n] of every sample: by falling length, each in the fullest that takes it, or else in a new one."""
    row_of = np.empty(tokens.size, np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    rooms = num_rows = 0  # bit b of rooms: some row has room for exactly b tokens
    falling = np.argsort(-tokens, kind="stable")
    for item, length in zip(falling.tolist(), tokens[falling].tolist()):
        if rooms >> length:
            room = _shortest(rooms, length)
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = row_tokens, num_rows
            num_rows += 1
        row_of[item] = row
        rows_with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return row_of


def even_shares(tokens: NDArray[np.int64], row_tokens: int) -> NDArray[np.int64]:
    """The row [n] of every sample, filled one after another.

    A row begins with the longest sample left. As long as more than one sample of the mean length left would fit, it
    takes the shortest that is at least an even share of its room, and at last the longest that fits.
    """
    row_of = np.empty(tokens.size, np.int64)
    counts = np.bincount(tokens, minlength=row_tokens + 1)
    rising = np.argsort(tokens, kind="stable").tolist()
    following = (np.cumsum(counts) - counts).tolist()  # where in `rising` the next sample of a length is
    unused = counts.tolist()
    lengths = sum(1 << length for length in np.flatnonzero(counts).tolist())  # bit b: a sample of b tokens is left
    samples_left, tokens_left, row, room = tokens.size, int(tokens.sum()), -1, 0
    while samples_left:
        fitting = lengths & ((2 << room) - 1)
        if not fitting:
            row, room, length = row + 1, row_tokens, lengths.bit_length() - 1
        elif (share := room * samples_left // tokens_left) > 1 and fitting >> (room // share):
            length = _shortest(fitting, room // share)
        else:
            length = fitting.bit_length() - 1
        row_of[rising[following[length]]] = row
        following[length] += 1
        unused[length] -= 1
        if not unused[length]:
            lengths ^= 1 << length
        samples_left, tokens_left, room = samples_left - 1, tokens_left - length, room - length
    return row_of


def _shortest(lengths: int, least: int) -> int:
    """The smallest number among the set bits that is at least `least`."""
    enough = lengths >> least
    return least + (enough & -enough).bit_length() - 1


def _count(row_of: NDArray[np.int64]) -> int:
    return int(row_of.max(initial=-1)) + 1


def _small(values: NDArray[Any]) -> NDArray[np.int32]:
    return values.astype(np.int32)
