"""The data sets of a run: one folder of shards, or a YAML file that lists several of them and their shares.

    datasets:                       # or the list alone
      - path: shards/captions       # relative to the folder of this file
        weight: 1                   # a share of the samples; or epochs: passes over it in an epoch of the mixture
        template: plain             # as for --template, which is the default; a YAML counts from this file's folder
      - path: shards/instructions
        weight: 3
        image_aspect_ratio: pad     # default: --image-aspect-ratio
        name: llava                 # in logs and metrics; default: the folder's name

Legend: P requested samples, D data sets.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ross_mcore import checked
from ross_mcore.batch import Sample
from ross_mcore.data.chat_templates import SUFFIXES as TEMPLATE_SUFFIXES
from ross_mcore.data.image import ImageAspectRatio
from ross_mcore.data.mixture import counts_by_epochs, counts_by_weight
from ross_mcore.data.replacement import Bad
from ross_mcore.data.sample import ShardDataset
from ross_mcore.data.spec import SampleSpec, merged
from ross_mcore.data.templates import OF_TOKENIZER, TRAINING_TEMPLATES
from ross_mcore.errors import ShardError

SUFFIXES = (".yaml", ".yml")
MAX_OPEN_SHARDS = 384
"""Of all data sets together, so that training and validation stay under the usual limit of 1024 descriptors."""


@dataclass(frozen=True)
class Source:
    """One data set of a run. `weight` and `epochs` exclude each other; a None is given by the run's options."""

    path: Path
    name: str
    weight: float | None = None
    epochs: float | None = None
    template: str | None = None
    image_aspect_ratio: ImageAspectRatio | None = None


def read_sources(path: Path) -> list[Source]:
    """The data sets of `path`: the folder itself, or those of a YAML file.

    Raises ShardError, with the file, the data set and the key, for a malformed file.
    """
    if path.suffix not in SUFFIXES or path.is_dir():
        return [Source(path, path.name)]
    entries = _entries(path)
    sources = [_source(path, number, entry) for number, entry in enumerate(entries)]
    names = [source.name for source in sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ShardError(f"{path}: {names.count(twice)} data sets are named {twice!r}; give each a `name` of its own")
    for key, other in (("weight", "epochs"), ("epochs", "weight")):
        given = [source for source in sources if getattr(source, key) is not None]
        if given and len(given) < len(sources):
            without = next(source for source in sources if getattr(source, key) is None)
            has = f"has {other} instead" if getattr(without, other) is not None else "has none"
            raise ShardError(
                f"{path}: data set {given[0].name!r} has {key} and {without.name!r} {has}; give every data set "
                f"{key}, or every one {other}"
            )
    return sources


def epoch_counts(sources: Sequence[Source], sizes: Sequence[int]) -> tuple[int, ...]:
    """Samples [D] in an epoch of data sets of `sizes` [D]; one pass over each by default.

    Raises ValueError if a data set has no samples in it.
    """
    names = [f"{source.name!r} ({source.path})" for source in sources]
    if sources[0].weight is not None:
        return counts_by_weight(sizes, [source.weight or 0 for source in sources], names)
    return counts_by_epochs(sizes, [1 if source.epochs is None else source.epochs for source in sources], names)


def _entries(path: Path) -> list[Any]:
    """The list of data sets in a YAML file."""
    try:
        content = checked.read_yaml(path)
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file; give a folder of shards, or a YAML file that lists some") from None
    except ValueError as error:
        raise ShardError(f"{path} cannot be read: {error}") from None
    if isinstance(content, dict):
        for key in content:
            if key != "datasets":
                raise ShardError(
                    f"{path}: unknown key {checked.shown(key)}, only `datasets` is read{_hint(key, ['datasets'])}"
                )
        content = content.get("datasets")
    if not isinstance(content, list) or not content:
        raise ShardError(f"{path}: expected a list of data sets, each with a `path`, alone or under `datasets:`")
    return content


def _source(file: Path, number: int, entry: Any) -> Source:
    where = f"{file}: data set {number + 1}"
    known = [field.name for field in fields(Source)]
    if not isinstance(entry, dict):
        raise ShardError(f"{where}: expected keys and values ({', '.join(known)}), got {checked.shown(entry)}")
    for key in entry:
        if key not in known:
            raise ShardError(
                f"{where}: unknown key {checked.shown(key)}, only {', '.join(known)} are read{_hint(key, known)}"
            )
    for key in ("path", "name"):
        value = entry.get(key)
        if (value is not None or key == "path") and (not isinstance(value, str) or not value.strip()):
            raise ShardError(f"{where}: {key} must be text, got {checked.shown(value)}")
    path = file.parent / entry["path"]
    name = entry.get("name") or path.name
    where = f"{file}: data set {checked.shown(name)}"
    if not path.is_dir():
        raise ShardError(
            f"{where}: path {checked.shown(entry['path'])} is no folder ({checked.shown(str(path))}); "
            "paths count from the YAML's folder"
        )
    for key in ("weight", "epochs"):
        value = entry.get(key)
        number_given = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number_given and value > 0 and math.isfinite(value)):
            raise ShardError(f"{where}: {key} must be a number above zero, got {checked.shown(value)}")
    if entry.get("weight") is not None and entry.get("epochs") is not None:
        raise ShardError(f"{where}: weight and epochs exclude each other; give one of them to every data set")
    template = entry.get("template")
    if isinstance(template, str) and template.endswith(TEMPLATE_SUFFIXES):
        template = str(file.parent / template)
        entry = {**entry, "template": template}
    elif template is not None and template not in (names := (*TRAINING_TEMPLATES, OF_TOKENIZER)):
        raise ShardError(
            f"{where}: template {checked.shown(template)} is not one of {', '.join(names)}, nor a YAML file"
            f"{_hint(template, names)}"
        )
    ratio, ratios = entry.get("image_aspect_ratio"), get_args(ImageAspectRatio)
    if ratio is not None and ratio not in ratios:
        raise ShardError(
            f"{where}: image_aspect_ratio {checked.shown(ratio)} is not one of {', '.join(ratios)}"
            f"{_hint(ratio, ratios)}"
        )
    return Source(**{**entry, "path": path, "name": name})


