"""One compared quantity is one row. How values are compared, printed and counted. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Status = Literal["ok", "FAIL", "instead", "unsupported", "not recorded", "not comparable"]

TOLERANCE = 1e-5
"""Relative to a tensor's largest recorded magnitude. Float32 sums in another order differ by some tens of eps (1.2e-7)
in a network of a few layers; a wrong constant, order or layout differs by at least 1e-3."""


_COLUMNS = "{:<16} {:<90} {:>22} {:>22} {:>9} {:>9} {:>9}  {}"
HEADER = _COLUMNS.format("family", "quantity", "ours", "recorded", "absolute", "relative", "tolerance", "status")


@dataclass(frozen=True)
class Row:
    """Statuses other than ok and FAIL are counted apart.

    `instead`: the reference raised or returned NaN; `ours` describes the behaviour of this trainer. `unsupported`:
    recorded, but not implemented here. `not recorded`: the folder lacks a value that the row needs. `not comparable`:
    the layout cannot host the model. Of the last three, `ours` is the reason.
    """

    family: str
    name: str
    ours: str
    recorded: str
    absolute: float | None
    relative: float | None
    tolerance: float | None
    status: Status

    def __str__(self) -> str:
        if self.status == "instead":
            return f"{self.family:<16} {self.name:<90} instead: recorded {self.recorded}; here {self.ours}"
        if self.status in ("unsupported", "not recorded", "not comparable"):
            return f"{self.family:<16} {self.name:<90} {self.status}: {self.ours}"
        figures = ("-" if v is None else f"{v:.1e}" for v in (self.absolute, self.relative, self.tolerance))
        return _COLUMNS.format(self.family, self.name, self.ours, self.recorded, *figures, self.status)


def compare(family: str, name: str, ours: Any, recorded: Any, tolerance: float = TOLERANCE, floor: float = 0.0) -> Row:
    """Compares two numbers or two tensors of one shape. A tensor is shown by its L2 norm.

    ok when the largest difference is within `tolerance` of the largest recorded magnitude, or within `floor`. Different
    shapes, empty tensors and NaN on either side fail.
    """
    mine, theirs = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (ours, recorded))
    if mine.shape != theirs.shape:
        return Row(
            family, name, f"shape {list(mine.shape)}", f"shape {list(theirs.shape)}", None, None, tolerance, "FAIL"
        )
    absolute = (mine - theirs).abs().max().item() if mine.numel() else math.nan
    scale = theirs.abs().max().item() if theirs.numel() else math.nan
    relative = absolute / scale if scale else (0.0 if absolute == 0 else math.inf)
    close = relative <= tolerance or absolute <= floor
    return Row(family, name, _show(mine), _show(theirs), absolute, relative, tolerance, "ok" if close else "FAIL")


def _show(value: Tensor) -> str:
    return f"{value.item():.8g}" if value.dim() == 0 else f"norm {value.norm().item():.8g}"


def compare_exactly(family: str, name: str, ours: Sequence[Any], recorded: Sequence[Any], unit: str = "values") -> Row:
    """Compares two sequences; the absolute difference is the number of places where they differ."""
    mine, theirs = list(ours), list(recorded)
    differ = sum(a != b for a, b in zip(mine, theirs)) + abs(len(mine) - len(theirs))
    shown = f"{len(mine)} {unit}", f"{len(theirs)} {unit}"
    return Row(family, name, *shown, float(differ), None, 0.0, "FAIL" if differ else "ok")


def compare_sets(family: str, name: str, ours: Iterable[Any], recorded: Iterable[Any], unit: str = "values") -> Row:
    """Compares two collections in any order; the absolute difference is the number of values that only one has."""
    mine, theirs = set(ours), set(recorded)
    status: Status = "FAIL" if mine ^ theirs else "ok"
    return Row(
        family, name, f"{len(mine)} {unit}", f"{len(theirs)} {unit}", float(len(mine ^ theirs)), None, 0.0, status
    )


def instead(family: str, name: str, ours: str, recorded: str) -> Row:
    """The reference raised, returned NaN, or lost a picture."""
    return Row(family, name, ours, recorded, None, None, None, "instead")


def unsupported(family: str, name: str, reason: str) -> Row:
    return Row(family, name, reason, "recorded", None, None, None, "unsupported")


def not_recorded(family: str, name: str, reason: str) -> Row:
    """One row in place of one or more that need values the folder lacks."""
    return Row(family, name, reason, "-", None, None, None, "not recorded")


def not_comparable(family: str, name: str, reason: str) -> Row:
    """One row in place of all rows of a model that the layout cannot host."""
    return Row(family, name, reason, "recorded", None, None, None, "not comparable")


def failed(family: str, name: str, reason: str, recorded: str = "a value") -> Row:
    """This trainer raised, and the reference did not."""
    return Row(family, name, reason, recorded, None, None, None, "FAIL")


def summary(rows: Sequence[Row]) -> str:
    """Row counts and largest differences by family, and the totals."""
    lines = [f"{'family':<17} {'rows':>5} {'ok':>5} {'fail':>5} {'largest relative':>17} {'largest absolute':>17}"]
    for family in dict.fromkeys(row.family for row in rows):
        mine = [row for row in rows if row.family == family]
        count = Counter(row.status for row in mine)
        largest = [
            f"{max(values):.1e}" if values else "-"
            for values in (
                [row.relative for row in mine if row.relative is not None and row.absolute is not None],
                [row.absolute for row in mine if row.absolute is not None],
            )
        ]
        lines.append(
            f"{family:<17} {len(mine):>5} {count['ok']:>5} {count['FAIL']:>5} {largest[0]:>17} {largest[1]:>17}"
        )
    count = Counter(row.status for row in rows)
    compared = count["ok"] + count["FAIL"]
    lines.append(
        f"{compared} rows compared: {count['ok']} ok, {count['FAIL']} failed. Apart from them: {count['instead']} "
        "where the reference raised, gave NaN or lost a picture (the row describes what this trainer does), "
        f"{count['unsupported']} not supported."
    )
    if count["not recorded"]:
        lines.append(f"{count['not recorded']} comparisons could not be made, because the folder lacks their values.")
    if count["not comparable"]:
        lines.append(f"Models that do not fit this layout and were not compared: {count['not comparable']}.")
    return "\n".join(lines)
