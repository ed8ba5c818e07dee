"""Data workers: how they die, and what they need of shared memory."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ross_mcore.data import workers
from ross_mcore.data.loader import Step, StepLoader, StepPlan
from ross_mcore.data.order import SampleOrder
from ross_mcore.data.sample import skipped_sample
from ross_mcore.data.workers import (
    Interrupted,
    Stream,
    ahead_of_a_step,
    cause_of_death,
    largest_batch_bytes,
    prefetched_bytes,
    require_shared_memory,
)
from ross_mcore.errors import WorkerError
from ross_mcore.parallel.layout import DataShare
from tests.unit.data.loading import open_loader


class Samples:
    """Eight empty samples; reading number 5 calls `fault` in the worker."""

    seq_length = 8

    def __init__(self, fault: Callable[[], object]) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 8

    def row_lengths(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers * 0 + 1

    def get(self, number: int, position: int) -> object:
        if number == 5:
            self.fault()
        return skipped_sample("key", position, "nothing here")


def test_a_step_is_read_while_the_one_before_it_is_computed() -> None:
    """Of a slow data set: every micro-batch of the next step waits in the queue before it is asked for."""
    samples = Samples(lambda: time.sleep(0.05))
    with StepLoader(samples, SampleOrder(8, 0), StepPlan(12, 1), num_workers=2) as loader:  # type: ignore[arg-type]
        loader.ahead = ahead_of_a_step(loader.num_microbatches, 2, batch_bytes=1)
        for _ in range(2):
            next(loader)
            deadline = time.monotonic() + 20  # only a failure takes that long
            while ready(loader) < 12 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert ready(loader) == 12


def ready(loader: StepLoader) -> int:
    """Micro-batches that wait to be taken: in the queue of torch's iterator, or taken from it before their turn."""
    assert isinstance(loader._stream, Stream)
    stream = loader._stream._stream
    return stream._worker_result_queue.qsize() + sum(len(task) > 1 for task in stream._task_info.values())


@pytest.mark.parametrize(
    ("micro_batches", "num_workers", "batch_bytes", "ahead"),
    [
        (32, 4, 1 << 10, 8),
        (33, 4, 1 << 10, 9),
        (4, 4, 1 << 10, 2),
        (32, 0, 1 << 10, 2),
        (32, 4, 1 << 15, 4),  # 16 of 32 KiB are half of 1 MiB
        (32, 4, 1 << 20, 2),
    ],
)
def test_workers_read_a_step_ahead_where_memory_allows(
    monkeypatch: pytest.MonkeyPatch, micro_batches: int, num_workers: int, batch_bytes: int, ahead: int
) -> None:
    found = SimpleNamespace(f_blocks=256, f_bavail=256, f_frsize=4096)
    monkeypatch.setattr(workers.os, "statvfs", lambda _: found)
    assert ahead_of_a_step(micro_batches, num_workers, batch_bytes) == ahead


def until_failure(fault: Callable[[], object], interrupted: Callable[[], bool] = lambda: False) -> Iterator[Step]:
    order = SampleOrder(8, 0, shuffle=False)
    with StepLoader(Samples(fault), order, StepPlan(2, 1), num_workers=2, is_interrupted=interrupted) as loader:
        for step in loader:
            yield step
            if step.failure is not None:
                return


