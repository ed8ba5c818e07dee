"""One figure of a run over its iterations, in a bounded number of points, however long the run is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_POINTS = 400
LARGEST = 1e30
"""Numbers above it are left out, as those that are not finite: their sums and scales mean nothing."""


@dataclass(frozen=True)
class Point:
    """The values of neighbouring iterations. iteration: the last of them."""

    iteration: int
    count: int
    mean: float
    least: float
    most: float


def joined(a: Point, b: Point) -> Point:
    count = a.count + b.count
    mean = (a.mean * a.count + b.mean * b.count) / count
    return Point(max(a.iteration, b.iteration), count, mean, min(a.least, b.least), max(a.most, b.most))


class Series:
    """Takes values in any order and keeps from MOST_POINTS / 2 to MOST_POINTS points of them.

    Every point covers as many iterations, a power of two that doubles when there are too many; none of the values is
    lost from count, mean, least and most.
    """

    def __init__(self, most_points: int = MOST_POINTS) -> None:
        self._points: dict[int, Point] = {}
        self._width, self._most = 1, most_points
        self.count = 0
        self.lowest: tuple[float, int] | None = None
        self.total = 0.0

    def add(self, iteration: int, value: float) -> None:
        if not -LARGEST <= value <= LARGEST:  # also false for NaN
            return
        self.count += 1
        self.total += value
        if self.lowest is None or value < self.lowest[0]:
            self.lowest = (value, iteration)
        slot, new = iteration // self._width, Point(iteration, 1, value, value, value)
        old = self._points.get(slot)
        self._points[slot] = new if old is None else joined(old, new)
        while len(self._points) > self._most:
            self._halve()

    def _halve(self) -> None:
        self._width *= 2
        halved: dict[int, Point] = {}
        for slot, point in self._points.items():
            before = halved.get(slot // 2)
            halved[slot // 2] = point if before is None else joined(before, point)
        self._points = halved

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    def points(self) -> list[Point]:
        return [self._points[slot] for slot in sorted(self._points)]


def fewer(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points: neighbours are joined in groups of equal number."""
    each = -(-len(points) // most)
    if each <= 1:
        return list(points)
    found = []
    for start in range(0, len(points), each):
        group = points[start]
        for point in points[start + 1 : start + each]:
            group = joined(group, point)
        found.append(group)
    return found


def smoothed(points: Sequence[Point]) -> list[float]:
    """Means over a fortieth of the run on both sides of each point, weighted by the number of values."""
    reach = max(1, len(points) // 40) if len(points) > 5 else 0
    found = []
    for at in range(len(points)):
        near = points[max(0, at - reach) : at + reach + 1]
        found.append(sum(point.mean * point.count for point in near) / sum(point.count for point in near))
    return found
