from __future__ import annotations

from dataclasses import replace

import pytest

from ross_mcore.guards.verdict import ENDED, Heartbeat, ranks, verdict

WAITING = Heartbeat(
    7, "node1", 100, 12, "agreeing on the step", 50, 61.0, "gloo:all_gather number 3 of default_pg", True
)
READING = replace(WAITING, phase="reading data", marks=49, waits=False, collective="")


def judged(after: dict[int, Heartbeat], silent: tuple[int, ...] = (), world_size: int = 4) -> str:
    before = {rank: beat if rank in silent else replace(beat, count=beat.count - 2) for rank, beat in after.items()}
    return verdict(before, after, world_size, {2: ": its process is gone"})


def test_a_silent_rank_is_named_with_its_process_state_and_the_places_of_the_others() -> None:
    lost = replace(WAITING, process=777, iteration=11, phase="optimizer step", seconds=0.4)
    text = judged({0: WAITING, 1: WAITING, 2: lost, 3: READING}, silent=(2,))
    assert text.splitlines() == [
        "rank 2 (process 777 on node1) sends no heartbeat: its process is gone; last seen in iteration 11, "
        "optimizer step, for 0 s; last collective: gloo:all_gather number 3 of default_pg, unfinished",
        "  ranks 0-1: iteration 12, agreeing on the step, for 61 s; last collective: gloo:all_gather number 3 of "
        "default_pg, unfinished",
        "  rank 3: iteration 12, reading data, for 61 s",
    ]


def test_a_failed_rank_is_named_before_silent_ones() -> None:
    failed = replace(READING, status="MemoryError: no memory")
    text = judged({0: WAITING, 1: failed, 2: WAITING, 3: WAITING}, silent=(2,))
    assert text.startswith("rank 1 failed (MemoryError: no memory) in iteration 12, reading data")


def test_a_rank_outside_any_collective_is_named_even_if_it_is_ahead() -> None:
    computing = replace(READING, phase="forward and backward, micro-batch 2 of 4", marks=60)
    text = judged({0: computing, 1: WAITING, 2: WAITING, 3: WAITING})
    assert text.startswith("every rank is alive, and the others wait for rank 0, outside any collective: iteration 12")


def test_the_rank_furthest_behind_is_named_when_all_wait() -> None:
    behind = replace(WAITING, marks=44, phase="losses")
    text = judged({0: WAITING, 1: WAITING, 2: WAITING, 3: behind})
    assert text.startswith("every rank is alive, and the others wait for rank 3, furthest behind: iteration 12, losses")
    assert judged(dict.fromkeys(range(4), WAITING)).startswith("every rank is alive and they wait for each other")


def test_a_rank_without_any_heartbeat_never_started() -> None:
    assert judged({0: WAITING, 3: WAITING}).startswith("ranks 1-2 never started")


def test_a_rank_that_ended_is_not_reported_as_dead() -> None:
    text = judged({0: WAITING, 1: replace(WAITING, status=ENDED), 2: READING, 3: WAITING}, silent=(1,))
    assert "wait for rank 2" in text and "rank 1: ended" in text


@pytest.mark.parametrize(
    ("numbers", "text"), [([3], "rank 3"), ([4, 0, 2, 3], "ranks 0, 2-4"), (range(8), "ranks 0-7")]
)
def test_consecutive_ranks_are_written_as_ranges(numbers: list[int], text: str) -> None:
    assert ranks(numbers) == text
