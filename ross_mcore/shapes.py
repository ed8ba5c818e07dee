"""Named shapes of tensors, and the differences between two sets of them.

Each module's file has a function `weight_shapes` that computes its shapes without building it. So config.json is
compared with a checkpoint before anything is built: a damaged one may have 4,096 layers, which take over 20 seconds
to build on the meta device, or for sizes that overflow there. Tests compare the shapes with the modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
"""Names of tensors -> shapes."""


def linear(name: str, out_features: int, in_features: int) -> Shapes:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def conv(name: str, out_channels: int, in_channels: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (out_channels, in_channels, kernel, kernel), f"{name}.bias": (out_channels,)}


def within(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


@dataclass(frozen=True)
class Difference:
    """A tensor whose shape differs between two sets; None: the set lacks it."""

    name: str
    expected: Shape | None
    found: Shape | None

    def in_words(self, source: str) -> str:
        """A line for people; `source` names the origin of the expected shapes."""
        if self.found is None:
            return f"tensor {self.name} is missing"
        if self.expected is None:
            return f"{source} knows no tensor {self.name}"
        return f"tensor {self.name} has shape {list(self.found)}, {source} says {list(self.expected)}"


def differences(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> list[Difference]:
    """The missing and unexpected tensors, and those of another shape, sorted by name."""
    compared = [Difference(name, expected.get(name), found.get(name)) for name in sorted(expected.keys() | found)]
    return [one for one in compared if one.expected != one.found]
