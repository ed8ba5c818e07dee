"""Pass-through weights: frozen parts that a run does not build, saved again unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.checkpoint.safe_load import StoredTensors


class CarriedWeights:
    """Frozen parts of a checkpoint that no rank builds; one rank holds them in host memory, in their stored dtype.

    They are loaded and saved with the model under their own names, so that every checkpoint is whole and depends on no
    older one. `parts` are prefixes of weights (parts.py).
    """

    def __init__(self, checkpoint: Checkpoint | None = None, parts: Sequence[str] = (), holds: bool = False) -> None:
        """holds: whether this rank holds them. Raises CheckpointError."""
        self.tensors: dict[str, Tensor] = {}
        if checkpoint is not None and holds and parts:
            stored = StoredTensors(checkpoint.path)
            names = (name for name in stored.names() if name.startswith(tuple(f"{part}." for part in parts)))
            self.tensors = {name: torch.empty(stored.shape(name), dtype=stored.dtype(name)) for name in names}

    def pieces(self) -> dict[str, ShardedTensor]:
        """Entries to add to a model's sharded state dict before it is loaded or saved."""
        return {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in self.tensors.items()}

    def take(self, loaded: dict[str, Any]) -> None:
        """Moves these weights out of `loaded`: the model's `load_state_dict` does not know them."""
        self.tensors = {name: loaded.pop(name) for name in self.tensors}
