"""Opens pictures with PIL: which formats are read, without PIL's messages, cut-off files refused or filled.

PIL's switches belong to the whole process: its limit of pixels, Python's filter of warnings, LOAD_TRUNCATED_IMAGES.
Here they are set for one call in one thread, and a program that uses PIL itself keeps what it has set.
"""

from __future__ import annotations

import ctypes
import io
import logging
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    _imaging,
)

from ross_mcore.errors import ImageError

READERS: dict[str, tuple[Any, Any]] = {
    "PNG": (PngImagePlugin.PngImageFile, PngImagePlugin._accept),
    "JPEG": (JpegImagePlugin.jpeg_factory, JpegImagePlugin._accept),
    "WEBP": (WebPImagePlugin.WebPImageFile, WebPImagePlugin._accept),
    "GIF": (GifImagePlugin.GifImageFile, GifImagePlugin._accept),
    "BMP": (BmpImagePlugin.BmpImageFile, BmpImagePlugin._accept),
    "TIFF": (TiffImagePlugin.TiffImageFile, TiffImagePlugin._accept),
    "PPM": (PpmImagePlugin.PpmImageFile, PpmImagePlugin._accept),
    "AVIF": (AvifImagePlugin.AvifImageFile, AvifImagePlugin._accept),
    "JPEG2000": (Jpeg2KImagePlugin.Jpeg2KImageFile, Jpeg2KImagePlugin._accept),
}
"""Format -> PIL's class and its test of the first 16 bytes. HEIF (`_heif`) is read too. Formats that start another
program (PostScript), draw (WMF, SVG), or have no mark at their beginning (TGA) are not read."""
FORMATS = (*READERS, "HEIF")

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
NEW_SUBFILE_TYPE, DNG_VERSION = 254, 50706
"""Tags of a TIFF: 1 for a preview; the version of a DNG."""
OTHER_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer instead of the picture: run `git lfs pull`"),
    (b"<!doctype", "an HTML page, as a server sends it instead of a picture: download it again"),
    (b"<html", "an HTML page, as a server sends it instead of a picture: download it again"),
    (b"<svg", "SVG, a drawing: save it as PNG"),
    (b"<?xml", "XML or SVG: save a drawing as PNG, or download the picture again"),
    (b"{", "JSON text, as a server sends it instead of a picture: download it again"),
    (b"%pdf", "PDF: save its page as PNG"),
    (b"%!ps", "PostScript: save it as PNG"),
    (b"8bps", "PSD: save it as PNG"),
    (b"\xff\x0a", "JPEG XL: save it as PNG"),
    (b"\0\0\0\x0cjxl ", "JPEG XL: save it as PNG"),
    (b"\0\0\1\0", "ICO: save it as PNG"),
    (b"qoif", "QOI: save it as PNG"),
    (b"\x1a\x45\xdf\xa3", "a video: save its frames as JPEG"),
    (b"pk\3\4", "a zip archive: unpack it"),
    (b"\x1f\x8b", "gzip data: unpack it"),
    (b"\x93numpy", "a NumPy array: save it as PNG"),
)
"""Beginning of a file in lower case -> what it is, for the reason that is reported."""


class _Call(threading.local):
    """What the current call in this thread asks of PIL; outside of a call PIL is as the program has set it."""

    quiet: bool = False
    fill: bool | None = None


_call = _Call()


class _Truncated:
    """PIL's LOAD_TRUNCATED_IMAGES: what the call in this thread asks, else what the program has set."""

    def __init__(self, otherwise: bool) -> None:
        self.otherwise = otherwise

    def __bool__(self) -> bool:
        return self.otherwise if _call.fill is None else _call.fill


class _Messages(logging.Filter):
    """Matches PIL's messages during a call: a module pattern of Python's filter of warnings, a filter of its log."""

    def match(self, module: str) -> bool:
        return _call.quiet and module.partition(".")[0] in ("PIL", "pillow_heif")

    def filter(self, _: logging.LogRecord) -> bool:
        return not _call.quiet


