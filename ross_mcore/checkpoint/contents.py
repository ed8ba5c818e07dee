"""Describes a checkpoint from its small files, without reading tensors."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from torch.distributed.checkpoint import TensorStorageMetadata

from ross_mcore import checked
from ross_mcore.checkpoint.fit import Inventory
from ross_mcore.checkpoint.folder import REMEDY, TRAIN_STATE, Checkpoint
from ross_mcore.checkpoint.manifest import MARKER
from ross_mcore.checkpoint.safe_load import StoredTensors
from ross_mcore.checkpoint.torch_dist import OPTIMIZER_PREFIX
from ross_mcore.errors import CheckpointError
from ross_mcore.parts import PARTS
from ross_mcore.shapes import differences


def describe(checkpoint: Checkpoint, inventory: Inventory) -> dict[str, Any]:
    """The contents as plain data. Raises CheckpointError or ArchitectureError when a small file cannot be read.

    `problems`: tensors that config.json and the index disagree on. `unlisted`: files that the marker does not list.
    `optimizer` and `consumed_samples` are None in a converted model.
    """
    manifest, stored, state = checkpoint.manifest(), StoredTensors(checkpoint.path), _state(checkpoint)
    expected = inventory(checkpoint.model_config())
    parts = {}
    for part in PARTS:
        if own := {name: stored.described[name] for name in part.own(stored.shapes)}:
            trained = sum(math.prod(stored.shapes[name]) for name in own.keys() & stored.trained)
            parts[part.label] = _sizes(own) | {"trained_parameters": trained}
    optimizer = {name: item for name, item in stored.described.items() if name.startswith(OPTIMIZER_PREFIX)}
    found = {path.relative_to(checkpoint.path).as_posix() for path in checkpoint.path.rglob("*") if path.is_file()}
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
        "problems": [one.in_words("config.json") for one in differences(expected, stored.shapes)],
        "unlisted": sorted(found - set(manifest.files) - {MARKER}),
    }


def _state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The training loop's state; the values that `describe` returns are checked. Raises CheckpointError."""
    state = checkpoint.train_state() if checkpoint.is_trained else {}
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


def _optimizer(tensors: dict[str, TensorStorageMetadata]) -> dict[str, Any]:
    kinds = sorted({name.removeprefix(f"{OPTIMIZER_PREFIX}state.").split(".")[0] for name in tensors})
    sizes = _sizes(tensors)
    return {"state": kinds, "bytes": sizes["bytes"], "dtypes": sorted(sizes["dtypes"])}
