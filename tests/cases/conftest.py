"""The place of a case."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cases.case import Place
from tests.recorded import recorded_checkpoint


@pytest.fixture(scope="session")
def converted_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cases") / "base"
    recorded_checkpoint("qwen2_siglip", root)
    return root


@pytest.fixture
def place(tmp_path: Path, converted_base: Path) -> Place:
    return Place(tmp_path, converted_base)
