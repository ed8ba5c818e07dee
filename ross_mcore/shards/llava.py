"""Converts LLaVA-format JSON and its image folder to shards.

A record is {"id"?, "image"?: path or paths relative to the image folder, "conversations": [{"from", "value"}, ...]}.
"""

from __future__ import annotations

import io
import json
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ross_mcore import checked
from ross_mcore.data.conversation import SampleBounds
from ross_mcore.data.image import decode_image
from ross_mcore.data.records import normalise, picture_names
from ross_mcore.data.shard_reader import MAX_IMAGE_BYTES, MAX_RECORD_BYTES
from ross_mcore.errors import ConversationError, ImageError, RecordsError, SampleError
from ross_mcore.shards.measure import Measure
from ross_mcore.shards.writer import ShardWriter

REMEDY = "copy it again, or write it again as a JSON list of records, or as .jsonl with one record a line"
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
"""Formats that are stored as they are, and their suffixes; every other one is stored as PNG, with the same pixels."""


@dataclass
class Conversion:
    """The outcome. `ignored`: samples stored although they have no label under the template."""

    samples: int = 0
    images: int = 0
    ignored: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def read_records(path: Path) -> tuple[int, Iterator[Any]]:
    """(number of records, the records) of a .json list, or of a .jsonl file, read line by line.

    A damaged line of .jsonl is one bad record, None. Raises RecordsError naming the file.
    """
    try:
        if path.suffix == ".jsonl":
            return sum(line is None or bool(line.strip()) for line in checked.read_lines(path)), _read_lines(path)
        _require_list(path)
        records = json.loads(path.read_bytes())
    except RecursionError:
        raise RecordsError(f"{path} cannot be read: it is nested too deeply; {REMEDY}") from None
    except (OSError, ValueError) as error:
        raise RecordsError(f"{path} cannot be read: {checked.reason(error)}; {REMEDY}") from None
    if not isinstance(records, list):
        raise RecordsError(f"{path} holds {checked.shown(records)}; expected a list of records")
    return len(records), iter(records)


def _require_list(path: Path) -> None:
    """Raises ValueError for a file that does not end with `]`, so that a truncated file is not read."""
    checked.require_regular(path)
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 4096))
        if not stream.read().rstrip().endswith(b"]"):
            raise ValueError("expected a list of records, and it does not end with ]")


def _read_lines(path: Path) -> Iterator[Any]:
    for line in checked.read_lines(path):
        if line is None or line.strip():
            try:
                yield json.loads(line or b"")
            except (ValueError, RecursionError):
                yield None


def convert_records(
    records: Iterable[Any],
    image_folder: Path,
    writer: ShardWriter,
    measure: Measure,
    *,
    follow_links: bool = False,
    num_workers: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> Conversion:
    """Writes every usable record, in order; lists the others with reasons in skipped.jsonl beside the shards.

    A sample's key is the number of its record in the file, because ids may be repeated. `num_workers` threads read and
    decode every picture once. A record that `measure` refuses is skipped. Raises RecordsError when no record is usable.
    """
    done, bounds = Conversion(), measure.spec.bounds
    waiting: deque[tuple[int, Any, Future[tuple[dict[str, Any], list[tuple[str, bytes]]]]]] = deque()

    def finish_one(skipped: TextIO) -> None:
        number, source, read = waiting.popleft()
        progress()
        try:
            record, images = read.result()
            facts = measure(record, len(images))
            done.ignored += facts["label_tokens"] == 0
            key = f"{number:09d}"
            writer.write(key, _encode({"id": key, **record}), images, **facts)
            done.samples += 1
            done.images += len(images)
        except SampleError as error:
            done.skipped[str(error).partition(":")[0]] += 1
            about = source if isinstance(source, dict) else {}
            line = {"record": number, "id": about.get("id"), "image": about.get("image"), "reason": str(error)}
            skipped.write(json.dumps(line) + "\n")

    with (
        (writer.folder / "skipped.jsonl").open("w", encoding="utf-8") as skipped,
        ThreadPoolExecutor(num_workers) as pool,
    ):
        for number, record in enumerate(records):
            waiting.append((number, record, pool.submit(_read, record, image_folder, follow_links, bounds)))
            if len(waiting) > 4 * num_workers:
                finish_one(skipped)
        while waiting:
            finish_one(skipped)
    if not done.samples:
        reasons = ", ".join(f"{number} x {reason}" for reason, number in done.skipped.most_common(3))
        raise RecordsError(f"no usable sample, so nothing was written: {reasons or 'no record'}; mend it")
    return done


def _encode(record: dict[str, Any]) -> bytes:
    try:
        encoded = json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise SampleError("the record is not valid Unicode") from None
    if len(encoded) > MAX_RECORD_BYTES:
        raise SampleError(f"the record is over {MAX_RECORD_BYTES} bytes")
    return encoded


def _read(
    record: Any, folder: Path, follow_links: bool, bounds: SampleBounds
) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    """(record in LLaVA's form, (suffix, bytes) of its pictures). Raises SampleError."""
    try:
        record = normalise(record)
        names = picture_names(record)
        bounds.require(len(names))
    except ConversationError as error:
        raise SampleError(str(error)) from None
    return record, [_read_picture(folder, name, follow_links) for name in names]


def _read_picture(folder: Path, name: Any, follow_links: bool) -> tuple[str, bytes]:
    """(suffix, bytes) of a picture inside `folder`: the original bytes, or a PNG of it in a format not stored."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise SampleError("image is not a path")
    relative = Path(name)
    path = folder / relative
    try:
        if relative.is_absolute() or ".." in relative.parts:
            raise SampleError("the image path leaves the image folder")
        if not follow_links and not checked.real_path(path).is_relative_to(checked.real_path(folder)):
            raise SampleError("the image path leaves the image folder by a link; --follow-links allows it")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise SampleError("the image is not a regular file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise SampleError(f"the image file is over {MAX_IMAGE_BYTES} bytes")
        data = path.read_bytes()
        picture, source, _ = decode_image(data)
    except (OSError, RuntimeError) as error:
        raise SampleError(f"the image cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except ImageError as error:
        raise SampleError(f"the image is {error}") from None
    if source in SUFFIXES:
        return SUFFIXES[source], data
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return "png", encoded.getvalue()
