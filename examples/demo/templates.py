"""Name the contents of a scene's picture by its nearest templates.

Each quadrant is compared with 31 templates: the 30 colour-shape pairs at the mean radius, centred, and an empty one.
The nearest template in mean squared error gives the name. It needs no training, so it can judge reconstructions.

Shapes: P = PICTURE_PIXELS, Q = QUADRANT_PIXELS.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scenes import ALL_PAIRS, NOTHING, PICTURE_PIXELS, PLACES, QUADRANT_PIXELS, RADIUS_PIXELS, Scene, draw_scene

Picture = Image.Image | NDArray[np.uint8]


def _split_quadrants(picture: Picture) -> NDArray[np.float64]:
    """Cut a picture [P, P, 3] into its quadrants [4, Q * Q * 3], values from 0 to 1."""
    pixels = np.asarray(picture)
    if pixels.shape != (PICTURE_PIXELS, PICTURE_PIXELS, 3) or pixels.dtype != np.uint8:
        raise ValueError(
            f"expected {PICTURE_PIXELS} x {PICTURE_PIXELS} RGB pixels in uint8, not {pixels.shape} in {pixels.dtype}"
        )
    blocks = pixels.reshape(2, QUADRANT_PIXELS, 2, QUADRANT_PIXELS, 3).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(len(PLACES), -1) / 255.0


@functools.cache
def _templates() -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Return the 31 names and their pixels [31, Q * Q * 3]."""
    names = [NOTHING]
    pixels = [np.ones(QUADRANT_PIXELS * QUADRANT_PIXELS * 3)]
    for colour, shape in ALL_PAIRS:
        scene = Scene(colour, shape, (0,), sum(RADIUS_PIXELS) / 2, ((0.0, 0.0),))
        names.append(scene.name_in(0))
        pixels.append(_split_quadrants(draw_scene(scene))[0])
    return tuple(names), np.stack(pixels)


def name_quadrants(picture: Picture) -> list[str]:
    """Name the four quadrants in the order of ``PLACES``: ``"blue circle"`` or ``"nothing"``.

    Args:
        picture: A PIL picture in RGB or uint8 pixels [P, P, 3].
    """
    names, templates = _templates()
    distances = np.square(_split_quadrants(picture)[:, None] - templates[None]).mean(axis=2)
    return [names[index] for index in distances.argmin(axis=1)]


def share_named_rightly(pictures: Sequence[Picture], scenes: Sequence[Scene], occupied_only: bool = True) -> float:
    """Return the share of quadrants whose colour and shape are both named as the scene has them.

    Args:
        pictures: Reconstructions.
        scenes: The expected scene of each.
        occupied_only: Count only quadrants that hold a shape, the stricter figure, because empty ones are easy.

    Raises:
        ValueError: The number of pictures is not the number of scenes, or there is nothing to count.
    """
    if not scenes or len(pictures) != len(scenes):
        raise ValueError(f"{len(pictures)} pictures for {len(scenes)} scenes")
    right = [
        name == scene.name_in(quadrant)
        for picture, scene in zip(pictures, scenes, strict=True)
        for quadrant, name in enumerate(name_quadrants(picture))
        if quadrant in scene.quadrants or not occupied_only
    ]
    return sum(right) / len(right)
