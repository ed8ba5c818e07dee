"""PURE: named shapes of tensors: how modules describe theirs, and how two sets of them differ.

Each file of a module has a function `weight_shapes`, which is arithmetic and builds nothing: config.json is compared
with a checkpoint before anything of the sizes it gives is built, and a damaged one may give 4,096 layers, which take
over 20 seconds to build on the meta device, or products of sizes that overflow there. Tests compare every description
with the module.
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
    """A tensor that two sets of shapes do not agree on; None where a set lacks it."""

    name: str
    expected: Shape | None
    found: Shape | None

    def in_words(self, source: str) -> str:
        """source: what the expected shapes come from."""
        if self.found is None:
            return f"tensor {self.name} is missing"
        if self.expected is None:
            return f"{source} knows no tensor {self.name}"
        return f"tensor {self.name} has shape {list(self.found)}, {source} says {list(self.expected)}"


def differences(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> list[Difference]:
    """The tensors that are missing, unexpected or of another shape, by name."""
    compared = [Difference(name, expected.get(name), found.get(name)) for name in sorted(expected.keys() | found)]
    return [one for one in compared if one.expected != one.found]
