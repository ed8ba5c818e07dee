"""Finds the members of a tar, damaged or not.

`tarfile` ends silently at a damaged header and may read as much as a header claims. Here it decodes headers only, so
that damage is reported, members behind it are found, and no more is read than the file has.
Names of members are keys, never paths of files.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER_DATA = 1 << 20
"""Maximum bytes of a long name or a pax header; a larger one is damage."""
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE, *PAX)
MAGIC = 257
"""Offset of "ustar" in a header."""
SEARCH_BYTES = 1 << 20
OTHER_FILES = (
    (b"\x1f\x8b", "gzip data", "unpack it with gunzip"),
    (b"BZh", "bzip2 data", "unpack it with bunzip2"),
    (b"\xfd7zXZ", "xz data", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data", "unpack it with unzstd"),
    (b"\x04\x22\x4d\x18", "LZ4 data", "unpack it with unlz4"),
    (b"PK\x03\x04", "a zip archive", "unpack it and make a tar of its files"),
    (b"PK\x05\x06", "an empty zip archive", "copy it again"),
    (b"7z\xbc\xaf\x27", "a 7z archive", "unpack it and make a tar of its files"),
    (b"Rar!", "a rar archive", "unpack it and make a tar of its files"),
    (b"PAR1", "a parquet file", "make shards of it with make_shards.py"),
    (b"version https://git-lfs", "a pointer of git-lfs", "fetch the file with git lfs pull"),
    (b"\xff\xd8\xff", "a JPEG picture", "make a tar of it and its record"),
    (b"\x89PNG", "a PNG picture", "make a tar of it and its record"),
    (b"<", "an HTML or XML page", "it may be a server's error message: download the shard again"),
    (b"{", "JSON", "make shards of it with make_shards.py, or download the shard again if it is an error message"),
    (b"[", "JSON", "make shards of it with make_shards.py"),
)
"""First bytes of files that are often taken for tars: (bytes, what the file is, remedy)."""


@dataclass(frozen=True)
class Member:
    """A member that is not a folder: `size` bytes at `offset`, not usable if it has a `problem`."""

    name: str
    offset: int
    size: int
    problem: str | None = None


@dataclass(frozen=True)
class Damage:
    """Damaged bytes of a tar, from `start` to `end`."""

    start: int
    end: int


def what_it_is(first_bytes: bytes) -> str | None:
    """What a file that is no tar is, and the remedy; None if it is not known."""
    begin = first_bytes.removeprefix(b"\xef\xbb\xbf").lstrip()
    known = (f"it is {what}; {remedy}" for magic, what, remedy in OTHER_FILES if begin.startswith(magic))
    return next(known, None)


def walk_tar(descriptor: int) -> Iterator[Member | Damage]:
    """The members of an open tar in file order, and its damage.

    After damage, members continue at the next complete ustar header. Zeros between concatenated archives are skipped.
    Raises OSError when the file cannot be read, and nothing for its content.
    """
    total, offset = os.fstat(descriptor).st_size, 0
    long_name, pax = None, {}
    content_end = 0  # of the last member: bytes may be missing after it
    announced_from: int | None = None  # first of the extension headers of the next member
    while offset < total:
        block = os.pread(descriptor, BLOCK, offset)
        if not block.strip(b"\0"):
            offset += BLOCK
            continue
        data, damaged_from, search_from = offset + BLOCK, offset, offset + 1
        header = _header(block)
        if header is not None and header.type in EXTENSIONS:
            extra = os.pread(descriptor, header.size, data) if header.size <= MAX_HEADER_DATA else b""
            if len(extra) == header.size:
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    long_name = extra.rstrip(b"\0").decode("utf-8", "surrogateescape")
                elif header.type in PAX:
                    pax = _pax_fields(extra)
                announced_from = offset if announced_from is None else announced_from
                content_end = data + header.size
                offset = data + _padded(header.size)
                continue
        elif header is not None:
            member, end = _member(header, data, total, long_name, pax)
            if member is not None:
                long_name, pax, announced_from = None, {}, None
                if header.type != tarfile.DIRTYPE:
                    yield member
                if end <= total:
                    content_end, offset = min(end, data + member.size), end
                    continue
                damaged_from = search_from = data  # the tar ends, or the size is wrong and complete members follow
        else:
            search_from = content_end
        long_name, pax, announced_from = None, {}, None
        found = _next_header(descriptor, search_from, total)
        if damaged_from < total:
            yield Damage(damaged_from if damaged_from <= found else content_end, found)
        offset = found
    if announced_from is not None:
        yield Damage(announced_from, total)


def _member(
    header: tarfile.TarInfo, data: int, total: int, long_name: str | None, pax: dict[str, str]
) -> tuple[Member | None, int]:
    """(the member whose content begins at `data`, offset of the next header); None for an impossible size."""
    size = _pax_size(pax, header.size)
    if size is None:
        return None, total
    regular = header.type in REGULAR
    sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in pax)
    has_content = regular or sparse or header.type not in tarfile.SUPPORTED_TYPES
    problem = None
    if sparse:
        problem = "is a sparse file"
    elif header.type in LINKS:
        problem = "is a link"
    elif not regular:
        problem = "is not a regular file"
    if has_content and data + size > total:
        problem = "is cut off by the end of the shard"
    name = pax.get("path", long_name or header.name)
    cut = has_content and data + size > total
    return Member(name, data, size, problem), total + 1 if cut else min(total, data + _padded(size) * has_content)


def _next_header(descriptor: int, start: int, total: int) -> int:
    """Offset of the first complete ustar header from `start` on, or `total`."""
    while start < total:
        window = os.pread(descriptor, SEARCH_BYTES, start)
        place = window.find(b"ustar", MAGIC)
        while place >= 0:
            block = window[place - MAGIC : place - MAGIC + BLOCK]
            if len(block) == BLOCK and _header(block) is not None:
                return start + place - MAGIC
            place = window.find(b"ustar", place + 1)
        if len(window) < SEARCH_BYTES:
            break
        start += SEARCH_BYTES - BLOCK
    return total


def _header(block: bytes) -> tarfile.TarInfo | None:
    """The header in a block, None if the block is not a header."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError):
        return None
    return header if header.size >= 0 else None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _pax_size(fields: dict[str, str], size: int) -> int | None:
    """The size of a member in its pax fields, else `size`; None for an invalid one."""
    given = fields.get("size", str(size))
    return int(given) if given.isascii() and given.isdigit() and len(given) < 20 else None


def _pax_fields(data: bytes) -> dict[str, str]:
    """The fields `length key=value` of a pax header before the first malformed one."""
    fields, place = {}, 0
    while place < len(data):
        digits, space, _ = data[place : place + 20].partition(b" ")
        if not space or not digits.isdigit() or int(digits) <= len(digits) + 1 or place + int(digits) > len(data):
            break
        key, _, value = data[place + len(digits) + 1 : place + int(digits) - 1].partition(b"=")
        fields[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        place += int(digits)
    return fields
