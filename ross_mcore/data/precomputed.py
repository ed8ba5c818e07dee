"""Precomputed parts of pictures: members of a tar beside the pictures, and the source that made them.

    KEY.latents.safetensors     mean and logvar [n, C, h, w]: the VAE's posterior of the sample's n pictures
    KEY.features.safetensors    features [n, N, D]: of the frozen vision tower

The safetensors header of both has a `PartSource`, because another VAE, tower or preprocessing gives other numbers.
`tools/precompute_latents.py` writes them. `blank.safetensors` beside the index has the same parts of a picture of the
mean colour.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

from ross_mcore import checked
from ross_mcore.architecture import ModelConfig
from ross_mcore.data.image import ImagePreprocessing
from ross_mcore.data.shard_reader import ShardReader
from ross_mcore.errors import ShardError

TOOL = "python tools/precompute_latents.py"
BLANK = "blank.safetensors"
MEMBERS = {"latents": ("mean", "logvar"), "features": ("features",)}
"""Kind of part -> the tensors in its member."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PartSource:
    """The model and settings that made parts of one kind.

    weights: fingerprint of the VAE or the tower, its configuration included; reads: the output taken from it;
    preprocessing: of the pictures; shape: of one picture's tensor; dtype: as stored.
    """

    weights: str
    reads: str
    preprocessing: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))

    def difference(self, other: PartSource) -> str | None:
        """The first field that differs, with both values; the stored dtype may differ."""
        for name in (field.name for field in fields(self) if field.name != "dtype"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {mine!r} against {theirs!r}"
        return None


def part_source(
    kind: str, weights: str, model: ModelConfig, preprocessing: ImagePreprocessing, dtype: str
) -> PartSource:
    """The source of parts made by `model`, whose VAE or tower has the fingerprint `weights`."""
    if kind == "latents":
        size = model.decode_image_size
        return PartSource(weights, f"posterior at {size}x{size}", str(preprocessing), model.latent_shape, dtype)
    layer = f"hidden_states[{model.vision.select_layer}]"
    return PartSource(weights, layer, str(preprocessing), model.feature_shape, dtype)


def pack_part(kind: str, tensors: Tensor, source: PartSource, picture_bytes: Sequence[int]) -> bytes:
    """The member of a sample: posteriors [n, 2, C, h, w] or features [n, N, D], as `source.dtype`.

    picture_bytes [n] are the sizes of the encoded pictures, which identify the sample if they are left out.
    Raises ShardError for values that are not finite in `source.dtype`.
    """
    tensors = tensors.to(DTYPES[source.dtype])
    if not tensors.isfinite().all():
        raise ShardError(f"{kind} that are not finite as {source.dtype}; give another --dtype")
    split = (tensors[:, place] for place in range(2)) if kind == "latents" else (tensors,)
    named = {name: tensor.contiguous() for name, tensor in zip(MEMBERS[kind], split, strict=True)}
    # one entry, because safetensors writes several in no fixed order, and equal shards should have equal bytes
    return save(named, {"precomputed": json.dumps({"source": asdict(source), "picture_bytes": list(picture_bytes)})})


def unpack_part(kind: str, data: bytes, source: PartSource, num_pictures: int) -> Tensor:
    """The inverse of `pack_part`. Raises ShardError for tensors that do not fit `source` and the number of pictures."""
    try:
        named = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ShardError(f"its {kind} are no safetensors: {error}") from None
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in named.items()}
    wanted = (num_pictures, *source.shape), DTYPES[source.dtype]
    if shapes != dict.fromkeys(MEMBERS[kind], wanted):
        raise ShardError(f"its {kind} are {shapes}, not {', '.join(MEMBERS[kind])} of {wanted}")
    return torch.stack([named["mean"], named["logvar"]], dim=1) if kind == "latents" else named["features"]


def pack_blank(parts: dict[str, Tensor]) -> bytes:
    """The bytes of BLANK: the blank picture's posterior [2, C, h, w], features [N, D], or both."""
    return save({kind: tensor.float().contiguous() for kind, tensor in parts.items()})


class PrecomputedParts:
    """Reads the parts of a data set's pictures; keeps the last member, for samples of several pictures."""

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader
        self.sources = {kind: _source(reader, kind, about) for kind, about in reader.precomputed.items()}
        self._latest: tuple[tuple[int, str], Tensor] | None = None

    def read(self, kind: str, number: int, ordinal: int) -> Tensor:
        """The posterior [2, C, h, w] or features [N, D] of a picture of a sample, as stored. Raises ShardError."""
        if self._latest is None or self._latest[0] != (number, kind):
            pictures = int(self.reader.samples[number]["num_images"])
            data = self.reader.part_bytes(number, kind)
            self._latest = (number, kind), unpack_part(kind, data, self.sources[kind], pictures)
        return self._latest[1][ordinal]

    def blank(self, kind: str) -> Tensor:
        """The same parts of the picture of the mean colour. Raises ShardError."""
        if kind not in self.sources:
            raise ShardError(f"{self.reader.folder} has no {kind}")
        path = self.reader.folder / BLANK
        try:
            checked.require_regular(path)
            blank = load_file(path)[kind]
        except (OSError, ValueError, SafetensorError, KeyError) as error:
            raise ShardError(
                f"{path}: {checked.reason(error)}; it belongs to the shards: copy it from the folder that {TOOL} wrote"
            ) from None
        expected = ((2,) if kind == "latents" else ()) + self.sources[kind].shape
        if tuple(blank.shape) != expected:
            raise ShardError(f"{path}: {kind} of shape {list(blank.shape)}, expected {list(expected)}")
        return blank.to(DTYPES[self.sources[kind].dtype])


def _source(reader: ShardReader, kind: str, about: dict[str, Any]) -> PartSource:
    """The source of all parts of a kind, from the index. Raises ShardError unless all are there and have one source."""
    remedy = f"make them with {TOOL} --data-path {reader.folder}, or train with --no-precomputed"
    try:
        held, pictured = int(about["samples"]), int(about["of"])
        sources = [checked.build(PartSource, source, "its source") for source in about["sources"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{reader.folder / 'index.json'}: {kind}: {checked.reason(error)}: {remedy}") from None
    if kind not in MEMBERS or held != pictured or len(sources) != 1:
        raise ShardError(
            f"{reader.folder}: {held} of {pictured} samples with pictures have {kind}, made in {len(sources)} ways: "
            f"{remedy}"
        )
    if sources[0].dtype not in DTYPES:
        raise ShardError(f"{reader.folder}: {kind} stored as {sources[0].dtype!r}: {remedy}")
    return sources[0]
