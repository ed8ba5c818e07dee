"""From tars to the index that training reads: the one place where members of a tar become rows.

A sample that cannot be trained on is left out of the index and listed in quarantine.jsonl with its shard, key and
reason. Shards are indexed one by one, in any process, into a `ShardIndex`; `write_index` puts them together. What a
tar held is kept in `index.parts/`, so that only shards that changed are read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ross_mcore import checked
from ross_mcore.checked import reason as reason_of
from ross_mcore.data.conversation import (
    IMAGE_PLACEHOLDER,
    UNBOUNDED,
    ConversationError,
    SampleBounds,
    check_turns,
    count_words,
    require_pictures,
    tokenize_conversation,
)
from ross_mcore.data.image import ImageError, decode_image
from ross_mcore.data.shards import (
    CAPTION,
    FORMAT,
    FORMAT_VERSION,
    IMAGE_ROW,
    INDEX_TOOL,
    MAX_IMAGES,
    PART_ROW,
    RECORD,
    SAMPLE_ROW,
    TURNS,
    UNKNOWN_LENGTH,
    LengthSource,
    ShardError,
    ShardReader,
    ShardReadError,
    as_record,
)
from ross_mcore.data.tar_samples import Damage, Member, TarSample, group_members, printable, walk_tar
from ross_mcore.data.tokenizer import fingerprint_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LIMIT = 2**31 - 1
MAX_PART_HEADER_BYTES = 16 << 20
DIGEST_BYTES = 16


class SampleError(ValueError):
    """A sample that cannot be trained on; the message is a short reason, meant to be counted."""


@dataclass(frozen=True)
class Measure:
    """Checks records and counts their words and, with a tokenizer and a template, their tokens and labels.

    A record over `bounds` is refused, over its tokens only with a tokenizer and a template.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    template: str | None = None
    mm_use_im_start_end: bool = False
    bounds: SampleBounds = UNBOUNDED

    def __call__(self, record: Any, num_images: int) -> dict[str, int]:
        """The columns of a SAMPLE_ROW that depend on the text. Raises SampleError for a record without a row."""
        if not isinstance(record, dict):
            raise SampleError("the record is not a JSON object")
        turns = record.get("conversations")
        try:
            self.bounds.require(num_images)
            checked = check_turns(turns, roles=None)
            if self.tokenizer is None or self.template is None:
                shown = sum(text.count(IMAGE_PLACEHOLDER) for _, text in checked)
                if num_images > 1:
                    require_pictures(max(shown, num_images), num_images)
                measured = {"image_spans": num_images}
            else:
                row = tokenize_conversation(
                    turns,
                    num_images,
                    self.tokenizer,
                    self.template,
                    NO_LIMIT,
                    mm_use_im_start_end=self.mm_use_im_start_end,
                )
                self.bounds.require(num_images, row.text_tokens)
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


def length_source(tokenizer: PreTrainedTokenizerBase, template: str, mm_use_im_start_end: bool = False) -> LengthSource:
    """What lengths measured by this program are worth: fingerprints of the tokenizer and of what texts become.

    The latter is of a few conversations with and without pictures, tokenized: it changes with the program's templates
    and with where it puts pictures, which the tokenizer and the template's name do not show.
    """
    short = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]
    inside = [{"from": "human", "value": "See <image> and <image>."}, {"from": "gpt", "value": "Two."}]
    facts = []
    for turns, num_images in ((short, 1), (short * 2, 2), (inside, 1), (inside, 3), (short, 0)):
        try:
            row = tokenize_conversation(
                turns, num_images, tokenizer, template, NO_LIMIT, mm_use_im_start_end=mm_use_im_start_end
            )
            facts.append([row.input_ids, row.labels])
        except ConversationError as error:
            facts.append([str(error)])
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return LengthSource(fingerprint_tokenizer(tokenizer), template, mm_use_im_start_end, fingerprint)


def stale_lengths(reader: ShardReader, source: LengthSource, tokenizer_folder: Path | str) -> str | None:
    """Why the lengths of an index are not those of `source`, with the command that mends it; None when they are."""
    found = reader.length_source
    difference = None if found is None else found.difference(source)
    if found is not None and difference is None:
        return None
    was = "has no lengths" if found is None else f"was measured with another {difference}"
    flags = ["--data-path", str(reader.folder), "--tokenizer", str(tokenizer_folder), "--template", source.template]
    flags += ["--mm-use-im-start-end"] if source.mm_use_im_start_end else []
    return f"the index of {reader.folder} {was}; mend it with: {INDEX_TOOL} {shlex.join(flags)}"


