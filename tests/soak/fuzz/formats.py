"""Damage that only who knows a format can do: headers that promise too much, members of archives, hostile pickles."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.soak.fuzz import mutate

Mutator = Callable[[bytes, random.Random], tuple[bytes, str]]
OPENED = "a pickle of this file was run"
"""What stands in the file that a hostile pickle writes when somebody runs it."""


class _Bomb:
    """An object whose pickle, run, leaves a file in the working directory."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"echo '{OPENED}' > pickled",)


def mutate_safetensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A safetensors file whose header says something else than its bytes hold."""
    length = int.from_bytes(data[:8], "little")
    kind = rng.random()
    if kind < 0.3:
        return mutate.mutate_bytes(data, rng)
    if kind < 0.4:
        length = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, length - 1, length + 1))
        return length.to_bytes(8, "little") + data[8:], f"the header has {length} bytes"
    header, what = mutate.mutate_json(data[8 : 8 + length], rng)
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :], f"header: {what}"


def mutate_image(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A picture of absurd size, of another format, or damaged."""
    kind = rng.random()
    if kind < 0.4 and data.startswith(b"\x89PNG"):
        width, height = (rng.choice((0, 1, 5, 20_000, 65_535, 2**31 - 1)) for _ in range(2))
        chunk = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:], f"says {width}x{height}"
    if kind < 0.6:
        from PIL import Image

        with Image.open(io.BytesIO(data)) as picture:
            stream, target = io.BytesIO(), rng.choice(("GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "PDF", "JPEG"))
            picture.convert("RGB").save(stream, target)
        return stream.getvalue(), f"is {target}"
    if kind < 0.7:
        bomb = zlib.compress(bytes(200_000_000 // 64), 9)
        chunk = b"iTXt" + b"a\0\1\0\0\0" + bomb
        place = 33
        text = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return data[:place] + text + data[place:], "has a text that unpacks to megabytes"
    return mutate.mutate_bytes(data, rng)


def mutate_tar(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A tar with one member changed, renamed, doubled or of another kind."""
    if rng.random() < 0.3:
        return mutate.mutate_bytes(data, rng)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar if info.isfile()]  # type: ignore[union-attr]
    place = rng.randrange(len(members))
    info, content = members[place]
    was = info.name
    change = rng.choice(("content", "content", "content", "content", "name", "twice", "kind", "gone", "size"))
    if change == "content":
        content, what = by_suffix(was)(content, rng)
        info.size, members[place] = len(content), (info, content)
        what = f"{was}: {what}"
    elif change == "name":
        names = ("../../out.json", "/abs/x.json", "a" * 2000 + ".json", "\x1b[31m.json", ".json", "x.json.json", "..")
        info.name = rng.choice((*names, was + ".png", was.replace(".", "..", 1), was.upper()))
        what = f"{was} is called {info.name!r:.60}"
    elif change == "kind":
        info.type = rng.choice(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"Z")
        )
        info.linkname = "../../canary/secret.txt"
        what = f"{was} is of kind {info.type!r}"
    elif change == "twice":
        members.append((info, content))
        what = f"{was} comes twice"
    elif change == "gone":
        del members[place]
        what = f"{was} is gone"
    else:
        info.pax_headers = {"size": rng.choice(("-1", "9" * 30, "1e3", "0", str(info.size * 2)))}
        what = f"{was} says size {info.pax_headers['size']:.20}"
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue(), what


def mutate_npy(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """An .npy whose header promises other rows than there are, or objects."""
    if rng.random() < 0.5:
        return mutate.mutate_bytes(data, rng)
    length = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + length].decode("latin1")
    shape = header[header.index("'shape'") :].split(")")[0] + ")"
    changes = {
        "objects": (header[header.index("'descr'") : header.index(", 'fortran_order'")], "'descr': '|O'"),
        "a huge shape": (shape, f"'shape': ({2**40},)"),
        "a negative shape": (shape, "'shape': (-1,)"),
        "two dimensions": (shape, "'shape': (1, 1)"),
        "other bytes in the row": ("<u4", "<u8"),
        "another byte order": ("<u8", ">u8"),
        "code": (shape, "'shape': __import__('os')"),
    }
    what = rng.choice(list(changes))
    changed = header.replace(*changes[what]).encode("latin1").strip()
    changed += b" " * (-(len(changed) + 11) % 64) + b"\n"
    return data[:8] + len(changed).to_bytes(2, "little") + changed + data[10 + length :], f"says {what}"


def mutate_zip(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A zip (.npz, torch.save) with one member changed, gone, or a pickle that runs code."""
    if rng.random() < 0.4:
        return mutate.mutate_bytes(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = rng.choice([name for name in members if members[name]] or list(members))
    if name.endswith(".pkl"):
        members[name], what = mutate_pickle(members[name], rng)
    elif rng.random() < 0.2:
        del members[name]
        what = "gone"
    else:
        members[name], what = (mutate_npy if name.endswith(".npy") else mutate.mutate_bytes)(members[name], rng)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return stream.getvalue(), f"{name}: {what}"


def mutate_distcp(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A file of zips one after the other: bytes alone, since places in it are in another file."""
    return mutate.mutate_bytes(data, rng)


def mutate_pickle(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A pickle that runs code, nests without end, promises much, or is damaged."""
    hostile = {
        "code": pickle.dumps({"a": _Bomb()}),
        "old code": b"cos\nsystem\n(S'echo pickled > pickled'\ntR.",
        "eval": b"c__builtin__\neval\n(S'1'\ntR.",
        "a deep list": b"(" * 50_000 + b"l" * 50_000 + b".",
        "promised bytes": b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b".",
        "a huge memo": b"\x80\x04Nr\xff\xff\xff\x7f.",
        "a list": pickle.dumps([1, 2]),
        "a dict": pickle.dumps({"a": 1, 2: "b"}),
        "a huge number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    }
    if rng.random() < 0.5:
        return mutate.mutate_bytes(data, rng)
    name = rng.choice(list(hostile))
    return hostile[name], f"is {name}"


SUFFIXES: dict[str, Mutator] = {
    ".json": mutate.mutate_json,
    ".jsonl": mutate.mutate_lines,
    ".yaml": mutate.mutate_yaml,
    ".safetensors": mutate_safetensors,
    ".png": mutate_image,
    ".tar": mutate_tar,
    ".npy": mutate_npy,
    ".npz": mutate_zip,
    ".pt": mutate_zip,
    ".bin": mutate_zip,
    ".distcp": mutate_distcp,
    ".metadata": mutate_pickle,
}


def by_suffix(name: str) -> Mutator:
    """What knows the format of a file; a third of the time, in its place, what knows none."""
    path = Path(name)
    known = SUFFIXES.get(path.suffix or path.name, mutate.mutate_bytes)

    def mutator(data: bytes, rng: random.Random) -> tuple[bytes, str]:
        try:
            return (mutate.mutate_bytes if rng.random() < 0.2 else known)(data, rng)
        except (ValueError, yaml.YAMLError, tarfile.TarError, zipfile.BadZipFile, OSError, RecursionError):
            return mutate.mutate_bytes(data, rng)  # a second damage to what the first left unreadable

    return mutator


def damage(path: Path, folder: Path, rng: random.Random) -> str:
    """Damages one file of `folder`: its content mostly, sometimes what stands under its name. Says what was done."""
    name = path.relative_to(folder).as_posix()
    if rng.random() < 0.85:
        changed, what = by_suffix(path.name)(path.read_bytes(), rng)
        path.unlink()
        path.write_bytes(changed)
        return f"{name}: {what}"
    path.unlink()
    kind = rng.choice(("gone", "gone", "a folder", "a link to nowhere", "a link to itself", "a link to another file"))
    if kind == "a folder":
        path.mkdir()
    elif kind == "a link to nowhere":
        path.symlink_to("nowhere")
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    elif kind == "a link to another file":
        others = sorted(other for other in folder.rglob("*") if other.is_file() and other.suffix == path.suffix)
        path.symlink_to(rng.choice(others).resolve() if others else "/etc/hostname")
    return f"{name} is {kind}"
