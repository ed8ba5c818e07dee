"""Synthetic pictures, captions and chats for the demo, in the LLaVA layout.

A scene is one to four identical shapes on white ground, at most one in each quadrant of a 64-pixel picture. Radius and
position vary a little, so that no two pictures need be the same. Five of the 30 colour-shape pairs never occur in a
training set: questions about them show whether a model combines known colours and shapes.

All output is a function of explicit seeds; only the command line writes files.

    python examples/demo/scenes.py --out demo_data --count 3000 --seed 1 --eval-seed 2
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

PICTURE_PIXELS = 64
QUADRANT_PIXELS = PICTURE_PIXELS // 2
GROUND = (255, 255, 255)
GREY = (127, 127, 127)
OVERSAMPLING = 4
RADIUS_PIXELS = (10.0, 12.0)
JITTER_PIXELS = 1.0
STEPS_PER_PIXEL = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 20, 20),
    "green": (0, 185, 60),
    "blue": (20, 50, 240),
    "yellow": (255, 220, 0),
    "pink": (255, 70, 210),
    "black": (0, 0, 0),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
COUNTS = ("one", "two", "three", "four")
NOTHING = "nothing"
QUESTION_KINDS = ("colour", "shape", "count", "place")
ARRANGEMENTS: dict[tuple[int, ...], str] = {
    (0, 1): "top",
    (2, 3): "bottom",
    (0, 2): "left",
    (1, 3): "right",
    (0, 3): "diagonal",
    (1, 2): "diagonal",
    (0, 1, 2, 3): "everywhere",
}

Pair = tuple[str, str]
ALL_PAIRS: tuple[Pair, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT_PAIRS: tuple[Pair, ...] = (
    ("red", "circle"),
    ("green", "square"),
    ("blue", "triangle"),
    ("yellow", "cross"),
    ("pink", "ring"),
)
TRAINING_PAIRS: tuple[Pair, ...] = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)


@dataclass(frozen=True)
class Scene:
    """The contents of a picture.

    Attributes:
        colour: A key of ``COLOURS``, the same for every shape of the scene.
        shape: One of ``SHAPES``, the same for every shape of the scene.
        quadrants: Indices into ``PLACES`` that hold a shape, ascending.
        radius: Radius of every shape in pixels.
        offsets: One (right, down) shift in pixels from the quadrant's centre for each entry of ``quadrants``.
    """

    colour: str
    shape: str
    quadrants: tuple[int, ...]
    radius: float
    offsets: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if self.colour not in COLOURS or self.shape not in SHAPES:
            raise ValueError(f"unknown pair {self.colour!r} {self.shape!r}")
        if len(self.quadrants) != len(self.offsets):
            raise ValueError(f"{len(self.quadrants)} quadrants but {len(self.offsets)} offsets")

    def name_in(self, quadrant: int) -> str:
        """Name the contents of a quadrant: ``"blue circle"`` or ``"nothing"``."""
        return f"{self.colour} {self.shape}" if quadrant in self.quadrants else NOTHING

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scene:
        """Rebuild a scene from the ``scene`` field of a record (JSON turns the tuples into lists)."""
        return cls(
            colour=values["colour"],
            shape=values["shape"],
            quadrants=tuple(values["quadrants"]),
            radius=values["radius"],
            offsets=tuple((right, down) for right, down in values["offsets"]),
        )


def sample_scene(rng: random.Random, pair: Pair | None = None, count: int | None = None) -> Scene:
    """Draw a scene, by default with any of ``TRAINING_PAIRS`` and any count from one to four."""

    def sample_pixels(low: float, high: float) -> float:
        return rng.randint(round(low * STEPS_PER_PIXEL), round(high * STEPS_PER_PIXEL)) / STEPS_PER_PIXEL

    colour, shape = pair or rng.choice(TRAINING_PAIRS)
    quadrants = tuple(sorted(rng.sample(range(len(PLACES)), count or rng.randint(1, len(PLACES)))))
    radius = sample_pixels(*RADIUS_PIXELS)
    offsets = tuple(
        (sample_pixels(-JITTER_PIXELS, JITTER_PIXELS), sample_pixels(-JITTER_PIXELS, JITTER_PIXELS)) for _ in quadrants
    )
    return Scene(colour, shape, quadrants, radius, offsets)


def sample_training_scenes(count: int, key: str) -> list[Scene]:
    """Draw ``count`` different scenes of the training pairs; the same ``key`` gives the same scenes."""
    rng = random.Random(key)
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scenes[sample_scene(rng)] = None
    return list(scenes)


def sample_evaluation_scenes(
    repeats: int, key: str, pairs: Sequence[Pair], exclude: Iterable[Scene] = ()
) -> list[Scene]:
    """Draw ``repeats`` different scenes of each pair and count, none of them in ``exclude``."""
    rng = random.Random(key)
    seen = set(exclude)
    scenes: list[Scene] = []
    for _ in range(repeats):
        for pair in pairs:
            for count in range(1, len(PLACES) + 1):
                while (scene := sample_scene(rng, pair, count)) in seen:
                    pass
                seen.add(scene)
                scenes.append(scene)
    return scenes


def sample_paint(rng: random.Random, shape: str) -> tuple[int, int, int]:
    """Draw a colour without a name, but none whose nearest name is that of a held-out pair with ``shape``."""
    while True:
        paint = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        if (nearest_colour(paint), shape) not in HELD_OUT_PAIRS:
            return paint


def nearest_colour(paint: tuple[int, int, int]) -> str:
    """Return the key of ``COLOURS`` that is nearest to a colour."""
    return min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name], paint, strict=True)))


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: Any) -> None:
    """Draw one of ``SHAPES`` around (x, y); all sizes are in pixels of ``draw``."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        half = 0.88 * radius
        draw.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x + radius, y + 0.85 * radius), (x - radius, y + 0.85 * radius)], fill=colour)
    elif shape == "cross":
        arm = 0.36 * radius
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
    elif shape == "ring":
        hole = 0.5 * radius
        draw.ellipse(box, fill=colour)
        draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=GROUND)
    else:
        raise ValueError(f"unknown shape {shape!r}")


