"""The two losses of a step: how micro-batches are weighted, and how what they computed becomes the step's figures.

Legend: N samples of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ross_mcore.batch import Sample, blank_samples, is_blank
from ross_mcore.engine.step import StepSize, count_images, count_labels
from ross_mcore.options import TrainingOptions
from ross_mcore.parallel.collectives import sum_over_ranks
from ross_mcore.parallel.groups import Groups


@dataclass(frozen=True)
class Objective:
    """What the two sums of a micro-batch are divided and multiplied by (--loss-normalization, --vm-loss-rows).

    normalization: over the step (`global`) or each micro-batch by itself; vm_rows: whether blank samples are denoised;
    lm_scale, vm_scale: factors of the two losses, to have the gradient of one alone.
    """

    normalization: Literal["global", "microbatch"] = "global"
    vm_rows: Literal["images", "all"] = "images"
    lm_scale: float = 1.0
    vm_scale: float = 1.0

    @classmethod
    def of(cls, options: TrainingOptions) -> Objective:
        return cls(options.loss_normalization, options.vm_loss_rows)

    @property
    def with_blank_samples(self) -> bool:
        return self.vm_rows == "all"


@dataclass(frozen=True)
class DataSetLosses:
    """One data set's share of a step, over all ranks.

    samples: without skipped ones; labels, images; lm_loss, vm_loss: means over these labels and images (and blank
    samples, where the step's vm_loss covers them), None over nothing.
    """

    samples: int
    labels: int
    images: int
    lm_loss: float | None
    vm_loss: float | None


@dataclass(frozen=True)
class Losses:
    """lm_loss: mean cross-entropy over the step's labels; vm_loss: mean reconstruction loss over its images;
    datasets: the same for each data set, in order."""

    lm_loss: float
    vm_loss: float
    datasets: tuple[DataSetLosses, ...] = ()

    @property
    def loss(self) -> float:
        return self.lm_loss + self.vm_loss


@dataclass(frozen=True)
class MicroBatchLosses:
    """What the last stage keeps of a micro-batch.

    parts [2]: its terms of the step's two losses; sums [N, 2]: the samples' own sums (see RossModel); counts [N, 4]
    float64: 1 for a sample that was not skipped, its labels, its images, 1 for a blank one that vm_loss covers;
    sources [N]: data sets; positions: of the samples in the stream.
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


def loss_weights(labels: int, images: int, blanks: int = 0, parts: int = 1) -> tuple[float, float]:
    """Factors of the sums of cross-entropies and of reconstruction losses, in one of `parts` equal parts.

    A loss over nothing has weight 0, where the reference's lm_loss is NaN; blank samples alone count as nothing, as in
    the reference (ross_arch.py:505-512).
    """
    return (1 / (parts * labels) if labels else 0.0, 1 / (parts * (images + blanks)) if images else 0.0)


def micro_batch_weights(samples: list[Sample], size: StepSize, objective: Objective, parts: int) -> tuple[float, float]:
    """Factors of the two sums of one of `parts` micro-batches that holds `samples`."""
    if objective.normalization == "global":
        blanks = size.blank_samples if objective.with_blank_samples else 0
        lm, vm = loss_weights(size.label_tokens, size.images, blanks)
    else:
        blanks = len(blank_samples(samples)) if objective.with_blank_samples else 0
        lm, vm = loss_weights(count_labels(samples), count_images(samples), blanks, parts)
    return lm * objective.lm_scale, vm * objective.vm_scale


def weighted_loss(
    sums: Tensor, samples: list[Sample], weights: tuple[float, float], with_blank_samples: bool = False
) -> tuple[Tensor, Tensor, MicroBatchLosses]:
    """sums [N, 2] of one micro-batch -> (its term of the loss [], tokens [] for mcore, what to keep).

    mcore would divide by the tokens; 0 makes it divide by nothing further.
    """
    parts = sums.sum(0) * sums.new_tensor(weights)
    kept = MicroBatchLosses.of(samples, parts, sums, with_blank_samples)
    return parts.sum().float(), torch.zeros((), dtype=torch.int, device=sums.device), kept


def combine_losses(kept: list[MicroBatchLosses], groups: Groups, device: torch.device, num_datasets: int = 1) -> Losses:
    """What the last stage kept of every micro-batch -> the step's losses, on every rank. Collective."""
    step, datasets = torch.zeros(2, dtype=torch.float64), torch.zeros(num_datasets, 6, dtype=torch.float64)
    if kept and groups.tensor_rank == 0:
        step = torch.stack([part.parts for part in kept]).double().sum(0).cpu()
        counts, sums = torch.cat([part.counts for part in kept]), torch.cat([part.sums for part in kept])
        columns = torch.cat([counts, sums.double().cpu()], dim=1)
        datasets.index_add_(0, torch.cat([part.sources for part in kept]), columns)
    lm_loss, vm_loss, *own = sum_over_ranks([*step.tolist(), *datasets.flatten().tolist()], device)
    rows = [own[start : start + 6] for start in range(0, len(own), 6)]
    any_image = any(images for _, _, images, *_ in rows)
    return Losses(lm_loss, vm_loss, tuple(_data_set_losses(*row, any_image=any_image) for row in rows))


def _data_set_losses(
    samples: float, labels: float, images: float, blanks: float, lm_sum: float, vm_sum: float, *, any_image: bool
) -> DataSetLosses:
    denoised = images + blanks if any_image else 0  # blank samples alone count as nothing, see loss_weights
    return DataSetLosses(
        int(samples),
        int(labels),
        int(images),
        lm_sum / labels if labels else None,
        vm_sum / denoised if denoised else None,
    )
