"""Whether a checkpoint's config.json is that of its tensors: known before anything of the sizes it says is built."""

from __future__ import annotations

from ross_mcore.architecture import ModelConfig
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.checkpoint.inventory import inventory
from ross_mcore.checkpoint.safe_load import StoredTensors
from ross_mcore.errors import CheckpointError


def architecture_of(checkpoint: Checkpoint) -> ModelConfig:
    """The architecture of a checkpoint. Raises ArchitectureError, or CheckpointError when its tensors are others'."""
    model = checkpoint.model_config()
    require_fit(checkpoint, model, StoredTensors(checkpoint.path))
    return model


def require_fit(checkpoint: Checkpoint, model: ModelConfig, stored: StoredTensors) -> None:
    """Raises CheckpointError naming the first tensor that one side lacks, or both shapes where they differ."""
    try:
        shapes, held = inventory(model), stored.shapes
    except KeyError as missing:  # of a library's configuration, which is kept word for word
        raise CheckpointError(f"{checkpoint.path / 'config.json'} has no key {missing}; copy the file again") from None
    for name in sorted(shapes.keys() | held.keys()):
        if shapes.get(name) == held.get(name):
            continue
        if name not in held:
            problem = f"asks for tensor {name}, shape {list(shapes[name])}, which the checkpoint lacks"
        elif name not in shapes:
            problem = f"has no place for tensor {name}, which the checkpoint has"
        else:
            problem = f"says {name} has shape {list(shapes[name])}; in the checkpoint it has {list(held[name])}"
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'} {problem}: the file is not this checkpoint's, copy it again"
        )
