"""Console lines, and losses of single data sets."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ross_mcore.config import Config
from ross_mcore.costs import Plan
from ross_mcore.engine.losses import DataSetLosses
from ross_mcore.engine.state import TrainState
from ross_mcore.reporting.averages import Averages, means_by_data_set
from ross_mcore.reporting.console import Console
from ross_mcore.reporting.progress_bar import ProgressBar
from ross_mcore.reporting.utilization import peak_operations


def averages(lm_loss: float | None, grad_norm: float | None, mfu: float | None = None) -> Averages:
    speed = {"tokens_per_second": 1.0, "samples_per_second": 2.5, "teraflops_per_device": 0.1, "peak_gib": 0.2}
    rest: dict[str, Any] = {
        "consumed_samples": 8,
        "epoch": 0.5,
        "grad_norms": {"projector": 0.25},
        "learning_rates": {"projector": 2e-3},
        "vm_loss_by_timestep": {"0-249": 0.75},
        "bad_samples": 0,
        "skipped_samples": 1,
        "step_seconds": 0.5,
        "data_seconds": 0.25,
        "learning_rate": 1e-3,
        "data_share": 0.0,
        "fill": 0.983,
        "mfu": mfu,
        "hardware_mfu": mfu,
        "remaining_seconds": 1.0,
    }
    return Averages(7, vm_loss=0.5, lm_loss=lm_loss, loss=0.5, grad_norm=grad_norm, datasets={}, **speed, **rest)


def test_a_loss_over_nothing_is_a_dash_and_no_scalar(capsys: pytest.CaptureFixture[str]) -> None:
    run: Any = SimpleNamespace(train_iters=9, config=Config())
    Console(run, TrainState()).averages(found := averages(None, None))
    line = capsys.readouterr().out
    assert "| lm_loss - | vm_loss 0.5000 | lr 1.00e-03 | grad norm - |" in line and "| fill 98.3% |" in line
    assert not {"loss/lm_loss", "norm/all"} & found.scalars().keys() and "loss/vm_loss" in found.scalars()
    assert averages(2.0, 1.0).scalars()["loss/lm_loss"] == 2.0


def test_a_bar_is_drawn_in_a_terminal_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    run: Any = SimpleNamespace(train_iters=9)
    figures: Any = SimpleNamespace(iteration=4, lm_loss=0.5, vm_loss=None)

    def draw() -> None:
        bar = ProgressBar(run, TrainState(3))
        bar.start(run, TrainState(3))
        bar.averages(averages(2.0, 1.0))
        bar.step(figures)
        bar.close()

    draw()
    assert capsys.readouterr().out == ""
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        draw()
        assert sys.stdout is terminal
    shown = terminal.getvalue()
    assert "4/9" in shown and "vm_loss -" in shown and shown.rindex("\x1b[?25h") > shown.rfind("\x1b[?25l")


def test_the_first_group_of_tensorboard_has_the_losses() -> None:
    scalars = averages(2.0, 1.0, 0.25).scalars()
    assert min(name.partition("/")[0] for name in scalars) == "loss"
    expected = {"norm/projector": 0.25, "rate/projector": 2e-3, "loss_by_timestep/vm_loss_0-249": 0.75}
    expected |= {"throughput/mfu_percent": 25.0, "throughput/data_seconds": 0.25, "progress/skipped_samples": 1}
    assert scalars.items() >= expected.items()


def test_mfu_is_said_where_the_peak_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    run: Any = SimpleNamespace(train_iters=9, config=Config())
    for mfu in (None, 0.412):
        Console(run, TrainState()).averages(found := averages(1.0, 1.0, mfu))
        assert ("throughput/mfu_percent" in found.scalars()) == (mfu is not None)
    unknown, known = capsys.readouterr().out.splitlines()
    assert "MFU" not in unknown and "| 0.20 GiB | MFU 41.2% useful, 41.2% hardware | ETA" in known
    assert peak_operations(Plan(), "NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_operations(Plan(), "cpu") == peak_operations(Plan(), "Some GPU") == 0


def test_losses_of_a_data_set_are_weighted_by_labels_and_images() -> None:
    steps = [
        {"a": DataSetLosses(2, 30, 1, 1.0, 0.5), "b": DataSetLosses(1, 5, 0, 3.0, None)},
        {"a": DataSetLosses(1, 10, 3, 2.0, 0.1), "b": DataSetLosses(0, 0, 0, None, None)},
    ]
    assert means_by_data_set(steps) == {
        "samples/a": 3,
        "loss_by_data_set/lm_loss/a": (30 + 20) / 40,
        "loss_by_data_set/vm_loss/a": (0.5 + 0.3) / 4,
        "samples/b": 1,
        "loss_by_data_set/lm_loss/b": 3.0,
    }
    assert means_by_data_set([]) == means_by_data_set([{}]) == {}
