"""Signals, dead ranks and blocked ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ross_mcore.checkpoint.folder import find_checkpoint
from ross_mcore.guards.watchdog import LOST_A_RANK
from ross_mcore.training.stop import ABORTED
from tests.distributed.cases import layout
from tests.distributed.harness import end_of_ranks

pytestmark = pytest.mark.slow


@pytest.fixture
def flags(base: Callable[[str], Path], shards: Callable[[str], Path], tmp_path: Path) -> dict[str, Any]:
    """A run of many steps at data parallel 2."""
    return {
        "load": str(base("qwen2_siglip")),
        "data_path": str(shards("mixed")),
        "save": str(tmp_path / "run"),
        "training_stage": "finetune",
        "seq_length": 256,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "train_iters": 1000,
        "num_workers": 0,
        "pack": False,
        "distributed_timeout_minutes": 1,
        **layout(1),
    }


def stop(pause: float) -> None:
    time.sleep(pause)  # until heartbeats have reported this place
    os.kill(os.getpid(), signal.SIGSTOP)


def hang(_: float) -> None:
    time.sleep(1000)


def die(_: float) -> None:
    time.sleep(2)  # longer than the time between heartbeats: where it died is known
    os.kill(os.getpid(), signal.SIGKILL)


def ask_to_save(_: float) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def fail(_: float) -> None:
    raise MemoryError("no memory is left")


def press_ctrl_c_twice(pause: float) -> None:
    """From a thread, while this rank waits for the others."""

    def press() -> None:
        for _ in range(2):
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()


def train_with_faults(
    flags: dict[str, Any], output: str, iteration: int, faults: dict[int, Callable[..., None]]
) -> None:
    """Calls a rank's fault when the rank reads `iteration`. Standard error goes to the file of the rank in `output`."""
    from ross_mcore.commands.train import train_status
    from ross_mcore.config import Config
    from ross_mcore.data.loader import StepLoader
    from ross_mcore.training import stop as requests

    rank = int(os.environ["RANK"])
    requests.REPEAT_SECONDS = 0.2
    os.dup2(os.open(f"{output}/{rank}", os.O_WRONLY | os.O_CREAT), 2)
    read, steps = StepLoader.__next__, []

    def faulty(loader: Any) -> Any:
        steps.append(loader)
        if len(steps) == iteration and rank in faults:
            faults[rank](0.5)
        return read(loader)

    StepLoader.__next__ = faulty
    raise SystemExit(train_status(Config.from_flat(**flags)))


def test_usr1_to_any_rank_saves_and_the_run_continues(flags: dict[str, Any], tmp_path: Path) -> None:
    """The signal comes while the second step reads, too late for that step, so the third one saves."""
    arguments = {**flags, "exit_interval": 5}, str(tmp_path), 2, {1: ask_to_save}
    assert end_of_ranks(train_with_faults, 2, *arguments) == [0, 0]
    folder = Path(flags["save"])
    saved = sorted(int(path.name.removeprefix("iter_")) for path in folder.glob("iter_*"))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert saved == [3, 5] and json.loads(lines[-1])["iteration"] == 5


HUNG = {"distributed_timeout_minutes": 0.1}


@pytest.mark.parametrize(
    ("fault", "options", "expected"),
    [
        pytest.param(
            stop,
            HUNG,
            r"rank 1 \(process \d+ on .*\) sends no heartbeat: its process is stopped \(SIGSTOP\); last seen in "
            r"iteration 4, reading data",
            id="frozen",
        ),
        pytest.param(
            hang,
            HUNG,
            r"every rank is alive, and the others wait for rank 1, (outside any collective|furthest behind): "
            r"iteration 4, reading data",
            id="hung",
        ),
        pytest.param(
            die,
            layout(2, 2),
            r"rank 1 \(process \d+ on .*\) sends no heartbeat: its process (is gone|has ended); last seen in "
            r"iteration \d, .*, for \d+ s; last collective: gloo",
            id="killed",
        ),
        pytest.param(
            fail, {}, r"rank 1 failed \(MemoryError: no memory is left\) in iteration 4, reading data", id="failed"
        ),
    ],
)
def test_a_lost_rank_ends_the_others_and_is_named(
    flags: dict[str, Any], tmp_path: Path, fault: Callable[..., None], options: dict[str, Any], expected: str
) -> None:
    world = 4 if fault is die else 2
    statuses = end_of_ranks(train_with_faults, world, {**flags, **options}, str(tmp_path), 4, {1: fault}, but=1)
    outputs = [(tmp_path / str(rank)).read_text() for rank in range(world)]
    assert statuses[0] == LOST_A_RANK and set(statuses[2:]) <= {LOST_A_RANK}, outputs
    assert len(re.findall(expected, "".join(outputs))) == 1, outputs  # one rank reports for all


def test_a_second_ctrl_c_aborts_a_rank_that_waits_for_another(flags: dict[str, Any], tmp_path: Path) -> None:
    faults = {0: press_ctrl_c_twice, 1: stop}
    statuses = end_of_ranks(train_with_faults, 2, {**flags, "save_interval": 1}, str(tmp_path), 4, faults, but=1)
    assert statuses[0] == ABORTED and "rank 0: aborted" in (tmp_path / "0").read_text()
    found = find_checkpoint(Path(flags["save"]))
    assert found is not None and found.iteration in (2, 3)  # the last save may not have finished