def draw_scene(scene: Scene, paint: tuple[int, int, int] | None = None) -> Image.Image:
    """Draw a scene with smooth edges: an RGB picture of ``PICTURE_PIXELS`` square.

    Args:
        scene: What to draw.
        paint: Used instead of the scene's own colour.
    """
    side = PICTURE_PIXELS * OVERSAMPLING
    picture = Image.new("RGB", (side, side), GROUND)
    draw = ImageDraw.Draw(picture)
    for quadrant, (right, down) in zip(scene.quadrants, scene.offsets, strict=True):
        row, column = divmod(quadrant, 2)
        x = (column + 0.5) * QUADRANT_PIXELS + right
        y = (row + 0.5) * QUADRANT_PIXELS + down
        draw_shape(
            draw,
            scene.shape,
            x * OVERSAMPLING,
            y * OVERSAMPLING,
            scene.radius * OVERSAMPLING,
            paint or COLOURS[scene.colour],
        )
    return picture.reduce(OVERSAMPLING)


def plural(shape: str) -> str:
    """Return the plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


def listed(words: Sequence[str]) -> str:
    """Join words as a sentence does: ``a, b and c``."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def write_caption(scene: Scene) -> str:
    """Describe a scene: ``three blue circles at top-left, top-right and bottom-left``."""
    places = [PLACES[quadrant] for quadrant in scene.quadrants]
    noun = scene.shape if len(places) == 1 else plural(scene.shape)
    return f"{COUNTS[len(places) - 1]} {scene.colour} {noun} at {listed(places)}"


def ask(scene: Scene, kind: str) -> tuple[str, str]:
    """Return a question of one of ``QUESTION_KINDS`` and its answer of one word.

    The question about the place depends on the count: one shape has a corner, three leave a corner free.
    """
    if kind == "colour":
        return "What colour is this?", scene.colour
    if kind == "shape":
        return "What shape is this?", scene.shape
    if kind == "count":
        return "How many are there?", COUNTS[len(scene.quadrants) - 1]
    if kind == "place":
        if len(scene.quadrants) == 1:
            return "Where is it?", PLACES[scene.quadrants[0]]
        if len(scene.quadrants) == 3:
            return "Where is the gap?", next(
                place for quadrant, place in enumerate(PLACES) if quadrant not in scene.quadrants
            )
        return "Where are they?", ARRANGEMENTS[scene.quadrants]
    raise ValueError(f"unknown kind of question {kind!r}, not one of {QUESTION_KINDS}")


def sample_chat(scene: Scene, rng: random.Random, rounds: int = len(QUESTION_KINDS)) -> list[tuple[str, str]]:
    """Draw questions of different kinds with their answers, in any order."""
    return [ask(scene, kind) for kind in rng.sample(QUESTION_KINDS, rounds)]


