"""A run's hold on the folder that it saves into: no other run writes there, and the folder stays the same one.

The hold is a lock on a file of the folder, which the system lets go of when the process ends, however it ends. Two runs
with one `--save` would remove each other's half-written checkpoints and replace each other's good ones.
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
from ross_mcore.checkpoint.folder import is_iteration
from ross_mcore.errors import CheckpointError

LOCK = ".lock"
WAIT_SECONDS = 10.0
"""How long a process that is about to end, such as one that was killed, is waited for."""
_OPENED = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_logger = logging.getLogger(__name__)


class Claim:
    """`with Claim(root) as claim:` makes the folder and holds it.

    Raises CheckpointError when it cannot be written into, when another process holds it, or when it is the folder of
    one checkpoint.
    """

    def __init__(self, root: Path) -> None:
        self.root, self._file = Path(root), -1

    def __enter__(self) -> Claim:
        if is_iteration(self.root):
            raise CheckpointError(f"{self.root} is one checkpoint; give the folder of a run: --save {self.root.parent}")
        self._file = self._taken()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            if [path.name for path in self.root.iterdir()] == [LOCK]:  # a start that failed leaves nothing
                (self.root / LOCK).unlink()
                self.root.rmdir()
        _let_go(self._file)

    def require(self) -> None:
        """Raises CheckpointError unless the folder is still held. One that was deleted is made anew."""
        held, path = os.fstat(self._file), self.root / LOCK
        try:
            if os.path.samestat(path.stat(), held):
                return
            raise CheckpointError(f"{self.root} was taken by {_owner(path)}: stop one of the two runs")
        except OSError:  # it is not there
            if _device(self.root) != held.st_dev:
                raise CheckpointError(
                    f"{self.root} is not on the file system of before, which is no longer there: mount it again"
                ) from None
        _logger.warning("%s was deleted, with all checkpoints in it: it is made anew", self.root)
        former, self._file = self._file, self._taken()
        _let_go(former)

    def _taken(self) -> int:
        """A descriptor of the lock's file, held, with this process named in it."""
        about = json.dumps({"host": socket.gethostname(), "process": os.getpid()}) + "\n"
        file = -1
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = os.open(self.root / LOCK, _OPENED, 0o666)
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, f"{LOCK} in it is not a regular file")
            self._lock(file)
            os.ftruncate(file, 0)
            os.pwrite(file, about.encode(), 0)
        except OSError as error:
            _let_go(file)
            reason = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror
            raise CheckpointError(f"{self.root} cannot be written: {reason}; give another --save") from None
        except CheckpointError:
            _let_go(file)
            raise
        return file

    def _lock(self, file: int) -> None:
        """A lock of the process, not of the open file: a data worker that outlives it must not keep it."""
        path, ends = self.root / LOCK, time.monotonic() + WAIT_SECONDS
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    _logger.warning(
                        "%s has no locks: a second run with the same --save would not be noticed", self.root
                    )
                    return
                if time.monotonic() > ends:
                    raise CheckpointError(
                        f"{self.root} is held by {_owner(path)}, which is still running: end it first, or give another "
                        "--save"
                    ) from None
            time.sleep(0.2)


def _let_go(file: int) -> None:
    if file >= 0:
        with contextlib.suppress(OSError):  # on a file system that is gone
            os.close(file)


def _owner(path: Path) -> str:
    """Who says in a lock's file that it is theirs."""
    try:
        about = checked.mapping(checked.read_json(path), "it")
        return f"process {checked.count(about, 'process')} on {checked.shown(about.get('host'))}"
    except (OSError, ValueError):
        return "another process"


def _device(path: Path) -> int | None:
    """That of the file system which a path is on, or would be."""
    for folder in (path.absolute(), *path.absolute().parents):
        with contextlib.suppress(OSError):
            return folder.stat().st_dev
    return None
