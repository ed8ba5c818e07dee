"""Requests to a running job: signals, the time limit, --exit-interval."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from ross_mcore.engine.step import Request
from ross_mcore.logs import complain
from ross_mcore.options import TrainingOptions

REPEAT_SECONDS = 2.0
"""A second Ctrl-C after this time aborts at once; an earlier one is the launcher's copy of the first."""
ABORTED = 128 + signal.SIGINT
"""Exit status after a second Ctrl-C, by the convention of shells."""
UNWIND_SECONDS = 5.0
"""How long a start that gets SIGTERM may take to end by itself; it cannot while it waits inside a library."""


class StoppedAtStart(SystemExit):
    """SIGTERM before training began, when there is nothing to save. Its code is that of shells for the signal."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)

    def __str__(self) -> str:
        return "stopped by SIGTERM before training began; nothing is saved"


class Requests:
    """SIGTERM and SIGINT end the run before its next step, and the time limit after it; SIGUSR1 saves and continues.

    While the run starts (`starting`), SIGTERM raises StoppedAtStart and SIGINT KeyboardInterrupt.

    A second SIGINT ends the process at once. A thread listens for it, because a rank blocked in a collective runs no
    Python. A running save then stays incomplete and is never read; earlier checkpoints are intact. reason: why the run
    ends.
    """

    def __init__(self, exit_duration_in_mins: float | None, exit_interval: int | None = None) -> None:
        self.reason: str | None = None
        self._exit_interval = exit_interval
        self._save = self._is_signalled = self._is_starting = self._has_left = False
        self._deadline = None if exit_duration_in_mins is None else time.monotonic() + 60 * exit_duration_in_mins
        self._former: dict[int, Any] = {}
        self._pipe = (-1, -1)
        self._former_wakeup = -1

    @classmethod
    def of(cls, options: TrainingOptions) -> Requests:
        return cls(options.exit_duration_in_mins, options.exit_interval)

    def __enter__(self) -> Requests:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        threading.Thread(target=self._listen, args=(self._pipe[0],), daemon=True, name="signals").start()
        self._former_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._has_left = True
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_wakeup)
        os.close(self._pipe[1])  # ends the thread, which closes the other end

    @contextmanager
    def starting(self) -> Iterator[None]:
        """While the run starts and has nothing to save."""
        self._is_starting = True
        yield
        self._is_starting = False  # not after an error, when the run does not begin

    def is_stopping(self) -> bool:
        """Whether a signal asked this rank to stop."""
        return self._is_signalled

    def pending(self) -> Request:
        """The request for the step that begins; a request to save is returned once."""
        if self.reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = "--exit-duration-in-mins"
        if self.reason is not None:
            return Request.STOP
        if self._save:
            self._save = False
            return Request.SAVE
        return Request.NOTHING

    def why_to_stop(self, iteration: int, request: Request) -> str | None:
        """Why the run ends after `iteration`, else None; the same on all ranks. request: the strongest of them."""
        if request is Request.STOP:
            return self.reason or "another rank"
        interval = self._exit_interval
        return f"--exit-interval {interval}" if interval and iteration % interval == 0 else None

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save = True
            return
        is_first, self._is_signalled = not self._is_signalled, True
        self.reason = signal.Signals(number).name
        if self._is_starting and is_first:
            raise KeyboardInterrupt if number == signal.SIGINT else StoppedAtStart

    def _listen(self, pipe: int) -> None:
        """Ends the process on a second SIGINT, and on SIGTERM while it starts and does not end by itself.

        Python writes the number of every handled signal into the pipe, also while the main thread waits in a library.
        """
        first: float | None = None
        while found := os.read(pipe, 1):
            if found[0] == signal.SIGTERM and self._is_starting:
                time.sleep(UNWIND_SECONDS)
                if self._is_starting and not self._has_left:
                    _abort(str(StoppedAtStart()), 128 + signal.SIGTERM)
            if found[0] != signal.SIGINT:
                continue
            now = time.monotonic()
            first = now if first is None else first
            if now - first > REPEAT_SECONDS:
                _abort("aborted; the newest complete checkpoint is intact", ABORTED)
        os.close(pipe)


def _abort(message: str, status: int) -> NoReturn:
    complain(f"rank {os.environ.get('RANK', '0')}: {message}")
    os._exit(status)
