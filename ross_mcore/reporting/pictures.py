"""Lays out pictures and their reconstructions in a grid."""

from __future__ import annotations

import torch
from torch import Tensor


def picture_grid(rows: list[Tensor], gap: int = 2) -> Tensor:
    """Rows of [K, 3, H, W] pictures in [0, 1] -> one picture [3, R (H + gap) + gap, K (W + gap) + gap], white gaps."""
    if len({tuple(row.shape) for row in rows}) != 1:
        raise ValueError(f"rows of a grid differ in shape: {[list(row.shape) for row in rows]}")
    count, channels, height, width = rows[0].shape
    grid = torch.ones(channels, len(rows) * (height + gap) + gap, count * (width + gap) + gap)
    for r, row in enumerate(rows):
        for k, picture in enumerate(row.cpu().float()):
            top, left = gap + r * (height + gap), gap + k * (width + gap)
            grid[:, top : top + height, left : left + width] = picture
    return grid
