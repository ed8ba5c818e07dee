"""Precomputes the outputs of the frozen VAE and vision tower for every picture of a data set, into new shards.

Every rank makes a share of the shards; only errors are communicated. A shard gets its name when it is complete, and its
part of the index after that, so an interrupted run continues with the missing shards.
Legend: n pictures of a sample, H W pixels of the tower's input.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ross_mcore import checked, platform
from ross_mcore.checkpoint.fingerprint import part_fingerprint
from ross_mcore.checkpoint.fit import architecture_of
from ross_mcore.checkpoint.folder import require_checkpoint
from ross_mcore.checkpoint.safe_load import StoredTensors
from ross_mcore.data.image import ImageAspectRatio, ImagePreprocessing, decode_image
from ross_mcore.data.precomputed import BLANK, PartSource, pack_blank, pack_part, part_source
from ross_mcore.data.shard_reader import CAPTION, MAX_PART_BYTES, ShardReader
from ross_mcore.errors import ImageError, ShardError
from ross_mcore.models.inventory import inventory
from ross_mcore.models.pixel_decoder import PixelDecoder
from ross_mcore.models.vision import VisionModel
from ross_mcore.parallel.collectives import all_or_none
from ross_mcore.parts import precomputed_part
from ross_mcore.shards.account import Account
from ross_mcore.shards.grouping import picture_members, read_samples, reportable
from ross_mcore.shards.index_parts import (
    PARTS,
    IndexedShard,
    ShardIndex,
    content_digest,
    make_folder,
    part_facts,
    replacing,
    write_index,
)

SETTINGS = "precompute.json"
COLUMNS = ("kind", "num_images", "text_words", "text_tokens", "label_tokens", "image_spans")
"""Columns of a SAMPLE_ROW that do not depend on the tar."""


@dataclass(frozen=True)
class PictureParts:
    """The frozen modules, with the preprocessing of their pictures and the sources of their outputs, by kind."""

    preprocessing: ImagePreprocessing
    modules: dict[str, VisionModel | PixelDecoder]
    sources: dict[str, PartSource]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels [n, 3, H, W] -> posteriors [n, 2, C, h, w] under "latents", features [n, N, D] under "features"."""
        pixels = pixels.to(platform.device())
        found = {}
        for kind, module in self.modules.items():
            made = module.posteriors(pixels) if isinstance(module, PixelDecoder) else module(pixels)
            found[kind] = made.cpu()
        return found

    def blank(self) -> dict[str, Tensor]:
        """The same for one picture of the mean colour, without the first dimension."""
        size = self.preprocessing.image_size
        return {kind: made[0] for kind, made in self(torch.zeros(1, 3, size, size)).items()}


def load_picture_parts(run: Path, kinds: Sequence[str], aspect_ratio: ImageAspectRatio, dtype: str) -> PictureParts:
    """VAE (for "latents") and tower (for "features") of a checkpoint, in float32 on this process's device.

    In float32 on a GPU too, without TF32: once for all runs. Raises CheckpointError and ArchitectureError naming the
    file.
    """
    platform.set_tf32(False)
    checkpoint = require_checkpoint(run)
    model = architecture_of(checkpoint, inventory)
    preprocessing = ImagePreprocessing.for_tower(model.vision, aspect_ratio, checkpoint.image_processor())
    stored = StoredTensors(checkpoint.path)
    modules: dict[str, VisionModel | PixelDecoder] = {}
    sources = {}
    for kind in kinds:
        if kind == "latents":
            size, vision = model.decode_image_size, model.vision  # raises without a VAE
            assert model.pixel_decoder is not None
            modules[kind] = PixelDecoder(model.pixel_decoder, vision.image_mean, vision.image_std, size)
        else:
            modules[kind] = VisionModel(model.vision)
        part = precomputed_part(kind)
        weights = {name.removeprefix(part.weight("")): stored.read(name) for name in part.own(stored.names())}
        modules[kind].load_state_dict(weights)
        modules[kind].to(platform.device())
        sources[kind] = part_source(kind, part_fingerprint(checkpoint, part), model, preprocessing, dtype)
    return PictureParts(preprocessing, modules, sources)


@dataclass
class Precomputed:
    """The outcome on this rank: pictures computed now, shards, complete shards found, (key, reason) of bad samples."""

    pictures: int = 0
    shards: int = 0
    kept: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class _Sample:
    """A sample as stored in its shard, and its pixels [n, 3, H, W]; or a problem."""

    number: int
    key: str
    text: bytes = b""
    pictures: list[bytes] = field(default_factory=list)
    pixels: Tensor = field(default_factory=lambda: torch.zeros(0))
    problem: str | None = None


