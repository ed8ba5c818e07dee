"""A step before it is computed: this rank's rows, and the size on which all ranks agree."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NoReturn

import torch

from ross_mcore import platform
from ross_mcore.batch import Row, Sample, Slots, is_blank
from ross_mcore.data.loader import Step
from ross_mcore.data.workers import Interrupted
from ross_mcore.errors import ShardReadError
from ross_mcore.parallel.collectives import gather, gather_integers, on_all_ranks
from ross_mcore.parallel.groups import Groups


class Request(IntEnum):
    """A request to a rank for the time after a step. The largest of all ranks counts; STOP also saves."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


@dataclass(frozen=True)
class StepSize:
    """The size of a step, known to all ranks before they compute it.

    seq_lengths: tokens of every row, for each micro-batch; label_tokens, images, blank_samples (without a picture):
    numbers on all ranks, the denominators of the two losses; row_tokens: tokens that are not padding; skipped_samples:
    those without tokens; ignored_samples: those without a label, which only train on their pictures; found_bad: faults
    found in samples still in the step; rows: of a micro-batch; slots: tokens of all rows of the step, with padding;
    request: the strongest of all ranks; interrupted: a rank was asked to stop before it read the step, which must then
    not be computed; peak_memory_bytes: the largest of all ranks, before the step.
    """

    seq_lengths: tuple[int, ...]
    label_tokens: int
    images: int
    blank_samples: int
    row_tokens: int
    skipped_samples: int
    ignored_samples: int
    found_bad: int = 0
    rows: int = 1
    slots: int = 0
    request: Request = Request.NOTHING
    interrupted: bool = False
    peak_memory_bytes: int = 0

    @property
    def micro_batches(self) -> int:
        """Of a rank."""
        return len(self.seq_lengths)


@dataclass(frozen=True)
class AgreedStep:
    """A step whose share every rank has read. size: the same on all ranks; read_seconds: how long this rank waited."""

    loaded: Step
    size: StepSize
    read_seconds: float = 0.0

    def rows_of(self, number: int) -> list[Row] | None:
        """The rows of a micro-batch; None on a rank that reads nothing."""
        return None if self.loaded.micro_batches is None else self.loaded.micro_batches[number]

    def slots_of(self, number: int) -> list[Slots]:
        """Tokens reserved for the samples of each row of a micro-batch: as planned, or one sample to a row."""
        if self.loaded.slots is not None:
            return self.loaded.slots[number]
        return [[self.size.seq_lengths[number]]] * self.size.rows


def agree_on_step(
    step: Step, groups: Groups, row_multiple: int, device: torch.device, request: Request = Request.NOTHING
) -> StepSize:
    """One all-gather over all ranks. Rows are padded to the longest of their micro-batch, rounded up to `row_multiple`.

    Micro-batches with the same number have the same length on all data-parallel ranks. Every rank reports its longest
    row of each, planned or read; numbers that are summed come from one rank of each
    data-parallel replica. When a rank could not read, all ranks raise ShardReadError with its number; a rank whose own
    error is of another kind raises that.
    """
    planned = [max(map(sum, rows)) for rows in step.slots or []]
    read = [max(sum(s.tokens.numel() for s in row) for row in rows) for rows in step.micro_batches or []]
    samples = samples_of(step.micro_batches or [])
    counts = groups.stage.is_last and groups.tensor_rank == 0
    counted = samples if counts else []
    largest = [
        int(request),
        int(isinstance(step.failure, Interrupted)),
        int(step.failure is not None and not isinstance(step.failure, Interrupted)),
        platform.peak_memory_bytes(),
        len((step.micro_batches or [[]])[0]),
        *(planned or read or [0] * step.count),
    ]
    summed = [
        len(step.bad),
        count_labels(counted),
        count_images(counted),
        sum(map(is_blank, counted)),
        sum(sample.tokens.numel() for sample in counted),
        sum(sample.problem is not None for sample in counted),
        sum(sample.problem is None and not sample.label_tokens for sample in counted),
    ]
    everyone = gather_integers(largest + summed, device).cpu()
    maxima, totals = everyone[:, : len(largest)].amax(0).tolist(), everyone[:, len(largest) :].sum(0).tolist()
    strongest, interrupted, failed, peak_memory, rows, *longest = maxima
    if failed:
        _refuse(None if isinstance(step.failure, Interrupted) else step.failure)
    found_bad, labels, images, blanks, row_tokens, skipped, ignored = totals
    seq_lengths = tuple(max(1, -(-length // row_multiple)) * row_multiple for length in longest)
    return StepSize(
        seq_lengths=seq_lengths,
        label_tokens=labels,
        images=images,
        blank_samples=blanks,
        row_tokens=row_tokens,
        skipped_samples=skipped,
        ignored_samples=ignored,
        found_bad=found_bad,
        rows=rows,
        slots=sum(seq_lengths) * rows * groups.layout.data_parallel,
        request=Request(strongest),
        interrupted=bool(interrupted),
        peak_memory_bytes=peak_memory,
    )


def _refuse(failure: Exception | None) -> NoReturn:
    """Raises on all ranks when some could not read a step. Collective."""
    messages = gather(None if failure is None else str(failure).strip() or type(failure).__name__)
    if failure is not None and not isinstance(failure, ShardReadError):
        raise on_all_ranks(failure)
    rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
    raise on_all_ranks(ShardReadError(f"{message} (rank {rank})"))


def samples_of(micro_batches: list[list[Row]]) -> list[Sample]:
    """All samples of a step on this rank, in order."""
    return [sample for rows in micro_batches for row in rows for sample in row]


def count_labels(samples: list[Sample]) -> int:
    return sum(sample.label_tokens for sample in samples)


def count_images(samples: list[Sample]) -> int:
    return sum(len(sample.image_starts) for sample in samples)
