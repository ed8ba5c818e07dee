"""StepLoader: training steps from worker processes, the micro-batches of one data-parallel rank in the global order.

Every rank plans the rows of every micro-batch from the index alone (rows.py), also a rank that reads no data. A worker
reads one planned micro-batch at a time: the text of every row, then this tensor-parallel rank's share of the pictures.
The whole state is the plan's cursor.

A rank reports the bad samples in its part of a step; when all ranks have all reports, each makes the same replacements
(`StepLoader.replace`). A rank that cannot read returns a step with `failure`, so that no rank waits for it.
Legend: J pictures decoded on this rank, H W pixels.
"""

from __future__ import annotations

import atexit
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ross_mcore.batch import Row, Sample, Slots
from ross_mcore.data.dataset import SampleDataset
from ross_mcore.data.order import Order, sample_digest
from ross_mcore.data.replacement import (
    ASKED_FOR,
    EMPTY,
    NOTHING_SKIPPED,
    TEXT,
    Bad,
    Quarantined,
    Replacement,
    substitute,
)
from ross_mcore.data.rows import PlannedRow, RowStream, by_length, micro_batches
from ross_mcore.data.sample import skipped_sample
from ross_mcore.data.workers import LEAST_AHEAD, MEMORY_REMEDY, Interrupted, Stream, shared
from ross_mcore.errors import ShardReadError, WorkerError
from ross_mcore.parallel.layout import EVERYTHING, DataShare, share_of


@dataclass(frozen=True)
class PlannedMicroBatch:
    """The rows of a micro-batch, and its number in this rank's step, which says who decodes one picture more."""

    number: int
    rows: list[PlannedRow]

    @property
    def samples(self) -> list[int]:
        """Numbers of the samples in the data set."""
        return [number for row in self.rows for number in row.samples.tolist()]


@dataclass(frozen=True)
class StepPlan:
    """How the stream of samples becomes steps: rows of a step over all ranks, rows of a micro-batch.

    `packed`: a row holds as many samples as fit in the data set's `seq_length`, otherwise one; `sorts_rows`: the rows
    of a step are dealt to micro-batches by length (rows.by_length) and not in their order; `end`: stream positions from
    here on are empty.
    """

    global_batch_size: int
    micro_batch_size: int
    packed: bool = False
    sorts_rows: bool = False
    end: int | None = None


@dataclass
class Step:
    """One training step.

    `rows`: the planned rows of the *global* batch, in the order of the stream; `slots`: tokens that this rank's rows
    reserve for their samples, None if a row is one sample of any length; `micro_batches`: this rank's rows, None on a
    rank that reads no data; `bad`: errors that this rank found in samples, which are to be replaced; `cursor`: of the
    next step; `failure`: why this rank could not read the step, which is then empty (Interrupted: because it is asked
    to stop); `quarantined`: replaced samples by position; `dealt`: numbers of the rows, in the order in which they are
    dealt to micro-batches; `count`: micro-batches of a rank.
    """

    rows: list[PlannedRow]
    slots: list[list[Slots]] | None
    micro_batches: list[list[Row]] | None
    bad: list[Bad]
    cursor: dict[str, int]
    failure: Exception | None = None
    quarantined: dict[int, Quarantined] = field(default_factory=dict)
    dealt: list[int] = field(default_factory=list)
    count: int = 1


@dataclass
class _MicroBatch:
    """A micro-batch as a worker sends it: in few tensors, because each tensor costs a file descriptor.

    tokens_and_labels [2, sum of lengths]; pixels [J, 3, H, W] and parts [J, ...] by kind (see Sample), of the (sample,
    ordinal) pairs in `pictures`.
    """

    samples: list[Sample]
    row_sizes: list[int]
    lengths: list[int]
    tokens_and_labels: Tensor
    pictures: list[tuple[int, int]]
    pixels: Tensor | None
    parts: dict[str, Tensor]
    bad: list[Bad]

    @classmethod
    def pack(cls, samples: list[Sample], row_sizes: list[int], bad: list[Bad], pixels: Tensor | None) -> _MicroBatch:
        """`pixels` [J, 3, H, W]: those of the samples, in order."""
        pictures = [(r, i) for r, s in enumerate(samples) for i, p in enumerate(s.pixels) if p is not None]
        kinds = dict.fromkeys(kind for sample in samples for kind in sample.parts)
        parts = {kind: torch.stack([samples[row].parts[kind][i] for row, i in pictures]) for kind in kinds}  # type: ignore[misc]  # none is None
        lengths = [sample.tokens.numel() for sample in samples]
        both = torch.stack([torch.cat([s.tokens for s in samples]), torch.cat([s.labels for s in samples])])
        for sample in samples:
            sample.tokens = sample.labels = None  # type: ignore[assignment]  # until `unpack`
            sample.pixels, sample.parts = [None] * len(sample.pixels), {}
        return cls(samples, row_sizes, lengths, both, pictures, pixels, parts, bad)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.tokens_and_labels, *([] if self.pixels is None else [self.pixels]), *self.parts.values()]

    def take_over(self) -> _MicroBatch:
        """Copies the tensors, so that workers have the shared memory back before the step is trained on."""
        pixels = None if self.pixels is None else self.pixels.clone()
        parts = {kind: part.clone() for kind, part in self.parts.items()}
        return replace(self, tokens_and_labels=self.tokens_and_labels.clone(), pixels=pixels, parts=parts)

    def unpack(self) -> list[Row]:
        tokens, labels = (row.split(self.lengths) for row in self.tokens_and_labels)
        for place, sample in enumerate(self.samples):
            sample.tokens, sample.labels = tokens[place], labels[place]
        for place, (row, ordinal) in enumerate(self.pictures):
            assert self.pixels is not None
            sample = self.samples[row]
            sample.pixels[ordinal] = self.pixels[place]
            for kind, part in self.parts.items():
                sample.parts.setdefault(kind, [None] * len(sample.pixels))[ordinal] = part[place]
        samples = iter(self.samples)
        return [[next(samples) for _ in range(size)] for size in self.row_sizes]


