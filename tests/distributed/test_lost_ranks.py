"""A rank that is lost while the others wait for it in a collective that never raises, as under NCCL."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ross_mcore.guards.watchdog import LOST_A_RANK
from tests.distributed.cases import layout
from tests.distributed.harness import end_of_ranks


def train_until_one_is_lost(flags: dict[str, Any], output: str, lost: int, hosts: bool) -> None:
    """At the third step rank `lost` is killed, and the collective of the others sleeps. hosts: each has its own."""
    from ross_mcore.commands.train import train_status
    from ross_mcore.config import Config
    from ross_mcore.engine.engine import Engine
    from ross_mcore.guards import watchdog

    rank = int(os.environ["RANK"])
    os.dup2(os.open(f"{output}/{rank}", os.O_WRONLY | os.O_CREAT), 2)
    if hosts:
        socket.gethostname = lambda: f"node{rank}"
        watchdog._process_table = lambda: f"node{rank}"
    agree, steps = Engine.agree, []

    def waits_for_ever(engine: Engine, *arguments: Any) -> Any:
        steps.append(engine)
        if len(steps) == 3 and rank == lost:
            Path(output, "lost").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if len(steps) == 3:
            time.sleep(1000)
        return agree(engine, *arguments)

    Engine.agree = waits_for_ever
    raise SystemExit(train_status(Config.from_flat(**flags)))


@pytest.mark.parametrize(
    ("lost", "hosts", "minutes", "expected"),
    [
        pytest.param(1, False, 0.4, r"rank 0: rank 1 is gone\nrank 1 \(process \d+ on .*\) sends no hea", id="here"),
        pytest.param(
            1,
            True,
            0.4,
            r"rank 0: rank 1 is lost\nrank 1 \(process \d+ on node1\) sends no heartbeat",
            id="elsewhere",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            0,
            True,
            0.4,
            r"rank 1: the store of the ranks is gone\nrank 0 on .* does not answer",
            id="store",
            marks=pytest.mark.slow,
        ),
        pytest.param(1, False, 10.0, r"rank \d: rank 1 is gone\nrank 1 .*gone", id="default", marks=pytest.mark.slow),
    ],
)
def test_the_others_end_and_name_it(
    base: Callable[[str], Path],
    shards: Callable[[str], Path],
    tmp_path: Path,
    lost: int,
    hosts: bool,
    minutes: float,
    expected: str,
) -> None:
    flags = {
        **{"load": str(base("qwen2_siglip")), "data_path": str(shards("mixed")), "save": str(tmp_path / "run")},
        **{"training_stage": "finetune", "seq_length": 256, "train_iters": 1000, "num_workers": 0, "pack": False},
        **{"global_batch_size": 4, "micro_batch_size": 2, "distributed_timeout_minutes": minutes, **layout(1)},
    }
    statuses = end_of_ranks(train_until_one_is_lost, 2, flags, str(tmp_path), lost, hosts)
    assert time.time() - (tmp_path / "lost").stat().st_mtime < 60
    assert statuses[1 - lost] == LOST_A_RANK
    output = (tmp_path / str(1 - lost)).read_text()
    assert re.search(expected, output), output
