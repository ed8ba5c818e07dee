"""Recorded values of the reference implementation, and how closely this one must follow them."""

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
    """recorded("name.safetensors") -> (tensors, metadata); tensors stored in float16 without loss come as float32."""

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


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """assert_close(name, actual, expected, tolerance): the largest difference over the largest recorded magnitude.

    1e-5 is what reordered float32 sums leave: eps is 1.2e-7, a network a few layers deep adds up some tens of terms of
    it. A wrong constant, order or layout is off by 1e-3 at the least. Errors are printed with `pytest -s`.
    """

    def compare(name: str, actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
        if actual.shape != expected.shape:
            raise AssertionError(f"{name}: shape {list(actual.shape)}, recorded {list(expected.shape)}")
        scale = expected.abs().max().item()
        error = (actual.detach().double() - expected.double()).abs().max().item() / (scale or 1.0)
        print(f"{name}: {error:.1e}")
        if not error <= tolerance:
            raise AssertionError(f"{name}: relative error {error:.2e} exceeds {tolerance:.0e}")

    return compare