def _hint(value: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(value), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


class MixtureDataset:
    """A SampleDataset: one or more data sets as one. Sample n of data set d is number `offsets[d]` + n.

    `counts` [D] are the samples of each in an epoch. `Sample.source` is the number of a sample's data set.
    """

    def __init__(self, names: Sequence[str], parts: Sequence[ShardDataset], counts: Sequence[int]) -> None:
        self.names, self.parts, self.counts = list(names), list(parts), tuple(counts)
        self.sizes = [len(part) for part in parts]
        self.offsets = np.cumsum([0, *self.sizes])
        for part in self.parts:
            part.reader.max_open_shards = max(1, min(part.reader.max_open_shards, MAX_OPEN_SHARDS // len(self.parts)))

    @property
    def shares(self) -> list[tuple[str, int, int]]:
        """(name, samples of an epoch, samples) of every data set."""
        return list(zip(self.names, self.counts, self.sizes))

    @classmethod
    def open(cls, path: Path, open_part: Callable[[Source], ShardDataset]) -> MixtureDataset:
        """The data sets of `path` (read_sources), each opened by `open_part`.

        Raises ShardError for a malformed list, and the errors of `open_part`.
        """
        sources = read_sources(path)
        parts = []
        for source in sources:
            try:
                parts.append(open_part(source))
            except ShardError as error:
                raise (error if source.path == path else ShardError(f"{path}: {error}")) from None
        try:
            counts = epoch_counts(sources, [len(part) for part in parts])
        except ValueError as error:
            raise ShardError(f"{path}: {error}") from None
        return cls([source.name for source in sources], parts, counts)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def seq_length(self) -> int:
        return self.parts[0].seq_length

    @property
    def passes_once(self) -> bool:
        """Whether an epoch has every sample exactly once."""
        return list(self.counts) == self.sizes

    @property
    def fingerprint(self) -> str:
        """Identifies the content: data sets and shares. A single data set passed once has its own fingerprint."""
        content = [(part.reader.fingerprint, count) for part, count in zip(self.parts, self.counts)]
        if len(content) == 1 and self.passes_once:
            return content[0][0]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    @property
    def spec(self) -> SampleSpec:
        """How samples are read, in all data sets."""
        return merged([part.spec for part in self.parts])

    def keys(self, sample_numbers: Sequence[int] | NDArray[np.int64]) -> list[str]:
        return [self.parts[which].keys([local])[0] for which, local in map(self.place, sample_numbers)]

    def find(self, keys: Sequence[str]) -> dict[str, list[int]]:
        """The numbers of the samples with each of these keys, in all data sets."""
        found: dict[str, list[int]] = {key: [] for key in keys}
        for offset, part in zip(self.offsets.tolist(), self.parts):
            for key, numbers in part.reader.find(found).items():
                found[key] += [offset + number for number in numbers]
        return found

    def get(self, sample_number: int, position: int) -> Sample:
        which, local = self.place(sample_number)
        sample = self.parts[which].get(local, position)
        sample.source = which
        return sample

    def shard(self, sample_number: int) -> str:
        """The name of a sample's shard, with the data set's name if there are several."""
        which, local = self.place(sample_number)
        shard = self.parts[which].shard(local)
        return shard if len(self.parts) == 1 else f"{self.names[which]}/{shard}"

    def peers(self, sample_number: int) -> range:
        """The samples of the same data set."""
        which, _ = self.place(sample_number)
        return range(int(self.offsets[which]), int(self.offsets[which + 1]))

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        return self.parts[0].pixel_shape

    def decode(self, sample: Sample, sample_number: int, ordinals: Iterable[int]) -> list[Bad]:
        which, local = self.place(sample_number)
        return self.parts[which].decode(sample, local, ordinals)

    def row_lengths(self, sample_numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        lengths = np.empty(len(sample_numbers), np.int64)
        owners = np.searchsorted(self.offsets, sample_numbers, side="right") - 1
        for which, part in enumerate(self.parts):
            here = owners == which
            lengths[here] = part.row_lengths(sample_numbers[here] - self.offsets[which])
        return lengths

    def first_picture(self, searched: int) -> int | None:
        """The first sample with a picture among the first `searched` of each data set, from the indexes."""
        for offset, part in zip(self.offsets, self.parts):
            has_picture = part.reader.samples["num_images"][:searched] > 0
            if has_picture.any():
                return int(offset + has_picture.argmax())
        return None

    def modality_lengths(self) -> NDArray[np.int64]:
        """ShardDataset.modality_lengths of all data sets, one after the other."""
        return np.concatenate([part.modality_lengths() for part in self.parts])

    def require_lengths(self) -> None:
        """Raises ShardError unless every index has the samples' lengths under this run's tokenizer and template."""
        for part in self.parts:
            part.require_lengths()

    def place(self, sample_number: int) -> tuple[int, int]:
        """The data set of a sample, and its number in it."""
        which = int(np.searchsorted(self.offsets, sample_number, side="right")) - 1
        return which, int(sample_number - self.offsets[which])
