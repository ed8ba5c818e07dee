"""Worker processes of the loader: what they need of this machine, how they start and end, and why one died."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from torch import Tensor
from torch._C import _remove_worker_pids, _set_worker_pids
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ross_mcore.data.sample import ShardDataset
from ross_mcore.errors import WorkerError

T = TypeVar("T")

LEAST_AHEAD = 2
"""Micro-batches that every worker reads ahead at least."""
SHARED_MEMORY = "/dev/shm"
POLL_SECONDS = 1.0
"""How often a process that waits for its workers looks whether one died, or whether it is asked to stop."""
END_SECONDS = 5.0
_TIMED_OUT = "DataLoader timed out"
_PR_SET_PDEATHSIG = 1

MORE_SHARED_MEMORY = (
    "give the container or machine more shared memory (docker run --shm-size=8g, or --ipc=host; Kubernetes: an "
    "emptyDir with medium: Memory at /dev/shm)"
)
REMEDY = f"{MORE_SHARED_MEMORY}, or read without worker processes: --num-workers 0"
MEMORY_REMEDY = "use fewer --num-workers, or give the job more memory"
CAUSES = {
    signal.SIGBUS: f"usually {SHARED_MEMORY} is full: {REMEDY}",
    signal.SIGKILL: f"usually no memory was left (see dmesg, or the limit of the container or job): {MEMORY_REMEDY}",
    signal.SIGSEGV: "a library crashed, perhaps on a damaged picture: --num-workers 0 reads in the training process "
    "and shows where",
}


def largest_batch_bytes(parts: Sequence[ShardDataset], rows: int, packed: bool, tensor_parallel: int) -> int:
    """Upper bound of the bytes of a micro-batch of `rows` rows as a worker sends it; from the index."""
    return max(_largest_batch_bytes(part, rows, packed, tensor_parallel) for part in parts)


def _largest_batch_bytes(part: ShardDataset, rows: int, packed: bool, tensor_parallel: int) -> int:
    in_a_row = part.seq_length // part.image_tokens
    shown = np.minimum(part.reader.samples["image_spans"].astype(np.int64), in_a_row)
    if not shown.any():
        pictures = 0
    elif packed:
        pictures = rows * in_a_row
    else:
        pictures = int(np.sort(shown)[-rows:].sum())
    tokens_and_labels = 2 * np.dtype(np.int64).itemsize * rows * part.seq_length
    return tokens_and_labels + math.ceil(pictures / tensor_parallel) * part.picture_bytes


def prefetched_bytes(batch_bytes: int, num_workers: int) -> int:
    """Shared memory that a loader's workers need: for what they read ahead at least, and the one being copied."""
    return (num_workers * LEAST_AHEAD + 1) * batch_bytes if num_workers else 0


def ahead_of_a_step(micro_batches: int, num_workers: int, batch_bytes: int) -> int:
    """Micro-batches that every worker reads ahead so that a whole step is read while the one before it is computed.

    Fewer where they would fill more than half of the free shared memory. batch_bytes: largest micro-batches of all
    ranks of this machine together.
    """
    wanted = max(LEAST_AHEAD, math.ceil(micro_batches / num_workers)) if num_workers else LEAST_AHEAD
    if wanted == LEAST_AHEAD or not batch_bytes:
        return wanted
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return LEAST_AHEAD
    free_bytes = found.f_bavail * found.f_frsize
    fitting = free_bytes // 2 // (num_workers * batch_bytes) if found.f_blocks else wanted
    return max(LEAST_AHEAD, min(wanted, fitting))


def require_shared_memory(needed_bytes: int, ranks: int) -> None:
    """Raises WorkerError when this machine's shared memory has no room for what the workers of its ranks hold."""
    if not needed_bytes:
        return
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        raise WorkerError(
            f"{SHARED_MEMORY} cannot be used ({error.strerror}), through which worker processes send data: {REMEDY}"
        ) from None
    free_bytes = found.f_bavail * found.f_frsize
    if found.f_blocks and free_bytes < needed_bytes:  # 0 blocks: a file system without a limit
        raise WorkerError(
            f"{SHARED_MEMORY} has {_size(free_bytes)} free, and the batches of the worker processes of {ranks} rank(s) "
            f"need up to {_size(needed_bytes)} there: {REMEDY}; fewer workers (--num-workers) and a smaller "
            "--micro-batch-size need less"
        )


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def shared(tensors: Iterable[Tensor]) -> None:
    """Moves tensors to shared memory. Raises WorkerError when it has no room.

    torch would do this later, in a thread of the worker, whose error loses the batch: the loader would wait for ever.
    """
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        reason = str(error).partition(">: ")[2] or str(error)
        raise WorkerError(
            f"a data worker (process {os.getpid()}) cannot put a batch into {SHARED_MEMORY} ({reason}): {REMEDY}"
        ) from None


