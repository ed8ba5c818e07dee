"""Loss curves as an SVG: each panel has the curves, and below them their differences from the first.

Pure functions, with only Python's standard library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, GAP = 1120, 64, 92, 84
TOP, TALL, LOW, BETWEEN, BOTTOM = 128, 290, 140, 52, 56
INK, FAINT, GRID = "#1f2933", "#64707d", "#e4e7eb"
FONT = "font-family='Helvetica, Arial, sans-serif'"


@dataclass(frozen=True)
class Curve:
    """One run in one panel: `values` of its steps 1, 2, ..., all positive."""

    name: str
    colour: str
    values: Sequence[float]
    is_dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves of one quantity; the first is the reference of the others."""

    title: str
    curves: Sequence[Curve]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Means over the `window` last values, fewer at the beginning."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    starts = [max(0, end - window) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]


def differences(values: Sequence[float], reference: Sequence[float], window: int) -> list[float]:
    """Smoothed values minus the smoothed reference."""
    pairs = zip(smoothed(values, window), smoothed(reference, window), strict=True)
    return [ours - theirs for ours, theirs in pairs]


def apart(heights: Sequence[float], least: float) -> list[float]:
    """The heights, moved by one downward sweep so that labels are at least `least` apart."""
    moved = dict.fromkeys(range(len(heights)), 0.0)
    last = -math.inf
    for number in sorted(moved, key=lambda n: heights[n]):
        last = moved[number] = max(heights[number], last + least)
    return list(moved.values())


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from `low` to `high`; even ticks if these are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    return ticks if len(ticks) > 2 else even_ticks(low, high, 5)


def even_ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`, about so many."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def draw(title: str, subtitle: str, panels: Sequence[Panel], window: int) -> str:
    """The picture as the text of an SVG; curves are smoothed over `window` steps."""
    height = TOP + TALL + BETWEEN + LOW + BOTTOM
    width = (WIDTH - LEFT - RIGHT - GAP * (len(panels) - 1) - RIGHT * (len(panels) - 1)) / len(panels)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' {FONT} font-size='12'>",
        f"<rect width='{WIDTH}' height='{height}' fill='white'/>",
        _text(LEFT, 30, title, INK, size=19, weight="bold"),
        _text(LEFT, 51, subtitle, FAINT, size=13),
        *_legend(panels[0].curves),
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, LEFT + number * (width + GAP + RIGHT), width, window)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, x: float, width: float, window: int) -> list[str]:
    lines = [smoothed(curve.values, window) for curve in panel.curves]
    drawn = [line[window // 2 :] for line in lines]  # a mean over few steps covers few pictures
    low, high = min(map(min, drawn)) / 1.15, max(map(max, drawn)) * 1.15
    steps = len(lines[0])

    def across(step: float) -> float:
        return x + width * step / steps

    def up(value: float) -> float:
        return TOP + TALL * math.log(high / value) / math.log(high / low)

    parts = [_text(x, TOP - 10, panel.title, INK, size=14, weight="bold")]
    parts += _frame(x, width, TOP, TALL, [(up(tick), f"{tick:g}") for tick in log_ticks(low, high)])
    parts += _curves(panel.curves, lines, across, up, window // 2)
    parts += _ends(panel.curves, [up(line[-1]) for line in lines], [f"{line[-1]:.4f}" for line in lines], x + width)

    top, reference = TOP + TALL + BETWEEN, panel.curves[0].values
    above = [differences(curve.values, reference, window) for curve in panel.curves]
    shown = [value for line in above for value in line[window // 2 :]]
    least, most = min(shown) - 0.1 * (max(shown) - min(shown)), max(shown) + 0.1 * (max(shown) - min(shown))

    def level(value: float) -> float:
        return top + LOW * (most - value) / (most - least)

    parts.append(_text(x, top - 10, f"difference to {panel.curves[0].name}, same samples and draws", FAINT))
    parts += _frame(x, width, top, LOW, [(level(tick), signed(tick)) for tick in even_ticks(least, most, 4)])
    parts += _curves(panel.curves, above, across, level, window // 2)
    ends = [line[-1] for line in above[1:]]
    parts += _ends(panel.curves[1:], [level(end) for end in ends], [signed(round(end, 4)) for end in ends], x + width)
    parts += [_text(across(tick), top + LOW + 18, f"{tick:g}", FAINT, "middle") for tick in even_ticks(0, steps, 4)]
    parts.append(_text(x + width / 2, top + LOW + 38, "step", FAINT, "middle"))
    return parts


def signed(value: float) -> str:
    return f"{value:+g}" if value else "0"


def _frame(x: float, width: float, top: float, height: float, ticks: Sequence[tuple[float, str]]) -> list[str]:
    lines = [f"<path d='M{x:.1f} {y:.1f}h{width:.1f}' stroke='{GRID}'/>" for y, _ in ticks]
    lines.append(f"<path d='M{x:.1f} {top}v{height}h{width:.1f}' stroke='{FAINT}' fill='none'/>")
    return lines + [_text(x - 8, y + 4, label, FAINT, "end") for y, label in ticks]


def _curves(
    curves: Sequence[Curve],
    lines: Sequence[Sequence[float]],
    across: Callable[[float], float],
    up: Callable[[float], float],
    first: int,
) -> list[str]:
    parts = []
    for curve, line in zip(curves, lines, strict=True):
        points = " ".join(f"{across(step):.1f},{up(line[step - 1]):.1f}" for step in range(first + 1, len(line) + 1))
        dashes = " stroke-dasharray='5 3'" if curve.is_dashed else ""
        parts.append(f"<polyline points='{points}' fill='none' stroke='{curve.colour}' stroke-width='1.7'{dashes}/>")
    return parts


def _ends(curves: Sequence[Curve], heights: Sequence[float], labels: Sequence[str], x: float) -> list[str]:
    """Values at the right end, in the colours of their curves."""
    return [
        _text(x + 8, height + 4, label, curve.colour)
        for curve, height, label in zip(curves, apart(heights, 14), labels, strict=True)
    ]


def _legend(curves: Sequence[Curve]) -> list[str]:
    parts, x = [], float(LEFT)
    for curve in curves:
        dashes = " stroke-dasharray='5 3'" if curve.is_dashed else ""
        parts.append(f"<path d='M{x:.1f} 76h26' stroke='{curve.colour}' stroke-width='3'{dashes}/>")
        parts.append(_text(x + 34, 80, curve.name, INK, size=13))
        x += 34 + 7.2 * len(curve.name) + 26
    return parts


def _text(x: float, y: float, text: str, colour: str, anchor: str = "start", size: int = 12, weight: str = "") -> str:
    bold = f" font-weight='{weight}'" if weight else ""
    place = f"x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='{size}'"
    return f"<text {place} fill='{colour}'{bold}>{escape(text)}</text>"
