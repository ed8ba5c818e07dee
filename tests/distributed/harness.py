"""Runs a function on several ranks, each a process on this machine."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing

LIMIT_SECONDS = 120

multiprocessing.set_forkserver_preload(["tests.distributed.preload"])


def meeting_place() -> torch.distributed.TCPStore:
    """A store in this process for the ranks' rendezvous at its `port`, like torchrun's; it lives as long as the object.

    It opens its port at once, because another process could take a free port before rank 0 listens there.
    """
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def free_port() -> int:
    """A free port, for a rank 0 that holds the store itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(
    rank: int, function: Callable[..., None], world: int, port: int, errors: Any, arguments: tuple, held: bool = False
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE=str(held))
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException:
        errors.put((rank, traceback.format_exc()))
        raise


def run_ranks(function: Callable[..., None], world: int, *arguments: Any, limit_seconds: float = LIMIT_SECONDS) -> None:
    """Runs `function(*arguments)` on `world` ranks; fails the test with all tracebacks, or when ranks do not end."""
    context = multiprocessing.get_context("forkserver")
    errors, place = context.SimpleQueue(), meeting_place()
    processes = torch.multiprocessing.start_processes(
        _rank,
        args=(function, world, place.port, errors, arguments, True),
        nprocs=world,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + limit_seconds
    try:
        while not processes.join(timeout=0.2):
            if time.monotonic() > deadline:
                alive = [i for i, process in enumerate(processes.processes) if process.is_alive()]
                pytest.fail(f"ranks {alive} of {world} still run after {limit_seconds} s", pytrace=False)
    except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
        found = []
        while not errors.empty():
            found.append(errors.get())
        pytest.fail("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in found) or str(error), pytrace=False)
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()


def end_of_ranks(function: Callable[..., None], world: int, *arguments: Any, but: int | None = None) -> list[int]:
    """Exit statuses of all ranks, -9 for a killed one. Rank `but` is killed when the others have ended."""
    context = multiprocessing.get_context("forkserver")
    errors, port = context.SimpleQueue(), free_port()
    processes = [
        context.Process(target=_rank, args=(rank, function, world, port, errors, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + LIMIT_SECONDS
    try:
        for rank, process in enumerate(processes):
            if rank != but:
                process.join(max(0.0, deadline - time.monotonic()))
                assert process.exitcode is not None, f"rank {rank} of {world} still runs after {LIMIT_SECONDS} s"
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [process.exitcode for process in processes]
