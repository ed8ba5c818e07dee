"""Kills one rank of a training with SIGKILL and measures the time until all processes have ended.

python -m examples.acceptance.killed RANKS LIMIT_SECONDS FLAGS   FLAGS are those of pretrain_ross.py
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil

from examples.acceptance.probe import note

STARTED = re.compile(r"iteration +3/")


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks of torchrun, which have no rank among their parents; without their data workers."""
    return psutil.Process(launcher.pid).children()


def lines_of(launcher: subprocess.Popen[str]) -> Iterator[str]:
    assert launcher.stdout is not None
    for line in launcher.stdout:
        print(line, end="", flush=True)
        yield line


def main() -> None:
    ranks, limit, *flags = sys.argv[1:]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    launcher = subprocess.Popen(
        [*command, "pretrain_ross.py", *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output = lines_of(launcher)
        if not any(STARTED.search(line) for line in output):
            raise SystemExit("the training ended before its third iteration")
        processes = psutil.Process(launcher.pid).children(recursive=True)
        victim = max(ranks_of(launcher), key=lambda process: process.pid)
        began = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        for _ in output:  # until all that hold its other end have ended
            pass
        status = launcher.wait(float(limit))
        _, alive = psutil.wait_procs(processes, timeout=max(0.0, float(limit) - (time.monotonic() - began)))
        seconds = time.monotonic() - began
    finally:
        for process in psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else []:
            process.kill()
        launcher.kill()
    note(f"a rank of {ranks} was killed: all processes had ended after {seconds:.1f} s, status {status}")
    if alive or not status or seconds > float(limit):
        raise SystemExit(f"{len(alive)} processes still run, status {status}, {seconds:.1f} s of {limit}")


if __name__ == "__main__":
    main()
