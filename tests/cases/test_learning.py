"""Runs that would learn nothing are refused at start, with the number that shows it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.cases.case import TOKENIZER, Case, Place, conversation


def training(place: Place, *flags: object, template: str = "qwen_2") -> Sequence[object]:
    """Arguments of a short run on four records with one picture each."""
    place.picture()
    data = place.write("data.json", [{"image": "a.jpg", "conversations": conversation()} for _ in range(4)])
    made = Case(
        "shards",
        "make-shards",
        lambda _: [
            *("--data", data, "--image-folder", place.folder / "images", "--out", place.folder / "shards"),
            *("--tokenizer", TOKENIZER, "--template", template),
        ],
        0,
    )
    made.run(place)
    return [
        *("--load", place.base, "--data-path", place.folder / "shards", "--save", place.folder / "run"),
        *("--template", template, "--training-stage", "finetune", "--train-iters", 1, "--num-workers", 0, *flags),
    ]


CASES = [
    Case("short_run", "train", lambda place: training(place, "--seq-length", 128), 0, ["finished"]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, place: Place) -> None:
    case.run(place)
