"""One life of a run: its ranks start, train, and finish or are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.distributed.harness import free_port
from tests.soak.kill.places import Errand, Watch, last_place

GRACE_SECONDS = 3.0
"""Time of the surviving ranks after SIGTERM; torchrun gives 30 seconds."""
LIMIT_SECONDS = 180.0
"""A longer life is a hang; an idle machine needs about two seconds."""


@dataclass(frozen=True)
class Kill:
    """A planned kill: of `rank` on its errand or, without one, `after` seconds; with `everyone`, of all ranks."""

    rank: int
    everyone: bool
    errand: Errand | None = None
    after: float = 0.0


@dataclass(frozen=True)
class Life:
    """The outcome of a life. `place`: the last place of the killed rank, None without a kill; `problem`: a rank that
    hung, or failed although none was killed."""

    place: str | None
    finished: bool
    seconds: float
    problem: str | None = None


def _rank(
    rank: int, world: int, port: int, flags: dict[str, Any], folder: Path, errand: Errand | None, driver: Connection
) -> None:
    """Runs a rank; its output goes to `folder/rank<n>.log`."""
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    from ross_mcore.commands.train import train_status
    from ross_mcore.config import Config

    torch.set_num_threads(1)
    watch = Watch(Path(flags["save"]), folder / f"rank{rank}.place", errand, driver)
    try:
        watch.begin()
        status = train_status(Config.from_flat(**flags))
    except BaseException:
        traceback.print_exc()
        status = 1
    watch.report()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without waiting for gloo's threads


def live(flags: dict[str, Any], world: int, folder: Path, kill: Kill | None) -> Life:
    """Starts all ranks, kills as planned in `kill`, and returns when all have ended."""
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    port, began = free_port(), time.monotonic()
    ranks: list[BaseProcess] = []
    receiver, sender = context.Pipe(duplex=False)
    for rank in range(world):
        errand = kill.errand if kill is not None and rank == kill.rank else None
        arguments = (rank, world, port, flags, folder, errand, sender)
        ranks.append(context.Process(target=_rank, args=arguments))
        ranks[-1].start()
    sender.close()
    try:
        killed = _watch_over(ranks, kill, receiver)
    except TimeoutError:
        alive = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for process in ranks:
            process.kill()
        return Life(None, False, time.monotonic() - began, f"ranks {alive} still ran after {LIMIT_SECONDS:.0f} s")
    seconds, codes = time.monotonic() - began, [process.exitcode for process in ranks]
    if killed:
        assert kill is not None
        return Life(last_place(folder / f"rank{kill.rank}.place"), not any(codes), seconds)
    return Life(None, True, seconds, f"ranks ended with {codes}, and none was killed" if any(codes) else None)


def _watch_over(ranks: list[BaseProcess], kill: Kill | None, receiver: Connection) -> bool:
    """Whether the kill happened; returns when all ranks have ended. Raises TimeoutError."""
    began = time.monotonic()
    limit, killed = began + LIMIT_SECONDS, False

    def died() -> bool:
        return kill is not None and ranks[kill.rank].exitcode == -signal.SIGKILL

    due = began + kill.after if kill is not None and kill.errand is None else None
    last = limit  # when the surviving ranks are killed too
    while alive := [process for process in ranks if process.is_alive()]:
        now = time.monotonic()
        if now > limit:
            raise TimeoutError
        if kill is not None and due is not None and now >= due:
            ranks[kill.rank].kill()
            due = None
        if now > last:
            for process in alive:
                process.kill()
        waited_for: list[Any] = [process.sentinel for process in alive]
        if kill is not None and kill.errand is not None and due is None and not killed:
            waited_for.append(receiver)
        ready = wait(waited_for, max(0.0, min(due or limit, last) - time.monotonic()))
        if receiver in ready:
            due = _time_of_death(receiver, kill)
        if kill is not None and not killed and died():
            killed = True
            for process in ranks:
                process.kill() if kill.everyone else process.terminate()
            last = time.monotonic() + GRACE_SECONDS
    return killed or died()  # a death that the loop's head saw first


def _time_of_death(receiver: Connection, kill: Kill | None) -> float:
    """Time at which to kill a rank that has arrived at its place."""
    assert kill is not None and kill.errand is not None
    try:
        receiver.recv_bytes()
    except EOFError:  # all ranks have ended
        return float("inf")
    return time.monotonic() + (kill.errand.delay or 0.0)
