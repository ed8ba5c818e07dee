"""Pictures and questions that are hard for the demo's model: small shapes, ten close colours, counts, relations.

A scene is one to six small shapes of one kind and colour, and a black dot, anywhere on white ground. Captions name only
the nearest of the demo's six colours and do not mention the dot, as captions from the web leave out detail; the
questions ask for it.

    python examples/demo/hard_scenes.py --out hard_data --count 3000 --heldout 250 --seed 1
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image, ImageDraw
from scenes import (
    GREY,
    GROUND,
    OVERSAMPLING,
    PICTURE_PIXELS,
    PLACES,
    SHAPES,
    draw_shape,
    listed,
    nearest_colour,
    picture_path,
    plural,
)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "orange": (240, 125, 25),
    "brown": (150, 85, 35),
    "yellow": (245, 210, 40),
    "lime": (150, 215, 40),
    "green": (20, 145, 60),
    "teal": (20, 150, 150),
    "blue": (35, 70, 220),
    "purple": (130, 45, 200),
    "pink": (245, 105, 195),
}
COUNTS = ("one", "two", "three", "four", "five", "six")
KINDS = ("colour", "shape", "count", "relation")
RELATIONS = (("left", "right"), ("above", "below"))
DOT = (0, 0, 0)
CELLS_PER_SIDE = 4
CELL_PIXELS = PICTURE_PIXELS // CELLS_PER_SIDE
RADIUS_PIXELS = (4.5, 6.0)
DOT_RADIUS_PIXELS = 5.0
JITTER_PIXELS = 2.0
CLEAR_PIXELS = 10.0
"""Least difference between the dot's distances to the middle of the shapes along the two axes."""

Point = tuple[float, float]


@dataclass(frozen=True)
class HardScene:
    """The contents of a picture.

    Attributes:
        colour: A key of ``COLOURS``.
        shape: One of ``SHAPES``.
        points: Middle (right, down) of each shape in pixels.
        dot: Middle of the dot.
        radius: Radius of every shape in pixels.
    """

    colour: str
    shape: str
    points: tuple[Point, ...]
    dot: Point
    radius: float

    def distances(self) -> tuple[float, float]:
        """How far the dot is to the right of and below the middle of the shapes, in pixels."""
        right, down = (self.dot[axis] - fmean(point[axis] for point in self.points) for axis in (0, 1))
        return right, down

    def relation(self) -> str:
        """Where the dot is, along the axis of the larger distance: ``left``, ``right``, ``above`` or ``below``."""
        right, down = self.distances()
        axis = abs(down) > abs(right)
        return RELATIONS[axis][(right, down)[axis] > 0]


def sample_scene(rng: random.Random) -> HardScene:
    """Draw a scene in which it is clear where the dot is."""

    def quarters(low: float, high: float) -> float:
        return rng.randint(round(4 * low), round(4 * high)) / 4

    colour, shape, count = rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.randint(1, len(COUNTS))
    while True:
        cells = (divmod(cell, CELLS_PER_SIDE) for cell in rng.sample(range(CELLS_PER_SIDE**2), count + 1))
        dot, *points = [
            tuple((place + 0.5) * CELL_PIXELS + quarters(-JITTER_PIXELS, JITTER_PIXELS) for place in (column, row))
            for row, column in cells
        ]
        scene = HardScene(colour, shape, tuple(points), dot, quarters(*RADIUS_PIXELS))
        right, down = map(abs, scene.distances())
        if abs(right - down) >= CLEAR_PIXELS:
            return scene


def sample_scenes(count: int, key: str, exclude: Iterable[HardScene] = ()) -> list[HardScene]:
    """Draw ``count`` different scenes, none of them in ``exclude``; the same ``key`` gives the same scenes."""
    rng, seen = random.Random(key), set(exclude)
    scenes: dict[HardScene, None] = {}
    while len(scenes) < count:
        if (scene := sample_scene(rng)) not in seen:
            scenes[scene] = None
    return list(scenes)


