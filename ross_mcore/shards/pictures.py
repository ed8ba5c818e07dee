"""The pictures that records name: files in a folder, in the spellings that people use, or embedded ones.

A name that leads nowhere is refused with the file that it may mean.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ross_mcore import checked
from ross_mcore.data.shard_reader import MAX_IMAGE_BYTES
from ross_mcore.errors import SampleError

MOST_NAMES = 1_000_000
"""Names of a folder among which a similar one is looked for."""
RAW_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
"""How the base64 of a JPEG, PNG, GIF or WebP begins."""
LEAVES = "the image path leaves the image folder"


class PictureFolder:
    """Reads pictures by name from `folder`, None if there is none, or from the records themselves.

    Names are relative to the folder, or absolute and inside it; links may leave it with `follow_links`.
    """

    def __init__(self, folder: Path | None, follow_links: bool = False) -> None:
        self.folder = None if folder is None else Path(os.path.abspath(folder))  # noqa: PTH100  links stay
        self._real = None if folder is None else checked.real_path(folder)
        self._follow_links = follow_links

    def read(self, picture: Any) -> bytes:
        """The encoded bytes of a picture, see records.picture_names. Raises SampleError."""
        if isinstance(picture, dict):
            data = picture["bytes"]
        elif isinstance(picture, str) and (picture.startswith("data:") or _is_raw_base64(picture)):
            data = _decoded(picture)
        else:
            return self._read_file(picture)
        if len(data) > MAX_IMAGE_BYTES:
            raise SampleError(f"the image is over {MAX_IMAGE_BYTES} bytes")
        return bytes(data)

    def _read_file(self, name: Any) -> bytes:
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise SampleError("image is not a path")
        try:
            path = self.find(name)
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise SampleError("the image is not a regular file")
            if status.st_size > MAX_IMAGE_BYTES:
                raise SampleError(f"the image file is over {MAX_IMAGE_BYTES} bytes")
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise SampleError(
                f"the image cannot be read: No such file {checked.shown(name)}{self._hint(name)}"
            ) from None
        except SampleError:
            raise
        except ValueError:  # of a name that is not Unicode, or of a malformed URL
            raise SampleError("image is not a path") from None
        except (OSError, RuntimeError) as error:
            raise SampleError(f"the image cannot be read: {getattr(error, 'strerror', None) or error}") from None

    def find(self, name: str) -> Path:
        """The path that a name means, which need not exist. Raises SampleError for one that leads out of the folder."""
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name)
        if scheme is not None and not name.startswith("file:"):
            raise SampleError(
                f"the image is a URL: {scheme[0]} is not fetched; download the pictures and name the files"
            )
        if self.folder is None or self._real is None:
            raise SampleError("the image is a name and there is no folder: give --image-folder")
        if name.startswith("file:"):
            parts = urlsplit(name)
            name = unquote(parts.path if parts.netloc in ("", "localhost") else parts.netloc + parts.path)
        path = self.folder / name
        if "\\" in name and not path.exists():
            path = self.folder / name.replace("\\", "/")
        lexical = Path(os.path.normpath(path))
        if checked.real_path(path).is_relative_to(self._real):
            return path
        if not lexical.is_relative_to(self.folder) or ".." in path.parts:
            similar = self._similar(name)
            raise SampleError(LEAVES + (f": write it relative to that folder, as {similar}" if similar else ""))
        if not self._follow_links:
            raise SampleError(f"{LEAVES} by a link; --follow-links allows it")
        return path

    def _hint(self, name: str) -> str:
        """Where a picture may be that is not under its name, or nothing."""
        assert self.folder is not None
        if (self.folder.parent / name).is_file():
            return f"; it is in {self.folder.parent}: give that folder as --image-folder"
        similar = self._similar(name)
        return f"; did you mean {similar}?" if similar else ""

    def _similar(self, name: str) -> str | None:
        """A file in the folder whose name differs in case, suffix or Unicode form, lacks the first folders, or is not
        written as in a URL."""
        if self.folder is None:
            return None
        for parts in (_parts(name), _parts(unquote(name.partition("?")[0]))):
            for start in range(len(parts)):
                if found := self._similar_to(parts[start:]):
                    return found
        return None

    def _similar_to(self, parts: Sequence[str]) -> str | None:
        place = self.folder
        assert place is not None
        for number, part in enumerate(parts):
            if (place / part).exists():
                place = place / part
                continue
            names = _names(place)
            last = number == len(parts) - 1
            found = names.get(_folded(part)) or (names.get(_folded(Path(part).stem)) if last else None)
            if found is None:
                return None
            place = place / found
        return str(place.relative_to(self.folder or place)) if place.is_file() else None


def stored_names(pictures: Sequence[Any], suffixes: Sequence[str]) -> list[str]:
    """The names of pictures in a record that is stored: those they have, or `embedded-0.png` ... without one."""
    named = []
    for number, (picture, suffix) in enumerate(zip(pictures, suffixes, strict=True)):
        name = picture.get("path") if isinstance(picture, dict) else picture
        plain = isinstance(name, str) and name and not name.startswith("data:") and not _is_raw_base64(name)
        named.append(str(name) if plain else f"embedded-{number}.{suffix}")
    return named


def _is_raw_base64(name: str) -> bool:
    return len(name) > 100 and name.startswith(RAW_BASE64)


def _decoded(text: str) -> bytes:
    """The bytes in a data URL, or in base64 alone. Raises SampleError."""
    header, comma, content = text.partition(",") if text.startswith("data:") else ("data:;base64", ",", text)
    if not comma or not header.endswith(";base64"):
        raise SampleError("the image is a data URL that is not in base64")
    if len(content) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        raise SampleError(f"the image is over {MAX_IMAGE_BYTES} bytes")
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError):
        raise SampleError("the image is a data URL whose base64 is damaged") from None


def _parts(name: str) -> list[str]:
    path = unquote(urlsplit(name).path) if name.startswith("file:") else name
    return [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@lru_cache(maxsize=64)
def _names(folder: Path) -> dict[str, str]:
    """The names in a folder by their folded form, files also by it without suffix."""
    found: dict[str, str] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in islice(entries, MOST_NAMES):
                found.setdefault(_folded(Path(entry.name).stem), entry.name)
                found[_folded(entry.name)] = entry.name
    except OSError:
        return {}
    return found
