"""Loss curves as a row of characters and as a picture. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

BARS = "▁▂▃▄▅▆▇█"
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
WIDTH, HEIGHT, MARGIN, LINE = 640, 300, 44, 16


def sparkline(values: Sequence[float]) -> str:
    """One character per value, scaled from the smallest to the largest value."""
    if not values:
        return ""
    low, high = min(values), max(values)
    steps = len(BARS) - 1
    return "".join(BARS[round((value - low) / (high - low) * steps) if high > low else 0] for value in values)


def svg(title: str, curves: Mapping[str, Sequence[float]]) -> str:
    """Curves over iterations 1, 2, ..., with their names below. Every curve has at least two values."""
    every = [value for values in curves.values() for value in values]
    low, high, longest = min(every), max(every), max(map(len, curves.values()))
    span = (high - low) or 1.0

    def place(index: int, value: float) -> str:
        x = MARGIN + index * (WIDTH - 2 * MARGIN) / (longest - 1)
        return f"{x:.1f},{HEIGHT - MARGIN - (value - low) / span * (HEIGHT - 2 * MARGIN):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT + LINE * len(curves)}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="20" font-size="14">{escape(title)}</text>',
        f'<path d="M{MARGIN},{MARGIN} V{HEIGHT - MARGIN} H{WIDTH - MARGIN}" fill="none" stroke="#444"/>',
        f'<text x="4" y="{MARGIN + 4}">{high:.3g}</text><text x="4" y="{HEIGHT - MARGIN + 4}">{low:.3g}</text>',
        f'<text x="{MARGIN}" y="{HEIGHT - MARGIN + 16}">iteration 1</text>',
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - MARGIN + 16}" text-anchor="end">{longest}</text>',
    ]
    for number, (name, values) in enumerate(curves.items()):
        colour, y = COLOURS[number % len(COLOURS)], HEIGHT + LINE * number
        points = " ".join(place(index, value) for index, value in enumerate(values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{MARGIN}" y="{y}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])
