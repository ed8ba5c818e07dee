"""Ends all ranks, with a message that names the cause, when one rank died or is blocked.

Every rank has three threads. One writes heartbeats to the store of the process group: the place of its process and the
last collective it entered. One watches its own process for progress. One watches the heartbeats of the next rank, so
that a rank that died is noticed although a collective waits for it without an error. After too long without progress,
a lost rank or a failed collective, the heartbeats of all ranks are read twice to find the rank that blocks the others.
Nothing here touches the device.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeVar

import torch.distributed as dist

from ross_mcore import platform
from ross_mcore.engine import progress
from ross_mcore.guards.verdict import ENDED, RUNNING, Heartbeat, verdict
from ross_mcore.launcher import record_failure
from ross_mcore.logs import complain
from ross_mcore.parallel.groups import last_collective

T = TypeVar("T")

LOST_A_RANK = 3
"""Exit status of a rank that ended because another died or is blocked."""
LONGEST_BEAT_SECONDS = 5.0
BEATS_OF_A_TIMEOUT = 40
BEATS_TO_FALL_SILENT = 3
BEATS_TO_BE_LOST = 4
"""Beats without a heartbeat after which a rank on another machine is lost; LONG_PHASE times as many in a phase marked
long. On the same machine a rank is lost when its process has ended: a silent one may hold the interpreter's lock for
long, or be stopped for a while."""
STORE_SECONDS = 15.0
"""How long after the store is gone this process may still run: at the end of a run its owner may end first."""
LONG_PHASE = 3
"""Timeout multiplier of phases marked long. Ranks that wait for such a phase in a collective wait one timeout."""
GONE, ZOMBIE = ": its process is gone", ": its process has ended"
_VERDICT, _CLAIMS = "watchdog/verdict", "watchdog/claims"


class StoreGone(RuntimeError):
    """The store of the process group does not answer."""


class Watchdog:
    """Watches from `__enter__` to `__exit__`; does nothing in a run of one process.

    timeout_seconds: that of collectives. The watchdog ends the process with LOST_A_RANK a little earlier. Time is
    counted in heartbeats, so the time in which a whole job was suspended does not count.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._beat_seconds = min(LONGEST_BEAT_SECONDS, timeout_seconds / BEATS_OF_A_TIMEOUT)
        self._patience = int(0.9 * timeout_seconds / self._beat_seconds)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._ended = threading.Event()
        self._explaining = threading.Lock()
        self._count, self._status = 0, RUNNING
        self._moved_at = time.monotonic()
        self._seen = progress.here()

    def __enter__(self) -> Watchdog:
        if self._world_size > 1:
            store = dist.distributed_c10d._get_default_store()
            # a connection each: one may be blocked
            self._beating, self._asking = store.clone(), store.clone()  # type: ignore[attr-defined]  # torch's stub lacks it
            for target in (self._beat, self._watch, self._watch_next):
                threading.Thread(target=target, daemon=True, name=f"watchdog {target.__name__}").start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._world_size == 1:
            return
        if error is not None and platform.is_collective_failure(error):
            self.explain(f"a collective failed: {' '.join(str(error).split())[:300]}")
        self._status = ENDED if error is None else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        with contextlib.suppress(RuntimeError):  # the store may be part of rank 0, which may have ended before
            self._publish()
        self._ended.set()

    def explain(self, trouble: str) -> NoReturn:
        """Finds the rank that blocks this one, prints it once per machine, and ends the process."""
        with self._explaining:
            own_host = socket.gethostname()
            try:
                cause, by = self._bounded(lambda: self._found_by_another() or self._find_cause())
            except StoreGone:
                where = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
                place = f"{where} on {os.environ.get('MASTER_ADDR', 'the first machine')}"
                self._print(trouble, f"{place}, which holds the ranks' store, does not answer: it died or is blocked")
                os._exit(LOST_A_RANK)
            is_first_of_another_machine = os.environ.get("LOCAL_RANK") == "0" and by.split()[0] != own_host
            if by == f"{own_host} {self._rank}" or is_first_of_another_machine:
                self._print(trouble, cause)
            time.sleep(2 * self._beat_seconds)  # this process may hold the store, which other ranks still read
            os._exit(LOST_A_RANK)

    def _print(self, trouble: str, cause: str) -> None:
        """Prints the cause, and leaves it for torchrun."""
        text = (
            f"pretrain_ross.py: error: rank {self._rank}: {trouble}\n{cause}\n"
            "The newest complete checkpoint is intact; the same command continues from it."
        )
        record_failure(text)
        complain(text)

    def _beat(self) -> None:
        try:
            self._publish()  # at once: a rank that dies soon is reported as one that did start
            while not self._ended.wait(self._beat_seconds):
                self._publish()
                if self._beating.check([_VERDICT]):
                    self.explain("ended because others did")
        except RuntimeError:  # the store's process has ended
            if not self._ended.wait(STORE_SECONDS):
                self.explain("the store of the ranks is gone")

    def _watch_next(self) -> None:
        """Watches one other rank, so that the store serves few requests; a rank that finds a loss reports to all."""
        other = (self._rank + 1) % self._world_size
        silent, last = 0, None
        with contextlib.suppress(RuntimeError):  # the other thread reports that the store is gone
            while not self._ended.wait(self._beat_seconds):
                beat = self._heartbeat(other)
                silent, last = silent + 1 if beat == last else 0, beat
                if (loss := _loss(beat, silent)) is not None:
                    self.explain(f"rank {other} {loss}")

    def _watch(self) -> None:
        """Counts heartbeats without progress of this process."""
        beats = 0
        while not self._ended.wait(self._beat_seconds):
            place = progress.here()
            beats = beats + 1 if place is self._seen else 0
            if place is not self._seen:
                self._seen, self._moved_at = place, time.monotonic()
            if beats > self._patience * (LONG_PHASE if place.is_long else 1):
                waited = beats * self._beat_seconds
                self.explain(
                    f"no progress for {waited:.0f} s in iteration {place.iteration}, {place.phase} (if that is too "
                    "short, raise --distributed-timeout-minutes)"
                )

    def _publish(self) -> None:
        self._count += 1
        place = progress.here()
        collective, waits = last_collective()
        beat = Heartbeat(
            self._count,
            socket.gethostname(),
            os.getpid(),
            place.iteration,
            place.phase,
            place.marks,
            time.monotonic() - self._moved_at,
            collective,
            waits,
            self._status,
            place.is_long,
            _process_table(),
        )
        self._beating.set(f"watchdog/{self._rank}", json.dumps(asdict(beat)))

    def _found_by_another(self) -> tuple[str, str] | None:
        """The verdict and the rank that found it, when another rank is or was looking for it."""
        if self._asking.add(_CLAIMS, 1) > 1:
            try:
                self._asking.wait([_VERDICT], timedelta(seconds=3 * BEATS_TO_FALL_SILENT * self._beat_seconds))
                found = json.loads(self._asking.get(_VERDICT))
                return found["verdict"], found["by"]
            except dist.DistStoreError:
                return None  # the other rank ended before it was done
        return None

    def _find_cause(self) -> tuple[str, str]:
        before = self._heartbeats()
        time.sleep(BEATS_TO_FALL_SILENT * self._beat_seconds)
        after = self._heartbeats()
        processes = {rank: _process_state(beat) for rank, beat in after.items()}
        by = f"{socket.gethostname()} {self._rank}"
        found = verdict(before, after, self._world_size, processes)
        self._asking.set(_VERDICT, json.dumps({"verdict": found, "by": by}))
        return found, by

    def _heartbeats(self) -> dict[int, Heartbeat]:
        found = {}
        for rank in range(self._world_size):
            if (beat := self._heartbeat(rank)) is not None:
                found[rank] = beat
        return found

    def _heartbeat(self, rank: int) -> Heartbeat | None:
        key = f"watchdog/{rank}"
        return Heartbeat(**json.loads(self._asking.get(key))) if self._asking.check([key]) else None

    def _bounded(self, action: Callable[[], T]) -> T:
        """Runs `action` in a thread, because calls of the store may block. Raises StoreGone when it gets no answer."""
        results: list[T] = []

        def run() -> None:
            try:
                results.append(action())
            except RuntimeError:
                return

        asking = threading.Thread(target=run, daemon=True)
        asking.start()
        asking.join(5 * BEATS_TO_FALL_SILENT * self._beat_seconds)
        if not results:
            raise StoreGone
        return results[0]


