"""Reads a run's TensorBoard files: pictures, starts, options and the figures that metrics.jsonl does not have.

A file is a list of records: length (8 bytes), checksum (4), an Event, checksum (4).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

MOST_RECORD_BYTES = 64 << 20
MOST_OPTIONS_CHARACTERS = 1 << 20
_HEADER = struct.Struct("<QI")


@dataclass(frozen=True)
class Start:
    """A start of training. iteration: the first that it computed; seconds: since 1970."""

    iteration: int
    seconds: float


@dataclass(frozen=True)
class PictureAt:
    """Where a picture of `iteration` lies: the record at `offset` of `file`, `size` bytes long."""

    iteration: int
    file: Path
    offset: int
    size: int


@dataclass
class Events:
    """What TensorBoard's files say. scalars: tag -> iteration -> value; pictures: tag -> iteration -> its place.

    What an abandoned branch wrote is left out, as TensorBoard hides it. damaged: files that could not be read to their
    end.
    """

    starts: list[Start] = field(default_factory=list)
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    pictures: dict[str, dict[int, PictureAt]] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


def read_events(folder: Path, is_wanted: Callable[[str], bool], advance: Callable[[int], None]) -> Events:
    """Reads the files of a folder, oldest first; the scalars whose tag `is_wanted`. advance: called with bytes read.

    A last record that is being written is left out. Raises OSError.
    """
    found = Events()
    for path in sorted(folder.glob("events.out.tfevents.*")):
        if not path.is_file():
            continue
        try:
            for offset, size, event in _records(path):
                _take(found, PictureAt(event.step, path, offset, size), event, is_wanted)
                advance(size)
        except ValueError:
            found.damaged.append(path.name)
    return found


def read_picture(place: PictureAt, tag: str) -> bytes:
    """The encoded picture of `tag` in a record. Raises OSError, ValueError."""
    with place.file.open("rb") as stream:
        stream.seek(place.offset)
        event = _parse(stream.read(place.size))
    for value in event.summary.value:
        if value.tag == tag:
            return bytes(value.image.encoded_image_string)
    raise ValueError("it has changed meanwhile")


def _records(path: Path) -> Iterator[tuple[int, int, Event]]:
    """Offset, size and event of each record. Raises ValueError for a file that is damaged."""
    end = path.stat().st_size
    with path.open("rb") as stream:
        while len(header := stream.read(_HEADER.size)) == _HEADER.size:
            offset, (size, _) = stream.tell(), _HEADER.unpack(header)
            if size > MOST_RECORD_BYTES:
                raise ValueError("a record is too long")
            if offset + size + 4 > end:
                return
            event = _parse(stream.read(size))
            stream.seek(4, 1)
            yield offset, size, event


def _parse(record: bytes) -> Event:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf has no types
    from tensorboard.compat.proto.event_pb2 import Event

    try:
        return Event.FromString(record)
    except DecodeError:
        raise ValueError("it is damaged") from None


def _take(found: Events, place: PictureAt, event: Event, is_wanted: Callable[[str], bool]) -> None:
    if event.HasField("session_log"):
        found.starts.append(Start(event.step, event.wall_time))
        for scalars in found.scalars.values():
            _drop_from(event.step, scalars)
        for pictures in found.pictures.values():
            _drop_from(event.step, pictures)
    for value in event.summary.value:
        if value.HasField("image"):
            found.pictures.setdefault(value.tag, {})[event.step] = place
        elif value.HasField("simple_value") and is_wanted(value.tag):
            found.scalars.setdefault(value.tag, {})[event.step] = value.simple_value
        elif value.tag.partition("/")[0] == "options" and value.tensor.string_val:
            found.options = _options(value.tensor.string_val[0])


def _drop_from(iteration: int, kept: dict[int, Any]) -> None:
    for later in [i for i in kept if i >= iteration]:
        del kept[later]


def _options(text: bytes) -> dict[str, str]:
    """`    name: value` lines -> name -> value."""
    lines = text[:MOST_OPTIONS_CHARACTERS].decode(errors="replace").splitlines()
    pairs = (line.strip().partition(": ") for line in lines)
    return {name: value for name, colon, value in pairs if colon}
