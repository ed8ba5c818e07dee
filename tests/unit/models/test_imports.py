"""Importing these modules is cheap: neither megatron nor Hugging Face code is loaded before something is built."""

from __future__ import annotations

import subprocess
import sys

MODULES = ["projector", "vision", "image_tokens", "denoiser", "diffusion", "pixel_decoder"]


def test_imports_are_cheap():
    script = f"""
import sys
for name in {MODULES!r}:
    __import__("ross_mcore.models." + name)
print([name for name in ("megatron", "transformers", "diffusers", "torchvision") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
