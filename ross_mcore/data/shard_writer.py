"""Writing a data set folder (see shards.py): tars by `webdataset`, then an index of what really stands in them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ross_mcore.data.shards import (
    FORMAT,
    FORMAT_VERSION,
    IMAGE_ROW,
    IMAGE_SUFFIXES,
    MAX_IMAGE_BYTES,
    MAX_RECORD_BYTES,
    SAMPLE_ROW,
    UNKNOWN_LENGTH,
    LengthSource,
    ShardError,
)


@dataclass(frozen=True)
class Member:
    """One sample's place in a tar: (offset, size) in bytes of its JSON and of its pictures, in order."""

    key: str
    record: tuple[int, int]
    images: tuple[tuple[int, int], ...]


def scan_shard(path: Path) -> list[Member]:
    """Reads the headers of a tar, seeking over the contents.

    Raises ShardError when the tar is damaged, or a key comes twice or has no JSON.
    """
    places: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                key, _, suffix = member.name.partition(".")
                found = places.setdefault(key, {})
                if suffix in found:
                    raise ShardError(f"{path}: two members are named {member.name}")
                found[suffix] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise ShardError(f"{path} is not a readable tar: {error}") from None
    members = []
    for key, found in places.items():
        if "json" not in found:
            raise ShardError(f"{path}: sample {key} has no .json member")
        pictures = sorted(
            (int(number or 0), place)
            for suffix, place in found.items()
            for number, _, kind in [suffix.rpartition(".")]
            if kind in IMAGE_SUFFIXES and (number.isdigit() or not number)
        )
        members.append(Member(key, found["json"], tuple(place for _, place in pictures)))
    return members


