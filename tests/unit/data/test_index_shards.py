"""Indexing tars that others made: every sample is indexed or quarantined, whatever the tar is like."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ross_mcore.data.image import decode_image
from ross_mcore.data.indexer import PARTS, Settings, TooManyBad, find_shards, index_shards
from ross_mcore.data.indexing import Measure, SampleError, index_tar, length_source, stale_lengths
from ross_mcore.data.shards import MAX_IMAGE_BYTES, MAX_RECORD_BYTES, UNKNOWN_LENGTH, ShardError, ShardReader
from ross_mcore.data.tar_samples import Damage, walk_tar

TOOL = Path(__file__).parents[3] / "tools" / "index_shards.py"
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
    """A tar of a sample `before`, what is to be tested, and a sample `after`."""
    return tar(sample("before"), *bad, sample("after"), **options)


def of_kind(name: str, kind: bytes, link: str = "/etc/passwd") -> Member:
    about = tarfile.TarInfo(name)
    about.type, about.linkname = kind, link
    return about, b""


def header_at(name: str, data: bytes) -> int:
    """Where the header of the member `name` begins."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getmember(name).offset


def with_header(data: bytes, name: str, *changes: tuple[slice, bytes], checksum: bool = True) -> bytes:
    """A tar in which fields of a member's header are others, with a checksum that fits or without."""
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


BAD, OK, BROKEN = "bad", None, "DAMAGED"
WHOLE = tar(sample("before"), sample("bad"), sample("after"))
CUT_OFF = "cut off"

TEXTS: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{", "not JSON"),
    "empty JSON": (b"", "is empty"),
    "null": (b"null", "not a JSON object"),
    "a number": (b"7", "not a JSON object"),
    "a string": (b'"text"', "not a JSON object"),
    "no conversations": ({}, "list of turns"),
    "conversations null": (turns(None), "list of turns"),
    "no turn": (turns([]), "list of turns"),
    "conversations an object": (turns({"a": 1}), "list of turns"),
    "a turn that is text": (turns(["a"]), "no text"),
    "a turn without a value": (turns([{"from": "human"}]), "no text"),
    "a value that is a number": (turns([{"from": "human", "value": 3}]), "no text"),
    "a list of numbers": ([1, 2], "no text"),
    "invalid UTF-8": (b'{"conversations": "\xff\xfe"}', "not JSON"),
    "a lone surrogate": (turns([{"from": "human", "value": "\ud800"}]), "Unicode"),
    "nested too deeply": (b"[" * 100_000, "not JSON"),
    "nested as deep in a value": (b'{"a":' * 50_000, "not JSON"),
    "a list in UTF-16": (json.dumps(TURNS).encode("utf-16"), "UTF-8"),
    "cut JSON": (RECORD[:-9], "not JSON"),
    "JSON and more": (RECORD + b"x", "not JSON"),
    "a number without end": (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
    "noise": (bytes(range(256)), "not JSON"),
    "a record too large": (b" " * (MAX_RECORD_BYTES + 1), "is over"),
    "more pictures named than there": (turns(TURNS, image=["a", "b"]), "names 2 pictures and the shard has 1"),
}
PICTURES: dict[str, tuple[bytes, str]] = {
    "an empty picture": (b"", "is empty"),
    "a cut JPEG": (JPEG[:-150], "undecodable"),
    "a cut PNG": (PNG[:-60], "undecodable"),
    "a cut WebP": (picture("WEBP")[:-40], "undecodable"),
    "a JPEG's first bytes": (JPEG[:2], "undecodable"),
    "a PNG as large as a bomb": (png(60_000, 60_000), "too large"),
    "a PNG of 2^31 pixels a side": (png(2**31 - 1, 2**31 - 1), "a picture is"),
    "a PNG of no pixel": (png(0, 0), "a picture is"),
    "a thread": (png(4000, 2), "thin"),
    "a PNG with a bomb of text": (text_bomb(), "undecodable"),
    "a PNG with a wrong checksum": (PNG[:20] + b"\xff" + PNG[21:], "a picture is"),
    "a PNG without data": (png(24, 16), "undecodable"),
    "text": (b"not a picture", "undecodable"),
    "a page": (b"<html>404</html>", "undecodable"),
    "a GIF": (picture("GIF"), "undecodable"),
    "a TIFF": (picture("TIFF"), "undecodable"),
    "a BMP": (picture("BMP"), "undecodable"),
    "an archive": (zipped(), "undecodable"),
    "a file too large": (b"\0" * (MAX_IMAGE_BYTES + 1), "is over"),
}
EXIF = Image.Exif()
EXIF[0x0112] = 6
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (24, 16), "red")]}
USABLE: dict[str, bytes] = {
    "CMYK": picture("JPEG", "CMYK"),
    "grey": picture("JPEG", "L"),
    "palette": picture("PNG", "P"),
    "palette with transparency": picture("PNG", "P", transparency=3),
    "16 bits": picture("PNG", "I;16"),
    "1 bit": picture("PNG", "1"),
    "grey and alpha": picture("PNG", "LA"),
    "alpha": picture("PNG", "RGBA"),
    "animated WebP": picture("WEBP", **FRAMES),
    "animated PNG": picture("PNG", **FRAMES),
    "two pictures in a JPEG": picture("MPO", **FRAMES),
    "rotated by EXIF": picture("JPEG", exif=EXIF),
    "progressive": picture("JPEG", progressive=True),
    "another suffix": PNG,
}
ONE_BAD = {"before": OK, "bad": "?", "after": OK}


