"""The demo's scenes: equal seeds give equal files, held-out pairs do not leak, and names are recognised."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scenes
import templates
import texts
from PIL import Image

DEMO = Path(__file__).parents[3] / "examples" / "demo"


def make(out: Path, seed: int = 1, eval_seed: int = 2, count: int = 60) -> dict[str, Any]:
    return scenes.write_dataset(out, count=count, seed=seed, eval_seed=eval_seed, eval_repeats=1, rounds=4)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dataset")
    make(out)
    return out


def test_same_seeds_give_the_same_files(dataset: Path, tmp_path: Path) -> None:
    make(tmp_path)
    assert digests(tmp_path) == digests(dataset)


def test_eval_seed_changes_only_the_evaluation(dataset: Path, tmp_path: Path) -> None:
    make(tmp_path, eval_seed=3)
    before = digests(dataset)
    changed = {name for name, digest in digests(tmp_path).items() if digest != before[name]}
    assert {"heldout.json", "unseen_pairs.json", "grey.json"} <= changed
    assert not {name for name in changed if "train" in name or name in ("pretrain.json", "finetune.json")}


def test_known_scene_of_a_seed() -> None:
    """A recorded value: the draws do not depend on the Python version or the platform."""
    scene = scenes.sample_training_scenes(1, "train/1")[0]
    assert scenes.write_caption(scene) == "three yellow rings at top-left, top-right and bottom-right"


def test_held_out_pairs_are_never_in_a_training_set(dataset: Path) -> None:
    assert len(scenes.TRAINING_PAIRS) == 25
    for record in read(dataset / "pretrain.json"):
        words = record["conversations"][1]["value"].split()
        assert (words[1], words[2]) not in [
            (colour, noun) for colour, shape in scenes.HELD_OUT_PAIRS for noun in (shape, scenes.plural(shape))
        ]
    training = scenes.sample_training_scenes(500, "train/1")
    assert {(scene.colour, scene.shape) for scene in training} == set(scenes.TRAINING_PAIRS)
    unseen = {(record["scene"]["colour"], record["scene"]["shape"]) for record in read(dataset / "unseen_pairs.json")}
    assert unseen <= set(scenes.HELD_OUT_PAIRS)


def test_held_out_pairs_are_never_in_the_language_models_text() -> None:
    rng = random.Random(0)
    for _ in range(300):
        words = "".join(texts.sample_text(rng)).replace("?", " ").split()
        pairs = set(zip(words, words[1:], strict=False))
        for colour, shape in scenes.HELD_OUT_PAIRS:
            assert (colour, shape) not in pairs and (colour, scenes.plural(shape)) not in pairs


def test_no_held_out_picture_is_a_training_picture(dataset: Path) -> None:
    training = {digest for name, digest in digests(dataset).items() if name.startswith("images/train/")}
    others = {digest for name, digest in digests(dataset).items() if name.startswith(("images/held", "images/unseen"))}
    assert len(training) == 60 and len(others) == 140
    assert not training & others


def test_every_chat_answer_is_one_word(dataset: Path) -> None:
    answers = set()
    for name in ("finetune.json", "heldout.json", "unseen_pairs.json", "grey.json"):
        for record in read(dataset / name):
            turns = record["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert [turn["value"].startswith("<image>\n") for turn in turns] == [True] + [False] * (len(turns) - 1)
            answers |= {turn["value"] for turn in turns[1::2]}
    places = {*scenes.PLACES, *scenes.ARRANGEMENTS.values()}
    assert answers == {*scenes.COLOURS, *scenes.SHAPES, *scenes.COUNTS, *places}
    assert not any(" " in answer for answer in answers)


def test_records_point_at_pictures_of_what_they_say(dataset: Path) -> None:
    for record in read(dataset / "heldout.json"):
        scene = scenes.Scene.from_dict(record["scene"])
        with Image.open(dataset / record["image"]) as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(scenes.draw_scene(scene)))


def test_chat_asks_different_questions() -> None:
    scene = scenes.sample_training_scenes(1, "chat")[0]
    chat = scenes.sample_chat(scene, random.Random(0))
    assert len({question for question, _ in chat}) == len(scenes.QUESTION_KINDS) == 4


def test_caption_lists_places() -> None:
    scene = scenes.Scene("blue", "cross", (0, 1, 2), 11.0, ((0.0, 0.0),) * 3)
    assert scenes.write_caption(scene) == "three blue crosses at top-left, top-right and bottom-left"


def test_guessing_rate_is_the_best_constant_answer_per_kind() -> None:
    def record(kind: str, answer: str) -> dict[str, Any]:
        return {"question_kind": kind, "conversations": [{"value": f"{kind}?"}, {"value": answer}]}

    records = [record("colour", "red"), record("colour", "red"), record("colour", "blue"), record("count", "one")]
    assert scenes.guessing_rate(records) == 0.75


@pytest.mark.slow
def test_clean_renders_are_named_rightly() -> None:
    drawn = scenes.sample_evaluation_scenes(3, "names", scenes.ALL_PAIRS)
    pictures = [scenes.draw_scene(scene) for scene in drawn]
    assert templates.share_named_rightly(pictures, drawn) == 1.0
    assert templates.share_named_rightly(pictures, drawn, occupied_only=False) == 1.0


def test_wrong_pictures_are_not_named_rightly() -> None:
    drawn = scenes.sample_training_scenes(50, "names")
    blank = Image.new("RGB", (scenes.PICTURE_PIXELS, scenes.PICTURE_PIXELS), scenes.GROUND)
    assert templates.name_quadrants(blank) == [scenes.NOTHING] * 4
    assert templates.share_named_rightly([blank] * 50, drawn) == 0.0


@pytest.mark.parametrize("shape", [(64, 64), (32, 32, 3), (3, 64, 64)])
def test_namer_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        templates.name_quadrants(np.zeros(shape, dtype=np.uint8))


def test_namer_refuses_unequal_counts() -> None:
    with pytest.raises(ValueError, match="0 pictures for 1 scenes"):
        templates.share_named_rightly([], scenes.sample_training_scenes(1, "x"))
