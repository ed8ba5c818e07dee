"""docker/: the versions of the image, checked without building it."""

from __future__ import annotations

import re
from pathlib import Path

import check_image
import pytest

ROOT = Path(__file__).parents[2]


def test_the_image_installs_the_tested_versions() -> None:
    wanted = re.findall(r"^ +([\w-]+==[\w.]+) \\$", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    tested = (ROOT / "constraints.txt").read_text().split()
    assert len(wanted) == 7 and set(wanted) <= set(tested)


def test_wrong_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.10.0a0+b4e4ee81d3", "numpy": "1.26.4", "transformer-engine": "2.10.0+769ed778"}
    monkeypatch.setattr(check_image, "version", installed.get)
    base = ["torch==2.10.0a0+b4e4ee81d3", "numpy==1.26.4"]
    assert check_image.pins() == base
    assert check_image.problems(base) == ["flash-attn is not installed (>=2.7.3,<=2.8.3)"]
    installed |= {"flash-attn": "2.8.3"}
    assert check_image.problems(base) == []
    installed |= {"torch": "2.13.0", "transformer-engine": "2.12.0", "flash-attn": "2.7.4.post1"}
    assert check_image.problems(base) == [
        "torch==2.10.0a0+b4e4ee81d3 was replaced by 2.13.0",
        "transformer-engine 2.12.0 is not >=2.9.0a0,<2.12.0",
    ]
    installed |= {"torch": "2.10.0a0+b4e4ee81d3", "transformer-engine": "2.9.0", "flash-attn": "2.8.3"}
    assert check_image.problems(base) == [
        "flash-attn 2.8.3 is not >=2.7.3,<=2.8.1, which Transformer Engine 2.9.0 takes"
    ]
