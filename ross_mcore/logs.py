"""Console lines and the log files of a run. Training continues when they cannot be written."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ross_mcore import checked
from ross_mcore.errors import LogError

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
INCIDENTS_FILE = "incidents.jsonl"
QUARANTINE_FILE = "quarantine.jsonl"
ANSWERS_FILE = "answers.jsonl"


def say(text: str) -> None:
    """Prints a line and flushes. A first failure is reported on standard error."""
    if (problem := _print(text, sys.stdout)) is not None:
        _complain_once(f"warning: standard output cannot be written: {problem}; training continues")


def complain(text: str) -> None:
    """Prints a line on standard error and flushes; failures are ignored."""
    _print(text, sys.stderr)


_complain_once = functools.cache(complain)


def _print(text: str, stream: TextIO) -> str | None:
    """Prints lines without control characters; returns the reason when they could not be written, else None."""
    try:
        print("\n".join(map(checked.printable, text.split("\n"))), file=stream, flush=True)
    except OSError as error:
        _discard_buffer(stream)
        return checked.reason(error)
    return None


def _discard_buffer(stream: TextIO) -> None:
    """Empties a stream's buffer. Otherwise the process ends with status 120, and its workers print the line again."""
    descriptor = stream.fileno()
    kept = os.dup(descriptor)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)
        stream.flush()
    os.dup2(kept, descriptor)
    os.close(kept)


def append(path: Path, content: bytes) -> None:
    """Adds all of `content` to a file, or nothing. Raises OSError, as on a full disk."""
    end = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab", buffering=0) as stream:
            while content:
                content = content[stream.write(content) :]
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, end)
        raise


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file under a partial name and renames it. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # it may be a link
    partial.write_bytes(content)
    partial.replace(path)


class LogFile:
    """A file that a run appends to. Failed writes are lost, and reported once until the file can be written again.

    When a mount has vanished, nothing is written to the disk below it. Raises LogError when the folder does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fails = False
        try:
            self._device = path.parent.stat().st_dev
        except OSError as error:
            raise LogError(f"{path} cannot be written: {checked.reason(error)}; give another --save") from None

    def append(self, content: bytes) -> None:
        try:
            if self.path.parent.stat().st_dev != self._device:
                raise OSError(errno.ENODEV, "its file system is no longer mounted")
            append(self.path, content)
        except OSError as error:
            if not self._fails:
                reason = checked.reason(error)
                say(f"warning: {self.path} cannot be written: {reason}; training continues without it until it can be")
            self._fails = True
        else:
            if self._fails:
                say(f"{self.path} is written again; the lines in between are lost")
            self._fails = False


class JsonLines(LogFile):
    """A file of objects that each have an iteration. Objects after `iteration`, left by a crash, are dropped.

    Raises LogError when the file cannot be read or rewritten.
    """

    def __init__(self, path: Path, iteration: int) -> None:
        super().__init__(path)
        drop_after(iteration, path)

    def add(self, *entries: dict[str, Any]) -> None:
        """Appends all entries in one write."""
        if entries:
            self.append(_lines(finite(entry) for entry in entries))


def _lines(entries: Iterable[Any]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def read_entries(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, one per line, each with an iteration. Raises LogError.

    Other lines are skipped: a last line cut by a crash, or a damaged one.
    """
    try:
        for line in checked.read_lines(path):
            try:
                entry = json.loads(line or b"")
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and type(entry.get("iteration")) is int:
                yield entry
    except (OSError, ValueError) as error:
        raise LogError(
            f"{path} cannot be read: {checked.reason(error)}; move it away, or give another --save"
        ) from None


def finite(value: Any) -> Any:
    """`value` with None for every number that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_after(iteration: int, path: Path) -> None:
    """Removes the lines after `iteration` from a file, if it exists. Raises LogError."""
    if not os.path.lexists(path):
        return
    kept = [entry for entry in read_entries(path) if entry["iteration"] <= iteration]
    partial = path.with_suffix(".partial")
    try:
        partial.unlink(missing_ok=True)  # it may be a link
        partial.write_bytes(_lines(kept))
        partial.replace(path)
    except OSError as error:
        raise LogError(
            f"{partial} cannot be written: {checked.reason(error)}; move it away, or give another --save"
        ) from None