def reasons(reason: str | None, key: str = BAD, damaged: bool = False) -> dict[str, str | None]:
    return {"before": OK, key: reason, "after": OK, **({BROKEN: "damaged"} if damaged else {})}


CASES: dict[str, tuple[Callable[[], bytes], dict[str, str | None]]] = {
    **{name: (lambda r=record: around(sample("bad", r)), reasons(reason)) for name, (record, reason) in TEXTS.items()},
    **{
        f"picture: {name}": (lambda d=data: around(sample("bad", image=d)), reasons(reason))
        for name, (data, reason) in PICTURES.items()
    },
    **{
        f"usable: {name}": (lambda d=data: around(sample("bad", image=d)), reasons(OK)) for name, data in USABLE.items()
    },
    # captions
    "a caption": (lambda: around(caption("bad")), reasons(OK)),
    "an empty caption": (lambda: around(caption("bad", b"")), reasons("is empty")),
    "a caption of white space": (lambda: around(caption("bad", b" \n\t ")), reasons("empty")),
    "a caption that is not UTF-8": (lambda: around(caption("bad", b"\xff\xfea")), reasons("not UTF-8")),
    "a caption with a mark": (lambda: around(caption("bad", b"\xef\xbb\xbfcar")), reasons(OK)),
    "a caption without a picture": (lambda: around([("bad.txt", b"a car")]), reasons("a caption with 0 pictures")),
    "a caption of two pictures": (
        lambda: around([("bad.0.jpg", JPEG), ("bad.1.jpg", JPEG), ("bad.txt", b"cars")]),
        reasons(OK),
    ),
    "a caption that shows too many pictures": (
        lambda: around([("bad.0.jpg", JPEG), ("bad.1.jpg", JPEG), ("bad.txt", b"<image> a <image> b <image>")]),
        reasons("3 <image> in the text, 2 pictures"),
    ),
    "a caption beside other JSON": (lambda: around([*sample("bad", {"url": "u"}), ("bad.txt", b"a car")]), reasons(OK)),
    "a caption beside broken JSON": (lambda: around([*sample("bad", b"{"), ("bad.txt", b"a car")]), reasons(OK)),
    # members
    "no text": (lambda: around([("bad.jpg", JPEG)]), reasons("neither .json nor .txt")),
    "no picture": (lambda: around([("bad.json", RECORD)]), reasons("names 1 pictures and the shard has 0")),
    "text alone": (lambda: around([("bad.json", json.dumps(turns(TEXT)).encode())]), reasons(OK)),
    "only turns": (lambda: around(sample("bad", TURNS)), reasons(OK)),
    "second of two pictures broken": (
        lambda: around([("bad.0.jpg", JPEG), ("bad.1.jpg", b"x"), ("bad.json", json.dumps(turns(TURNS * 2)).encode())]),
        reasons("undecodable"),
    ),
    "more pictures than <image>": (
        lambda: around([("bad.0.jpg", JPEG), ("bad.1.jpg", JPEG), ("bad.json", json.dumps(turns(TURNS)).encode())]),
        reasons(OK),
    ),
    "more <image> than pictures": (
        lambda: around([("bad.0.jpg", JPEG), ("bad.1.jpg", JPEG), ("bad.json", json.dumps(turns(TURNS * 3)).encode())]),
        reasons("3 <image> in the text, 2 pictures"),
    ),
    "a picture of an unknown kind": (lambda: around(sample("bad", suffix="heic")), reasons("the shard has 0")),
    "capital suffixes": (lambda: around([("bad.JPG", JPEG), ("bad.JSON", RECORD)]), reasons(OK)),
    "members apart": (
        lambda: tar(sample("bad")[:1], sample("before"), sample("after"), sample("bad")[1:]),
        reasons(OK),
    ),
    "a key twice": (lambda: around(sample("before")), {"before": "twice", "after": OK}),
    "a JSON twice": (lambda: around(sample("bad"), sample("bad")[1:]), {**reasons("twice")}),
    "a symbolic link": (
        lambda: around([of_kind("bad.jpg", b"2", "/etc/passwd"), ("bad.json", RECORD)]),
        reasons("link"),
    ),
    "a hard link": (lambda: around([of_kind("bad.jpg", b"1"), ("bad.json", RECORD)]), reasons("is a link")),
    "a linked record": (lambda: around([("bad.jpg", JPEG), of_kind("bad.json", b"2")]), reasons("is a link")),
    "a device": (lambda: around([of_kind("bad.jpg", b"3"), ("bad.json", RECORD)]), reasons("not a regular file")),
    "a pipe": (lambda: around([of_kind("bad.jpg", b"6"), ("bad.json", RECORD)]), reasons("not a regular file")),
    "a folder of that name": (lambda: around([of_kind("bad.jpg", b"5"), ("bad.json", RECORD)]), reasons("has 0")),
    "an unknown type": (lambda: with_header(WHOLE, "bad.jpg", (KIND, b"Q")), reasons("not a regular file")),
    "a sparse file": (lambda: with_header(WHOLE, "bad.jpg", (KIND, b"S")), reasons("sparse")),
    "a sparse file by pax": (
        lambda: around(pax({"GNU.sparse.size": "9", "GNU.sparse.map": "0,9"}, "bad.jpg"), sample("bad")[1:], format=2),
        reasons("sparse"),
    ),
    # keys
    "a path upwards": (lambda: around(sample("../../bad")), reasons("leads out", "../../bad")),
    "a path upwards inside": (lambda: around(sample("a/../../bad")), reasons("leads out", "a/../../bad")),
    "an absolute path": (lambda: around(sample("/etc/bad")), reasons("leads out", "/etc/bad")),
    "a path of another system": (lambda: around(sample("C:/bad")), reasons("leads out", "C:/bad")),
    "a path with backslashes": (lambda: around(sample("x\\bad")), reasons("leads out", "x\\bad")),
    "a line break": (lambda: around(sample("b\nad")), reasons("control", "b\nad")),
    "text turned around": (lambda: around(sample("b\u202ead"), format=2), reasons("control", "b\u202ead")),
    "a NUL": (
        lambda: around(*[pax({"path": f"b\0ad.{s}"}, "x") for s in ("jpg", "json")], format=2),
        reasons("control", "b\0ad"),
    ),
    "a name that is not UTF-8": (
        lambda: with_header(with_header(WHOLE, "bad.jpg", (NAME, b"b\xff.jpg")), "bad.json", (NAME, b"b\xff.json")),
        reasons("not UTF-8", "b\\udcff"),
    ),
    "a name without end": (lambda: around(sample("k" * 3000), format=1), reasons("over 1024 bytes", "k" * 3000)),
    "no key": (lambda: around(sample("")), reasons("no key", "")),
    "folders": (lambda: around(sample("a/b.c/bad")), reasons(OK, "a/b.c/bad")),
    "a folder before": (lambda: around(sample("./bad")), reasons(OK)),
    "another alphabet": (lambda: around(sample("猫 😀"), format=2), reasons(OK, "猫 😀")),
    "a long name": (lambda: around(sample("k" * 300), format=1), reasons(OK, "k" * 300)),
    "a long name by pax": (lambda: around(sample("k" * 300), format=2), reasons(OK, "k" * 300)),
    # tars
    "no end": (lambda: tar(sample("before"), sample("bad"), sample("after"), end=False), reasons(OK)),
    "two tars in one": (lambda: tar(sample("before"), sample("bad")) + tar(sample("after")), reasons(OK)),
    "other members": (
        lambda: around(sample("bad"), [("README", b"x"), ("._bad.jpg", b"x"), ("a.cls", b"3")]),
        reasons(OK),
    ),
    "an empty file": (lambda: b"", {BROKEN: "empty"}),
    "zeros": (lambda: bytes(5120), {BROKEN: "no members"}),
    "a zip": (zipped, {BROKEN: "damaged or no tar"}),
    "a compressed tar": (lambda: zlib.compress(WHOLE), {BROKEN: "no tar"}),
    "a text": (lambda: b"hello " * 999, {BROKEN: "no tar"}),
    "noise in a file": (lambda: np.random.default_rng(1).bytes(9000), {BROKEN: "no tar"}),
    "cut in the first header": (lambda: WHOLE[:300], {BROKEN: "damaged"}),
    "cut in a header": (
        lambda: WHOLE[: header_at("after.json", WHOLE) + 99],
        {"before": OK, "bad": OK, "after": "neither", BROKEN: "damaged"},
    ),
    "cut after a header": (
        lambda: WHOLE[: header_at("after.json", WHOLE) + 512],
        {"before": OK, "bad": OK, "after": CUT_OFF},
    ),
    "cut in a picture": (
        lambda: WHOLE[: header_at("after.jpg", WHOLE) + 700],
        {"before": OK, "bad": OK, "after": CUT_OFF, BROKEN: "damaged"},
    ),
    "cut in a record": (
        lambda: WHOLE[: header_at("after.json", WHOLE) + 530],
        {"before": OK, "bad": OK, "after": CUT_OFF, BROKEN: "damaged"},
    ),
    "cut between members": (
        lambda: WHOLE[: header_at("after.json", WHOLE)],
        {"before": OK, "bad": OK, "after": "neither"},
    ),
    "a damaged header of a record": (
        lambda: with_header(WHOLE, "bad.json", (NAME, b"\0garbage"), checksum=False),
        reasons("neither", damaged=True),
    ),
    "a damaged header of a picture": (
        lambda: with_header(WHOLE, "bad.jpg", (NAME, b"\0garbage"), checksum=False),
        reasons("has 0", damaged=True),
    ),
    "a size of 8 GiB": (lambda: with_header(WHOLE, "bad.jpg", (SIZE, b"77777777777")), reasons(CUT_OFF, damaged=True)),
    "a size of 2^80": (
        lambda: with_header(WHOLE, "bad.jpg", (SIZE, b"\x80\0" + b"\xff" * 10)),
        reasons("has 0", damaged=True),
    ),
    "a negative size": (lambda: with_header(WHOLE, "bad.jpg", (SIZE, b"\xff" * 12)), reasons("has 0", damaged=True)),
    "a size of letters": (
        lambda: with_header(WHOLE, "bad.jpg", (SIZE, b"zzzzzzzzzzz")),
        reasons("has 0", damaged=True),
    ),
    "a pax size of 10^30": (
        lambda: around(pax({"size": "1" + "0" * 30}, "bad.jpg"), sample("bad")[1:], format=2),
        reasons("has 0", damaged=True),
    ),
    "a negative pax size": (
        lambda: around(pax({"size": "-512"}, "bad.jpg"), sample("bad")[1:], format=2),
        reasons("has 0", damaged=True),
    ),
    "a pax size of letters": (
        lambda: around(pax({"size": "abc"}, "bad.jpg"), sample("bad")[1:], format=2),
        reasons("has 0", damaged=True),
    ),
    "a pax header of 8 GiB": (
        lambda: with_header(WHOLE, "bad.jpg", (SIZE, b"77777777777"), (KIND, b"x")),
        reasons("has 0", damaged=True),
    ),
    "a long name of 8 GiB": (
        lambda: with_header(WHOLE, "bad.jpg", (SIZE, b"77777777777"), (KIND, b"L")),
        reasons("has 0", damaged=True),
    ),
    "a pax header of noise": (lambda: with_header(WHOLE, "bad.jpg", (KIND, b"x")), reasons("has 0")),
    "a global pax header": (lambda: with_header(WHOLE, "bad.jpg", (KIND, b"g")), reasons("has 0")),
    "a long name and no member": (
        lambda: with_header(WHOLE, "after.jpg", (KIND, b"L"))[: header_at("after.json", WHOLE)],
        {"before": OK, "bad": OK, BROKEN: "damaged"},
    ),
    "blocks of noise between": (
        lambda: tar(sample("before"), end=False) + b"\x01" * 1536 + tar(sample("bad"), sample("after")),
        reasons(OK, damaged=True),
    ),
    "bytes lost in between": (
        lambda: tar(sample("before"), end=False)[:-100] + tar(sample("bad"), sample("after")),
        {**reasons(OK, damaged=True)},
    ),
    "noise at the end": (lambda: WHOLE + b"trailing", reasons(OK, damaged=True)),
}


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


