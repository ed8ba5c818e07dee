"""ShardWriter: writes a data set folder (format: data/shard_reader.py), tars with `webdataset`, then their index."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ross_mcore.checkpoint.folder import require_renames
from ross_mcore.data.shard_reader import (
    MAX_IMAGE_BYTES,
    MAX_IMAGES,
    MAX_RECORD_BYTES,
    RECORD,
    UNKNOWN_LENGTH,
    LengthSource,
)
from ross_mcore.errors import ShardError
from ross_mcore.shards.account import NO_NOTES, Account, Notes
from ross_mcore.shards.grouping import picture_members, read_samples
from ross_mcore.shards.index_parts import IndexedShard, ShardIndex, content_digest, share, write_index


class ShardWriter:
    """Writes a data set folder under a temporary name beside `out`, which is renamed when complete.

    A context manager: an exception inside it removes all files. `left_out` counts the records that are not written, for
    the account in the index. Raises ShardError when `out` exists and is not empty,
    unless `overwrite` and `out` is a data set.
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
        if self.out.is_symlink():  # it would be replaced by a folder
            raise ShardError(f"{out} is a link; give the folder that it leads to, or another one")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            if not overwrite:
                raise ShardError(f"{out} exists and is not empty; choose another folder or pass --overwrite")
            if not (self.out / "index.json").is_file():
                raise ShardError(f"{out} holds no index.json, so it is not a data set and will not be overwritten")
        self._shards: list[IndexedShard] = []
        self._shard_bytes = 0
        self._pending: list[tuple[str, dict[str, int], bytes]] = []
        self._written = Account()
        self.left_out = Account()
        self._tar: Any = None
        self._stream: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        require_renames(self.out.parent)
        self.folder = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", suffix=".partial", dir=self.out.parent))
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
        notes: Notes = NO_NOTES,
    ) -> None:
        """Appends a sample; `record` is a JSON object in UTF-8, `images` are (suffix, encoded bytes), see SAMPLE_ROW.

        Raises ShardError for a sample that a reader would refuse.
        """
        if not key or not key.isascii() or not key.replace("-", "").replace("_", "").isalnum():
            raise ShardError(f"sample key {key!r}: only ASCII letters, digits, - and _ are allowed")
        if len(record) > MAX_RECORD_BYTES or any(len(data) > MAX_IMAGE_BYTES for _, data in images):
            raise ShardError(f"sample {key}: over {MAX_RECORD_BYTES} bytes of JSON or {MAX_IMAGE_BYTES} of a picture")
        if len(images) > MAX_IMAGES:
            raise ShardError(f"sample {key}: {len(images)} pictures, at most {MAX_IMAGES} are possible")
        size = len(record) + sum(len(data) for _, data in images)
        full = len(self._pending) >= self._max_samples or self._shard_bytes + size > self._max_bytes
        if self._pending and full:
            self._finish_shard()
        if self._tar is None:
            from webdataset import TarWriter  # seconds to import

            self._stream = self._shard_path().open("wb")  # noqa: SIM115  closed with the shard
            self._tar = TarWriter(self._stream, encoder=False, mtime=0)
        self._tar.write({"__key__": key, "json": record, **picture_members(images)})
        self._shard_bytes += size
        facts = {
            "num_images": len(images),
            "text_words": text_words,
            "text_tokens": text_tokens,
            "label_tokens": label_tokens,
            "image_spans": len(images) if image_spans is None else image_spans,
        }
        digest = content_digest(key, record, [len(data) for _, data in images])
        self._pending.append((key, {"kind": RECORD, **facts}, digest))
        self._written.keep(key, facts, notes)

    @property
    def account(self) -> Account:
        """The account of all records so far, written or left out."""
        return Account.total([self._written, self.left_out])

    def _shard_path(self) -> Path:
        return self.folder / f"shard-{len(self._shards):05d}.tar"

    def _finish_shard(self) -> None:
        assert self._stream is not None
        path = self._shard_path()
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        with path.open("rb") as tar:
            members = read_samples(tar.fileno())
        keys, facts, digests = zip(*self._pending, strict=True)
        held = [(sample.key, len(sample.pictures)) for sample in members]
        written = [(key, columns["num_images"]) for key, columns in zip(keys, facts, strict=True)]
        if len(set(keys)) != len(keys) or held != written:
            raise ShardError(
                f"{path}: the tar does not hold the {len(keys)} samples written; is a key twice among them?"
            )
        part = ShardIndex.of(members, facts, digests, [])
        self._shards.append(IndexedShard(path.name, path.stat().st_size, lambda: part))
        self._tar, self._stream, self._shard_bytes = None, None, 0
        self._pending.clear()

    def _finish(self) -> None:
        if self._pending:
            self._finish_shard()
        if not self._shards:
            raise ShardError(f"no usable sample: {self.out} was not written")
        write_index(self.folder, self._shards, self._length_source, self.account)
        share(self.folder, 0o777)
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
            if self._stream is not None:
                self._tar.close()
                self._stream.close()
            shutil.rmtree(self.folder, ignore_errors=True)