def content_digest(key: str, text: bytes, picture_sizes: Iterable[int]) -> bytes:
    """What a sample adds to the fingerprint of a data set: its key, its text, and the sizes of its pictures."""
    digest = hashlib.sha256()
    for part in (key.encode(), text, *(str(size).encode() for size in picture_sizes)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()[:DIGEST_BYTES]


@dataclass(frozen=True)
class ShardIndex:
    """One shard's part of an index: rows whose `shard`, `key_offset` and `first_image` count from this shard.

    samples [N] of SAMPLE_ROW, images of IMAGE_ROW, parts [N] of PART_ROW, keys: one a line, digests [N, DIGEST_BYTES];
    quarantine: (key, reason) of what was left out, without a key where the shard itself is damaged; lost_bytes: bytes
    that belong to no member; others: members that belong to no sample; part_sources: what the precomputed parts of a
    kind were made with, each once.
    """

    samples: NDArray[np.void]
    images: NDArray[np.void]
    parts: NDArray[np.void]
    keys: bytes
    digests: NDArray[np.uint8]
    quarantine: list[tuple[str | None, str]]
    lost_bytes: int = 0
    others: int = 0
    part_sources: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        samples: Sequence[TarSample],
        facts: Sequence[dict[str, int]],
        digests: Sequence[bytes],
        quarantine: list[tuple[str | None, str]],
        lost_bytes: int = 0,
        others: int = 0,
        part_sources: dict[str, list[Any]] | None = None,
    ) -> ShardIndex:
        """The index of samples of a tar with their columns, `kind` among them."""
        rows, parts = np.zeros(len(samples), SAMPLE_ROW), np.zeros(len(samples), PART_ROW)
        keys, places = bytearray(), []
        for row, part, sample, columns in zip(rows, parts, samples, facts, strict=True):
            text = sample.members["txt" if columns["kind"] == CAPTION else "json"]
            row["text_offset"], row["text_size"] = text.offset, text.size
            row["key_offset"], row["first_image"] = len(keys), len(places)
            for name, value in columns.items():
                row[name] = value
            keys += f"{sample.key}\n".encode()
            places += [(found.offset, found.size) for found in sample.pictures] or [(0, 0)] * columns["num_images"]
            for kind, member in sample.parts.items():
                part[f"{kind}_offset"], part[f"{kind}_size"] = member.offset, member.size
        stacked = np.frombuffer(b"".join(digests), np.uint8).reshape(len(samples), DIGEST_BYTES)
        images = np.array(places, IMAGE_ROW)
        return cls(rows, images, parts, bytes(keys), stacked, quarantine, lost_bytes, others, part_sources or {})

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Writes the part and what it was made of, under a temporary name first."""
        facts = {"quarantine": self.quarantine, "lost_bytes": self.lost_bytes, "others": self.others}
        facts |= {"num_samples": len(self.samples), "num_images": len(self.images), "key_bytes": len(self.keys)}
        facts["part_sources"] = self.part_sources
        data = {"samples": self.samples, "images": self.images, "parts": self.parts, "digests": self.digests}
        data["keys"] = np.frombuffer(self.keys, np.uint8)
        data["facts"] = np.frombuffer(json.dumps({**facts, "about": about}).encode(), np.uint8)
        with replacing(path) as stream:
            np.savez(stream, **data)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Raises ShardError when the part is damaged."""
        facts = part_facts(path)
        try:
            if facts is None:
                raise ValueError("no part of an index")
            with _opened(path) as part:
                samples, images, parts, digests = (part[name] for name in ("samples", "images", "parts", "digests"))
                keys = part["keys"].tobytes()
            held = len(samples), len(images), len(parts), len(digests), len(keys)
            said = tuple(
                facts[name] for name in ("num_samples", "num_images", "num_samples", "num_samples", "key_bytes")
            )
            kinds = samples.dtype, images.dtype, parts.dtype, digests.dtype
            if held != said or kinds != (SAMPLE_ROW, IMAGE_ROW, PART_ROW, np.uint8):
                raise ValueError("its tables are not those of its facts")
            quarantine = [(None if key is None else str(key), str(reason)) for key, reason in facts["quarantine"]]
        except Exception as error:  # numpy and zipfile raise what they come across
            raise ShardError(f"{path} is damaged: {reason_of(error)}; delete it and index the shards again") from None
        sources = checked.mapping(facts["part_sources"], "part_sources")
        return cls(samples, images, parts, keys, digests, quarantine, facts["lost_bytes"], facts["others"], sources)


