"""Checkpoints that hold something else than was saved, and whose marker fits it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from ross_mcore.checkpoint.folder import TRAIN_STATE, Checkpoint
from ross_mcore.checkpoint.manifest import MARKER, record_of


def change_state(checkpoint: Checkpoint, **changes: Any) -> None:
    """Puts other values into train_state.json."""
    (checkpoint.path / TRAIN_STATE).write_text(json.dumps({**checkpoint.train_state(), **changes}))
    reseal(checkpoint)


def reseal(checkpoint: Checkpoint, **changes: Any) -> None:
    """Writes the marker anew, with other values of its own."""
    manifest = checkpoint.manifest()
    files = {name: record_of(checkpoint.path / name) for name in manifest.files}
    (checkpoint.path / MARKER).write_text(replace(manifest, files=files, **changes).text())
