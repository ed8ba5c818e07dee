"""Measures records and turns the members of a tar into a part of an index.

A sample that cannot be trained on is left out and listed in quarantine.jsonl with its shard, key and reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ross_mcore.data.conversation import (
    IMAGE_PLACEHOLDER,
    check_turns,
    count_words,
    require_pictures,
)
from ross_mcore.data.image import decode_image
from ross_mcore.data.lengths import length_source
from ross_mcore.data.records import has_turns, normalise
from ross_mcore.data.shard_reader import (
    CAPTION,
    MAX_IMAGES,
    RECORD,
    TURNS,
    UNKNOWN_LENGTH,
    LengthSource,
    as_record,
)
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.templates import tokenize_conversation
from ross_mcore.errors import ConversationError, ImageError, SampleError
from ross_mcore.shards.index_parts import ShardIndex, content_digest
from ross_mcore.shards.tars import Damage, Member, TarSample, group_members, reportable, walk_tar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_PART_HEADER_BYTES = 16 << 20


@dataclass(frozen=True)
class Measure:
    """Checks records and counts their words and, with a tokenizer, their tokens and labels under `spec`.

    A record over the bounds of `spec` is refused; the bound of tokens needs a tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    spec: SampleSpec = SampleSpec()

    @property
    def source(self) -> LengthSource | None:
        """The source of the lengths, None without a tokenizer."""
        return None if self.tokenizer is None else length_source(self.tokenizer, self.spec)

    def __call__(self, record: Any, num_images: int) -> dict[str, int]:
        """The columns of a SAMPLE_ROW that depend on the text. Raises SampleError for an unusable record."""
        try:
            turns = normalise(record, num_images)["conversations"]
            self.spec.bounds.require(num_images)
            checked = check_turns(turns, roles=None)
            if self.tokenizer is None:
                shown = sum(text.count(IMAGE_PLACEHOLDER) for _, text in checked)
                if num_images > 1:
                    require_pictures(max(shown, num_images), num_images)
                measured = {"image_spans": num_images}
            else:
                row = tokenize_conversation(turns, num_images, self.tokenizer, self.spec.measured)
                self.spec.bounds.require(num_images, row.text_tokens)
                require_pictures(row.image_spans, num_images)
                measured = {
                    "text_tokens": row.text_tokens,
                    "label_tokens": row.label_tokens,
                    "image_spans": row.image_spans,
                }
        except ConversationError as error:
            raise SampleError(str(error)) from None
        unknown = {"text_tokens": UNKNOWN_LENGTH, "label_tokens": UNKNOWN_LENGTH}
        return {**unknown, "text_words": count_words(turns), **measured}


def index_tar(
    descriptor: int, measure: Measure, verify_images: bool = True, progress: Callable[[int], None] = lambda _: None
) -> ShardIndex:
    """Indexes an open tar, damaged or not: every sample is in the rows or in the quarantine.

    `progress` is called with the bytes of every sample. Raises OSError when the file cannot be read.
    """
    members: list[Member] = []
    damages: list[Damage] = []
    for found in walk_tar(descriptor):
        if isinstance(found, Member):
            members.append(found)
        else:
            damages.append(found)
    samples, others = group_members(members)
    usable, facts, digests = [], [], []
    part_sources: dict[str, list[Any]] = {}
    quarantine: list[tuple[str | None, str]] = [
        (None, f"bytes {d.start} to {d.end} of the shard are damaged or no tar") for d in damages
    ]
    total = os.fstat(descriptor).st_size
    if not members and not damages:
        quarantine.append((None, "the shard is empty" if total == 0 else "the shard has no members"))
    for sample in samples:
        try:
            columns, digest, sources = _row(descriptor, sample, measure, verify_images)
        except (ValueError, RecursionError) as error:  # SampleError, ShardError, or of a parser
            quarantine.append((reportable(sample.key), str(error)))
        else:
            usable.append(sample)
            facts.append(columns)
            digests.append(digest)
            for kind, made_with in sources.items():
                if made_with not in part_sources.setdefault(kind, []):
                    part_sources[kind].append(made_with)
        progress(sum(member.size for member in sample.members.values()))
    lost_bytes = sum(d.end - d.start for d in damages)
    return ShardIndex.of(usable, facts, digests, quarantine, lost_bytes, others, part_sources)


def _row(
    descriptor: int, sample: TarSample, measure: Measure, verify_images: bool
) -> tuple[dict[str, int], bytes, dict[str, Any]]:
    """(columns, digest, sources of precomputed parts) of a sample of a tar.

    If the pictures were left out, their number and sizes are those in the parts. Raises ValueError when the sample
    cannot be trained on.
    """
    if sample.problem:
        raise SampleError(sample.problem)
    pictures = sample.pictures
    sizes, sources = [picture.size for picture in pictures], {}
    for name, member in sample.parts.items():
        held, sources[name] = _read_part_header(descriptor, member)
        if held != (sizes := sizes or held):
            raise SampleError(f"its {name} were made of other pictures")
    text, kind, record = _read_text(descriptor, sample, len(sizes))
    if kind == CAPTION and not sizes:
        raise SampleError("a caption with 0 pictures")
    columns = {**measure(record, len(sizes)), "kind": kind, "num_images": len(sizes)}
    if verify_images:
        for picture in pictures:
            try:
                decode_image(os.pread(descriptor, picture.size, picture.offset))
            except ImageError as error:
                raise SampleError(f"a picture is {error}") from None
    return columns, content_digest(sample.key, text, sizes), sources


def _read_part_header(descriptor: int, member: Member) -> tuple[list[int], Any]:
    """(sizes in bytes of the pictures, source) of precomputed parts, from the safetensors header."""
    try:
        length = int.from_bytes(os.pread(descriptor, 8, member.offset), "little")
        if not 0 < length <= min(MAX_PART_HEADER_BYTES, member.size - 8):
            raise ValueError("no header")
        header = json.loads(os.pread(descriptor, length, member.offset + 8))
        about = json.loads(header["__metadata__"]["precomputed"])
        sizes, source = about["picture_bytes"], about["source"]
        if not isinstance(sizes, list) or not all(type(size) is int for size in sizes) or len(sizes) > MAX_IMAGES:
            raise ValueError("no sizes of pictures")
        return sizes, source
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SampleError("its precomputed parts are not those of tools/precompute_latents.py") from None


def _read_text(descriptor: int, sample: TarSample, num_images: int) -> tuple[bytes, int, dict[str, Any]]:
    """(bytes, kind, record) of a sample's JSON, or of its caption if no JSON has a conversation."""
    problem = "it has no .txt"
    if "json" in sample.members:
        text = _read(descriptor, sample.members["json"])
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            problem = f"the record is not JSON: {type(error).__name__}"
        else:
            if isinstance(found, list):
                return text, TURNS, _normal(json.loads(as_record(text, TURNS, num_images)), num_images)
            if has_turns(found) or "txt" not in sample.members:
                return text, RECORD, _normal(found, num_images)
            problem = "the record is not a JSON object"
    if "txt" not in sample.members:
        raise SampleError(problem)
    text = _read(descriptor, sample.members["txt"])
    record = json.loads(as_record(text, CAPTION, num_images))
    if not record["conversations"][1]["value"]:
        raise SampleError("the caption is empty")
    return text, CAPTION, record


def _normal(record: Any, num_images: int) -> dict[str, Any]:
    try:
        return normalise(record, num_images)
    except ConversationError as error:
        raise SampleError(str(error)) from None


def _read(descriptor: int, member: Member) -> bytes:
    return os.pread(descriptor, member.size, member.offset)
