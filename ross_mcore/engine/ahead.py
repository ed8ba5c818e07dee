"""Values made in a thread while their predecessors are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ross_mcore import platform

A = TypeVar("A")
T = TypeVar("T")

AHEAD = 1
"""Values made beyond the one in use."""


def made_ahead(make: Callable[[A], T], arguments: Iterable[A]) -> Generator[T]:
    """`make` of each argument, in order; the next one is made in a thread while the caller uses the last.

    `make` works on the host, because torch's modes and current device are those of a thread. What it raises is raised
    here, in its turn. Close the iterator (contextlib.closing) to end the thread early. No thread is left when it ends,
    so that processes can be forked.
    """
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, "ahead", platform.use_device, (platform.device(),)) as thread:
        for argument in arguments:
            waiting.append(thread.submit(make, argument))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
