"""Judges the figures of trainings: success, agreement of two, speed. Pure functions."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LOSSES = ("lm_loss", "vm_loss")
WARM_UP = 4
"""First steps, left out of the speed."""
_LINE = re.compile(
    r"iteration +\d+/\d+ .*\| (?P<tokens>[\d,]+) tokens/s \| (?P<samples>[\d.]+) samples/s \| "
    r"(?P<teraflops>[\d.]+) TFLOP/s/device \| (?P<memory>[\d.]+) GiB"
)


@dataclass(frozen=True)
class Speed:
    """Tokens and samples per second, TFLOP/s per device; the highest peak memory of a rank in GiB."""

    tokens: float
    samples: float
    teraflops: float
    memory: float


def problem(steps: Sequence[dict[str, Any]], iterations: int, falls: bool = True) -> str | None:
    """The fault of a single training; None if it has none.

    steps: the objects of its metrics.jsonl; falls: whether its losses must fall from the first third to the last.
    """
    if [step["iteration"] for step in steps] != list(range(1, iterations + 1)):
        return f"{len(steps)} iterations are logged, expected 1 to {iterations}, each once"
    for step in steps:
        if not step["applied"]:
            return f"iteration {step['iteration']} was not applied: its losses or gradients are not finite"
    third = iterations // 3
    for name in LOSSES if falls else ():
        parts = [[step[name] for step in part if step[name] is not None] for part in (steps[:third], steps[-third:])]
        if not all(parts):
            return f"{name} is null in all of the first or of the last steps: they have no label or no image"
        first, last = map(statistics.mean, parts)
        if not last < first:
            return f"{name} does not fall: {first:.4f} over the first steps, {last:.4f} over the last"
    return None


def difference(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> float:
    """The largest relative difference of a step's losses; infinite if steps are missing or have other samples."""
    if len(ours) != len(theirs) or any(a["sample_digest"] != b["sample_digest"] for a, b in zip(ours, theirs)):
        return math.inf
    pairs = [(a[name], b[name]) for a, b in zip(ours, theirs) for name in LOSSES]
    if any(value is None for pair in pairs for value in pair):
        return math.inf
    return max((abs(a - b) / abs(b) for a, b in pairs), default=math.inf)


def stall(log: str) -> float | None:
    """The longest time in seconds for which a save blocked training; None without a save."""
    return max((float(found) for found in re.findall(r"training blocked for ([\d.]+) s", log)), default=None)


def planned(output: str) -> float | None:
    """GiB of the fullest rank in the table of tools/plan_layout.py; None if there is none."""
    found = re.findall(r"^ *\d+ +\d+ .* ([\d.]+) *$", output, re.MULTILINE)
    return max((float(gigabytes) * 1e9 / 2**30 for gigabytes in found), default=None)


def notes(log: str) -> list[str]:
    """What a program wants in the report."""
    return re.findall(r"^note: (.+)$", log, re.MULTILINE)


def speed(log: str) -> Speed | None:
    """The median over the console's lines after the first steps; None if there are too few."""
    found = [
        Speed(*(float(line[name].replace(",", "")) for name in ("tokens", "samples", "teraflops", "memory")))
        for line in _LINE.finditer(log)
    ]
    steady = found[WARM_UP:]
    if not steady:
        return None
    tokens, samples, teraflops = (
        statistics.median(getattr(line, name) for line in steady) for name in ("tokens", "samples", "teraflops")
    )
    return Speed(tokens, samples, teraflops, max(line.memory for line in found))