@dataclass(frozen=True)
class Precomputation:
    """Writes the shards of `reader` with the parts of their pictures into `out`, and their index.

    A sample with a picture that cannot be decoded is left out and listed in quarantine.jsonl. `drop_images` leaves out
    the pictures. `batch_size` pictures are computed at once, `num_workers` threads decode.
    """

    reader: ShardReader
    out: Path
    parts: PictureParts
    drop_images: bool = False
    batch_size: int = 16
    num_workers: int = 4

    def run(
        self, rank: int = 0, world_size: int = 1, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Precomputed:
        """Makes this rank's share of the missing shards. `progress` gets the numbers of its finished and all pictures.

        Collective. Raises ShardError or OSError on every rank when any fails.
        """
        done = Precomputed()
        all_or_none(lambda: self._begin() if rank == 0 else None)
        all_or_none(lambda: self._make_shards(range(rank, self.num_shards, world_size), done, progress))
        all_or_none(lambda: self._finish() if rank == 0 else None)
        return done

    @property
    def num_shards(self) -> int:
        return len(self.reader.index["shards"])

    def _begin(self) -> None:
        """Makes `out`, or checks that it was begun with the same settings."""
        Account.of(self.reader)  # a damaged one is refused now rather than at the end
        settings = {
            "data": self.reader.fingerprint,
            "shards": [shard["name"] for shard in self.reader.index["shards"]],
            "sources": {kind: asdict(source) for kind, source in self.parts.sources.items()},
            "drop_images": self.drop_images,
        }
        text, out = json.dumps(settings, indent=1), self.out
        if checked.real_path(out) == checked.real_path(self.reader.folder):
            raise ShardError(f"--out {out} is the folder of --data-path: the new shards need one of their own")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            try:
                begun = checked.read_text(out / SETTINGS, most_bytes=checked.MOST_FILE_BYTES)
            except (FileNotFoundError, ValueError):
                begun = None
            if begun is None:
                raise ShardError(f"{out} is not empty and holds no {SETTINGS}; choose another folder")
            if begun != text:
                raise ShardError(
                    f"{out} was begun with other settings, shards or weights (see {out / SETTINGS}); remove it or "
                    "choose another folder"
                )
        make_folder(out / PARTS)
        with replacing(out / SETTINGS) as stream:
            stream.write(text.encode())

    def _make_shards(self, shards: range, done: Precomputed, progress: Callable[[int, int], None]) -> None:
        pictures = self.reader.samples["num_images"]
        total = sum(int(pictures[self._samples_of(shard)].sum()) for shard in shards)
        passed = 0

        def advance(before: int, more: int) -> None:
            progress(before + more, total)

        with ThreadPoolExecutor(self.num_workers) as pool:
            for shard in shards:
                rows = self._samples_of(shard)
                if self._finished_bytes(shard) is not None:
                    done.kept += 1
                else:
                    self._make_shard(shard, rows, pool, done, partial(advance, passed))
                done.shards += 1
                passed += int(pictures[rows].sum())
                progress(passed, total)

    def _make_shard(
        self, shard: int, rows: slice, pool: ThreadPoolExecutor, done: Precomputed, progress: Callable[[int], None]
    ) -> None:
        from webdataset import TarWriter  # seconds to import

        facts: list[dict[str, int]] = []
        digests: list[bytes] = []
        bad: list[tuple[str | None, str]] = []
        passed = 0
        with replacing(self._tar(shard)) as stream:
            tar = TarWriter(stream, encoder=False, mtime=0)
            for group in self._groups(rows):
                read = [self._read(number) for number in group]  # in this thread: a reader is not thread-safe
                found = list(pool.map(self._decode, read))
                bad += [(reportable(sample.key), sample.problem) for sample in found if sample.problem is not None]
                samples = [sample for sample in found if sample.problem is None]
                made = self._compute([sample.pixels for sample in samples])
                for sample, its_parts in zip(samples, made, strict=True):
                    sizes = [len(data) for data in sample.pictures]
                    tar.write(self._members(sample, its_parts, sizes))
                    row = self.reader.samples[sample.number]
                    facts.append({name: int(row[name]) for name in COLUMNS})
                    digests.append(content_digest(sample.key, sample.text, sizes))
                    passed += len(sizes)
                progress(passed)
            tar.close()
            stream.flush()
            sources = {kind: [asdict(source)] for kind, source in self.parts.sources.items() if passed}
            index = ShardIndex.of(read_samples(stream.fileno()), facts, digests, bad, part_sources=sources)
            total_bytes = os.fstat(stream.fileno()).st_size
        index.save(self._index(shard), {"bytes": total_bytes})
        done.pictures += passed
        done.bad += [(str(key), reason) for key, reason in bad]

    def _groups(self, rows: slice) -> Iterator[list[int]]:
        """Groups of consecutive samples with a batch of pictures, or 1024 samples."""
        group: list[int] = []
        pictures = 0
        for number in range(rows.start, rows.stop):
            group.append(number)
            pictures += int(self.reader.samples[number]["num_images"])
            if pictures >= self.batch_size or len(group) >= 1024:
                yield group
                group, pictures = [], 0
        if group:
            yield group

    def _read(self, number: int) -> _Sample:
        """A sample that is not decoded."""
        sample = _Sample(number, self.reader.keys([number])[0])
        try:
            sample.text = self.reader.text_bytes(number)
            count = int(self.reader.samples[number]["num_images"])
            sample.pictures = [self.reader.image_bytes(number, place) for place in range(count)]
        except ShardError as error:
            sample.problem = str(error)
        return sample

    def _decode(self, sample: _Sample) -> _Sample:
        size = self.parts.preprocessing.image_size
        try:
            pixels = [
                self.parts.preprocessing(decode_image(data, self.reader.truncated_images).picture)
                for data in sample.pictures
            ]
            sample.pixels = torch.from_numpy(np.stack(pixels)) if pixels else torch.zeros(0, 3, size, size)
        except ImageError as error:
            sample.problem = sample.problem or f"a picture is {error}"
        return sample

    def _compute(self, pixels: list[Tensor]) -> list[dict[str, Tensor]]:
        """The parts of every sample's pictures, computed in batches across samples."""
        joined = torch.cat(pixels) if pixels else torch.zeros(0)
        if not len(joined):
            return [{} for _ in pixels]
        batches = [self.parts(batch) for batch in torch.split(joined, self.batch_size)]
        counts = [len(sample) for sample in pixels]
        made = {kind: torch.split(torch.cat([b[kind] for b in batches]), counts) for kind in self.parts.sources}
        return [{kind: tensors[place] for kind, tensors in made.items()} for place in range(len(pixels))]

    def _members(self, sample: _Sample, its_parts: dict[str, Tensor], sizes: list[int]) -> dict[str, Any]:
        """A sample of the new shard, for `webdataset`."""
        is_caption = self.reader.samples[sample.number]["kind"] == CAPTION
        members: dict[str, Any] = {"__key__": sample.key, "txt" if is_caption else "json": sample.text}
        if not self.drop_images:
            members |= picture_members([(_suffix(data), data) for data in sample.pictures])
        for kind, tensors in its_parts.items() if sizes else ():
            member = pack_part(kind, tensors, self.parts.sources[kind], sizes)
            if len(member) > MAX_PART_BYTES:
                raise ShardError(f"sample {sample.key}: {kind} of {len(sizes)} pictures take {len(member)} bytes")
            members[f"{kind}.safetensors"] = member
        return members

    def _samples_of(self, shard: int) -> slice:
        return slice(*np.searchsorted(self.reader.samples["shard"], [shard, shard + 1]).tolist())

    def _tar(self, shard: int) -> Path:
        return self.out / f"shard-{shard:05d}.tar"

    def _index(self, shard: int) -> Path:
        return self.out / PARTS / f"shard-{shard:05d}.npz"

    def _finished_bytes(self, shard: int) -> int | None:
        """The size of a complete shard that has its part of the index, else None."""
        facts, tar = part_facts(self._index(shard)), self._tar(shard)
        size = tar.stat().st_size if tar.is_file() else None
        return size if facts is not None and facts["about"] == {"bytes": size} else None

    def _finish(self) -> None:
        with replacing(self.out / BLANK) as stream:
            stream.write(pack_blank(self.parts.blank()))
        shards = []
        for shard in range(self.num_shards):
            size = self._finished_bytes(shard)
            if size is None:
                raise ShardError(f"{self._tar(shard)} was not finished; run the same command again")
            shards.append(IndexedShard(self._tar(shard).name, size, partial(ShardIndex.load, self._index(shard))))
        is_whole = not any(shard.part().quarantine for shard in shards)
        account = Account.of(self.reader) if is_whole else None  # why others have no labels is not known here
        write_index(self.out, shards, self.reader.length_source, account, self.reader.truncated_images)


def _suffix(data: bytes) -> str:
    """The member suffix of an encoded picture."""
    return "png" if data.startswith(b"\x89PNG") else "webp" if data.startswith(b"RIFF") else "jpg"