PAST_THE_END = "past the end, to fill the step"


_Read = _MicroBatch | ShardReadError | WorkerError


class _MicroBatches(Dataset[_Read]):
    """A worker's data set: a planned micro-batch -> the micro-batch, or the error of the file system or of memory."""

    def __init__(self, dataset: SampleDataset, plan: StepPlan, share: DataShare) -> None:
        self.dataset, self.plan, self.share = dataset, plan, share

    def __getitem__(self, planned: PlannedMicroBatch) -> _Read:
        positions = [position for row in planned.rows for position in row.positions.tolist()]
        try:
            texts = zip(planned.samples, positions, strict=True)
            samples = [self._text(number, position) for number, position in texts]
            bad = [Bad(sample.position, TEXT, sample.problem or "") for sample in samples if sample.is_bad]
            found, pixels = self._decode_share(samples, planned)
            packed = _MicroBatch.pack(samples, [row.samples.size for row in planned.rows], bad + found, pixels)
            if get_worker_info() is not None:
                shared(packed.tensors)
        except MemoryError:
            return WorkerError(f"no memory was left while reading (process {os.getpid()}): {MEMORY_REMEDY}")
        except (ShardReadError, WorkerError) as error:
            return error
        return packed

    def replace(self, planned: PlannedMicroBatch, rows: list[Row], positions: Collection[int]) -> list[Bad]:
        """Reads the samples planned at `positions` into `rows`, in place; returns their errors.

        This rank's share of the pictures may change with them; new pictures of the share are decoded.
        """
        for row, plan in zip(rows, planned.rows, strict=True):
            for place, old in enumerate(row):
                number = int(plan.samples[place])
                if old.position in positions and number != EMPTY:
                    row[place] = self._text(number, old.position)
                elif old.position in positions:
                    row[place] = skipped_sample(old.key, old.position, "bad, and no replacement was found")
        samples = [sample for row in rows for sample in row]
        bad = [
            Bad(sample.position, TEXT, sample.problem)
            for sample, number in zip(samples, planned.samples, strict=True)
            if sample.position in positions and number != EMPTY and sample.problem
        ]
        return bad + self._decode_share(samples, planned)[0]

    def _text(self, number: int, position: int) -> Sample:
        """The sample without pictures; a bad one if its length is not that of the index.

        A sample that is cut before a picture is shorter than its slot: the index does not have the picture's position.
        """
        if self.plan.end and position >= self.plan.end:
            return skipped_sample("", position, PAST_THE_END)
        if number == EMPTY:
            return skipped_sample("", position, f"{ASKED_FOR}, and no replacement was found")
        sample = self.dataset.get(number, position)
        tokens, room = sample.tokens.numel(), int(self.dataset.row_lengths(np.array([number]))[0])
        is_cut = tokens < room == self.dataset.seq_length
        if self.plan.packed and sample.problem is None and tokens != room and not is_cut:
            reason = f"the index has another length: {room} tokens, and it has {tokens}"
            return skipped_sample(sample.key, position, reason, is_bad=True)
        return sample

    def _decode_share(self, samples: list[Sample], planned: PlannedMicroBatch) -> tuple[list[Bad], Tensor | None]:
        """Decodes this rank's share of the pictures and drops the pixels of all others.

        Returns the errors of pictures, and the pixels [n, 3, H, W] of those decoded now.
        """
        pictures = [(place, ordinal) for place, sample in enumerate(samples) for ordinal in range(len(sample.pixels))]
        share = share_of(len(pictures), self.share.tp_rank, self.share.tp_size, planned.number)
        for place, ordinal in (picture for number, picture in enumerate(pictures) if number not in share):
            samples[place].pixels[ordinal] = None
        mine = [pictures[number] for number in share]
        missing = [(place, ordinal) for place, ordinal in mine if samples[place].pixels[ordinal] is None]
        bad: list[Bad] = []
        pixels = torch.empty(len(missing), *self.dataset.pixel_shape, dtype=torch.uint8) if missing else None
        numbers = planned.samples
        for row, (place, ordinal) in enumerate(missing):
            assert pixels is not None
            samples[place].pixels[ordinal] = pixels[row]
            bad += self.dataset.decode(samples[place], numbers[place], [ordinal])
        return bad, pixels


