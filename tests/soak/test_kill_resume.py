"""Two trials of kill_resume.py, and a comparison that must find differences."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.kill.compare import compare
from tests.soak.kill.trial import Soak
from tests.soak.kill_resume import describe

pytestmark = pytest.mark.slow

SEED = 1


def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    soak, rows = Soak(tmp_path, SEED), ("one process", "dp2 distributed overlap")
    for number, row in enumerate(rows):
        trial = soak.run(number, row)
        assert not trial.problems, describe(trial, SEED)
        assert trial.places and trial.weights == 0.0

    # two rows differ in all files, and every difference must be found
    found = compare(*(soak.uninterrupted(row).folder for row in rows))
    assert found.weights > 0
    for sign in ("tensors differ", "train_state.json", "metrics.jsonl differs", "quarantine.jsonl differs"):
        assert any(sign in problem for problem in found.problems), (sign, found.problems)
