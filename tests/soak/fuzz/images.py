"""Damage to pictures: absurd sizes, other formats and modes, animations, metadata that unpacks to a huge size."""

from __future__ import annotations

import io
import random
import struct
import zlib

from tests.soak.fuzz import mutate

SIDES = (0, 1, 5, 201, 8_192, 16_384, 20_000, 65_535, 2**31 - 1)
FORMATS = ("GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "PDF", "JPEG", "PCX", "TGA", "SGI", "JPEG2000", "AVIF", "MPO")
MODES = ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F", "YCbCr")


def mutate_image(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A picture of absurd size, of another format or mode, animated, with wrong metadata, or damaged."""
    change = rng.choice(
        (_say_size, _say_size, _bomb, _format, _format, _mode, _animate, _exif, _text, _thin, None, None)
    )
    return mutate.mutate_bytes(data, rng) if change is None else change(data, rng)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, depth: int = 1, kind: int = 0, rows: bytes | None = None) -> bytes:
    """A black PNG with one bit per pixel, made in little memory."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    if rows is None:
        rows = zlib.compress(bytes((1 + -(-width * depth // 8)) * height), 1)
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _say_size(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    width, height = rng.choice(SIDES), rng.choice(SIDES)
    if not data.startswith(b"\x89PNG"):
        return mutate.mutate_bytes(data, rng)
    chunk = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:], f"says {width}x{height}"


def _bomb(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Kilobytes that decode to many megapixels, at and over the largest allowed size."""
    width, height = rng.choice(((8_192, 8_192), (16_384, 4_096), (16_384, 16_384), (8_193, 8_192), (4_096, 4_096)))
    if rng.random() < 0.3:
        from PIL import Image

        stream, kind = io.BytesIO(), rng.choice(("WEBP", "JPEG", "GIF", "TIFF", "BMP"))
        Image.new("1" if kind in ("TIFF", "BMP") else "L", (4_096, 4_096)).save(stream, kind)
        return stream.getvalue(), f"is a {kind} of 16 megapixels"
    return _png(width, height), f"is black, {width}x{height}"


def _thin(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    size = rng.choice(((16_384, 1), (1, 16_384), (2_000, 10), (0, 5)))
    return _png(*size), f"is black, {size[0]}x{size[1]}"


def _format(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        stream, target = io.BytesIO(), rng.choice(FORMATS)
        picture.convert("RGB").save(stream, target)
    changed, what = stream.getvalue(), f"is {target}"
    if rng.random() < 0.4:
        changed, damage = mutate.mutate_bytes(changed, rng)
        what += f", {damage}"
    return changed, what


def _mode(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    from PIL import Image

    mode = rng.choice(MODES)
    with Image.open(io.BytesIO(data)) as picture:
        changed = picture.convert("L").convert("I").convert("I;16") if mode == "I;16" else picture.convert(mode)
        target = "JPEG" if mode in ("CMYK", "YCbCr") else "TIFF" if mode == "F" else "PNG"
        stream = io.BytesIO()
        changed.save(stream, target)
    return stream.getvalue(), f"is {target} of mode {mode}"


def _animate(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    from PIL import Image

    target, frames = rng.choice(("GIF", "WEBP", "PNG", "TIFF", "MPO")), rng.choice((2, 60))
    pictures = [Image.new("RGB", (64, 48), (5 * n, 0, 0)) for n in range(frames)]
    stream = io.BytesIO()
    pictures[0].save(stream, target, save_all=True, append_images=pictures[1:])
    changed = stream.getvalue()
    if rng.random() < 0.5:
        changed, _ = mutate.mutate_bytes(changed, rng)
        return changed, f"is a damaged {target} of {frames} pictures"
    return changed, f"is {target} of {frames} pictures"


def _exif(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Wrong orientation and other tags: unknown values, offsets out of the file or in a circle."""
    from PIL import Image

    entries = rng.choice(
        (
            struct.pack("<HHIHH", 0x0112, 3, 1, rng.choice((0, 3, 6, 9, 65_535)), 0),
            struct.pack("<HHII", 0x8769, 4, 1, 8),  # a directory that is itself
            struct.pack("<HHII", 0x0112, 2, 2**31, 2**31),
            struct.pack("<HHII", 0x0112, 99, 1, 1) * 500,
        )
    )
    exif = (
        b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries) // 12) + entries + rng.choice((b"", b"\x08\0\0\0"))
    )
    with Image.open(io.BytesIO(data)) as picture:
        stream, target = io.BytesIO(), rng.choice(("JPEG", "PNG", "WEBP"))
        picture.convert("RGB").save(stream, target, exif=exif)
    return stream.getvalue(), f"is {target} with EXIF {entries[:12].hex()}"


def _text(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Metadata that unpacks to megabytes, or endless chunks."""
    if not data.startswith(b"\x89PNG"):
        return mutate.mutate_bytes(data, rng)
    bomb = zlib.compress(bytes(200_000_000 // 64), 9)
    chunks = {
        "a text that unpacks to megabytes": _chunk(b"iTXt", b"a\0\1\0\0\0" + bomb),
        "a profile that unpacks to megabytes": _chunk(b"iCCP", b"a\0\0" + bomb),
        "50000 chunks": _chunk(b"tEXt", b"a\0b") * 50_000,
        "a chunk of 2 GiB": struct.pack(">I", 2**31 - 1) + b"tEXt",
    }
    what = rng.choice(list(chunks))
    return data[:33] + chunks[what] + data[33:], f"has {what}"