def draw_scene(scene: HardScene) -> Image.Image:
    """Draw a scene with smooth edges: an RGB picture of ``PICTURE_PIXELS`` square."""
    side = PICTURE_PIXELS * OVERSAMPLING
    picture = Image.new("RGB", (side, side), GROUND)
    draw = ImageDraw.Draw(picture)

    def put(shape: str, point: Point, radius: float, colour: tuple[int, int, int]) -> None:
        draw_shape(draw, shape, *(pixels * OVERSAMPLING for pixels in (*point, radius)), colour)

    for point in scene.points:
        put(scene.shape, point, scene.radius, COLOURS[scene.colour])
    put("circle", scene.dot, DOT_RADIUS_PIXELS, DOT)
    return picture.reduce(OVERSAMPLING)


def write_caption(scene: HardScene) -> str:
    """Describe a scene coarsely: ``three blue circles at top-left and bottom-left``."""
    quadrants = sorted(
        {2 * (down >= PICTURE_PIXELS / 2) + (right >= PICTURE_PIXELS / 2) for right, down in scene.points}
    )
    count, colour = len(scene.points), nearest_colour(COLOURS[scene.colour])
    noun = scene.shape if count == 1 else plural(scene.shape)
    return f"{COUNTS[count - 1]} {colour} {noun} at {listed([PLACES[number] for number in quadrants])}"


def ask(scene: HardScene, kind: str) -> tuple[str, str]:
    """Return a question of one of ``KINDS`` and its answer of one word."""
    answers = {
        "colour": ("What colour is this?", scene.colour),
        "shape": ("What shape is this?", scene.shape),
        "count": ("How many are there?", COUNTS[len(scene.points) - 1]),
        "relation": ("Where is the dot?", scene.relation()),
    }
    return answers[kind]


def record(number: int, folder: str, rounds: Sequence[tuple[str, str]], **more: Any) -> dict[str, Any]:
    """A LLaVA record of a picture and a conversation."""
    turns = []
    for question, answer in rounds:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}".strip()
    return {"id": f"{folder}-{number:05d}", "image": picture_path(folder, number), "conversations": turns, **more}


def guessing_rates(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return per kind of question the share of records that one constant answer gets right."""
    answers = {kind: Counter(r["conversations"][1]["value"] for r in records if r["kind"] == kind) for kind in KINDS}
    return {kind: max(counter.values()) / counter.total() for kind, counter in answers.items()}


def write_dataset(out: Path, count: int, heldout: int, seed: int) -> None:
    """Write pictures, pretrain.json (captions), finetune.json (chats), heldout.json and grey.json (one question each).

    Args:
        out: Folder to write; made if missing.
        count: Training scenes.
        heldout: Held-out scenes; none is a training scene.
        seed: Of all of them.
    """
    rng = random.Random(f"chats/{seed}")
    training = sample_scenes(count, f"hard/train/{seed}")
    others = sample_scenes(heldout, f"hard/heldout/{seed}", exclude=training)
    for folder, scenes in (("train", training), ("heldout", others)):
        (out / "images" / folder).mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scenes):
            draw_scene(scene).save(out / picture_path(folder, number))
    Image.new("RGB", (PICTURE_PIXELS, PICTURE_PIXELS), GREY).save(out / "images" / "grey.png")
    questions = [
        record(number, "heldout", [ask(scene, kind)], kind=kind)
        for number, scene in enumerate(others)
        for kind in KINDS
    ]
    chats = [[ask(scene, kind) for kind in rng.sample(KINDS, len(KINDS))] for scene in training]
    files = {
        "pretrain": [record(n, "train", [("", write_caption(scene))]) for n, scene in enumerate(training)],
        "finetune": [record(n, "train", chat) for n, chat in enumerate(chats)],
        "heldout": questions,
        "grey": [{**question, "image": "images/grey.png"} for question in questions],
    }
    for name, records in files.items():
        (out / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Write a data set from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write, made if missing")
    parser.add_argument("--count", type=int, default=3000, help="training scenes")
    parser.add_argument("--heldout", type=int, default=250, help="held-out scenes")
    parser.add_argument("--seed", type=int, default=1, help="seed of scenes and questions")
    arguments = parser.parse_args()
    write_dataset(arguments.out, arguments.count, arguments.heldout, arguments.seed)


if __name__ == "__main__":
    main()
