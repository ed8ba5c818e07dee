"""The ablation's pictures and statistics: answers are right, held-out scenes are new, differences are by seed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import ablation_results
import hard_scenes
import numpy as np
from ablation_results import Results
from hard_scenes import HardScene


def scene(**changes: Any) -> HardScene:
    values = {
        "colour": "teal",
        "shape": "cross",
        "points": ((8.0, 8.0), (8.0, 56.0)),
        "dot": (40.0, 40.0),
        "radius": 5.0,
    }
    return HardScene(**{**values, **changes})


def test_answers_and_caption_describe_the_scene() -> None:
    answers = {kind: hard_scenes.ask(scene(), kind)[1] for kind in hard_scenes.KINDS}
    assert answers == {"colour": "teal", "shape": "cross", "count": "two", "relation": "right"}
    assert hard_scenes.write_caption(scene()) == "two green crosses at top-left and bottom-left"
    dots = {"left": (1.0, 32.0), "above": (12.0, 2.0), "below": (12.0, 62.0)}
    assert {word: scene(dot=dot).relation() for word, dot in dots.items()} == {word: word for word in dots}


def test_a_picture_shows_each_shape_and_the_dot() -> None:
    pixels = np.asarray(hard_scenes.draw_scene(scene(shape="square")))
    for right, down in scene().points:
        assert tuple(pixels[int(down), int(right)]) == hard_scenes.COLOURS["teal"]
    assert tuple(pixels[40, 40]) == hard_scenes.DOT


def test_scenes_are_clear_and_every_answer_occurs() -> None:
    scenes = hard_scenes.sample_scenes(300, "test")
    assert min(abs(abs(r) - abs(d)) for r, d in (one.distances() for one in scenes)) >= hard_scenes.CLEAR_PIXELS
    sizes = {kind: len(Counter(hard_scenes.ask(one, kind)[1] for one in scenes)) for kind in hard_scenes.KINDS}
    assert sizes == {"colour": 10, "shape": 5, "count": 6, "relation": 4}


def test_held_out_scenes_are_new_and_a_blank_picture_has_the_same_questions(tmp_path: Path) -> None:
    training = hard_scenes.sample_scenes(40, "test")
    assert not {*training} & {*hard_scenes.sample_scenes(30, "test", exclude=training)}
    hard_scenes.write_dataset(tmp_path, count=6, heldout=4, seed=1)
    names = ("pretrain", "finetune", "heldout", "grey")
    data = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in names}
    assert [len(data[name]) for name in names] == [6, 6, 16, 16]
    pictures = {name: {(tmp_path / record["image"]).read_bytes() for record in data[name]} for name in names}
    assert not pictures["finetune"] & pictures["heldout"] and len(pictures["grey"]) == 1
    assert [r["conversations"] for r in data["heldout"]] == [r["conversations"] for r in data["grey"]]
    assert all(len(record["conversations"]) == 8 for record in data["finetune"])


def test_differences_are_taken_seed_by_seed() -> None:
    shares = {"plain": (0.5, 0.7), "other": (0.6, 0.9)}
    runs = [
        (
            name,
            seed,
            {"heldout": {"colour": share, "count": 0.3}, "grey": {"colour": 0.1, "count": 0.2}, "cpu_seconds": 9},
        )
        for seed in (0, 1)
        for name, share in ((name, values[seed]) for name, values in shares.items())
    ]
    results = Results.of(runs, {"colour": 0.1, "count": 0.2}, questions=20)
    assert results.baseline == "plain" and results.others == ["other"]
    assert np.allclose(results.differences("other", "colour"), [0.1, 0.2])
    assert np.allclose(results.differences("other", "all"), [0.05, 0.1])
    assert (
        results.finding("other") == "other against plain: better with each of 2 seeds (+5.0, +10.0 points; mean +7.5)"
    )
    results.right["other"]["all"][0] = 0.0
    assert "no consistent difference" in results.finding("other")
    picture = ablation_results.draw(results)
    assert picture.count("<circle") == 2 + 3 * (4 + 2)  # two in the legend; 3 kinds with 2 x 2 shares and 2 differences
