"""One optimizer step: agree on its size, run the schedule, and give every micro-batch its weight in both losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal, NoReturn

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ross_mcore import platform
from ross_mcore.batch import Batch, Row, Sample, Slots, blank_samples, collate, is_blank, segments
from ross_mcore.data.loader import Step, StepLoader
from ross_mcore.engine.chunks import ModelChunks
from ross_mcore.errors import ShardReadError
from ross_mcore.guards.progress import at
from ross_mcore.models.diffusion import Draws
from ross_mcore.options import TrainingOptions
from ross_mcore.parallel.collectives import gather, gather_integers, on_all_ranks, sum_over_ranks
from ross_mcore.parallel.groups import Groups
from ross_mcore.training.stop import Asked


@dataclass(frozen=True)
class StepSize:
    """What all ranks know about a step before it starts.

    seq_length: tokens of every row of the step; label_tokens, images, blank_samples (without a picture): what the two
    losses are over, on all ranks; row_tokens: tokens that are not padding; skipped_samples: empty rows;
    ignored_samples: rows without any label, of which only the picture is learned; found_bad: what ranks found wrong
    with samples that are still in the step; asked: the most that a rank was asked to do after it;
    peak_memory_bytes: the most that a rank has held so far, before the step.
    """

    seq_length: int
    label_tokens: int
    images: int
    blank_samples: int
    row_tokens: int
    skipped_samples: int
    ignored_samples: int
    found_bad: int = 0
    asked: Asked = Asked.NOTHING
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class DataSetLosses:
    """What one data set had of a step, on all ranks.

    samples: not counting skipped ones; labels, images; lm_loss, vm_loss: means over these labels and images (and blank
    samples, where the step's vm_loss covers them), None over nothing.
    """

    samples: int
    labels: int
    images: int
    lm_loss: float | None
    vm_loss: float | None


@dataclass(frozen=True)
class Losses:
    """lm_loss: mean cross-entropy over the step's labels; vm_loss: mean reconstruction loss over its images.

    `datasets`: the data sets' own, in order.
    """

    lm_loss: float
    vm_loss: float
    datasets: tuple[DataSetLosses, ...] = ()

    @property
    def loss(self) -> float:
        return self.lm_loss + self.vm_loss


@dataclass(frozen=True)
class MicroBatchLosses:
    """What the last stage keeps of a micro-batch of N samples.

    parts [2] of the step's two losses; sums [N, 2] of the samples' own (see RossModel); counts [N, 4] float64: 1 for a
    sample that was not skipped, its labels, its images, 1 for a blank one that vm_loss covers; sources [N]: data sets;
    positions: of the samples in the stream.
    """

    parts: Tensor
    sums: Tensor
    counts: Tensor
    sources: Tensor
    positions: list[int]

    @classmethod
    def of(cls, samples: list[Sample], parts: Tensor, sums: Tensor, with_blank_samples: bool) -> MicroBatchLosses:
        counts = [
            [s.problem is None, s.label_tokens, len(s.image_starts), with_blank_samples and is_blank(s)]
            for s in samples
        ]
        sources = torch.tensor([sample.source for sample in samples], dtype=torch.int64)
        positions = [sample.position for sample in samples]
        return cls(parts.detach(), sums.detach(), torch.tensor(counts, dtype=torch.float64), sources, positions)


def agree_on_step(
    step: Step, groups: Groups, row_multiple: int, device: torch.device, asked: Asked = Asked.NOTHING
) -> StepSize:
    """One all-gather over all ranks. Rows are padded to the longest of the step, rounded up to `row_multiple`.

    Every rank reports its longest row, as planned or else as read; what is summed is reported by one rank of each
    data-parallel replica. Raises ShardReadError, which names the rank, on all ranks when one could not read; that rank
    raises what else it was.
    """
    planned = [sum(slots) for rows in step.slots or [] for slots in rows]
    read = [sum(sample.tokens.numel() for sample in row) for rows in step.micro_batches or [] for row in rows]
    samples = samples_of(step.micro_batches or [])
    counts = groups.stage.is_last and groups.tensor_rank == 0
    counted = samples if counts else []
    mine = [
        max(planned or read, default=0),
        int(asked),
        int(step.failure is not None),
        platform.peak_memory_bytes(),
        len(step.bad),
        _labels(counted),
        _images(counted),
        len(blank_samples(counted)),
        sum(sample.tokens.numel() for sample in counted),
        sum(sample.problem is not None for sample in counted),
        sum(sample.problem is None and not sample.label_tokens for sample in counted),
    ]
    everyone = gather_integers(mine, device)
    longest, most_asked, failed, peak_memory = everyone[:, :4].amax(0).tolist()
    if failed:
        _refuse(step.failure)
    found_bad, *totals = everyone[:, 4:].sum(0).tolist()
    seq_length = max(1, -(-longest // row_multiple)) * row_multiple
    return StepSize(seq_length, *totals, found_bad=found_bad, asked=Asked(most_asked), peak_memory_bytes=peak_memory)


def _refuse(failure: Exception | None) -> NoReturn:
    """Ends the run on all ranks when some could not read a step. Collective."""
    messages = gather(None if failure is None else str(failure).strip() or type(failure).__name__)
    if failure is not None and not isinstance(failure, ShardReadError):
        raise on_all_ranks(failure)
    rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
    raise on_all_ranks(ShardReadError(f"{message} (rank {rank})"))


def replace_bad_samples(
    step: Step, size: StepSize, loader: StepLoader, groups: Groups, row_multiple: int, device: torch.device
) -> StepSize:
    """Puts other samples in the places of the step's bad ones, the same on all ranks; returns the step's new size.

    Collective. Every rank tells every other what it found, and each does the same with it; so does nothing wait for a
    rank that found something. Only a step with bad samples costs more than `agree_on_step`.
    """
    while size.found_bad:
        loader.replace(step, chain.from_iterable(gather(step.bad)))
        size = agree_on_step(step, groups, row_multiple, device, size.asked)
    return size


def samples_of(micro_batches: list[list[Row]]) -> list[Sample]:
    """All samples of a step on this rank, in order."""
    return [sample for rows in micro_batches for row in rows for sample in row]


def _labels(samples: list[Sample]) -> int:
    return sum(sample.label_tokens for sample in samples)


def _images(samples: list[Sample]) -> int:
    return sum(len(sample.image_starts) for sample in samples)


def loss_weights(labels: int, images: int, blanks: int = 0, parts: int = 1) -> tuple[float, float]:
    """What the sums of cross-entropies and of reconstruction losses are multiplied by, in one of `parts` equal parts.

    A loss over nothing weighs nothing, where the reference's lm_loss is NaN; and blank rows alone are nothing, as in
    the reference (ross_arch.py:505-512).
    """
    return (1 / (parts * labels) if labels else 0.0, 1 / (parts * (images + blanks)) if images else 0.0)


def _micro_batch_weights(
    samples: list[Sample], size: StepSize, options: TrainingOptions, parts: int
) -> tuple[float, float]:
    everywhere = options.vm_loss_rows == "all"
    if options.loss_normalization == "global":
        return loss_weights(size.label_tokens, size.images, size.blank_samples if everywhere else 0)
    return loss_weights(_labels(samples), _images(samples), len(blank_samples(samples)) if everywhere else 0, parts)


def _loss(
    sums: Tensor, samples: list[Sample], weights: tuple[float, float], with_blank_samples: bool = False
) -> tuple[Tensor, Tensor, MicroBatchLosses]:
    """Sums [N, 2] of one micro-batch's samples -> its part of the loss, and what to keep of it.

    mcore divides nothing further (the second entry is 0).
    """
    parts = sums.sum(0) * sums.new_tensor(weights)
    kept = MicroBatchLosses.of(samples, parts, sums, with_blank_samples)
    return parts.sum().float(), torch.zeros((), dtype=torch.int, device=sums.device), kept


def run_schedule(
    model: ModelChunks,
    step: Step,
    size: StepSize,
    groups: Groups,
    options: TrainingOptions,
    *,
    image_size: int,
    device: torch.device,
    output: Literal["losses", "hidden"] = "losses",
    forward_only: bool = False,
    num_micro_batches: int | None = None,
    draws: Sequence[Draws] | None = None,
    draw_seed: int | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
) -> list[Any]:
    """Runs all micro-batches through mcore's schedule and leaves the reduced gradients in the model.

    Returns what the last stage computed per micro-batch (MicroBatchLosses, or hidden states with `output="hidden"`),
    and nothing on other stages. `num_micro_batches` is the global batch's share of this rank unless given; `draws`
    replays recorded randomness, one entry a micro-batch, and `draw_seed` keys other draws than the model's seed (see
    RossModel.forward); `scales` multiply lm_loss and vm_loss, so that one of them can be had alone.
    """
    count = num_micro_batches or micro_batches_per_step(options, groups)
    everywhere = options.vm_loss_rows == "all"

    def forward_step(numbers: Iterator[int], stage: torch.nn.Module) -> tuple[Tensor, Any]:
        number = next(numbers)
        at(f"forward and backward, micro-batch {number + 1} of {count}")
        has_end = stage.module.pre_process or stage.module.post_process  # type: ignore[union-attr]
        rows = step.micro_batches[number] if step.micro_batches is not None and has_end else None
        slots = slots_of(step, number, size, options)
        batch: Batch | None = None
        if rows is not None:
            batch = collate(rows, size.seq_length, image_size, slots, everywhere).to(device)
        lengths = segments(slots, size.seq_length)
        recorded = None if draws is None else draws[number]
        result = stage(batch, lengths, output=output, draws=recorded, draw_seed=draw_seed)
        if output != "losses":
            return result, lambda hidden, non_loss_data=True: hidden
        samples = samples_of([rows or []])
        weights = _micro_batch_weights(samples, size, options, count * groups.layout.data_parallel)
        scaled = weights[0] * scales[0], weights[1] * scales[1]
        return result, partial(_loss, samples=samples, weights=scaled, with_blank_samples=everywhere)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(range(count)) for _ in model],
        model=list(model),
        num_microbatches=count,
        seq_length=size.seq_length * options.micro_batch_size,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=output != "losses",
    )


def slots_of(step: Step, number: int, size: StepSize, options: TrainingOptions) -> list[Slots]:
    """Where samples lie in the rows of a micro-batch: as planned, or one sample to a row."""
    return step.slots[number] if step.slots is not None else [[size.seq_length]] * options.micro_batch_size


def micro_batches_per_step(options: TrainingOptions, groups: Groups) -> int:
    """Micro-batches that one data-parallel rank computes for an optimizer step."""
    return (options.global_batch_size or 0) // (options.micro_batch_size * groups.layout.data_parallel) or 1


def combine_losses(
    parts: list[MicroBatchLosses], groups: Groups, device: torch.device, num_datasets: int = 1
) -> Losses:
    """What the last stage kept of every micro-batch -> the step's losses, on every rank. Collective."""
    step, datasets = torch.zeros(2, dtype=torch.float64), torch.zeros(num_datasets, 6, dtype=torch.float64)
    if parts and groups.tensor_rank == 0:
        step = torch.stack([part.parts for part in parts]).double().sum(0).cpu()
        counts, sums = torch.cat([part.counts for part in parts]), torch.cat([part.sums for part in parts])
        columns = torch.cat([counts, sums.double().cpu()], dim=1)
        datasets.index_add_(0, torch.cat([part.sources for part in parts]), columns)
    lm_loss, vm_loss, *own = sum_over_ranks([*step.tolist(), *datasets.flatten().tolist()], device)
    rows = [own[start : start + 6] for start in range(0, len(own), 6)]
    any_image = any(images for _, _, images, *_ in rows)
    return Losses(lm_loss, vm_loss, tuple(_data_set_losses(*row, any_image=any_image) for row in rows))


def _data_set_losses(
    samples: float, labels: float, images: float, blanks: float, lm_sum: float, vm_sum: float, *, any_image: bool
) -> DataSetLosses:
    denoised = images + blanks if any_image else 0  # blank rows alone are nothing, see loss_weights
    return DataSetLosses(
        int(samples),
        int(labels),
        int(images),
        lm_sum / labels if labels else None,
        vm_sum / denoised if denoised else None,
    )


def finalize_gradients(model: list[DistributedDataParallel], _: Tensor | None = None, **options: Any) -> None:
    """mcore's finalize without its division by a token count: both denominators are already in the loss."""
    at("gradient reduction")
    finalize_model_grads(model, None, **options)
