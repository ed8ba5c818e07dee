"""Writes an index from parts, one per shard (format: data/shard_reader.py).

Any process can make a part (shards/measure.py). Parts are kept in `index.parts/`, so that only changed shards are read
again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ross_mcore import checked
from ross_mcore.data.shard_reader import FORMAT, FORMAT_VERSION, IMAGE_ROW, PART_ROW, SAMPLE_ROW, LengthSource
from ross_mcore.errors import ShardError, ShardReadError
from ross_mcore.shards.account import Account
from ross_mcore.shards.grouping import TarSample

PARTS = "index.parts"
"""Subfolder with one part for every shard of an index."""
DIGEST_BYTES = 16


def content_digest(key: str, text: bytes, picture_sizes: Iterable[int]) -> bytes:
    """A sample's contribution to the fingerprint of a data set: a hash of its key, text, and sizes of its pictures."""
    digest = hashlib.sha256()
    for part in (key.encode(), text, *(str(size).encode() for size in picture_sizes)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()[:DIGEST_BYTES]


@dataclass(frozen=True)
class ShardIndex:
    """One shard's part of an index, whose `shard`, `key_offset` and `first_image` count from the start of the shard.

    samples [N] of SAMPLE_ROW, images of IMAGE_ROW, parts [N] of PART_ROW, keys: one per line, digests
    [N, DIGEST_BYTES]; quarantine: (key, reason) of samples left out, without a key if the shard itself is damaged;
    lost_bytes: damaged bytes; others: numbers of members that no sample uses, by suffix; first_names: names of the
    first members; part_sources: the distinct sources of precomputed parts, by kind; account: None if the samples were
    not counted.
    """

    samples: NDArray[np.void]
    images: NDArray[np.void]
    parts: NDArray[np.void]
    keys: bytes
    digests: NDArray[np.uint8]
    quarantine: list[tuple[str | None, str]]
    lost_bytes: int = 0
    others: dict[str, int] = field(default_factory=dict)
    first_names: list[str] = field(default_factory=list)
    part_sources: dict[str, list[Any]] = field(default_factory=dict)
    account: Account | None = None

    @classmethod
    def of(
        cls,
        samples: Sequence[TarSample],
        facts: Sequence[dict[str, int]],
        digests: Sequence[bytes],
        quarantine: list[tuple[str | None, str]],
        lost_bytes: int = 0,
        part_sources: dict[str, list[Any]] | None = None,
        account: Account | None = None,
    ) -> ShardIndex:
        """The part of `samples` of a tar; `facts` are the columns of their rows that the tar does not give."""
        rows, parts = np.zeros(len(samples), SAMPLE_ROW), np.zeros(len(samples), PART_ROW)
        keys = bytearray()
        places: list[tuple[int, int]] = []
        for row, part, sample, columns in zip(rows, parts, samples, facts, strict=True):
            text = sample.text
            assert text is not None
            row["text_offset"], row["text_size"] = text.offset, text.size
            row["key_offset"], row["first_image"] = len(keys), len(places)
            for name, value in columns.items():
                row[name] = value
            keys += f"{sample.key}\n".encode()
            places += [(found.offset, found.size) for found in sample.pictures] or [(0, 0)] * columns["num_images"]
            for kind, member in sample.parts.items():
                part[f"{kind}_offset"], part[f"{kind}_size"] = member.offset, member.size
        stacked = np.frombuffer(b"".join(digests), np.uint8).reshape(len(samples), DIGEST_BYTES)
        images = np.array(places, IMAGE_ROW)
        return cls(
            rows,
            images,
            parts,
            bytes(keys),
            stacked,
            quarantine,
            lost_bytes,
            part_sources=part_sources or {},
            account=account,
        )

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Writes the part, with `about`, the values it depends on."""
        facts: dict[str, Any] = {"quarantine": self.quarantine, "lost_bytes": self.lost_bytes, "about": about}
        facts |= {"others": sum(self.others.values()), "others_by_suffix": self.others, "first_names": self.first_names}
        facts |= {"num_samples": len(self.samples), "num_images": len(self.images), "key_bytes": len(self.keys)}
        facts["part_sources"] = self.part_sources
        facts["account"] = None if self.account is None else self.account.as_json()
        with replacing(path) as stream:
            np.savez(
                stream,
                samples=self.samples,
                images=self.images,
                parts=self.parts,
                digests=self.digests,
                keys=np.frombuffer(self.keys, np.uint8),
                facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
            )

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Raises ShardError when the part is damaged."""
        facts = part_facts(path)
        try:
            if facts is None:
                raise ValueError("no part of an index")
            with _opened(path) as part:
                samples, images, parts, digests = (part[name] for name in ("samples", "images", "parts", "digests"))
                keys = part["keys"].tobytes()
            held = len(samples), len(images), len(parts), len(digests), len(keys)
            expected = tuple(
                facts[name] for name in ("num_samples", "num_images", "num_samples", "num_samples", "key_bytes")
            )
            kinds = samples.dtype, images.dtype, parts.dtype, digests.dtype
            if held != expected or kinds != (SAMPLE_ROW, IMAGE_ROW, PART_ROW, np.uint8):
                raise ValueError("its tables are not those of its facts")
            quarantine = [(None if key is None else str(key), str(reason)) for key, reason in facts["quarantine"]]
        except Exception as error:  # numpy and zipfile raise exceptions of any type
            raise ShardError(
                f"{path} is damaged: {checked.reason(error)}; delete it and index the shards again"
            ) from None
        return cls(
            samples,
            images,
            parts,
            keys,
            digests,
            quarantine,
            facts["lost_bytes"],
            facts["others_by_suffix"],
            facts["first_names"],
            checked.mapping(facts["part_sources"], "part_sources"),
            None if facts.get("account") is None else Account.from_json(facts["account"]),
        )


def part_facts(path: Path) -> dict[str, Any] | None:
    """The counts, quarantine and `about` of a part; None if there is no complete part."""
    try:
        with _opened(path) as part:
            facts = json.loads(part["facts"].tobytes())
        for key in ("num_samples", "num_images", "key_bytes", "lost_bytes", "others"):
            checked.count(facts, key, least=0, most=2**62)
        checked.mapping(facts["part_sources"], "part_sources")
        others = checked.mapping(facts.setdefault("others_by_suffix", {}), "others_by_suffix")
        names = facts.setdefault("first_names", [])
        if not all(type(count) is int for count in others.values()) or not all(isinstance(name, str) for name in names):
            return None
        if facts.get("account") is not None:
            Account.from_json(facts["account"])
        return facts if isinstance(facts["quarantine"], list) and "about" in facts else None
    except Exception:  # as in ShardIndex.load; a damaged part is made again
        return None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An .npz that `ShardIndex.save` wrote. Raises ValueError for compressed members, which it never writes."""
    checked.require_regular(path)
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise ValueError("its members are compressed, which this program never does")
    with np.load(path, allow_pickle=False) as part:
        yield part


@dataclass(frozen=True)
class IndexedShard:
    """A shard's place and size, the store's tag of its version, if any, and its part of the index."""

    name: str
    bytes: int
    part: Callable[[], ShardIndex]
    tag: str | None = None


def write_index(
    folder: Path,
    shards: Sequence[IndexedShard],
    source: LengthSource | None,
    account: Account | None = None,
    truncated_images: str = "refuse",
) -> None:
    """Writes the index of `shards`, in this order, into `folder`; one part is in memory at a time.

    `account` is that of the data set, None if its samples were not counted. An old index is replaced at the end, file
    by file, index.json last. Raises ShardError if there is no sample.
    """
    totals, entries = np.zeros(3, np.int64), []
    precomputed: dict[str, Any] = {}
    pictured, left_out = 0, False
    for shard in shards:
        part = shard.part()
        totals += (len(part.samples), len(part.images), len(part.quarantine))
        if len(part.samples):
            tag = {} if shard.tag is None else {"tag": shard.tag}
            entries.append({"name": shard.name, "bytes": shard.bytes, "samples": len(part.samples), **tag})
        left_out = left_out or bool((part.images["size"] == 0).any())
        pictured += int(np.count_nonzero(part.samples["num_images"]))
        for kind, sources in part.part_sources.items():
            about = precomputed.setdefault(kind, {"samples": 0, "sources": []})
            about["samples"] += int(np.count_nonzero(part.parts[f"{kind}_size"]))
            about["sources"] += [source for source in sources if source not in about["sources"]]
    num_samples, num_images, num_quarantined = totals.tolist()
    if not num_samples:
        raise ShardError(f"no usable sample: no index was written to {folder}")
    content = hashlib.sha256()
    with (
        replacing(folder / "index.json") as index,  # entered first, so replaced last
        replacing(folder / "samples.npy") as samples,
        replacing(folder / "images.npy") as images,
        replacing(folder / "parts.npy") if precomputed else nullcontext() as parts,
        replacing(folder / "keys.txt") as keys,
        replacing(folder / "quarantine.jsonl") as quarantine,
    ):
        tables = [(samples, SAMPLE_ROW, num_samples), (images, IMAGE_ROW, num_images)]
        for stream, row, count in tables + ([(parts, PART_ROW, num_samples)] if parts is not None else []):
            header = {"descr": np.lib.format.dtype_to_descr(row), "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(stream, header)
        number = key_offset = first_image = 0
        for shard in shards:
            part = shard.part()
            rows = part.samples.copy()
            rows["shard"] = number
            rows["key_offset"] += np.uint64(key_offset)
            rows["first_image"] += np.uint64(first_image)
            samples.write(rows.tobytes())
            images.write(part.images.tobytes())
            if parts is not None:
                parts.write(part.parts.tobytes())
            keys.write(part.keys)
            content.update(part.digests.tobytes())
            quarantine.writelines(quarantine_lines(shard.name, part))
            number += len(rows) > 0
            key_offset, first_image = key_offset + len(part.keys), first_image + len(part.images)
        facts = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "num_samples": num_samples,
            "num_images": num_images,
            "quarantined": num_quarantined,
            "fingerprint": content.hexdigest()[:16],
            "lengths": None if source is None else asdict(source),
            "pictures_left_out": left_out,
            "precomputed": {kind: {**about, "of": pictured} for kind, about in precomputed.items()},
            "account": None if account is None else account.as_json(),
            "shards": entries,
        }
        if truncated_images != "refuse":
            facts["truncated_images"] = truncated_images
        index.write(json.dumps(facts, indent=1).encode())


def quarantine_lines(name: str, part: ShardIndex) -> list[bytes]:
    """Lines of quarantine.jsonl; the key is null for damage of the shard itself."""
    lines = ({"shard": name, "key": key, "reason": reason} for key, reason in part.quarantine)
    return [json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" for line in lines]


def share(path: Path, mode: int) -> None:
    """Gives a file or folder of tempfile, which is private, the usual permissions: `mode` without the umask."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(mode & ~mask)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file under a temporary name; at the end it is synced and renamed to `path`, after an exception removed.

    Raises ShardError naming `path` when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    except OSError as error:
        raise ShardError(f"{path} cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        share(Path(name), 0o666)
        Path(name).rename(path)
    except ShardReadError:
        raise
    except OSError as error:
        raise ShardError(f"{path} cannot be written: {error.strerror}; free space, or move what is there") from None
    finally:
        Path(name).unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder for a tool's output, if there is none. Raises ShardError naming it, also for a link."""
    if path.is_symlink():
        raise ShardError(f"{path} is a link; remove it, or give another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShardError(f"{path} cannot be made: {error.strerror}; give another folder") from None
