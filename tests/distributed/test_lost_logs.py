"""A run whose logs cannot be written continues, with the same result."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ross_mcore.checkpoint.folder import find_checkpoint
from tests.distributed.cases import Case, layout
from tests.distributed.conftest import Finished


def train_without_logs(flags: dict[str, Any], _: int | None) -> None:
    """In iteration 2, the disk is full for metrics.jsonl and validation.jsonl, and TensorBoard's folder is gone."""
    from ross_mcore.commands.train import train_status
    from ross_mcore.config import Config
    from ross_mcore.reporting.files import MetricsFile
    from ross_mcore.reporting.metrics import StepMetrics

    folder, write = Path(flags["save"]), MetricsFile.step
    logs = [folder / "metrics.jsonl", folder / "validation.jsonl"]

    def write_into_the_void(log: MetricsFile, metrics: StepMetrics) -> None:
        if metrics.iteration == 2:
            shutil.rmtree(folder / "tensorboard")
            for path in logs:
                path.rename(path.with_suffix(".kept"))
                path.symlink_to("/dev/full")
        if metrics.iteration == 3:
            for path in logs:
                path.with_suffix(".kept").rename(path)
        write(log, metrics)

    MetricsFile.step = write_into_the_void
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            status = train_status(Config.from_flat(**flags))
    finally:
        MetricsFile.step = write
    if status:
        raise SystemExit(status)
    warnings = [line for line in output.getvalue().splitlines() if line.startswith("warning: ")]
    if os.environ["RANK"] == "1":  # the logging rank
        assert len(warnings) == 3, output.getvalue()
        for line, path in zip(warnings, (logs[0], folder / "tensorboard", logs[1])):
            assert line.startswith(f"warning: {path}") and "; training continues without it until it can be" in line


def test_a_run_ends_the_same_when_its_logs_cannot_be_written(
    start: Callable[..., Finished], shards: Callable[[str], Path], reference: Callable[[Case], Finished]
) -> None:
    case = Case("", 2, layout(1, 2))
    held_out = {"valid_data_path": str(shards("mixed")), "valid_interval": 1, "log_interval": 1}
    run = start(case, "lost logs", rank=train_without_logs, **held_out)
    assert [entry["iteration"] for entry in run.metrics] == [1, 3]
    last, expected = run.metrics[-1], reference(case).metrics[-1]
    assert last["loss"] == pytest.approx(expected["loss"], rel=case.relative)
    assert (run.folder / "validation.jsonl").read_bytes().count(b"\n") == 2
    saved = find_checkpoint(run.folder)
    assert saved is not None and saved.iteration == 3