def test_there_are_enough_kinds_of_damage() -> None:
    assert len([name for name, (_, expected) in CASES.items() if set(expected.values()) != {None}]) >= 60


@pytest.mark.parametrize("name", CASES)
def test_every_sample_is_indexed_or_quarantined(name: str, tmp_path: Path) -> None:
    make, expected = CASES[name]
    reader, quarantined = indexed(make(), tmp_path)
    kept = [] if reader is None else reader.keys(range(len(reader)))
    bad = {key: reason for key, reason in expected.items() if reason is not None}
    assert sorted(quarantined) == sorted(bad), quarantined
    for key, reason in bad.items():
        assert any(reason in found for found in quarantined[key]), quarantined
    assert len(kept) == len(set(kept))
    assert set(kept) | (set(bad) - {BROKEN}) == set(expected) - {BROKEN}
    for number in range(len(kept)):
        assert reader is not None
        record = json.loads(reader.record_bytes(number))
        Measure()(record, int(reader.samples[number]["num_images"]))
        for ordinal in range(reader.samples[number]["num_images"]):
            assert decode_image(reader.image_bytes(number, ordinal))[0].mode == "RGB"
    written = {path.name for path in (tmp_path / "data").iterdir()}
    assert written <= {"case.tar", "index.json", "samples.npy", "images.npy", "keys.txt", "quarantine.jsonl", PARTS}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def scan(data: bytes) -> tuple[set[str], set[str], int]:
    """(keys indexed, keys quarantined, bytes lost) of a tar that has no name."""
    descriptor = os.memfd_create("case")
    try:
        os.write(descriptor, data)
        part = index_tar(descriptor, Measure(), verify_images=False)
    finally:
        os.close(descriptor)
    return set(part.keys.decode().split()), {key for key, _ in part.quarantine}, part.lost_bytes


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, len(WHOLE)))
def test_a_tar_cut_anywhere_gives_what_is_whole(cut: int) -> None:
    kept, bad, _ = scan(WHOLE[:cut])
    assert not kept & bad
    for key in ("before", "bad", "after"):
        first, last = header_at(f"{key}.jpg", WHOLE), header_at(f"{key}.json", WHOLE) + 512 + len(RECORD)
        assert (key in kept) == (cut >= last), key
        assert (key in bad) == (first + 512 <= cut < last), key


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, len(WHOLE) - 1), noise=st.binary(min_size=1, max_size=600))
def test_damage_touches_only_where_it_is(place: int, noise: bytes) -> None:
    """Overwriting bytes of one sample or between samples never costs another one whose headers come later."""
    noise = noise[: len(WHOLE) - place]
    kept, _, _ = scan(WHOLE[:place] + noise + WHOLE[place + len(noise) :])
    ends = {key: header_at(f"{key}.json", WHOLE) + 1024 for key in ("before", "bad", "after")}
    starts = {key: header_at(f"{key}.jpg", WHOLE) for key in ends}
    for key in ends:
        if ends[key] <= place or place + len(noise) <= starts[key]:
            assert key in kept


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_whole_tars_are_walked_as_tarfile_does(format: int) -> None:
    data = around(sample("d/" + "k" * 90), [("README", b"r"), ("e.json", b"")], format=format)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [(member.name, member.offset_data, member.size) for member in archive]
    descriptor = os.memfd_create("case")
    os.write(descriptor, data)
    found = list(walk_tar(descriptor))
    os.close(descriptor)
    assert not any(isinstance(member, Damage) for member in found)
    assert [(member.name, member.offset, member.size) for member in found] == expected  # type: ignore[union-attr]


