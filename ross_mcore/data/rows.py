"""The global sequence of rows, the same in every layout.

Every epoch is cut into windows of `window_samples` stream positions (the last one also has the remaining positions);
the samples of a window are packed into rows, and the sequence is the rows of all windows. So rows depend only on
(order, lengths, row_tokens, packed, window_samples), and the rows of an epoch hold each of its samples exactly once.
Ranks, workers and micro-batches divide the sequence and never change it. A state contains the window of the next row,
so that resuming plans one window.

Windows should be those of the order (`BlockOrder.window_samples`), so that rows read from as few places.
Legend: P positions, n samples of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ross_mcore.data.order import Order
from ross_mcore.data.packing import Rows, pack, unpacked

Lengths = Callable[[NDArray[np.int64]], NDArray[np.int64]]
"""Sample numbers [P] -> tokens [P] of each, images included, 1 to `row_tokens`: the caller cuts longer samples."""

T = TypeVar("T")


@dataclass(frozen=True)
class PlannedRow:
    """Samples that share a row.

    samples [n]: their numbers; positions [n]: their increasing stream positions, the keys of random draws, so that a
    sample has new draws every time; tokens: of all samples together.
    """

    samples: NDArray[np.int64]
    positions: NDArray[np.int64]
    tokens: int


@dataclass(frozen=True)
class Cursor:
    """A place between two rows: `consumed_rows` rows precede it, the last `first_row` of them in window `window`."""

    consumed_rows: int = 0
    consumed_samples: int = 0
    window: int = 0
    first_row: int = 0


class RowStream:
    """Endless rows from the cursor on; holds the plan of one window, at most 12 bytes per sample.

    With `packed=False` every row is one sample, in the order of the samples.
    """

    def __init__(self, order: Order, lengths: Lengths, row_tokens: int, packed: bool, window_samples: int) -> None:
        for name, value in (("row_tokens", row_tokens), ("window_samples", window_samples)):
            if value < 1:
                raise ValueError(f"rows need {name} of at least 1, not {value}")
        self.order, self.lengths = order, lengths
        self.row_tokens, self.packed = row_tokens, packed
        self.window_samples = min(window_samples, order.num_samples)
        self.cursor = Cursor()
        self._planned: tuple[int, Rows] | None = None

    def take(self, count: int) -> list[PlannedRow]:
        """The next `count` rows: faster than one by one."""
        places: list[NDArray[np.int64]] = []
        tokens: list[int] = []
        for window, first, last in self._advance(count):
            plan = self._plan(window)
            items = plan.items[plan.offsets[first] : plan.offsets[last]] + np.int64(self.window_positions(window).start)
            places += np.split(items, plan.offsets[first + 1 : last] - plan.offsets[first])
            tokens += plan.tokens[first:last].tolist()
        samples = self.order.sample_at(np.concatenate([np.empty(0, np.int64), *places]))
        starts = np.cumsum([positions.size for positions in places])[:-1]
        return [PlannedRow(*row) for row in zip(np.split(samples, starts), places, tokens)]

    def skip(self, count: int) -> None:
        """Skips `count` rows without looking up their samples."""
        for _ in self._advance(count):
            pass

    def rows_of_window(self, window: int) -> int:
        """Number of rows of window number `window` of the stream."""
        return len(self._plan(window))

    def window_positions(self, window: int) -> range:
        """Stream positions of window number `window` of the stream."""
        epoch, place = divmod(window, self._windows_per_epoch)
        start = epoch * self.order.num_samples + place * self.window_samples
        is_last = place == self._windows_per_epoch - 1
        return range(start, (epoch + 1) * self.order.num_samples if is_last else start + self.window_samples)

    def state_dict(self) -> dict[str, int]:
        """The cursor of the next row."""
        return asdict(self.cursor)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a state of a stream with the same settings.

        Raises ValueError for values that are no state, and for a state that does not fit these settings.
        """
        for name in asdict(self.cursor):
            if type(value := state.get(name)) is not int or not 0 <= value < 2**53:
                raise ValueError(f"{name}={value!r} in the state of the rows is not a count")
        cursor = Cursor(**{name: state[name] for name in asdict(self.cursor)})
        before = self.window_positions(cursor.window).start
        if before >= 2**53:
            raise ValueError(f"window={cursor.window} in the state of the rows is beyond any run")
        plan = self._plan(cursor.window)
        if cursor.first_row >= len(plan) or cursor.consumed_samples != before + plan.offsets[cursor.first_row]:
            raise ValueError(
                f"{cursor} is no place in these rows: continue with the data sets, seed, sequence length and packing "
                "of the run that wrote it"
            )
        self.cursor = cursor

    @property
    def _windows_per_epoch(self) -> int:
        return self.order.num_samples // self.window_samples

    def _advance(self, count: int) -> Iterator[tuple[int, int, int]]:
        """Moves the cursor over `count` rows; yields (window, first row, last row + 1) of every window on the way."""
        while count:
            cursor = self.cursor
            plan = self._plan(cursor.window)
            taken = min(count, len(plan) - cursor.first_row)
            end = cursor.first_row + taken
            self.cursor = Cursor(
                consumed_rows=cursor.consumed_rows + taken,
                consumed_samples=self.window_positions(cursor.window).start + int(plan.offsets[end]),
                window=cursor.window + (end == len(plan)),
                first_row=0 if end == len(plan) else end,
            )
            count -= taken
            yield cursor.window, cursor.first_row, end

    def _plan(self, window: int) -> Rows:
        if self._planned is None or self._planned[0] != window:
            positions = self.window_positions(window)
            lengths = self.lengths(self.order.sample_at(np.arange(positions.start, positions.stop)))
            self._planned = window, pack(lengths, self.row_tokens, key=window) if self.packed else unpacked(lengths)
        return self._planned[1]


def by_length(rows: Sequence[PlannedRow]) -> list[int]:
    """Numbers of the rows, the longest first; rows of one length in their order.

    Dealt to micro-batches in this order, rows of similar length share one, which is padded to its longest. The longest
    come first, so that memory is largest at a step's beginning and what is freed fits the others.
    """
    return sorted(range(len(rows)), key=lambda number: -rows[number].tokens)


def micro_batches(rows: Sequence[T], micro_batch_size: int, dp_rank: int, dp_size: int) -> list[list[T]]:
    """A rank's micro-batches of a step's rows, in order. Each row is in one micro-batch of one rank.

    Raises ValueError when the rows cannot be divided evenly.
    """
    if len(rows) % (micro_batch_size * dp_size):
        raise ValueError(
            f"{len(rows)} rows of a step are not a multiple of micro_batch_size={micro_batch_size} x data-parallel "
            f"size {dp_size}"
        )
    starts = range(dp_rank * micro_batch_size, len(rows), dp_size * micro_batch_size)
    return [list(rows[start : start + micro_batch_size]) for start in starts]
