"""ShardReader: the format of tar shards and their index, and random access to samples.

A data set is a folder:

    shard-00000.tar ...   members `<key>.json` and `<key>.jpg|png|...` (several: `<key>.0.jpg`, `<key>.1.jpg`); instead
                          of the JSON there may be a caption, `<key>.txt`; precomputed parts of the pictures are in
                          `<key>.latents.safetensors` and `<key>.features.safetensors` (precomputed.py); other names:
                          shards/tars.py
    index.json            format, version, counts, places and sizes of the shards, source of the lengths
    samples.npy           one SAMPLE_ROW per sample, memory-mapped
    images.npy            one IMAGE_ROW per picture, in the order of the samples
    parts.npy             one PART_ROW per sample, if there are precomputed parts
    keys.txt              one key per line, memory-mapped
    quarantine.jsonl      samples left out: one {"shard", "key", "reason"} per line

The index has each tar's file name in the folder, absolute path or URL. Training does not parse tars: a member is one
`pread` at (shard, offset, size), from the local cache for a URL (remote.py). The tars are WebDataset shards, which any
WebDataset reader reads without the index. shards/writer.py writes the tars, shards/index_parts.py the index.
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
from ross_mcore.data.remote import DEFAULT_CACHE_BYTES, ShardCache, file_system, is_remote
from ross_mcore.errors import RemoteError, ShardError, ShardReadError

INDEX_TOOL = "python tools/index_shards.py"
FORMAT = "ross_mcore shards"
FORMAT_VERSION = 4
"""2: label_tokens and text_words. 3: records of several kinds, shards anywhere, fingerprint by sample. 4: precomputed
parts."""
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MORE_IMAGE_SUFFIXES = (
    *("jpe", "jfif", "jfi", "pjpeg", "pjp", "apng", "gif", "bmp", "dib", "tif", "tiff", "avif", "heic", "heif", "hif"),
    *("jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "mpo", "ppm", "pgm", "pbm", "pnm", "img", "image"),
)
"""Suffixes of pictures that make_shards does not write. The content decides how a picture is decoded."""
JSON_SUFFIX = "json"
CAPTION_SUFFIXES = ("txt", "text", "caption", "cap")
"""Suffixes of captions, the preferred one first."""
PART_SUFFIXES = {"latents.safetensors": "latents", "features.safetensors": "features"}
MAX_RECORD_BYTES = 16 << 20
MAX_IMAGE_BYTES = 64 << 20
MAX_PART_BYTES = 1 << 30
MAX_IMAGES = 65535
MAX_SAMPLES = 2**40
MAX_KEY_BYTES = 1024
READ_PAUSES_SECONDS = (0.5, 1.0, 2.0)
"""Pauses before the next attempts of a read that fails."""
MAX_OPEN_SHARDS = 64
"""Maximum number of tar files that a reader keeps open, under the usual limit of 1024 descriptors per process."""
UNKNOWN_LENGTH = -1
RECORD, TURNS, CAPTION = range(3)
"""Kinds of text: a LLaVA record, its list of turns alone (both JSON), or a caption of the pictures."""

SAMPLE_ROW = np.dtype(
    [
        ("text_offset", "<u8"),
        ("key_offset", "<u8"),
        ("first_image", "<u8"),
        ("text_size", "<u4"),
        ("shard", "<u4"),
        ("text_words", "<u4"),  # words of all turns, see conversation.count_words
        ("text_tokens", "<i4"),  # tokens of the row without its images, or UNKNOWN_LENGTH
        ("label_tokens", "<i4"),  # labels of the row, 0 if all are ignored, or UNKNOWN_LENGTH
        ("kind", "u1"),  # RECORD, TURNS or CAPTION
        ("num_images", "<u2"),  # pictures in the tar
        ("image_spans", "<u2"),  # pictures that the text shows: a row is text_tokens + image_spans * image_tokens
    ]
)
IMAGE_ROW = np.dtype([("offset", "<u8"), ("size", "<u4")])
"""The size is 0 if the shard has the precomputed parts of a picture but not the picture."""
PART_ROW = np.dtype(
    [("latents_offset", "<u8"), ("features_offset", "<u8"), ("latents_size", "<u4"), ("features_size", "<u4")]
)
"""A size is 0 if a sample has no part of this kind."""


@dataclass(frozen=True)
class LengthSource:
    """The source of text_tokens and label_tokens, which are valid for this source only."""

    tokenizer: str
    template: str
    mm_use_im_start_end: bool = False
    image_tokens: str = ""
    """Fingerprint of tokenized examples with pictures (lengths.length_source)."""

    def difference(self, other: LengthSource) -> str | None:
        """Description of the first field that differs."""
        names = [field.name for field in fields(self)]
        first = next((name for name in names if getattr(self, name) != getattr(other, name)), None)
        return "treatment of pictures in the text" if first == "image_tokens" else first


def as_record(data: bytes, kind: int, num_images: int) -> bytes:
    """A sample's text as the JSON of a LLaVA record. Raises ShardError for text that is not UTF-8.

    A caption becomes an answer, stripped, to a turn with the pictures that the caption itself does not show.
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
    """Checks an index and fills in what may be missing. Raises ValueError."""
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
    lengths = index.get("lengths")
    index["lengths"] = None if lengths is None else checked.build(LengthSource, lengths, "lengths")
    checked.mapping(index.setdefault("precomputed", {}), "precomputed")
    if index.setdefault("truncated_images", "refuse") not in ("refuse", "fill"):
        raise ValueError(f"truncated_images is {checked.shown(index['truncated_images'])}, expected refuse or fill")
    index["pictures_left_out"] = checked.switch(index, "pictures_left_out", False)


