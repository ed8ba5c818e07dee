"""Decoding is bounded and gives a picture or an ImageError for any bytes."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ross_mcore.architecture import ModelConfig
from ross_mcore.data.image import MAX_SIDE, ImagePreprocessing, decode_image
from ross_mcore.errors import ArchitectureError, ImageError


def png_of_size(width: int, height: int) -> bytes:
    """A PNG with a size in its header that its data does not have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    stream = io.BytesIO()
    Image.new(mode, (5, 7)).save(stream, "JPEG" if mode == "CMYK" else "PNG")
    picture, _ = decode_image(stream.getvalue())
    assert (picture.mode, picture.size) == ("RGB", (5, 7))


def test_grey_of_16_bits_keeps_its_upper_8() -> None:
    stream = io.BytesIO()
    grey = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    Image.fromarray(grey).save(stream, "PNG")
    assert np.asarray(decode_image(stream.getvalue())[0])[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 255)]


def test_orientation_is_left_as_stored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (5, 7)).save(stream, "JPEG", exif=exif)
    assert decode_image(stream.getvalue())[0].size == (5, 7)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((20_000, 20_000), "too large"),
        ((8193, 8193), "too large"),
        ((MAX_SIDE + 1, 200), "too large"),
        ((4000, 4), "thin"),
    ],
)
def test_size_is_judged_by_the_header(size: tuple[int, int], reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode_image(png_of_size(*size))


def test_other_formats_are_refused(encoded: Any) -> None:
    for kind in ("GIF", "BMP", "TIFF"):
        with pytest.raises(ImageError, match="undecodable"):
            decode_image(encoded(5, 5, kind))
    assert decode_image(encoded(5, 5, "BMP"), ["BMP"])[1] == "BMP"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_else(encoded: Any, data: Any) -> None:
    whole = bytearray(encoded(40, 30, data.draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    with contextlib.suppress(ImageError):
        decode_image(bytes(whole[:cut]))


@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (12, 12), (13, 12)])
def test_every_size_fits_the_tower(aspect_ratio: Any, crop: bool, size: tuple[int, int]) -> None:
    make = ImagePreprocessing(12, crop, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), aspect_ratio)
    pixels = make(Image.new("RGB", size))
    assert pixels.shape == (3, 12, 12) and pixels.dtype == np.float32


def test_padding_is_centred_on_the_mean_colour() -> None:
    make = ImagePreprocessing(8, False, (0.5,) * 3, (0.5,) * 3, "pad")
    pixels = make(Image.new("RGB", (8, 3), (255, 255, 255)))
    assert make.background == (127, 127, 127)
    rows = pixels[0].mean(axis=1)
    assert np.allclose(rows[[0, 7]], 127 / 127.5 - 1, atol=1e-6) and np.allclose(rows[2:5], 1)


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (13, 12), (500, 3), (5, 4), (12, 5)])
def test_padding_while_resizing_gives_the_pixels_of_padding_first(crop: bool, size: tuple[int, int]) -> None:
    make = ImagePreprocessing(12, crop, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "pad")
    drawn = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture, side = Image.fromarray(drawn), max(size)
    square = Image.new("RGB", (side, side), make.background)
    square.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    levels = np.empty((3, 12, 12), np.uint8)
    make.write_levels(picture, levels)
    assert np.array_equal(levels.transpose(1, 2, 0), np.asarray(square.resize((12, 12), Image.Resampling.BICUBIC)))


def test_a_processor_that_disagrees_is_refused(model_config: ModelConfig) -> None:
    fine = {"size": {"height": 12, "width": 12}, "resample": 3, "image_mean": [0.5] * 3, "rescale_factor": 1 / 255}
    ImagePreprocessing.for_tower(model_config.vision, "pad", fine)
    for change in ({"resample": 2}, {"size": {"height": 16, "width": 16}}, {"image_mean": [0.4] * 3}):
        with pytest.raises(ArchitectureError, match=next(iter(change))):
            ImagePreprocessing.for_tower(model_config.vision, "pad", fine | change)
    with pytest.raises(ValueError, match="aspect"):
        ImagePreprocessing.for_tower(model_config.vision, "anyres")  # type: ignore[arg-type]
