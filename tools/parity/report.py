"""All rows of a folder of recorded values, in order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from parity import components, data
from parity.golden import Golden, usable, where_recorded
from parity.model import model_rows
from parity.rows import Row
from parity.training import schedule_rows
from parity.trial import Layout
from ross_mcore.errors import LayoutError

PARTS = {
    "diffusion": components.diffusion_rows,
    "denoiser": components.denoiser_rows,
    "vae target": components.vae_rows,
    "conversations": data.conversation_rows,
    "prompts": data.prompt_rows,
    "images": data.image_rows,
    "collated": data.collated_rows,
    "sampler": data.order_rows,
    "learning rate": schedule_rows,
}
"""Families of rows that need no layout."""


def all_rows(folder: Path, layout: Layout) -> Iterator[Row]:
    """All rows in one process; only rows of whole models on several ranks. Collective; needs a process group.

    A model that the layout cannot host gives one row, `not comparable`. Raises GoldenError naming a damaged file,
    LayoutError for another number of processes than the layout needs.
    """
    golden, ranks = Golden(folder), layout.tensor_parallel * layout.pipeline_parallel
    if dist.get_world_size() != ranks:
        raise LayoutError(
            f"tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} needs {ranks} processes, "
            f"not {dist.get_world_size()}: start it with torchrun --nproc-per-node {ranks}"
        )
    if dist.get_world_size() == 1:
        for family, part in PARTS.items():
            yield from usable(golden, family, where_recorded(family, "all", part(golden)))
    yield from usable(golden, "whole models", model_rows(golden, layout))
