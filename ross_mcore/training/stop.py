"""Being asked to stop: signals and the time limit."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

REPEAT_SECONDS = 2.0
"""A second Ctrl-C later than this aborts at once; before, it is the launcher passing on the first one."""


class StopRequest:
    """Set by SIGTERM, SIGINT or the time limit; the loop finishes its step, saves and returns."""

    def __init__(self, exit_duration_in_mins: float | None) -> None:
        self.reason: str | None = None
        self._deadline = None if exit_duration_in_mins is None else time.monotonic() + 60 * exit_duration_in_mins
        self._former: dict[int, Any] = {}
        self._interrupted_at: float | None = None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._interrupted_at is not None and now - self._interrupted_at > REPEAT_SECONDS:
            raise KeyboardInterrupt
        if number == signal.SIGINT and self._interrupted_at is None:
            self._interrupted_at = now
        self.reason = signal.Signals(number).name

    def __bool__(self) -> bool:
        if self._deadline is not None and time.monotonic() >= self._deadline and self.reason is None:
            self.reason = "--exit-duration-in-mins"
        return self.reason is not None
