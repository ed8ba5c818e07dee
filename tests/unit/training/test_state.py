"""What a run that goes on may not change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ross_mcore import platform

platform.prepare()

from ross_mcore.config import ConfigError  # noqa: E402
from ross_mcore.training.state import RUN_IDENTITY, TrainState  # noqa: E402

STARTED = TrainState(seed=1, data_fingerprint="a", global_batch_size=8, seq_length=64, template="plain")


@pytest.mark.parametrize("name", RUN_IDENTITY)
def test_a_run_that_would_read_other_rows_is_refused(name: str) -> None:
    before = getattr(STARTED, name)
    changed = not before if isinstance(before, bool) else 7 if before is None else before * 2 or "other"
    other = replace(STARTED, **{name: changed})
    with pytest.raises(ConfigError, match=f"with {name} .*--finetune"):
        STARTED.refuse_other(other)


def test_the_order_and_the_text_are_part_of_a_run() -> None:
    assert {"sampler", "mm_use_im_start_end"} <= set(RUN_IDENTITY)
    with pytest.raises(ConfigError, match="sampler 'shuffle' and this run has 'modality_length' .--sampler."):
        STARTED.refuse_other(replace(STARTED, sampler="modality_length"))


def test_a_run_that_goes_on_is_the_same() -> None:
    replace(STARTED, iteration=7, data={"consumed_samples": 56}).refuse_other(STARTED)
