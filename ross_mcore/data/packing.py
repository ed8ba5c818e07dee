"""Packing: which samples of a window share a row.

Two best-fit rules are tried and the one with fewer rows is used. Longest first puts each sample into the fullest row
with enough room; it needs at most 11/9 of the minimum number of rows, plus one (Johnson 1973, "Near-optimal bin packing
algorithms"), but its last rows contain short samples only, which fill a row badly if every sample has a picture. Even
shares fills one row after another with samples of similar length and closes it with the longest that fits. A set of
lengths is the bits of one integer, so a step of either rule is a shift and the lowest or highest set bit.
benchmarks/packing.py measures both rules.
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
    """Rows of a window, in training order; at most 12 bytes per sample.

    items [n]: places in the window, row after row, increasing in each row; row k has items[offsets[k]:offsets[k + 1]].
    offsets [r + 1]; tokens [r]: number of tokens of every row.
    """

    items: NDArray[np.int32]
    offsets: NDArray[np.int32]
    tokens: NDArray[np.int32]

    def __len__(self) -> int:
        return self.tokens.size


def pack(lengths: ArrayLike, row_tokens: int, key: int) -> Rows:
    """Rows of at most `row_tokens` tokens from the token lengths [n] of a window's samples, in stream order.

    A pure function. Rows are shuffled by `key`, because those of long samples would come first; samples of a row are in
    stream order. Raises ValueError for a sample that has no token or does not fit in a row.
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
    """The row [n] of every sample: by decreasing length, each in the fullest row with room for it, or in a new one."""
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
    """The row [n] of every sample; rows are filled one after another.

    A row begins with the longest remaining sample. While more than one sample of the remaining mean length would fit,
    it takes the shortest one that is at least an even share of its room, and finally the longest that fits.
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
    """The lowest set bit that is at least `least`."""
    enough = lengths >> least
    return least + (enough & -enough).bit_length() - 1


def _count(row_of: NDArray[np.int64]) -> int:
    return int(row_of.max(initial=-1)) + 1


def _small(values: NDArray[Any]) -> NDArray[np.int32]:
    return values.astype(np.int32)
