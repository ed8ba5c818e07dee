"""What the runs of ablation.py found: means, spreads and differences seed by seed, as a table and as an SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean
from typing import Any

ALL = "all"
WIDTH, LEFT, PANEL, GAP, TOP, BOTTOM = 960, 70, 250, 70, 96, 44
COLOURS = ("#64707d", "#d9480f", "#2e7dd1", "#2b8a3e")
INK, FAINT, GRID = "#1f2933", "#64707d", "#e4e7eb"
STEP = (WIDTH - LEFT - 30) / 5
DASHED = f"stroke='{INK}' stroke-dasharray='3 3'"


@dataclass(frozen=True)
class Results:
    """Shares in [0, 1].

    right, blank: setting -> kind of question -> the share of right answers with each seed, about the held-out pictures
    and about a blank one; the kind ``all`` is the mean of the others. guessing: kind -> the share that one constant
    answer gets. cpu_seconds: setting -> of training, with each seed.
    """

    seeds: tuple[int, ...]
    questions: int
    guessing: dict[str, float]
    right: dict[str, dict[str, list[float]]]
    blank: dict[str, dict[str, list[float]]]
    cpu_seconds: dict[str, list[float]]

    @classmethod
    def of(
        cls, found: Sequence[tuple[str, int, dict[str, Any]]], guessing: dict[str, float], questions: int
    ) -> Results:
        """From setting, seed and result of each run ({"heldout": shares, "grey": shares, "cpu_seconds": s})."""
        settings = list(dict.fromkeys(name for name, _, _ in found))
        kinds = list(guessing)

        def shares(setting: str, pictures: str) -> dict[str, list[float]]:
            of_seed = [result[pictures] for name, _, result in found if name == setting]
            by_kind = {kind: [share[kind] for share in of_seed] for kind in kinds}
            return {ALL: [fmean(share[kind] for kind in kinds) for share in of_seed], **by_kind}

        return cls(
            seeds=tuple(dict.fromkeys(seed for _, seed, _ in found)),
            questions=questions,
            guessing={ALL: fmean(guessing.values()), **guessing},
            right={name: shares(name, "heldout") for name in settings},
            blank={name: shares(name, "grey") for name in settings},
            cpu_seconds={name: [r["cpu_seconds"] for other, _, r in found if other == name] for name in settings},
        )

    @property
    def others(self) -> list[str]:
        return [name for name in self.right if name != self.baseline]

    @property
    def baseline(self) -> str:
        return next(iter(self.right))

    def differences(self, setting: str, kind: str) -> list[float]:
        """The setting's share minus the baseline's, seed by seed."""
        return [a - b for a, b in zip(self.right[setting][kind], self.right[self.baseline][kind], strict=True)]

    def finding(self, setting: str) -> str:
        """One sentence: whether the setting is better or worse than the baseline with every seed."""
        values = self.differences(setting, ALL)
        if len(values) == 1:
            found = "one seed shows no spread"
        elif all(value > 0 for value in values) or all(value < 0 for value in values):
            found = f"{'better' if values[0] > 0 else 'worse'} with each of {len(values)} seeds"
        else:
            found = f"no consistent difference over {len(values)} seeds"
        shown = ", ".join(f"{100 * value:+.1f}" for value in values)
        return f"{setting} against {self.baseline}: {found} ({shown} points; mean {100 * fmean(values):+.1f})"


def spread(values: Sequence[float]) -> str:
    """``71.2 (70.1 to 73.0)``: mean, least and largest, in percent."""
    return f"{100 * fmean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def summary(results: Results) -> dict[str, Any]:
    """The numbers behind the table."""
    return {
        "seeds": results.seeds,
        "questions": results.questions,
        "guessing": results.guessing,
        "right": results.right,
        "blank": results.blank,
        "cpu_seconds": results.cpu_seconds,
        "differences": {
            name: {kind: results.differences(name, kind) for kind in results.guessing} for name in results.others
        },
        "findings": [results.finding(name) for name in results.others],
    }


def show(results: Results) -> None:
    """Prints a table of all settings and a sentence for each beside the baseline."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(110, Console().width))
    title = f"% right of {results.questions} questions: mean (least to largest) of {len(results.seeds)} seeds"
    table = Table("question", "guessing", *results.right, title=title)
    for kind, guessing in results.guessing.items():
        table.add_row(kind, f"{100 * guessing:.1f}", *(spread(shares[kind]) for shares in results.right.values()))
    table.add_row("all, blank picture", "", *(spread(shares[ALL]) for shares in results.blank.values()))
    table.add_row("CPU seconds of training", "", *(f"{fmean(values):.0f}" for values in results.cpu_seconds.values()))
    console.print(table)
    table = Table("difference in points", *(f"seed {seed}" for seed in results.seeds), "mean")
    for name in results.others:
        for kind in results.guessing:
            values = results.differences(name, kind)
            table.add_row(f"{name}: {kind}", *(f"{100 * value:+.1f}" for value in (*values, fmean(values))))
    console.print(table)
    for name in results.others:
        console.print(results.finding(name), highlight=False)


