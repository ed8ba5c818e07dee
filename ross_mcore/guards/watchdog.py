"""A rank that died or hangs ends the others, with a message that names it, rather than leaving them waiting.

Every rank has two threads. One writes a heartbeat into the store that the ranks met in: where its process is, and the
last collective it entered. The other looks at its own process alone, which costs nothing. When that has not moved
for too long, or when a collective failed, the ranks' heartbeats are read twice: who fell silent, or is furthest behind,
holds up the rest. Nothing here touches the device.
"""

from __future__ import annotations

import contextlib
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
from ross_mcore.guards.verdict import ENDED, RUNNING, Beat, verdict
from ross_mcore.logs import complain
from ross_mcore.parallel.groups import last_collective

T = TypeVar("T")

LOST_A_RANK = 3
"""Exit status of a rank that ended because another died or hangs."""
LONGEST_BEAT_SECONDS = 5.0
BEATS_OF_A_TIMEOUT = 40
BEATS_TO_FALL_SILENT = 3
LONG_PHASE = 3
"""How many timeouts a phase may last that may take long by right. Ranks that wait for it in a collective wait one."""
_VERDICT, _CLAIMS = "watchdog/verdict", "watchdog/claims"


class StoreGone(RuntimeError):
    """The store that the ranks share does not answer. A signal within the watchdog, which ends the process."""


class Watchdog:
    """Watches from `__enter__` to `__exit__`; nothing in a run of one process, which waits for nobody.

    `timeout_seconds` is that of collectives: a little before it, so that none of them ends first, the watchdog ends the
    process with LOST_A_RANK. Time is counted in beats: a job that was suspended as a whole has not hung.
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
            # a connection each: one may be stuck
            self._beating, self._asking = store.clone(), store.clone()  # type: ignore[attr-defined]  # torch's stub lacks it
            for target in (self._beat, self._watch):
                threading.Thread(target=target, daemon=True, name=f"watchdog {target.__name__}").start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._world_size == 1:
            return
        if error is not None and platform.is_collective_failure(error):
            self.explain(f"a collective failed: {' '.join(str(error).split())[:300]}")
        self._status = ENDED if error is None else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        with contextlib.suppress(RuntimeError):  # the store is where rank 0 was, which may have ended before
            self._publish()
        self._ended.set()

    def explain(self, trouble: str) -> NoReturn:
        """Finds out who holds up this rank, says so once a run and machine, and ends the process."""
        with self._explaining:
            try:
                said, host = self._bounded(lambda: self._found_by_another() or self._find_out())
            except StoreGone:
                where = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
                place = f"{where} on {os.environ.get('MASTER_ADDR', 'the first machine')}"
                said, host = f"{place}, where the ranks meet, does not answer: it died or hangs", socket.gethostname()
                self._say(trouble, said)
                os._exit(LOST_A_RANK)
            if host == f"{socket.gethostname()} {self._rank}" or self._speaks_for_another_machine(host):
                self._say(trouble, said)
            time.sleep(2 * self._beat_seconds)  # the store may live in this process, and others have yet to read
            os._exit(LOST_A_RANK)

    def _say(self, trouble: str, said: str) -> None:
        complain(
            f"pretrain_ross.py: error: rank {self._rank}: {trouble}\n{said}\nThe newest complete checkpoint is intact; "
            "the same command continues from it."
        )

    def _speaks_for_another_machine(self, host: str) -> bool:
        return os.environ.get("LOCAL_RANK") == "0" and host.split()[0] != socket.gethostname()

    def _beat(self) -> None:
        try:
            while not self._ended.wait(self._beat_seconds):
                self._publish()
                if self._beating.check([_VERDICT]):
                    self.explain("ended because others did")
        except RuntimeError:
            return  # rank 0 has ended, where the store was, or it has died: then a collective or the other thread tells

    def _watch(self) -> None:
        """Counts beats without progress of this process."""
        beats = 0
        while not self._ended.wait(self._beat_seconds):
            place = progress.here()
            beats = beats + 1 if place is self._seen else 0
            if place is not self._seen:
                self._seen, self._moved_at = place, time.monotonic()
            if beats > self._patience * (LONG_PHASE if place.is_long else 1):
                waited = beats * self._beat_seconds
                self.explain(
                    f"no progress for {waited:.0f} s in iteration {place.iteration}, {place.phase} (too short a time? "
                    "--distributed-timeout-minutes)"
                )

    def _publish(self) -> None:
        self._count += 1
        place = progress.here()
        collective, waits = last_collective()
        beat = Beat(
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
        )
        self._beating.set(f"watchdog/{self._rank}", json.dumps(asdict(beat)))

    def _found_by_another(self) -> tuple[str, str] | None:
        """The verdict and the rank that gave it, waited for when another rank is at it."""
        if self._asking.add(_CLAIMS, 1) > 1:
            try:
                self._asking.wait([_VERDICT], timedelta(seconds=3 * BEATS_TO_FALL_SILENT * self._beat_seconds))
                found = json.loads(self._asking.get(_VERDICT))
                return found["verdict"], found["by"]
            except dist.DistStoreError:
                return None  # whoever was at it ended before it was done
        return None

    def _find_out(self) -> tuple[str, str]:
        before = self._beats()
        time.sleep(BEATS_TO_FALL_SILENT * self._beat_seconds)
        after = self._beats()
        fates = {rank: _fate(beat) for rank, beat in after.items()}
        by = f"{socket.gethostname()} {self._rank}"
        found = verdict(before, after, self._world_size, fates)
        self._asking.set(_VERDICT, json.dumps({"verdict": found, "by": by}))
        return found, by

    def _beats(self) -> dict[int, Beat]:
        found = {}
        for rank in range(self._world_size):
            key = f"watchdog/{rank}"
            if self._asking.check([key]):
                found[rank] = Beat(**json.loads(self._asking.get(key)))
        return found

    def _bounded(self, action: Callable[[], T]) -> T:
        """What `action` returns. Raises StoreGone when it asks the store and gets no answer: its calls may block."""
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


def _fate(beat: Beat) -> str:
    """What became of a process of this machine, as far as the system knows; "" for another machine's."""
    if beat.host != socket.gethostname():
        return ""
    try:
        state = Path(f"/proc/{beat.process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ": its process is gone"
    return {"T": ": its process is stopped (SIGSTOP)", "Z": ": its process has ended"}.get(state, "")
