"""LLaVA-format JSON and its image folder, record by record, on the way into shards.

A record is {"id"?, "image"?: path relative to the image folder, "conversations": [{"from", "value"}, ...]}.
"""

from __future__ import annotations

import io
import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ross_mcore.data.conversation import ConversationError, tokenize_conversation
from ross_mcore.data.image import FORMATS, ImageError, decode_image
from ross_mcore.data.shards import MAX_IMAGE_BYTES, UNKNOWN_LENGTH

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCE_FORMATS = (*FORMATS, "BMP", "GIF", "TIFF", "PPM")
"""What may lie in an image folder; whatever is not in FORMATS is stored as PNG."""
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
NO_LIMIT = 2**31 - 1


class RecordsError(ValueError):
    """A JSON file that is not a list of records; the message names it."""


class SkippedRecord(ValueError):
    """A record that cannot become a sample; the message is a short reason."""


@dataclass(frozen=True)
class AdmittedRecord:
    """What `ShardWriter.write` takes."""

    key: str
    record: dict[str, Any]
    images: list[tuple[str, bytes]]
    text_tokens: int
    image_spans: int
    mismatch: bool


def read_records(path: Path) -> Iterator[Any]:
    """Yields the records of a .json list, or of a .jsonl file line by line. Raises RecordsError naming file and line.

    A damaged line of .jsonl is yielded as None: it is one bad record, not the end of the file.
    """
    try:
        if path.suffix == ".jsonl":
            with open(path, "rb") as lines:
                for line in lines:
                    if line.strip():
                        try:
                            yield json.loads(line)
                        except (ValueError, RecursionError):
                            yield None
            return
        records = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RecordsError(f"{path}: {error}") from None
    if not isinstance(records, list):
        raise RecordsError(f"{path} holds a {type(records).__name__}; expected a list of records")
    yield from records


def admit_record(
    number: int,
    record: Any,
    image_folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    template: str | None = None,
    follow_links: bool = False,
) -> AdmittedRecord:
    """Checks record `number` of a JSON file and reads its picture, decoding it once.

    The sample's key is the record's number, which is unique where ids need not be. With a tokenizer and a template its
    length is measured. Raises SkippedRecord with the reason.
    """
    if not isinstance(record, dict):
        raise SkippedRecord("the record is not a JSON object")
    key = f"{number:09d}"
    images = record.get("image")
    names = [] if images is None else images if isinstance(images, list) else [images]
    if len(names) > 1:
        raise SkippedRecord(f"{len(names)} pictures in one record: one is supported")
    conversations = record.get("conversations")
    if not isinstance(conversations, list) or not all(isinstance(turn, dict) for turn in conversations):
        raise SkippedRecord("conversations is not a list of turns")
    text_tokens, spans, mismatch = UNKNOWN_LENGTH, len(names), False
    if tokenizer is not None and template is not None:
        try:
            row = tokenize_conversation(conversations, bool(names), tokenizer, template, NO_LIMIT)
        except ConversationError as error:
            raise SkippedRecord(str(error)) from None
        spans, mismatch = row.image_spans, row.mismatch
        text_tokens = len(row.input_ids) - spans
        if spans not in (0, len(names)):
            raise SkippedRecord(f"{spans} <image> in the text, {len(names)} pictures")
    pictures = [_read_picture(image_folder, name, follow_links) for name in names]
    return AdmittedRecord(key, {"id": key, **record}, pictures, text_tokens, spans, mismatch)


def _read_picture(folder: Path, name: Any, follow_links: bool) -> tuple[str, bytes]:
    """(suffix, bytes) of a picture inside `folder`: the original bytes, or a PNG of it in a format not stored."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise SkippedRecord("image is not a path")
    relative = Path(name)
    path = folder / relative
    try:
        if relative.is_absolute() or ".." in relative.parts:
            raise SkippedRecord("the image path leaves the image folder")
        if not follow_links and not path.resolve().is_relative_to(folder.resolve()):
            raise SkippedRecord("the image path leaves the image folder by a link; --follow-links allows it")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise SkippedRecord("the image is not a regular file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise SkippedRecord(f"the image file is over {MAX_IMAGE_BYTES} bytes")
        data = path.read_bytes()
        picture, source = decode_image(data, SOURCE_FORMATS)
    except (OSError, RuntimeError) as error:
        raise SkippedRecord(f"the image cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except ImageError as error:
        raise SkippedRecord(f"the image is {error}") from None
    if source in SUFFIXES:
        return SUFFIXES[source], data
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return "png", encoded.getvalue()
