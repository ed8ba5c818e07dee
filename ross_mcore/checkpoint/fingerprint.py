"""What tells one frozen part of a model from another: a fingerprint of its weights and its configuration."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.checkpoint.safe_load import StoredTensors
from ross_mcore.errors import CheckpointError


def part_fingerprint(checkpoint: Checkpoint, part: str, config: dict[str, Any]) -> str:
    """16 hex digits for the weights of `part` (`vision_model`, `pixel_decoder`) and its library's configuration.

    Of the weights rounded to bfloat16, so that a checkpoint that a run in bfloat16 saved counts as the one it came
    from. Reads one tensor at a time. Raises CheckpointError when the checkpoint has no such part.
    """
    stored = StoredTensors(checkpoint.path)
    names = sorted(name for name in stored.names() if name.startswith(f"{part}."))
    if not names:
        raise CheckpointError(f"{checkpoint.path} has no {part}")
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in names:
        tensor = stored.read(name)
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().data)
    return digest.hexdigest()[:16]
