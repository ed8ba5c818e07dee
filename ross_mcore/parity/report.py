"""All rows of a folder of recorded values, in order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from ross_mcore.parity import components, data
from ross_mcore.parity.golden import Golden
from ross_mcore.parity.model import Layout, model_rows, schedule_rows
from ross_mcore.parity.rows import Row


def all_rows(folder: Path, layout: Layout) -> Iterator[Row]:
    """Rows of every kind in one process; of the whole model alone on several ranks. Collective.

    Needs a process group. Raises GoldenError naming what is missing, LayoutError for a layout that does not fit.
    """
    golden = Golden(folder)
    if dist.get_world_size() == 1:
        for part in (
            components.diffusion_rows,
            components.denoiser_rows,
            components.vae_rows,
            data.conversation_rows,
            data.prompt_rows,
            data.image_rows,
            data.collated_rows,
            data.order_rows,
            schedule_rows,
        ):
            yield from part(golden)
    yield from model_rows(golden, layout)
