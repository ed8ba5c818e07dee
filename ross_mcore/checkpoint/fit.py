"""Compares a checkpoint's config.json with its tensors, before a model of the sizes in it is built."""

from __future__ import annotations

from collections.abc import Callable

from ross_mcore.architecture import ModelConfig
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.checkpoint.safe_load import StoredTensors
from ross_mcore.errors import CheckpointError
from ross_mcore.shapes import Shapes, differences

Inventory = Callable[[ModelConfig], Shapes]
"""models/inventory.py: every tensor of a model. An argument here, because this room imports no models."""


def architecture_of(checkpoint: Checkpoint, inventory: Inventory) -> ModelConfig:
    """The architecture of a checkpoint. Raises ArchitectureError, or CheckpointError when its tensors differ."""
    model = checkpoint.model_config()
    require_fit(checkpoint, model, StoredTensors(checkpoint.path), inventory)
    return model


def require_fit(checkpoint: Checkpoint, model: ModelConfig, stored: StoredTensors, inventory: Inventory) -> None:
    """Raises CheckpointError naming the first tensor that one side lacks, or both shapes where they differ."""
    config = checkpoint.path / "config.json"
    try:
        found = differences(inventory(model), stored.shapes)
    except KeyError as missing:  # in a library's configuration, which is stored unchanged
        raise CheckpointError(f"{config} has no key {missing}; copy the file again") from None
    if not found:
        return
    first = found[0]
    if first.expected is None:
        problem = f"has no place for tensor {first.name}, which the checkpoint has"
    elif first.found is None:
        problem = f"asks for tensor {first.name}, shape {list(first.expected)}, which the checkpoint lacks"
    else:
        problem = f"gives {first.name} shape {list(first.expected)}; in the checkpoint it has {list(first.found)}"
    raise CheckpointError(f"{config} {problem}: the file belongs to another checkpoint, copy it again")
