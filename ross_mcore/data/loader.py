"""Training steps from worker processes: the micro-batches of one data-parallel rank, in the global order.

The whole state is the number of samples consumed. A worker takes one micro-batch at a time: it reads the text of every
row, then decodes this tensor-parallel rank's share of the micro-batch's pictures. Legend: J pictures decoded here,
H W pixels.
"""

from __future__ import annotations

import atexit
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ross_mcore.batch import Row, Sample
from ross_mcore.data.order import Order, micro_batch_positions, sample_digest
from ross_mcore.data.sample import ShardDataset
from ross_mcore.parallel.layout import share_of


class Step(list[list[Row]]):
    """The micro-batches of one training step on this rank, each a list of rows.

    `positions`: the stream positions of the *global* batch. `warnings`: what this rank had to replace.
    """

    def __init__(self, micro_batches: list[list[Row]], positions: range, warnings: list[str]) -> None:
        super().__init__(micro_batches)
        self.positions = positions
        self.warnings = warnings


@dataclass
class _MicroBatch:
    """A micro-batch on its way out of a worker, in two tensors: every tensor of its own would cost a descriptor.

    tokens_and_labels [2, sum of lengths]; pixels [J, 3, H, W], for the (row, ordinal) pairs in `pictures`.
    """

    samples: list[Sample]
    lengths: list[int]
    tokens_and_labels: Tensor
    pictures: list[tuple[int, int]]
    pixels: Tensor | None
    warnings: list[str]

    @classmethod
    def pack(cls, samples: list[Sample], warnings: list[str]) -> _MicroBatch:
        pictures = [(r, i) for r, s in enumerate(samples) for i, p in enumerate(s.pixels) if p is not None]
        pixels = torch.stack([samples[row].pixels[i] for row, i in pictures]) if pictures else None  # type: ignore[misc]
        lengths = [sample.tokens.numel() for sample in samples]
        both = torch.stack([torch.cat([s.tokens for s in samples]), torch.cat([s.labels for s in samples])])
        for sample in samples:
            sample.tokens = sample.labels = None  # type: ignore[assignment]
            sample.pixels = [None] * len(sample.pixels)
        return cls(samples, lengths, both, pictures, pixels, warnings)

    def unpack(self) -> list[Sample]:
        tokens, labels = (row.split(self.lengths) for row in self.tokens_and_labels)
        for place, sample in enumerate(self.samples):
            sample.tokens, sample.labels = tokens[place], labels[place]
        for place, (row, ordinal) in enumerate(self.pictures):
            assert self.pixels is not None
            self.samples[row].pixels[ordinal] = self.pixels[place]
        return self.samples


class _MicroBatches(Dataset[_MicroBatch]):
    """What a worker holds: stream positions of one micro-batch -> the micro-batch."""

    def __init__(self, dataset: ShardDataset, order: Order, tp_rank: int, tp_size: int, needs_pixels: bool) -> None:
        self.dataset, self.order = dataset, order
        self.tp_rank, self.tp_size, self.needs_pixels = tp_rank, tp_size, needs_pixels

    def __getitem__(self, positions: NDArray[np.int64]) -> _MicroBatch:
        numbers = self.order.sample_at(positions)
        rows = list(zip(numbers.tolist(), positions.tolist(), strict=True))
        samples = [self.dataset.get(number, position) for number, position in rows]
        pictures = [(row, ordinal) for row, sample in enumerate(samples) for ordinal in range(len(sample.pixels))]
        warnings: list[str] = []
        if self.needs_pixels:
            for place in share_of(len(pictures), self.tp_rank, self.tp_size):
                row, ordinal = pictures[place]
                warnings += self.dataset.decode(samples[row], rows[row][0], [ordinal])
        return _MicroBatch.pack(samples, warnings)