class ShardWriter:
    """Writes a data set folder in one piece: under a temporary name beside `out`, renamed when complete.

    A context manager. An exception inside it leaves nothing behind. Raises ShardError when `out` exists and is not
    empty, unless `overwrite` and `out` is itself a data set.
    """

    def __init__(
        self,
        out: Path,
        *,
        max_samples: int = 10_000,
        max_bytes: int = 1 << 30,
        length_source: LengthSource | None = None,
        overwrite: bool = False,
    ) -> None:
        self.out = Path(out).absolute()
        self._max_samples, self._max_bytes = max_samples, max_bytes
        self._length_source = length_source
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            if not overwrite:
                raise ShardError(f"{out} exists and is not empty; choose another folder or pass --overwrite")
            if not (self.out / "index.json").is_file():
                raise ShardError(f"{out} holds no index.json, so it is not a data set and will not be overwritten")
        self._shards: list[dict[str, Any]] = []
        self._samples: list[NDArray[np.void]] = []
        self._images: list[NDArray[np.void]] = []
        self._num_images = self._key_bytes = self._shard_bytes = 0
        self._pending: list[tuple[str, dict[str, int]]] = []
        self._content = hashlib.sha256()
        self._tar: Any = None
        self._stream: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", suffix=".partial", dir=self.out.parent))
        self._keys = (self.folder / "keys.txt").open("wb")
        return self

    def write(
        self,
        key: str,
        record: bytes,
        images: Sequence[tuple[str, bytes]] = (),
        *,
        text_words: int = 0,
        text_tokens: int = UNKNOWN_LENGTH,
        label_tokens: int = UNKNOWN_LENGTH,
        image_spans: int | None = None,
    ) -> None:
        """Appends a sample; `record` is a JSON object in UTF-8, `images` are (suffix, encoded bytes), see SAMPLE_ROW.

        Raises ShardError for what a reader would refuse.
        """
        if not key or not key.isascii() or not key.replace("-", "").replace("_", "").isalnum():
            raise ShardError(f"sample key {key!r}: only ASCII letters, digits, - and _ are allowed")
        if len(record) > MAX_RECORD_BYTES or any(len(data) > MAX_IMAGE_BYTES for _, data in images):
            raise ShardError(f"sample {key}: over {MAX_RECORD_BYTES} bytes of JSON or {MAX_IMAGE_BYTES} of a picture")
        size = len(record) + sum(len(data) for _, data in images)
        full = len(self._pending) >= self._max_samples or self._shard_bytes + size > self._max_bytes
        if self._pending and full:
            self._finish_shard()
        if self._tar is None:
            from webdataset import TarWriter  # seconds to import

            self._stream = self._shard_path().open("wb")  # noqa: SIM115  closed with the shard
            self._tar = TarWriter(self._stream, encoder=False, mtime=0)
        members: dict[str, Any] = {"__key__": key, "json": record}
        for number, (suffix, data) in enumerate(images):
            members[suffix if len(images) == 1 else f"{number}.{suffix}"] = data
        self._tar.write(members)
        for part in (key.encode(), record, *(data for _, data in images)):
            self._content.update(len(part).to_bytes(8, "little") + part)
        self._shard_bytes += size
        facts = {
            "num_images": len(images),
            "text_words": text_words,
            "text_tokens": text_tokens,
            "label_tokens": label_tokens,
            "image_spans": len(images) if image_spans is None else image_spans,
        }
        self._pending.append((key, facts))

    def _shard_path(self) -> Path:
        return self.folder / f"shard-{len(self._shards):05d}.tar"

    def _finish_shard(self) -> None:
        assert self._stream is not None
        path, number = self._shard_path(), len(self._shards)
        self._tar.close()
        _sync_and_close(self._stream)
        members = scan_shard(path)
        if [(m.key, len(m.images)) for m in members] != [(key, facts["num_images"]) for key, facts in self._pending]:
            raise ShardError(f"{path}: the tar does not hold the {len(self._pending)} samples written; a key twice?")
        rows = np.zeros(len(members), SAMPLE_ROW)
        for row, member, (key, facts) in zip(rows, members, self._pending, strict=True):
            row["json_offset"], row["json_size"] = member.record
            row["key_offset"], row["first_image"] = self._key_bytes, self._num_images
            row["shard"] = number
            for name, value in facts.items():
                row[name] = value
            self._key_bytes += self._keys.write(f"{key}\n".encode())
            self._num_images += facts["num_images"]
        self._samples.append(rows)
        self._images.append(np.array([place for member in members for place in member.images], IMAGE_ROW))
        self._shards.append({"name": path.name, "bytes": path.stat().st_size, "samples": len(members)})
        self._tar, self._stream, self._shard_bytes = None, None, 0
        self._pending.clear()

    def _finish(self) -> None:
        if self._pending:
            self._finish_shard()
        if not self._shards:
            raise ShardError(f"no usable sample: {self.out} was not written")
        _sync_and_close(self._keys)
        for name, parts in (("samples.npy", self._samples), ("images.npy", self._images)):
            with (self.folder / name).open("wb") as stream:
                np.save(stream, np.concatenate(parts), allow_pickle=False)
                _sync(stream)
        source = self._length_source
        index = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "num_samples": sum(shard["samples"] for shard in self._shards),
            "num_images": self._num_images,
            "fingerprint": self._content.hexdigest()[:16],
            "lengths": None if source is None else asdict(source),
            "shards": self._shards,
        }
        with (self.folder / "index.json").open("w", encoding="utf-8") as stream:
            json.dump(index, stream, indent=1)
            _sync(stream)
        mask = os.umask(0)
        os.umask(mask)
        self.folder.chmod(0o777 & ~mask)  # mkdtemp makes it private
        if self.out.exists() and any(self.out.iterdir()):
            old = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", suffix=".old", dir=self.out.parent))
            self.out.rename(old)
            self.folder.rename(self.out)
            shutil.rmtree(old)
        else:
            self.folder.rename(self.out)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._keys.close()
            if self._stream is not None:
                self._tar.close()
                self._stream.close()
            shutil.rmtree(self.folder, ignore_errors=True)


def _sync(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_and_close(stream: Any) -> None:
    _sync(stream)
    stream.close()
