"""When a run's checkpoints are begun: once an iteration, and again when one failed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ross_mcore.checkpoint.saving import RunningSave, Saved
from ross_mcore.engine.state import TrainState
from ross_mcore.errors import CheckpointError
from ross_mcore.training.checkpointer import Checkpointer


class Save(RunningSave):
    """A save that goes on until it is `ended`, well or with an error; who waits for it ends it well."""

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
    """A saver of a run of 20 iterations: what it began and said."""

    def __init__(self, folder: Path) -> None:
        options = SimpleNamespace(checkpoint=SimpleNamespace(async_save=True))
        groups = SimpleNamespace(rank=0)
        run: Any = SimpleNamespace(config=options, resume=False, groups=groups, save_folder=folder, train_iters=20)
        self.begun: list[Save] = []
        self.said: list[str] = []
        super().__init__(run, self.said.append)

    def _begin(self, state: TrainState) -> Save:
        self.begun.append(Save(state.iteration))
        return self.begun[-1]

    def take(self, iterations: range, save_at: tuple[int, ...]) -> list[int]:
        """Goes through iterations as the loop does; those whose save was begun so far."""
        for iteration in iterations:
            self.after_step(TrainState(iteration))
            if iteration in save_at:
                self.save(TrainState(iteration))
        return [save.destination.iteration for save in self.begun]


@pytest.fixture
def saver(tmp_path: Path) -> Watched:
    """Its save of iteration 10 fails, which is heard of at 11."""
    found = Watched(tmp_path)
    found.take(range(10, 11), (10,))
    found.begun[0].ended = CheckpointError("a full disk")
    return found


def test_another_attempt_takes_the_place_of_a_save_that_is_due(saver: Watched) -> None:
    assert saver.take(range(11, 16), (12, 14)) == [10, 12, 14]
    assert saver.said[0].endswith("a full disk. Older checkpoints are intact; training goes on, and it is tried again "
                                  "after iteration 12")  # fmt: skip


def test_a_newer_save_takes_the_place_of_another_attempt(saver: Watched) -> None:
    assert saver.take(range(11, 16), (11,)) == [10, 11]
    assert len(saver.said) == 1


def test_what_is_saved_is_not_saved_again(saver: Watched) -> None:
    saver.take(range(11, 13), ())
    saver.wait(12)
    assert saver.take(range(12, 13), (12,)) == [10, 12]


def test_what_follows_a_failure_is_said(saver: Watched) -> None:
    saver.save(TrainState(11))
    assert saver.said[-1].endswith("Older checkpoints are intact; a newer one begins")
    saver.begun[-1].ended = CheckpointError("a full disk")
    saver.wait(12, "the run ends")
    assert saver.said[-1].endswith("Older checkpoints are intact; the run ends")
