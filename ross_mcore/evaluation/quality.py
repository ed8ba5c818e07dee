"""How much a picture differs from its original: PSNR and SSIM.

Legend: K pictures, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
"""Constants of SSIM for values in [0, 1] (Wang et al. 2004, section III-B)."""
LEAST_ERROR = 1e-10
"""Equal pictures have a PSNR of 100 dB instead of an infinite one, which JSON cannot hold."""


def psnr(originals: Tensor, pictures: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of [K, 3, H, W] in [0, 1] -> [K], in dB."""
    errors = (originals.double() - pictures.double()).square().mean((1, 2, 3))
    return -10 * errors.clamp(min=LEAST_ERROR).log10()


def ssim(originals: Tensor, pictures: Tensor) -> Tensor:
    """Structural similarity of [K, 3, H, W] in [0, 1] -> [K]: the mean over channels and all whole windows.

    Gaussian window of 11 pixels and sigma 1.5 (Wang et al. 2004), as scikit-image's structural_similarity computes
    with gaussian_weights=True, sigma=1.5, use_sample_covariance=False. H and W are at least 11.
    """
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=originals.device) - WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weights = torch.outer(line, line)[None, None] / line.sum() ** 2

    def local_mean(values: Tensor) -> Tensor:
        count, channels, height, width = values.shape
        found: Tensor = F.conv2d(values.reshape(count * channels, 1, height, width), weights)
        return found.reshape(count, channels, *found.shape[2:])

    x, y = originals.double(), pictures.double()
    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    similarity: Tensor = numerator / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))
    return similarity.mean((1, 2, 3))
