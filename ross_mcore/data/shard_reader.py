"""Tar shards and their index: the format, and reading it by sample number straight through offsets.

A data set is a folder:

    shard-00000.tar ...   members `<key>.json` and `<key>.jpg|jpeg|png|webp` (several: `<key>.0.jpg`, `<key>.1.jpg`);
                          instead of the JSON there may be a caption, `<key>.txt`; what was computed of the pictures
                          beforehand is in `<key>.latents.safetensors`, `<key>.features.safetensors` (precomputed.py)
    index.json            format, version, counts, the shards' places and sizes, what the lengths were measured with
    samples.npy           one SAMPLE_ROW a sample, memory-mapped
    images.npy            one IMAGE_ROW a picture, in the order of the samples
    parts.npy             one PART_ROW a sample, where there are precomputed parts
    keys.txt              one key a line, memory-mapped
    quarantine.jsonl      what was left out: one {"shard", "key", "reason"} a line

The tars need not lie in the folder: the index names each by its name there, by an absolute path or by a URL. Nothing
parses a tar at training time: a member is one `pread` at (shard, offset, size), of a shard from a URL in a local cache
(remote.py). The tars are plain WebDataset shards, which any WebDataset reader reads without the index.
`shard_writer.py` makes such tars, `indexing.py` and `index_writer.py` the index of any.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ross_mcore import checked
from ross_mcore.data.remote import DEFAULT_CACHE_BYTES, ShardCache, is_remote, require_protocol
from ross_mcore.errors import RemoteError, ShardError, ShardReadError

INDEX_TOOL = "python tools/index_shards.py"
FORMAT = "ross_mcore shards"
FORMAT_VERSION = 4
"""2: label_tokens and text_words. 3: records of several kinds, shards anywhere, fingerprint by sample. 4: precomputed
parts."""
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
RECORD_SUFFIXES = ("json", "txt")
PART_SUFFIXES = {"latents.safetensors": "latents", "features.safetensors": "features"}
MAX_RECORD_BYTES = 16 << 20
MAX_IMAGE_BYTES = 64 << 20
MAX_PART_BYTES = 1 << 30
MAX_IMAGES = 65535
MAX_SAMPLES = 2**40
MAX_KEY_BYTES = 1024
READ_PAUSES_SECONDS = (0.5, 1.0, 2.0)
"""Before a read that the file system failed is tried again."""
MAX_OPEN_SHARDS = 64
"""Tar files a reader keeps open at a time, well under the usual limit of 1024 descriptors a process."""
UNKNOWN_LENGTH = -1
RECORD, TURNS, CAPTION = range(3)
"""Kinds of a sample's text: a LLaVA record, its conversation alone (both JSON), or a caption of its pictures."""

SAMPLE_ROW = np.dtype(
    [
        ("text_offset", "<u8"),
        ("key_offset", "<u8"),
        ("first_image", "<u8"),
        ("text_size", "<u4"),
        ("shard", "<u4"),
        ("text_words", "<u4"),  # words of all turns, see conversation.count_words
        ("text_tokens", "<i4"),  # tokens of the row without its images; UNKNOWN_LENGTH when not measured
        ("label_tokens", "<i4"),  # labels of the row, 0 when all are ignored; UNKNOWN_LENGTH when not measured
        ("kind", "u1"),  # RECORD, TURNS or CAPTION
        ("num_images", "<u2"),  # pictures in the tar
        ("image_spans", "<u2"),  # image placeholders in the text: a row is text_tokens + image_spans * image_tokens
    ]
)
IMAGE_ROW = np.dtype([("offset", "<u8"), ("size", "<u4")])
"""Of size 0 where the shard has the picture's precomputed parts and not the picture."""
PART_ROW = np.dtype(
    [("latents_offset", "<u8"), ("features_offset", "<u8"), ("latents_size", "<u4"), ("features_size", "<u4")]
)
"""Sizes are 0 where a sample has no such part."""


@dataclass(frozen=True)
class LengthSource:
    """What text_tokens and label_tokens were measured with: other tokens or another text make them worthless."""

    tokenizer: str
    template: str
    mm_use_im_start_end: bool = False
    image_tokens: str = ""
    """Fingerprint of what texts with pictures become (lengths.length_source): it changes with the program."""

    def difference(self, other: LengthSource) -> str | None:
        """What differs between two sources, in words."""
        names = {"tokenizer": "tokenizer", "template": "template", "mm_use_im_start_end": "mm_use_im_start_end"}
        names |= {"image_tokens": "treatment of pictures in the text"}
        return next((names[f.name] for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)), None)


