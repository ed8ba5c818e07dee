"""Runs a tool in a process forked from one that has imported everything, with limits and an audit hook."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tests.soak.fuzz import acts

ROOT = Path(__file__).parents[3]
FILE_BYTES = 256 << 20
_loaded: dict[str, ModuleType] = {}


@dataclass(frozen=True)
class Limits:
    """What a case may take; a valid one takes about a second and a few MiB.

    cpu_seconds, wall_seconds: CPU time is what counts, because tests share their machine. idle_seconds: without any
    CPU time at all, as when a pipe is read to which nobody writes. address_bytes: room beyond what the imports take,
    most of it reservations of gloo and the allocator. peak_bytes: memory really used beyond what the imports take, of
    all processes of the case together.
    """

    cpu_seconds: int = 30
    wall_seconds: float = 120.0
    idle_seconds: float = 15.0
    address_bytes: int = 3 << 30
    peak_bytes: int = 768 << 20


LIMITS = Limits()


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit status, negative for a signal, None when it had to be stopped, for the reason `hung`.

    acts: what it did and has no business to do, see acts.py. left: processes of its that were still there.
    """

    status: int | None
    stdout: str
    stderr: str
    peak_bytes: int
    seconds: float
    hung: str | None = None
    acts: tuple[str, ...] = ()
    left: int = 0


def run(
    script: str,
    arguments: Sequence[str],
    folder: Path,
    log: Path,
    modules: Path | None = None,
    limits: Limits = LIMITS,
    writable: Sequence[str] = ("out", "tmp"),
) -> Outcome:
    """Runs `main()` of a script with `folder` as working directory; output goes to `log`.out, .err and .acts.

    The caller must have one thread only. `modules`: a file for the names of the modules that the run imported.
    `writable`: the folders below `folder` that it may write to.
    """
    require_one_thread()
    script_module(script)
    base = _memory_bytes(os.getpid(), "RssAnon")
    resident = _memory_bytes(os.getpid(), "VmRSS")
    started = time.monotonic()
    child = os.fork()
    if not child:
        _be_child(script, arguments, folder, log, modules, limits, [folder / name for name in writable])
    status, usage, hung, peak, left = _wait(child, started, limits, base)
    if usage is not None:
        peak = max(peak, usage.ru_maxrss * 1024 - resident)
    stdout, stderr, done = (
        log.with_suffix(suffix).read_text("utf-8", "replace") for suffix in (".out", ".err", ".acts")
    )
    seconds = time.monotonic() - started
    return Outcome(status, stdout, stderr, peak, seconds, hung, tuple(done.splitlines()), left)


def require_one_thread() -> None:
    """Forking a process with threads may leave locks held for ever in the child."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(
            f"this process has {threads} threads; cases have to be forked from one that has a single one"
        )


def script_module(script: str) -> ModuleType:
    """A script of this repository as a module, imported once."""
    if script not in _loaded:
        path = ROOT / script
        spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        _loaded[script] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_loaded[script])
    return _loaded[script]


def _wait(
    child: int, started: float, limits: Limits, base: int
) -> tuple[int | None, resource.struct_rusage | None, str | None, int, int]:
    """(status, usage, why it was stopped, peak memory beyond `base`, remaining processes)."""
    pause, peak, ticks, moved = 0.002, 0, -1, started
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        now = time.monotonic()
        if found:
            code = os.waitstatus_to_exitcode(status)
            left = _still_there(child)
            _kill_session(child)
            cpu = f"it used {limits.cpu_seconds} s of CPU time" if code in (-signal.SIGXCPU, -signal.SIGKILL) else None
            used = usage.ru_utime + usage.ru_stime
            if cpu is not None and used >= limits.cpu_seconds - 1:
                return None, usage, cpu, peak, left
            return code, usage, None, peak, left
        members = _session(child)
        used_memory = sum(
            max(0, _memory_bytes(pid, "RssAnon") + _memory_bytes(pid, "RssShmem") - base) for pid in members
        )
        peak, spent = max(peak, used_memory), sum(map(_ticks, members))
        if spent != ticks:
            ticks, moved = spent, now
        why = None
        if now - started > limits.wall_seconds:
            why = f"stopped after {limits.wall_seconds:g} s"
        elif now - moved > limits.idle_seconds:
            why = f"it did nothing for {limits.idle_seconds:g} s"
        if why is not None:
            _kill_session(child)
            _, _, usage = os.wait4(child, 0)
            return None, usage, why, peak, 0
        time.sleep(pause)
        pause = min(0.02, pause * 1.3)


def _still_there(child: int) -> int:
    """Processes of a session whose leader has ended, after a moment to end themselves."""
    for _ in range(50):
        left = len(_session(child))
        if not left:
            return 0
        time.sleep(0.02)
    return left


def _session(leader: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208  several times a second
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.getsid(int(name)) == leader:
                    found.append(int(name))
    return found


def _kill_session(leader: int) -> None:
    for pid in _session(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _be_child(
    script: str,
    arguments: Sequence[str],
    folder: Path,
    log: Path,
    modules: Path | None,
    limits: Limits,
    writable: Sequence[Path],
) -> None:
    """The child from the fork to its end, as Python would run the script."""
    status = 70
    try:
        os.setsid()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        for number, path in ((1, log.with_suffix(".out")), (2, log.with_suffix(".err"))):
            descriptor = os.open(path, flags, 0o644)
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, encoding="utf-8", errors="backslashreplace") for n in (1, 2))
        acts_file = os.open(log.with_suffix(".acts"), flags | os.O_APPEND, 0o644)
        _limit(limits)
        os.chdir(folder)
        os.environ["TMPDIR"] = str(folder / "tmp")
        import tempfile

        tempfile.tempdir = None
        sys.argv = [str(ROOT / script), *arguments]
        sys.dont_write_bytecode = True
        known = set(sys.modules)
        acts.watch(acts_file, writable)
        status = _status_of(script)
        if modules is not None:
            os.write(os.open(modules, flags, 0o644), "\n".join(n for n in sys.modules if n not in known).encode())
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _status_of(script: str) -> int:
    try:
        code = script_module(script).main()
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    return int(code or 0)


def _limit(limits: Limits) -> None:
    room = _memory_bytes(os.getpid(), "VmSize") + limits.address_bytes
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _memory_bytes(pid: int, name: str) -> int:
    """A line of /proc/PID/status; 0 for a process that has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{name}:")), 0)


def _ticks(pid: int) -> int:
    """CPU time of a process, in the kernel's ticks; 0 for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])
