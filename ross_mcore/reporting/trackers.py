"""Passes a run's figures to the services of --tracker, in a thread for each: none of them can stop or slow training."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ross_mcore import checked
from ross_mcore.engine.run import Run
from ross_mcore.engine.state import TrainState
from ross_mcore.logs import say
from ross_mcore.reporting.board import Board, compared_options
from ross_mcore.reporting.services import SERVICES, Service, TrackedRun

IDS_FILE = "trackers.json"
MOST_IDS_BYTES = 1 << 16
MOST_WAITING = 1000
"""Events that wait for a service; with more it is given up."""
LAST_SECONDS = 60.0
"""How long the end of a run waits for a service."""


class Trackers(Board):
    """Feeds every service of --tracker. The ids of their runs are kept in SAVE/trackers.json, for resumed runs."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self._is_finished = False
        names, path = run.config.logging.trackers, run.save_folder / IDS_FILE
        ids = read_ids(path) if names and run.resume else {}
        options = {name: _clean(value) for name, value in compared_options(run).items()}
        about = TrackedRun(run.config.logging.tracker_project, run.save_folder.resolve().name, run.save_folder, options)
        self._feeds = {name: Feed(name, partial(SERVICES[name], about, ids.get(name))) for name in names}
        if opened := {name: feed.id for name, feed in self._feeds.items() if feed.id is not None}:
            write_ids(path, {**ids, **opened})

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        known = {name: value for name, value in values.items() if math.isfinite(value)}
        self._each(lambda service: service.scalars(iteration, known))

    def picture_named(self, iteration: int, name: str, picture: Tensor) -> None:
        pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        self._each(lambda service: service.picture(iteration, name, pixels))

    def text(self, iteration: int, name: str, markdown: str) -> None:
        self._each(lambda service: service.text(iteration, name, markdown))

    def finish(self, state: TrainState, stopped_by: str | None) -> None:
        self._is_finished = stopped_by is None

    def close(self) -> None:
        for feed in self._feeds.values():
            feed.close(self._is_finished)

    def _each(self, event: Callable[[Service], None]) -> None:
        for feed in self._feeds.values():
            feed.put(event)


class Feed:
    """Events for one service. After a failure, which is reported in one line, the service gets nothing more.

    id: of its run, None when it could not be opened.
    """

    def __init__(self, name: str, open_service: Callable[[], Service]) -> None:
        self._name, self._is_off, self._is_ending = name, False, False
        self._events: queue.Queue[Callable[[Service], None] | None] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        self.id: str | None = None
        try:
            with _quiet():
                service = open_service()
        except Exception as error:  # whatever its package raises
            self._give_up(f"could not be opened: {_reason(error)}")
            return
        self.id = service.id
        self._thread = threading.Thread(target=self._work, args=(service,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, event: Callable[[Service], None]) -> None:
        if self._is_off:
            return
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._give_up(f"has {MOST_WAITING} figures waiting")

    def close(self, is_finished: bool) -> None:
        """Waits for the service, at most LAST_SECONDS."""
        if self._thread is None:
            return
        self._is_ending = True
        self.put(lambda service: service.close(is_finished))
        with contextlib.suppress(queue.Full), _quiet():
            self._events.put(None, timeout=LAST_SECONDS)
            self._thread.join(LAST_SECONDS)
        if self._problem is not None:
            say(self._problem)
        elif self._thread.is_alive():
            say(f"warning: --tracker {self._name} has not taken all figures after {LAST_SECONDS:.0f} s")

    def _work(self, service: Service) -> None:
        while (event := self._events.get()) is not None:
            if self._is_off:
                continue
            try:
                event(service)
            except Exception as error:  # whatever its package raises
                self._give_up(f"failed: {_reason(error)}")

    def _give_up(self, problem: str) -> None:
        self._is_off = True
        text = f"warning: --tracker {self._name} {problem}; training continues without it"
        if self._is_ending:
            self._problem = text  # the console is off meanwhile
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
    partial_file = path.with_suffix(".partial")
    try:
        partial_file.write_text(json.dumps(ids) + "\n", encoding="utf-8")
        partial_file.replace(path)
    except OSError as error:
        say(f"warning: {path} cannot be written: {checked.reason(error)}; a resumed run begins new runs at trackers")


def _reason(error: Exception) -> str:
    """The first line of an error's message, without secrets."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {checked.without_secrets(lines[0])[:300]}"


def _clean(value: Any) -> Any:
    return checked.without_secrets(value) if isinstance(value, str) else value


@contextlib.contextmanager
def _quiet() -> Any:
    """Packages that print get no console."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
