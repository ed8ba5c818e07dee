"""The pictures that training wrote, small enough for a page that is sent by mail."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from ross_mcore.errors import ImageError
from ross_mcore.run_report.events import PictureAt, read_picture
from ross_mcore.run_report.html import named, section, text
from ross_mcore.run_report.reading import RunRecord

MOST_BYTES = 60_000
"""A PNG up to this size stays as it is; a larger one becomes a JPEG of up to MOST_WIDTH."""
MOST_WIDTH = 1280
SMALL_WIDTH = 480
"""Narrower pictures are shown at twice their size."""
MOST_ON_A_PAGE = 48
QUALITY = 82


def strips(runs: Sequence[RunRecord], most: int) -> str:
    """A strip of up to `most` pictures for each run, spread over its iterations."""
    return section("Reconstructions", *_all_strips(runs, min(most, MOST_ON_A_PAGE // len(runs))))


def _all_strips(runs: Sequence[RunRecord], most: int) -> list[str]:
    found = [strip for number, run in enumerate(runs) if (strip := _strip(number, run, most))]
    return [f'<div class="strips">{"".join(found)}</div>'] if found else []


def _strip(number: int, run: RunRecord, most: int) -> str:
    shown = ""
    for tag, places in run.events.pictures.items():
        chosen = spread(sorted(places), most)
        figures = [_figure(run, tag, places[iteration]) for iteration in chosen]
        if not any(figures):
            continue
        left = len(places) - len(chosen)
        note = f' <span class="faint">{left} of {len(places)} left out</span>' if left else ""
        slider = (
            f'<input type="range" min="0" max="{sum(map(bool, figures)) - 1}" value="0" hidden '
            f'aria-label="iteration of the picture of {text(run.name)}">'
        )
        shown += f'<div class="strip"><h3>{named(number, run.name)}{note}</h3>{slider}{"".join(figures)}</div>'
    return shown


def spread(iterations: Sequence[int], most: int) -> list[int]:
    """At most `most` of them, at equal distances, with the first and the last; one is the last."""
    if len(iterations) <= most:
        return list(iterations)
    if most < 2:
        return list(iterations[-most:]) if most else []
    return [iterations[round(n * (len(iterations) - 1) / (most - 1))] for n in range(most)]


def _figure(run: RunRecord, tag: str, place: PictureAt) -> str:
    """An empty text for a picture that cannot be read, which is counted as damaged."""
    try:
        kind, data, width = encoded(read_picture(place, tag))
    except (ImageError, ValueError, OSError):
        run.damaged["pictures"] += 1
        return ""
    alt = f"{tag} of {run.name} at iteration {place.iteration}: originals above, reconstructions below"
    shown = width * 2 if width < SMALL_WIDTH else width
    return (
        f'<figure data-iteration="{place.iteration}"><img alt="{text(alt)}" width="{shown}" '
        f'src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>iteration {place.iteration:,}: originals above, reconstructions below</figcaption></figure>"
    )


def encoded(data: bytes) -> tuple[str, bytes, int]:
    """A picture as `png` or `jpeg`, its bytes and its width in pixels. Raises ImageError."""
    from ross_mcore.data.image import decode_image

    picture, kind, _ = decode_image(data)
    if kind == "PNG" and len(data) <= MOST_BYTES:
        return "png", data, picture.width
    if picture.width > MOST_WIDTH:
        picture = picture.resize((MOST_WIDTH, max(1, picture.height * MOST_WIDTH // picture.width)))
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=QUALITY)
    return "jpeg", stream.getvalue(), picture.width
