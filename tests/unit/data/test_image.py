"""Decoding is bounded and gives a picture or an ImageError for any bytes."""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from ross_mcore.architecture import ModelConfig
from ross_mcore.data import image
from ross_mcore.data.image import MAX_SIDE, ImagePreprocessing, decode_image, one_colour
from ross_mcore.data.picture_files import FORMATS
from ross_mcore.errors import ArchitectureError, ImageError


def png_of_size(width: int, height: int) -> bytes:
    """A PNG with a size in its header that its data does not have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def levels(size: tuple[int, int] = (40, 30)) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture of many colours, smooth enough for every codec."""
    across, down = np.meshgrid(*(np.linspace(0, 255, n) for n in size))
    return np.stack([across, down, (across + down) / 2], -1).astype(np.uint8)


def encode(picture: Image.Image | np.ndarray[Any, Any], form: str, **settings: Any) -> bytes:
    stream = io.BytesIO()
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(picture)
    if form == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    picture.save(stream, form, **settings)
    return stream.getvalue()


def pixels(picture: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(picture)


def refusal(data: bytes, truncated_images: str = "refuse") -> str:
    with pytest.raises(ImageError) as error:
        decode_image(data, truncated_images)
    return str(error.value)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read_as_pil_reads_it(form: str) -> None:
    data = encode(levels(), form)
    found = decode_image(data)
    assert found.format == form and not found.filled and found.picture.mode == "RGB"
    assert np.abs(pixels(found.picture).astype(int) - levels()).mean() < 4
    if form != "HEIF":
        assert np.array_equal(pixels(found.picture), pixels(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF", "PNG"])
def test_an_animation_is_its_first_picture(form: str) -> None:
    first, second = Image.new("RGB", (8, 6), (200, 10, 10)), Image.new("RGB", (8, 6), (10, 10, 200))
    data = encode(first, form, save_all=True, append_images=[second], **({"lossless": True} if form == "WEBP" else {}))
    assert np.array_equal(pixels(decode_image(data).picture), pixels(first))


def test_several_pictures_in_a_jpeg_are_the_first() -> None:
    data = encode(Image.fromarray(levels()), "MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))])
    assert decode_image(data).format == "MPO" and one_colour(decode_image(data).picture) is None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    data = encode(Image.new(mode, (5, 7)), "JPEG" if mode == "CMYK" else "PNG")
    picture = decode_image(data).picture
    assert (picture.mode, picture.size) == ("RGB", (5, 7))


def test_grey_of_16_bits_keeps_its_upper_8() -> None:
    grey = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    for form in ("PNG", "TIFF", "JPEG2000"):
        assert pixels(decode_image(encode(grey, form)).picture)[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 255)]
    portable = b"P5 5 1 65535\n" + grey.astype(">u2").tobytes()
    assert pixels(decode_image(portable).picture)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.float32([0, 0.5, 1]), [0, 128, 255]),  # fractions of white
        (np.float32([0, 0.2, 0.4]), [0, 51, 102]),
        (np.float32([0, 100.9, 255]), [0, 100, 255]),  # levels, as PIL converts them
        (np.float32([0, 2, 4]), [0, 128, 255]),  # levels that would be nearly black are stretched
        (np.float32([-1, 0, 1]), [0, 128, 255]),
        (np.float32([0, 500, 1000]), [0, 128, 255]),
        (np.float32([np.nan, 0.5, np.inf]), [0, 128, 0]),
        (np.float32([np.nan, np.nan, np.inf]), [0, 0, 0]),
        (np.float32([-3e38, 0, 3e38]), [0, 128, 255]),
        (np.float32([7, 7, 7]), [0, 0, 0]),
        (np.int32([0, 100, 255]), [0, 100, 255]),
        (np.int32([0, 256, 65535]), [0, 1, 255]),
        (np.int32([0, 50, 100_000]), [0, 0, 255]),
        (np.int32([-100, 0, 100]), [0, 128, 255]),
        (np.int32([-(2**31), 0, 2**31 - 1]), [0, 128, 255]),
        (np.int32([0, 1, 2]), [0, 128, 255]),
    ],
)
def test_grey_of_32_bits_is_scaled_by_its_range(values: Any, expected: list[int]) -> None:
    found = pixels(decode_image(encode(values[None], "TIFF")).picture)
    assert np.abs(found[0] - np.array(expected)[:, None]).max() <= (expected[1] == 128)  # a half, rounded up or down