def as_record(data: bytes, kind: int, num_images: int) -> bytes:
    """A sample's text as the JSON of a LLaVA record. Raises ShardError for text that is not UTF-8.

    A caption becomes the conversation that shows the pictures, but for those that the caption shows with `<image>`, and
    answers with the caption, without the white space around it.
    """
    if kind == RECORD:
        return data
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ShardError("the text is not UTF-8") from None
    if kind == TURNS:
        return b'{"conversations": ' + text.encode() + b"}"
    pictures = "\n".join(["<image>"] * (num_images - text.count("<image>")))
    turns = [{"from": "human", "value": pictures}, {"from": "gpt", "value": text.strip()}]
    return json.dumps({"conversations": turns}, ensure_ascii=False).encode()


def _check_index(index: dict[str, Any]) -> None:
    """Brings an index to the types that it is read with. Raises ValueError."""
    shards = index.get("shards")
    if not isinstance(shards, list) or not shards:
        raise ValueError(f"shards is {checked.shown(shards)}, expected a list of them")
    for shard in shards:
        name = checked.mapping(shard, "a shard").get("name")
        if not isinstance(name, str) or not name or "\0" in name:
            raise ValueError(f"the name of a shard is {checked.shown(name)}")
        checked.count(shard, "samples", most=MAX_SAMPLES)
        checked.count(shard, "bytes", most=2**62)
        if not isinstance(shard.get("tag", ""), str):
            raise ValueError(f"the tag of a shard is {checked.shown(shard['tag'])}")
    checked.count(index, "num_samples", most=MAX_SAMPLES)
    for key in ("num_images", "quarantined"):
        checked.count(index, key, least=0, most=MAX_SAMPLES)
    if sum(shard["samples"] for shard in shards) != index["num_samples"]:
        raise ValueError(f"the shards' samples do not add up to num_samples={index['num_samples']}")
    if not isinstance(index.get("fingerprint"), str) or len(index["fingerprint"]) > 64:
        raise ValueError(f"fingerprint is {checked.shown(index.get('fingerprint'))}")
    if index.get("lengths") is not None:
        index["lengths"] = checked.build(LengthSource, index["lengths"], "lengths")
    index["lengths"] = index.get("lengths")
    checked.mapping(index.setdefault("precomputed", {}), "precomputed")
    checked.switch(index, "pictures_left_out", False)


