"""Converts records of the forms in data/records.py, and their pictures, to shards of LLaVA records."""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ross_mcore import checked
from ross_mcore.data.image import decode_image, one_colour
from ross_mcore.data.records import normalise, picture_names
from ross_mcore.data.shard_reader import MAX_IMAGE_BYTES, MAX_RECORD_BYTES
from ross_mcore.data.spec import SampleSpec
from ross_mcore.errors import (
    ConversationError,
    ImageError,
    NothingLeft,
    OverBounds,
    RecordsError,
    SampleError,
    TooManyBad,
)
from ross_mcore.shards.account import MAX_BAD_FRACTION, SKIPPED_LIST, Account, Notes, allowing, kind
from ross_mcore.shards.measure import Measure
from ross_mcore.shards.pictures import PictureFolder, stored_names
from ross_mcore.shards.writer import ShardWriter

MOST_CHARACTERS_LISTED = 1000
"""A longer id or image, as of a picture in base64, is shown in part in skipped.jsonl."""
MOST_LINES_SEARCHED = 1000
"""Lines of skipped.jsonl in which examples are looked for."""
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
"""Formats that are stored as they are, and their suffixes; every other one is stored as PNG, with the same pixels."""


def convert_records(
    records: Iterable[Any],
    image_folder: Path | None,
    writer: ShardWriter,
    measure: Measure,
    *,
    follow_links: bool = False,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    num_workers: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> Account:
    """Writes every usable record, in order; lists the others with reasons in skipped.jsonl beside the shards.

    A sample's key is the number of its record in the file, because ids may be repeated. `num_workers` threads read and
    decode every picture once. Raises RecordsError when no record is usable, TooManyBad when more than
    `max_bad_fraction` are bad; the list is then OUT.skipped.jsonl, beside the folder that is not written.
    """
    folder = PictureFolder(image_folder, follow_links)
    waiting: deque[tuple[int, Any, Future[Found]]] = deque()

    def finish_one(skipped: TextIO) -> None:
        number, source, read = waiting.popleft()
        progress()
        key = f"{number:09d}"
        try:
            record, pictures = read.result()
            images = [(picture.suffix, picture.data) for picture in pictures]
            facts = measure(record, len(images))
            colours, filled = [picture.colour for picture in pictures], sum(picture.filled for picture in pictures)
            notes = Notes(measure.why_without_labels(record, facts), colours, filled)
            writer.write(key, _encode({"id": key, **record}), images, notes=notes, **facts)
        except SampleError as error:
            is_bad = not isinstance(error, OverBounds)
            writer.left_out.leave_out(key, str(error), is_bad)
            about = source if isinstance(source, dict) else {}
            named = {"id": _short(about.get("id")), "image": _short(about.get("image") or about.get("images"))}
            outcome = {"reason": str(error), "outcome": "bad" if is_bad else "skipped"}
            skipped.write(json.dumps({"record": number, **named, **outcome}) + "\n")

    with (
        (writer.folder / "skipped.jsonl").open("w", encoding="utf-8") as skipped,
        ThreadPoolExecutor(num_workers) as pool,
    ):
        for number, record in enumerate(records):
            waiting.append((number, record, pool.submit(_read, record, folder, measure.spec)))
            if len(waiting) > 4 * num_workers:
                finish_one(skipped)
        while waiting:
            finish_one(skipped)
    _require_few_bad(writer, max_bad_fraction)
    return writer.account


def _require_few_bad(writer: ShardWriter, limit: float) -> None:
    """Raises RecordsError or TooManyBad, and keeps the list of the records left out as OUT.skipped.jsonl."""
    account, kept = writer.account, writer.out.with_name(f"{writer.out.name}.{SKIPPED_LIST}")
    if account.samples and account.bad_fraction <= limit:
        kept.unlink(missing_ok=True)
        return
    if not account.records:
        raise RecordsError("no usable sample, so nothing was written: no record; mend it")
    (writer.folder / SKIPPED_LIST).replace(kept)
    examples: dict[str, str] = {}
    for text in islice(checked.read_lines(kept), MOST_LINES_SEARCHED):
        line = json.loads(text or b"{}")
        detail = line["reason"].partition(":")[2]
        example = f"record {line['record']}, image {checked.shown(line['image'])}{':' if detail else ''}{detail}"
        examples.setdefault(kind(line["reason"]), example)
    reasons = "; ".join(
        f"{count} x {reason} (first: {examples[reason]})" if reason in examples else f"{count} x {reason}"
        for reason, count in account.refused.most_common(3)
    )
    mend = f"All are listed in {kept}. Mend the records, give the right --image-folder"
    if not account.samples:
        raise RecordsError(f"no usable sample, so nothing was written: {reasons}. {mend}")
    bad = account.bad.total
    raise TooManyBad(
        f"{bad} of {bad + account.samples} records are bad, over --max-bad-fraction {limit}, so nothing was written: "
        f"{reasons}. {mend}, or allow them with --max-bad-fraction {allowing(account.bad_fraction)}"
    )


def _short(value: Any) -> Any:
    """A value of a record for a list: as it is, or shown in part if it is long."""
    try:
        return value if len(json.dumps(value)) <= MOST_CHARACTERS_LISTED else checked.shown(value)
    except (TypeError, ValueError, RecursionError):  # embedded bytes
        return checked.shown(value)


def _encode(record: dict[str, Any]) -> bytes:
    """A record as JSON; what JSON does not have (dates of a table) as text. Raises SampleError."""
    for key, value in record.items():
        if isinstance(value.get("bytes") if isinstance(value, dict) else value, bytes):
            raise SampleError(f"a picture under another key: {key} has bytes; name the column image or images")
    try:
        encoded = json.dumps(record, ensure_ascii=False, default=str).encode("utf-8")
    except (ValueError, RecursionError):
        raise SampleError("the record is not valid Unicode") from None
    if len(encoded) > MAX_RECORD_BYTES:
        raise SampleError(f"the record is over {MAX_RECORD_BYTES} bytes")
    return encoded


class Stored(NamedTuple):
    """An encoded picture to store: its suffix and bytes, the name of its only colour, whether it was filled."""

    suffix: str
    data: bytes
    colour: str | None = None
    filled: bool = False


Found = tuple[dict[str, Any], list[Stored]]
"""A record in LLaVA's form, and its pictures."""


def _read(record: Any, folder: PictureFolder, spec: SampleSpec) -> Found:
    """Raises SampleError, OverBounds for a record with too many pictures."""
    if isinstance(record, SampleError):
        raise record
    try:
        record = normalise(record)
        names = picture_names(record)
        spec.bounds.require(len(names))
    except NothingLeft as error:
        raise OverBounds(str(error)) from None
    except ConversationError as error:
        raise SampleError(str(error)) from None
    pictures = [as_stored(folder.read(name), spec.truncated_images) for name in names]
    stored = stored_names(names, [picture.suffix for picture in pictures])
    record = record if stored == names else {**record, "image": stored}
    return record, pictures


def as_stored(data: bytes, truncated_images: str) -> Stored:
    """An encoded picture as it is stored: its own bytes, or a PNG with the same pixels.

    PNG is stored of a picture in a format that is not in SUFFIXES, and of one that is cut off and was filled.
    Raises SampleError for a picture that cannot be used.
    """
    try:
        picture, source, filled = decode_image(data, truncated_images)
    except ImageError as error:
        raise SampleError(f"the image is {error}") from None
    if source in SUFFIXES and not filled:
        return Stored(SUFFIXES[source], data, one_colour(picture))
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    if encoded.tell() > MAX_IMAGE_BYTES:
        raise SampleError(f"the image is over {MAX_IMAGE_BYTES} bytes as PNG, as which {source} is stored; use JPEG")
    return Stored("png", encoded.getvalue(), one_colour(picture), filled)
