"""The towers' inputs against Hugging Face's processors at random sizes (recorded sizes: test_recorded.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from parity.data import preprocessing
from PIL import Image


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_any_size_is_treated_as_by_huggingface(
    kind: str, resample: Image.Resampling, recorded_json: Callable[..., Any]
) -> None:
    """Random sizes, against the library's own PIL processors: odd margins, tall and wide, smaller and larger."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    settings = recorded_json(f"data/proc_{kind}/preprocessor_config.json") | {"resample": int(resample)}
    processor = (CLIPImageProcessorPil if kind == "clip" else SiglipImageProcessorPil)(**settings)
    ours = preprocessing(settings, "square", settings["crop_size"]["height"])
    draw = np.random.default_rng(0)
    for _ in range(40):
        height, width = draw.integers(5, 150, 2)
        picture = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        theirs = np.asarray(processor(picture, return_tensors="np")["pixel_values"][0])
        assert np.abs(ours(picture) - theirs).max() < 1e-6, (width, height)
        levels = np.empty_like(theirs, np.uint8)
        ours.write_levels(picture, levels)
        mean, std = (np.array(values)[:, None, None] for values in (ours.image_mean, ours.image_std))
        assert np.array_equal(np.rint((theirs * std + mean) * 255), levels), (width, height)
