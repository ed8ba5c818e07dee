"""When the rank that a watchdog watches is lost."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from ross_mcore.guards.verdict import ENDED, Heartbeat
from ross_mcore.guards.watchdog import _loss, _process_table

HERE = Heartbeat(7, "node1", os.getpid(), 12, "losses", 50, 1.0, processes=_process_table())
GONE = replace(HERE, process=2**22 + 1)  # above the largest number of a process
ELSEWHERE = replace(HERE, host="node2", processes="another system")
CONTAINER = replace(GONE, processes="the same host, other numbers of processes")


@pytest.mark.parametrize(
    ("beat", "silent", "expected"),
    [
        (HERE, 1000, None),  # stopped, in a debugger, or in a long native call
        (GONE, 0, None),  # its last heartbeat may say that it ended
        (GONE, 1, "is gone"),
        (replace(GONE, status=ENDED), 1000, None),
        (replace(GONE, status="MemoryError: none left"), 2, None),
        (replace(GONE, status="MemoryError: none left"), 3, "failed"),
        (ELSEWHERE, 3, None),
        (ELSEWHERE, 4, "is lost"),
        (replace(ELSEWHERE, is_long=True), 11, None),
        (replace(ELSEWHERE, is_long=True), 12, "is lost"),
        (CONTAINER, 3, None),
        (None, 11, None),
        (None, 12, "never started"),
    ],
)
def test_a_rank_is_lost(beat: Heartbeat | None, silent: int, expected: str | None) -> None:
    assert _loss(beat, silent) == expected
