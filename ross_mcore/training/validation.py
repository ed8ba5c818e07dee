"""Losses on held-out data sets: forward only, with the same samples and the same random draws every time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from ross_mcore.data.dataset import SampleDataset
from ross_mcore.data.loader import StepLoader, StepPlan
from ross_mcore.data.order import SampleOrder
from ross_mcore.data.replacement import BadSample, Replacement, bad_samples
from ross_mcore.data.sources import MixtureDataset
from ross_mcore.data.workers import Interrupted
from ross_mcore.engine.engine import Engine, Randomness
from ross_mcore.engine.losses import Objective
from ross_mcore.engine.progress import at
from ross_mcore.engine.step import AgreedStep
from ross_mcore.reporting.metrics import Validation

DRAWS = Randomness(seed=0)
"""Timesteps and noise depend on this seed and the number of a sample, so they are the same for runs of all seeds."""


def validate(
    engine: Engine,
    dataset: MixtureDataset,
    iteration: int,
    rows_per_step: int | None,
    is_stopping: Callable[[], bool] = lambda: False,
    between: Callable[[], None] = lambda: None,
) -> tuple[Validation, list[BadSample]]:
    """The losses of every data set, on every rank, and the bad samples. Collective.

    Uses the first --valid-samples samples of each in the order of its index, without bad ones. Data-parallel ranks
    share the rows, at most `rows_per_step` at once. Losses are means over all labels and over all images, independent
    of the training objective. Before every batch `between` is called. Raises Interrupted on every rank when
    `is_stopping` on any.
    """
    began = time.perf_counter()
    found, bad = {}, list[BadSample]()
    engine.model.eval()
    try:
        for name, part in zip(dataset.names, dataset.parts):
            steps = _steps(engine, part, iteration, rows_per_step, bad, is_stopping, between)
            found[name] = engine.evaluate(steps, Objective(), DRAWS)
    finally:
        engine.model.train()
    return Validation(iteration, found, time.perf_counter() - began), bad


def _steps(
    engine: Engine,
    dataset: SampleDataset,
    iteration: int,
    rows_per_step: int | None,
    bad: list[BadSample],
    is_stopping: Callable[[], bool],
    between: Callable[[], None],
) -> Iterator[AgreedStep]:
    """Steps over the first samples of a data set; bad samples are appended to `bad`."""
    config, layout = engine.config, engine.groups.layout
    count = min(len(dataset), config.logging.valid_samples or len(dataset))
    rows, multiple = config.training.micro_batch_size * layout.data_parallel, layout.micro_batch_multiple
    at_once = (rows_per_step or 0) // rows or 1
    micro_batches = min(at_once, -(-count // (rows * multiple)) * multiple)
    with StepLoader(
        dataset,
        SampleOrder(count, seed=0, shuffle=False),
        StepPlan(micro_batches * rows, config.training.micro_batch_size, config.data.pack, True, end=count),
        engine.groups.data_share,
        Replacement(attempts=0),
        config.data.num_workers,
        is_stopping,
    ) as loader:
        while loader.state_dict()["consumed_samples"] < count:
            between()
            at("validation", is_long=True)
            step = engine.read(loader)
            if step.size.interrupted:
                raise Interrupted
            bad += bad_samples(iteration, step.loaded.quarantined, dataset)
            yield step