def test_what_a_geotiff_names_as_missing_is_black() -> None:
    heights = np.float32([[-9999, 100, 150, 200]])
    data = encode(heights, "TIFF", tiffinfo={42113: "-9999"})
    assert pixels(decode_image(data).picture)[0, :, 0].tolist() == [0, 100, 150, 200]
    heights = np.int32([[-32768, 1000, 1500, 2000]])
    assert pixels(decode_image(encode(heights, "TIFF", tiffinfo={42113: "-32768"})).picture)[0, 1:, 0].std() > 80
    assert pixels(decode_image(encode(heights, "TIFF", tiffinfo={42113: "none"})).picture)[0, 1:, 0].std() < 10


def test_a_preview_is_not_taken_for_the_picture() -> None:
    for tag, value in ((254, 1), (50706, b"\1\4\0\0")):
        assert "a camera's raw file" in refusal(encode(levels(), "TIFF", tiffinfo={tag: value}))
    assert decode_image(encode(levels(), "TIFF", tiffinfo={254: 0}))


def test_orientation_is_left_as_stored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(Image.new("RGB", (5, 7)), "JPEG", exif=exif)).picture.size == (5, 7)


def test_the_orientation_of_a_heic_is_a_part_of_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(levels(), "HEIF", exif=exif.tobytes())).picture.size == (30, 40)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((20_000, 20_000), "too large in pixels: 20000 x 20000 are 400 million; at most 67 are read"),
        ((8193, 8193), "too large in pixels: 8193 x 8193"),
        ((MAX_SIDE + 1, 200), "with sides of up to 16384"),
        ((4000, 4), "too long and thin: 4000 x 4 pixels, a side at most 200 times the other"),
    ],
)
def test_size_is_judged_by_the_header(size: tuple[int, int], reason: str) -> None:
    assert reason in refusal(png_of_size(*size))


@pytest.mark.parametrize(("progressive", "scale"), [(False, 2), (False, 4), (False, 8), (True, 2)])
def test_a_jpeg_out_of_bounds_is_decoded_smaller(
    monkeypatch: pytest.MonkeyPatch, progressive: bool, scale: int
) -> None:
    width, height = 640, 480
    data = encode(levels((width, height)), "JPEG", quality=95, progressive=progressive)
    whole = pixels(decode_image(data).picture)
    assert np.array_equal(
        whole, pixels(Image.open(io.BytesIO(data)).convert("RGB"))
    )  # within the bounds: as the reference
    monkeypatch.setattr(image, "MAX_PIXELS", width * height // scale**2)
    smaller = decode_image(data).picture
    assert smaller.size == (width // scale, height // scale)
    make = ImagePreprocessing(32, False, (0.5,) * 3, (0.5,) * 3)
    assert np.abs(make(smaller) - make(Image.fromarray(whole))).max() < 6 / 127.5
    monkeypatch.setattr(image, "MAX_PROGRESSIVE_PIXELS" if progressive else "MAX_JPEG_PIXELS", width * height - 1)
    assert "too large in pixels: 640 x 480" in refusal(data)


def test_a_jpeg_with_a_long_side_is_decoded_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "MAX_SIDE", 100)
    assert decode_image(encode(levels((301, 40)), "JPEG")).picture.size == (76, 10)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "an empty file"),
        (b"nothing known", "not one of PNG, JPEG"),
        (b"\n<!DOCTYPE html><html>404</html>", "an HTML page"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', "SVG"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"\xd7\xcd\xc6\x9a" + bytes(60), "not one of"),  # WMF
        (b"8BPS\0\1", "PSD"),
        (bytes(128) + b"DICM", "DICOM"),
        (b"\0\0\0\x18ftypmp42" + bytes(16), "a video"),
        (
            encode(levels(), "TIFF").replace(b"\x06\1\3\0\1\0\0\0\2", b"\x06\1\3\0\1\0\0\0\x7f"),
            "a TIFF that PIL does not read",
        ),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, reason: str) -> None:
    assert refusal(data).startswith("undecodable") and reason in refusal(data)


