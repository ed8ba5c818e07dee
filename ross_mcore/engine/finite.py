"""Checks that weights and gradients are finite, and finds the first part of the model where they are not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ross_mcore.engine.chunks import ModelChunks
from ross_mcore.parallel.collectives import gather, sum_over_ranks
from ross_mcore.parts import label_of, order_of


@dataclass(frozen=True)
class Diagnosis:
    """The first weight and gradient that are not finite, None if all are.

    weight: the first in the order of the forward pass; gradient: the first in the order of the backward pass.
    """

    weight: str | None
    gradient: str | None

    def __str__(self) -> str:
        weight, gradient = ("" if name is None else f"{label_of(name)} ({name})" for name in vars(self).values())
        found = [f"weights are not finite from the {weight} on" if weight else "all weights are finite"]
        found += [f"gradients are not from the {gradient} back"] if gradient else []
        return ", ".join(found)


def all_finite(model: ModelChunks, device: torch.device, figures: Iterable[float] = ()) -> bool:
    """Whether all weights on all ranks are finite, and each rank's own `figures`. Collective, the same on every rank.

    Reads every weight once. FP8 has no infinity, so of a weight in FP8 it reads this rank's part of the master. The
    number of kernels does not depend on the number of weights, and the host reads one value, of all ranks.
    """
    by_type: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for weight in model.parameters():
        found = weight if _is_plain(weight) else getattr(weight, "main_param", None)
        if found is not None and found.numel():
            by_type[found.dtype].append(found.detach())
    are_finite = all(map(math.isfinite, figures))
    unknown = torch.full((), float(not are_finite), dtype=torch.float64, device=device)
    for weights in by_type.values():  # of one type at a time, which torch computes together
        unknown += torch.stack(torch._foreach_norm(weights)).isfinite().logical_not().any()
    dist.all_reduce(unknown)
    if unknown.item() == 0:
        return True
    # the squares in a norm may overflow where all weights are finite
    are_finite &= all(bool(weight.isfinite().all()) for weights in by_type.values() for weight in weights)
    return sum_over_ranks([float(not are_finite)], device) == [0.0]


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is a plain floating-point tensor, not one in FP8."""
    return type(weight.data) is Tensor and weight.is_floating_point()


def diagnose(model: ModelChunks) -> Diagnosis:
    """Checks the weights and reduced gradients of all ranks. Collective, and slower than `all_finite`."""
    weights, gradients = [], []
    for name, weight in model.named_weights():
        if _is_plain(weight) and not weight.detach().isfinite().all():
            weights.append(name)
        gradient = getattr(weight, "main_grad", None)
        if gradient is not None and not gradient.isfinite().all():
            gradients.append(name)
    found = gather((min(weights, key=order_of, default=None), max(gradients, key=order_of, default=None)))
    return Diagnosis(
        min((weight for weight, _ in found if weight is not None), key=order_of, default=None),
        max((gradient for _, gradient in found if gradient is not None), key=order_of, default=None),
    )
