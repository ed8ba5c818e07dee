"""A run's lock on its --save folder: two runs would remove each other's unfinished checkpoints and replace good ones.

It is a lock on a file in the folder, which the system releases when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import time
from pathlib import Path
from types import TracebackType

from ross_mcore import checked
from ross_mcore.checkpoint.folder import LOCK, is_iteration, require_renames
from ross_mcore.errors import CheckpointError

WAIT_SECONDS = 10.0
"""How long to wait for a process that is ending, for example after it was killed."""
_OPENED = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_logger = logging.getLogger(__name__)


class Claim:
    """`with Claim(root) as claim:` creates the folder and locks it.

    Raises CheckpointError when it cannot be written, when no folder can be renamed in it, when another process holds
    the lock, or when it is the folder of one checkpoint.
    """

    def __init__(self, root: Path) -> None:
        self.root, self._file = Path(root), -1

    def __enter__(self) -> Claim:
        if is_iteration(self.root):
            raise CheckpointError(f"{self.root} is one checkpoint; give the folder of a run: --save {self.root.parent}")
        self._file = self._acquire()
        try:
            require_renames(self.root)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            if [path.name for path in self.root.iterdir()] == [LOCK]:  # a failed start leaves nothing
                (self.root / LOCK).unlink()
                self.root.rmdir()
        _close(self._file)

    def require(self) -> None:
        """Raises CheckpointError unless this process still holds the folder. Creates it again if it was deleted."""
        held, path = os.fstat(self._file), self.root / LOCK
        try:
            if os.path.samestat(path.stat(), held):
                return
            raise CheckpointError(f"{self.root} was taken by {_owner(path)}: stop one of the two runs")
        except OSError:  # the lock's file is missing
            if _device(self.root) != held.st_dev:
                raise CheckpointError(
                    f"{self.root} is no longer on the file system where the run began: mount that file system again"
                ) from None
        _logger.warning("%s was deleted with all its checkpoints; creating it again", self.root)
        former, self._file = self._file, self._acquire()
        _close(former)

    def _acquire(self) -> int:
        """Locks the lock's file, writes this process's name into it and returns its descriptor."""
        about = json.dumps({"host": socket.gethostname(), "process": os.getpid()}) + "\n"
        file = -1
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = os.open(self.root / LOCK, _OPENED, 0o666)
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, f"its {LOCK} is not a regular file")
            self._lock(file)
            os.ftruncate(file, 0)
            os.pwrite(file, about.encode(), 0)
        except OSError as error:
            _close(file)
            reason = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror
            raise CheckpointError(f"{self.root} cannot be written: {reason}; give another --save") from None
        except CheckpointError:
            _close(file)
            raise
        return file

    def _lock(self, file: int) -> None:
        """Locks for the process, not for the open file: a data worker that outlives the process must not keep it."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    _logger.warning("%s has no locks: a second run with this --save is not detected", self.root)
                    return
                if time.monotonic() > deadline:
                    owner = _owner(self.root / LOCK)
                    raise CheckpointError(
                        f"{self.root} is held by {owner}, which is still running: end it first, or give another --save"
                    ) from None
            time.sleep(0.2)


def _close(file: int) -> None:
    if file >= 0:
        with contextlib.suppress(OSError):  # its file system is gone
            os.close(file)


def _owner(path: Path) -> str:
    """The process named in a lock's file."""
    try:
        about = checked.mapping(checked.read_json(path), "it")
        return f"process {checked.count(about, 'process')} on {checked.shown(about.get('host'))}"
    except (OSError, ValueError):
        return "another process"


def _device(path: Path) -> int | None:
    """The device of the file system that a path is on, or would be on."""
    for folder in (path.absolute(), *path.absolute().parents):
        with contextlib.suppress(OSError):
            return folder.stat().st_dev
    return None