class StepLoader:
    """Endless iterator over training steps; `for step in loader` yields a `Step`.

    Every rank that reads data has the complete text of its micro-batches; `Sample.pixels` is filled for this
    tensor-parallel rank's share of each micro-batch's pictures. The rows of a step do not depend on `share`,
    micro_batch_size or num_workers. num_workers=0 reads in the calling process. `load_state_dict` and `skip_rows` set
    the start. `is_interrupted` is polled before and while waiting for data. `ahead` is the number of micro-batches that
    every worker reads ahead; set it before the first step (workers.ahead_of_a_step). Call `close` (or use it in `with`)
    when done.
    Raises ValueError when global_batch_size is not a multiple of micro_batch_size * dp_size, or the order is not over
    the data set's samples, or the first `plan.end` of them.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        order: Order,
        plan: StepPlan,
        share: DataShare = EVERYTHING,
        replacement: Replacement = NOTHING_SKIPPED,
        num_workers: int = 0,
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        if plan.global_batch_size < 1 or plan.global_batch_size % (plan.micro_batch_size * share.dp_size):
            raise ValueError(
                f"global_batch_size={plan.global_batch_size} is not a multiple of "
                f"micro_batch_size={plan.micro_batch_size} x data-parallel size {share.dp_size}"
            )
        if order.dataset_samples != min(len(dataset), plan.end or len(dataset)):
            raise ValueError(f"the order is over {order.dataset_samples} samples, the data set has {len(dataset)}")
        self.dataset, self.plan, self.share = dataset, plan, share
        self.replacement, self.num_workers, self._is_interrupted = replacement, num_workers, is_interrupted
        self.ahead = LEAST_AHEAD
        self._rows = RowStream(order, dataset.row_lengths, dataset.seq_length, plan.packed, order.window_samples)
        self._skipped = np.array(sorted(replacement.skipped), np.int64)
        self._planned: deque[Step] = deque()
        self._stream: Iterator[_Read] | None = None
        self._cursor = self._rows.state_dict()
        self._source = _MicroBatches(dataset, plan, share)

    @property
    def num_microbatches(self) -> int:
        return self.plan.global_batch_size // (self.plan.micro_batch_size * self.share.dp_size)

    def __iter__(self) -> StepLoader:
        return self

    def __next__(self) -> Step:
        read = []
        try:
            if self._is_interrupted():
                raise Interrupted
            if self.share.reads:
                read = self._read()
            else:
                self._plan()
        except Exception as error:  # of any type, also for a killed worker: the other ranks must know of it
            return Step([], None, None, [], self._cursor, error, count=self.num_microbatches)
        step = self._planned.popleft()
        if self.share.reads:
            step.micro_batches = [micro_batch.unpack() for micro_batch in read]
            step.bad = [bad for micro_batch in read for bad in micro_batch.bad]
        self._cursor = step.cursor
        return step

    def _read(self) -> list[_MicroBatch]:
        """The micro-batches of a step. Raises the error of a worker, or Interrupted."""
        found = []
        for _ in range(self.num_microbatches):
            if self._is_interrupted():
                raise Interrupted
            if self._stream is None:
                self._stream = self._open()
            micro_batch = next(self._stream)
            if not isinstance(micro_batch, _MicroBatch):
                raise micro_batch
            found.append(micro_batch if self.num_workers == 0 else micro_batch.take_over())
        return found

    def replace(self, step: Step, bad: Iterable[Bad]) -> None:
        """Replaces bad samples in the step's rows, and reads the replacements that belong to this rank.

        `bad` must be the same on all ranks: the errors of all of them. Afterwards `step.bad` has the errors of the
        replacements, for which this is called again.
        """
        reasons = {found.position: found.reason for found in sorted(bad, reverse=True)}  # keeps the first reason
        step.bad, changed = [], self._replan(step, reasons)
        if step.micro_batches is None:
            return
        try:
            for number, (places, rows) in enumerate(zip(self._mine(step.dealt), step.micro_batches, strict=True)):
                if changed.intersection(places):
                    planned = PlannedMicroBatch(number, [step.rows[place] for place in places])
                    step.bad += self._source.replace(planned, rows, reasons)
        except Exception as error:
            step.failure = error

    def _replan(self, step: Step, reasons: dict[int, str]) -> set[int]:
        """Plans other samples at the positions of `reasons`; returns the numbers of the changed rows."""
        changed = set()
        for number, row in enumerate(step.rows):
            places = [place for place, position in enumerate(row.positions.tolist()) if position in reasons]
            if places:
                samples = row.samples.copy()
                for place in places:
                    samples[place] = self._substitute(step, int(row.positions[place]), int(samples[place]), reasons)
                step.rows[number] = replace(row, samples=samples)
                changed.add(number)
        return changed

    def _substitute(self, step: Step, position: int, sample: int, reasons: dict[int, str]) -> int:
        """Records that `sample` is bad; returns the number of the next sample to try instead of the planned one."""
        entry = step.quarantined.setdefault(position, Quarantined(position, sample, reasons[position]))
        if entry.reason == ASKED_FOR != reasons[position]:  # so that it is counted
            entry.reason = f"{ASKED_FOR}, and its replacement is bad: {reasons[position]}"
        room = self._room(np.array([entry.sample]))[0]
        while entry.attempts < self.replacement.attempts:
            entry.replacement = substitute(
                entry.sample,
                self.dataset.peers(entry.sample),
                lambda drawn: self._room(drawn) <= room,
                self.replacement.seed,
                position,
                entry.attempts,
            )
            entry.attempts += 1
            if entry.replacement not in self._skipped:
                break
        else:
            entry.replacement = EMPTY
        return entry.replacement

    def _room(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens [P] that rows reserve for samples [P]."""
        if not self.plan.packed:
            return np.full(samples.size, self.dataset.seq_length)
        return self.dataset.row_lengths(samples)

    def keys(self, step: Step) -> list[str]:
        """Keys of the samples in the step's global batch, in order; from the index alone."""
        samples = np.concatenate([row.samples for row in step.rows])
        return self.dataset.keys(samples[samples != EMPTY])

    def digest(self, step: Step) -> str:
        """The `sample_digest` of the step's global batch."""
        return sample_digest(self.keys(step))

    def state_dict(self) -> dict[str, int]:
        """The cursor after the steps returned so far, without steps that workers have prefetched."""
        return dict(self._cursor)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a cursor. Raises ValueError when it does not fit these rows."""
        self.close()
        self._rows.load_state_dict(state)
        self._cursor = self._rows.state_dict()

    def skip_rows(self, count: int) -> None:
        """Skips the next `count` rows without reading them."""
        self.close()
        self._rows.skip(count)
        self._cursor = self._rows.state_dict()

    def close(self) -> None:
        """Ends the worker processes; iterating again starts new ones at the same place."""
        if isinstance(self._stream, Stream):
            self._stream.close()
        self._stream = None
        self._planned = deque()
        self._rows.load_state_dict(self._cursor)
        atexit.unregister(self.close)

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plan(self) -> list[PlannedMicroBatch]:
        """Plans one more step; returns this rank's micro-batches of it."""
        rows = self._rows.take(self.plan.global_batch_size)
        dealt = by_length(rows) if self.plan.sorts_rows else list(range(len(rows)))
        mine, slots = self._mine(dealt), None
        if self.plan.packed:
            slots = [[self.dataset.row_lengths(rows[place].samples).tolist() for place in own] for own in mine]
        step = Step(rows, slots, None, [], self._rows.state_dict(), dealt=dealt, count=self.num_microbatches)
        if self._skipped.size:
            named = [row.positions[np.isin(row.samples, self._skipped)] for row in rows]
            self._replan(step, dict.fromkeys(np.concatenate(named).tolist(), ASKED_FOR))
        self._planned.append(step)
        return [PlannedMicroBatch(number, [step.rows[place] for place in own]) for number, own in enumerate(mine)]

    def _mine(self, dealt: Sequence[int]) -> list[list[int]]:
        """Numbers of the rows of this rank's micro-batches."""
        return micro_batches(dealt, self.plan.micro_batch_size, self.share.dp_rank, self.share.dp_size)

    def _micro_batches(self) -> Iterator[PlannedMicroBatch]:
        """This rank's planned micro-batches, endless."""
        while True:
            yield from self._plan()

    def _open(self) -> Iterator[_Read]:
        if not self.num_workers:
            return (self._source[planned] for planned in self._micro_batches())
        # Workers ignore SIGTERM, with which Python would end them at exit, so close() ends them before.
        atexit.register(self.close)
        return Stream(self._source, self._micro_batches(), self.num_workers, self._is_interrupted, self.ahead)
