"""The towers' inputs against those of the reference (Hugging Face's processors after its own padding)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ross_mcore.architecture import VisionConfig
from ross_mcore.data.image import ImagePreprocessing, decode_image

REAL_SIZE = {"clip": 336, "siglip": 384}


def preprocessing(kind: str, aspect_ratio: Any, processor: dict[str, Any], size: int) -> ImagePreprocessing:
    tower = {"model_type": f"{kind}_vision_model", "image_size": size, "patch_size": 14, "num_hidden_layers": 3}
    vision = VisionConfig(tower, processor["image_mean"], processor["image_std"])
    sizes = {"size": {"shortest_edge": size} if kind == "clip" else {"height": size, "width": size}}
    sizes["crop_size"] = {"height": size, "width": size}
    return ImagePreprocessing.for_tower(vision, aspect_ratio, processor | sizes)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
@pytest.mark.parametrize("name", ["img0", "img1", "img2", "img_gray"])
def test_pixels_are_the_reference_s(
    kind: str,
    aspect_ratio: Any,
    name: str,
    golden: Path,
    recorded: Callable[..., Any],
    recorded_json: Callable[..., Any],
) -> None:
    """Exactly: 8-bit bicubic resizing leaves integers, and the float32 arithmetic after it is the same."""
    processor = recorded_json(f"data/proc_{kind}/preprocessor_config.json")
    tensors, _ = recorded("data/images.safetensors")
    picture, _ = decode_image((golden / "data" / "images" / f"{name}.png").read_bytes())
    small = preprocessing(kind, aspect_ratio, processor, 42)(picture)
    if name == "img_gray":  # recorded padded only; it is square, so padding changes nothing
        wanted = {f"gray.{kind}.pad": small[:, ::3, ::3]}
    else:
        large = preprocessing(kind, aspect_ratio, processor, REAL_SIZE[kind])(picture)
        wanted = {
            f"train.{kind}.{aspect_ratio}.{name}": small,
            f"real.{kind}.{aspect_ratio}.{name}.stride24": large[:, ::24, ::24],
        }
    for key, pixels in wanted.items():
        assert np.array_equal(pixels, tensors[key].numpy()), key


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_any_size_is_treated_as_by_huggingface(kind: str, recorded_json: Callable[..., Any]) -> None:
    """Random sizes, against the library's own PIL processors: odd margins, tall and wide, smaller and larger."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    settings = recorded_json(f"data/proc_{kind}/preprocessor_config.json")
    processor = (CLIPImageProcessorPil if kind == "clip" else SiglipImageProcessorPil)(**settings)
    ours = preprocessing(kind, "square", settings, 42)
    draw = np.random.default_rng(0)
    for _ in range(40):
        height, width = draw.integers(5, 150, 2)
        picture = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        theirs = np.asarray(processor(picture, return_tensors="np")["pixel_values"][0])
        assert np.abs(ours(picture) - theirs).max() < 1e-6, (width, height)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_background_is_the_reference_s(kind: str, recorded_json: Callable[..., Any]) -> None:
    processor = recorded_json(f"data/proc_{kind}/preprocessor_config.json")
    wanted = tuple(recorded_json("data/images.json")["pad_colour"][kind])
    assert preprocessing(kind, "pad", processor, 42).background == wanted
