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
        self._slots: dict[int, list[float]] = {}
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
        self._merge(self._slots, iteration // self._width, [iteration, 1, value, value, value])
        while len(self._slots) > self._most:
            self._halve()

    def _halve(self) -> None:
        self._width *= 2
        halved: dict[int, list[float]] = {}
        for slot, values in self._slots.items():
            self._merge(halved, slot // 2, values)
        self._slots = halved

    @staticmethod
    def _merge(slots: dict[int, list[float]], slot: int, new: list[float]) -> None:
        """A slot holds the last iteration, count, sum, least and most: a list, because a run has millions of values."""
        if (old := slots.get(slot)) is None:
            slots[slot] = new
            return
        old[1] += new[1]
        old[2] += new[2]
        if new[0] > old[0]:
            old[0] = new[0]
        if new[3] < old[3]:
            old[3] = new[3]
        if new[4] > old[4]:
            old[4] = new[4]

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    def points(self) -> list[Point]:
        return [
            Point(int(iteration), int(count), total / count, least, most)
            for _, (iteration, count, total, least, most) in sorted(self._slots.items())
        ]


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
