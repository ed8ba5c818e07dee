"""One run of a tool in a process of its own, forked from one that has everything imported: cheap, bounded, watched."""

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

ROOT = Path(__file__).parents[3]
CPU_SECONDS = 30
"""Of one case; a valid one takes about one. Counted in CPU time because tests share their machine."""
WALL_SECONDS = 120
ADDRESS_BYTES = 3 << 30
"""Room for one case beyond what the imports take; gloo's and the allocator's reservations are most of it."""
PEAK_BYTES = 768 << 20
"""Most memory that a case may really use beyond what the imports take."""
FILE_BYTES = 256 << 20
_loaded: dict[str, ModuleType] = {}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit status, negative for a signal, None when it had to be stopped."""

    status: int | None
    stdout: str
    stderr: str
    peak_bytes: int
    seconds: float


def run(script: str, arguments: Sequence[str], folder: Path, log: Path, modules: Path | None = None) -> Outcome:
    """Runs `main()` of a script with `folder` as working directory; output goes to `log`.out and `log`.err.

    The caller must have one thread only. `modules`: a file for the names of the modules that the run imported.
    """
    require_one_thread()
    script_module(script)
    before = _memory_bytes("VmRSS")
    started = time.monotonic()
    child = os.fork()
    if not child:
        _be_child(script, arguments, folder, log, modules)
    status, usage = _wait(child, started + WALL_SECONDS)
    texts = [log.with_suffix(suffix).read_text("utf-8", "replace") for suffix in (".out", ".err")]
    peak = usage.ru_maxrss * 1024 - before if usage is not None else 0
    return Outcome(status, *texts, peak, time.monotonic() - started)


def require_one_thread() -> None:
    """Forking a process with threads may leave locks held for ever in the child."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(
            f"this process has {threads} threads; cases have to be forked from one that has a single one"
        )


def script_module(script: str) -> ModuleType:
    """A script of this repository as a module, loaded once."""
    if script not in _loaded:
        path = ROOT / script
        spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        _loaded[script] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_loaded[script])
    return _loaded[script]


def _wait(child: int, deadline: float) -> tuple[int | None, resource.struct_rusage | None]:
    pause = 0.002
    while time.monotonic() < deadline:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            _kill_group(child)  # what it may have left running
            return os.waitstatus_to_exitcode(status), usage
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    _kill_group(child)
    _, _, usage = os.wait4(child, 0)
    return None, usage


def _kill_group(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def _be_child(script: str, arguments: Sequence[str], folder: Path, log: Path, modules: Path | None) -> None:
    """The child from the fork to its end, as Python would run the script."""
    status = 70
    try:
        os.setsid()
        for number, path in ((1, log.with_suffix(".out")), (2, log.with_suffix(".err"))):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", errors="backslashreplace") for n in (1, 2))
        _limit()
        os.chdir(folder)
        os.environ["TMPDIR"] = str(folder / "tmp")
        import tempfile

        tempfile.tempdir = None
        sys.argv = [str(ROOT / script), *arguments]
        known = set(sys.modules)
        status = _status_of(script)
        if modules is not None:
            modules.write_text("\n".join(name for name in sys.modules if name not in known))
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


def _limit() -> None:
    room = _memory_bytes("VmSize") + ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _memory_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