def test_a_heic_without_its_package_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "pip install pillow-heif" in refusal(b"\0\0\0\x18ftypheic" + bytes(16))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM"])
def test_a_file_that_is_cut_off_is_refused_or_filled(form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    whole = encode(noise, form)
    cut = whole[: len(whole) * 6 // 10]
    assert refusal(cut).startswith("truncated; copy it again, or let --truncated-images fill")
    filled = decode_image(cut, "fill")
    assert filled.filled and not decode_image(whole, "fill").filled
    with pytest.MonkeyPatch.context() as patch:  # as the reference
        patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        assert np.array_equal(pixels(filled.picture), pixels(Image.open(io.BytesIO(cut)).convert("RGB")))
        assert refusal(cut).startswith("truncated")  # whatever the program has set


def test_threads_that_fill_and_threads_that_refuse_do_not_mix() -> None:
    """Whether a file is filled is a question of the call, also beside one that does otherwise."""
    whole = encode(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8), "JPEG")
    cut = whole[: len(whole) // 2]

    def decode(truncated_images: str) -> bool:
        try:
            return decode_image(cut, truncated_images).filled
        except ImageError:
            return False

    asked = ["fill", "refuse"] * 200
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(decode, asked)) == [what == "fill" for what in asked]
    with pytest.raises(OSError, match="truncated"):  # outside of a call PIL is as before
        Image.open(io.BytesIO(cut)).load()


def test_nothing_is_filled_in_a_heic() -> None:
    data = encode(levels(), "HEIF")
    assert refusal(data[: len(data) * 9 // 10], "fill").startswith("undecodable")


def noisy_pictures() -> dict[str, bytes]:
    """What PIL says -> a picture of which it says that, in a warning or in its log."""
    jpeg, tiff = encode(levels(), "JPEG"), encode(levels(), "TIFF")
    exif = b"\xff\xe1\x00\x1eExif\0\0II*\0\x08\0\0\0\x05\0\x1a\x01\x05\0" + bytes(10)
    palette = encode(Image.fromarray(levels()).convert("P"), "PNG", transparency=bytes(range(256)))
    return {
        "corrupt EXIF": jpeg[:2] + exif + jpeg[2:],
        "Palette images with Transparency": palette,
        "More samples per pixel": tiff.replace(b"\x15\1\3\0\1\0\0\0\3", b"\x15\1\3\0\1\0\0\0\x63"),
        "could be decompression bomb": png_of_size(10_000, 10_000),
    }


def test_pil_writes_nothing(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        packed = encode(levels(), "TIFF", compression="tiff_deflate")
        for data in (*noisy_pictures().values(), packed.replace(b"\x78\x9c", b"\xff\xff")):  # libtiff's own message
            with contextlib.suppress(ImageError):
                decode_image(data)
        captured = capfd.readouterr()
        assert [*map(str, caught), captured.err, captured.out, caplog.text] == ["", "", ""]
        for said, data in noisy_pictures().items():  # a program that uses PIL itself is warned as before
            with contextlib.suppress(OSError):
                Image.open(io.BytesIO(data)).convert("RGB")
            assert said.lower() in f"{caught[-1].message if caught else ''}{caplog.text}".lower()


@pytest.mark.parametrize(
    ("picture", "name"),
    [
        (Image.new("RGB", (300, 200), "black"), "black"),
        (Image.new("RGB", (3, 2), "white"), "white"),
        (Image.new("RGB", (3, 2), (90, 91, 92)), "grey"),
        (Image.new("RGB", (3, 2), (200, 0, 30)), "#c8001e"),
        (Image.fromarray(levels() // 17), "nearly black"),
        (Image.fromarray(levels()), None),
        (Image.fromarray(levels() // 15), None),
    ],
)
def test_pictures_of_one_colour_are_named(picture: Image.Image, name: str | None) -> None:
    assert one_colour(picture) == name
    one_pixel = picture.copy()
    one_pixel.putpixel((1, 1), (255, 0, 255))
    assert one_colour(one_pixel) is None


def test_usual_ways_to_a_black_picture() -> None:
    icon = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    icon.paste((0, 0, 0, 255), (10, 10, 30, 30))
    assert one_colour(decode_image(encode(icon, "PNG")).picture) == "black"
    twelve_bits = levels()[..., 0].astype(np.uint16) * 16
    assert one_colour(decode_image(encode(twelve_bits, "PNG")).picture) == "nearly black"
    assert one_colour(decode_image(encode(levels()[..., 0].astype(np.float32) / 255, "TIFF")).picture) is None


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_else(encoded: Any, data: Any) -> None:
    whole = bytearray(
        encoded(
            40, 30, data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"]))
        )
    )
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    with contextlib.suppress(ImageError):
        decode_image(bytes(whole[:cut]), data.draw(st.sampled_from(["refuse", "fill"])))


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


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (13, 12), (500, 3), (5, 4), (12, 5), (1, 2), (999, 998)])
def test_padding_while_resizing_gives_the_pixels_of_padding_first(
    crop: bool, size: tuple[int, int], resample: Image.Resampling
) -> None:
    make = ImagePreprocessing(12, crop, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "pad", resample)
    drawn = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture, side = Image.fromarray(drawn), max(size)
    square = Image.new("RGB", (side, side), make.background)
    square.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    levels = np.empty((3, 12, 12), np.uint8)
    make.write_levels(picture, levels)
    assert np.array_equal(levels.transpose(1, 2, 0), np.asarray(square.resize((12, 12), resample)))


def test_a_processor_that_disagrees_is_refused(model_config: ModelConfig) -> None:
    fine = {"size": {"height": 12, "width": 12}, "resample": 3, "image_mean": [0.5] * 3, "rescale_factor": 1 / 255}
    ImagePreprocessing.for_tower(model_config.vision, "pad", fine)
    siglip2 = fine | {"resample": 2, "do_convert_rgb": None, "do_center_crop": None, "do_pad": False}
    bilinear = ImagePreprocessing.for_tower(model_config.vision, "pad", siglip2)
    assert bilinear.resample == Image.Resampling.BILINEAR and str(bilinear).endswith(" resample=2")
    assert "resample" not in str(ImagePreprocessing.for_tower(model_config.vision, "pad", fine))  # as in old shards
    for change in (
        {"resample": 1},
        {"resample": None},
        {"resample": True},
        {"size": {"height": 16, "width": 16}},
        {"size": {"shortest_edge": 12}},
        {"image_mean": [0.4] * 3},
        {"do_normalize": False},
        {"do_resize": 1},
        {"do_center_crop": True},
        {"do_pad": True},
        {"max_num_patches": 256},
    ):
        with pytest.raises(ArchitectureError, match=f"preprocessor_config.json: {next(iter(change))}"):
            ImagePreprocessing.for_tower(model_config.vision, "pad", fine | change)
    with pytest.raises(ValueError, match="aspect"):
        ImagePreprocessing.for_tower(model_config.vision, "anyres")  # type: ignore[arg-type]
