"""The list of bad samples of a run, and how many it allows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ross_mcore.data.replacement import BadSample
from ross_mcore.engine.state import TrainState
from ross_mcore.guards.bad_samples import is_over_budget
from ross_mcore.reporting.quarantine import QuarantineFile


@pytest.mark.parametrize(
    ("bad", "consumed", "limit", "expected"),
    [
        (10, 20, 0.001, False),  # too few to judge
        (11, 20, 0.001, True),
        (11, 11_000, 0.001, False),  # exactly the limit
        (11, 10_999, 0.001, True),
        (12, 11_999, 0.001, True),
        (1000, 1000, 1.0, False),
        (0, 100, 0.0, False),
        (1, 10**9, 0.0, True),
    ],
)
def test_the_budget(bad: int, consumed: int, limit: float, expected: bool) -> None:
    assert is_over_budget(bad, consumed, limit) == expected


def opened(folder: Path, iteration: int) -> QuarantineFile:
    run: Any = SimpleNamespace(save_folder=folder)
    return QuarantineFile(run, TrainState(iteration))


def bad(iteration: int, reason: str = "the record is not JSON: UnicodeDecodeError") -> BadSample:
    return BadSample(iteration, 8 * iteration, "shard-00000.tar", f"k{iteration}", reason, "other")


def test_a_restart_drops_lines_of_lost_iterations_and_counts_the_rest(tmp_path: Path) -> None:
    log = opened(tmp_path, 0)
    assert log.summary() is None
    log.bad_samples([])
    assert not log.path.exists(), "a run without bad samples leaves no file"
    for iteration in (2, 3, 5):
        log.bad_samples([bad(iteration), bad(iteration, f"undecodable: {iteration}")])
    with log.path.open("a") as stream:
        stream.write('{"iteration": 5, "pos')  # cut by a crash
    log = opened(tmp_path, 3)
    log.bad_samples([bad(4, "undecodable: again")])
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 2, 3, 3, 4]
    assert list(lines[0]) == ["iteration", "position", "shard", "key", "reason", "replaced_by"]
    summary = log.summary()
    assert summary is not None and str(log.path) in summary
    assert "5 samples were replaced: 3 x undecodable, 2 x the record is not JSON;" in summary
