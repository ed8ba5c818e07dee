"""The table of parts: what it runs is accepted by the trainer, and what a machine lacks is said."""

from __future__ import annotations

import argparse

import pytest

from examples.acceptance.parts import COMMON, NEEDS, PARTS, REFERENCES, Machine, Training, with_references
from ross_mcore import config as options
from ross_mcore import flags

TRAININGS = {training.name: training for part in PARTS for training in with_references(part)}


def test_names_are_unique_and_references_exist() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    listed = [training.name for part in PARTS for training in part.trainings if training not in REFERENCES]
    assert len(set(listed)) == len(listed)
    for part in PARTS:
        assert (part.against is None) == (part.tolerance is None)
        assert part.against in {None, *(reference.name for reference in REFERENCES)}
        assert set(part.needs) | {need for t in part.trainings for need in t.needs} <= set(NEEDS)
    for reference in REFERENCES:  # or a part would be skipped for what its reference needs
        assert all(set(reference.needs) <= set(part.needs) for part in PARTS if part.against == reference.name)


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return flags.build_parser()


@pytest.mark.parametrize("training", TRAININGS.values(), ids=list(TRAININGS))
def test_flags_are_accepted(training: Training, parser: argparse.ArgumentParser) -> None:
    for life in training.lives:
        words = f"{COMMON[training.model]} {training.flags} {life.flags}".split()
        given = vars(parser.parse_args(words))
        config = options.Config.from_flat(**{name: value for name, value in given.items() if name != "config"})
        parallel = config.parallel
        degrees = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        assert life.ranks % degrees == 0
        virtual = 2 if parallel.num_layers_per_virtual_pipeline_stage else 1
        options.check(config, data_parallel_size=life.ranks // degrees, virtual_stages=virtual)


def test_what_a_machine_lacks() -> None:
    laptop = Machine(False, 4, {"gpu": "needs a CUDA GPU", "fp8": "needs Hopper"})
    assert laptop.refusal((), 4) is None
    assert laptop.refusal(("gpu",)) == "needs a CUDA GPU"
    assert laptop.refusal((), 8) == "needs 8 ranks, there are 4"
    assert Machine(True, 1).refusal((), 2) == "needs 2 GPUs, there are 1"
