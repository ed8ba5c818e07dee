"""Passes a run's figures to the services of --tracker, in a thread for each: none of them can stop or slow training."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from ross_mcore import checked
from ross_mcore.data.image import as_pixels
from ross_mcore.engine.run import Run
from ross_mcore.engine.state import TrainState
from ross_mcore.logs import replace_file, say
from ross_mcore.reporting.board import Board, compared_options
from ross_mcore.reporting.services import SERVICES, Service, TrackedRun

IDS_FILE = "trackers.json"
MOST_IDS_BYTES = 1 << 16
MOST_WAITING = 1000
"""Events that wait for a service; with more it is given up."""
FIRST_SECONDS = 20.0
"""How long the start of a run waits for all services, while the other ranks wait; they may open later."""
LAST_SECONDS = 60.0
"""How long the end of a run waits for a service."""


class Trackers(Board):
    """Feeds every service of --tracker. The ids of their runs are kept in SAVE/trackers.json, for resumed runs."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self._is_finished = False
        names, folder = run.config.logging.trackers, run.save_folder
        self._path, self._writing = folder / IDS_FILE, threading.Lock()
        self._ids = read_ids(self._path) if names and run.resume else {}
        about = TrackedRun(run.config.logging.tracker_project, folder.resolve().name, folder, compared_options(run))
        self._feeds = [
            Feed(name, partial(SERVICES[name], about, self._ids.get(name)), partial(self._keep_id, name))
            for name in names
        ]
        until = time.monotonic() + FIRST_SECONDS
        for feed in self._feeds:
            feed.wait_open(until - time.monotonic())

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        known = {name: value for name, value in values.items() if math.isfinite(value)}
        self._each(lambda service: service.scalars(iteration, known))

    def picture_named(self, iteration: int, name: str, picture: Tensor) -> None:
        pixels = as_pixels(picture)
        self._each(lambda service: service.picture(iteration, name, pixels))

    def text(self, iteration: int, name: str, markdown: str) -> None:
        self._each(lambda service: service.text(iteration, name, markdown))

    def finish(self, state: TrainState, stopped_by: str | None) -> None:
        self._is_finished = stopped_by is None

    def close(self) -> None:
        for feed in self._feeds:
            feed.close(self._is_finished)

    def _each(self, event: Callable[[Service], None]) -> None:
        for feed in self._feeds:
            feed.put(event)

    def _keep_id(self, name: str, id: str) -> str | None:
        """Called by the thread of a service that has opened. Returns a warning when the file cannot be written."""
        with self._writing:
            self._ids[name] = id
            try:
                write_ids(self._path, self._ids)
            except OSError as error:
                reason = checked.reason(error)
                return f"warning: {self._path} cannot be written: {reason}; a resumed run begins new runs at trackers"
        return None


class Feed:
    """Events for one service, which its thread opens; until then they wait. After a failure, which is reported in one
    line, the service gets nothing more.

    keep_id: called in the thread with the id of the service's run; returns a warning or None.
    """

    def __init__(
        self, name: str, open_service: Callable[[], Service], keep_id: Callable[[str], str | None] = lambda id: None
    ) -> None:
        self._name, self._open_service, self._keep_id = name, open_service, keep_id
        self._is_off, self._is_quiet = False, False
        self._events: queue.Queue[Callable[[Service], None] | None] = queue.Queue(MOST_WAITING)
        self._problem: str | None = None
        self._was_opened = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def wait_open(self, seconds: float) -> None:
        """Waits until the service is open or could not be opened, at most so long."""
        with self._waiting():
            self._was_opened.wait(max(0.0, seconds))
        if not self._was_opened.is_set():
            say(f"warning: --tracker {self._name} does not answer yet; training begins, and its figures wait")

    def put(self, event: Callable[[Service], None]) -> None:
        if self._is_off:
            return
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._give_up(f"has {MOST_WAITING} figures waiting")

    def close(self, is_finished: bool) -> None:
        """Waits for the service, at most LAST_SECONDS."""
        self.put(lambda service: service.close(is_finished))
        with self._waiting(), contextlib.suppress(queue.Full):
            self._events.put(None, timeout=LAST_SECONDS)
            self._thread.join(LAST_SECONDS)
        if self._thread.is_alive() and not self._is_off:
            say(f"warning: --tracker {self._name} has not taken all figures after {LAST_SECONDS:.0f} s")

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Its package gets no console meanwhile; a problem is reported afterwards."""
        self._is_quiet = True
        try:
            with _quiet():
                yield
        finally:
            self._is_quiet = False
        if self._problem is not None:
            say(self._problem)
            self._problem = None

    def _work(self) -> None:
        service = self._opened()
        self._was_opened.set()
        if service is None:
            return
        while (event := self._events.get()) is not None:
            if self._is_off:
                continue
            try:
                event(service)
            except Exception as error:  # whatever its package raises
                self._give_up(f"failed: {_reason(error)}")

    def _opened(self) -> Service | None:
        try:
            service = self._open_service()
        except Exception as error:  # whatever its package raises
            self._give_up(f"could not be opened: {_reason(error)}")
            return None
        if (warning := self._keep_id(service.id)) is not None:
            self._report(warning)
        return service

    def _give_up(self, problem: str) -> None:
        self._is_off = True
        self._report(f"warning: --tracker {self._name} {problem}; training continues without it")

    def _report(self, text: str) -> None:
        if self._is_quiet:
            self._problem = text
        else:
            say(text)


def read_ids(path: Path) -> dict[str, str]:
    """Service -> id of its run; {} when the file is missing or damaged, and then new runs begin."""
    try:
        found = checked.read_json(path, MOST_IDS_BYTES)
    except (OSError, ValueError):
        return {}
    pairs = found.items() if isinstance(found, dict) else ()
    return {name: id for name, id in pairs if name in SERVICES and isinstance(id, str)}


def write_ids(path: Path, ids: Mapping[str, str]) -> None:
    """Raises OSError."""
    replace_file(path, (json.dumps(ids) + "\n").encode())


def _reason(error: Exception) -> str:
    """The first line of an error's message, without secrets."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {checked.without_secrets(lines[0])[:300]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Packages that print get no console."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
