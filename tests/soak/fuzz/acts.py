"""An audit hook that records every forbidden act of a run, that is, acts that no input file may cause.

It sees Python's operations when they happen, also those undone before the run ends and those through links. Files
written by libraries without Python are found in the listing of the case's folder (case.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
DEVICES = ("/dev/null", "/dev/tty", "/dev/shm")
CHANGES = {
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.chmod": ((0, 2),),
    "os.truncate": ((0, None),),
}
"""Event -> for every changed path, the index of its argument, and of the folder it may be relative to."""
PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen")
ASKED_FOR_THE_COMMIT = ["git", "-C", str(Path(__file__).parents[3]), "describe"]
"""The one program that training starts, in this package's own folder (training/facts.py)."""
HOSTILE_MODULES = ("os", "posix", "nt", "subprocess", "builtins", "__builtin__", "sys")
HERE = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "", None)
MADE_UP = ("canary/", "etc/hostname")
"""Names in hostile values (mutate.TEXTS)."""


def watch(descriptor: int, writable: Sequence[Path]) -> None:
    """From now on, writes a line to `descriptor` for each such act of this process and of its children."""
    import sys

    allowed = tuple(os.path.realpath(folder) for folder in writable) + DEVICES
    reported: set[str] = set()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        line = _forbidden(event, arguments, allowed)
        if line is not None and line not in reported:
            reported.add(line)
            os.write(descriptor, line.encode("utf-8", "backslashreplace").replace(b"\n", b"?") + b"\n")

    sys.addaudithook(hook)


def _forbidden(event: str, arguments: tuple[object, ...], allowed: tuple[str, ...]) -> str | None:
    """Description of an event of sys.audit that is forbidden, None for an allowed one."""
    if event == "open":
        path, _, flags = arguments
        if not isinstance(path, (str, bytes, os.PathLike)):
            return None  # a descriptor
        if isinstance(flags, int) and flags & WRITING:
            return _outside("wrote to", path, allowed, follow=not flags & os.O_NOFOLLOW)
        said = os.fsdecode(path)
        return f"read {said}" if any(said.endswith(name) or name in said for name in MADE_UP) else None
    if event in CHANGES:
        follow = event in ("os.truncate", "os.chmod")
        for at, folder_at in CHANGES[event]:
            folder = -1 if folder_at is None else arguments[folder_at]
            if not isinstance(arguments[at], int):
                start = "" if folder == -1 else os.readlink(f"/proc/self/fd/{folder}")  # noqa: PTH115
                path = os.path.join(start, os.fsdecode(arguments[at]))  # type: ignore[arg-type]  # noqa: PTH118
                if line := _outside(f"did {event} of", path, allowed, follow):
                    return line
        return None
    if event == "subprocess.Popen" and arguments[1][:4] == ASKED_FOR_THE_COMMIT:  # type: ignore[index]  # a list
        return None
    if event in PROGRAMS:
        return f"ran {event}: {str(arguments)[:200]}"
    if event == "pickle.find_class" and arguments[0] in HOSTILE_MODULES:
        return f"opened a pickle that names {arguments[0]}.{arguments[1]}"
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in HERE:
        return f"connected to {arguments[1]}"
    if event == "socket.getaddrinfo" and arguments[0] not in HERE:
        return f"asked for the address of {str(arguments[0])[:100]}"
    return None


def _outside(act: str, path: object, allowed: tuple[str, ...], follow: bool) -> str | None:
    said = os.fsdecode(path)  # type: ignore[arg-type]
    if follow:
        real = os.path.realpath(said)
    else:
        real = os.path.join(os.path.realpath(os.path.dirname(said)), os.path.basename(said))  # noqa: PTH118, PTH119, PTH120
    if any(real == folder or real.startswith(folder + "/") for folder in allowed):
        return None
    return f"{act} {said}"
