"""What this process says of its device."""

from __future__ import annotations

import psutil
import torch

from ross_mcore import platform

MIB = 1 << 20


def test_the_peak_of_memory_rises_with_what_is_held_and_stays() -> None:
    """Up to 4 MiB: Linux keeps part of the count by thread."""
    before = platform.peak_memory_bytes()
    held = torch.ones(before - psutil.Process().memory_info().rss + 64 * MIB, dtype=torch.uint8)
    risen = platform.peak_memory_bytes()
    assert risen - before >= 60 * MIB
    del held
    assert platform.peak_memory_bytes() >= risen - 4 * MIB