class ShardReader:
    """Random access to a data set by sample number; a few open files and memory maps are its whole state.

    `fingerprint` names the content: the same samples in the same order have the same one, however they are sharded.

    A shard behind a URL is fetched whole into `cache_folder`, which holds at most `cache_bytes` of them.

    Safe in forked worker processes (`pread` moves no shared file position) and picklable for spawned ones.
    Raises ShardError when the folder is not a data set, or an index and its shards do not belong together.
    """

    def __init__(self, folder: Path, cache_folder: Path | None = None, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.folder = Path(folder)
        self.index = self._read_index()
        self.num_samples, self.num_images = self.index["num_samples"], self.index["num_images"]
        self.fingerprint: str = self.index["fingerprint"]
        self.length_source: LengthSource | None = self.index["lengths"]
        self.quarantined: int = self.index["quarantined"]
        self.samples = self._map("samples.npy", SAMPLE_ROW, self.num_samples)
        self.images = self._map("images.npy", IMAGE_ROW, self.num_images)
        self.precomputed: dict[str, Any] = self.index.get("precomputed", {})
        self.pictures_left_out: bool = self.index.get("pictures_left_out", False)
        self.parts = self._map("parts.npy", PART_ROW, self.num_samples) if self.precomputed else None
        try:
            checked.require_regular(self.folder / "keys.txt", self.num_samples * (MAX_KEY_BYTES + 1))
            self._keys = np.memmap(self.folder / "keys.txt", np.uint8, "r")
        except (OSError, ValueError) as error:
            raise ShardError(
                f"{self.folder / 'keys.txt'} cannot be read: {checked.reason(error)}; make the index again: "
                f"{INDEX_TOOL} --data-path {self.folder}"
            ) from None
        self.max_open_shards = MAX_OPEN_SHARDS
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._cache = None if cache_folder is None else ShardCache(Path(cache_folder), cache_bytes)
        remote = next((shard for shard in self.index["shards"] if is_remote(shard["name"])), None)
        if remote is not None and self._cache is None:
            raise ShardError(f"{remote['name']} is not a local file: say with --data-cache-dir where to keep shards")
        if remote is not None:
            try:
                require_protocol(remote["name"])
            except RemoteError as error:
                raise ShardError(str(error)) from None

    def __len__(self) -> int:
        return int(self.num_samples)

    def keys(self, sample_numbers: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """The keys of samples, without opening a shard."""
        keys = []
        for number in sample_numbers:
            start = int(self.samples[number]["key_offset"])
            last = int(number) + 1 == self.num_samples
            end = self._keys.size if last else int(self.samples[number + 1]["key_offset"])
            key = self._keys[start : max(start, end - 1)][:MAX_KEY_BYTES].tobytes().decode("utf-8", "replace")
            keys.append("".join(character if character.isprintable() else "?" for character in key))
        return keys

    def find(self, keys: Iterable[str]) -> dict[str, list[int]]:
        """The numbers of the samples with each of these keys: more than one when shards share keys."""
        found: dict[str, list[int]] = {key: [] for key in keys}
        wanted = {f"{key}\n".encode(): numbers for key, numbers in found.items()}
        for number, line in enumerate(itertools.islice(io.BytesIO(self._keys.tobytes()), len(self))):
            if line in wanted:
                wanted[line].append(number)
        return found

    def shard_name(self, shard: int) -> str:
        """The name of a shard by its number; of one that a damaged samples.npy makes up, that it is none."""
        shards = self.index["shards"]
        return shards[shard]["name"] if shard < len(shards) else f"no shard {shard}"

    def record_bytes(self, number: int) -> bytes:
        """The LLaVA record of a sample as JSON. Raises ShardError when it cannot be read whole."""
        row = self.samples[number]
        return as_record(self.text_bytes(number), int(row["kind"]), int(row["num_images"]))

    def text_bytes(self, number: int) -> bytes:
        """The member that is a sample's text, whatever its kind. Raises ShardError when it cannot be read whole."""
        row = self.samples[number]
        return self._read(row, int(row["text_offset"]), int(row["text_size"]), MAX_RECORD_BYTES)

    def image_bytes(self, number: int, ordinal: int) -> bytes:
        """The encoded picture `ordinal` of a sample. Raises ShardError when there is none or it cannot be read."""
        row = self.samples[number]
        place = int(row["first_image"]) + ordinal
        if not 0 <= ordinal < row["num_images"] or place >= self.num_images:
            raise ShardError(f"sample {number} has {row['num_images']} pictures, not {ordinal + 1}")
        if not self.images[place]["size"]:
            raise ShardError("its pictures were left out (--drop-images)")
        return self._read(row, int(self.images[place]["offset"]), int(self.images[place]["size"]), MAX_IMAGE_BYTES)

    def part_bytes(self, number: int, kind: str) -> bytes:
        """The member with a sample's `latents` or `features`. Raises ShardError when there is none."""
        size = 0 if self.parts is None else int(self.parts[number][f"{kind}_size"])
        if self.parts is None or not size:
            raise ShardError(f"sample {number} has no {kind}")
        return self._read(self.samples[number], int(self.parts[number][f"{kind}_offset"]), size, MAX_PART_BYTES)

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        cache = {} if self._cache is None else {"cache_folder": self._cache.folder, "cache_bytes": self._cache.limit}
        return {"folder": self.folder, **cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # of this very class

    def __del__(self) -> None:
        if hasattr(self, "_handles"):
            self.close()

    def _read(self, row: np.void, offset: int, size: int, limit: int) -> bytes:
        shard = int(row["shard"])
        if shard >= len(self.index["shards"]):
            raise ShardError(f"{self.folder}/samples.npy: shard {shard} of {len(self.index['shards'])}")
        name, total = self.index["shards"][shard]["name"], self.index["shards"][shard]["bytes"]
        if size > limit or offset + size > total:
            raise ShardError(f"{name}: a member of {size} bytes at {offset}, in {total} bytes, at most {limit} allowed")
        if is_remote(name):
            assert self._cache is not None
            try:
                with self._cache.open(name, total, self.index["shards"][shard].get("tag")) as handle:
                    data = os.pread(handle, size, offset)
            except OSError as error:  # the cache has tried several times
                raise ShardReadError(f"{name}: {error}") from None
            return self._whole(data, size, offset, name)
        return self._whole(self._read_local(shard, name, size, offset), size, offset, str(self.folder / name))

    def _read_local(self, shard: int, name: str, size: int, offset: int) -> bytes:
        for pause in (*READ_PAUSES_SECONDS, None):
            try:
                if shard not in self._handles:
                    if len(self._handles) >= self.max_open_shards:
                        os.close(self._handles.popitem(last=False)[1])
                    self._handles[shard] = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
                self._handles.move_to_end(shard)
                return os.pread(self._handles[shard], size, offset)
            except OSError as error:
                if shard in self._handles:  # of a mount that may be another one by now
                    with contextlib.suppress(OSError):
                        os.close(self._handles.pop(shard))
                if pause is None:
                    attempts = len(READ_PAUSES_SECONDS) + 1
                    raise ShardReadError(f"{self.folder / name}: {error}, {attempts} times in a row") from None
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    @staticmethod
    def _whole(data: bytes, size: int, offset: int, name: str) -> bytes:
        if len(data) != size:
            raise ShardError(f"{name} is truncated: {len(data)} of {size} bytes at {offset}")
        return data

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / "index.json"
        again = f"make it again from the shards: {INDEX_TOOL} --data-path {self.folder}"
        try:
            index = checked.read_json(path)
        except FileNotFoundError:
            raise ShardError(
                f"{path} does not exist; tools/make_shards.py makes a data set, this one of tars: "
                f"{INDEX_TOOL} --data-path {self.folder}"
            ) from None
        except ValueError as error:
            raise ShardError(f"{path} cannot be read: {error}; {again}") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise ShardError(f"{path} is not the index of a data set; make one: {INDEX_TOOL} --data-path {self.folder}")
        if index.get("version") != FORMAT_VERSION:
            raise ShardError(
                f"{path} is a version {checked.shown(index.get('version'))} index and this program reads version "
                f"{FORMAT_VERSION}; {again}"
            )
        try:
            _check_index(index)
        except ValueError as error:
            raise ShardError(f"{path} is malformed: {error}; {again}") from None
        for shard in index["shards"]:
            if not is_remote(shard["name"]):
                self._require_shard(path, shard["name"], shard["bytes"])
        return index

    def _require_shard(self, index: Path, name: str, size: int) -> None:
        """Raises ShardError unless a local shard is what the index says."""
        if Path(name).name != name and (not Path(name).is_absolute() or ".." in Path(name).parts):
            raise ShardError(
                f"{index}: shard name {checked.shown(name)} is no plain file name, absolute path or URL; make the "
                f"index again: {INDEX_TOOL} --data-path {self.folder}"
            )
        try:
            status = (self.folder / name).stat()
        except OSError as error:
            raise ShardError(
                f"{index} names the shard {checked.shown(name)}, which cannot be read: "
                f"{error.strerror}; put it there, or index the shards that are there: {INDEX_TOOL} --data-path "
                f"{self.folder}"
            ) from None
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            raise ShardError(
                f"{self.folder / name} has not the {size} bytes of the index; copy it again, or, if it was "
                f"changed, index it again: {INDEX_TOOL} --data-path {self.folder}"
            )

    def _map(self, name: str, row: np.dtype[np.void], count: int) -> NDArray[np.void]:
        path = self.folder / name
        try:
            checked.require_regular(path)
            table: NDArray[np.void] = np.load(path, mmap_mode="r" if count else None, allow_pickle=False)
        except Exception as error:  # numpy evaluates the header as Python, and says so when it cannot
            raise ShardError(
                f"{path} cannot be read: {checked.reason(error)}; make the index again: {INDEX_TOOL} --data-path "
                f"{self.folder}"
            ) from None
        if table.dtype != row or table.shape != (count,):
            raise ShardError(
                f"{path} holds {'x'.join(map(str, table.shape))} rows"
                f"{'' if table.dtype == row else ' of another kind'}, index.json says {count}; make the index again: "
                f"{INDEX_TOOL} --data-path {self.folder}"
            )
        return table
