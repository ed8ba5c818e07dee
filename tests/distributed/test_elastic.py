"""torchrun restarts a run when a rank dies, and the run resumes from its newest checkpoint."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
LIMIT_SECONDS = 300


def test_a_rank_killed_under_torchrun_costs_one_restart(
    base: Callable[[str], Path], shards: Callable[[str], Path], tmp_path: Path
) -> None:
    """The process that the run names in its log is killed once, after the second iteration is saved."""
    run, log = tmp_path / "run", tmp_path / "log"
    flags = f"""--load {base("qwen2_siglip")} --data-path {shards("captions")} --save {run} --seq-length 256
        --global-batch-size 2 --micro-batch-size 1 --no-pack --num-workers 0 --train-iters 200
        --save-interval 1 --exit-interval 10 --keep-last 2 --log-interval 1 --distributed-timeout-minutes 0.5"""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    with log.open("w") as stream:
        torchrun = subprocess.Popen(
            [sys.executable, *launcher, str(REPOSITORY / "pretrain_ross.py"), *flags.split()],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_for(lambda: "saved iteration 2 " in log.read_text(), torchrun, log)
        found = re.search(r"process (\d+) on ", log.read_text())
        assert found is not None
        os.kill(int(found[1]), signal.SIGKILL)
        wait_for(lambda: torchrun.poll() is not None, None, log)
    finally:
        torchrun.terminate()
        torchrun.wait()
    text = log.read_text()
    assert torchrun.returncode == 0, text
    assert re.search(rf"rank \d \(process {found[1]} on .*\) sends no heartbeat: its process (is gone|has ended)", text)
    assert re.search(r"continues from iteration [2-9] ", text) and "stopped by --exit-interval 10" in text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 11))


def wait_for(condition: Callable[[], bool], running: subprocess.Popen[bytes] | None, log: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline and (running is None or running.poll() is None), log.read_text()
        time.sleep(0.1)
