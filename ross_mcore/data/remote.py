"""Shards behind URLs: the version of a shard, and a bounded cache of whole shards on the local disk.

The processes of a machine share the cache, a folder on a local disk (its locks are `flock`). A shard is fetched once,
under a temporary name; at the limit the least recently used ones are removed. A shard that is being read is kept, so
the limit can be exceeded during a read. If the folder is deleted, shards are fetched again. fsspec's own caches have no
limit.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ross_mcore.errors import RemoteError

DEFAULT_CACHE_BYTES = 64 << 30
ATTEMPTS = 3
PAUSE_SECONDS = 1.0
"""Pause before the second attempt to fetch a shard, doubled before the third."""
STALE_SECONDS = 24 * 3600
"""Age at which an unfinished download is removed."""


def is_remote(location: str) -> bool:
    """Whether a shard's place is a URL."""
    return "://" in location


def file_system(location: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a URL, with credentials from the environment.

    Raises RemoteError, with the package to install, if no installed package reads this kind of URL.
    """
    try:
        import fsspec
    except ImportError:
        raise RemoteError(f"{location}: reading URLs needs fsspec (pip install fsspec)") from None
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(location)
        return found
    except ImportError as error:
        protocol = location.partition("://")[0]
        raise RemoteError(
            f"{location}: {protocol}:// needs a package that is not installed: {error} "
            f"(python -m pip install 'fsspec[{protocol.replace('https', 'http')}]')"
        ) from None
    except ValueError as error:
        raise RemoteError(f"{location}: {error}") from None


def identify(location: str) -> tuple[int, str | None]:
    """(size in bytes, tag of this version of the content or None if the store has none). Raises RemoteError."""
    files, path = file_system(location)
    try:
        details = {str(name).lower(): value for name, value in files.info(path).items()}
    except Exception as error:  # every store has its own types
        raise RemoteError(f"{location}: {type(error).__name__}: {error}") from None
    size = details.get("size")
    if type(size) is not int:
        raise RemoteError(f"{location}: the store does not give its size")
    for name in ("etag", "md5hash", "crc32c", "content_md5", "mtime", "last_modified", "lastmodified", "created"):
        if details.get(name):
            return size, f"{name}={details[name]}"
    return size, None


def list_shards(pattern: str) -> list[str]:
    """The sorted URLs of the tars that match a URL with `*` or are in a folder. Raises RemoteError."""
    files, path = file_system(pattern)
    try:
        if "*" not in path and "?" not in path:
            if not files.isdir(path):
                return [pattern]
            path = f"{path.rstrip('/')}/*.tar"
        return sorted(files.unstrip_protocol(name) for name in files.glob(path))
    except Exception as error:
        raise RemoteError(f"{pattern}: {type(error).__name__}: {error}") from None


class ShardCache:
    """Whole shards in `folder`, at most `limit` bytes; any number of processes can share it."""

    def __init__(self, folder: Path, limit: int = DEFAULT_CACHE_BYTES) -> None:
        self.folder, self.limit = folder, limit

    def path(self, location: str, tag: str | None) -> Path:
        """The local path of a version of a shard."""
        return self.folder / f"{hashlib.sha256(repr((location, tag)).encode()).hexdigest()[:32]}.tar"

    @contextmanager
    def open(self, location: str, size: int, tag: str | None) -> Iterator[int]:
        """A descriptor of the shard's local copy, which is fetched if needed and kept while it is open.

        Raises RemoteError when the shard cannot be fetched, has changed or is larger than the cache.
        """
        path = self.path(location, tag)
        descriptor = self._open(path, size)
        for _ in range(ATTEMPTS):
            if descriptor is None:
                with contextlib.suppress(FileNotFoundError):  # the folder was deleted during the download
                    descriptor = self._fetch(path, location, size, tag)
        if descriptor is None:
            raise RemoteError(f"{path} is deleted as soon as it is written; find out what deletes {self.folder}")
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self, path: Path, size: int) -> int | None:
        """A descriptor, with a shared lock, of a complete copy; None if there is none."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # does not wait for a pipe
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RemoteError(f"{path} cannot be read: {error.strerror}; give another --data-cache-dir") from None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:  # changed by another program
            os.close(descriptor)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise RemoteError(f"{path} is in the way: {error.strerror}; remove it") from None
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return descriptor

    def _fetch(self, path: Path, location: str, size: int, tag: str | None) -> int | None:
        if size > self.limit:
            raise RemoteError(
                f"{location} has {size} bytes and the cache {self.folder} may hold {self.limit}: "
                "raise --data-cache-bytes to several shards"
            )
        with self._locked(path.with_suffix(".lock").name):
            descriptor = self._open(path, size)  # another process may have fetched it meanwhile
            if descriptor is not None:
                return descriptor
            partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
            try:
                with self._locked("room.lock"):
                    self.make_room(size)
                    partial.touch()
                    os.truncate(partial, size)  # so that other processes count its bytes from now on
                _download(location, partial, size, tag)
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)
            return self._open(path, size)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Holds a lock in the folder; the system releases it when the process ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def make_room(self, size: int) -> None:
        """Removes the least recently used copies that are not open until `size` more bytes are within the limit."""
        kept, held = [], size
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix == ".partial" and status.st_mtime < time.time() - STALE_SECONDS:
                    path.unlink()
                elif path.suffix in (".tar", ".partial"):
                    held += status.st_size
                if path.suffix == ".tar":
                    kept.append((status.st_mtime_ns, status.st_size, path))
        for _, bytes_, path in sorted(kept):
            if held <= self.limit:
                return
            if _remove_unless_open(path):
                held -= bytes_


def _remove_unless_open(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        path.with_suffix(".lock").unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _download(location: str, target: Path, size: int, tag: str | None) -> None:
    """Copies the shard to `target`. Raises RemoteError after ATTEMPTS, or at once for another version of it."""
    files, path = file_system(location)
    found_size, found_tag = identify(location)
    if found_size != size or (tag is not None and found_tag != tag):
        raise RemoteError(
            f"{location} is not what was indexed: {found_size} bytes, {found_tag} instead of {size} bytes, {tag}; "
            "index it again (python tools/index_shards.py)"
        )
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with files.open(path, "rb") as source, target.open("r+b") as copy:
                shutil.copyfileobj(source, copy, 8 << 20)
                copied = copy.tell()
            if copied == size:
                return
            problem = f"{copied} of {size} bytes came"
        except FileNotFoundError:
            if not target.exists():  # the cache was deleted during the download
                raise
            problem = "the store no longer has it"
        except Exception as error:  # every store has its own types
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RemoteError(f"{target.parent} is full: {error}; lower --data-cache-bytes") from None
            problem = f"{type(error).__name__}: {error}"
        if attempt < ATTEMPTS:
            time.sleep(PAUSE_SECONDS * attempt)
    raise RemoteError(f"{location} could not be fetched in {ATTEMPTS} attempts: {problem}")
