"""What a checkpoint holds, read from its small files alone."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import Metadata, TensorStorageMetadata

from ross_mcore import checked
from ross_mcore.checkpoint.fit import Inventory
from ross_mcore.checkpoint.folder import REMEDY, TRAIN_STATE, Checkpoint
from ross_mcore.checkpoint.manifest import MARKER
from ross_mcore.checkpoint.safe_load import read_metadata, tensor_shapes, tensors_of
from ross_mcore.checkpoint.torch_dist import OPTIMIZER_PREFIX
from ross_mcore.errors import CheckpointError
from ross_mcore.parts import PARTS
from ross_mcore.shapes import Shapes, differences


def describe(checkpoint: Checkpoint, inventory: Inventory) -> dict[str, Any]:
    """What is inside, as plain data. Raises CheckpointError or ArchitectureError when a small file cannot be read.

    `problems`: tensors that config.json tells of and that are not there, or the other way round. `unlisted`: files that
    the marker does not know. `optimizer` and `consumed_samples` are None in a converted model.
    """
    manifest, metadata, state = checkpoint.manifest(), read_metadata(checkpoint.path), _state(checkpoint)
    tensors = tensors_of(metadata)
    trained = {name.split("exp_avg.", 1)[1] for name in tensors if name.startswith(f"{OPTIMIZER_PREFIX}state.exp_avg.")}
    parts = {}
    for part in PARTS:
        if own := {name: tensors[name] for name in part.own(tensors)}:
            parts[part.label] = _sizes(own) | {"trained_parameters": _parameters(own.keys() & trained, tensors)}
    optimizer = {name: item for name, item in tensors.items() if name.startswith(OPTIMIZER_PREFIX)}
    return {
        "path": str(checkpoint.path),
        "iteration": checkpoint.iteration,
        "consumed_samples": state["data"]["consumed_samples"] if state else None,
        "training_stage": state.get("training_stage"),
        "saved": checkpoint.sequence,
        "format_version": manifest.version,
        "has_checksums": manifest.has_checksums,
        "layout": dict(manifest.layout),
        "files": len(manifest.files),
        "bytes": manifest.bytes,
        "parts": parts,
        "optimizer": _optimizer(optimizer) if optimizer else None,
        "problems": _disagreements(inventory(checkpoint.model_config()), metadata),
        "unlisted": _unlisted(checkpoint.path, set(manifest.files)),
    }


def _state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The loop's own state, of whose values those that are told are checked. Raises CheckpointError."""
    state = checkpoint.train_state()
    try:
        if state:
            checked.count(checked.mapping(state.get("data"), "data"), "consumed_samples", least=0, most=2**53)
            checked.text(state, "training_stage")
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path / TRAIN_STATE} is malformed: {error}; {REMEDY}") from None
    return state


def _sizes(tensors: dict[str, TensorStorageMetadata]) -> dict[str, Any]:
    types: Counter[str] = Counter()
    for item in tensors.values():
        types[str(item.properties.dtype).removeprefix("torch.")] += math.prod(item.size)
    return {
        "parameters": sum(types.values()),
        "bytes": sum(math.prod(item.size) * item.properties.dtype.itemsize for item in tensors.values()),
        "dtypes": dict(types),
    }


def _parameters(names: set[str], tensors: dict[str, TensorStorageMetadata]) -> int:
    return sum(math.prod(tensors[name].size) for name in names)


def _optimizer(tensors: dict[str, TensorStorageMetadata]) -> dict[str, Any]:
    kinds = sorted({name.removeprefix(f"{OPTIMIZER_PREFIX}state.").split(".")[0] for name in tensors})
    sizes = _sizes(tensors)
    return {"state": kinds, "bytes": sizes["bytes"], "dtypes": sorted(sizes["dtypes"])}


def _disagreements(expected: Shapes, metadata: Metadata) -> list[str]:
    """One line for every tensor that config.json and the index do not agree on."""
    stored = {n: s for n, s in tensor_shapes(metadata).items() if not n.startswith(OPTIMIZER_PREFIX)}
    return [difference.in_words("config.json") for difference in differences(expected, stored)]


def _unlisted(folder: Path, listed: set[str]) -> list[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return sorted(found - listed - {MARKER})
