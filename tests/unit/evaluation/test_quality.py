"""PSNR and SSIM beside those of scikit-image."""

from __future__ import annotations

import pytest
import torch

from ross_mcore.evaluation.quality import psnr, ssim


def test_the_values_are_those_of_scikit_image() -> None:
    """Recorded with scikit-image 0.26.0 of the same pictures, [H, W, 3]: peak_signal_noise_ratio(data_range=1), and
    structural_similarity(data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False).
    """
    y, x = torch.arange(24.0, dtype=torch.float64)[:, None], torch.arange(20.0, dtype=torch.float64)[None]
    original = torch.stack([(x * 13 + y * 7 + c * 40) % 256 for c in range(3)]) / 255
    other = torch.stack([(x * 11 + y * 9 + c * 50 + (x * y) % 17) % 256 for c in range(3)]) / 255
    pair = torch.stack([original] * 3), torch.stack([other, (original * 0.9 + 0.03).clamp(0, 1), original])
    assert psnr(*pair).tolist() == pytest.approx([10.535675366191438, 29.09886939661364, 100])
    assert ssim(*pair).tolist() == pytest.approx([0.394591195069218, 0.9934202241198976, 1])
