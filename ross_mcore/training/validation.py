"""Losses on held-out data sets: forward only, over the same samples with the same random draws every time."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from ross_mcore.architecture import ModelConfig
from ross_mcore.config import Config
from ross_mcore.data.loader import StepLoader
from ross_mcore.data.order import SampleOrder
from ross_mcore.data.sources import MixtureDataset
from ross_mcore.engine.chunks import ModelChunks
from ross_mcore.engine.step import (
    agree_on_step,
    combine_losses,
    micro_batches_per_step,
    replace_bad_samples,
    run_schedule,
)
from ross_mcore.guards.bad_samples import BadSample, bad_samples
from ross_mcore.guards.progress import at
from ross_mcore.parallel.groups import Groups
from ross_mcore.reporting.metrics import Validation

DRAW_SEED = 0
"""Keys timesteps and noise, together with the number of a sample: runs of other seeds are measured with the same."""


@torch.no_grad()
def validate(
    iteration: int,
    model: ModelChunks,
    dataset: MixtureDataset,
    groups: Groups,
    config: Config,
    model_config: ModelConfig,
    row_multiple: int,
    device: torch.device,
) -> tuple[Validation, list[BadSample]]:
    """The losses of every data set, one after the other, on every rank; and which samples were bad. Collective.

    Taken are the first `--valid-samples` samples of each in the order of its index, without bad ones. Data-parallel
    ranks share the rows. Losses are means over all labels, and over all images, whatever the arithmetic of training.
    """
    began = time.perf_counter()
    options = replace(config.training, loss_normalization="global", vm_loss_rows="images")
    found, bad = {}, []
    model.gather_weights()
    model.eval()
    for name, part in zip(dataset.names, dataset.parts):
        count = min(len(part), config.logging.valid_samples or len(part))
        rows = options.micro_batch_size * groups.layout.data_parallel
        multiple = groups.layout.micro_batch_multiple
        micro_batches = min(micro_batches_per_step(options, groups), -(-count // (rows * multiple)) * multiple)
        losses = []
        with StepLoader(
            part,
            SampleOrder(count, seed=0, shuffle=False),
            global_batch_size=micro_batches * rows,
            micro_batch_size=options.micro_batch_size,
            packed=config.data.pack,
            dp_rank=groups.data_rank,
            dp_size=groups.layout.data_parallel,
            tp_rank=groups.tensor_rank,
            tp_size=groups.layout.tensor_parallel,
            reads=groups.stage.reads_data,
            num_workers=config.data.num_workers,
            attempts=0,
            end=count,
        ) as loader:
            while loader.state_dict()["consumed_samples"] < count:
                at("validation", is_long=True)
                step = next(loader)
                size = agree_on_step(step, groups, row_multiple, device)
                size = replace_bad_samples(step, size, loader, groups, row_multiple, device)
                bad += bad_samples(iteration, step, part)
                losses += run_schedule(
                    model,
                    step,
                    size,
                    groups,
                    options,
                    image_size=model_config.vision.image_size,
                    device=device,
                    forward_only=True,
                    num_micro_batches=micro_batches,
                    draw_seed=DRAW_SEED,
                )
        (found[name],) = combine_losses(losses, groups, device).datasets
    model.train()
    return Validation(iteration, found, time.perf_counter() - began), bad
