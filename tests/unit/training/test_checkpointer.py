"""When a run's checkpoints are saved: once an iteration, and again after a failure."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ross_mcore.checkpoint.saving import RunningSave, Saved
from ross_mcore.engine.state import TrainState
from ross_mcore.engine.step import Request
from ross_mcore.errors import CheckpointError
from ross_mcore.training.checkpointer import Checkpointer


class Save(RunningSave):
    """A save that runs until it is `ended`: True, or an error. Waiting for it ends it without an error."""

    def __init__(self, iteration: int) -> None:
        self.destination: Any = SimpleNamespace(iteration=iteration)
        self.is_copied = True
        self.ended: bool | CheckpointError = False

    def poll(self) -> Saved | None:
        if isinstance(self.ended, CheckpointError):
            raise self.ended
        checkpoint: Any = SimpleNamespace(iteration=self.destination.iteration, path=Path("run/it"))
        return Saved(checkpoint, 0, 0, 0.0) if self.ended else None

    def finish(self, moving: Any = None) -> Saved:
        self.ended = self.ended or True
        saved = self.poll()
        assert saved is not None
        return saved


class Watched(Checkpointer):
    """The checkpointer of a run of 20 iterations, with the saves it began and the lines it printed."""

    def __init__(self, folder: Path) -> None:
        options = SimpleNamespace(checkpoint=SimpleNamespace(async_save=True, save_interval=None))
        run: Any = SimpleNamespace(
            config=options,
            resume=False,
            groups=SimpleNamespace(rank=0),
            save_folder=folder,
            train_iters=20,
            is_due=lambda iteration, interval: False,
        )
        self.begun: list[Save] = []
        self.lines: list[str] = []
        super().__init__(run, self.lines.append)

    def _begin(self, state: TrainState) -> Save:
        self.begun.append(Save(state.iteration))
        return self.begun[-1]

    def take(self, iterations: range, save_at: tuple[int, ...]) -> list[int]:
        """Runs iterations as the loop does; returns the iterations of all saves begun so far."""
        for iteration in iterations:
            self.after_step(TrainState(iteration))
            self.save_if_due(TrainState(iteration), Request.SAVE if iteration in save_at else Request.NOTHING)
        return [save.destination.iteration for save in self.begun]


@pytest.fixture
def saver(tmp_path: Path) -> Watched:
    """Its save of iteration 10 fails, which it notices at 11."""
    found = Watched(tmp_path)
    found.take(range(10, 11), (10,))
    found.begun[0].ended = CheckpointError("a full disk")
    return found


def test_a_retry_replaces_a_save_that_is_due(saver: Watched) -> None:
    assert saver.take(range(11, 16), (12, 14)) == [10, 12, 14]
    outcome = "Older checkpoints are intact; training continues, and it is tried again after iteration 12"
    assert saver.lines[0].endswith(f"a full disk. {outcome}")


def test_a_newer_save_replaces_a_retry(saver: Watched) -> None:
    assert saver.take(range(11, 16), (11,)) == [10, 11]
    assert len(saver.lines) == 1


def test_a_saved_iteration_is_not_saved_again(saver: Watched) -> None:
    saver.take(range(11, 13), ())
    saver.wait(12)
    assert saver.take(range(12, 13), (12,)) == [10, 12]


def test_a_failure_is_reported_with_the_next_action(saver: Watched) -> None:
    saver.save(TrainState(11))
    assert saver.lines[-1].endswith("Older checkpoints are intact; a newer one begins")
    saver.begun[-1].ended = CheckpointError("a full disk")
    saver.wait(12, "the run ends")
    assert saver.lines[-1].endswith("Older checkpoints are intact; the run ends")
