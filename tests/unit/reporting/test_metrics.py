from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ross_mcore.engine.losses import DataSetLosses
from ross_mcore.engine.state import TrainState
from ross_mcore.logs import read_entries
from ross_mcore.reporting.files import MetricsFile, ValidationFile
from ross_mcore.reporting.metrics import StepMetrics, Validation, duration
from ross_mcore.reporting.pictures import picture_grid


def opened(kind: type, folder: Path, iteration: int) -> Any:
    """A file of a run that continues after `iteration`."""
    return kind(SimpleNamespace(save_folder=folder), TrainState(iteration))


def entry(iteration: int) -> StepMetrics:
    return StepMetrics(
        iteration, 8 * iteration, 1.0, 0.5, 1.5, 2.0, 1e-3, 10, 2, "0" * 16, 0.1, 0.0, 0, 0, 0, 2**30, 0.9, True
    )


def test_a_restart_drops_the_lines_of_the_lost_iterations(tmp_path: Path) -> None:
    log = opened(MetricsFile, tmp_path, 0)
    for iteration in (1, 2, 3, 4):
        log.step(entry(iteration))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"iteration": 5, "lm_lo')  # cut by a crash
    log = opened(MetricsFile, tmp_path, 2)
    log.step(entry(3))
    assert [line["iteration"] for line in read_entries(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_every_documented_key_is_written(tmp_path: Path) -> None:
    log = opened(MetricsFile, tmp_path, 0)
    log.step(entry(1))
    keys = """iteration consumed_samples lm_loss vm_loss loss grad_norm learning_rate num_tokens num_images
              sample_digest step_seconds data_seconds bad_samples skipped_samples
              ignored_samples peak_memory_bytes fill""".split()
    assert set(keys) <= json.loads((tmp_path / "metrics.jsonl").read_text()).keys()


def test_several_data_sets_are_written(tmp_path: Path) -> None:
    log = opened(MetricsFile, tmp_path, 0)
    own = {"a": DataSetLosses(3, 10, 0, 1.5, None), "b": DataSetLosses(1, 0, 2, math.nan, 0.5)}
    log.step(entry(1))
    log.step(replace(entry(2), datasets=own))
    first, second = read_entries(tmp_path / "metrics.jsonl")
    assert "datasets" not in first
    assert second["datasets"] == {
        "a": {"samples": 3, "labels": 10, "images": 0, "lm_loss": 1.5, "vm_loss": None},
        "b": {"samples": 1, "labels": 0, "images": 2, "lm_loss": None, "vm_loss": 0.5},
    }


def test_a_restart_drops_validations_of_lost_iterations(tmp_path: Path) -> None:
    log = opened(ValidationFile, tmp_path, 0)
    assert not (tmp_path / "validation.jsonl").exists()
    for iteration in (2, 4):
        log.validated(Validation(iteration, {"a": DataSetLosses(3, 10, 0, 1.5, None)}, 0.1), [])
    opened(ValidationFile, tmp_path, 3)
    (line,) = read_entries(tmp_path / "validation.jsonl")
    assert line["iteration"] == 2 and line["datasets"]["a"]["lm_loss"] == 1.5


def test_a_link_in_place_of_a_log_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    (tmp_path / "other").write_text("kept")
    (tmp_path / "metrics.partial").symlink_to("other")
    opened(MetricsFile, tmp_path, 3)
    assert (tmp_path / "other").read_text() == "kept"
    assert [line["iteration"] for line in read_entries(tmp_path / "metrics.jsonl")] == [1]


def test_grid_places_pictures_row_by_row() -> None:
    rows = [torch.full((3, 3, 4, 5), value) for value in (0.25, 0.75)]
    grid = picture_grid(rows, gap=1)
    assert grid.shape == (3, 2 * 5 + 1, 3 * 6 + 1)
    assert grid[0, 1, 1] == 0.25 and grid[0, 6, 1] == 0.75 and grid[0, 0, 0] == 1
    with pytest.raises(ValueError, match="differ in shape"):
        picture_grid([rows[0], rows[1][:2]])


def test_durations_read_like_a_clock() -> None:
    assert [duration(s) for s in (0, 61, 3725)] == ["0:00", "1:01", "1:02:05"]
