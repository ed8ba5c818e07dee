from __future__ import annotations

from dataclasses import replace

import pytest

from ross_mcore.guards.verdict import ENDED, Beat, ranks, verdict

WAITING = Beat(7, "node1", 100, 12, "agreeing on the step", 50, 61.0, "gloo:all_gather number 3 of default_pg", True)
READING = replace(WAITING, phase="reading data", marks=49, waits=False, collective="")


def judged(after: dict[int, Beat], silent: tuple[int, ...] = (), world_size: int = 4) -> str:
    before = {rank: beat if rank in silent else replace(beat, count=beat.count - 2) for rank, beat in after.items()}
    return verdict(before, after, world_size, {2: ": its process is gone"})


def test_a_silent_rank_is_named_with_what_became_of_it_and_where_the_others_wait() -> None:
    lost = replace(WAITING, process=777, iteration=11, phase="optimizer step", seconds=0.4)
    text = judged({0: WAITING, 1: WAITING, 2: lost, 3: READING}, silent=(2,))
    assert text.splitlines() == [
        "rank 2 (process 777 on node1) gives no sign of life: its process is gone; last heard of in iteration 11, "
        "optimizer step, for 0 s; last collective: gloo:all_gather number 3 of default_pg, unfinished",
        "  ranks 0-1: iteration 12, agreeing on the step, for 61 s; last collective: gloo:all_gather number 3 of "
        "default_pg, unfinished",
        "  rank 3: iteration 12, reading data, for 61 s",
    ]


def test_a_rank_that_failed_is_the_cause_of_those_that_fell_silent_after_it() -> None:
    failed = replace(READING, status="MemoryError: no memory")
    text = judged({0: WAITING, 1: failed, 2: WAITING, 3: WAITING}, silent=(2,))
    assert text.startswith("rank 1 failed (MemoryError: no memory) in iteration 12, reading data")


def test_of_living_ranks_the_one_that_waits_for_nobody_holds_up_the_rest_though_it_be_ahead() -> None:
    computing = replace(READING, phase="forward and backward, micro-batch 2 of 4", marks=60)
    text = judged({0: computing, 1: WAITING, 2: WAITING, 3: WAITING})
    assert text.startswith("every rank is alive, and the others wait for rank 0, not waiting for any: iteration 12")


def test_of_ranks_that_all_wait_the_one_that_is_behind_is_named() -> None:
    behind = replace(WAITING, marks=44, phase="losses")
    text = judged({0: WAITING, 1: WAITING, 2: WAITING, 3: behind})
    assert text.startswith("every rank is alive, and the others wait for rank 3, behind them: iteration 12, losses")
    assert judged(dict.fromkeys(range(4), WAITING)).startswith("every rank is alive and they wait for each other")


def test_a_rank_without_any_heartbeat_never_came_up() -> None:
    assert judged({0: WAITING, 3: WAITING}).startswith("ranks 1-2 never came up")


def test_a_rank_that_ended_is_not_taken_for_dead() -> None:
    text = judged({0: WAITING, 1: replace(WAITING, status=ENDED), 2: READING, 3: WAITING}, silent=(1,))
    assert "wait for rank 2" in text and "rank 1: ended" in text


@pytest.mark.parametrize(
    ("numbers", "text"), [([3], "rank 3"), ([4, 0, 2, 3], "ranks 0, 2-4"), (range(8), "ranks 0-7")]
)
def test_runs_of_ranks_are_written_short(numbers: list[int], text: str) -> None:
    assert ranks(numbers) == text
