"""Lays out pictures and their reconstructions in a grid."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def picture_grid(rows: list[Tensor], gap: int = 2) -> Tensor:
    """Rows of [K, 3, H, W] pictures in [0, 1] -> one picture [3, R (H + gap) + gap, K (W + gap) + gap], white gaps."""
    if len({tuple(row.shape) for row in rows}) != 1:
        raise ValueError(f"rows of a grid differ in shape: {[list(row.shape) for row in rows]}")
    pictures = torch.stack([row.cpu().float() for row in rows])
    pictures = pad(pictures, (gap, 0, gap, 0), value=1.0)  # [R, K, 3, H + gap, W + gap]
    count, columns, channels, height, width = pictures.shape
    grid = pictures.permute(2, 0, 3, 1, 4).reshape(channels, count * height, columns * width)
    return pad(grid, (0, gap, 0, gap), value=1.0)
