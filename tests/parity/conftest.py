"""Recorded values of the reference implementation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of recorded values."""
    return GOLDEN


@pytest.fixture(scope="session")
def recorded() -> Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]:
    """recorded("name.safetensors") -> (tensors, metadata); tensors stored in float16 come as float32."""

    def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        with safe_open(GOLDEN / name, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        return {k: v.float() if v.dtype == torch.float16 else v for k, v in tensors.items()}, metadata

    return read


@pytest.fixture(scope="session")
def recorded_json() -> Callable[[str], dict[str, Any]]:
    """recorded_json("model_.../config.json") -> the file's contents."""
    return lambda name: json.loads((GOLDEN / name).read_text(encoding="utf-8"))
