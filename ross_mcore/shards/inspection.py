"""Inspects a data set: figures from its index, one sample's tokens, a contact sheet.

The figures need the index alone, so they take seconds for any number of samples; tokens and contact sheet read shards.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ross_mcore import checked
from ross_mcore.batch import IGNORE_INDEX
from ross_mcore.data.conversation import IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from ross_mcore.data.image import decode_image
from ross_mcore.data.order import WINDOW_SAMPLES, SampleOrder, evenly_spaced
from ross_mcore.data.packing import pack
from ross_mcore.data.records import normalise
from ross_mcore.data.remote import is_remote
from ross_mcore.data.shard_reader import UNKNOWN_LENGTH, ShardReader
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.templates import tokenize_conversation, why_without_labels
from ross_mcore.errors import ConversationError, ImageError, ShardError
from ross_mcore.shards.account import Account
from ross_mcore.shards.index_parts import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HISTOGRAM_BINS = 16
PACKING_WINDOWS = 8
"""Number of windows of random samples for measuring how full packed rows get."""
ID_KEYS = ("id", "sample_id", "question_id", "uid")
"""Keys of a record that may hold its own id."""
MOST_SEARCHED = 2_000_000
"""Number of records of a data set that are read to find an id, which takes about a minute."""
TILE = 224
TEXT_LINES = 6
LINE_PIXELS = 14
MARGIN = 8


@dataclass(frozen=True)
class Histogram:
    """Counts of the values below `width`, 2 * `width`, ...; the last bin also has all larger values."""

    width: int
    counts: list[int]

    @classmethod
    def of(cls, values: NDArray[np.int64]) -> Histogram:
        """Bins of a round width, up to the 99th percentile."""
        target = max(1.0, float(np.quantile(values, 0.99)) / (HISTOGRAM_BINS - 1))
        decade = 10 ** math.floor(math.log10(target))
        width = next(step * decade for step in (1, 2, 5, 10) if step * decade >= target)
        return cls(width, np.bincount(np.minimum(values // width, HISTOGRAM_BINS - 1)).tolist())

    def labels(self) -> list[str]:
        names = [f"{n * self.width}-{(n + 1) * self.width - 1}" for n in range(len(self.counts))]
        if len(names) == HISTOGRAM_BINS:
            names[-1] = f"{(HISTOGRAM_BINS - 1) * self.width}+"
        return names


def inspect(reader: ShardReader, seq_length: int | None = None, image_tokens: int | None = None) -> dict[str, Any]:
    """The figures of a data set, as JSON types. Packing needs `seq_length`, `image_tokens` and measured lengths.

    `text` is in tokens if the index has them, else in words. `label_share`: labels / text tokens; `without_labels`:
    number of samples without any label; `account`: that of make_shards or index_shards, None in an old index.
    """
    rows = reader.samples
    images, labels = rows["num_images"].astype(np.int64), rows["label_tokens"].astype(np.int64)
    measured = reader.length_source is not None and not (rows["text_tokens"] == UNKNOWN_LENGTH).any()
    text = rows["text_tokens" if measured else "text_words"].astype(np.int64)
    per_sample = Counter(dict(zip(*(part.tolist() for part in np.unique(images, return_counts=True)), strict=True)))
    histogram = Histogram.of(text)
    source = reader.length_source
    found: dict[str, Any] = {
        "folder": str(reader.folder),
        "fingerprint": reader.fingerprint,
        "shards": len(reader.index["shards"]),
        "bytes": sum(shard["bytes"] for shard in reader.index["shards"]),
        "samples": len(reader),
        "images": reader.num_images,
        "images_per_sample": {str(count): number for count, number in sorted(per_sample.items())},
        "pictures_never_shown": int(((rows["image_spans"] == 0) & (images > 0)).sum()) if measured else None,
        "measured_with": None if source is None else {"tokenizer": source.tokenizer, "template": source.template},
        "text": {
            "unit": "tokens" if measured else "words",
            "total": int(text.sum()),
            "mean": float(text.mean()),
            "median": float(np.median(text)),
            "p95": float(np.quantile(text, 0.95)),
            "longest": int(text.max()),
            "histogram": dict(zip(histogram.labels(), histogram.counts, strict=True)),
        },
        "label_tokens": int(labels.sum()) if measured else None,
        "label_share": float(labels.sum() / max(1, text.sum())) if measured else None,
        "without_labels": int((labels == 0).sum()) if measured else None,
        "bad": bad_samples(reader.folder),
        "account": None if (account := Account.of(reader)) is None else account.as_json(),
        "packing": None,
    }
    if measured and seq_length is not None and image_tokens is not None:
        lengths = text + rows["image_spans"].astype(np.int64) * image_tokens
        found["packing"] = packing_figures(lengths, seq_length) | {"image_tokens": image_tokens}
    return found


def bad_samples(folder: Path) -> dict[str, int]:
    """Number of samples left out of the index, by reason; from quarantine.jsonl and the skipped.jsonl of make_shards.

    Raises ShardError for a damaged list.
    """
    reasons: Counter[str] = Counter()
    for name in ("quarantine.jsonl", "skipped.jsonl"):
        number = 0
        try:
            for number, line in enumerate(checked.read_lines(folder / name), start=1):  # noqa: B007  used in errors
                reasons[json.loads(line or b"")["reason"].partition(":")[0]] += 1
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if not number:
                raise ShardError(
                    f"{folder / name} cannot be read: {checked.reason(error)}; index the shards again"
                ) from None
            raise ShardError(f"{folder / name}: line {number} is damaged; index the shards again") from None
    return dict(reasons.most_common())


def packing_figures(lengths: NDArray[np.int64], seq_length: int) -> dict[str, Any]:
    """How full rows of `seq_length` tokens get, from the token lengths [N] of all samples.

    `filled`: share of packed rows that is tokens; `filled_unpacked`: the same with one sample per row, padded to
    `seq_length`; `too_long`: samples longer than a row, which are cut or, if the cut would go through their only
    picture, skipped.
    """
    order = SampleOrder(lengths.size, seed=0)
    drawn = order.sample_at(np.arange(min(lengths.size, WINDOW_SAMPLES * PACKING_WINDOWS)))
    fitting = np.clip(lengths[drawn], 1, seq_length)
    rows = 0
    for start in range(0, fitting.size, WINDOW_SAMPLES):
        rows += len(pack(fitting[start : start + WINDOW_SAMPLES], seq_length, key=0))
    return {
        "seq_length": seq_length,
        "samples_looked_at": int(fitting.size),
        "filled": float(fitting.sum() / (rows * seq_length)),
        "filled_unpacked": float(fitting.mean() / seq_length),
        "samples_per_row": fitting.size / rows,
        "rows_of_all_samples": round(lengths.size * rows / fitting.size),
        "too_long": int((lengths > seq_length).sum()),
    }


def find_samples(reader: ShardReader, name: str, progress: Callable[[int], None] = lambda _: None) -> list[int]:
    """The numbers of the samples with this key, else of those whose record has this id.

    Keys are in the index; ids are not, so up to MOST_SEARCHED records are read, in local shards only. `progress` is
    called with the number of records read so far.
    """
    numbers = reader.find([name])[name]
    if numbers or any(is_remote(shard["name"]) for shard in reader.index["shards"]):
        return numbers
    written = {name.encode(errors="replace"), json.dumps(name)[1:-1].encode()}
    for number in range(min(len(reader), MOST_SEARCHED)):
        if not number % 1000:
            progress(number)
        try:
            data = reader.text_bytes(number)
            record = json.loads(data) if any(text in data for text in written) else None
        except (ShardError, ValueError, RecursionError):
            continue
        if isinstance(record, dict) and name in (str(record[key]) for key in ID_KEYS if key in record):
            numbers.append(number)
    return numbers


def record_of(reader: ShardReader, number: int) -> dict[str, Any]:
    """The record of a sample in LLaVA's form, as training reads it. Raises ShardError when it cannot be read."""
    shard = checked.shown(str(reader.folder / reader.shard_name(int(reader.samples[number]["shard"]))))
    where = f"sample {reader.keys([number])[0]} of {shard}"
    try:
        record = json.loads(reader.record_bytes(number))
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{where} cannot be read: {checked.reason(error)}; index the shards again") from None
    try:
        return normalise(record, int(reader.samples[number]["num_images"]))
    except ConversationError as error:
        raise ShardError(f"{where} is not a record: {error}") from None


