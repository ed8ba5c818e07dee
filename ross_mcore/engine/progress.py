"""The place of this process in its run: written by the running code, read by the watchdog's thread.

It is module state, because a process has only one place and mcore calls some of the code that writes it.
"""

from __future__ import annotations

from dataclasses import dataclass

START = "starting"


@dataclass(frozen=True)
class Place:
    """marks: number of places before this one, the same sequence on all ranks of a stage; is_long: a phase that may be
    slow without being blocked, such as a read from a cold cache, a checkpoint, an evaluation or a first iteration that
    compiles kernels."""

    marks: int = 0
    iteration: int = 0
    phase: str = START
    is_long: bool = True


_here = Place()
_first_iteration: int | None = None


def here() -> Place:
    return _here


def moving() -> None:
    """Records progress within the current phase."""
    at(_here.phase, is_long=_here.is_long)


def at(phase: str, *, iteration: int | None = None, is_long: bool = False) -> None:
    """Records that this process begins `phase`; iteration: None for the current one."""
    global _here, _first_iteration
    if _first_iteration is None:
        _first_iteration = iteration
    number = _here.iteration if iteration is None else iteration
    _here = Place(_here.marks + 1, number, phase, is_long or number in (0, _first_iteration))
