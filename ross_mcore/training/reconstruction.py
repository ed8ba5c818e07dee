"""Pictures above their reconstructions from the model's image states, computed inside the training pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ross_mcore.batch import collate
from ross_mcore.data.loader import StepLoader, StepPlan
from ross_mcore.data.order import SampleOrder
from ross_mcore.data.sources import MixtureDataset
from ross_mcore.data.workers import Interrupted
from ross_mcore.engine.engine import Engine
from ross_mcore.engine.progress import at
from ross_mcore.engine.step import AgreedStep
from ross_mcore.models.diffusion import run_steps
from ross_mcore.parallel.collectives import any_rank
from ross_mcore.parallel.split import gather_shares
from ross_mcore.reporting.pictures import picture_grid

SEARCHED_SAMPLES = 100_000
"""Samples of each data set in which the first picture is searched."""


@torch.no_grad()
def reconstruction_grid(
    engine: Engine, dataset: MixtureDataset, is_stopping: Callable[[], bool] = lambda: False
) -> Tensor | None:
    """Originals above reconstructions [3, H, W] in [0, 1] on the last stage, None elsewhere. Collective.

    Shows the first --eval-images pictures in the order of the shards; every data-parallel replica computes the same.
    Raises Interrupted on every rank when `is_stopping` on any, before each micro-batch.
    """
    at("reconstructions", is_long=True)
    first = dataset.first_picture(SEARCHED_SAMPLES)
    if first is None:
        return None
    step = read_samples(engine, dataset, first, engine.config.logging.eval_images, is_stopping)
    if step.size.interrupted:
        raise Interrupted
    engine.model.eval()
    hidden = engine.hidden(step)
    engine.model.train()
    originals, pictures = list[Tensor](), list[Tensor]()
    for number in range(step.size.micro_batches):
        at("reconstructions", is_long=True)
        if any_rank(is_stopping(), engine.device):
            raise Interrupted
        if not engine.groups.stage.is_last or (rows := step.rows_of(number)) is None:
            continue
        image_size = engine.model_config.vision.image_size
        seq_length, slots = step.size.seq_lengths[number], step.slots_of(number)
        batch = collate(rows, seq_length, image_size, slots, turn=number).to(engine.device)
        original, picture = run_steps(engine.model.last.reconstruct(hidden[number], batch))
        for found, mine in ((originals, original), (pictures, picture)):
            found.append(gather_shares(mine.contiguous(), batch.num_images, engine.groups.tensor, number))
    if not pictures:
        return None
    shown = engine.config.logging.eval_images
    return picture_grid([torch.cat(originals)[:shown], torch.cat(pictures)[:shown]])


def read_samples(
    engine: Engine, dataset: MixtureDataset, first: int, count: int, is_stopping: Callable[[], bool]
) -> AgreedStep:
    """A step of `count` samples or more, from number `first` on, one per row, the same on every data-parallel rank."""
    options, groups = engine.config, engine.groups
    rows = options.training.micro_batch_size
    multiple = rows * groups.layout.micro_batch_multiple
    micro_batches = -(-count // multiple) * groups.layout.micro_batch_multiple
    with StepLoader(
        dataset,
        SampleOrder(len(dataset), seed=0, shuffle=False),
        StepPlan(micro_batches * rows, rows),
        replace(groups.data_share, dp_rank=0, dp_size=1),
        is_interrupted=is_stopping,
    ) as loader:
        loader.skip_rows(first)
        return engine.agree(next(loader))
