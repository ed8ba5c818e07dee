"""Draws figures of runs over iterations as SVG, on a linear and a logarithmic scale.

Inline SVG rather than a charting library: the page is read without JavaScript too, prints, and takes kilobytes where
plotly's bundle takes 4.5 MB. Curves are stretched to the page's width; texts stand beside them in HTML and are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ross_mcore.run_report.html import text
from ross_mcore.run_report.series import Point, Series, fewer, smoothed

UNITS = 1000
"""Width and height of a drawing."""
MOST_TICKS = 6
MOST_DOTS = 60
"""A curve of up to so many points has a dot at each."""
MOST_MARKS = 100


@dataclass(frozen=True)
class Chart:
    """A figure to draw. scale: a value is shown times it; log: whether the logarithmic scale suits it; smooth: whether
    values are noisy; marks: whether incidents and starts are drawn in it."""

    name: str
    title: str
    unit: str = ""
    scale: float = 1.0
    log: bool = False
    smooth: bool = True
    marks: bool = False


@dataclass(frozen=True)
class Curve:
    """A run's figure: its points and their means, smoothed or not. run: its number, which gives the colour."""

    run: int
    label: str
    points: list[Point]
    smooth: list[float]
    incidents: Sequence[int] = ()
    starts: Sequence[int] = ()


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` -> 0 to UNITS."""

    low: float
    high: float
    is_log: bool = False

    def place(self, value: float) -> int:
        low, high = self.low, self.high
        if self.is_log:
            if value <= 0:
                return -UNITS
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return round(max(-1.0, min(2.0, (value - low) / (high - low))) * UNITS)

    def ticks(self) -> list[float]:
        if self.is_log and len(found := log_ticks(self.low, self.high)) > 1:
            return found
        return linear_ticks(self.low, self.high)


def linear_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, at most MOST_TICKS."""
    rough = (high - low) / (MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Numbers 1, 2 and 5, or 1 alone, times powers of ten."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        found = [f * 10.0**n for n in decades for f in factors if low <= f * 10.0**n <= high]
        if len(found) <= MOST_TICKS:
            return found
    return found[:: -(-len(found) // MOST_TICKS)]


def curve(run: int, label: str, series: Series, chart: Chart, most_points: int) -> Curve:
    scale = chart.scale
    points = [
        Point(p.iteration, p.count, p.mean * scale, p.least * scale, p.most * scale)
        for p in fewer(series.points(), most_points)
    ]
    return Curve(run, label, points, smoothed(points) if chart.smooth else [point.mean for point in points])


def value_axis(curves: Sequence[Curve], is_log: bool = False) -> Axis:
    """Holds all smoothed values, and the raw ones but for their outermost hundredth: one spike flattens no curve."""
    smooth = [value for curve in curves for value in curve.smooth if value > 0 or not is_log]
    least = sorted(p.least for curve in curves for p in curve.points if p.least > 0 or not is_log)
    most = sorted(p.most for curve in curves for p in curve.points)
    low = min([*smooth, *least[len(least) // 100 :][:1]])
    high = max(*smooth, most[-1 - len(most) // 100])
    if is_log:
        return Axis(low / 1.1, high * 1.1, True)
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return Axis(low - room if low < 0 or low - room > 0 else 0.0, high + room)


def has_log(chart: Chart, curves: Sequence[Curve]) -> bool:
    return chart.log and any(value > 0 for curve in curves for value in curve.smooth)


def short(value: float) -> str:
    """0.012345 -> `0.01234`, 1234567 -> `1,234,567`."""
    return f"{value:,.0f}" if abs(value) >= 10000 and abs(value) < 1e9 else f"{value:.4g}"


def tick_text(value: float) -> str:
    """As `short`, and 0.00025 -> `2.5e-4`, which is narrow enough to stand beside a drawing."""
    if value == 0 or not (abs(value) < 0.001 or abs(value) >= 1e6):
        return short(value)
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def draw(chart: Chart, curves: Sequence[Curve], across: Axis) -> str:
    """A chart as HTML: both scales, the ticks of both, and what a screen reader says."""
    scales = [("lin", value_axis(curves))]
    if has_log(chart, curves):
        scales.append(("log", value_axis(curves, is_log=True)))
    both = " both" if len(scales) == 1 else ""
    ticks = "".join(_ticks(axis, f"{kind}{both}") for kind, axis in scales)
    layers = "".join(
        f'<g class="{kind}{both}">{_grid(axis)}{"".join(_paths(curve, across, axis) for curve in curves)}</g>'
        for kind, axis in scales
    )
    marks = "".join(_marks(curve, across) for curve in curves) if chart.marks else ""
    unit = f' <span class="unit">{text(chart.unit)}</span>' if chart.unit else ""
    return (
        f'<figure class="chart"><figcaption>{text(chart.title)}{unit}</figcaption>'
        f'<div class="plot" tabindex="0">{ticks}{_across_ticks(across)}'
        f'<svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none" role="img" '
        f'aria-label="{text(in_words(chart, curves))}">{layers}{marks}</svg></div></figure>'
    )


def in_words(chart: Chart, curves: Sequence[Curve]) -> str:
    said = [
        f"{c.label} from {short(c.points[0].mean)} at iteration {c.points[0].iteration} "
        f"to {short(c.smooth[-1])} at {c.points[-1].iteration}"
        for c in curves
    ]
    return f"{chart.title} over iterations: {'; '.join(said)}"


def _ticks(axis: Axis, kind: str) -> str:
    return "".join(
        f'<span class="y {kind}" style="bottom:{axis.place(value) / UNITS:.1%}">{tick_text(value)}</span>'
        for value in axis.ticks()
    )


def _across_ticks(across: Axis) -> str:
    return "".join(
        f'<span class="x" style="left:{across.place(value) / UNITS:.1%}">{short(value)}</span>'
        for value in linear_ticks(across.low, across.high)
        if value == round(value)
    )


def _grid(axis: Axis) -> str:
    lines = "".join(f"M0 {UNITS - axis.place(value)}H{UNITS}" for value in axis.ticks())
    return f'<path class="grid" d="{lines}"/>'


def _line(places: Sequence[tuple[int, int]]) -> str:
    return "M" + "L".join(f"{x} {UNITS - y}" for x, y in places)


def _paths(curve: Curve, across: Axis, axis: Axis) -> str:
    """The raw values, in which every point spans its least and its most, and the smoothed ones."""
    raw, means = [], []
    for point, value in zip(curve.points, curve.smooth, strict=True):
        if axis.is_log and value <= 0:
            continue
        x = across.place(point.iteration)
        raw += [(x, axis.place(v)) for v in dict.fromkeys((point.least, point.most)) if v > 0 or not axis.is_log]
        means.append((x, axis.place(value)))
    if not means:
        return ""
    dots = ""
    if len(means) <= MOST_DOTS:
        dots = f'<path class="dots" d="{"".join(f"M{x} {UNITS - y}h.01" for x, y in means)}"/>'
    return (
        f'<g class="s{curve.run}"><path class="raw" d="{_line(raw or means)}"/>'
        f'<path class="smooth" d="{_line(means)}"/>{dots}</g>'
    )


def _marks(curve: Curve, across: Axis) -> str:
    """A short line at the top for each incident, a long dashed one for each start after the first iteration."""
    incidents = "".join(f"M{across.place(i)} 0v60" for i in curve.incidents[-MOST_MARKS:])
    starts = "".join(f"M{across.place(i)} 0V{UNITS}" for i in curve.starts[-MOST_MARKS:] if i > 1)
    drawn = [f'<path class="{kind}" d="{d}"/>' for kind, d in (("incident", incidents), ("start", starts)) if d]
    return f'<g class="s{curve.run}">{"".join(drawn)}</g>' if drawn else ""


def hover_data(curves: Sequence[Curve], unit: str) -> dict[str, Any]:
    """What the page's script shows under the pointer: [iteration, smoothed, least, most] of every point."""

    def brief(value: float) -> float:
        return float(f"{value:.4g}")

    return {
        "unit": unit,
        "curves": [
            {
                "run": c.run,
                "points": [
                    [
                        p.iteration,
                        brief(value),
                        *([brief(p.least), brief(p.most)] if p.least < p.most else [brief(p.mean)]),
                    ]
                    for p, value in zip(c.points, c.smooth, strict=True)
                ],
            }
            for c in curves
        ],
    }
