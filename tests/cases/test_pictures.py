"""Pictures as people have them: the same result on every way in, and what is refused or of one colour is named."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.data.image import ImagePreprocessing, decode_image, one_colour
from ross_mcore.data.sample import ShardDataset
from ross_mcore.data.shard_reader import ShardReader
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.tokenizer import load_tokenizer
from ross_mcore.errors import ImageError, SampleError, ShardError
from ross_mcore.shards.indexer import Settings, find_shards, index_shards
from ross_mcore.shards.llava import as_stored, convert_records
from ross_mcore.shards.measure import Measure
from ross_mcore.shards.writer import ShardWriter
from ross_mcore.trained import read_picture
from tests.cases.case import TOKENIZER, Case, Place, conversation
from tests.cases.test_configs import TOWER, flags

SIZE = (64, 48)
DOWN, ACROSS = np.mgrid[: SIZE[1], : SIZE[0]]
COLOURS = np.stack([ACROSS * 255 // SIZE[0], DOWN * 255 // SIZE[1], (ACROSS + DOWN) % 256], -1).astype(np.uint8)
GREY = COLOURS[..., 0]


def saved(picture: Any, form: str, **settings: Any) -> bytes:
    stream = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(stream, form, **settings)
    return stream.getvalue()


def heic() -> bytes:
    stream = io.BytesIO()
    pytest.importorskip("pillow_heif").from_pillow(Image.fromarray(COLOURS)).save(stream)
    return stream.getvalue()


def frames(form: str) -> bytes:
    return saved(COLOURS, form, save_all=True, append_images=[Image.new("RGB", SIZE)])


def icon() -> bytes:
    """A black drawing on a transparent ground, black where nothing is seen."""
    picture = Image.new("RGBA", SIZE, (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (10, 10, 40, 40))
    return saved(picture, "PNG")


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(COLOURS, "JPEG", exif=exif)


@dataclass(frozen=True)
class Kind:
    """A picture and what is made of it: a reason in `refused`, or a colour if it has only one.

    `pixels` [H, W, 3]: what is read, within `tolerance` levels on average; None: COLOURS.
    """

    make: Callable[[], bytes]
    refused: str | None = None
    colour: str | None = None
    pixels: Any = None
    tolerance: float = 0


GREYS = np.stack([GREY] * 3, -1)
PICTURES = {
    "png": Kind(lambda: saved(COLOURS, "PNG")),
    "jpeg": Kind(lambda: saved(COLOURS, "JPEG", quality=95), tolerance=3),
    "mpo": Kind(lambda: frames("MPO"), tolerance=6),
    "webp": Kind(lambda: saved(COLOURS, "WEBP", lossless=True)),
    "bmp": Kind(lambda: saved(COLOURS, "BMP")),
    "tiff": Kind(lambda: saved(COLOURS, "TIFF", compression="tiff_lzw")),
    "tiff of several pages": Kind(lambda: frames("TIFF")),
    "ppm": Kind(lambda: saved(COLOURS, "PPM")),
    "gif": Kind(lambda: saved(COLOURS, "GIF"), tolerance=12),
    "animated gif": Kind(lambda: frames("GIF"), tolerance=12),
    "animated webp": Kind(lambda: frames("WEBP"), tolerance=12),
    "avif": Kind(lambda: saved(COLOURS, "AVIF", quality=90), tolerance=6),
    "jpeg 2000": Kind(lambda: saved(COLOURS, "JPEG2000")),
    "heic": Kind(heic, tolerance=6),
    "cmyk jpeg": Kind(lambda: saved(Image.fromarray(COLOURS).convert("CMYK"), "JPEG", quality=95), tolerance=6),
    "palette with transparency": Kind(
        lambda: saved(Image.fromarray(COLOURS).quantize(), "PNG", transparency=bytes(range(256))), tolerance=12
    ),
    "exif orientation": Kind(rotated, tolerance=6),
    "16-bit grey png": Kind(lambda: saved(GREY.astype(np.uint16) * 257, "PNG"), pixels=GREYS),
    "float tiff": Kind(lambda: saved(GREY / np.float32(255), "TIFF"), pixels=GREYS),
    "float tiff of levels": Kind(lambda: saved(GREY.astype(np.float32), "TIFF"), pixels=GREYS),
    "int32 tiff": Kind(lambda: saved(GREY.astype(np.int32) * 257, "TIFF"), pixels=GREYS),
    "12 bits in 16": Kind(lambda: saved(GREY.astype(np.uint16) * 16, "PNG"), colour="nearly black", pixels=GREYS // 16),
    "black on transparent": Kind(icon, colour="black", pixels=np.zeros_like(COLOURS)),
    "white": Kind(lambda: saved(Image.new("L", SIZE, 255), "JPEG"), colour="white", pixels=np.full_like(COLOURS, 255)),
    "tiny": Kind(lambda: saved(COLOURS[:1, :1], "PNG"), colour="black", pixels=COLOURS[:1, :1]),
    "thin": Kind(lambda: saved(Image.new("RGB", (4000, 12)), "PNG"), "too long and thin: 4000 x 12 pixels"),
    "html": Kind(lambda: b"<html>404</html>", "undecodable: an HTML page"),
    "svg": Kind(lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "undecodable: SVG"),
    "a pointer": Kind(lambda: b"version https://git-lfs.github.com/spec/v1\n", "undecodable: a Git LFS pointer"),
    "cut jpeg": Kind(lambda: saved(COLOURS, "JPEG")[:-60], "truncated; copy it again, or let --truncated-images fill"),
}


def record() -> dict[str, Any]:
    return {"image": "a.jpg", "conversations": conversation()}


def as_shards(place: Place, data: bytes, spec: SampleSpec) -> ShardReader:
    """A data set of one picture file named a.jpg, as make-shards writes it."""
    place.write("images/a.jpg", data)
    with ShardWriter(place.folder / "made") as writer:
        convert_records([record()], place.folder / "images", writer, Measure(spec=spec))
    return ShardReader(place.folder / "made")


def indexed(place: Place, data: bytes, spec: SampleSpec) -> ShardReader:
    """The same picture in a tar of another program, as index-shards reads it."""
    folder = tar_of(place, [data])
    index_shards(find_shards([str(folder)], folder), folder, Settings(spec=spec), max_bad_fraction=1)
    return ShardReader(folder)


def tar_of(place: Place, pictures: Sequence[bytes]) -> Path:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for number, data in enumerate(pictures):
            for name, content in ((f"{number}.jpg", data), (f"{number}.json", json.dumps(record()).encode())):
                about = tarfile.TarInfo(name)
                about.size = len(content)
                archive.addfile(about, io.BytesIO(content))
    return place.write("tars/a.tar", stream.getvalue()).parent


@pytest.mark.parametrize("name", PICTURES)
def test_every_way_in_gives_the_same(name: str, place: Place) -> None:
    kind = PICTURES[name]
    data, spec = kind.make(), SampleSpec()
    make = ImagePreprocessing(28, False, (0.5,) * 3, (0.5,) * 3)
    if kind.refused is not None:
        with pytest.raises(SampleError, match=f"the image is {kind.refused}"):
            as_stored(data, "refuse")
        with pytest.raises(ValueError, match="no usable sample"):
            indexed(place, data, spec)
        assert kind.refused in (place.folder / "tars" / "quarantine.jsonl").read_text()
        with pytest.raises(ImageError, match=kind.refused):
            read_picture(place.write("a.jpg", data), make)
        return
    made = decode_image(as_shards(place, data, spec).image_bytes(0, 0)).picture
    pixels = np.asarray(made)
    assert np.array_equal(pixels, decode_image(indexed(place, data, spec).image_bytes(0, 0)).picture)
    assert np.array_equal(make(made), read_picture(place.folder / "images" / "a.jpg", make).numpy())
    assert np.abs(pixels.astype(int) - (COLOURS if kind.pixels is None else kind.pixels)).mean() <= kind.tolerance
    assert one_colour(made) == kind.colour


def test_a_filled_picture_is_the_same_on_every_way_in(place: Place) -> None:
    """make-shards stores it whole, so that training needs no flag; an index of tars asks for the flag."""
    data, spec = PICTURES["cut jpeg"].make(), SampleSpec(truncated_images="fill")
    made, found = as_shards(place, data, spec), indexed(place, data, spec)
    assert (made.truncated_images, found.truncated_images) == ("refuse", "fill")
    assert [made.index["account"]["filled"], found.index["account"]["filled"]] == [1, 1]
    with pytest.raises(
        ShardError, match="was indexed with --truncated-images fill.* give --truncated-images fill here"
    ):
        dataset(place, found, SampleSpec("qwen_2"))
    assert dataset(place, found, SampleSpec("qwen_2", truncated_images="fill"))
    filled = decode_image(found.image_bytes(0, 0), "fill")
    whole = decode_image(made.image_bytes(0, 0))
    assert (filled.filled, whole.filled, whole.format) == (True, False, "PNG")
    assert np.array_equal(filled.picture, whole.picture)


def dataset(place: Place, reader: ShardReader, spec: SampleSpec) -> ShardDataset:
    return ShardDataset(
        reader, load_tokenizer(TOKENIZER), Checkpoint(place.base / "iter_0000000", 0).model_config(), spec
    )


def training(place: Place) -> Sequence[object]:
    """Arguments of a short run on three pictures and one that is cut off, in a tar indexed with `fill`."""
    folder = tar_of(place, [PICTURES["cut jpeg"].make(), *[saved(COLOURS, "GIF")] * 3])
    shards = ["--data-path", folder, "--tokenizer", TOKENIZER, "--template", "qwen_2", "--truncated-images", "fill"]
    says = ["4 samples", "1 pictures are cut off"]
    Case("filled", "index-shards", lambda _: [*shards, "--num-workers", 0], 0, says).run(place)
    return [
        *("--load", place.base, "--data-path", folder, "--save", place.folder / "run", "--template", "qwen_2"),
        *("--training-stage", "finetune", "--train-iters", 1, "--num-workers", 0, "--seq-length", 256),
        *("--truncated-images", "fill", "--max-bad-fraction", 0),
    ]


def processor(place: Place, **edits: Any) -> Sequence[object]:
    """Arguments of a conversion of a tower with an edited preprocessor_config.json."""
    tower = place.folder / "tower"
    tower.mkdir()
    for path in TOWER.iterdir():
        (tower / path.name).write_bytes(path.read_bytes())
    path = tower / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edits))
    return [tower if argument == TOWER else argument for argument in flags(place)]


CASES = [
    Case("filled pictures", "train", training, 0, ["finished"], ["quarantine"], source="LLaVA#593, LLaVA#601"),
    Case(
        "SigLIP 2's processor", "convert", lambda place: processor(place, resample=2, do_convert_rgb=None), 0, ["wrote"]
    ),
    Case(
        "a processor that training would refuse",
        "convert",
        lambda place: processor(place, resample=1),
        2,
        ["tower (config.json, preprocessor_config.json): resample=1 is not implemented; expected 3 or 2"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, place: Place) -> None:
    case.run(place)
