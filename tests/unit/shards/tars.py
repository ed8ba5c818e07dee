"""Tars of samples, built member by member, and the index of one."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ross_mcore.data.shard_reader import ShardReader
from ross_mcore.errors import ShardError, TooManyBad
from ross_mcore.shards.indexer import Settings, find_shards, index_shards

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A car."}]
TEXT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
RECORD = json.dumps({"image": "x.jpg", "conversations": TURNS}).encode()
Member = tuple[str, bytes] | tuple[tarfile.TarInfo, bytes]


def picture(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (24, 16), **options: Any) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    drawn = (
        Image.fromarray(noise).convert("RGB") if mode != "I;16" else Image.fromarray(noise[..., 0].astype("u2") << 8)
    )
    (drawn if mode == "I;16" else drawn.convert(mode)).save(stream, kind, **options)
    return stream.getvalue()


JPEG, PNG = picture(), picture("PNG")


def sample(key: str, record: Any = RECORD, image: bytes = JPEG, suffix: str = "jpg") -> list[Member]:
    return [
        (f"{key}.{suffix}", image),
        (f"{key}.json", record if isinstance(record, bytes) else json.dumps(record).encode()),
    ]


def caption(key: str, text: bytes = b"a car", image: bytes = JPEG) -> list[Member]:
    return [(f"{key}.jpg", image), (f"{key}.txt", text)]


def tar(*groups: list[Member], format: int = tarfile.USTAR_FORMAT, end: bool = True) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for name, data in (member for group in groups for member in group):
            about = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            about.size = len(data) if about.isreg() else 0
            archive.addfile(about, io.BytesIO(data))
        used = archive.offset
    return stream.getvalue() if end else stream.getvalue()[:used]


def around(*bad: list[Member], **options: Any) -> bytes:
    """A tar of a sample `before`, the tested members, and a sample `after`."""
    return tar(sample("before"), *bad, sample("after"), **options)


def of_kind(name: str, kind: bytes, link: str = "/etc/passwd") -> Member:
    about = tarfile.TarInfo(name)
    about.type, about.linkname = kind, link
    return about, b""


def header_at(name: str, data: bytes) -> int:
    """Offset of the header of the member `name`."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getmember(name).offset


def with_header(data: bytes, name: str, *changes: tuple[slice, bytes], checksum: bool = True) -> bytes:
    """A tar with changed fields in a member's header, and a checksum that fits or not."""
    start, changed = header_at(name, data), bytearray(data)
    block = changed[start : start + 512]
    for field, value in changes:
        block[field] = value.ljust(field.stop - field.start, b"\0")
    if checksum:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    changed[start : start + 512] = block
    return bytes(changed)


SIZE, NAME, KIND = slice(124, 136), slice(0, 100), slice(156, 157)


def pax(fields: dict[str, str], name: str) -> list[Member]:
    about = tarfile.TarInfo(name)
    about.pax_headers = fields
    return [(about, JPEG)]


def png(width: int, height: int, data: bytes = b"\0", extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    packed = zlib.compress(b"\0" * (80 << 20), 9)
    content = b"k\0\0" + packed
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    return png(1, 1, b"\0\0\0\0", chunk)


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.json", RECORD)
    return stream.getvalue()


def turns(value: Any, **more: Any) -> dict[str, Any]:
    return {"conversations": value, **more}


OK, BROKEN = None, "DAMAGED"
WHOLE = tar(sample("before"), sample("bad"), sample("after"))


def indexed(data: bytes, folder: Path) -> tuple[ShardReader | None, dict[str, list[str]]]:
    """(reader, reasons by key) after indexing one tar."""
    data_folder = folder / "data"
    data_folder.mkdir()
    (data_folder / "case.tar").write_bytes(data)
    reader: ShardReader | None = None
    try:
        index_shards(
            find_shards([str(folder / "data")], folder / "data"), folder / "data", Settings(), max_bad_fraction=1
        )
        reader = ShardReader(folder / "data")
    except TooManyBad:
        raise
    except ShardError as error:
        assert "no usable sample" in str(error)
    lines = (folder / "data" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, list[str]] = {}
    for line in map(json.loads, lines):
        assert line["shard"] == "case.tar"
        found.setdefault(BROKEN if line["key"] is None else line["key"], []).append(line["reason"])
    return reader, found