def _loss(beat: Heartbeat | None, silent: int) -> str | None:
    """What happened to a rank, None if it is not lost; silent: beats since its last heartbeat."""
    if beat is None:  # it died before its first heartbeat, or is about to send it
        return "never started" if silent >= LONG_PHASE * BEATS_TO_BE_LOST else None
    if beat.status == ENDED or not silent:
        return None
    if beat.status != RUNNING:  # time for this rank to fail with the same error
        return "failed" if silent >= BEATS_TO_FALL_SILENT else None
    if beat.processes and beat.processes == _process_table():
        return "is gone" if _process_state(beat) in (GONE, ZOMBIE) else None
    return "is lost" if silent >= BEATS_TO_BE_LOST * (LONG_PHASE if beat.is_long else 1) else None


@functools.cache
def _process_table() -> str:
    """Identifies this system and its numbering of processes, which each container may have; "" when unknown."""
    try:
        booted = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{booted} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _process_state(beat: Heartbeat) -> str:
    """The state of a process that has stopped or ended, as text; "" when it runs or cannot be seen from here."""
    if not beat.processes or beat.processes != _process_table():
        return ""
    try:
        state = Path(f"/proc/{beat.process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return GONE
    return {"T": ": its process is stopped (SIGSTOP)", "t": ": a debugger stopped its process", "Z": ZOMBIE}.get(
        state, ""
    )