_messages = _Messages()
_ignored: Any = ("ignore", None, Warning, _messages, 0)
TiffImagePlugin.logger.addFilter(_messages)


@contextmanager
def quiet_pil(fill: bool | None = None) -> Iterator[None]:
    """Within it PIL warns of nothing in this thread; `fill`: whether PIL fills what a cut-off file lacks."""
    if list(warnings.filters[:1]) != [_ignored]:  # another filter may have been put before it
        warnings.filters[:] = [_ignored, *(entry for entry in warnings.filters if entry is not _ignored)]  # type: ignore[index]  # a list, whatever its stub says
    if not isinstance(ImageFile.LOAD_TRUNCATED_IMAGES, _Truncated):
        ImageFile.LOAD_TRUNCATED_IMAGES = _Truncated(bool(ImageFile.LOAD_TRUNCATED_IMAGES))  # type: ignore[assignment]  # PIL asks for its truth only
    before = _call.quiet, _call.fill
    _call.quiet, _call.fill = True, _call.fill if fill is None else fill
    try:
        yield
    finally:
        _call.quiet, _call.fill = before


@cache
def _quiet_libtiff() -> None:
    """Silences libtiff, which writes to the process's stderr what is wrong in a file, without the file's name.

    What PIL raises for the file is reported. Where PIL brings its own copy of libtiff, no other program part uses it.
    """
    with suppress(OSError, AttributeError):  # a PIL without libtiff, or whose library cannot be asked
        library = ctypes.CDLL(_imaging.__file__)
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
            function(None)


def open_picture(data: bytes) -> Image.Image:
    """A picture with its header read and no pixel decoded. Raises ImageError, or any error of PIL for a hostile file.

    `Image.open` would apply PIL's limit of pixels, which is lower than that of image.py for JPEG.
    """
    prefix, problem = data[:16], ""
    for factory, accept in READERS.values():
        accepted = accept(prefix)
        if isinstance(accepted, str):  # this PIL was built without the format
            problem = accepted
        elif accepted:
            if factory is TiffImagePlugin.TiffImageFile:
                _quiet_libtiff()
            try:
                picture: Image.Image = factory(io.BytesIO(data), "")
            except (SyntaxError, IndexError, TypeError, struct.error) as error:
                problem = str(error)  # another format has the same beginning
            else:
                _require_whole(picture, data)
                return picture
    if prefix[4:8] == b"ftyp":
        if prefix[8:12] in HEIF_BRANDS:
            return _heif(data)
        if not problem:
            raise ImageError("undecodable: a video, or a picture in a container that is not read; save it as JPEG")
    if not problem:
        raise ImageError(f"undecodable: {_what(data)}")
    if problem == "unknown pixel mode":
        problem = "a TIFF that PIL does not read, such as of colours in floats or of over 4 channels; save it as PNG"
    raise ImageError(f"undecodable: {problem}")


def _require_whole(picture: Image.Image, data: bytes) -> None:
    """Raises ImageError for a TIFF whose first picture is a preview, as in the raw files of cameras (DNG, NEF, CR2)."""
    tags: Any = getattr(picture, "tag_v2", {})  # of TIFF only
    if tags and (tags.get(NEW_SUBFILE_TYPE, 0) == 1 or DNG_VERSION in tags or data[8:10] == b"CR"):
        raise ImageError("undecodable: a camera's raw file, or a TIFF that begins with a preview; save it as JPEG")


def _heif(data: bytes) -> Image.Image:
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise ImageError("HEIC, which needs `pip install pillow-heif` (the extra `heif` of this package)") from None
    picture: Image.Image = HeifImageFile(io.BytesIO(data))
    return picture


def _what(data: bytes) -> str:
    beginning = data[:64].lstrip().lower()
    if not data:
        return "an empty file"
    if data[128:132] == b"DICM":
        return "DICOM: choose its window and save it as PNG"
    known = next((what for mark, what in OTHER_FILES if beginning.startswith(mark) or data.startswith(mark)), None)
    return known or f"not one of {', '.join(FORMATS)}"
