"""Finds the members of a tar, damaged or not, and groups them into samples.

`tarfile` ends silently at a damaged header and may read as much as a header claims. Here it decodes headers only, so
that damage is reported, members behind it are found, and no more is read than the file has.
Names of members are keys, never paths of files.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ross_mcore.data.shard_reader import (
    IMAGE_SUFFIXES,
    MAX_IMAGE_BYTES,
    MAX_IMAGES,
    MAX_KEY_BYTES,
    MAX_PART_BYTES,
    MAX_RECORD_BYTES,
    PART_SUFFIXES,
    RECORD_SUFFIXES,
)

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


@dataclass
class TarSample:
    """The members with the same key, by suffix."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    problem: str | None = None

    @property
    def pictures(self) -> list[Member]:
        """The pictures, sorted by number, then place in the tar."""
        numbered = [
            (int(number or 0), member.offset, member)
            for suffix, member in self.members.items()
            for number, _, kind in [suffix.rpartition(".")]
            if kind in IMAGE_SUFFIXES
        ]
        return [member for *_, member in sorted(numbered, key=lambda picture: picture[:2])]

    @property
    def parts(self) -> dict[str, Member]:
        """The precomputed parts of the pictures, by kind."""
        return {kind: self.members[suffix] for suffix, kind in PART_SUFFIXES.items() if suffix in self.members}


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


def group_members(members: Iterable[Member]) -> tuple[list[TarSample], int]:
    """(samples in the order of their first members, number of members of no sample).

    As in WebDataset, the key is a member's name up to the first dot of its last part, and the rest is the suffix, in
    lower case. Members of a sample need not be neighbours. A repeated name begins a second sample with the same key.
    """
    samples: list[TarSample] = []
    latest: dict[str, TarSample] = {}
    others = 0
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        suffix = suffix.lower()
        number, _, kind = suffix.rpartition(".")
        picture = kind in IMAGE_SUFFIXES and (not number or (number.isascii() and number.isdigit() and len(number) < 9))
        if not picture and suffix not in RECORD_SUFFIXES and suffix not in PART_SUFFIXES:
            others += 1
            continue
        key = f"{folder}{slash}{stem}".removeprefix("./")
        sample = latest.get(key)
        if sample is None or suffix in sample.members:
            again = "the key comes twice in its shard, the first one counts" if sample is not None else None
            sample = latest[key] = TarSample(key, problem=_key_problem(key) or again)
            samples.append(sample)
        sample.members[suffix] = member
        limit = MAX_IMAGE_BYTES if picture else MAX_PART_BYTES if suffix in PART_SUFFIXES else MAX_RECORD_BYTES
        if sample.problem is None:
            problem = member.problem or ("is empty" if member.size == 0 else None)
            problem = problem or (f"is over {limit} bytes" if member.size > limit else None)
            sample.problem = problem and f"its .{suffix} {problem}"
    for sample in samples:
        if sample.problem is None and not any(suffix in sample.members for suffix in RECORD_SUFFIXES):
            sample.problem = "it has neither .json nor .txt"
        if sample.problem is None and len(sample.pictures) > MAX_IMAGES:
            sample.problem = f"it has over {MAX_IMAGES} pictures"
    return samples, others


def reportable(key: str) -> str:
    """A key as valid Unicode for a report."""
    return key.encode("utf-8", "backslashreplace").decode()


def read_samples(descriptor: int) -> list[TarSample]:
    """The samples of an open tar that this program wrote."""
    return group_members(member for member in walk_tar(descriptor) if isinstance(member, Member))[0]


def picture_members(pictures: Sequence[tuple[str, bytes]]) -> dict[str, bytes]:
    """(suffix, bytes) of a sample's pictures -> members by suffix: `jpg` for one, `0.jpg`, `1.png` ... for several."""
    if len(pictures) == 1:
        return dict(pictures)
    return {f"{number}.{suffix}": data for number, (suffix, data) in enumerate(pictures)}


def _key_problem(key: str) -> str | None:
    """Why a name is not a valid key: keys are in keys.txt, in reports and in file names of pictures of a run."""
    if not key or key.endswith("/"):
        return "it has no key"
    try:
        size = len(key.encode("utf-8"))
    except UnicodeEncodeError:
        return "its key is not UTF-8"
    if size > MAX_KEY_BYTES:
        return f"its key is over {MAX_KEY_BYTES} bytes"
    if not key.isprintable():
        return "its key has control characters"
    if key.startswith("/") or "\\" in key or ".." in key.split("/") or key[1:3] == ":/":
        return "its key leads out of a folder"
    return None


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
