"""Tars of other programs, damaged or not: every sample is indexed or quarantined."""

from __future__ import annotations

import io
import json
import os
import tarfile
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
from ross_mcore.data.shard_reader import MAX_IMAGE_BYTES, MAX_RECORD_BYTES
from ross_mcore.shards.index_parts import PARTS
from ross_mcore.shards.measure import Measure, index_tar
from ross_mcore.shards.tars import Damage, walk_tar
from tests.unit.shards.tars import (
    BROKEN,
    JPEG,
    KIND,
    NAME,
    OK,
    PNG,
    RECORD,
    SIZE,
    TEXT,
    TURNS,
    WHOLE,
    around,
    caption,
    header_at,
    indexed,
    of_kind,
    pax,
    picture,
    png,
    sample,
    tar,
    text_bomb,
    turns,
    with_header,
    zipped,
)

BAD = "bad"
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
    "a cut JPEG": (JPEG[:-150], "truncated"),
    "a cut PNG": (PNG[:-60], "truncated"),
    "a cut WebP": (picture("WEBP")[:-40], "undecodable"),
    "a JPEG's first bytes": (JPEG[:2], "undecodable"),
    "a PNG as large as a bomb": (png(60_000, 60_000), "too large"),
    "a PNG of 2^31 pixels a side": (png(2**31 - 1, 2**31 - 1), "a picture is"),
    "a PNG of no pixel": (png(0, 0), "a picture is"),
    "a thread": (png(4000, 2), "thin"),
    "a PNG with a bomb of text": (text_bomb(), "undecodable: a PNG with over a MiB of text"),
    "a PNG with a wrong checksum": (PNG[:20] + b"\xff" + PNG[21:], "a picture is"),
    "a PNG without data": (png(24, 16), "truncated"),
    "text": (b"not a picture", "undecodable"),
    "a page": (b"<html>404</html>", "undecodable"),
    "a drawing": (b"<svg></svg>", "undecodable: SVG"),
    "a cut GIF": (picture("GIF")[:-60], "truncated"),
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
    "a picture of an unknown kind": (lambda: around(sample("bad", suffix="svg")), reasons("the shard has 0")),
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
            assert decode_image(reader.image_bytes(number, ordinal)).picture.mode == "RGB"
    written = {path.name for path in (tmp_path / "data").iterdir()}
    assert written <= {"case.tar", "index.json", "samples.npy", "images.npy", "keys.txt", "quarantine.jsonl", PARTS}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def scan(data: bytes) -> tuple[set[str], set[str], int]:
    """(indexed keys, quarantined keys, lost bytes) of an unnamed tar."""
    descriptor = os.memfd_create("case")
    try:
        os.write(descriptor, data)
        part = index_tar(descriptor, Measure(), verify_images=False)
    finally:
        os.close(descriptor)
    return set(part.keys.decode().split()), {key for key, _ in part.quarantine}, part.lost_bytes


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, len(WHOLE)))
def test_a_tar_cut_anywhere_gives_its_complete_samples(cut: int) -> None:
    kept, bad, _ = scan(WHOLE[:cut])
    assert not kept & bad
    for key in ("before", "bad", "after"):
        first, last = header_at(f"{key}.jpg", WHOLE), header_at(f"{key}.json", WHOLE) + 512 + len(RECORD)
        assert (key in kept) == (cut >= last), key
        assert (key in bad) == (first + 512 <= cut < last), key


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, len(WHOLE) - 1), noise=st.binary(min_size=1, max_size=600))
def test_damage_affects_no_other_sample(place: int, noise: bytes) -> None:
    """Overwriting bytes of one sample or between samples never loses another one whose headers come later."""
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
