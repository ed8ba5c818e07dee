"""Micro-batches on the device, with the outputs of the frozen vision tower and VAE for several of them at a time.

These parts depend on no weight that a step changes, so their outputs are made before the forward pass that uses them:
for a group of micro-batches in one call each, and on a GPU beside the computation of the group before. The next step is
not begun ahead, because its samples are agreed on after this one.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from functools import partial
from typing import Literal

import torch

from ross_mcore import platform
from ross_mcore.batch import Batch
from ross_mcore.models.ross import RossModel
from ross_mcore.platform import SideStream

PICTURES = 8
"""Pictures of a group on a GPU, as many as the VAE takes at a time: 5,832 tokens of SigLIP-384 fill the GPU, and in a
pipeline the other stages wait for a group at most as long as for a tenth of a micro-batch."""
PICTURES_ON_CPU = 1
"""A CPU gains nothing from more, and other stages of its pipeline would wait."""


def groups(batches: Iterable[Batch], pictures: int) -> Generator[list[Batch]]:
    """Consecutive micro-batches of a step with at most so many pictures on this rank; without pictures, as if with one.

    The first micro-batch is a group of its own, so that the pipeline begins early. Groups depend on the step alone, so
    that a resumed run computes the same bits.
    """
    group, held = list[Batch](), 0
    for number, batch in enumerate(batches):
        count = max(1, len(batch.pixels))
        if group and (number == 1 or held + count > pictures):
            yield group
            group, held = [], 0
        group.append(batch)
        held += count
    if group:
        yield group


def with_frozen_parts(
    batches: Iterable[Batch], model: RossModel, device: torch.device, output: Literal["losses", "hidden"]
) -> Generator[Batch]:
    """The micro-batches of a step, in order, on the device and with the parts that `model` does not train.

    A group begins after the first micro-batch of the group before was given out, beside whose computation it runs.
    """

    def prepare(group: list[Batch]) -> list[Batch]:
        moved = [batch.to(device) for batch in group]
        model.add_parts(moved, output)
        return moved

    side, rest = SideStream(), list[Batch]()
    for group in groups(batches, PICTURES if platform.has_gpu() else PICTURES_ON_CPU):
        started = side.start(partial(prepare, group))
        yield from rest
        first, *rest = started.finish(tensor for batch in started.value for tensor in batch.tensors)
        yield first
    yield from rest
