"""Checks the compiled packages of an image against the needs of ross_mcore; used by docker/Dockerfile.

  python docker/check_image.py --pins            packages that must not be replaced, as constraints for pip
  python docker/check_image.py [--base FILE]     the versions; exit status 1 if a package is missing or does not fit

It imports none of the libraries: an image is built on machines without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

HELD = ("torch", "torchvision", "triton", "pytorch-triton", "numpy")
"""Compiled packages, and the packages they were built against. Nothing that pip installs needs Transformer Engine,
flash-attn or Apex, so pip does not replace them."""
RANGES = {"torch": ">=2.7", "transformer-engine": ">=2.9.0a0,<2.12.0"}
"""From setup.py and from megatron-core 0.16.1's extra `dev`."""
FLASH_ATTENTION = {"2.9": ">=2.7.3,<=2.8.1", "2.10": ">=2.7.3,<=2.8.3", "2.11": ">=2.7.3,<=2.8.3"}
"""Versions of flash-attn that a version of Transformer Engine takes on every GPU. It computes without any other. From
its pytorch/attention/dot_product_attention/utils.py: `max_version`, `version_required_blackwell`."""
APEX = "fused_weight_gradient_mlp_cuda"


def version(package: str) -> str | None:
    """The installed version; None if there is none. transformer-engine and transformer_engine are one name."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pins() -> list[str]:
    found = {package: version(package) for package in HELD}
    return [f"{package}=={installed}" for package, installed in found.items() if installed]


def ranges() -> dict[str, str]:
    """Package -> the versions that fit, of flash-attn those that fit the installed Transformer Engine."""
    engine = ".".join((version("transformer-engine") or "").split(".")[:2])
    return {**RANGES, "flash-attn": FLASH_ATTENTION.get(engine, FLASH_ATTENTION["2.9"])}


def problems(base: list[str]) -> list[str]:
    """Packages that are missing, do not fit, or differ from `base`."""
    from packaging.specifiers import SpecifierSet

    found = [f"{pin} was replaced by {version(pin.split('==')[0])}" for pin in base if pin not in pins()]
    for package, allowed in ranges().items():
        installed = version(package)
        if installed is None:
            found.append(f"{package} is not installed ({allowed})")
        elif not SpecifierSet(allowed).contains(installed.split("+")[0], prereleases=True):
            why = f", which Transformer Engine {version('transformer-engine')} takes" if package == "flash-attn" else ""
            found.append(f"{package} {installed} is not {allowed}{why}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pins", action="store_true", help="print the constraints and nothing else")
    parser.add_argument("--base", type=Path, metavar="FILE", help="constraints that must still hold")
    options = parser.parse_args()
    if options.pins:
        print("\n".join(pins()))
        return 0
    for package in dict.fromkeys((*HELD, *ranges(), "apex", "megatron-core", "transformers", "diffusers")):
        print(f"{package}: {version(package) or 'not installed'}")
    has_fusion = importlib.util.find_spec(APEX) is not None
    print(f"{APEX}, for --gradient-accumulation-fusion: {'installed' if has_fusion else 'not installed; optional'}")
    found = problems(options.base.read_text(encoding="utf-8").split() if options.base else [])
    for problem in found:
        print(f"check_image: {problem}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