def test_what_make_shards_wrote_is_indexed_to_the_same(
    shards: Path, tokenizer: Any, golden_data: Path, tmp_path: Path
) -> None:
    done = index_shards(
        find_shards([str(shards)], tmp_path / "out"),
        tmp_path / "out",
        Settings(golden_data / "tok_qwen2", "qwen_2"),
    )
    first, second = ShardReader(shards), ShardReader(tmp_path / "out")
    assert done.bad == 0 and first.fingerprint == second.fingerprint
    assert np.array_equal(first.samples, second.samples) and np.array_equal(first.images, second.images)
    assert first.keys(range(len(first))) == second.keys(range(len(second)))
    assert [second.record_bytes(n) for n in range(23)] == [first.record_bytes(n) for n in range(23)]
    assert second.length_source == length_source(tokenizer, "qwen_2")


def test_captions_and_turns_are_read_as_records(tmp_path: Path) -> None:
    """Training reads what the index measured: the conversation, from whatever kind of text."""
    reader, _ = indexed(tar(caption("a", b"\xef\xbb\xbf a car\n"), sample("b", TURNS), sample("c")), tmp_path)
    assert reader is not None
    records = [json.loads(reader.record_bytes(number)) for number in range(3)]
    caption_turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a car"}]
    assert records == [{"conversations": caption_turns}, {"conversations": TURNS}, json.loads(RECORD)]
    assert reader.samples["text_words"].tolist() == [3, 4, 4]
    assert reader.samples["text_tokens"].tolist() == [UNKNOWN_LENGTH] * 3


