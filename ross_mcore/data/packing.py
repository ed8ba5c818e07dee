"""Several samples in one row: which samples of a window share a row of at most R tokens.

Best fit, longest sample first: each sample goes to the fullest row that still takes it, and rows are opened when none
does. That uses at most 11/9 of the fewest rows possible, plus one (Johnson 1974, "Fast algorithms for bin packing");
on the lengths of instruction data it fills over 95% (benchmarks/packing.py). A set of the room left in rows, kept as
the bits of one integer, makes each step a shift and a lowest set bit, so the time hardly depends on the rows open.
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
    row_of, num_rows = _best_fit(tokens, row_tokens)
    row_of = SampleOrder(max(1, num_rows), key).sample_at(row_of)
    filled = np.bincount(row_of, weights=tokens, minlength=num_rows)  # in float64, exact below 2^53
    ends = np.cumsum(np.bincount(row_of, minlength=num_rows))
    return Rows(_small(np.argsort(row_of, kind="stable")), _small(np.append(0, ends)), _small(filled))


def unpacked(lengths: ArrayLike) -> Rows:
    """A row for every sample, in stream order, from their token lengths [n]."""
    tokens = np.asarray(lengths)
    return Rows(_small(np.arange(tokens.size)), _small(np.arange(tokens.size + 1)), _small(tokens))


def _small(values: NDArray[Any]) -> NDArray[np.int32]:
    return values.astype(np.int32)


def _best_fit(tokens: NDArray[np.int64], row_tokens: int) -> tuple[NDArray[np.int64], int]:
    """The row [n] of every sample, numbered as rows were opened, and the number of rows."""
    row_of = np.empty(tokens.size, np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    rooms = 0  # bit b is set when some row has room for exactly b tokens
    num_rows = 0
    longest_first = np.argsort(-tokens, kind="stable")
    for item, length in zip(longest_first.tolist(), tokens[longest_first].tolist()):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = row_tokens, num_rows
            num_rows += 1
        row_of[item] = row
        rows_with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return row_of, num_rows
