"""What is compiled in an image, and whether it is what ross_mcore needs: for docker/Dockerfile, which says how.

  python docker/check_image.py --pins            what must not be replaced, as constraints for pip
  python docker/check_image.py [--base FILE]     the versions; exit status 1 when something is missing or does not fit

It imports none of the libraries: an image is built on machines without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

HELD = ("torch", "torchvision", "triton", "pytorch-triton", "numpy")
"""Compiled, or what compiled packages were built against. Transformer Engine, flash-attn and Apex are needed by nothing
that pip installs, so they are not touched."""
RANGES = {"torch": ">=2.7", "transformer-engine": ">=2.9.0a0,<2.12.0", "flash-attn": ">=2.1.1"}
"""Of setup.py, of megatron-core 0.16.1's extra `dev`, and of Transformer Engine 2.9.0."""
APEX = "fused_weight_gradient_mlp_cuda"


def version(package: str) -> str | None:
    """The installed version, None where there is none. transformer-engine and transformer_engine are one name."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pins() -> list[str]:
    found = {package: version(package) for package in HELD}
    return [f"{package}=={installed}" for package, installed in found.items() if installed]


def problems(base: list[str]) -> list[str]:
    """What is missing, does not fit, or is not what `base` names."""
    from packaging.specifiers import SpecifierSet

    found = [f"{pin} was replaced by {version(pin.split('==')[0])}" for pin in base if pin not in pins()]
    for package, allowed in RANGES.items():
        installed = version(package)
        if installed is None:
            found.append(f"{package} is not installed ({allowed})")
        elif not SpecifierSet(allowed).contains(installed.split("+")[0], prereleases=True):
            found.append(f"{package} {installed} is not {allowed}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pins", action="store_true", help="print the constraints and nothing else")
    parser.add_argument("--base", type=Path, metavar="FILE", help="constraints that must still hold")
    options = parser.parse_args()
    if options.pins:
        print("\n".join(pins()))
        return 0
    for package in dict.fromkeys((*HELD, *RANGES, "apex", "megatron-core", "transformers", "diffusers")):
        print(f"{package}: {version(package) or 'not installed'}")
    has_fusion = importlib.util.find_spec(APEX) is not None
    print(f"{APEX}, for --gradient-accumulation-fusion: {'there' if has_fusion else 'not there; optional'}")
    found = problems(options.base.read_text(encoding="utf-8").split() if options.base else [])
    for problem in found:
        print(f"check_image: {problem}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
