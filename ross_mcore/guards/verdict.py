"""Finds the rank that blocks the others, from the heartbeats of all ranks read twice. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

RUNNING, ENDED = "running", "ended"


@dataclass(frozen=True)
class Heartbeat:
    """A rank's heartbeat, sent every few seconds.

    count: number of heartbeats so far, so that no common clock is needed; host, process: where the rank runs;
    iteration, phase, marks: its place (progress.Place); seconds: time spent there; collective: the last one entered, ""
    when unknown; waits: whether that collective is unfinished; status: RUNNING, ENDED or the error it failed with;
    is_long: whether its phase is marked long; processes: the system in which `process` is its number.
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
    is_long: bool = False
    processes: str = ""

    @property
    def place(self) -> str:
        state = "unfinished" if self.waits else "finished"
        last = f"; last collective: {self.collective}, {state}" if self.collective else ""
        return f"iteration {self.iteration}, {self.phase}, for {self.seconds:.0f} s{last}"


def verdict(
    before: Mapping[int, Heartbeat], after: Mapping[int, Heartbeat], world_size: int, processes: Mapping[int, str]
) -> str:
    """The ranks that block the others, and where all ranks are: one paragraph, then a line for every place.

    before, after: the ranks' heartbeats, read some time apart; processes: the known states of ranks' processes.
    Suspected are, in this order: ranks that failed, ranks without new heartbeats, ranks that never sent one, ranks
    outside any collective, ranks furthest behind.
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
        suspects = [f"rank {rank} failed ({after[rank].status}) in {after[rank].place}" for rank in failed]
    elif silent:
        suspects = [
            f"rank {rank} (process {after[rank].process} on {after[rank].host}) sends no heartbeat"
            f"{processes.get(rank, '')}; last seen in {after[rank].place}"
            for rank in silent
        ]
    elif missing:
        suspects = [f"{ranks(missing)} never started"]
    else:
        suspects = [_blocking(after, running)]
    return "; ".join(suspects) + "".join(f"\n  {line}" for line in _places(after, {*failed, *silent}))


def _blocking(beats: Mapping[int, Heartbeat], running: list[int]) -> str:
    """All ranks are alive: names those outside any collective or, if there are none, those furthest behind."""
    idle = [rank for rank in running if not beats[rank].waits]
    suspects = idle if 0 < len(idle) < len(running) else running
    least = min((beats[rank].marks for rank in suspects), default=0)
    behind = [rank for rank in suspects if beats[rank].marks == least]
    if len(behind) in (0, len(beats)):
        return "every rank is alive and they wait for each other, all in the same place"
    how = "outside any collective" if suspects is idle else "furthest behind"
    where = "; ".join(dict.fromkeys(beats[rank].place for rank in behind))
    return f"every rank is alive, and the others wait for {ranks(behind)}, {how}: {where}"


def _places(beats: Mapping[int, Heartbeat], named: set[int]) -> Iterable[str]:
    """`ranks 0, 2-3: iteration 7, ...` for each place of ranks that are not yet `named`."""
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
