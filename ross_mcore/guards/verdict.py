"""PURE: what the heartbeats of all ranks, read twice, say about who holds up the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

RUNNING, ENDED = "running", "ended"


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself every few seconds.

    count: of its beats, so that a reader needs no clock in common; host, process: where it runs; iteration, phase,
    marks: its place (progress.Place), seconds: how long it has been there; collective: the last it entered, "" when
    unknown; waits: whether that is unfinished; status: RUNNING, ENDED, or what it failed with.
    """

    count: int
    host: str
    process: int
    iteration: int
    phase: str
    marks: int
    seconds: float
    collective: str = ""
    waits: bool = False
    status: str = RUNNING

    @property
    def place(self) -> str:
        state = "unfinished" if self.waits else "finished"
        last = f"; last collective: {self.collective}, {state}" if self.collective else ""
        return f"iteration {self.iteration}, {self.phase}, for {self.seconds:.0f} s{last}"


def verdict(before: Mapping[int, Beat], after: Mapping[int, Beat], world_size: int, fates: Mapping[int, str]) -> str:
    """Who holds up the others, and where everybody is; one paragraph and a line for every place.

    `before` and `after` are what ranks said, some beats apart; `fates` says of silent ranks what became of their
    processes, where that can be seen. Suspected are, in this order: ranks that failed, ranks that fell silent, ranks
    that wait for no other, ranks that are behind.
    """
    failed = [rank for rank, beat in after.items() if beat.status not in (RUNNING, ENDED)]
    missing = [rank for rank in range(world_size) if rank not in after]
    silent = [
        rank
        for rank, beat in after.items()
        if beat.status == RUNNING and rank in before and beat.count == before[rank].count
    ]
    running = [rank for rank, beat in after.items() if beat.status == RUNNING]
    if failed:
        said = [f"rank {rank} failed ({after[rank].status}) in {after[rank].place}" for rank in failed]
    elif silent:
        said = [
            f"rank {rank} (process {after[rank].process} on {after[rank].host}) gives no sign of life"
            f"{fates.get(rank, '')}; last heard of in {after[rank].place}"
            for rank in silent
        ]
    elif missing:
        said = [f"{ranks(missing)} never came up"]
    else:
        said = [_holding_up(after, running)]
    return "; ".join(said) + "".join(f"\n  {line}" for line in _places(after, {*failed, *silent}))


def _holding_up(beats: Mapping[int, Beat], running: list[int]) -> str:
    """No rank is dead: the one that is not waiting for another, or else the one that has come least far."""
    idle = [rank for rank in running if not beats[rank].waits]
    suspects = idle if 0 < len(idle) < len(running) else running
    least = min((beats[rank].marks for rank in suspects), default=0)
    behind = [rank for rank in suspects if beats[rank].marks == least]
    if len(behind) in (0, len(beats)):
        return "every rank is alive and they wait for each other, all in the same place"
    how = "not waiting for any" if suspects is idle else "behind them"
    where = "; ".join(dict.fromkeys(beats[rank].place for rank in behind))
    return f"every rank is alive, and the others wait for {ranks(behind)}, {how}: {where}"


def _places(beats: Mapping[int, Beat], named: set[int]) -> Iterable[str]:
    """`ranks 0, 2-3: iteration 7, ...` for each place where ranks are that are not `named` yet."""
    found: dict[str, list[int]] = {}
    for rank, beat in sorted(beats.items()):
        if rank not in named:
            found.setdefault(beat.place if beat.status == RUNNING else "ended", []).append(rank)
    return (f"{ranks(numbers)}: {place}" for place, numbers in found.items())


def ranks(numbers: Iterable[int]) -> str:
    """[3] -> `rank 3`; [0, 2, 3, 4] -> `ranks 0, 2-4`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' * (sum(map(len, runs)) > 1)} {text}"
