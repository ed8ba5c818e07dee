"""Training steps from worker processes: the micro-batches of one data-parallel rank, in the global order.

Which samples share which row of which micro-batch is planned from the index alone (rows.py), on every rank, whether it
reads data or not. A worker takes one planned micro-batch at a time: it reads the text of every row, then decodes this
tensor-parallel rank's share of the micro-batch's pictures. The whole state is the plan's cursor.
Legend: J pictures decoded here, H W pixels.
"""

from __future__ import annotations

import atexit
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ross_mcore.batch import Row, Sample, Slots
from ross_mcore.data.mixture import MixtureOrder
from ross_mcore.data.order import Order, sample_digest
from ross_mcore.data.rows import PlannedRow, RowStream, micro_batches
from ross_mcore.data.sample import ShardDataset, skipped_sample
from ross_mcore.data.sources import MixtureDataset
from ross_mcore.parallel.layout import share_of

PlannedMicroBatch = list[PlannedRow]
Readable = ShardDataset | MixtureDataset


WINDOW_SAMPLES = 16_384


def window_samples(order: Order) -> int:
    """How many samples are packed together: the order's window, where it has one, so that rows read from few places."""
    return getattr(order, "window_samples", WINDOW_SAMPLES)


@dataclass
class Step:
    """One training step.

    `rows`: the planned rows of the *global* batch; `slots`: tokens that the rows of this rank's micro-batches reserve
    for their samples, None where a row is one sample of any length; `micro_batches`: those rows read, None on a rank
    that reads nothing; `warnings`: what this rank had to replace; `cursor`: where the next step begins.
    """

    rows: list[PlannedRow]
    slots: list[list[Slots]] | None
    micro_batches: list[list[Row]] | None
    warnings: list[str]
    cursor: dict[str, int]


@dataclass
class _MicroBatch:
    """A micro-batch on its way out of a worker, in two tensors: every tensor of its own would cost a descriptor.

    tokens_and_labels [2, sum of lengths]; pixels [J, 3, H, W], for the (sample, ordinal) pairs in `pictures`.
    """

    samples: list[Sample]
    row_sizes: list[int]
    lengths: list[int]
    tokens_and_labels: Tensor
    pictures: list[tuple[int, int]]
    pixels: Tensor | None
    warnings: list[str]

    @classmethod
    def pack(cls, samples: list[Sample], row_sizes: list[int], warnings: list[str]) -> _MicroBatch:
        pictures = [(r, i) for r, s in enumerate(samples) for i, p in enumerate(s.pixels) if p is not None]
        pixels = torch.stack([samples[row].pixels[i] for row, i in pictures]) if pictures else None  # type: ignore[misc]
        lengths = [sample.tokens.numel() for sample in samples]
        both = torch.stack([torch.cat([s.tokens for s in samples]), torch.cat([s.labels for s in samples])])
        for sample in samples:
            sample.tokens = sample.labels = None  # type: ignore[assignment]
            sample.pixels = [None] * len(sample.pixels)
        return cls(samples, row_sizes, lengths, both, pictures, pixels, warnings)

    def unpack(self) -> list[Row]:
        tokens, labels = (row.split(self.lengths) for row in self.tokens_and_labels)
        for place, sample in enumerate(self.samples):
            sample.tokens, sample.labels = tokens[place], labels[place]
        for place, (row, ordinal) in enumerate(self.pictures):
            assert self.pixels is not None
            self.samples[row].pixels[ordinal] = self.pixels[place]
        samples = iter(self.samples)
        return [[next(samples) for _ in range(size)] for size in self.row_sizes]


class _MicroBatches(Dataset[_MicroBatch]):
    """What a worker holds: a planned micro-batch -> the micro-batch read."""

    def __init__(
        self, dataset: Readable, packed: bool, tp_rank: int, tp_size: int, needs_pixels: bool, end: int | None
    ) -> None:
        self.dataset, self.packed, self.end = dataset, packed, end
        self.tp_rank, self.tp_size, self.needs_pixels = tp_rank, tp_size, needs_pixels

    def __getitem__(self, planned: PlannedMicroBatch) -> _MicroBatch:
        numbers = np.concatenate([row.samples for row in planned])
        positions = np.concatenate([row.positions for row in planned]).tolist()
        samples = [self._text(number, place) for number, place in zip(numbers.tolist(), positions, strict=True)]
        if self.packed:
            reserved = self.dataset.row_lengths(numbers).tolist()
            most = self.dataset.seq_length
            samples = [_fitting(sample, room, most) for sample, room in zip(samples, reserved, strict=True)]
        pictures = [(place, ordinal) for place, sample in enumerate(samples) for ordinal in range(len(sample.pixels))]
        warnings: list[str] = []
        if self.needs_pixels:
            for picture in share_of(len(pictures), self.tp_rank, self.tp_size):
                place, ordinal = pictures[picture]
                warnings += self.dataset.decode(samples[place], int(numbers[place]), [ordinal])
        return _MicroBatch.pack(samples, [row.samples.size for row in planned], warnings)

    def _text(self, number: int, position: int) -> Sample:
        if self.end and position >= self.end:
            return skipped_sample("", position, PAST_THE_END)
        return self.dataset.get(number, position)


PAST_THE_END = "past the end, to fill the step"


def _fitting(sample: Sample, room: int, seq_length: int) -> Sample:
    """The sample, or an empty row where the index was wrong about its length.

    Only one that is cut takes less than its room: it ends before a picture, where the index does not know of one.
    """
    tokens = sample.tokens.numel()
    if sample.problem is None and tokens != room and not tokens < room == seq_length:
        reason = f"it has {tokens} tokens and the index says {room}: make the index again (tools/index_shards.py)"
        return skipped_sample(sample.key, sample.position, reason)
    return sample