def _ignore_signals(_: int) -> None:
    """The main process finishes its step on SIGINT or SIGTERM, and needs its workers for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class StepLoader:
    """Endless iterator over training steps; `for step in loader` yields a `Step` of micro-batches of samples.

    Every rank that reads holds the complete text of its micro-batches; `Sample.pixels` is filled in for this
    tensor-parallel rank's share of each micro-batch's pictures, and only with `needs_pixels`. The stream of samples
    does not depend on dp_size, micro_batch_size or num_workers. `prefetch` counts micro-batches per worker;
    num_workers=0 reads in the calling process. Call `close` (or use it in `with`) when done.
    Raises ValueError when global_batch_size is not a multiple of micro_batch_size * dp_size.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        order: Order,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        tp_rank: int = 0,
        tp_size: int = 1,
        needs_pixels: bool = True,
        num_workers: int = 0,
        consumed_samples: int = 0,
        prefetch: int = 2,
    ) -> None:
        if global_batch_size < 1 or global_batch_size % (micro_batch_size * dp_size):
            raise ValueError(
                f"global_batch_size={global_batch_size} is not a multiple of "
                f"micro_batch_size={micro_batch_size} x data-parallel size {dp_size}"
            )
        if order.num_samples != len(dataset):
            raise ValueError(f"the order is over {order.num_samples} samples, the data set has {len(dataset)}")
        self.dataset, self.order = dataset, order
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.num_workers, self.prefetch = num_workers, prefetch
        self.consumed_samples = consumed_samples
        self._source = _MicroBatches(dataset, order, tp_rank, tp_size, needs_pixels)
        self._stream: Iterator[_MicroBatch] | None = None

    @property
    def num_microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def __iter__(self) -> StepLoader:
        return self

    def __next__(self) -> Step:
        if self._stream is None:
            self._stream = self._open()
        packed = [next(self._stream) for _ in range(self.num_microbatches)]
        positions = range(self.consumed_samples, self.consumed_samples + self.global_batch_size)
        self.consumed_samples += self.global_batch_size
        warnings = [warning for micro_batch in packed for warning in micro_batch.warnings]
        return Step([[[sample] for sample in micro_batch.unpack()] for micro_batch in packed], positions, warnings)

    def keys(self, step: Step) -> list[str]:
        """Ids of the samples of the step's whole global batch, in order; read from the index alone."""
        return self.dataset.keys(self.order.sample_at(step.positions))

    def digest(self, step: Step) -> str:
        """The step's `sample_digest`, over its whole global batch."""
        return sample_digest(self.keys(step))

    def state_dict(self) -> dict[str, int]:
        """Samples of the steps handed out so far; what workers have prefetched does not count."""
        return {"consumed_samples": self.consumed_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after `consumed_samples`. Raises ValueError when that is not a count."""
        consumed = state.get("consumed_samples")
        if not isinstance(consumed, int) or consumed < 0:
            raise ValueError(f"consumed_samples={consumed!r} is not a number of samples")
        self.close()
        self.consumed_samples = consumed

    def close(self) -> None:
        """Ends the worker processes; iterating again starts new ones at the same place."""
        self._stream = None
        atexit.unregister(self.close)

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _positions(self) -> Iterator[NDArray[np.int64]]:
        """Stream positions of this rank's micro-batches from `consumed_samples` on, without end."""
        consumed = self.consumed_samples
        while True:
            for number in range(self.num_microbatches):
                yield micro_batch_positions(consumed, number, self.dp_rank, self.dp_size, self.micro_batch_size)
            consumed += self.global_batch_size

    def _open(self) -> Iterator[_MicroBatch]:
        if not self.num_workers:
            return (self._source[positions] for positions in self._positions())
        # Workers ignore SIGTERM, by which Python would end them at exit; so they are ended before that, by close().
        atexit.register(self.close)
        return iter(
            DataLoader(
                self._source,
                batch_size=None,
                sampler=self._positions(),  # type: ignore[arg-type]  # any iterable of keys will do
                num_workers=self.num_workers,
                prefetch_factor=self.prefetch,
                worker_init_fn=_ignore_signals,
                multiprocessing_context="fork",  # a spawned worker would import torch and the tokenizer again
            )
        )
