"""PURE: one compared quantity is one row. How values are compared, printed and counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Status = Literal["ok", "FAIL", "instead", "unsupported", "not recorded"]

TOLERANCE = 1e-5
"""Of a tensor's largest recorded magnitude. What float32 sums in another order leave: eps is 1.2e-7, and a network a
few layers deep adds up some tens of terms of it. A wrong constant, order or layout is off by 1e-3 at the least."""


_COLUMNS = "{:<16} {:<90} {:>22} {:>22} {:>9} {:>9} {:>9}  {}"
HEADER = _COLUMNS.format("family", "quantity", "ours", "recorded", "absolute", "relative", "tolerance", "status")


@dataclass(frozen=True)
class Row:
    """`instead`: the reference raised or gave NaN here, and `ours` says what this trainer does. `unsupported`:
    recorded, but outside what this trainer implements. `not recorded`: the folder lacks what the row needs. None of
    them is counted as ok."""

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
        if self.status in ("unsupported", "not recorded"):
            return f"{self.family:<16} {self.name:<90} {self.status}: {self.ours}"
        figures = ("-" if v is None else f"{v:.1e}" for v in (self.absolute, self.relative, self.tolerance))
        return _COLUMNS.format(self.family, self.name, self.ours, self.recorded, *figures, self.status)


def compare(family: str, name: str, ours: Any, recorded: Any, tolerance: float = TOLERANCE, floor: float = 0.0) -> Row:
    """Two numbers or two tensors. Relative is the largest difference over the largest recorded magnitude.

    It must stay within `tolerance`, or the absolute one within `floor`. A tensor is shown by its L2 norm. Other shapes,
    nothing at all, and NaN on either side, fail.
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
    """Two sequences, which must be equal; the absolute difference counts the places where they are not."""
    mine, theirs = list(ours), list(recorded)
    differ = sum(a != b for a, b in zip(mine, theirs)) + abs(len(mine) - len(theirs))
    shown = f"{len(mine)} {unit}", f"{len(theirs)} {unit}"
    return Row(family, name, *shown, float(differ), None, 0.0, "FAIL" if differ else "ok")


def compare_sets(family: str, name: str, ours: Iterable[Any], recorded: Iterable[Any], unit: str = "values") -> Row:
    """Two collections in any order; the absolute difference counts what only one side has."""
    mine, theirs = set(ours), set(recorded)
    status: Status = "FAIL" if mine ^ theirs else "ok"
    return Row(
        family, name, f"{len(mine)} {unit}", f"{len(theirs)} {unit}", float(len(mine ^ theirs)), None, 0.0, status
    )


def instead(family: str, name: str, ours: str, recorded: str) -> Row:
    """Where the reference raised, or gave NaN."""
    return Row(family, name, ours, recorded, None, None, None, "instead")


def unsupported(family: str, name: str, reason: str) -> Row:
    return Row(family, name, reason, "recorded", None, None, None, "unsupported")


def not_recorded(family: str, name: str, reason: str) -> Row:
    """A row, or several, that cannot be made of what the folder holds."""
    return Row(family, name, reason, "-", None, None, None, "not recorded")


def failed(family: str, name: str, reason: str, recorded: str = "a value") -> Row:
    """Where this trainer raised although the reference did not."""
    return Row(family, name, reason, recorded, None, None, None, "FAIL")


def summary(rows: Sequence[Row]) -> str:
    """Rows and largest differences by family, and the closing count."""
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
        "where the reference raised or gave NaN (the row says what happens here), "
        f"{count['unsupported']} not supported."
    )
    if count["not recorded"]:
        lines.append(f"{count['not recorded']} comparisons could not be made, because the folder lacks their values.")
    return "\n".join(lines)