def _ignore_signals(_: int) -> None:
    """The main process finishes its step on SIGINT or SIGTERM, and needs its workers for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class StepLoader:
    """Endless iterator over training steps; `for step in loader` yields a `Step`.

    Every rank that reads holds the complete text of its micro-batches; `Sample.pixels` is filled in for this
    tensor-parallel rank's share of each micro-batch's pictures, and only with `needs_pixels`. With `packed`, a row
    holds as many samples as fit into the dataset's `seq_length`; otherwise one. The stream of rows does not depend on
    dp_size, micro_batch_size or num_workers. `reads=False` plans and reads nothing; `skip_rows` passes over the first
    rows; with `end`, the order is over the first `end` samples, and what comes after them is empty; `prefetch` counts
    micro-batches per worker; num_workers=0 reads in the calling process. Call `close` (or use it in `with`) when done.
    Raises ValueError when global_batch_size is not a multiple of micro_batch_size * dp_size, or the order is over
    other samples than the data set's.
    """

    def __init__(
        self,
        dataset: Readable,
        order: Order,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        packed: bool = False,
        skip_rows: int = 0,
        dp_rank: int = 0,
        dp_size: int = 1,
        tp_rank: int = 0,
        tp_size: int = 1,
        reads: bool = True,
        needs_pixels: bool = True,
        num_workers: int = 0,
        state: dict[str, int] | None = None,
        prefetch: int = 2,
        end: int | None = None,
    ) -> None:
        if global_batch_size < 1 or global_batch_size % (micro_batch_size * dp_size):
            raise ValueError(
                f"global_batch_size={global_batch_size} is not a multiple of "
                f"micro_batch_size={micro_batch_size} x data-parallel size {dp_size}"
            )
        ordered = int(order.offsets[-1]) if isinstance(order, MixtureOrder) else order.num_samples
        if ordered != min(len(dataset), end or len(dataset)):
            raise ValueError(f"the order is over {ordered} samples, the data set has {len(dataset)}")
        self.dataset, self.packed = dataset, packed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.reads, self.num_workers, self.prefetch = reads, num_workers, prefetch
        self._rows = RowStream(order, dataset.row_lengths, dataset.seq_length, packed, window_samples(order))
        self._rows.skip(skip_rows)
        self._cursor = self._rows.state_dict()
        if state is not None:
            self.load_state_dict(state)
        self._source = _MicroBatches(dataset, packed, tp_rank, tp_size, needs_pixels, end)
        self._planned: deque[Step] = deque()
        self._stream: Iterator[_MicroBatch] | None = None

    @property
    def num_microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def __iter__(self) -> StepLoader:
        return self

    def __next__(self) -> Step:
        if not self.reads:
            self._plan()
            step = self._planned.popleft()
        else:
            if self._stream is None:
                self._stream = self._open()
            read = [next(self._stream) for _ in range(self.num_microbatches)]
            step = self._planned.popleft()
            step.micro_batches = [micro_batch.unpack() for micro_batch in read]
            step.warnings = [warning for micro_batch in read for warning in micro_batch.warnings]
        self._cursor = step.cursor
        return step

    def keys(self, step: Step) -> list[str]:
        """Ids of the samples of the step's whole global batch, in order; read from the index alone."""
        return self.dataset.keys(np.concatenate([row.samples for row in step.rows]))

    def digest(self, step: Step) -> str:
        """The step's `sample_digest`, over its whole global batch."""
        return sample_digest(self.keys(step))

    def state_dict(self) -> dict[str, int]:
        """The cursor after the steps handed out so far; what workers have prefetched does not count."""
        return dict(self._cursor)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a cursor. Raises ValueError when it is no place in these rows."""
        self.close()
        self._rows.load_state_dict(state)
        self._cursor = self._rows.state_dict()

    def close(self) -> None:
        """Ends the worker processes; iterating again starts new ones at the same place."""
        self._stream = None
        self._planned = deque()
        self._rows.load_state_dict(self._cursor)
        atexit.unregister(self.close)

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plan(self) -> list[PlannedMicroBatch]:
        """Plans one step ahead of those planned: this rank's micro-batches."""
        rows = self._rows.take(self.global_batch_size)
        mine = micro_batches(rows, self.micro_batch_size, self.dp_rank, self.dp_size)
        slots = None
        if self.packed:
            slots = [[self.dataset.row_lengths(row.samples).tolist() for row in planned] for planned in mine]
        self._planned.append(Step(rows, slots, None, [], self._rows.state_dict()))
        return mine

    def _micro_batches(self) -> Iterator[PlannedMicroBatch]:
        """This rank's planned micro-batches, without end."""
        while True:
            yield from self._plan()

    def _open(self) -> Iterator[_MicroBatch]:
        if not self.num_workers:
            return (self._source[planned] for planned in self._micro_batches())
        # Workers ignore SIGTERM, by which Python would end them at exit; so they are ended before that, by close().
        atexit.register(self.close)
        return iter(
            DataLoader(
                self._source,
                batch_size=None,
                sampler=self._micro_batches(),  # type: ignore[arg-type]  # any iterable of keys will do
                num_workers=self.num_workers,
                prefetch_factor=self.prefetch,
                worker_init_fn=_ignore_signals,
                multiprocessing_context="fork",  # a spawned worker would import torch and the tokenizer again
            )
        )
