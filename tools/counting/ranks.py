"""Runs a function on several ranks of this machine, for counts and benchmarks."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch


def _rank(
    rank: int, world: int, port: int, threads: int, result: Connection, function: Callable[..., Any], given: tuple
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(threads)
    try:
        result.send((function(*given), None))
    except BaseException:
        result.send((None, traceback.format_exc()))


def on_ranks(
    function: Callable[..., Any], world: int, *arguments: Any, threads: int = 1, limit_seconds: float = 600
) -> list[Any]:
    """`function(*arguments)` in `world` new processes, each a rank of `threads` threads -> their results, by rank.

    The environment is torchrun's, so `platform.initialize_process_group` works. The function is importable and its
    result can be pickled. Raises RuntimeError with the traceback of the first rank that failed, and TimeoutError; both
    end all ranks.
    """
    context = multiprocessing.get_context("spawn")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results: dict[Connection, int] = {}
    processes = []
    for rank in range(world):
        mine, theirs = context.Pipe(duplex=False)
        given = (rank, world, store.port, threads, theirs, function, arguments)
        processes.append(context.Process(target=_rank, args=given, daemon=True))
        processes[-1].start()
        theirs.close()
        results[mine] = rank
    found: list[Any] = [None] * world
    deadline = time.monotonic() + limit_seconds
    try:
        while results:
            ready = wait(list(results), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(results.values())} of {world} still run after {limit_seconds:g} s")
            for end in ready:
                rank = results.pop(end)
                try:
                    found[rank], failure = end.recv()
                except EOFError:
                    raise RuntimeError(f"rank {rank} of {world} ended without a result") from None
                if failure:
                    raise RuntimeError(f"rank {rank} of {world}:\n{failure}")
        for process in processes:
            process.join(10)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return found
