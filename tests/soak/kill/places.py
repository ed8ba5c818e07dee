"""Records the place of a rank in the program and kills it there. Runs inside a rank; the package does not use it.

An arrival at a *place* is a call of a function in CALLS, which are wrapped, or a file operation (open, rename, delete),
which Python reports in any thread before the operation (`sys.addaudithook`). Arrivals are counted, the last place is
written to a file that survives the rank, and a rank with an `Errand` dies at the n-th arrival at its place, or lets the
driver kill it a little later.
"""

from __future__ import annotations

import functools
import importlib
import json
import mmap
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PLACE_BYTES = 64

CALLS = {
    "building the model": ("ross_mcore.training.opening", "build_engine"),
    "loading a checkpoint": ("ross_mcore.engine.setup", "restore"),
    "reading samples": ("ross_mcore.data.loader", "StepLoader.__next__"),
    "forward and backward": ("ross_mcore.engine.engine", "Engine.gradients"),
    "optimizer step": ("ross_mcore.engine.engine", "apply_gradients"),
    "writing metrics": ("ross_mcore.reporting.files", "MetricsFile.step"),
    "validation": ("ross_mcore.training.evaluation", "validate"),
    "beginning to write": ("ross_mcore.checkpoint.saving", "RunningSave.__init__"),
    "asking for a save": ("ross_mcore.checkpoint.saving", "RunningSave.poll"),
    "writing a tensor": ("ross_mcore.checkpoint.tensor_file", "TensorFile.append"),
    "bringing a file to the disk": ("os", "fsync"),
}
"""Place -> its function."""

FILES = [
    ("removing what a kill left", r"remove|rmdir", r"/\.iter_\d+\.partial"),
    ("deleting an old checkpoint", r"remove|rmdir", r"/\.iter_\d+\.deleting"),
    ("taking an old checkpoint away", r"rename", r"\.deleting$"),
    ("publishing a checkpoint", r"rename", r"/iter_\d+$"),
    ("moving the pointer", r"rename", r"/latest_checkpointed_iteration\.txt$"),
    ("writing the pointer", r"open", r"/latest_checkpointed_iteration\.txt"),
    ("opening or cutting back a log", r"open|rename", r"/\w+\.(partial|jsonl)$"),
    ("writing the marker", r"open", r"\.partial/complete\.json$"),
    ("writing a small file", r"open", r"/\.iter_\d+\.partial/"),
    ("writing TensorBoard", r"open", r"/tensorboard/"),
]
"""(place, operations, paths), in order of precedence; the path of a rename is the new one."""


@dataclass(frozen=True)
class Errand:
    """Die at the `nth` arrival at `place`: at once, or `delay` seconds after."""

    place: str
    nth: int
    delay: float | None


class Watch:
    """Counts arrivals of this process and carries out its errand."""

    def __init__(self, run: Path, place_file: Path, errand: Errand | None, driver: Connection) -> None:
        self._run, self._errand, self._driver = str(run), errand, driver
        self._counts: Counter[str] = Counter()
        self._counts_file = place_file.with_suffix(".counts")
        self._lock = threading.RLock()
        place_file.write_bytes(bytes(PLACE_BYTES))
        with place_file.open("r+b") as stream:
            self._last = mmap.mmap(stream.fileno(), PLACE_BYTES)

    def begin(self) -> None:
        """Counts from now on. It cannot be undone: the process must end after its work."""
        for place, (module, path) in CALLS.items():
            owner = importlib.import_module(module)
            *within, name = path.split(".")
            for part in within:
                owner = getattr(owner, part)
            setattr(owner, name, self._watched(place, getattr(owner, name)))
        sys.addaudithook(self._heard)
        self.arrive("starting")

    def arrive(self, place: str) -> None:
        with self._lock:
            self._counts[place] += 1
            self._last[:] = place.encode().ljust(PLACE_BYTES, b"\0")
            errand = self._errand
            if errand is None or place != errand.place or self._counts[place] != errand.nth:
                return
            if errand.delay is None:
                os.kill(os.getpid(), signal.SIGKILL)
            self._driver.send_bytes(b"due")

    def report(self) -> None:
        """Writes the counts, from which kills are planned."""
        self._counts_file.write_text(json.dumps(self._counts))

    def _watched(self, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def arrive_and_call(*arguments: Any, **options: Any) -> Any:
            self.arrive(place)
            return function(*arguments, **options)

        return arrive_and_call

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if not isinstance(path, str) or not (flags or 0) & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in ("os.remove", "os.rmdir"):
            path = _absolute(arguments[0], arguments[1])
        elif event == "os.rename":
            path = os.fspath(arguments[1])
        else:
            return
        if not path.startswith(self._run):
            return
        for place, operations, paths in FILES:
            if re.search(operations, event) and re.search(paths, path.removeprefix(self._run)):
                self.arrive(place)
                return


def _absolute(path: Any, folder_descriptor: int) -> str:
    """A path of `os.remove`, which may be relative to an open folder."""
    if folder_descriptor < 0:
        return os.fspath(path)
    return str(Path(f"/proc/self/fd/{folder_descriptor}").readlink() / os.fspath(path))


def last_place(place_file: Path) -> str:
    """The last place of the rank that wrote the file."""
    found = place_file.read_bytes() if place_file.exists() else b""
    return found.rstrip(b"\0").decode() or "before its first line"
