"""Picture bytes -> the vision tower's input: bounded decoding and the tower's preprocessing with PIL.

The arithmetic is that of Hugging Face's PIL image processors (8-bit resize, centre crop, rescale and normalise
in float32), which the reference calls after its own padding. Legend: H W pixels of the tower's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from ross_mcore.architecture import VisionConfig
from ross_mcore.batch import normalised_pixels, pixel_table
from ross_mcore.checked import reason
from ross_mcore.data.picture_files import open_picture, quiet_pil
from ross_mcore.errors import ArchitectureError, ImageError
from ross_mcore.library_configs import check_processor

ImageAspectRatio = Literal["square", "pad"]

TruncatedImages = Literal["refuse", "fill"]

MAX_PIXELS = 64 << 20
MAX_JPEG_PIXELS, MAX_PROGRESSIVE_PIXELS = 256 << 20, 128 << 20
"""Bounds of a JPEG that is decoded at a half, a quarter or an eighth of its size. libjpeg keeps a progressive one in
memory as a whole, in up to 6 bytes a pixel."""
MAX_SIDE = 16384
MAX_ASPECT_RATIO = 200
"""Padding makes a thin picture a square of its longer side, which costs far more than its own pixels."""
GDAL_NODATA = 42113
"""Tag of a TIFF."""
NEARLY = 16
"""Levels, of 256: a picture whose channels all vary by less is nearly of one colour."""


class Decoded(NamedTuple):
    """An RGB picture, the name of its format, and whether PIL filled what the file lacks."""

    picture: Image.Image
    format: str
    filled: bool = False


def decode_image(data: bytes, truncated_images: str = "refuse") -> Decoded:
    """Decodes a picture completely; the one decoder of shards, indexing, training and inference.

    Formats: picture_files.FORMATS. EXIF orientation is not applied (reference); a HEIC has its own, which is applied.
    Of an animation, or a file of several pages, the first picture is read. Modes: `rgb_picture`.

    The size is checked in the header, before any pixel is decoded. A JPEG over MAX_PIXELS or MAX_SIDE, such as one of
    108 megapixels from a phone, is decoded by libjpeg at a half, a quarter or an eighth of its size (PIL's draft): a
    pixel is about the mean of those it stands for, and the tower's input, resized from it, differs by a few levels from
    that of the whole picture. Pictures within the bounds have the reference's pixels.

    `truncated_images` of a file that is cut off: "refuse", or "fill" as the reference does: PIL leaves what is missing
    grey or black. Raises ImageError for a picture that is damaged, too large, too thin or of another format.
    """
    try:
        return _decoded(data, fill=False)
    except ImageError:
        if truncated_images != "fill":
            raise
    return _decoded(data, fill=True)


def _decoded(data: bytes, fill: bool) -> Decoded:
    with quiet_pil(fill):
        try:
            # of a HEIC, which is decoded as a whole or not at all, PIL would "fill" everything
            with open_picture(data) as picture, quiet_pil(fill and picture.format != "HEIF"):
                _draft(picture)
                return Decoded(rgb_picture(picture), str(picture.format), fill)
        except ImageError:
            raise
        except Image.DecompressionBombError:
            raise ImageError("too large in pixels: its tiles; save it as PNG or JPEG") from None
        except Exception as error:  # decoders raise exceptions of any type for a hostile file
            problem = reason(error)
            if "truncated" in problem.lower() and not fill:
                raise ImageError("truncated; copy it again, or let --truncated-images fill what is missing") from None
            if "MAX_TEXT" in problem:
                problem = "a PNG with over a MiB of text in its metadata; save it again without"
            raise ImageError(f"undecodable: {problem}") from None


def _draft(picture: Image.Image) -> None:
    """Lets a JPEG out of the bounds be decoded at the largest of the smaller sizes that is within them."""
    width, height = picture.size
    most = MAX_PROGRESSIVE_PIXELS if picture.info.get("progressive") else MAX_JPEG_PIXELS
    if not isinstance(picture, JpegImageFile) or _fits(width, height) or width * height > most:
        return
    scale = next((scale for scale in (2, 4) if _fits(-(-width // scale), -(-height // scale))), 8)
    picture.draft(None, (width // scale, height // scale))


def _fits(width: int, height: int) -> bool:
    return width * height <= MAX_PIXELS and max(width, height) <= MAX_SIDE


def as_pixels(image: Tensor) -> NDArray[np.uint8]:
    """[3, H, W] in [0, 1] -> 8-bit RGB [H, W, 3]."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def rgb_picture(picture: Image.Image) -> Image.Image:
    """An opened picture in RGB. Raises ImageError for a size out of bounds.

    CMYK, grey, palette and two-coloured pictures are converted, an alpha channel is dropped (reference). 16-bit
    grey keeps its upper 8 bits, as 16-bit colours do (the reference's conversion by PIL clips nearly all of it to
    white). Grey of 32-bit integers or floats: `_eight_bits`.
    """
    width, height = picture.size
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            f"too long and thin: {width} x {height} pixels, a side at most {MAX_ASPECT_RATIO} times the other; crop it"
        )
    if not _fits(width, height):
        raise ImageError(
            f"too large in pixels: {width} x {height} are {width * height / 1e6:.0f} million; at most "
            f"{MAX_PIXELS // 10**6} are read, with sides of up to {MAX_SIDE} (JPEG {MAX_JPEG_PIXELS // 10**6}, "
            f"progressive JPEG {MAX_PROGRESSIVE_PIXELS // 10**6}); make it smaller"
        )
    with quiet_pil():
        if picture.mode == "F" or picture.mode.startswith("I"):
            return Image.fromarray(_eight_bits(picture)).convert("RGB")
        return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> NDArray[np.uint8]:
    """Grey [H, W] of 16-bit or 32-bit integers, or of floats, in 8 bits.

    16 bits keep their upper 8. The range of a 32-bit picture's values shows what they are: floats from 0 to 1 are
    fractions of white; values from 0 to 255 are levels and integers from 0 to 65535 have 16 bits, unless the picture
    would be nearly black (NEARLY); all others are stretched, the smallest becomes black and the largest white. Pixels
    without a value are black: those that are no finite number, and GDAL's no-data.
    """
    values = np.asarray(picture)
    if picture.mode.startswith("I;16") or picture.format in ("PNG", "PPM") and picture.mode == "I":
        return (values >> 8).astype(np.uint8)
    valid = np.isfinite(values)
    if (missing := _missing_value(picture)) is not None:
        valid &= values != missing
    low, high = (float(values[valid].min()), float(values[valid].max())) if valid.any() else (0.0, 0.0)
    integers = picture.mode == "I"
    if not integers and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and NEARLY <= high <= 255:
        low, high = 0.0, 255.0
    elif integers and low >= 0 and NEARLY << 8 <= high <= 65535:
        return np.where(valid, values >> 8, 0).astype(np.uint8)
    scale = 0.0 if high == low else 255 / (high - low)
    levels = np.zeros(values.shape, np.uint8)
    for start in range(0, len(values), 256):  # few rows at a time, because they are of 8 bytes a pixel
        some = slice(start, start + 256)
        rows = (np.where(valid[some], values[some], low).astype(np.float64) - low) * scale
        levels[some] = rows.clip(0, 255) + (0 if scale == 1 else 0.5)
    return levels