def draw(results: Results) -> str:
    """An SVG: the shares of every setting by kind of question, and below them the differences from the baseline."""
    low = TOP + PANEL + GAP
    tall = low + PANEL + BOTTOM
    subtitle = f"{results.questions} questions about held-out pictures; a dot for each seed, a bar at their mean"
    parts = [text(LEFT, 34, "Does reconstruction help?", 20, INK), text(LEFT, 56, subtitle, 13, FAINT)]
    for number, name in enumerate(results.right):
        parts += [dot(LEFT + 5 + 190 * number, 76, number), text(LEFT + 16 + 190 * number, 80, name, 13, INK)]
    parts += [line(WIDTH - 200, WIDTH - 176, 76, DASHED), text(WIDTH - 168, 80, "one constant answer", 13, INK)]
    parts += [*draw_shares(results, TOP), *draw_differences(results, low)]
    parts += [text(x, low + PANEL + 26, kind, 13, INK, "middle") for kind, x in middles(results).items()]
    size = f"viewBox='0 0 {WIDTH} {tall}' width='{WIDTH}' height='{tall}' font-family='Helvetica, Arial, sans-serif'"
    ground = "<rect width='100%' height='100%' fill='white'/>"
    return "\n".join([f"<svg xmlns='http://www.w3.org/2000/svg' {size}>", ground, *parts, "</svg>\n"])


def middles(results: Results) -> dict[str, float]:
    """Where on the x axis each kind of question is."""
    return {kind: LEFT + STEP * (place + 0.5) for place, kind in enumerate(results.guessing)}


def draw_shares(results: Results, top: float) -> list[str]:
    def height(share: float) -> float:
        return top + PANEL * (1 - share)

    parts = [part for share in (0, 0.25, 0.5, 0.75, 1) for part in grid(height(share), f"{share:.0%}")]
    for kind, middle in middles(results).items():
        parts.append(line(middle - 0.36 * STEP, middle + 0.36 * STEP, height(results.guessing[kind]), DASHED))
        for number, shares in enumerate(results.right.values()):
            x = middle + 0.5 * STEP * ((number + 0.5) / len(results.right) - 0.5)
            parts += marks(x, [height(share) for share in shares[kind]], number)
    return parts


def draw_differences(results: Results, top: float) -> list[str]:
    values = {name: {kind: results.differences(name, kind) for kind in results.guessing} for name in results.others}
    largest = max((abs(value) for kinds in values.values() for some in kinds.values() for value in some), default=0)
    bound = max(1, math.ceil(20 * largest)) / 20  # a multiple of five points

    def height(difference: float) -> float:
        return top + PANEL / 2 * (1 - difference / bound)

    parts = [text(LEFT, top - 14, f"points more than {results.baseline} with the same seed", 13, FAINT)]
    parts += [*grid(height(bound), f"{100 * bound:+.0f}"), *grid(height(-bound), f"{-100 * bound:+.0f}")]
    parts += grid(height(0), "0", FAINT)
    for place, (name, kinds) in enumerate(values.items()):
        for kind, middle in middles(results).items():
            x = middle + 0.5 * STEP * ((place + 0.5) / len(values) - 0.5)
            parts += marks(x, [height(value) for value in kinds[kind]], list(results.right).index(name))
    return parts


def text(x: float, y: float, words: str, size: int, colour: str, anchor: str = "start") -> str:
    place = f"x='{x:.1f}' y='{y:.1f}' font-size='{size}' text-anchor='{anchor}'"
    return f"<text {place} fill='{colour}'>{escape(words)}</text>"


def line(left: float, right: float, y: float, style: str) -> str:
    return f"<line x1='{left:.1f}' x2='{right:.1f}' y1='{y:.1f}' y2='{y:.1f}' {style}/>"


def dot(x: float, y: float, number: int) -> str:
    return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4.5' fill='{COLOURS[number % len(COLOURS)]}' fill-opacity='0.7'/>"


def grid(y: float, label: str, colour: str = GRID) -> list[str]:
    return [line(LEFT, WIDTH - 30, y, f"stroke='{colour}'"), text(LEFT - 10, y + 4, label, 12, FAINT, "end")]


def marks(x: float, heights: Sequence[float], number: int) -> list[str]:
    """A bar at the mean and, beside one another, a dot for each seed."""
    bar = line(x - 17, x + 17, fmean(heights), f"stroke='{COLOURS[number % len(COLOURS)]}' stroke-width='3'")
    return [bar, *(dot(x + 10 * (place - (len(heights) - 1) / 2), y, number) for place, y in enumerate(heights))]
