"""The functions that shapes.yaml names: a question's picture, and whether an answer is right."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image


def pictures(question: dict[str, Any]) -> list[Image.Image]:
    """The picture of a question, which is a data URL."""
    data = base64.b64decode(question["image"].partition(",")[2])
    return [Image.open(io.BytesIO(data)).convert("RGB")]


def score(question: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """1 for an answer that is equal but for case and a final full stop, as `ross eval --benchmark short-answer`."""
    return {"accuracy": float(answers[0].strip().lower().removesuffix(".") == question["answer"])}