def part_facts(path: Path) -> dict[str, Any] | None:
    """What `ShardIndex.save` wrote about a part, None when there is no whole part."""
    try:
        with _opened(path) as part:
            facts = json.loads(part["facts"].tobytes())
        for key in ("num_samples", "num_images", "key_bytes", "lost_bytes", "others"):
            checked.count(facts, key, least=0, most=2**62)
        checked.mapping(facts["part_sources"], "part_sources")
        return facts if isinstance(facts["quarantine"], list) and "about" in facts else None
    except Exception:  # as in ShardIndex.load; a part that is none is made again
        return None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An .npz that `ShardIndex.save` wrote. Raises ValueError for one whose members unpack to more than it holds."""
    checked.require_regular(path)
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise ValueError("its members are compressed, which none are that were written here")
    with np.load(path, allow_pickle=False) as part:
        yield part


def index_tar(
    descriptor: int, measure: Measure, verify_images: bool = True, progress: Callable[[int], None] = lambda _: None
) -> ShardIndex:
    """Indexes an open tar, whatever state it is in: every sample is in the rows or in the quarantine.

    `progress` is called with the bytes passed. Raises OSError when the file cannot be read.
    """
    members: list[Member] = []
    damages: list[Damage] = []
    for found in walk_tar(descriptor):
        (members if isinstance(found, Member) else damages).append(found)  # type: ignore[arg-type]
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
        except (ValueError, RecursionError) as error:  # SampleError, ShardError, and whatever a parser makes of it
            quarantine.append((printable(sample.key), str(error)))
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
    """(columns, digest, what its precomputed parts were made with) of a sample of a tar.

    Where the pictures were left out, the parts tell their number and sizes. Raises ValueError when the sample cannot be
    trained on.
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
    named = record.get("image") or []
    expected = len(named) if isinstance(named, list) else 1
    if kind == CAPTION and not sizes:
        raise SampleError("a caption with 0 pictures")
    if expected and expected != len(sizes):
        raise SampleError(f"the record names {expected} pictures and the shard has {len(sizes)}")
    columns = {**measure(record, len(sizes)), "kind": kind, "num_images": len(sizes)}
    if verify_images:
        for picture in pictures:
            try:
                decode_image(os.pread(descriptor, picture.size, picture.offset))
            except ImageError as error:
                raise SampleError(f"a picture is {error}") from None
    return columns, content_digest(sample.key, text, sizes), sources


def _read_part_header(descriptor: int, member: Member) -> tuple[list[int], Any]:
    """(sizes in bytes of the pictures, what it was made with) of precomputed parts, from the safetensors header."""
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
    """(bytes, kind, record) of a sample's JSON, or of its caption where there is no JSON with a conversation in it."""
    problem = "it has no .txt"
    if "json" in sample.members:
        text = _read(descriptor, sample.members["json"])
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            problem = f"the record is not JSON: {type(error).__name__}"
        else:
            if isinstance(found, list):
                return text, TURNS, json.loads(as_record(text, TURNS, num_images))
            if isinstance(found, dict) and ("conversations" in found or "txt" not in sample.members):
                return text, RECORD, found
            problem = "the record is not a JSON object"
    if "txt" not in sample.members:
        raise SampleError(problem)
    text = _read(descriptor, sample.members["txt"])
    record = json.loads(as_record(text, CAPTION, num_images))
    if not record["conversations"][1]["value"]:
        raise SampleError("the caption is empty")
    return text, CAPTION, record


def _read(descriptor: int, member: Member) -> bytes:
    return os.pread(descriptor, member.size, member.offset)


@dataclass(frozen=True)
class IndexedShard:
    """A shard's place, its version where the store names one, and its part of the index."""

    name: str
    bytes: int
    part: Callable[[], ShardIndex]
    tag: str | None = None


