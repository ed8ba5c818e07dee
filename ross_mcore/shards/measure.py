"""Measures records and turns the members of a tar into a part of an index.

A sample that cannot be trained on is left out and listed in quarantine.jsonl with its shard, key and reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ross_mcore import checked
from ross_mcore.data.conversation import (
    IMAGE_PLACEHOLDER,
    check_turns,
    count_words,
    require_pictures,
)
from ross_mcore.data.image import decode_image, one_colour
from ross_mcore.data.lengths import length_source
from ross_mcore.data.records import SPEAKER_KEYS, has_turns, normalise, picture_names
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
from ross_mcore.data.templates import tokenize_conversation, why_without_labels
from ross_mcore.data.tokenizer import load_tokenizer, require_ids, require_vocabulary, vocabulary_beside
from ross_mcore.errors import ConversationError, ImageError, NothingLeft, OverBounds, SampleError
from ross_mcore.shards.account import Account, Notes
from ross_mcore.shards.grouping import TarSample, group_members, reportable, require_usable, unused_members
from ross_mcore.shards.index_parts import ShardIndex, content_digest
from ross_mcore.shards.tars import BLOCK, Damage, Member, walk_tar, what_it_is

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_PART_HEADER_BYTES = 16 << 20
SUFFIXES_KEPT, NAMES_KEPT, MAX_NAME_SHOWN = 20, 5, 80
"""Bounds of what a part of an index says about the members of its tar."""


@dataclass(frozen=True)
class Measure:
    """Checks records and counts their words and, with a tokenizer, their tokens and labels under `spec`.

    A record over the bounds of `spec` is refused; the bound of tokens needs a tokenizer. So is one with a token beyond
    the `vocab_size` of the tokenizer's model, if that is known.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    spec: SampleSpec = SampleSpec()
    vocab_size: int | None = None

    @classmethod
    def with_tokenizer(cls, folder: Path, spec: SampleSpec) -> Measure:
        """Raises TokenizerError for a folder without a usable tokenizer, or one beyond the vocabulary of its model."""
        tokenizer, vocab_size = load_tokenizer(folder), vocabulary_beside(folder)
        if vocab_size is not None:
            require_vocabulary(tokenizer, vocab_size, str(folder))
        return cls(tokenizer, spec, vocab_size)

    @property
    def source(self) -> LengthSource | None:
        """The source of the lengths, None without a tokenizer."""
        return None if self.tokenizer is None else length_source(self.tokenizer, self.spec)

    def __call__(self, record: Any, num_images: int) -> dict[str, int]:
        """The columns of a SAMPLE_ROW that depend on the text.

        Raises SampleError for an unusable record, OverBounds for one over the bounds.
        """
        try:
            turns = normalise(record, num_images)["conversations"]
            self.spec.bounds.require(num_images)
            said = check_turns(turns, roles=None)
            if self.tokenizer is None:
                shown = sum(text.count(IMAGE_PLACEHOLDER) for _, text in said)
                if num_images > 1:
                    require_pictures(max(shown, num_images), num_images)
                measured = {"image_spans": num_images}
            else:
                row = tokenize_conversation(turns, num_images, self.tokenizer, self.spec.measured)
                self.spec.bounds.require(num_images, row.text_tokens)
                require_pictures(row.image_spans, num_images)
                if self.vocab_size is not None:
                    require_ids(row.input_ids, self.vocab_size, self.tokenizer)
                measured = {
                    "text_tokens": row.text_tokens,
                    "label_tokens": row.label_tokens,
                    "image_spans": row.image_spans,
                }
        except NothingLeft as error:
            raise OverBounds(str(error)) from None
        except ConversationError as error:
            raise SampleError(str(error)) from None
        unknown = {"text_tokens": UNKNOWN_LENGTH, "label_tokens": UNKNOWN_LENGTH}
        return {**unknown, "text_words": count_words(turns), **measured}

    def why_without_labels(self, record: dict[str, Any], columns: dict[str, int]) -> str:
        """Why a record has no label; "" if it has one, or if labels are not counted."""
        if self.tokenizer is None or columns["label_tokens"]:
            return ""
        num_images = columns["image_spans"]
        turns = normalise(record, num_images)["conversations"]
        return why_without_labels(turns, num_images, self.tokenizer, self.spec.measured) or ""


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
    elif not members and (known := what_it_is(os.pread(descriptor, BLOCK, 0))) is not None:
        quarantine[0] = None, f"{quarantine[0][1]}: {known}"
    account = Account.of_shard([reason for _, reason in quarantine], sum(d.end - d.start for d in damages))
    for sample in samples:
        try:
            columns, digest, sources, notes = _row(descriptor, sample, measure, verify_images)
        except (ValueError, RecursionError) as error:  # SampleError, ShardError, or of a parser
            quarantine.append((reportable(sample.key), str(error)))
            account.leave_out(reportable(sample.key), str(error), is_bad=not isinstance(error, OverBounds))
        else:
            account.keep(reportable(sample.key), columns, notes)
            usable.append(sample)
            facts.append(columns)
            digests.append(digest)
            others.update(unused_members(sample))
            for kind, made_with in sources.items():
                if made_with not in part_sources.setdefault(kind, []):
                    part_sources[kind].append(made_with)
        progress(sum(member.size for member in sample.members.values()))
    part = ShardIndex.of(usable, facts, digests, quarantine, account.lost_bytes, part_sources, account)
    first_names = [reportable(member.name)[:MAX_NAME_SHOWN] for member in members[:NAMES_KEPT]]
    return replace(part, others=dict(others.most_common(SUFFIXES_KEPT)), first_names=first_names)


