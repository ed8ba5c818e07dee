"""Splits images over a tensor-parallel group: each rank computes its share; results and gradients are combined.

The vision tower, the projector, the VAE and the denoiser are replicated over the tensor-parallel group; each rank
computes its contiguous share of a micro-batch's images (`layout.share_of`), and in the denoiser of its pairs of an
image and a draw (`layout.PairShare`), so that one image keeps all ranks busy. Parameters of such modules are marked so
that mcore *averages* their gradients over the group (distributed/finalize_model_grads.py:342), whether or not sequence
parallelism is on. But their true gradient is the sum over the shares, so gradients are multiplied by the group's size
before they reach those modules' parameters:

    gather_shares      forward: concatenate the shares      backward: own slice of the gradient, times the size
    sum_shares         forward: sum of the ranks' values    backward: the gradient, times the size
    enter_share        forward: identity                    backward: sum over the ranks, divided by the size

A path through `enter_share` and `sum_shares` multiplies and divides once each, so the gradient before it is the true
sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ross_mcore.parallel.layout import share_of


def average_over_tensor_group(module: nn.Module) -> None:
    """Marks the parameters of a replicated module whose images are split over the tensor-parallel group."""
    for parameter in module.parameters():
        parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]  # a mark for mcore


class _GatherShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, count: int, group: ProcessGroup, turn: int) -> Tensor:
        size, rank = group.size(), group.rank()
        shares = [share_of(count, other, size, turn) for other in range(size)]
        ctx.share, ctx.size = shares[rank], size
        largest = max(map(len, shares))
        gathered = local.new_empty(size, largest, *local.shape[1:])
        if largest:
            missing = local.new_zeros(largest - len(local), *local.shape[1:])
            dist.all_gather_into_tensor(gathered.flatten(0, 1), torch.cat([local, missing]), group=group)
        return torch.cat([found[: len(share)] for found, share in zip(gathered, shares, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient[ctx.share.start : ctx.share.stop] * ctx.size, None, None, None


class _SumShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> Tensor:
        ctx.size = group.size()
        total = local.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.size, None


class _EnterShare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total / ctx.group.size(), None


def gather_shares(local: Tensor, count: int, group: ProcessGroup, turn: int = 0) -> Tensor:
    """[J, ...] of every rank -> [count, ...] on every rank, in order; each rank's J is its `share_of(count)`.

    The gradient of the result must be complete and equal on all ranks, as it is before a tensor-parallel layer. Raises
    ValueError when this rank's share has another length.
    """
    expected = len(share_of(count, group.rank(), group.size(), turn))
    if local.shape[0] != expected:
        raise ValueError(f"this rank holds {local.shape[0]} of {count} images, its share is {expected}")
    return local if group.size() == 1 else _GatherShares.apply(local, count, group, turn)


def sum_shares(local: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over the group of a value that each rank computes from its share."""
    return local if group.size() == 1 else _SumShares.apply(local, group)


def enter_share(whole: Tensor, group: ProcessGroup) -> Tensor:
    """Identity; from here on, each rank uses a tensor that is equal on all ranks for its share of the images only."""
    return whole if group.size() == 1 else _EnterShare.apply(whole, group)
