"""What training sees of a data set is what the tools print: no record is lost in silence, and much loss is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from PIL import Image

from tests.cases.case import TOKENIZER, Case, Place, conversation

Records = Callable[[Place], Sequence[Any]]


def making(records: Records, *flags: object) -> Callable[[Place], Sequence[object]]:
    """Arguments of make-shards for these records, with pictures a.jpg and black.png in the image folder."""

    def make(place: Place) -> Sequence[object]:
        place.picture()
        place.write("images/black.png", black())
        data = place.write("data.json", records(place))
        return [
            *("--data", data, "--image-folder", place.folder / "images", "--out", place.folder / "shards"),
            *("--tokenizer", TOKENIZER, "--template", "qwen_2", *flags),
        ]

    return make


def black() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (30, 20)).save(stream, "PNG")
    return stream.getvalue()


def missing(count: int, of: int) -> Records:
    """`count` of `of` records have a picture that does not exist."""
    names = [f"coco/{number}.jpg" if number < count else "a.jpg" for number in range(of)]
    return lambda _: [{"image": name, "conversations": conversation()} for name in names]


def text_only(count: int) -> list[Any]:
    return [{"conversations": conversation("Why?", "So.")} for _ in range(count)]


def nothing_is_left(place: Place) -> None:
    """No data set and nothing half-written, only the list of the records left out."""
    assert not (place.folder / "shards").exists() and not list(place.folder.glob(".*"))
    lines = (place.folder / "shards.skipped.jsonl").read_text().splitlines()
    assert {json.loads(line)["outcome"] for line in lines} == {"bad"}


FIRST = "the image cannot be read (first: record 0, image 'coco/0.jpg': No such file"
CASES = [
    Case(
        "fifteen_of_sixteen_pictures_missing",
        "make-shards",
        making(missing(15, 16)),
        2,
        [
            "15 of 16 records are bad, over --max-bad-fraction 0.001, so nothing was written: 15 x",
            FIRST,
        ],
        holds=nothing_is_left,
        source="LLaVA#1618, LLaVA#546",
    ),
    Case(
        "another_image_folder_with_text_only_records",
        "make-shards",
        making(lambda place: [*missing(20, 20)(place), *text_only(500)]),
        2,
        ["20 of 520 records are bad", "with --max-bad-fraction 0.039"],
        holds=nothing_is_left,
    ),
    Case(
        "a_bad_record_that_is_allowed",
        "make-shards",
        making(missing(1, 4), "--max-bad-fraction", 0.25),
        0,
        [
            "3 samples, 3 pictures, of 4 records",
            "bad             1 (25.00%)",
            "the image cannot be read (000000000)",
        ],
    ),
    Case(
        "over_the_bounds_is_not_bad",
        "make-shards",
        making(
            lambda _: [{"image": ["a.jpg"] * 3, "conversations": conversation()}, *text_only(1)],
            "--max-images-per-sample",
            2,
        ),
        0,
        ["skipped         1 (50.00%)", "1 x it has over 2 pictures (000000000)", "bad             0\n"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, place: Place) -> None:
    case.run(place)


def messy(_: Place) -> list[Any]:
    """Records of all kinds."""
    silent = conversation(answer="")
    return [
        *[{"image": "a.jpg", "conversations": conversation()} for _ in range(3)],
        {"image": ["a.jpg", "a.jpg"], "conversations": conversation()},
        *text_only(2),
        *[{"conversations": conversation("Why?", "")} for _ in range(2)],
        *[{"image": "a.jpg", "conversations": silent} for _ in range(3)],
        {"image": "missing.jpg", "conversations": conversation()},
        {"image": ["a.jpg"] * 65, "conversations": conversation()},
        {"conversations": conversation()},
        {"conversations": conversation("<video>\nWhat is this?")},
        {"image": ["a.jpg", "a.jpg"], "conversations": conversation("<image><image><image> What?")},
        {"image": "black.png", "conversations": conversation("What is this?")},
        {"image": "a.jpg", "conversations": [*conversation(), *conversation("And?")[:1]]},
        {"image": "a.jpg", "conversations": conversation(answer="So. ASSISTANT: And so.")},
        "no record",
    ]


SAID = [
    "14 samples, 11 pictures, of 20 records",
    "trained on      12 (60.00%)",
    "placeholders    3 without a picture",
    "2 x <image> (000000013, 000000015)",
    "1 x <video> (000000014)",
    "pictures        11 (samples of text only: 4, of several: 1)",
    "7 samples, 5 of them train on their pictures alone",
    "5 x every answer is empty",
    "1 x the last turn is the human's (000000017)",
    "1 x a turn contains the template's own ASSISTANT (000000018)",
    "one colour      1 of 11 pictures",
    "1 x black (000000016)",
]


def test_training_sees_what_the_tool_printed(place: Place) -> None:
    """An epoch, sample by sample: what it ignores and skips is what the account counts."""
    account: dict[str, Any] = {}

    def train(place: Place) -> Sequence[object]:
        make = making(messy, "--max-bad-fraction", 1)
        Case("make", "make-shards", make, 0, SAID).run(place)
        account.update(json.loads((place.folder / "shards" / "index.json").read_text())["account"])
        return [
            *("--load", place.base, "--data-path", place.folder / "shards", "--save", place.folder / "run"),
            *("--template", "qwen_2", "--training-stage", "finetune", "--seq-length", 128, "--num-workers", 0),
            *("--train-epochs", 1, "--no-pack", "--global-batch-size", 14),
        ]

    Case("train", "train", train, 0, ["finished"]).run(place)
    steps = [json.loads(line) for line in (place.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    sums = {name: sum(step[name] for step in steps) for name in ("bad_samples", "ignored_samples", "skipped_samples")}
    empty = account["skipped"]["no picture and no label"]["count"]
    silent = sum(about["count"] for about in account["without_labels"].values())
    assert sums == {"bad_samples": 0, "ignored_samples": silent - empty, "skipped_samples": empty}
    assert steps[-1]["consumed_samples"] == account["trained"] + empty
    assert (account["records"], account["trained"], empty, silent) == (20, 12, 2, 7)
