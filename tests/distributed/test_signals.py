"""What signals, dead ranks and hung ranks do to a run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import layout
from tests.distributed.harness import run_ranks


@pytest.fixture
def flags(base: Callable[[str], Path], shards: Callable[[str], Path], tmp_path: Path) -> dict[str, Any]:
    """Many steps at data parallel 2."""
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


def train_with_a_signal(flags: dict[str, Any], rank: int, iteration: int, number: signal.Signals) -> None:
    """The `rank` sends itself a signal when its step after `iteration` begins."""
    from ross_mcore.config import Config
    from ross_mcore.data.loader import StepLoader
    from ross_mcore.training.loop import train

    read, steps = StepLoader.__next__, []

    def signalling(loader: Any) -> Any:
        steps.append(loader)
        if len(steps) == iteration + 1:
            os.kill(os.getpid(), number)
        return read(loader)

    if os.environ["RANK"] == str(rank):
        StepLoader.__next__ = signalling
    if train(Config.from_flat(**flags)):
        raise SystemExit(1)


def test_usr1_to_any_rank_saves_and_the_run_goes_on_to_its_exit_interval(flags: dict[str, Any]) -> None:
    """Asked for while the second step reads, after the request of that step was taken: so the third one saves."""
    run_ranks(train_with_a_signal, 2, {**flags, "exit_interval": 5}, 1, 1, signal.SIGUSR1)
    folder = Path(flags["save"])
    saved = sorted(int(path.name.removeprefix("iter_")) for path in folder.glob("iter_*"))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert saved == [3, 5] and json.loads(lines[-1])["iteration"] == 5