@dataclass(frozen=True)
class Token:
    """A token of a row as text; `supervised`: it has a label."""

    id: int
    text: str
    supervised: bool


@dataclass(frozen=True)
class Inspected:
    """A sample: its record and, with a tokenizer, its tokens, and why none has a label."""

    record: dict[str, Any]
    tokens: list[Token] | None = None
    without_labels: str | None = None


def tokens_of(
    record: dict[str, Any], num_images: int, tokenizer: PreTrainedTokenizerBase, spec: SampleSpec
) -> Inspected:
    """A sample with its tokens, one per image. Raises ShardError for a record that has no row."""
    turns = record.get("conversations")
    try:
        row = tokenize_conversation(turns, num_images, tokenizer, spec)
    except ConversationError as error:
        raise ShardError(f"the record has no row under template {spec.template}: {error}") from None
    texts = [IMAGE_PLACEHOLDER if i == IMAGE_TOKEN_INDEX else str(tokenizer.decode([i])) for i in row.input_ids]
    learned = [place > 0 and label not in (IGNORE_INDEX, IMAGE_TOKEN_INDEX) for place, label in enumerate(row.labels)]
    tokens = [Token(*token) for token in zip(row.input_ids, texts, learned, strict=True)]
    reason = None if row.label_tokens else why_without_labels(turns, num_images, tokenizer, spec)
    return Inspected(record, tokens, reason)