def test_only_what_changed_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.tar").write_bytes(tar(sample(f"k{number}")))

    def again(**options: Any) -> tuple[int, list[str]]:
        done = index_shards(find_shards([str(folder)], folder), folder, Settings(**options))
        reader = ShardReader(folder)
        return done.reread, reader.keys(range(len(reader)))

    assert again() == (3, ["k0", "k1", "k2"])
    assert again() == again(verify_images=False) == (0, ["k0", "k1", "k2"])
    (folder / "1.tar").write_bytes(tar(sample("k1"), sample("new")))
    assert again() == (1, ["k0", "k1", "new", "k2"])
    os.utime(folder / "2.tar", ns=(1, 1))
    assert again()[0] == 1
    next((folder / PARTS).iterdir()).write_bytes(b"damaged")
    assert again()[0] == 1
    (folder / "0.tar").unlink()
    assert again() == (0, ["k1", "new", "k2"]) and len(list((folder / PARTS).iterdir())) == 2


def test_pictures_that_were_not_decoded_are_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(sample("k"), sample("bad", image=b"x")))
    places = find_shards([str(tmp_path)], tmp_path)
    assert index_shards(places, tmp_path, Settings(verify_images=False)).samples == 2
    assert index_shards(places, tmp_path, Settings(), max_bad_fraction=0.5).samples == 1


