"""Replaces a file by nothing, a folder, a link, a pipe, a device, a socket or a sparse file."""

from __future__ import annotations

import os
import random
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

SPARSE_BYTES = (600 << 20, 3 << 30)
"""Sizes near the memory limit of a case, and above it."""
NAMES = (
    "a\nb",
    "\x1b[31mred",
    "-rf",
    "a" * 200,
    " ",
    "猫\u202e",
    "%s%n",
    "*",
    b"\xff\xfe".decode(errors="surrogateescape"),
)
"""Suffixes of files that are found by searching a folder."""
KINDS = (
    *(
        "gone",
        "gone",
        "a folder",
        "a link to nowhere",
        "a link to itself",
        "links in a circle",
        "a link to another file",
    ),
    *(
        "a pipe",
        "a pipe",
        "a link to a pipe",
        "a device without end",
        "a full device",
        "a socket",
        "a file with a hole",
    ),
    *("a file with a hole", "called otherwise", "beside one of a strange name", "in a folder that is gone"),
    *("in a folder that is a link to itself", "in a folder that is a file", "a file that nobody may read"),
)


@dataclass(frozen=True)
class Damage:
    """The damaged file, other paths that an error may name instead, and the description of the damage."""

    name: str
    what: str
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name!r:.120} {self.what}"


def replace(path: Path, folder: Path, rng: random.Random) -> Damage:
    """Replaces one file of a case's `folder` by something else."""
    name = path.relative_to(folder).as_posix()
    kind = rng.choice(KINDS)
    if kind.startswith("in a folder that"):
        return (
            _replace_folder(path.parent, folder, kind) if len(path.relative_to(folder).parts) > 2 else _gone(path, name)
        )
    if kind == "a file with a hole":
        os.truncate(path, size := rng.choice(SPARSE_BYTES))
        return Damage(name, f"is {size >> 20} MiB, most of it a hole")
    if kind == "a file that nobody may read":
        path.chmod(0)
        return Damage(name, f"is {kind}")
    if kind == "beside one of a strange name":
        strange = path.with_name(rng.choice(NAMES) + path.suffix)
        shutil.copyfile(path, strange)
        return Damage(name, f"is beside {strange.name!r}", (strange.relative_to(folder).as_posix(),))
    if kind == "called otherwise":
        strange = path.with_name(rng.choice(NAMES) + path.suffix)
        path.rename(strange)
        return Damage(name, f"is called {strange.name!r}", (strange.relative_to(folder).as_posix(),))
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a link to nowhere":
        path.symlink_to("nowhere")
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    elif kind == "links in a circle":
        path.symlink_to("circle")
        path.with_name("circle").symlink_to(path.name)
    elif kind in ("a pipe", "a link to a pipe"):
        pipe = path if kind == "a pipe" else folder / "canary" / "pipe"
        os.mkfifo(pipe)
        if pipe != path:
            path.symlink_to(pipe)
    elif kind == "a device without end":
        path.symlink_to("/dev/zero")
    elif kind == "a full device":
        path.symlink_to("/dev/full")
    elif kind == "a socket":
        _socket(path)
    elif kind == "a link to another file":
        others = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix == path.suffix)
        other = rng.choice(others).resolve() if others else Path("/etc/hostname")
        path.symlink_to(other)
        return Damage(name, f"is a link to {other}", (str(other),))
    return Damage(name, f"is {kind}")


def _gone(path: Path, name: str) -> Damage:
    path.unlink()
    return Damage(name, "is gone")


def _replace_folder(parent: Path, folder: Path, kind: str) -> Damage:
    name = parent.relative_to(folder).as_posix()
    shutil.rmtree(parent)
    if kind.endswith("link to itself"):
        parent.symlink_to(parent.name)
    elif kind.endswith("a file"):
        parent.write_bytes(b"x")
    around = parent.parent.relative_to(folder).as_posix()
    return Damage(name, "is " + kind.removeprefix("in a folder that is "), () if around in ("in", "out") else (around,))


def _socket(path: Path) -> None:
    """Binds a socket to a path, from its folder, because the path may be too long for the system."""
    here = os.getcwd()  # noqa: PTH109
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def plant(path: Path, folder: Path, rng: random.Random) -> Damage:
    """A link out of the folder, under a name that a tool writes to."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    goal = rng.choice(("secret.txt", "new.txt", "new/file", ""))
    path.symlink_to(folder / "canary" / goal)
    return Damage(name, f"is a link to canary/{goal}", (f"canary/{goal}",))
