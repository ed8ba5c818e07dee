"""Picture bytes -> the vision tower's input: bounded decoding and the tower's preprocessing with PIL.

The arithmetic is that of Hugging Face's PIL image processors (8-bit bicubic resize, centre crop, rescale and normalise
in float32), which the reference calls after its own padding. Legend: H W pixels of the tower's input.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ross_mcore.architecture import VisionConfig
from ross_mcore.batch import normalised_pixels
from ross_mcore.checked import reason
from ross_mcore.errors import ArchitectureError, ImageError

ImageAspectRatio = Literal["square", "pad"]

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 << 20
MAX_SIDE = 16384
MAX_ASPECT_RATIO = 200
"""Padding makes a thin picture a square of its longer side, which costs far more than its own pixels."""


def decode_image(data: bytes, formats: Sequence[str] = FORMATS) -> tuple[Image.Image, str]:
    """Decodes a picture completely: (RGB picture, name of its format). EXIF orientation is not applied (reference).

    The size is checked in the header, before any pixel is decoded. CMYK, grey, palette and two-coloured pictures are
    converted, an alpha channel is dropped, an animation becomes its first frame. 16-bit grey keeps its upper 8 bits
    (PIL's conversion, used by the reference, clips nearly all of it to white). Raises ImageError for a picture that is
    damaged, too large, too thin or not in `formats`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=list(formats)) as picture:
            return rgb_picture(picture), str(picture.format)
    except ImageError:
        raise
    except UnidentifiedImageError:  # its message holds an address, which differs between ranks
        raise ImageError(f"undecodable: not one of {', '.join(formats)}") from None
    except Image.DecompressionBombError:
        raise ImageError("too large in pixels") from None
    except Exception as error:  # decoders raise exceptions of any type for a hostile file
        raise ImageError(f"undecodable: {reason(error)}") from None


def rgb_picture(picture: Image.Image) -> Image.Image:
    """An opened picture in RGB, converted as in `decode_image`. Raises ImageError for a size out of bounds."""
    width, height = picture.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageError("too large in pixels")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError("too long and thin")
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    return picture.convert("RGB")


@dataclass(frozen=True)
class ImagePreprocessing:
    """Converts a picture to a tower's input [3, H, W].

    `crop`: resize the shorter side to `image_size`, then crop the centre (CLIP); otherwise resize both sides to
    `image_size`, which changes the proportions (SigLIP). `aspect_ratio="pad"` first pads the picture to a square with
    the mean colour.
    """

    image_size: int
    crop: bool
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    aspect_ratio: str = "square"

    def __post_init__(self) -> None:
        if self.aspect_ratio not in ("square", "pad"):
            raise ValueError(f"image_aspect_ratio {self.aspect_ratio!r}: expected square or pad")

    @classmethod
    def for_tower(
        cls,
        vision: VisionConfig,
        aspect_ratio: str = "square",
        processor: dict[str, Any] | None = None,
    ) -> ImagePreprocessing:
        """The preprocessing of a tower. `processor` is its preprocessor_config.json, if it has one.

        Raises ArchitectureError when the processor has a setting that is not implemented here.
        """
        crop = vision.model_type == "clip_vision_model"
        if processor is not None:
            _check_processor(vision, crop, processor)
        return cls(vision.image_size, crop, vision.image_mean, vision.image_std, aspect_ratio)

    @property
    def background(self) -> tuple[int, int, int]:
        """The 8-bit colour of padding."""
        red, green, blue = (int(channel * 255) for channel in self.image_mean)
        return red, green, blue

    def __call__(self, picture: Image.Image) -> NDArray[np.float32]:
        """RGB picture of any size -> [3, H, W] float32, normalised."""
        levels = np.empty((3, self.image_size, self.image_size), np.uint8)
        self.write_levels(picture, levels)
        return normalised_pixels(torch.from_numpy(levels), self.image_mean, self.image_std).numpy()

    def write_levels(self, picture: Image.Image, out: NDArray[np.uint8]) -> None:
        """Writes an RGB picture of any size to `out` [3, H, W], resized, not normalised.

        uint8 levels are a quarter of the bytes to pass between processes and to a device, which normalises them.
        """
        pads = self.aspect_ratio == "pad" and picture.width != picture.height
        resized = self._pad(picture) if pads else self._resize(picture)
        for plane, channel in zip(out, resized.split(), strict=True):
            plane[:] = np.asarray(channel)

    def write_background(self, out: NDArray[np.uint8]) -> None:
        """Writes a picture of the background's colour to `out` [3, H, W]."""
        out[:] = np.array(self.background, np.uint8)[:, None, None]

    def _pad(self, picture: Image.Image) -> Image.Image:
        """The picture in the middle of a square, at the tower's size.

        Pillow resizes rows first and columns second. Resizing leaves rows of one colour unchanged, so the padding above
        and below a wide picture is added between the two: the same pixels in three quarters of the time.
        """
        size, side = self.image_size, max(picture.size)
        width = side
        if picture.width == side:
            width = size
            picture = picture.resize((size, picture.height), Image.Resampling.BICUBIC)
        square = Image.new("RGB", (width, side), self.background)
        square.paste(picture, ((width - picture.width) // 2, (side - picture.height) // 2))
        return square.resize((size, size), Image.Resampling.BICUBIC)

    def _resize(self, picture: Image.Image) -> Image.Image:
        size = self.image_size
        if not self.crop:
            return picture.resize((size, size), Image.Resampling.BICUBIC)
        width, height = picture.size
        tall = width <= height
        target = (size, int(size * height / width)) if tall else (int(size * width / height), size)
        picture = picture.resize(target, Image.Resampling.BICUBIC)
        left, top = (target[0] - size) // 2, (target[1] - size) // 2
        return picture.crop((left, top, left + size, top + size))


def _check_processor(vision: VisionConfig, crop: bool, processor: dict[str, Any]) -> None:
    """Raises ArchitectureError for the first setting that differs from the preprocessing of a tower of this kind."""
    size = vision.image_size
    wanted: dict[str, tuple[Any, ...]] = {
        "resample": (3,),
        "rescale_factor": (1 / 255,),
        "image_mean": (list(vision.image_mean),),
        "image_std": (list(vision.image_std),),
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "size": ({"shortest_edge": size}, size) if crop else ({"height": size, "width": size}, size),
    }
    if crop:
        wanted |= {"do_center_crop": (True,), "crop_size": ({"height": size, "width": size}, size)}
    for name, values in wanted.items():
        given = processor.get(name, values[0])
        if given not in values:
            raise ArchitectureError(
                f"preprocessor_config.json: {name}={given!r} is not implemented; expected {values[0]!r}"
            )
