"""Damage to tars: members of other kinds, wrong names and sizes, headers that claim too much."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable

from tests.soak.fuzz import mutate

Members = list[tuple[tarfile.TarInfo, bytes]]
NAMES = (
    *(
        "../../out.json",
        "/abs/x.json",
        "a" * 2000 + ".json",
        "\x1b[31m.json",
        ".json",
        "x.json.json",
        "..",
        "a\nb.json",
    ),
    *("\udcff\udcfe.json", "", "/", "a/../../b.json", "c:\\x.json", "a" * 300 + "/b.json", "x.99999999999.png"),
    *("a.b.json", "a.b.jpg", "a.b.jpg.txt", "x.img0.gif", "x.0_y.v2.JPG", "x.left.png", "x.caption"),
    "x." * 2000 + "json",
)
CHANGES = (*("content",) * 5, *("kind", "headers") * 2, "name", "twice", "gone", "size", "number")
KINDS = (
    *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE),
    *(tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE, b"Z"),
)


def mutate_tar(
    data: bytes, rng: random.Random, content_mutator: Callable[[str], Callable[..., tuple[bytes, str]]]
) -> tuple[bytes, str]:
    """A tar with one member changed, renamed, doubled, of another kind, or with wrong headers."""
    if rng.random() < 0.2:
        return mutate.mutate_bytes(data, rng)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members: Members = [(info, tar.extractfile(info).read()) for info in tar if info.isfile()]  # type: ignore[union-attr]
    place = rng.randrange(len(members))
    info, content = members[place]
    was = info.name
    change = rng.choice(
        (*("content",) * 5, "name", "twice", "kind", "kind", "gone", "size", "headers", "headers", "number")
    )
    before, kind = b"", tarfile.PAX_FORMAT
    if change == "content":
        content, what = content_mutator(was)(content, rng)
        info.size, members[place] = len(content), (info, content)
    elif change == "name":
        info.name = rng.choice((*NAMES, was + ".png", was.replace(".", "..", 1), was.upper()))
        what = f"is called {info.name!r:.60}"
    elif change == "kind":
        info.type = rng.choice(KINDS)
        info.linkname = rng.choice(("../../canary/secret.txt", "/etc/hostname", members[0][0].name, was))
        what = f"is of kind {info.type!r}"
    elif change == "twice":
        members += [(info, content)] * rng.choice((1, 1, 300))
        what = "comes twice"
    elif change == "gone":
        del members[place]
        what = "is gone"
    elif change == "size":
        info.pax_headers = {"size": rng.choice(("-1", "9" * 30, "1e3", "0", str(info.size * 2), "９", str(2**63)))}
        what = f"says size {info.pax_headers['size']:.20}"
    elif change == "headers":
        before, what = _headers(rng)
    else:
        return _number(data, rng)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind, errors="surrogateescape") as tar:
        for number, (info, content) in enumerate(members):
            if number == place and before:
                stream.write(before)
                tar.offset += len(before)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue(), f"{was} {what}"


def _headers(rng: random.Random) -> tuple[bytes, str]:
    """Extension headers with impossible content."""

    def block(kind: bytes, content: bytes, size: int | None = None) -> bytes:
        info = tarfile.TarInfo("././@Header")
        info.type, info.size = kind, len(content) if size is None else size
        return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)

    def field(key: str, value: str) -> bytes:
        text = f" {key}={value}\n".encode("utf-8", "surrogateescape")
        size = len(text) + 1
        while len(str(size)) + len(text) != size:
            size += 1
        return str(size).encode() + text

    choices = {
        "a sparse file": block(
            tarfile.XHDTYPE, field("GNU.sparse.major", "1") + field("GNU.sparse.realsize", str(2**50))
        ),
        "a sparse name": block(tarfile.XHDTYPE, field("GNU.sparse.name", "../../x.json")),
        "a path of many folders": block(tarfile.XHDTYPE, field("path", "../" * 5_000 + "x.json")),
        "a million fields": block(tarfile.XHDTYPE, field("a", "b") * 100_000),
        "fields of a megabyte": block(tarfile.XHDTYPE, field("comment", "x" * 1_100_000)),
        "a field that is longer than it is": block(tarfile.XHDTYPE, b"99999999 a=b\n"),
        "a field of no length": block(tarfile.XHDTYPE, b"0 a=b\n-1 c=d\n"),
        "a header of a gigabyte": block(tarfile.XHDTYPE, b"", 2**30),
        "a long name without end": block(tarfile.GNUTYPE_LONGNAME, b"", 2**40),
        "a thousand long names": block(tarfile.GNUTYPE_LONGNAME, b"x.json\0") * 1_000,
        "a name for all": block(tarfile.XGLTYPE, field("path", "all.json") + field("size", "5")),
        "a charset": block(tarfile.XHDTYPE, field("hdrcharset", "BINARY") + field("path", "\udcff.json")),
    }
    what = rng.choice(list(choices))
    return choices[what], f"is announced by {what}"


def _number(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Changes a number in the first header to text, a negative or a huge one, with a valid checksum."""
    place, length = rng.choice(((124, 12), (100, 8), (136, 12), (329, 8)))
    value = rng.choice(
        (b"-1", b"\xff" * length, b"\x80" + b"\xff" * (length - 1), b"9" * length, b"\0" * length, b"7" * length)
    )
    header = bytearray(data[:512])
    header[place : place + length] = value[:length].ljust(length, b" ")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + data[512:], f"the first header has {bytes(value[:length])!r} at {place}"
