"""Runs that must end: full shared memory, dead workers, signals at any time, launchers that are not torchrun."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import get_worker_info

from ross_mcore.checkpoint.folder import find_checkpoint
from tests.cases.case import Place, command_of_rank
from tests.cases.test_learning import training
from tests.distributed.harness import end_of_ranks, free_port

NOT_ALLOWED = 77
NEW_USER_AND_MOUNTS = 0x10000000 | 0x20000


def output_of(place: Place, rank: int) -> str:
    return (place.folder / f"output.{rank}").read_text()


def train_with(change: Callable[[int], None], arguments: Sequence[object], folder: Path) -> None:
    """Runs `ross train` on a rank after `change(rank)`."""
    change(int(os.environ["RANK"]))
    command_of_rank(["train", *map(str, arguments)], folder)


def shrink_shared_memory(_: int) -> None:
    """Mounts 256 KiB over /dev/shm, for this process and its workers alone."""
    libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
    if libc.unshare(NEW_USER_AND_MOUNTS):
        os._exit(NOT_ALLOWED)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, b"size=256k"):
        os._exit(NOT_ALLOWED)


def shrink_shared_memory_unchecked(rank: int) -> None:
    from ross_mcore.training import opening

    shrink_shared_memory(rank)
    opening.require_shared_memory = lambda *_: None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (shrink_shared_memory, "/dev/shm has 256 KiB free, and the batches of the worker processes of 2 rank(s) need"),
        (shrink_shared_memory_unchecked, "cannot put a batch into /dev/shm"),
    ],
)
def test_shared_memory_that_is_too_small_ends_the_run_with_advice(
    place: Place, change: Callable[[int], None], says: str
) -> None:
    """PyTorch#1355: Docker gives 64 MiB. Refused at start, or by the first batch that does not fit."""
    flags = ["--no-pack", "--micro-batch-size", 16, "--global-batch-size", 64, "--num-workers", 2]
    statuses = end_of_ranks(train_with, 2, change, [*training(place), *flags], place.folder)
    if NOT_ALLOWED in statuses:
        pytest.skip("needs a mount namespace of its own")
    assert statuses == [2, 2]
    output = output_of(place, 0)
    assert says in output and "--shm-size" in output and "--num-workers 0" in output
    assert "Traceback" not in output + output_of(place, 1)


def kill_a_worker_of_rank_1(rank: int) -> None:
    from ross_mcore.data.sample import ShardDataset

    get = ShardDataset.get

    def dies(dataset: ShardDataset, number: int, position: int) -> Any:
        if rank == 1 and position == 5 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return get(dataset, number, position)

    ShardDataset.get = dies


def test_a_killed_worker_ends_all_ranks_with_the_reason(place: Place) -> None:
    flags = ["--num-workers", 1, "--train-iters", 50, "--tensor-model-parallel-size", 2]
    statuses = end_of_ranks(train_with, 2, kill_a_worker_of_rank_1, [*training(place), *flags], place.folder)
    assert statuses == [2, 2]
    assert "was killed by SIGKILL: usually no memory was left" in output_of(place, 0)
    assert "Traceback" not in output_of(place, 0) + output_of(place, 1)


def signal_rank_1_in_validation(rank: int) -> None:
    """At the second batch of the validation after the second step."""
    from ross_mcore.data.loader import StepLoader

    read, batches = StepLoader.__next__, []

    def signals(loader: StepLoader) -> Any:
        if loader.plan.end is not None:
            batches.append(loader)
        if rank == 1 and len(batches) == 2 + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(loader)

    StepLoader.__next__ = signals


def lines_of(folder: Path, name: str) -> list[int]:
    return [json.loads(line)["iteration"] for line in (folder / name).read_text().splitlines()]


def test_a_signal_during_validation_saves_without_another_step(place: Place) -> None:
    """The resumed run does the rest of the validation, and no batch twice."""
    run = place.folder / "run"
    flags = training(place)
    flags = [*flags, "--valid-data-path", place.folder / "shards", "--valid-interval", 1, "--train-iters", 3]
    flags += ["--no-pack", "--micro-batch-size", 1, "--global-batch-size", 2, "--tensor-model-parallel-size", 2]
    statuses = end_of_ranks(train_with, 2, signal_rank_1_in_validation, flags, place.folder)
    assert statuses == [0, 0], output_of(place, 0) + output_of(place, 1)
    assert lines_of(run, "metrics.jsonl") == [1, 2] and lines_of(run, "validation.jsonl") == [1]
    found = find_checkpoint(run)
    assert found is not None and found.iteration == 2
    assert "after iteration 2; the same command continues" in output_of(place, 0) + output_of(place, 1)
    assert end_of_ranks(train_with, 2, int, flags, place.folder) == [0, 0]
    assert lines_of(run, "metrics.jsonl") == lines_of(run, "validation.jsonl") == [1, 2, 3]


