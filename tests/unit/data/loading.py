"""Helpers: loaders from keyword settings, samples with all pictures decoded."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ross_mcore.batch import Sample
from ross_mcore.data.dataset import SampleDataset
from ross_mcore.data.loader import StepLoader, StepPlan
from ross_mcore.data.order import Order
from ross_mcore.data.replacement import Replacement
from ross_mcore.parallel.layout import DataShare


def decoded(dataset: SampleDataset, number: int, position: int) -> Sample:
    """A sample with all its pictures."""
    sample = dataset.get(number, position)
    dataset.decode(sample, number, range(len(sample.pixels)))
    return sample


def open_loader(
    dataset: SampleDataset, order: Order, *, state: dict[str, int] | None = None, num_workers: int = 0, **settings: Any
) -> StepLoader:
    """`settings`: fields of StepPlan, DataShare and Replacement by name; `state`: the loader's start."""
    values = [
        kind(**{field.name: settings.pop(field.name) for field in fields(kind) if field.name in settings})
        for kind in (StepPlan, DataShare, Replacement)
    ]
    assert not settings
    loader = StepLoader(dataset, order, *values, num_workers)
    if state is not None:
        loader.load_state_dict(state)
    return loader