def test_too_much_damage_is_refused_with_the_list(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(around(sample("bad", b"{")))
    places = find_shards([str(tmp_path)], tmp_path)
    with pytest.raises(TooManyBad, match="1 of 3 samples are bad.*max-bad-fraction 0.3.*1 x the record is not JSON"):
        index_shards(places, tmp_path, Settings(), max_bad_fraction=0.3)
    assert not (tmp_path / "index.json").exists()
    assert json.loads((tmp_path / "quarantine.jsonl").read_text())["key"] == "bad"
    assert index_shards(places, tmp_path, Settings(), max_bad_fraction=0.4).reread == 0


def test_lost_bytes_count_as_the_samples_they_would_have_held(tmp_path: Path) -> None:
    many = [sample(f"{number:03d}") for number in range(40)]
    data = tar(*many)
    half = header_at("020.jpg", data)
    (tmp_path / "a.tar").write_bytes(data[:half] + b"\x01" * (len(tar(*many, end=False)) - half))
    done = index_shards(find_shards([str(tmp_path)], tmp_path), tmp_path, Settings(), max_bad_fraction=1)
    assert done.samples == 20 and done.bad == 20


def test_stale_lengths_name_the_command(tmp_path: Path, tokenizer: Any, golden_data: Path) -> None:
    (tmp_path / "a.tar").write_bytes(around())
    folder = golden_data / "tok_qwen2"
    source = length_source(tokenizer, "qwen_2")
    index_shards(find_shards([str(tmp_path)], tmp_path), tmp_path, Settings())
    said = stale_lengths(ShardReader(tmp_path), source, folder)
    assert (
        said is not None
        and f"python tools/index_shards.py --data-path {tmp_path} --tokenizer {folder} --template" in said
    )
    index_shards(find_shards([str(tmp_path)], tmp_path), tmp_path, Settings(folder, "qwen_2"))
    reader = ShardReader(tmp_path)
    assert stale_lengths(reader, source, folder) is None
    for other, what in (
        (length_source(tokenizer, "plain"), "another template"),
        (length_source(tokenizer, "qwen_2", True), "another mm_use_im_start_end"),
        (type(source)("0", "qwen_2", False, source.image_tokens), "another tokenizer"),
        (type(source)(source.tokenizer, "qwen_2", False, "0"), "another treatment of pictures"),
    ):
        said = stale_lengths(reader, other, folder)
        assert said is not None and what in said and ("--mm-use" in said) == other.mm_use_im_start_end


def test_measuring_with_a_template_refuses_what_does_not_fit(tokenizer: Any) -> None:
    measure = Measure(tokenizer, "plain")
    with pytest.raises(SampleError, match="plain takes two turns"):
        measure(turns(TURNS * 2), 1)
    row = measure(turns(TURNS), 1)
    assert row["image_spans"] == 1 and row["label_tokens"] > 0 and row["text_words"] == 4


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """tool(*flags) -> the exit code of tools/index_shards.py, in this process."""

    def run(*flags: Any) -> int:
        spec = importlib.util.spec_from_file_location("index_shards", TOOL)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", ["index_shards", *map(str, flags)])
        try:
            return module.main()
        except SystemExit as stop:
            return int(stop.code or 0)

    return run


def test_the_tool_says_what_it_did(
    tool: Callable[..., int], tmp_path: Path, golden_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        (tmp_path / "in" / f"s-{number:03d}.tar").write_bytes(around(sample("bad", b"{")))
    flags = ["--data-path", f"{tmp_path}/in/s-{{000..001}}.tar", "--out", tmp_path / "out", "--num-workers", "2"]
    flags += ["--tokenizer", golden_data / "tok_qwen2", "--template", "qwen_2"]
    assert tool(*flags) == 2
    assert "max-bad-fraction" in capsys.readouterr().err
    assert tool(*flags, "--max-bad-fraction", "0.5") == 0
    said = capsys.readouterr().out
    assert (
        "4 samples, 4 pictures in 2 shards" in said and "2 x the record is not JSON" in said and "0 shards read" in said
    )
    reader = ShardReader(tmp_path / "out")
    assert reader.quarantined == 2 and reader.length_source is not None
    assert reader.index["shards"][0]["name"] == str(tmp_path / "in" / "s-000.tar")
    assert tool("--data-path", tmp_path / "out", "--max-bad-fraction", "0.5", "--num-workers", "0") == 0
    assert len(ShardReader(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-path", "nowhere"], "give --out"),
        (["--data-path", "nowhere", "--out", "{out}"], "nowhere names no tar"),
        (["--data-path", "*.rat", "--out", "{out}"], "names no tar"),
        (["--data-path", "{out}", "--template", "plain"], "come together"),
        (["--data-path", "{out}", "--tokenizer", "x", "--template", "chatml"], "not one of"),
        (["--data-path", "nosuch://a/b.tar", "--out", "{out}"], "nosuch"),
        (["--data-path", "gs://a/b.tar", "--out", "{out}"], "gs:// needs a package that is not installed"),
    ],
)
def test_wrong_arguments_are_one_paragraph(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert tool(*(flag.format(out=tmp_path) for flag in flags)) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