def die_in_validation(_: int) -> None:
    from ross_mcore.training import evaluation

    evaluation.validate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def test_a_step_is_saved_before_its_evaluation(place: Place) -> None:
    """So a run that is killed while it validates has the step, and the next start does the validation."""
    run = place.folder / "run"
    flags = [*training(place), "--valid-data-path", place.folder / "shards", "--valid-interval", 1]
    flags += ["--train-iters", 2, "--save-interval", 1, "--no-async-save"]
    assert end_of_ranks(train_with, 1, die_in_validation, flags, place.folder) == [-signal.SIGKILL]
    found = find_checkpoint(run)
    assert found is not None and found.iteration == 1
    assert end_of_ranks(train_with, 1, int, flags, place.folder) == [0]
    assert lines_of(run, "metrics.jsonl") == lines_of(run, "validation.jsonl") == [1, 2]


def signal_in_reconstruction(folder: Path, _: int) -> None:
    """In the second batch; every batch leaves a file."""
    from ross_mcore.models.ross import RossModel

    reconstruct, batches = RossModel.reconstruct, []

    def signals(model: RossModel, *arguments: Any) -> Any:
        batches.append(model)
        (folder / f"batch.{len(batches)}").touch()
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return reconstruct(model, *arguments)

    RossModel.reconstruct = signals


def test_a_signal_during_reconstructions_begins_no_other_batch(place: Place) -> None:
    change = partial(signal_in_reconstruction, place.folder)
    flags = [*training(place), "--eval-interval", 1, "--eval-images", 4, "--train-iters", 3]
    assert end_of_ranks(train_with, 1, change, flags, place.folder) == [0], output_of(place, 0)
    assert sorted(path.name for path in place.folder.glob("batch.*")) == ["batch.1", "batch.2"]
    assert lines_of(place.folder / "run", "metrics.jsonl") == [1] and find_checkpoint(place.folder / "run")
    assert "stopped by SIGTERM after iteration 1" in output_of(place, 0)


def signal_while_reading(rank: int) -> None:
    """The first sample takes for ever, and SIGTERM comes meanwhile."""
    from ross_mcore.data.sample import ShardDataset

    def waits(*_: Any) -> Any:
        if get_worker_info() is not None:
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(1000)

    ShardDataset.get = waits
    ShardDataset.ignored_labels = lambda dataset: type("None_", (), {"share": 0.0})()


def test_a_signal_while_waiting_for_data_ends_the_run(place: Place) -> None:
    flags = [*training(place), "--num-workers", 1]
    assert end_of_ranks(train_with, 1, signal_while_reading, flags, place.folder) == [0]
    assert "stopped by SIGTERM before a step" in output_of(place, 0) and not find_checkpoint(place.folder / "run")


def signal_while_loading(rank: int) -> None:
    from ross_mcore.training import opening

    def signals(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1000)

    opening.build_engine = signals


def signal_while_waiting_for_other_ranks(rank: int) -> None:
    """Inside torch, where Python runs no handler of signals."""
    from ross_mcore.training import stop

    stop.UNWIND_SECONDS = 0.5
    os.environ.update(WORLD_SIZE="2", RANK="1", MASTER_PORT=str(free_port()))
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()


@pytest.mark.parametrize("change", [signal_while_loading, signal_while_waiting_for_other_ranks])
def test_a_signal_during_the_start_ends_it(place: Place, change: Callable[[int], None]) -> None:
    flags = training(place)
    (place.folder / "output.1").touch()
    assert end_of_ranks(train_with, 1, change, flags, place.folder) == [128 + signal.SIGTERM]
    output = output_of(place, 0) + output_of(place, 1)
    assert "stopped by SIGTERM before training began; nothing is saved" in output and "Traceback" not in output
    assert not [path for path in (place.folder / "run").rglob("*") if path.name != ".lock"]


def start_without_the_other_rank(_: int) -> None:
    os.environ["WORLD_SIZE"] = "2"


def test_ranks_that_do_not_come_are_an_error(place: Place) -> None:
    flags = [*training(place), "--distributed-timeout-minutes", 0.01]
    assert end_of_ranks(train_with, 1, start_without_the_other_rank, flags, place.folder) == [2]
    output = output_of(place, 0)
    assert "did not find each other within 0.01 minutes (RANK=0, WORLD_SIZE=2, MASTER_ADDR=127.0.0.1" in output
    assert "Traceback" not in output
