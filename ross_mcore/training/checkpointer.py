"""Writes a run's checkpoints: in the background, one at a time, and again after failures."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from ross_mcore.checkpoint import folder
from ross_mcore.checkpoint.saving import Destination, HostCopies, RunningSave, Saved, begin_save
from ross_mcore.engine import progress
from ross_mcore.engine.finite import all_finite
from ross_mcore.engine.run import Run
from ross_mcore.engine.state import TrainState, sharded_state
from ross_mcore.engine.step import Request
from ross_mcore.errors import CheckpointError
from ross_mcore.logs import INCIDENTS_FILE
from ross_mcore.parallel.collectives import is_on_all_ranks
from ross_mcore.training.facts import layout_of

MOST_STEPS_TO_RETRY = 256
"""A failing save is retried after 1, 2, 4, ... steps, at most after this many."""


class Checkpointer:
    """Writes the checkpoints of a run. All methods are collective: every rank calls them at the same points.

    With --async-save, training waits only while the state is copied to host memory; the next save uses the same memory.
    Without it, or without room for a copy, training waits until the checkpoint is complete. At the end of a `with`, an
    error that all ranks raise waits for the running save.
    """

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        """say: prints a line on the logging rank."""
        self._run, self._say = run, say
        self._copies = HostCopies() if run.config.checkpoint.async_save else None
        self._running: RunningSave | None = None
        self._began = 0.0
        self._blocked_seconds: float | None = None  # of the last save; None while training waits for it
        self._failures = 0
        self._retry_at: int | None = None
        self._iteration = 0
        # a run that resumes in another folder has no checkpoint there yet
        same_folder = run.resume and run.start.path.parent == run.save_folder
        self._saved_iteration = run.start.iteration if same_folder else None
        if run.groups.rank == 0:
            folder.tidy(run.save_folder, run.start if same_folder else None)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception) and is_on_all_ranks(error):
            progress.at("waiting for a save", is_long=True)
            self.wait(self._iteration, "the run ends")

    def after_step(self, state: TrainState) -> None:
        """Reports the outcome of the running save. Call after every step."""
        progress.at("checking the running save")
        self._iteration = state.iteration
        if self._running is not None:
            self._run_and_report(self._running.poll, state.iteration)

    def save_if_due(self, state: TrainState, request: Request) -> None:
        """Saves on request, every --save-interval iterations, after the last one, and again after a failure."""
        retries = self._retry_at is not None and state.iteration >= self._retry_at
        if request or retries or self._run.is_due(state.iteration, self._run.config.checkpoint.save_interval):
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Waits for the previous save and begins to save `state`, unless it is already saved or being saved.

        A failure is reported, and retried later unless a newer save begins first.
        """
        is_running = self._running is not None and self._running.destination.iteration == state.iteration
        if is_running or self._saved_iteration == state.iteration:
            return
        progress.at("saving a checkpoint", is_long=True)
        began = time.monotonic()
        self.wait(state.iteration, "a newer one begins")
        if time.monotonic() - began > 1:
            self._say(f"waited {time.monotonic() - began:.1f} s for the previous save; --save-interval is too short")
        self._began, self._blocked_seconds = time.monotonic(), None
        self._retry_at = None
        self._run_and_report(lambda: self._begin(state), state.iteration)
        if self._running is not None and not self._running.is_copied:
            if self._copies is not None:
                self._say("host memory has no room for a copy of the state: training waits for this save")
            self.wait(state.iteration)
        self._blocked_seconds = time.monotonic() - self._began

    def wait(self, iteration: int, then: str | None = None) -> None:
        """Waits for the running save, if any, and reports its outcome.

        then: the next action after a failure, for the message; None for another attempt.
        """
        if self._running is not None:
            running = self._running
            self._run_and_report(lambda: running.finish(progress.moving), iteration, then)

    def finish(self, state: TrainState) -> None:
        """Returns when `state` is saved. Raises CheckpointError on every rank when saving fails."""
        progress.at("saving the last checkpoint", is_long=True)
        self.wait(state.iteration, "it is tried once more")
        if self._saved_iteration != state.iteration:
            self._began, self._blocked_seconds = time.monotonic(), None
            self._running = self._begin(state)
            self._finished(self._running.finish(progress.moving))

    def _begin(self, state: TrainState) -> RunningSave:
        run, options = self._run, self._run.config.checkpoint
        whole = sharded_state(run.engine, is_loading=False)
        if not all_finite(run.engine.model, run.engine.device):
            raise CheckpointError(
                f"the weights after iteration {state.iteration} are not finite. Checkpoints before it are intact: "
                f"resume from one of them with a lower --lr, or leave out what {run.save_folder / INCIDENTS_FILE} "
                "names (--skip-samples, --skip-iterations)"
            )
        destination = Destination(
            run.save_folder,
            state.iteration,
            run.model_config,
            claim=run.claim,
            assets=run.start.path,
            layout=layout_of(run.groups.layout, run.config),
            keep_last=options.keep_last,
            save_retain_interval=options.save_retain_interval,
        )
        return begin_save(destination, {**whole, "train_state": state.to_dict()}, self._copies)

    def _run_and_report(
        self, action: Callable[[], RunningSave | Saved | None], iteration: int, then: str | None = None
    ) -> None:
        """Runs an action that may begin or finish a save, and reports its outcome. then: see `wait`."""
        try:
            result = action()
        except CheckpointError as error:
            self._running = None
            self._failures += 1
            steps = min(2 ** (self._failures - 1), MOST_STEPS_TO_RETRY)
            self._retry_at = iteration + steps
            if then is None and iteration < self._run.train_iters:
                then = f"training continues, and it is tried again after iteration {self._retry_at}"
            then = then or "it is tried once more"
            self._say(f"warning: a checkpoint could not be saved: {error}. Older checkpoints are intact; {then}")
            return
        if isinstance(result, RunningSave):
            self._running = result
        elif result is not None:
            self._finished(result)

    def _finished(self, saved: Saved) -> None:
        self._running, self._failures, self._retry_at = None, 0, None
        self._saved_iteration = saved.checkpoint.iteration
        blocked = time.monotonic() - self._began if self._blocked_seconds is None else self._blocked_seconds
        copied = f", copy in host memory {saved.copy_bytes / 2**20:.0f} MiB a rank" if saved.copy_bytes else ""
        self._say(
            f"saved iteration {saved.checkpoint.iteration} under {saved.checkpoint.path.parent}: "
            f"{saved.bytes / 2**20:.0f} MiB in {saved.seconds:.1f} s, training blocked for "
            f"{blocked:.2f} s{copied}"
        )
