"""Pictures beside what the model's image states reconstruct of them, from inside a running pipeline."""

from __future__ import annotations

import torch
from torch import Tensor

from ross_mcore.architecture import ModelConfig
from ross_mcore.batch import collate
from ross_mcore.config import Config
from ross_mcore.data.loader import StepLoader
from ross_mcore.data.order import SampleOrder
from ross_mcore.data.sources import MixtureDataset
from ross_mcore.engine.chunks import ModelChunks
from ross_mcore.engine.step import agree_on_step, run_schedule, slots_of
from ross_mcore.guards.progress import at
from ross_mcore.parallel.groups import Groups
from ross_mcore.parallel.split import gather_shares
from ross_mcore.reporting.metrics import picture_grid

SEARCHED_SAMPLES = 100_000
"""How far from the start of each data set a first picture is looked for."""


@torch.no_grad()
def reconstruction_grid(
    model: ModelChunks,
    dataset: MixtureDataset,
    groups: Groups,
    config: Config,
    model_config: ModelConfig,
    row_multiple: int,
    device: torch.device,
) -> Tensor | None:
    """Originals over reconstructions [3, H, W] in [0, 1] on the last stage, None elsewhere. Collective.

    The pictures are the first `--eval-images` of samples in the order of the shards, from the first that has one; every
    data-parallel replica computes the same ones.
    """
    at("reconstructions", is_long=True)
    first = dataset.first_picture(SEARCHED_SAMPLES)
    if first is None:
        return None
    rows = config.training.micro_batch_size
    multiple = rows * groups.layout.micro_batch_multiple
    count = -(-config.logging.eval_images // multiple) * groups.layout.micro_batch_multiple
    with StepLoader(
        dataset,
        SampleOrder(len(dataset), seed=0, shuffle=False),
        global_batch_size=count * rows,
        micro_batch_size=rows,
        skip_rows=first,
        tp_rank=groups.tensor_rank,
        tp_size=groups.layout.tensor_parallel,
        reads=groups.stage.reads_data,
    ) as loader:
        step = next(loader)
    size = agree_on_step(step, groups, row_multiple, device)
    model.gather_weights()
    model.eval()
    hidden = run_schedule(
        model,
        step,
        size,
        groups,
        config.training,
        num_micro_batches=count,
        image_size=model_config.vision.image_size,
        device=device,
        output="hidden",
        forward_only=True,
    )
    model.train()
    if not groups.stage.is_last or step.micro_batches is None:
        return None
    originals, pictures = [], []
    for number, (states, rows_read) in enumerate(zip(hidden, step.micro_batches, strict=True)):
        slots = slots_of(step, number, size, config.training)
        batch = collate(rows_read, size.seq_length, model_config.vision.image_size, slots).to(device)
        original, picture = model.last.reconstruct(states, batch)
        originals.append(gather_shares(original.contiguous(), batch.num_images, groups.tensor))
        pictures.append(gather_shares(picture.contiguous(), batch.num_images, groups.tensor))
    shown = config.logging.eval_images
    return picture_grid([torch.cat(originals)[:shown], torch.cat(pictures)[:shown]])