class Stream(Iterator[T]):
    """The results of worker processes, in order.

    is_interrupted: polled while waiting; when true, `next` raises Interrupted.
    """

    def __init__(
        self,
        source: Dataset[T],
        requests: Iterable[Any],
        num_workers: int,
        is_interrupted: Callable[[], bool],
        ahead: int = LEAST_AHEAD,
    ) -> None:
        """`ahead`: requests that every worker is given in advance. Raises WorkerError when none can be started."""
        self._is_interrupted = is_interrupted
        loader = DataLoader(
            source,
            batch_size=None,
            sampler=requests,
            num_workers=num_workers,
            prefetch_factor=ahead,
            timeout=POLL_SECONDS,
            worker_init_fn=_begin_worker,
            multiprocessing_context="fork",  # a spawned worker would import torch and the tokenizer again
        )
        try:
            stream = iter(loader)
        except OSError as error:
            remedy = f"{SHARED_MEMORY} is full: {REMEDY}" if error.errno == errno.ENOSPC else "use fewer --num-workers"
            raise WorkerError(f"data workers cannot be started ({error.strerror or error}): {remedy}") from None
        assert isinstance(stream, _MultiProcessingDataLoaderIter)
        self._stream = stream
        self._ignore_deaths()

    def __next__(self) -> T:
        """Raises WorkerError when a worker died, Interrupted, and what the source raised."""
        while True:
            try:
                _set_worker_pids(id(self._stream), tuple(worker.pid or 0 for worker in self._stream._workers))
                if (reason := self._death()) is not None:
                    raise WorkerError(reason)
                found: T = next(self._stream)
                return found
            except (RuntimeError, OSError, EOFError) as error:
                if not isinstance(error, RuntimeError):  # a worker dies while it sends
                    multiprocessing.connection.wait([w.sentinel for w in self._stream._workers], POLL_SECONDS)
                if (reason := self._death()) is not None:
                    raise WorkerError(reason) from None
                if not str(error).startswith(_TIMED_OUT):
                    raise
            finally:
                self._ignore_deaths()
            if self._is_interrupted():
                raise Interrupted

    def _ignore_deaths(self) -> None:
        """Until the next wait: torch's handler of SIGCHLD raises wherever the program is, also in a training step.

        While waiting it is needed, because a worker may die in the middle of a message.
        """
        with contextlib.suppress(ValueError):  # they are ignored
            _remove_worker_pids(id(self._stream))
        self._stream._worker_pids_set = False

    def _death(self) -> str | None:
        """Why a worker died, None if all are alive."""
        for worker in self._stream._workers:
            if (status := worker.exitcode) is not None:
                return cause_of_death(worker.pid or 0, status)
        return None

    def close(self) -> None:
        """Ends the workers, and kills those that are still busy after END_SECONDS.

        torch's own way waits five seconds for each of them, and for ever for a lock that a killed worker held.
        """
        stream = self._stream
        if stream._shutdown:
            return
        stream._shutdown = True
        self._ignore_deaths()
        if self._death() is None:
            stream._workers_done_event.set()
            for queue in stream._index_queues:
                queue.put(None)
            self._join()
        for worker in stream._workers:
            worker.kill()
        self._join()
        for worker in stream._workers:  # of a worker that died while it shared a batch
            for left_over in Path(SHARED_MEMORY).glob(f"torch_{worker.pid}_*"):
                left_over.unlink(missing_ok=True)
        for queue in (*stream._index_queues, stream._worker_result_queue):
            queue.cancel_join_thread()
            queue.close()

    def _join(self) -> None:
        """Waits for the workers to end."""
        deadline = time.monotonic() + END_SECONDS
        for worker in self._stream._workers:
            worker.join(max(0.0, deadline - time.monotonic()))


class Interrupted(Exception):
    """The process is asked to stop, and does not wait for data."""


def cause_of_death(process: int, status: int) -> str:
    """What to tell of a worker that ended with an exit status, negative for a signal."""
    worker = f"a data worker (process {process})"
    if status >= 0:
        return (
            f"{worker} ended with exit status {status}: a library in it ended the process; --num-workers 0 shows where"
        )
    try:
        name, cause = signal.Signals(-status).name, CAUSES.get(signal.Signals(-status))
    except ValueError:
        name, cause = f"signal {-status}", None
    return f"{worker} was killed by {name}" + (f": {cause}" if cause else "; use --num-workers 0")


def _end_worker(*_: object) -> NoReturn:
    os._exit(0)


def _begin_worker(_: int) -> None:
    """A worker ends with its process, which needs it after SIGINT or SIGTERM to finish a step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, _end_worker)  # not SIGKILL, which would leave a file in shared memory
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere torch's worker looks every few seconds
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR2)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(0)  # it ended before