def _row(
    descriptor: int, sample: TarSample, measure: Measure, verify_images: bool
) -> tuple[dict[str, int], bytes, dict[str, Any], Notes]:
    """(columns, digest, sources of precomputed parts, notes) of a sample of a tar, whose `pictures` are chosen.

    If the pictures were left out, their number and sizes are those in the parts. Raises ValueError when the sample
    cannot be trained on.
    """
    if sample.problem:
        raise SampleError(sample.problem)
    held: list[int] | None = None
    sources: dict[str, Any] = {}
    for name, member in sample.parts.items():
        require_usable(member)
        its_sizes, sources[name] = _read_part_header(descriptor, member)
        if its_sizes != (held := its_sizes if held is None else held):
            raise SampleError("its precomputed parts were made of different pictures")
    text, kind, found = _read_text(descriptor, sample)
    first_problem: SampleError | None = None
    named = sample.has_named_pictures
    for pictures in sample.picture_choices(_picture_names(found)) if named else [sample.pictures]:
        sizes = [picture.size for picture in pictures] or held or []
        try:
            if held not in (None, sizes):
                raise SampleError(f"its {' and '.join(sources)} were made of other pictures")
            measured, without_labels = _measured(text, kind, found, len(sizes), measure)
        except SampleError as problem:
            first_problem = first_problem or problem
        else:
            break
    else:
        if isinstance(first_problem, OverBounds):
            raise first_problem
        without = "" if pictures or "picture" not in str(first_problem) else f"; its members: {sample.member_names()}"
        raise SampleError(f"{first_problem}{without}")
    sample.pictures = pictures
    colours: list[str | None] = []
    filled = 0
    for picture in pictures:
        require_usable(picture)
        try:
            if verify_images:
                data = os.pread(descriptor, picture.size, picture.offset)
                decoded = decode_image(data, measure.spec.truncated_images)
                colours.append(one_colour(decoded.picture))
                filled += decoded.filled
        except ImageError as error:
            raise SampleError(f"a picture is {error}") from None
    columns = {**measured, "kind": kind, "num_images": len(sizes)}
    return columns, content_digest(sample.key, text, sizes), sources, Notes(without_labels, colours, filled)


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


def _read_text(descriptor: int, sample: TarSample) -> tuple[bytes, int, Any]:
    """(bytes, kind, value of the JSON) of a sample's record, or of its caption if no JSON has a conversation.

    Sets the sample's `text`.
    """
    problem, several = "", len(sample.records) > 1
    read: list[tuple[Member, bytes, Any]] = []
    for member in sample.records:
        try:
            text = _read(descriptor, member)
            found = json.loads(text)
        except SampleError as error:
            if not several:
                raise
            problem = problem or str(error)
            continue
        except (ValueError, RecursionError) as error:
            problem = problem or f"the record is not JSON: {checked.reason(error)}"
            continue
        if _has_turns(found) if several else isinstance(found, list) or has_turns(found) or sample.caption is None:
            read = [*read[:1], (member, text, found)]
        problem = problem or ("no JSON has a conversation" if several else "the record is not a JSON object")
    if len(read) == 1:
        sample.text, text, found = read[0]
        return text, TURNS if isinstance(found, list) else RECORD, found
    problem = "several JSONs have a conversation" if read else problem
    if read or sample.caption is None:
        raise SampleError(problem + (f": its members are {sample.member_names()}" if several else ""))
    sample.text = sample.caption
    return _read(descriptor, sample.caption), CAPTION, None


def _has_turns(found: Any) -> bool:
    """Whether one of several JSONs is the conversation."""
    first = found[0] if isinstance(found, list) and found else None
    return has_turns(found) or (isinstance(first, dict) and any(key in first for key in SPEAKER_KEYS))


def _picture_names(found: Any) -> list[str]:
    """The names of pictures in a record, none if it cannot be read."""
    try:
        return [name for name in picture_names(normalise(found)) if isinstance(name, str)]
    except ConversationError:
        return []


def _measured(text: bytes, kind: int, found: Any, num_images: int, measure: Measure) -> tuple[dict[str, int], str]:
    """(columns, why it has no labels) of a sample with this number of pictures.

    Raises SampleError when it cannot be trained on.
    """
    if num_images > MAX_IMAGES:
        raise SampleError(f"it has over {MAX_IMAGES} pictures")
    if kind == CAPTION and not num_images:
        raise SampleError("a caption with 0 pictures")
    record = found if kind == RECORD else json.loads(as_record(text, kind, num_images))
    if kind == CAPTION and not record["conversations"][1]["value"]:
        raise SampleError("the caption is empty")
    columns = measure(record, num_images)
    return columns, measure.why_without_labels(record, columns)


def _read(descriptor: int, member: Member) -> bytes:
    require_usable(member)
    return os.pread(descriptor, member.size, member.offset)
