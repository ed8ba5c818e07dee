"""Environment variables that a GPU's driver and torch's allocator read once, when the first GPU call is made.

`ross_mcore/__init__.py`, which runs before every module of the package, sets them where the user has not. So this file
imports no torch. On a machine without a GPU they have no effect.
"""

from __future__ import annotations

import os
import sys

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
"""1: kernels start in the order in which they were issued (platform.Libraries.ordered_kernels)."""
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Both names of the allocator's settings; torch 2.7 and 2.8 know the first only. With expandable segments, memory that
is free in pieces serves a larger request, as after a longer row."""


def prepare() -> None:
    """Sets the variables that are unset, unless this process uses a GPU already, where they would have no effect."""
    if "torch" in sys.modules:
        from ross_mcore import platform

        if platform.gpu_is_in_use():
            return
    os.environ.setdefault(CONNECTIONS, "1")
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
