"""Tars that people bring: published WebDataset editions, other suffixes, keys with dots, and files that are no tar."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ross_mcore.commands import index_shards
from ross_mcore.data.image import decode_image
from ross_mcore.data.records import normalise
from ross_mcore.data.sample import ShardDataset
from ross_mcore.data.shard_reader import ShardReader
from ross_mcore.data.spec import SampleSpec
from tests.cases.case import TOKENIZER, Case, Place
from tests.unit.data.conftest import golden_data, model_config, tokenizer  # noqa: F401  fixtures

Members = Sequence[tuple[str, bytes]]
Turns = list[tuple[str, str]]
BASE_WIDTH = 16


def picture(number: int = 0, form: str = "JPEG") -> bytes:
    """A picture that is recognised by its width, BASE_WIDTH + number."""
    levels = np.random.default_rng(number).integers(0, 255, (12, BASE_WIDTH + number, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, form)
    return stream.getvalue()


def tar(members: Members) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return stream.getvalue()


def record(value: Any) -> bytes:
    return json.dumps(value).encode()


def llava(number: int = 1, answer: str = "A car.", **more: Any) -> bytes:
    """A LLaVA record that shows `number` pictures."""
    turns = [{"from": who, "value": text} for who, text in said(number, answer)]
    return record({**more, "conversations": turns})


def said(number: int = 1, answer: str = "A car.") -> Turns:
    return [("human", "<image>\n" * number + "What?"), ("gpt", answer)]


def chat(number: int = 1, system: str | None = None) -> list[dict[str, str]]:
    """The turns of `said` as role and content."""
    before = [] if system is None else [{"role": "system", "content": system}]
    roles = {"human": "user", "gpt": "assistant"}
    return before + [{"role": roles[who], "content": text} for who, text in said(number)]


JPEG, PNG = picture(), picture(1, "PNG")
CAT = [("human", "<image>"), ("gpt", "a cat")]


@dataclass(frozen=True)
class Tar:
    """A tar and what must come of it.

    `samples`: key -> (numbers of the pictures in order, turns); `bad`: key -> part of the reason; `says`: printed.
    """

    name: str
    members: Members
    samples: dict[str, tuple[list[int], Turns]] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    says: Sequence[str] = ()
    source: str = ""


def one(name: str, members: Members, pictures: list[int], turns: Turns | None = None, **more: Any) -> Tar:
    """A tar of the sample `k`."""
    return Tar(name, members, {"k": (pictures, said(len(pictures)) if turns is None else turns)}, **more)


FORMATS = (
    *[(suffix, "JPEG") for suffix in ("jpg", "JPG", "jpeg", "jpe", "jfif", "img", "image", "img0.jpg", "image.jpg")],
    *[(suffix, "PNG") for suffix in ("png", "left.png", "image_0.png", "0.png")],
    *(("webp", "WEBP"), ("gif", "GIF"), ("bmp", "BMP"), ("tif", "TIFF"), ("tiff", "TIFF"), ("avif", "AVIF")),
    *(("ppm", "PPM"), ("jp2", "JPEG2000")),
)
ONEVISION = "LLaVA-OneVision-1.5, tools/data_preprocess/convert_to_webdataset.py"
ENERGON = "Megatron-Energon, docs/source/basic/data_prep.md"
IMG2DATASET = {"caption": "a cat", "url": "u", "status": "success", "width": 16}
EDITION_B: Members = [
    *[("image_0.0_foo.v2.JPG", picture(1)), ("image_0.1_bar.png", picture(0, "PNG"))],
    ("image_0.json", record({"texts": chat(2), "media": "image", "name": ["0_foo.v2.JPG", "1_bar.png"]})),
    *[("image_1.0_z.jpg", picture(0)), ("image_1.1_a.jpg", picture(1))],
    ("image_1.json", record({"texts": chat(2, "Be brief."), "media": "image", "name": ["1_a.jpg", "0_z.jpg"]})),
    *[("image_2.jpg", picture(5)), ("image_2.json", record({"texts": chat(), "media": "image", "name": ["jpg"]}))],
    ("text_3.json", record({"texts": chat(0), "media": "text"})),
]
EDITION_B_SAMPLES = {
    "image_0": ([1, 0], said(2)),
    "image_1": ([1, 0], [("system", "Be brief."), *said(2)]),
    "image_2": ([5], said()),
    "text_3": ([], said(0)),
}

TARS = (
    *[one(f"suffix_{end}", [(f"k.{end}", picture(3, form)), ("k.json", llava())], [3]) for end, form in FORMATS],
    # which pictures, and their order
    one("numbers", [*((f"k.{n}.jpg", picture(n)) for n in (10, 3, 2)), ("k.json", llava(3))], [2, 3, 10]),
    one(
        "img", [*((f"k.img{n}.jpg", picture(n)) for n in (10, 3, 2)), ("k.json", llava(3))], [2, 3, 10], source=ENERGON
    ),
    one(
        "two_formats",
        [("k.0.jpg", JPEG), ("k.1.png", PNG), ("k.2.gif", picture(2, "GIF")), ("k.json", llava(3))],
        [0, 1, 2],
    ),
    one("mask", [("k.jpg", JPEG), ("k.seg.png", PNG), ("k.json", llava())], [0], says=["1 x .seg.png"]),
    one("image_mask", [("k.mask.png", PNG), ("k.image.jpg", JPEG), ("k.json", llava())], [0]),
    one(
        "left_right", [("k.left.png", PNG), ("k.right.jpg", JPEG), ("k.json", llava(2))], [1, 0], source="webdataset#20"
    ),
    one("named", [("k.a.jpg", JPEG), ("k.b.png", PNG), ("k.json", llava(2, image=["b.png", "a.jpg"]))], [1, 0]),
    one("one_named", [("k.a.jpg", JPEG), ("k.b.png", PNG), ("k.json", llava(image="x/k.b.png"))], [1]),
    one("made", [("k.0.jpg", JPEG), ("k.1.png", PNG), ("k.json", llava(2, image=["1.png", "0.jpg"]))], [0, 1]),
    # keys
    Tar(
        "dots",
        [
            *[("v1.0_a.jpg", JPEG), ("v1.0_a.json", llava(answer="a")), ("v1.0_b.png", PNG)],
            *[("v1.0_b.json", llava(answer="b")), ("d.x/1.5.0.jpg", JPEG), ("d.x/1.5.1.png", PNG)],
            *[("d.x/1.5.json", llava(2)), ("00000.12.jpg", JPEG), ("00000.12.txt", b"a cat")],
            *[("t.1.json", llava(0)), ("._v1.0_a.jpg", b"x"), ("__MACOSX/._v1.0_a.json", b"x")],
        ],
        {
            "v1.0_a": ([0], said(1, "a")),
            "v1.0_b": ([1], said(1, "b")),
            "d.x/1.5": ([0, 1], said(2)),
            "00000.12": ([0], CAT),
            "t.1": ([], said(0)),
        },
        source="webdataset#237, datasets#7150",
    ),
    one("open_clip", [("k.input.jpg", JPEG), ("k.outputs.txt", b"a cat")], [0], CAT, source="open_clip#480"),
    one("sidecar", [("k.jpg", JPEG), ("k.jpg.json", llava())], [0]),
    Tar(
        "sidecars_with_dots",
        [("1.5.jpg", JPEG), ("1.5.jpg.txt", b"a cat"), ("1.7.png", PNG), ("1.7.png.txt", b"a cat")],
        {"1.5": ([0], CAT), "1.7": ([1], CAT)},
    ),
    one(
        "columns",
        [
            ("k.id.txt", b"7"),
            ("k.image.jpg", JPEG),
            ("k.boxes.json", b"[[1]]"),
            ("k.b.json", b""),
            ("k.messages.json", record(chat())),
        ],
        [0],
        says=["1 x .id.txt, 1 x .boxes.json"],
    ),
    # published editions
    one("a_chat", [("k.jpg", JPEG), ("k.json", record(chat()))], [0], source=ONEVISION),
    one("a_turns", [("k.jpg", JPEG), ("k.json", record(json.loads(llava())["conversations"]))], [0]),
    one("a_messages", [("k.jpg", JPEG), ("k.json", record({"messages": chat()}))], [0]),
    Tar(
        "b_mix",
        [
            *EDITION_B,
            ("video_4.0_a.mp4", b"film"),
            ("video_4.json", record({"texts": chat(), "media": "video", "name": ["0_a.mp4"]})),
            ("image_5.json", record({"texts": chat(), "media": "image", "name": ["0_lost.jpg"]})),
        ],
        EDITION_B_SAMPLES,
        {"video_4": "looks like video", "image_5": "names 1 pictures and the shard has 0; its members: .json"},
        ["1 x .mp4"],
        source=ONEVISION,
    ),
    one(
        "c_captions",
        [
            *[("k.img0.jpg", JPEG), ("k.img1.png", PNG)],
            (
                "k.json",
                record({"prompts": ["What?", ""], "captions": ["a cat", "a dog"], "images": ["x/1.jpg", "x/2.jpg"]}),
            ),
        ],
        [0, 1],
        [("human", "<image>\nWhat?"), ("gpt", "a cat"), ("human", "<image>"), ("gpt", "a dog")],
        source=ONEVISION,
    ),
    one("img2dataset", [("k.jpg", JPEG), ("k.txt", b"a cat"), ("k.json", record(IMG2DATASET))], [0], CAT),
    one("caption_in_json", [("k.jpg", JPEG), ("k.json", record(IMG2DATASET))], [0], CAT),
    one("laion", [("k.jpg", JPEG), ("k.caption", b"a cat"), ("k.cls", b"3")], [0], CAT, says=["1 x .cls"]),
    one("dalle", [("k.img", JPEG), ("k.cap", b"a cat")], [0], CAT, source="clip-retrieval#14"),
    one(
        "energon",
        [("k.jpg", JPEG), ("k.txt", b"a cat"), ("k.detail.json", b"{}")],
        [0],
        CAT,
        says=["1 x .detail.json"],
        source=ENERGON,
    ),
    # what cannot be read is named
    Tar(
        "no_picture",
        [
            *[("ok.jpg", JPEG), ("ok.json", llava()), ("a.json", llava()), ("b.mp4", b"film"), ("b.json", llava())],
            *[("c.jpgs", pickle.dumps([JPEG])), ("c.json", llava()), ("d.svg", b"<svg/>")],
            *[("d.json", llava(image="d.svg")), ("e.img", b"no picture"), ("e.json", llava())],
            *[("f.txt", b"alone"), ("g.jpg", JPEG), ("h.a.jpg", JPEG), ("h.b.jpg", JPEG), ("h.json", llava(3))],
            *[("i.jpg", JPEG), ("i.question.txt", b"What?"), ("i.answer.txt", b"A cat.")],
            *[("j.jpg", JPEG), ("j.id.txt", b"7"), ("j.meta.json", b"{}")],
            *[("l.jpg", JPEG), ("l.a.json", llava()), ("l.b.json", llava())],
        ],
        {"ok": ([0], said())},
        {
            **dict.fromkeys("abc", "a placeholder without a picture: <image> in turn 1; its members: .json"),
            "d": "the record names 1 pictures and the shard has 0; its members: .json",
            "e": "a picture is undecodable",
            "f": "a caption with 0 pictures",
            "g": "neither .json nor .txt",
            "h": "3 <image> in the text, 2 pictures",
            "i": "neither .json nor .txt: its members are .jpg, .question.txt, .answer.txt",
            "j": "conversations is not a list of turns",
            "l": "several JSONs have a conversation: its members are .jpg, .a.json, .b.json",
        },
        ["1 x .mp4", "1 x .jpgs", "1 x .svg"],
    ),
)


def index(folder: Path, *flags: object) -> int:
    """The exit status of `ross index-shards` on a folder, in this process."""
    try:
        return index_shards.main(["--data-path", str(folder), "--num-workers", "0", *map(str, flags)])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("case", TARS, ids=lambda case: case.name)
def test_tar(
    case: Tar,
    tmp_path: Path,
    tokenizer: Any,  # noqa: F811
    model_config: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "0.tar").write_bytes(tar(case.members))
    status = index(tmp_path, "--max-bad-fraction", 1)
    said_here = capsys.readouterr()
    assert status == 0, said_here.err
    for text in case.says:
        assert text in said_here.out
    reader = ShardReader(tmp_path)
    dataset = ShardDataset(reader, tokenizer, model_config, SampleSpec("qwen_2", seq_length=256))
    found = {}
    for number, key in enumerate(reader.keys(range(len(reader)))):
        count = int(reader.samples[number]["num_images"])
        widths = [decode_image(reader.image_bytes(number, place)).picture.width - BASE_WIDTH for place in range(count)]
        turns = normalise(json.loads(reader.record_bytes(number)), count)["conversations"]
        found[key] = widths, [(turn["from"], turn["value"]) for turn in turns]
        sample = dataset.get(number, 0)
        assert sample.problem is None and len(sample.image_starts) == count and sample.label_tokens > 0
    assert found == case.samples
    lines = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    bad = {line["key"]: line["reason"] for line in lines}
    assert bad.keys() == case.bad.keys(), bad
    for key, reason in case.bad.items():
        assert reason in bad[key]


GOOD = tar([("k.jpg", JPEG), ("k.json", llava())])
NO_TARS: tuple[tuple[str, dict[str, bytes], Sequence[str]], ...] = (
    ("gzip_named_tar", {"a.tar": gzip.compress(GOOD)}, ["a shard is no tar: it is gzip data; unpack it with gunzip"]),
    ("bzip2_named_tar", {"a.tar": bz2.compress(GOOD)}, ["it is bzip2 data; unpack it with bunzip2"]),
    ("html", {"a.tar": b"\n<!DOCTYPE html><p>404"}, ["it is an HTML or XML page", "download the shard again"]),
    ("lfs", {"a.tar": b"version https://git-lfs.github.com/spec/v1\n"}, ["git lfs pull"]),
    ("empty", {"a.tar": b""}, ["1 x a shard is empty"]),
    (
        "only_gz",
        {"a.tar.gz": b"", "b.tgz": b""},
        ["no tar: it has 2 compressed archives (a.tar.gz, b.tgz): unpack"],
    ),
    ("in_folders", {"train/a.tar": GOOD}, ["the tars are in its folders train: give"]),
    ("in_inner_folders", {"a/shards/a.tar": GOOD}, ["the tars are in its folders a/shards: give those"]),
    ("other_files", {"a.parquet": b"", "b.parquet": b""}, ["it has 2 x .parquet"]),
    ("nothing", {}, ["names no tar: it has no files"]),
    (
        "unknown_members",
        {"a.tar": tar([("k.npy", b"x"), ("k.cls", b"3"), ("l.cls", b"3"), ("README", b"x")])},
        ["2 x .cls, 1 x .npy, 1 x no suffix", "the first members are k.npy, k.cls, l.cls", "a sample is KEY.json"],
    ),
    (
        "pictures_alone",
        {"a.tar": tar([("k.jpg", JPEG), ("k.cls", b"3")])},
        ["1 x it has neither .json nor .txt", "1 x .cls", "a sample is KEY.json"],
    ),
    (
        "other_folders",
        {"a.tar": tar([("images/k.jpg", JPEG), ("labels/k.json", llava())])},
        [
            "the first is 'images/k' of a.tar: it has neither",
            "1 x a placeholder without a picture",
            "in the same folder",
        ],
    ),
)


@pytest.mark.parametrize(("files", "says"), [case[1:] for case in NO_TARS], ids=[case[0] for case in NO_TARS])
def test_what_is_there_is_named(
    files: dict[str, bytes], says: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert index(tmp_path) == 2
    error = " ".join(capsys.readouterr().err.split())
    for text in says:
        assert text in error
    assert not (tmp_path / "index.json").exists()


def test_compressed_tars_beside_others_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data in {"a.tar": GOOD, "a.tar.gz": b"", "b.tar.gz": b""}.items():
        (tmp_path / name).write_bytes(data)
    assert index(tmp_path) == 0
    error = capsys.readouterr().err
    assert "b.tar.gz" in error and "a.tar.gz" not in error


def test_a_shard_that_is_no_tar_counts_as_its_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tar([member for n in range(4) for member in ((f"k{n}.jpg", JPEG), (f"k{n}.json", llava()))])
    for name, data in {"a.tar": good, "b.tar": gzip.compress(good), "c.tar": b"", "d.tar": tar([])}.items():
        (tmp_path / name).write_bytes(data)
    assert index(tmp_path) == 2
    assert "8 of 12 samples are bad" in (error := " ".join(capsys.readouterr().err.split()))
    assert "1 x a shard is no tar: it is gzip data" in error


def training(place: Place) -> Sequence[object]:
    """Arguments of a step on the LLaVA-OneVision-1.5 edition (b)."""
    place.write("data/0.tar", tar(EDITION_B))
    assert index(place.folder / "data", "--tokenizer", TOKENIZER, "--template", "qwen_2") == 0
    return [
        *("--load", place.base, "--data-path", place.folder / "data", "--save", place.folder / "run"),
        *("--template", "qwen_2", "--training-stage", "finetune", "--train-iters", 1, "--num-workers", 0),
        *("--seq-length", 256, "--tensor-model-parallel-size", 2),
    ]


def test_an_edition_is_trained_on_at_tensor_parallel_2(place: Place) -> None:
    Case("edition_b", "train", training, 0, ["finished"], ranks=2).run(place)
