"""One optimizer step: agree on its size, run the schedule, and divide both losses by their global denominators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ross_mcore.batch import IGNORE_INDEX, Batch, Sample, collate
from ross_mcore.parallel.groups import Groups, sum_over_ranks

MicroBatches = list[list[Sample]]


@dataclass(frozen=True)
class StepSize:
    """What all ranks know about a step before it starts.

    seq_length: tokens of every row of the step; label_tokens, images: the denominators of the two losses, over all
    ranks; row_tokens: tokens that are not padding; skipped_samples: empty rows; stop: some rank was asked to stop.
    """

    seq_length: int
    label_tokens: int
    images: int
    row_tokens: int
    skipped_samples: int
    stop: bool


@dataclass(frozen=True)
class Losses:
    """lm_loss: mean cross-entropy over the step's labels; vm_loss: mean reconstruction loss over its images."""

    lm_loss: float
    vm_loss: float

    @property
    def loss(self) -> float:
        return self.lm_loss + self.vm_loss


def agree_on_step(
    micro_batches: MicroBatches | None, stop: bool, groups: Groups, row_multiple: int, device: torch.device
) -> StepSize:
    """One all-gather over all ranks. Rows are padded to the longest of the step, rounded up to `row_multiple`.

    Every reading rank reports its longest row; what is summed is reported by one rank of each data-parallel replica.
    """
    samples = [sample for rows in micro_batches or [] for sample in rows]
    counts = groups.stage.is_last and groups.tensor_rank == 0
    counted = samples if counts else []
    mine = [
        max((sample.tokens.numel() for sample in samples), default=0),
        sum(int((sample.labels[1:] != IGNORE_INDEX).sum()) for sample in counted),
        sum(len(sample.image_starts) for sample in counted),
        sum(sample.tokens.numel() for sample in counted),
        sum(sample.problem is not None for sample in counted),
        int(stop),
    ]
    everyone = torch.empty(dist.get_world_size(), len(mine), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(everyone, torch.tensor([mine], dtype=torch.int64, device=device))
    longest, stopped = int(everyone[:, 0].max()), bool(everyone[:, 5].max())
    totals = everyone[:, 1:5].sum(0).tolist()
    seq_length = max(1, -(-longest // row_multiple)) * row_multiple
    return StepSize(seq_length, *totals, stop=stopped)


def _loss(sums: Tensor, label_tokens: int, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of one micro-batch -> its part of the global mean. mcore divides nothing further (the second entry is 0)."""
    part = sums[0] / max(1, label_tokens) + sums[1] / max(1, images)
    return part, torch.zeros((), dtype=torch.int, device=sums.device), sums.detach()


def run_schedule(
    model: DistributedDataParallel,
    micro_batches: MicroBatches | None,
    size: StepSize,
    *,
    num_micro_batches: int,
    micro_batch_size: int,
    image_size: int,
    device: torch.device,
    output: str = "losses",
    forward_only: bool = False,
) -> list[Any]:
    """Runs all micro-batches through mcore's schedule and leaves the reduced gradients in the model.

    Returns what the last stage computed per micro-batch (sums of the losses, or hidden states with
    `output="hidden"`), and nothing on other stages.
    """

    def batches() -> Iterator[Batch | None]:
        for index in range(num_micro_batches):
            rows = micro_batches[index] if micro_batches is not None else None
            yield None if rows is None else collate(rows, size.seq_length, image_size).to(device)

    def forward_step(iterator: Iterator[Batch | None], stage: torch.nn.Module) -> tuple[Tensor, Any]:
        result = stage(next(iterator), output=output)
        if output == "losses":
            return result, partial(_loss, label_tokens=size.label_tokens, images=size.images)
        return result, lambda hidden, non_loss_data=True: hidden

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches(),
        model=[model],
        num_microbatches=num_micro_batches,
        seq_length=size.seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        collect_non_loss_data=output != "losses",
    )


def combine_losses(sums: list[Tensor], size: StepSize, groups: Groups, device: torch.device) -> Losses:
    """Per-micro-batch sums of the last stage -> the step's losses, on every rank."""
    mine = torch.stack(sums).double().sum(0).tolist() if sums and groups.tensor_rank == 0 else [0.0, 0.0]
    lm_sum, vm_sum = sum_over_ranks(mine, device)
    return Losses(lm_sum / max(1, size.label_tokens), vm_sum / max(1, size.images))


def finalize_gradients(model: list[DistributedDataParallel], _: Tensor | None = None, **options: Any) -> None:
    """mcore's finalize without its division by a token count: both denominators are already in the loss."""
    finalize_model_grads(model, None, **options)
