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

from ross_mcore.batch import Batch
from ross_mcore.models.ross import RossModel
from ross_mcore.platform import SideStream

PICTURES = 16
"""Pictures of a group. The tower fills a GPU with them (11,664 tokens of SigLIP-384), and its working memory stays at
about 0.2 GB; the VAE divides them further (PixelDecoder.encode_batch_size)."""


def groups(batches: Iterable[Batch], pictures: int = PICTURES) -> Generator[list[Batch]]:
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
    for group in groups(batches):
        started = side.start(partial(prepare, group))
        yield from rest
        first, *rest = started.finish(tensor for batch in started.value for tensor in batch.tensors)
        yield first
    yield from rest