def die(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def run_out_of_memory() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (die(signal.SIGKILL), r"a data worker \(process \d+\) was killed by SIGKILL: usually no memory was left"),
        (die(signal.SIGBUS), r"killed by SIGBUS: usually /dev/shm is full: .*--shm-size.*--num-workers 0"),
        (run_out_of_memory, r"no memory was left while reading \(process \d+\): use fewer --num-workers"),
        (lambda: os._exit(3), "ended with exit status 3: a library in it ended the process"),
        pytest.param(lambda: os._exit(0), "ended with exit status 0", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_dies_is_an_error_with_its_cause(fault: Callable[[], object], message: str) -> None:
    *good, last = until_failure(fault)
    assert len(good) <= 2 and all(step.failure is None for step in good)
    assert isinstance(last.failure, WorkerError)
    with pytest.raises(WorkerError, match=message):
        raise last.failure


def test_a_killed_worker_leaves_nothing_in_shared_memory() -> None:
    def die_while_sharing() -> None:
        Path(workers.SHARED_MEMORY, f"torch_{os.getpid()}_left_over").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    *_, last = until_failure(die_while_sharing)
    assert isinstance(last.failure, WorkerError)
    assert not list(Path(workers.SHARED_MEMORY).glob("torch_*_left_over"))


def test_every_signal_has_a_text() -> None:
    assert "killed by SIGSEGV: a library crashed" in cause_of_death(7, -signal.SIGSEGV)
    assert cause_of_death(7, -signal.SIGABRT).endswith("(process 7) was killed by SIGABRT; use --num-workers 0")
    assert "killed by signal 35;" in cause_of_death(7, -35)


def test_an_exception_of_a_worker_reaches_the_loader() -> None:
    def fail() -> None:
        raise ZeroDivisionError("in a worker")

    *_, last = until_failure(fail)
    assert isinstance(last.failure, ZeroDivisionError) and "in a worker" in str(last.failure)


def test_a_worker_without_shared_memory_sends_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own attempt comes later, in a thread, and loses the batch."""

    def full(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    (last,) = until_failure(lambda: None)
    message = str(last.failure)
    assert isinstance(last.failure, WorkerError) and "(No space left on device (28))" in message
    assert "--shm-size" in message and "--ipc=host" in message and "--num-workers 0" in message


def test_a_wait_for_data_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a request to stop that comes while a worker is blocked, which closing does not wait for."""
    monkeypatch.setattr(workers, "END_SECONDS", 0.2)
    asked: list[bool] = []

    def polled() -> bool:
        asked.append(True)
        return len(asked) > 6

    *_, last = until_failure(lambda: signal.pause(), polled)
    assert isinstance(last.failure, Interrupted)


def test_a_rank_that_reads_nothing_is_interrupted_too() -> None:
    share = DataShare(reads=False)
    order = SampleOrder(8, 0, shuffle=False)
    with StepLoader(Samples(int), order, StepPlan(2, 1), share, is_interrupted=lambda: True) as loader:
        assert isinstance(next(loader).failure, Interrupted)


@pytest.mark.parametrize(
    ("blocks", "free", "needed", "is_enough"),
    [(64, 64, 1 << 17, True), (64, 32, 1 << 20, False), (0, 0, 1 << 40, True), (64, 0, 0, True)],
)
def test_free_shared_memory_is_compared_with_what_workers_hold(
    monkeypatch: pytest.MonkeyPatch, blocks: int, free: int, needed: int, is_enough: bool
) -> None:
    """In blocks of 4 KiB; a file system without a limit has no blocks."""
    found = SimpleNamespace(f_blocks=blocks, f_bavail=free, f_frsize=4096)
    monkeypatch.setattr(workers.os, "statvfs", lambda _: found)
    if is_enough:
        require_shared_memory(needed, 2)
        return
    said = r"has 128 KiB free, .* of 2 rank\(s\) need up to 1.0 MiB there: .*--shm-size"
    with pytest.raises(WorkerError, match=said):
        require_shared_memory(needed, 2)


def test_the_bound_covers_what_workers_send(open_dataset: Callable[..., object]) -> None:
    dataset = open_dataset()
    sent = []
    with open_loader(dataset, SampleOrder(len(dataset), 5), global_batch_size=4, micro_batch_size=2) as loader:
        for _ in range(4):
            sent += [read.tensors for read in loader._read()]
    largest = max(sum(tensor.nbytes for tensor in tensors) for tensors in sent)
    assert largest <= largest_batch_bytes([dataset], 2, False, 1) <= 40 * largest
    assert prefetched_bytes(10, 0) == 0 and prefetched_bytes(10, 3) == 70
