"""Where this process is in its run: said by the code that runs, read by the watchdog's thread.

A process is in one place, so this is the module's own state and no argument: mcore calls some of the code that says it.
"""

from __future__ import annotations

from dataclasses import dataclass

START = "starting"


@dataclass(frozen=True)
class Place:
    """marks: how many places came before, the same sequence on all ranks of a stage; is_long: may take long by right,
    such as a read from a cold cache, a checkpoint, an evaluation, or a first iteration, which compiles kernels."""

    marks: int = 0
    iteration: int = 0
    phase: str = START
    is_long: bool = True


_here = Place()
_first_iteration: int | None = None


def here() -> Place:
    return _here


def moving() -> None:
    """The phase of now goes on, and something comes of it."""
    at(_here.phase, is_long=_here.is_long)


def at(phase: str, *, iteration: int | None = None, is_long: bool = False) -> None:
    """This process begins `phase`; of the same iteration as before, unless another is given."""
    global _here, _first_iteration
    if _first_iteration is None:
        _first_iteration = iteration
    number = _here.iteration if iteration is None else iteration
    _here = Place(_here.marks + 1, number, phase, is_long or number in (0, _first_iteration))
