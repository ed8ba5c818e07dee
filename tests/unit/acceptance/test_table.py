"""The table of parts: the trainer accepts its commands, and missing needs are reported."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest

from examples.acceptance.models import LANGUAGE, VOCABULARY
from examples.acceptance.parts import COMMON, MINUTES, NEEDS, PARTS, REFERENCES, Machine, Training, with_references
from ross_mcore import config as options
from ross_mcore import flags, platform
from ross_mcore.architecture import LanguageConfig
from ross_mcore.engine.precision import check_execution

TRAININGS = {training.name: training for part in PARTS for training in with_references(part)}


def test_names_are_unique_and_references_exist() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    listed = [training.name for part in PARTS for training in part.trainings if training not in REFERENCES]
    assert len(set(listed)) == len(listed)
    for part in PARTS:
        assert (part.against is None) == (part.tolerance is None)
        assert part.against in {None, *(reference.name for reference in REFERENCES)}
        assert set(part.needs) | {need for t in part.trainings for need in t.needs} <= set(NEEDS)
    for reference in REFERENCES:  # or a part would be skipped because of its reference
        assert all(set(reference.needs) <= set(part.needs) for part in PARTS if part.against == reference.name)


def test_shares_of_the_time_are_the_whole() -> None:
    """And the parts that others need come first."""
    for column, whole in enumerate(MINUTES):
        assert 0.9 * whole <= sum(part.minutes[column] for part in PARTS) <= whole
    names = [part.name for part in PARTS]
    assert names[:2] == ["environment", "prepare"] and names.index("profile") < names.index("long_row")
    assert names.index("packed") < names.index("packed_gradients")


def language_of(size: str) -> LanguageConfig:
    shape = {name: value for name, value in LANGUAGE[size].items() if name != "initializer_range"}
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
    }
    return LanguageConfig("qwen2", head_dim=head_dim, tie_word_embeddings=False, qkv_bias=True, **common | shape)


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return flags.build_parser()


@pytest.mark.parametrize("training", TRAININGS.values(), ids=list(TRAININGS))
def test_flags_are_accepted(
    training: Training, parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine with all libraries: they are marked as installed and not called."""
    monkeypatch.setattr(platform, "fp8_refusal", lambda recipe: None)
    everything = platform.Libraries(**{field.name: True for field in dataclasses.fields(platform.Libraries)})
    for life in training.lives:
        words = f"{COMMON[training.model]} {training.flags} {life.flags}".split()
        given = vars(parser.parse_args(words))
        config = options.Config.from_flat(**{name: value for name, value in given.items() if name != "config"})
        parallel = config.parallel
        degrees = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        assert life.ranks % degrees == 0
        virtual = 2 if parallel.num_layers_per_virtual_pipeline_stage else 1
        options.check(config, data_parallel_size=life.ranks // degrees, virtual_stages=virtual)
        check_execution(config, language_of(training.model), everything)


def test_what_a_machine_lacks() -> None:
    laptop = Machine(False, 4, {"gpu": "needs a CUDA GPU", "fp8": "needs Hopper"})
    assert laptop.refusal((), 4) is None
    assert laptop.refusal(("gpu",)) == "needs a CUDA GPU"
    assert laptop.refusal((), 8) == "needs 8 ranks, there are 4"
    assert Machine(True, 1).refusal((), 2) == "needs 2 GPUs, there are 1"
