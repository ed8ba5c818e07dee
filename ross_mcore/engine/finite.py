"""Whether numbers are finite, and where in the model they first are not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ross_mcore.engine.chunks import ModelChunks
from ross_mcore.parallel.collectives import gather, sum_over_ranks
from ross_mcore.parts import label_of, order_of


@dataclass(frozen=True)
class Diagnosis:
    """Where numbers are not finite; None for nowhere.

    weight: the first such weight on the way of the data; gradient: the one nearest to the losses, for from there
    gradients run back.
    """

    weight: str | None
    gradient: str | None

    def __str__(self) -> str:
        weight, gradient = ("" if name is None else f"{label_of(name)} ({name})" for name in vars(self).values())
        found = [f"weights are not finite from the {weight} on" if weight else "all weights are finite"]
        found += [f"gradients are not from the {gradient} back"] if gradient else []
        return ", ".join(found)


def all_finite(model: ModelChunks, device: torch.device, figures: Iterable[float] = ()) -> bool:
    """Whether all weights on all ranks are finite, and `figures`, of which each rank has its own.

    Collective, and the same on every rank, even where ranks that should have the same figures have not. Reads every
    weight once; of one kept in FP8, which has no infinity to go to, this rank's part of its master.
    """
    kept = (weight if _is_plain(weight) else getattr(weight, "main_param", None) for weight in model.parameters())
    weights = [weight.detach() for weight in kept if weight is not None and weight.numel()]
    largest = torch._foreach_norm(weights, math.inf) if weights else []
    bad = bool(largest) and not torch.stack([norm.float() for norm in largest]).isfinite().all()
    return sum_over_ranks([float(bad or not all(map(math.isfinite, figures)))], device) == [0.0]


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is kept as the numbers that it stands for."""
    return type(weight.data) is Tensor and weight.is_floating_point()


def diagnose(model: ModelChunks) -> Diagnosis:
    """Looks at the weights and reduced gradients of all ranks. Collective, and slower than `all_finite`."""
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
