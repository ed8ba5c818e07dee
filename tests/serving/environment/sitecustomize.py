"""Read by every Python of the serving environment: lets torchvision's wheel import beside a CPU build of torch.

Its compiled operators then do not load, and it declares shapes of two that do not exist. Nothing here calls them.
"""

from __future__ import annotations

import sys
from typing import Any

OPERATORS = ("nms", "qnms")


class BeforeTorchvision:
    """Declares the operators just before torchvision is imported."""

    @classmethod
    def find_spec(cls, name: str, *_: Any) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(cls)  # type: ignore[arg-type]  # a class with find_spec is enough
        import torch

        try:
            torch.ops.load_library(str(compiled()))
        except OSError:
            cls.library = torch.library.Library("torchvision", "DEF")
            for operator in OPERATORS:
                cls.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def compiled() -> Any:
    from pathlib import Path

    return next((folder for path in sys.path if (folder := Path(path) / "torchvision" / "_C.so").exists()), "none")


sys.meta_path.insert(0, BeforeTorchvision)  # type: ignore[arg-type]  # as above
