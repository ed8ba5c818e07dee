"""Processes end with the program that started them, or when a command takes too long."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from examples.acceptance.parts import Machine, Part
from examples.acceptance.runner import CommandError, Runner


def test_a_command_that_takes_too_long_is_killed_with_all_it_started(tmp_path: Path) -> None:
    """A busy machine may need several seconds until the command has started its child."""
    child = 's.Popen(["sleep", "100"], start_new_session=True)'
    code = f"import subprocess as s; p = {child}; print(p.pid, flush=True); p.wait()"
    runner, said = Runner(tmp_path, Machine(False, 1), {}), ""
    runner.clear()
    for seconds in (1, 5, 25):
        with pytest.raises(CommandError, match=rf"slow\.log: took more than {seconds} s") as caught:
            runner.command(f"python -c '{code}'", "slow", Part("slow", "", limit_seconds=seconds))
        said = caught.value.last_lines.splitlines()[-1]
        if said.isdigit():
            break
    assert not psutil.pid_exists(int(said)) or psutil.Process(int(said)).status() == psutil.STATUS_ZOMBIE


def test_a_program_that_forgets_to_close_still_ends() -> None:
    """Workers ignore SIGTERM, which Python sends at exit, so without extra handling the exit would hang."""
    script = """
from ross_mcore.data.loader import StepLoader, StepPlan
from ross_mcore.data.order import SampleOrder
from ross_mcore.data.sample import skipped_sample

class Nothing:
    seq_length = 8

    def __len__(self):
        return 4

    def row_lengths(self, numbers):
        return numbers * 0 + 1

    def get(self, number, position):
        return skipped_sample("key", position, "nothing here")

loader = StepLoader(Nothing(), SampleOrder(4, 0), StepPlan(2, 1), num_workers=2)
assert len(next(loader).micro_batches) == 2
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=30).returncode == 0
