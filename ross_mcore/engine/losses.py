"""The two losses of a step: the weights of its micro-batches, and the sum of their terms.

Legend: N samples of a micro-batch, R ranges of timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ross_mcore.batch import Sample, is_blank
from ross_mcore.engine.step import StepSize, count_images, count_labels
from ross_mcore.models.diffusion import TIMESTEP_RANGES, timestep_ranges
from ross_mcore.options import TrainingOptions
from ross_mcore.parallel.collectives import sum_over_ranks
from ross_mcore.parallel.groups import Groups


@dataclass(frozen=True)
class Objective:
    """The normalization of the two losses (--loss-normalization, --vm-loss-rows).

    normalization: over the step (`global`) or over each micro-batch; vm_rows: whether blank samples are denoised;
    lm_scale, vm_scale: factors of the two losses, for the gradient of one of them.
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

    samples: without skipped ones; labels, images: their number; lm_loss, vm_loss: means over these labels and images
    (and over blank samples, if the step's vm_loss covers them), None without any, and vm_loss without a denoiser.
    """

    samples: int
    labels: int
    images: int
    lm_loss: float | None
    vm_loss: float | None


@dataclass(frozen=True)
class Losses:
    """lm_loss: mean cross-entropy over the step's labels; vm_loss: mean reconstruction loss over its images; datasets:
    the losses of each data set, in order; timesteps: mean loss of the draws of each range of timesteps, by its name. A
    loss over nothing is None."""

    lm_loss: float | None
    vm_loss: float | None
    datasets: tuple[DataSetLosses, ...] = ()
    timesteps: dict[str, float | None] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The sum of both; a loss over nothing adds 0."""
        return (self.lm_loss or 0.0) + (self.vm_loss or 0.0)


@dataclass(frozen=True)
class MicroBatchLosses:
    """The losses of a micro-batch on the last stage.

    terms [2]: its terms of the step's two losses; sums [N, 2]: the sums of each sample (see RossModel), and
    timesteps [R, 2]: those by timesteps, of all samples; counts [N, 4] float64: 1 for a sample that was not skipped,
    its labels, its images, 1 for a blank one that vm_loss covers; sources [N]: numbers of the data sets; positions: of
    the samples in the stream.
    """

    terms: Tensor
    sums: Tensor
    timesteps: Tensor
    counts: Tensor
    sources: Tensor
    positions: list[int]

    @classmethod
    def of(cls, samples: list[Sample], terms: Tensor, sums: Tensor, with_blank_samples: bool) -> MicroBatchLosses:
        """sums: [N, 2 + 2R]."""
        counts = [
            [s.problem is None, s.label_tokens, len(s.image_starts), with_blank_samples and is_blank(s)]
            for s in samples
        ]
        sources = torch.tensor([sample.source for sample in samples], dtype=torch.int64)
        positions = [sample.position for sample in samples]
        own, timesteps = sums.detach()[:, :2], sums.detach()[:, 2:].sum(0).view(sums.shape[1] // 2 - 1, 2)
        return cls(terms.detach(), own, timesteps, torch.tensor(counts, dtype=torch.float64), sources, positions)


def loss_weights(labels: int, images: int, blanks: int = 0, count: int = 1) -> tuple[float, float]:
    """Factors of the sums of cross-entropies and of reconstruction losses, in one of `count` micro-batches.

    A loss over nothing has weight 0 (the reference's lm_loss is then NaN). Blank samples without any image have weight
    0 too, as in the reference (ross_arch.py:505-512).
    """
    return (1 / (count * labels) if labels else 0.0, 1 / (count * (images + blanks)) if images else 0.0)


def micro_batch_weights(samples: list[Sample], size: StepSize, objective: Objective, count: int) -> tuple[float, float]:
    """Factors of the two sums of one of `count` micro-batches, the one with `samples`."""
    if objective.normalization == "global":
        blanks = size.blank_samples if objective.with_blank_samples else 0
        lm, vm = loss_weights(size.label_tokens, size.images, blanks)
    else:
        blanks = sum(map(is_blank, samples)) if objective.with_blank_samples else 0
        lm, vm = loss_weights(count_labels(samples), count_images(samples), blanks, count)
    return lm * objective.lm_scale, vm * objective.vm_scale


def weighted_loss(
    sums: Tensor, samples: list[Sample], weights: tuple[float, float], with_blank_samples: bool = False
) -> tuple[Tensor, Tensor, MicroBatchLosses]:
    """sums [N, 2 + 2R] of one micro-batch -> (its term of the loss [], tokens [] for mcore, its losses).

    mcore divides nothing: under calculate_per_token_loss (models/language.py) it leaves the division by tokens to
    finalize_model_grads, which engine/setup.py calls without them, so that this count is never used.
    """
    # not with a tensor of the weights: its copy to a device would wait
    totals = sums[:, :2].contiguous().sum(0)
    terms = torch.stack([total * weight for total, weight in zip(totals, weights, strict=True)])
    kept = MicroBatchLosses.of(samples, terms, sums, with_blank_samples)
    return terms.sum().float(), torch.zeros((), dtype=torch.int, device=sums.device), kept


def combine_losses(
    kept: list[MicroBatchLosses], groups: Groups, device: torch.device, *, denoises: bool, num_datasets: int = 1
) -> Losses:
    """The losses of all micro-batches on the last stage -> the step's losses, on every rank. Collective.

    denoises: whether the model has a denoiser; without one there is no vm_loss.
    """
    step = torch.zeros(1 + TIMESTEP_RANGES, 2, dtype=torch.float64)
    datasets = torch.zeros(num_datasets, 6, dtype=torch.float64)
    if kept and groups.tensor_rank == 0:
        terms = torch.stack([losses.terms for losses in kept]).double().sum(0, keepdim=True)
        timesteps = torch.stack([losses.timesteps for losses in kept]).double().sum(0)
        found = torch.cat([terms, timesteps, *(losses.sums.double() for losses in kept)]).cpu()  # one read
        step, sums = found[: len(step)], found[len(step) :]
        columns = torch.cat([torch.cat([losses.counts for losses in kept]), sums], dim=1)
        datasets.index_add_(0, torch.cat([losses.sources for losses in kept]), columns)
    totals = sum_over_ranks([*step.flatten().tolist(), *datasets.flatten().tolist()], device)
    (lm_loss, vm_loss), *draws = [totals[start : start + 2] for start in range(0, step.numel(), 2)]
    rows = [totals[start : start + 6] for start in range(step.numel(), len(totals), 6)]
    has_vm_loss = denoises and any(images for _, _, images, *_ in rows)
    return Losses(
        lm_loss if any(labels for _, labels, *_ in rows) else None,
        vm_loss if has_vm_loss else None,
        tuple(_data_set_losses(*row, has_vm_loss=has_vm_loss) for row in rows),
        _means_by_timestep(draws) if denoises else {},
    )


def _means_by_timestep(draws: list[list[float]]) -> dict[str, float | None]:
    """(sum of the losses, number) of each range of timesteps -> the means."""
    means = [total / count if count else None for total, count in draws]
    return dict(zip(timestep_ranges(), means, strict=True))


def _data_set_losses(
    samples: float, labels: float, images: float, blanks: float, lm_sum: float, vm_sum: float, *, has_vm_loss: bool
) -> DataSetLosses:
    denoised = images + blanks if has_vm_loss else 0  # blank samples without any image do not count, see loss_weights
    return DataSetLosses(
        int(samples),
        int(labels),
        int(images),
        lm_sum / labels if labels else None,
        vm_sum / denoised if denoised else None,
    )
