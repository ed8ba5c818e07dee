"""examples/gpu_acceptance.sh in its CPU form, shortened: real trainings at several layouts, and the report."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "gpu_acceptance.sh"
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_pass_and_are_reported(tmp_path: Path) -> None:
    command = [
        str(SCRIPT),
        "--cpu",
        "--ranks",
        "2",
        "--parts",
        "links,infinity,layouts,resume,engines,fp8",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + page
    states = dict(re.findall(r"^\| (\w+) \| \*\*(\w+)\*\* \|", page, re.MULTILINE))
    assert states == {
        **dict.fromkeys(("environment", "prepare", "links", "infinity", "layouts", "resume"), "PASS"),
        **dict.fromkeys(("engines", "fp8"), "SKIP"),
    }
    far = re.findall(r"^\| ([^|]+) \| \*\*PASS\*\* \| (\d\.\de-\d\d) \|", page, re.MULTILINE)
    assert len(far) == 5 and all(0 < float(difference) <= 1e-5 for _, difference in far), far
    assert "- all-reduce of 16 MiB over 2 ranks: " in page and ": not applied; weights are not finite from" in page
    assert "## Speed and memory" in page and "needs 4 ranks, there are 2" in page and "make test-te" in page
    assert (tmp_path / "lm_loss.svg").exists() and (tmp_path / "vm_loss.svg").exists()


def test_ctrl_c_leaves_the_report_so_far(tmp_path: Path) -> None:
    command = [str(SCRIPT), "--cpu", "--out", str(tmp_path)]
    # a shell without job control starts background processes with SIGINT ignored
    restored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, **restored)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "logs" / "environment.log").exists():  # its first command runs
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        started.send_signal(signal.SIGINT)
        output = started.communicate(timeout=60)[0]
    finally:
        started.kill()
    assert started.returncode == 130, output
    assert "**Not complete**: it was interrupted." in (tmp_path / "report.md").read_text()


def test_parts_that_do_not_exist_are_named() -> None:
    done = subprocess.run([SCRIPT, "--parts", "speed"], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 2 and "--parts speed: the parts are environment, prepare, links" in done.stderr
