"""A newcomer's own pictures, of all formats and kinds: from JSON to a trained checkpoint, every one accounted for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ross_mcore.data.shard_reader import ShardReader
from tests.cases.case import TOKENIZER, Case, Place, conversation
from tests.cases.test_pictures import COLOURS, PICTURES, saved

SUFFIXES = {"jpeg": "jpg", "animated gif": "gif", "animated webp": "webp", "jpeg 2000": "jp2", "cmyk jpeg": "jpeg"}
SUFFIXES |= {"tiff of several pages": "tif", "float tiff": "tiff", "float tiff of levels": "tiff", "int32 tiff": "tiff"}
SUFFIXES |= {"exif orientation": "JPG", "white": "jpg", "tiny": "png"} | dict.fromkeys(
    ("png", "mpo", "webp", "bmp", "tiff", "ppm", "gif", "avif", "heic")
)
MORE = {
    "huge.jpg": lambda: saved(Image.fromarray(COLOURS).resize((7000, 5000)), "JPEG"),
    "5 x 3.png": lambda: saved(COLOURS[:3, :5], "PNG"),
    "Straße 图片 😀.png": lambda: saved(COLOURS, "PNG"),
    "upper/CASE.JPG": lambda: saved(COLOURS, "JPEG"),
    "a png.jpg": lambda: saved(COLOURS, "PNG"),
}
"""Pictures by name, besides those of PICTURES."""


def own_pictures(place: Place) -> list[str]:
    """Writes the pictures to images/ and returns their names, the bad ones last."""
    made = {f"{name}.{SUFFIXES.get(name) or name.split()[-1]}": kind.make for name, kind in PICTURES.items()} | MORE
    names = sorted(made, key=lambda name: bool(PICTURES.get(name.rpartition(".")[0], PICTURES["png"]).refused))
    for name in names:
        place.write(f"images/{name}", made[name]())
    return names


def talk(*said: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)]
    return turns if system is None else [{"from": "system", "value": system}, *turns]


def own_records(names: Sequence[str]) -> list[dict[str, Any]]:
    """A record for each picture, and some of several pictures, languages and forms."""
    first, second = names[:2]
    return [
        *[{"id": name, "image": name, "conversations": conversation(answer=f"This is {name}.")} for name in names],
        {"image": first, "conversations": talk("<image>\nWhat?", "A car.", "Its colour?", "Red.", "Why?", "So.")},
        {"image": [first, second], "conversations": talk("<image> and <image>?", "Two.")},
        {"image": [first, second], "conversations": talk("Compare them.", "They differ.")},
        {"image": first, "conversations": talk("What is this?", "A car.", system="You are a pirate.")},
        {"image": first, "system": "Answer in French.", "conversations": talk("<image>\nQuoi ?", "Une voiture.")},
        {"image": first, "conversations": talk("<image>\n这张图片里有什么？", "一辆车。")},
        {"image": first, "conversations": talk("<image>\nما هذا؟", "سيارة.")},
        {"image": first, "conversations": talk("<image>\n👩‍🚀?", "🚀🇩🇪 yes")},
        {
            "images": [first],
            "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A car."}],
        },
        {"conversations": talk("Why?", "So.")},
    ]


def test_every_picture_is_accounted_for(place: Place) -> None:
    names = own_pictures(place)
    refused = [name for name in names if PICTURES.get(name.rpartition(".")[0], PICTURES["png"]).refused]
    data = place.write("own.json", own_records(names))
    flags = ["--data", data, "--image-folder", place.folder / "images", "--out", place.folder / "shards"]
    flags += ["--tokenizer", TOKENIZER, "--template", "qwen_2", "--max-bad-fraction", 0.2]
    said = [
        f"of {len(names) + 10} records",
        f"bad             {len(refused)} (",
        "one colour      5 of ",
        "without labels  0 samples",
    ]
    Case("make", "make-shards", lambda _: flags, 0, said, ["Warning"]).run(place)
    reader = ShardReader(place.folder / "shards")
    listed = [json.loads(line)["id"] for line in (reader.folder / "skipped.jsonl").read_text().splitlines()]
    held = [json.loads(reader.record_bytes(number)) for number in range(len(reader))]
    assert sorted(listed) == sorted(refused) and len(names) - len(refused) >= 30
    assert sorted([*listed, *(record["id"] for record in held[:-10])]) == sorted(names)

    def train(place: Place) -> Sequence[object]:
        return [
            *("--load", place.base, "--data-path", reader.folder, "--save", place.folder / "run", "--num-workers", 0),
            *("--training-stage", "finetune", "--template", "qwen_2", "--seq-length", 256, "--train-epochs", 1),
            *("--no-pack", "--micro-batch-size", 8, "--global-batch-size", 8, "--max-bad-fraction", 0),
        ]

    Case("train", "train", train, 0, ["finished"], ["Warning"]).run(place)
    steps = [json.loads(line) for line in (place.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["consumed_samples"] >= len(reader) and all(step["applied"] for step in steps)
    assert sum(step["bad_samples"] + step["skipped_samples"] + step["ignored_samples"] for step in steps) == 0
    assert sum(step["num_images"] for step in steps) >= reader.num_images
    assert list((place.folder / "run").glob("iter_*"))
