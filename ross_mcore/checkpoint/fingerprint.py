"""Fingerprint of a frozen part of a model: its weights and its configuration."""

from __future__ import annotations

import hashlib
import json

import torch

from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.checkpoint.safe_load import StoredTensors
from ross_mcore.errors import CheckpointError
from ross_mcore.parts import Part


def part_fingerprint(checkpoint: Checkpoint, part: Part) -> str:
    """16 hex digits for the weights of `part` (vision tower or VAE) and its library's configuration.

    Weights are rounded to bfloat16 first, so that the checkpoints of a bfloat16 run have the same fingerprint as the
    one it started from. Reads one tensor at a time. Raises CheckpointError when the checkpoint has no weights of this
    part, ArchitectureError when its config.json does not describe it.
    """
    assert part.library_config is not None, part.label
    config, stored = part.library_config(checkpoint.model_config()), StoredTensors(checkpoint.path)
    names = sorted(part.own(stored.names()))
    if not names:
        raise CheckpointError(f"{checkpoint.path} has no {part.label}")
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in names:
        tensor = stored.read(name)
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().data)
    return digest.hexdigest()[:16]
