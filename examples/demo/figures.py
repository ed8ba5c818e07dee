"""The demo's pictures: reconstructions, the steps of denoising, and the losses.

run_demo.py makes all of them. From a run that has finished, and into the documentation:

    python examples/demo/figures.py --run runs/demo --out docs

Legend: K pictures, H their side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ross_mcore.trained import TrainedModel

PICTURES_SHOWN, PICTURES_DENOISED = 8, 4
DENOISING_STEPS = (0, 1, 2, 4, 8, 16, 30, 49)
"""Shown of the 50 steps: most of what is seen is decided in the first ones."""
LABEL_PIXELS = 14
SMOOTHED_STEPS = 10

PANEL_WIDTH, PANEL_HEIGHT, MARGIN, GAP = 360, 220, 52, 20
LOSSES = {"lm_loss": "#2b6cb0", "vm_loss": "#c05621"}
STAGES = ("pretrain", "finetune")


def shown_of(count: int) -> slice:
    """The pictures that are shown; the stride is odd, because the counts of shapes cycle with period four."""
    return slice(0, None, count // PICTURES_SHOWN | 1)


def draw_grid(originals: Tensor, samples: Tensor, output: Path) -> None:
    """Some of K pictures [K, 3, H, H] over their reconstructions."""
    from ross_mcore.inference import as_picture
    from ross_mcore.reporting.pictures import picture_grid

    shown = shown_of(len(originals))
    as_picture(picture_grid([originals[shown], samples[shown]])).save(output)


def draw_denoising(trained: TrainedModel, pixels: Sequence[Tensor], output: Path) -> None:
    """One row per picture: the picture, what the denoiser takes it to be at some timesteps, and the sample."""
    import torch
    from PIL import Image, ImageDraw

    from ross_mcore.inference import as_picture, reconstruct
    from ross_mcore.reporting.pictures import picture_grid

    labels, columns = [], []

    def keep(timestep: int, estimate: Any) -> None:
        labels.append(f"t={timestep}")
        columns.append(estimate().cpu() if len(labels) - 1 in DENOISING_STEPS else None)

    originals, _ = reconstruct(trained, pixels, batch_size=len(pixels), on_step=keep)
    kept = [originals, *(column for column in columns if column is not None)]
    names = ["picture", *(label for label, column in zip(labels, columns, strict=True) if column is not None)]
    gap = 2
    grid = as_picture(picture_grid(list(torch.stack(kept, dim=1)), gap))
    picture = Image.new("RGB", (grid.width, grid.height + LABEL_PIXELS), "white")
    picture.paste(grid, (0, LABEL_PIXELS))
    draw, step = ImageDraw.Draw(picture), originals.shape[-1] + gap
    for column, name in enumerate(names):
        draw.text((gap + (column + 0.5) * step, LABEL_PIXELS / 2), name, fill="black", anchor="mm")
    picture.save(output, optimize=True)


def running_mean(values: Sequence[float]) -> list[float]:
    """Each value averaged with those before it, up to SMOOTHED_STEPS."""
    windows = (values[max(0, end - SMOOTHED_STEPS) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def draw_curves(metrics: dict[str, list[dict[str, Any]]], restarted_after: int | None, output: Path) -> None:
    """Both losses of each stage on a logarithmic axis, with the restart of the second marked, as SVG.

    metrics: stage -> its entries of metrics.jsonl; a loss over nothing is null and left out.
    """
    import math

    curves = {
        (stage, loss): running_mean([entry[loss] for entry in metrics[stage] if entry[loss]])
        for stage in STAGES
        for loss in LOSSES
    }
    every = [value for values in curves.values() for value in values]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    across = MARGIN + 2 * PANEL_WIDTH + GAP + 12

    def height(value: float) -> float:
        return MARGIN + (high - math.log10(value)) / (high - low) * PANEL_HEIGHT

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{across}" height="{PANEL_HEIGHT + 2 * MARGIN}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for power in range(low, high + 1):
        text = f'<text x="{MARGIN - 6}" y="{height(10**power) + 4:.1f}" text-anchor="end">{10**power:g}</text>'
        parts.append(text)
    for number, stage in enumerate(STAGES):
        left, steps = MARGIN + number * (PANEL_WIDTH + GAP), len(metrics[stage])
        right, bottom = left + PANEL_WIDTH, MARGIN + PANEL_HEIGHT
        for power in range(low, high + 1):
            parts.append(f'<path d="M{left},{height(10**power):.1f} H{right}" stroke="#ddd"/>')
        parts.append(f'<path d="M{left},{MARGIN} V{bottom} H{right}" fill="none" stroke="#444"/>')
        parts.append(f'<text x="{left + 4}" y="{MARGIN - 10}" font-size="14">{stage}</text>')
        parts.append(f'<text x="{left}" y="{bottom + 16}">step 1</text>')
        parts.append(f'<text x="{right}" y="{bottom + 16}" text-anchor="end">{steps}</text>')
        if stage == "finetune" and restarted_after:
            x = left + restarted_after / steps * PANEL_WIDTH
            parts.append(f'<path d="M{x:.1f},{MARGIN} V{bottom}" stroke="#444" stroke-dasharray="4 3"/>')
            parts.append(f'<text x="{x + 4:.1f}" y="{MARGIN + 14}">stopped and resumed</text>')
        for row, (loss, colour) in enumerate(LOSSES.items()):
            values = curves[stage, loss]
            points = " ".join(
                f"{left + (index + 1) / len(values) * PANEL_WIDTH:.1f},{height(value):.1f}"
                for index, value in enumerate(values)
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            x = right - 130 + 65 * row
            parts.append(f'<text x="{x}" y="{MARGIN - 10}" fill="{colour}">{loss}</text>')
    output.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def draw_curves_of(run: Path, restarted_after: int | None, output: Path) -> None:
    """The losses of the two stages of a run of the demo."""
    from ross_mcore.logs import METRICS_FILE, read_entries

    draw_curves({stage: list(read_entries(run / stage / METRICS_FILE)) for stage in STAGES}, restarted_after, output)


def main() -> None:
    """Draw the pictures of a finished run of the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of run_demo.py [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the pictures [%(default)s]")
    options = parser.parse_args()

    from ross_mcore.inference import reconstruct
    from ross_mcore.trained import load_model, read_picture

    summary = json.loads((options.run / "summary.json").read_text(encoding="utf-8"))
    draw_curves_of(options.run, summary["resume"]["stopped_after_iteration"], options.out / "demo_curves.svg")
    trained = load_model(options.run / "finetune")
    records = json.loads((options.run / "data" / "heldout.json").read_text(encoding="utf-8"))
    names = list(dict.fromkeys(record["image"] for record in records))
    pixels = [read_picture(options.run / "data" / name, trained.preprocessing("square")) for name in names]
    draw_grid(*reconstruct(trained, pixels, batch_size=64), options.out / "reconstruction.png")
    draw_denoising(trained, pixels[shown_of(len(pixels))][:PICTURES_DENOISED], options.out / "denoising.png")


if __name__ == "__main__":
    main()