def write_contact_sheet(reader: ShardReader, path: Path, num_samples: int = 24, columns: int = 6) -> list[str]:
    """Writes a PNG of evenly spaced samples, each with its first picture and its text; returns their keys."""
    numbers = evenly_spaced(len(reader), num_samples)
    columns = min(columns, len(numbers))
    width, height = TILE + MARGIN, TILE + TEXT_LINES * LINE_PIXELS + 2 * MARGIN
    sheet = Image.new("RGB", (columns * width + MARGIN, -(-len(numbers) // columns) * height + MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    keys = reader.keys(numbers)
    for place, (number, key) in enumerate(zip(numbers, keys, strict=True)):
        left, top = MARGIN + place % columns * width, MARGIN + place // columns * height
        count = int(reader.samples[number]["num_images"])
        picture = _first_picture(reader, number) if count else None
        pen.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill="#eeeeee")
        if picture is not None:
            picture.thumbnail((TILE, TILE))
            sheet.paste(picture, (left + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2))
        else:
            pen.text((left + MARGIN, top + MARGIN), "unreadable" if count else "text alone", "black", font)
        more = f" (+{count - 1} pictures)" if count > 1 else ""
        lines = [f"{key}{more}"[:40], *textwrap.wrap(_text(reader, number), 40, max_lines=TEXT_LINES - 1)]
        for line, text in enumerate(lines):
            pen.text((left, top + TILE + 2 + line * LINE_PIXELS), text, "black" if line else "#4060c0", font)
    with replacing(path) as stream:
        sheet.save(stream, "PNG")
    return keys


def _first_picture(reader: ShardReader, number: int) -> Image.Image | None:
    try:
        return decode_image(reader.image_bytes(number, 0), reader.truncated_images).picture
    except (ShardError, ImageError):
        return None


def _text(reader: ShardReader, number: int) -> str:
    """A sample's turns as one text, with `Q:` and `A:` before them."""
    try:
        turns = record_of(reader, number).get("conversations")
    except ShardError as error:
        return str(error)
    usable = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    names = {"human": "Q", "gpt": "A"}
    return " ".join(f"{names.get(str(turn.get('from')), turn.get('from'))}: {turn.get('value')}" for turn in usable)
