"""examples/slurm/train.sbatch with stand-ins for Slurm's commands; everything else is real.

The stand-in for srun becomes torchrun, so its process is the step. scancel signals every process of the step, as Slurm
does. scontrol records its arguments. squeue reports that the job is running.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.conftest import base, shards, workplace  # noqa: F401

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "slurm" / "train.sbatch"
JOB = str(os.getpid())  # determines the port of the rendezvous
LIMIT_SECONDS = 240
STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do [[ $1 == *=* ]] || shift; shift; done; echo $$ > "$STEP"; exec "$@"\n',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"\n',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$ASKED"; fi\n',
    "squeue": 'echo "$STATE"\n',
    "scancel": f"""echo "$@" >> "$ASKED"; {sys.executable} - "$(cat "$STEP")" <<'END'
import signal, sys, psutil
step = psutil.Process(int(sys.argv[1]))
for process in (step, *step.children(recursive=True)):
    process.send_signal(signal.SIGTERM)
END
""",
}


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the script as Slurm would on one node of two GPUs."""
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "STEP": str(tmp_path / "step"),
        "ASKED": str(tmp_path / "asked"),
        "STATE": "RUNNING",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": JOB,
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "MAX_RESTARTS": "0",
    }

    def start(*arguments: object, restart: int = 0) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(SCRIPT), *map(str, arguments)],
            env={**environment, "SLURM_RESTART_COUNT": str(restart)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def asked(tmp_path: Path) -> list[str]:
    file = tmp_path / "asked"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.slow
def test_a_job_is_requeued_until_the_run_has_finished(
    job: Callable[..., subprocess.Popen[str]],
    base: Callable[[str], Path],  # noqa: F811
    shards: Callable[[str], Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """SIGTERM to the script after three steps, as before the time limit; then the job again, to its end; then a run
    that cannot start."""
    run = tmp_path / "run"
    flags = f"""--load {base("qwen2_siglip")} --data-path {shards("captions")} --save {run} --seq-length 256
        --global-batch-size 4 --micro-batch-size 2 --no-pack --num-workers 1 --train-iters 60
        --log-interval 1 --distributed-timeout-minutes 1""".split()
    metrics = run / "metrics.jsonl"
    first = job(*flags)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=LIMIT_SECONDS)[0]
    stopped = int((run / "latest_checkpointed_iteration.txt").read_text())
    assert first.returncode == 0 and 3 <= stopped < 60, said
    assert "stopped by SIGTERM after iteration" in said and f"stopped after iteration {stopped} of 60" in said
    assert asked(tmp_path) == [f"--signal=TERM {JOB}.0", f"requeue {JOB}"]

    second = job(*flags, restart=1)
    said = second.communicate(timeout=LIMIT_SECONDS)[0]
    assert second.returncode == 0, said
    assert f"continues from iteration {stopped} " in said and "train.sbatch: finished after iteration 60" in said
    assert len(asked(tmp_path)) == 2
    lines = [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()]
    assert lines == list(range(1, 61))

    broken = job(*flags[2:], "--load", tmp_path / "nowhere", "--save", tmp_path / "other")
    said = broken.communicate(timeout=LIMIT_SECONDS)[0]
    assert broken.returncode == 1 and "nothing new saved; not requeued" in said
    assert len(asked(tmp_path)) == 2


def test_a_job_that_cannot_be_continued_does_not_start(job: Callable[..., subprocess.Popen[str]]) -> None:
    started = job("--train-iters", "1")
    assert "--save is missing" in started.communicate()[0] and started.returncode == 2


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize("script", ["examples/slurm/train.sbatch", "examples/gpu_acceptance.sh"])
def test_scripts_have_no_findings(script: str) -> None:
    done = subprocess.run(["shellcheck", str(ROOT / script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