def _turns(rounds: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    turns: list[dict[str, str]] = []
    for number, (question, answer) in enumerate(rounds):
        turns.append({"from": "human", "value": f"<image>\n{question}" if number == 0 else question})
        turns.append({"from": "gpt", "value": answer})
    return turns


def caption_records(scenes: Sequence[Scene], folder: str) -> list[dict[str, Any]]:
    """Make one stage-1 record per scene: the image, then its caption."""
    return [
        {
            "id": f"{folder}-{number:05d}",
            "image": picture_path(folder, number),
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": write_caption(scene)}],
        }
        for number, scene in enumerate(scenes)
    ]


def chat_records(scenes: Sequence[Scene], folder: str, key: str, rounds: int) -> list[dict[str, Any]]:
    """Make one stage-2 record per scene: a chat of ``rounds`` rounds with answers of one word."""
    rng = random.Random(key)
    return [
        {
            "id": f"{folder}-{number:05d}",
            "image": picture_path(folder, number),
            "conversations": _turns(sample_chat(scene, rng, rounds)),
        }
        for number, scene in enumerate(scenes)
    ]


def question_records(scenes: Sequence[Scene], folder: str) -> list[dict[str, Any]]:
    """Make one record per scene and kind of question, with ``question_kind`` and ``scene`` to split results by."""
    return [
        {
            "id": f"{folder}-{number:05d}-{kind}",
            "image": picture_path(folder, number),
            "conversations": _turns([ask(scene, kind)]),
            "question_kind": kind,
            "scene": asdict(scene),
        }
        for number, scene in enumerate(scenes)
        for kind in QUESTION_KINDS
    ]


def guessing_rate(records: Sequence[dict[str, Any]]) -> float:
    """Return the share of records answered rightly by the best constant answer to each question.

    Args:
        records: Records of one question each, as ``question_records`` makes them.
    """
    answers: dict[str, Counter[str]] = {}
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"])
        answers.setdefault(question, Counter())[answer] += 1
    return sum(max(counter.values()) for counter in answers.values()) / len(records)


def picture_path(folder: str, number: int) -> str:
    """Return the path of a picture relative to the folder of the data set."""
    return f"images/{folder}/{number:05d}.png"


def write_dataset(out: Path, count: int, seed: int, eval_seed: int, eval_repeats: int, rounds: int) -> dict[str, Any]:
    """Write the pictures and the five JSON files; return their sizes and guessing rates.

    Args:
        out: Folder to write; made if missing.
        count: Training scenes.
        seed: Seed of the training scenes and chats.
        eval_seed: Seed of the evaluation pictures.
        eval_repeats: Held-out pictures of each training pair and count; each held-out pair and count twice as many.
        rounds: Rounds of a training chat.
    """
    training = sample_training_scenes(count, f"train/{seed}")
    heldout = sample_evaluation_scenes(eval_repeats, f"heldout/{eval_seed}", TRAINING_PAIRS, exclude=training)
    unseen = sample_evaluation_scenes(2 * eval_repeats, f"unseen/{eval_seed}", HELD_OUT_PAIRS)
    for folder, scenes in (("train", training), ("heldout", heldout), ("unseen_pairs", unseen)):
        (out / "images" / folder).mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scenes):
            draw_scene(scene).save(out / picture_path(folder, number))
    grey_path = "images/grey.png"
    Image.new("RGB", (PICTURE_PIXELS, PICTURE_PIXELS), GREY).save(out / grey_path)

    heldout_records = question_records(heldout, "heldout")
    files = {
        "pretrain.json": caption_records(training, "train"),
        "finetune.json": chat_records(training, "train", f"chats/{seed}", rounds),
        "heldout.json": heldout_records,
        "unseen_pairs.json": question_records(unseen, "unseen_pairs"),
        "grey.json": [{**record, "image": grey_path} for record in heldout_records],
    }
    summary: dict[str, Any] = {}
    for name, records in files.items():
        (out / name).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        summary[name] = {"records": len(records)}
        if "question_kind" in records[0]:
            summary[name]["guessing_rate"] = round(guessing_rate(records), 4)
    return summary


def main() -> None:
    """Write a data set from the command line."""
    parser = argparse.ArgumentParser(
        description="Write synthetic scenes as a LLaVA data set: pretrain.json (captions), finetune.json (chats), "
        "heldout.json and unseen_pairs.json (one question per record), grey.json (the held-out questions "
        "over a blank grey picture) and the pictures under images/.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write, made if missing")
    parser.add_argument("--count", type=int, default=3000, help="training scenes")
    parser.add_argument("--seed", type=int, default=1, help="seed of the training scenes and chats")
    parser.add_argument(
        "--eval-seed",
        type=int,
        default=2,
        help="seed of the evaluation pictures; take a fresh one for figures that are to be published",
    )
    parser.add_argument(
        "--eval-repeats",
        type=int,
        default=1,
        help="held-out pictures of each pair and count, four questions each: 1 gives 100 pictures of training pairs "
        "and 40 of held-out pairs",
    )
    parser.add_argument("--rounds", type=int, default=4, help="rounds of a training chat, at most four")
    arguments = parser.parse_args()
    summary = write_dataset(**vars(arguments))
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