def write_index(folder: Path, shards: Sequence[IndexedShard], source: LengthSource | None) -> None:
    """Writes the index of `shards`, in this order, into `folder`; one part is in memory at a time.

    The old index, if any, is replaced at the end, file by file, index.json last. Raises ShardError without a sample.
    """
    totals, entries = np.zeros(3, np.int64), []
    precomputed: dict[str, Any] = {}
    pictured, left_out = 0, False
    for shard in shards:
        part = shard.part()
        totals += (len(part.samples), len(part.images), len(part.quarantine))
        if len(part.samples):
            tag = {} if shard.tag is None else {"tag": shard.tag}
            entries.append({"name": shard.name, "bytes": shard.bytes, "samples": len(part.samples), **tag})
        left_out = left_out or bool((part.images["size"] == 0).any())
        pictured += int(np.count_nonzero(part.samples["num_images"]))
        for kind, sources in part.part_sources.items():
            about = precomputed.setdefault(kind, {"samples": 0, "sources": []})
            about["samples"] += int(np.count_nonzero(part.parts[f"{kind}_size"]))
            about["sources"] += [source for source in sources if source not in about["sources"]]
    num_samples, num_images, num_quarantined = totals.tolist()
    if not num_samples:
        raise ShardError(f"no usable sample: no index was written to {folder}")
    content = hashlib.sha256()
    with (
        replacing(folder / "index.json") as index,  # the first to be entered is the last to be left
        replacing(folder / "samples.npy") as samples,
        replacing(folder / "images.npy") as images,
        replacing(folder / "parts.npy") if precomputed else nullcontext() as parts,
        replacing(folder / "keys.txt") as keys,
        replacing(folder / "quarantine.jsonl") as quarantine,
    ):
        tables = [(samples, SAMPLE_ROW, num_samples), (images, IMAGE_ROW, num_images)]
        for stream, row, count in tables + ([(parts, PART_ROW, num_samples)] if parts is not None else []):
            header = {"descr": np.lib.format.dtype_to_descr(row), "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(stream, header)
        number = key_offset = first_image = 0
        for shard in shards:
            part = shard.part()
            rows = part.samples.copy()
            rows["shard"] = number
            rows["key_offset"] += np.uint64(key_offset)
            rows["first_image"] += np.uint64(first_image)
            samples.write(rows.tobytes())
            images.write(part.images.tobytes())
            if parts is not None:
                parts.write(part.parts.tobytes())
            keys.write(part.keys)
            content.update(part.digests.tobytes())
            for line in quarantine_lines(shard.name, part):
                quarantine.write(line)
            number += len(rows) > 0
            key_offset, first_image = key_offset + len(part.keys), first_image + len(part.images)
        facts = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "num_samples": num_samples,
            "num_images": num_images,
            "quarantined": num_quarantined,
            "fingerprint": content.hexdigest()[:16],
            "lengths": None if source is None else asdict(source),
            "pictures_left_out": left_out,
            "precomputed": {kind: {**about, "of": pictured} for kind, about in precomputed.items()},
            "shards": entries,
        }
        index.write(json.dumps(facts, indent=1).encode())


def quarantine_lines(name: str, part: ShardIndex) -> list[bytes]:
    """Lines of quarantine.jsonl; what is wrong with a shard itself has no key."""
    lines = ({"shard": name, "key": key, "reason": reason} for key, reason in part.quarantine)
    return [json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" for line in lines]


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file under a temporary name, on the disk and renamed to `path` at the end, removed after an exception.

    Raises ShardError naming `path` when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    except OSError as error:
        raise ShardError(f"{path} cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)  # mkstemp makes it private
        Path(name).rename(path)
    except ShardReadError:
        raise
    except OSError as error:
        raise ShardError(f"{path} cannot be written: {error.strerror}; make room, or move away what is there") from None
    finally:
        Path(name).unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder that a tool writes into, where there is none. Raises ShardError naming it.

    A link is refused: what is written through it would lie elsewhere, perhaps over what is there.
    """
    if path.is_symlink():
        raise ShardError(f"{path} is a link; remove it, or give another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShardError(f"{path} cannot be made: {error.strerror}; give another folder") from None
