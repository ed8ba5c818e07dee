"""One thread that computes for all models; requests give it jobs and read what they yield.

torch's kernels are launched from one thread (ARCHITECTURE.md). It takes a step of every model's job in turn, so that
the answers of several models appear side by side, and each model has one job at a time; others wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import traceback
from collections import deque
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias

from ross_mcore.errors import UserError
from ross_mcore.logs import complain
from ross_mcore.serving.protocol import ApiError

Steps: TypeAlias = Generator[Any, None, Any]
"""What a job does: yields as it computes, returns its result."""

RETRY_SECONDS = 2
STOPPING = ApiError("the server is stopping; ask again when it is back", 503, code="stopping")
INTERNAL = ApiError("an error inside the server; its log has the details", 500, code="internal_error")


class Ended(Exception):
    """The job's client is gone or the server stops."""


@dataclass(frozen=True)
class Result:
    """What a job returned."""

    value: Any


class Job:
    """Work for one model. Its items arrive in the event loop that made it."""

    def __init__(self, start: Callable[[], Steps]) -> None:
        self._start, self._loop = start, asyncio.get_running_loop()
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._steps: Steps | None = None
        self.is_ended = False

    def end(self) -> None:
        """Ends the work at its next step. Callable from any thread, any number of times."""
        self.is_ended = True

    async def next(self) -> Any:
        """The next item: None when the work starts, what it yields, and at last a Result. Raises ApiError."""
        item = await self._items.get()
        if isinstance(item, ApiError):
            raise item
        return item

    def advance(self) -> bool:
        """Takes a step, in the worker's thread; whether there are more."""
        try:
            if self.is_ended:
                raise Ended
            if self._steps is None:
                self._steps = self._start()
                self._send(None)
            else:
                self._send(next(self._steps))
        except StopIteration as finished:
            self._send(Result(finished.value))
        except BaseException as error:  # of any kind: the thread serves other requests
            self._send(_as_api_error(error))
        else:
            return True
        if self._steps is not None:
            self._steps.close()
        return False

    def refuse(self) -> None:
        self._send(STOPPING)

    def _send(self, item: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)


def _as_api_error(error: BaseException) -> ApiError:
    if isinstance(error, Ended):
        return STOPPING
    if isinstance(error, UserError):
        return ApiError(str(error))
    complain("".join(traceback.format_exception(error)))
    return INTERNAL


class Worker:
    """The thread, and the jobs of every model: one that runs and at most `most_waiting` that wait."""

    def __init__(self, models: Collection[str], most_waiting: int, prepare: Callable[[], None] = lambda: None) -> None:
        """`prepare` runs first in the thread."""
        self._waiting: dict[str, deque[Job]] = {name: deque() for name in models}
        self._running: dict[str, Job] = {}
        self._most_waiting, self._prepare = most_waiting, prepare
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)
        self._thread.start()

    def submit(self, model: str, start: Callable[[], Steps]) -> Job:
        """Adds a job; called in an event loop. Raises ApiError when too many wait or the server stops."""
        with self._changed:
            if self._is_stopping:
                raise STOPPING
            waiting = self._waiting[model] = deque(job for job in self._waiting[model] if not job.is_ended)
            if len(waiting) >= self._most_waiting:
                raise ApiError(
                    f"{self._most_waiting} requests wait for {model}; ask again in a while",
                    429,
                    code="queue_full",
                    retry_after_seconds=RETRY_SECONDS,
                )
            job = Job(start)
            waiting.append(job)
            self._changed.notify()
        return job

    def stop(self) -> None:
        """Ends all jobs at their next step and takes no more."""
        with self._changed:
            self._is_stopping = True
            for job in self._running.values():
                job.end()
            for waiting in self._waiting.values():
                while waiting:
                    waiting.popleft().refuse()
            self._changed.notify()

    def join(self, timeout_seconds: float) -> None:
        """Waits for the thread after `stop`."""
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        self._prepare()
        while self._take():
            for model, job in list(self._running.items()):
                if not job.advance():
                    with self._changed:
                        del self._running[model]

    def _take(self) -> bool:
        """Waits for jobs and starts one for every model without; False when there will be none."""
        with self._changed:
            while True:
                for model, waiting in self._waiting.items():
                    if waiting and model not in self._running:
                        self._running[model] = waiting.popleft()
                if self._running:
                    return True
                if self._is_stopping:
                    return False
                self._changed.wait()