def _missing_value(picture: Image.Image) -> float | None:
    """The value that stands for none in a GeoTIFF, GDAL's no-data."""
    tags: Any = getattr(picture, "tag_v2", {})  # of TIFF only
    try:
        return float(str(tags[GDAL_NODATA]).strip("\0 "))
    except (KeyError, ValueError):
        return None


def one_colour(picture: Image.Image) -> str | None:
    """The name of the colour of an RGB picture that has one, such as "black"; None for a picture of several.

    "nearly black": each channel varies by less than NEARLY of 256 levels, as in a 16-bit file of 12-bit values or a
    float file of small numbers. Usually a picture that was converted wrongly, or an icon whose transparency is dropped.
    """
    if _most_range(picture.resize((8, 8), Image.Resampling.NEAREST)) >= NEARLY:  # of 64 pixels, and so of all
        return None
    spread = _most_range(picture)
    if spread >= NEARLY:
        return None
    colour = tuple((low + high) // 2 for low, high in _ranges(picture))
    named = {"black": (0, 0, 0), "white": (255, 255, 255)}
    near = (name for name, levels in named.items() if max(abs(a - b) for a, b in zip(colour, levels)) < NEARLY)
    name = next(near, "grey" if max(colour) - min(colour) < NEARLY else "#{:02x}{:02x}{:02x}".format(*colour))
    return f"nearly {name}" if spread else name


def _ranges(picture: Image.Image) -> Sequence[tuple[int, int]]:
    """The smallest and the largest level of each channel."""
    ranges: Any = picture.getextrema()
    return [ranges] if len(picture.getbands()) == 1 else ranges


def _most_range(picture: Image.Image) -> int:
    return max(high - low for low, high in _ranges(picture))


@dataclass(frozen=True)
class ImagePreprocessing:
    """Converts a picture to a tower's input [3, H, W].

    `crop`: resize the shorter side to `image_size`, then crop the centre (CLIP); otherwise resize both sides to
    `image_size`, which changes the proportions (SigLIP). `aspect_ratio="pad"` first pads the picture to a square with
    the mean colour. `resample`: PIL's bicubic or bilinear (SigLIP 2).
    """

    image_size: int
    crop: bool
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    aspect_ratio: str = "square"
    resample: int = field(default=Image.Resampling.BICUBIC, repr=False)

    def __str__(self) -> str:
        """As stored with precomputed parts, where bicubic resizing is not written."""
        return repr(self) if self.resample == Image.Resampling.BICUBIC else f"{self!r} resample={int(self.resample)}"

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
        known = processor or {}
        try:
            check_processor(known, crop, vision.image_size, vision.image_mean, vision.image_std)
        except ValueError as error:
            raise ArchitectureError(f"preprocessor_config.json: {error}") from None
        resample = known.get("resample", Image.Resampling.BICUBIC)
        return cls(vision.image_size, crop, vision.image_mean, vision.image_std, aspect_ratio, resample)

    @property
    def background(self) -> tuple[int, int, int]:
        """The 8-bit colour of padding."""
        red, green, blue = (int(channel * 255) for channel in self.image_mean)
        return red, green, blue

    def __call__(self, picture: Image.Image) -> NDArray[np.float32]:
        """RGB picture of any size -> [3, H, W] float32, normalised."""
        levels = np.empty((3, self.image_size, self.image_size), np.uint8)
        self.write_levels(picture, levels)
        return normalised_pixels(torch.from_numpy(levels), pixel_table(self.image_mean, self.image_std)).numpy()

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
            picture = picture.resize((size, picture.height), self._filter)
        square = Image.new("RGB", (width, side), self.background)
        square.paste(picture, ((width - picture.width) // 2, (side - picture.height) // 2))
        return square.resize((size, size), self._filter)

    @property
    def _filter(self) -> Image.Resampling:
        return Image.Resampling(self.resample)

    def _resize(self, picture: Image.Image) -> Image.Image:
        size = self.image_size
        if not self.crop:
            return picture.resize((size, size), self._filter)
        width, height = picture.size
        tall = width <= height
        target = (size, int(size * height / width)) if tall else (int(size * width / height), size)
        picture = picture.resize(target, self._filter)
        left, top = (target[0] - size) // 2, (target[1] - size) // 2
        return picture.crop((left, top, left + size, top + size))