class ShardReader:
    """Random access to a data set by sample number; its state is open files and memory maps.

    `fingerprint` identifies the samples and their order, independent of the sharding. A shard behind a URL is fetched
    whole into `cache_folder`, which holds at most `cache_bytes`.

    Safe in forked worker processes (`pread` moves no shared file position) and picklable for spawned ones.
    Raises ShardError when the folder is not a data set, or the index does not fit its shards.
    """

    def __init__(self, folder: Path, cache_folder: Path | None = None, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.folder = Path(folder)
        self._arguments = folder, cache_folder, cache_bytes
        self.index = self._read_index()
        self.num_samples, self.num_images = self.index["num_samples"], self.index["num_images"]
        self.fingerprint: str = self.index["fingerprint"]
        self.length_source: LengthSource | None = self.index["lengths"]
        self.quarantined: int = self.index["quarantined"]
        self.samples = self._map("samples.npy", SAMPLE_ROW, self.num_samples)
        self.images = self._map("images.npy", IMAGE_ROW, self.num_images)
        self.precomputed: dict[str, Any] = self.index["precomputed"]
        self.pictures_left_out: bool = self.index["pictures_left_out"]
        self.truncated_images: str = self.index["truncated_images"]
        self.parts = self._map("parts.npy", PART_ROW, self.num_samples) if self.precomputed else None
        try:
            checked.require_regular(self.folder / "keys.txt", self.num_samples * (MAX_KEY_BYTES + 1))
            self._keys = np.memmap(self.folder / "keys.txt", np.uint8, "r")
        except (OSError, ValueError) as error:
            raise ShardError(
                f"{self.folder / 'keys.txt'} cannot be read: {checked.reason(error)}; {self._remedy}"
            ) from None
        self.max_open_shards = MAX_OPEN_SHARDS
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._cache = None if cache_folder is None else ShardCache(Path(cache_folder), cache_bytes)
        remote = next((shard for shard in self.index["shards"] if is_remote(shard["name"])), None)
        if remote is not None and self._cache is None:
            raise ShardError(f"{remote['name']} is not a local file: give a folder for shards with --data-cache-dir")
        if remote is not None:
            try:
                file_system(remote["name"])
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
        """The numbers of the samples with each of these keys, several if shards have equal keys."""
        found: dict[str, list[int]] = {key: [] for key in keys}
        wanted = {f"{key}\n".encode(): numbers for key, numbers in found.items()}
        for number, line in enumerate(itertools.islice(io.BytesIO(self._keys.tobytes()), len(self))):
            if line in wanted:
                wanted[line].append(number)
        return found

    def shard_name(self, shard: int) -> str:
        """The name of a shard by its number, which may be invalid in a damaged samples.npy."""
        shards = self.index["shards"]
        return shards[shard]["name"] if shard < len(shards) else f"no shard {shard}"

    def record_bytes(self, number: int) -> bytes:
        """The LLaVA record of a sample as JSON. Raises ShardError when it cannot be read completely."""
        row = self.samples[number]
        return as_record(self.text_bytes(number), int(row["kind"]), int(row["num_images"]))

    def text_bytes(self, number: int) -> bytes:
        """The member with a sample's text, of any kind. Raises ShardError when it cannot be read completely."""
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

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Path, Path | None, int]]:
        return ShardReader, self._arguments

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
            except OSError as error:  # the cache has made several attempts
                raise ShardReadError(f"{name}: {error.strerror or error}") from None
        else:
            name = str(self.folder / name)
            data = self._read_local(shard, name, size, offset)
        if len(data) != size:
            raise ShardError(f"{name} is truncated: {len(data)} of {size} bytes at {offset}")
        return data

    def _read_local(self, shard: int, path: str, size: int, offset: int) -> bytes:
        for pause in (*READ_PAUSES_SECONDS, None):
            try:
                if shard not in self._handles:
                    if len(self._handles) >= self.max_open_shards:
                        os.close(self._handles.popitem(last=False)[1])
                    self._handles[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._handles.move_to_end(shard)
                return os.pread(self._handles[shard], size, offset)
            except OSError as error:
                if shard in self._handles:  # its mount may have changed
                    with contextlib.suppress(OSError):
                        os.close(self._handles.pop(shard))
                if pause is None:
                    attempts = len(READ_PAUSES_SECONDS) + 1
                    raise ShardReadError(f"{path}: {error.strerror or error}, {attempts} times in a row") from None
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    @property
    def _remedy(self) -> str:
        return f"make the index again: {INDEX_TOOL} --data-path {self.folder}"

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / "index.json"
        try:
            index = checked.read_json(path)
        except FileNotFoundError:
            raise ShardError(
                f"{path} does not exist; tools/make_shards.py makes a data set, this one of tars: "
                f"{INDEX_TOOL} --data-path {self.folder}"
            ) from None
        except ValueError as error:
            raise ShardError(f"{path} cannot be read: {error}; {self._remedy}") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise ShardError(f"{path} is not the index of a data set; {self._remedy}")
        if index.get("version") != FORMAT_VERSION:
            raise ShardError(
                f"{path} is a version {checked.shown(index.get('version'))} index and this program reads version "
                f"{FORMAT_VERSION}; {self._remedy}"
            )
        try:
            _check_index(index)
        except ValueError as error:
            raise ShardError(f"{path} is malformed: {error}; {self._remedy}") from None
        for shard in index["shards"]:
            if not is_remote(shard["name"]):
                self._require_shard(path, shard["name"], shard["bytes"])
        return index

    def _require_shard(self, index: Path, name: str, size: int) -> None:
        """Raises ShardError unless a local shard has the name and size of the index."""
        if Path(name).name != name and (not Path(name).is_absolute() or ".." in Path(name).parts):
            raise ShardError(
                f"{index}: shard name {checked.shown(name)} is no plain file name, absolute path or URL; {self._remedy}"
            )
        try:
            status = (self.folder / name).stat()
        except OSError as error:
            raise ShardError(
                f"{index} names the shard {checked.shown(name)}, which cannot be read: {error.strerror}; put it there, "
                f"or {self._remedy}"
            ) from None
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            raise ShardError(
                f"{self.folder / name} has not the {size} bytes of the index; copy it again, or, if it was changed, "
                f"{self._remedy}"
            )

    def _map(self, name: str, row: np.dtype[np.void], count: int) -> NDArray[np.void]:
        path = self.folder / name
        try:
            checked.require_regular(path)
            table: NDArray[np.void] = np.load(path, mmap_mode="r" if count else None, allow_pickle=False)
        except Exception as error:  # numpy passes on any exception of its header parser
            raise ShardError(f"{path} cannot be read: {checked.reason(error)}; {self._remedy}") from None
        if table.dtype != row or table.shape != (count,):
            raise ShardError(
                f"{path} holds {'x'.join(map(str, table.shape))} rows"
                f"{'' if table.dtype == row else ' of another kind'}, index.json says {count}; {self._remedy}"
            )
        return table
