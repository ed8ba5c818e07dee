"""Checkpoints that several test modules read and none changes; files without fsync."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.conversion.assembly import import_ross
from tests.recorded import recorded_checkpoint
from tests.sources import SOURCES, write_source


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """Files of these tests need not survive a power failure, and syncing thousands of them takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def recorded_qwen(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The recorded Qwen2 model with a SigLIP tower, converted."""
    return recorded_checkpoint("qwen2_siglip", tmp_path_factory.mktemp("recorded_qwen"))


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a checkpoint converted from SOURCES[0], which lies beside it in `source`."""
    path = tmp_path_factory.mktemp("converted")
    import_ross(path / "base", write_source(path / "source", SOURCES[0]), SOURCES[0].tokenizer)
    return path / "base"
