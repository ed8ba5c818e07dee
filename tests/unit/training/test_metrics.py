from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ross_mcore.training.metrics import MetricsLog, StepMetrics, duration, picture_grid, read_metrics


def entry(iteration: int) -> StepMetrics:
    return StepMetrics(iteration, 8 * iteration, 1.0, 0.5, 1.5, 2.0, 1e-3, 10, 2, "0" * 16, 0.1, 0.0, 0, 0, 0, True)


def test_a_restart_drops_the_lines_of_the_lost_iterations(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tmp_path / "board", 0)
    for iteration in (1, 2, 3, 4):
        log.write(entry(iteration))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"iteration": 5, "lm_lo')  # cut by a crash
    log = MetricsLog(tmp_path, tmp_path / "board", 2)
    log.write(entry(3))
    log.close()
    assert [line["iteration"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_every_promised_key_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tmp_path / "board", 0)
    log.write(entry(1))
    log.close()
    keys = """iteration consumed_samples lm_loss vm_loss loss grad_norm learning_rate num_tokens num_images
              sample_digest step_seconds data_seconds bad_samples skipped_samples
              ignored_samples""".split()
    assert set(keys) <= json.loads((tmp_path / "metrics.jsonl").read_text()).keys()


def test_grid_places_pictures_row_by_row() -> None:
    rows = [torch.full((3, 3, 4, 5), value) for value in (0.25, 0.75)]
    grid = picture_grid(rows, gap=1)
    assert grid.shape == (3, 2 * 5 + 1, 3 * 6 + 1)
    assert grid[0, 1, 1] == 0.25 and grid[0, 6, 1] == 0.75 and grid[0, 0, 0] == 1
    with pytest.raises(ValueError, match="differ in shape"):
        picture_grid([rows[0], rows[1][:2]])


def test_durations_read_like_a_clock() -> None:
    assert [duration(s) for s in (0, 61, 3725)] == ["0:00", "1:01", "1:02:05"]
