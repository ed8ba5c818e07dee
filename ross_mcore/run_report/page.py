"""Puts the report of runs together: one HTML file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

from ross_mcore import __version__
from ross_mcore.logs import replace_file
from ross_mcore.run_report import sections
from ross_mcore.run_report.charts import Axis, Chart, Curve, curve, draw, hover_data
from ross_mcore.run_report.html import folded, named, section, text
from ross_mcore.run_report.pictures import strips
from ross_mcore.run_report.reading import RunRecord
from ross_mcore.run_report.series import MOST_POINTS

HERE = Path(__file__).parent
MOST_ALL_POINTS = 45_000
"""Points of all curves together: about 4 MB of a page."""
FEWEST_POINTS = 40
MOST_HELD_OUT = 24
MOST_OTHER = 24

CHARTS = (
    Chart("lm_loss", "lm_loss", log=True, marks=True),
    Chart("vm_loss", "vm_loss", log=True, marks=True),
    Chart("loss", "loss", log=True, marks=True),
    Chart("grad_norm", "gradient norm", log=True, marks=True),
    Chart("learning_rate", "learning rate", log=True, smooth=False),
    Chart("samples_per_second", "throughput", "samples/s"),
    Chart("tokens_per_second", "throughput", "tokens/s", smooth=False),
    Chart("mfu", "MFU", "% of the GPU's peak", 100),
    Chart("hardware_mfu", "MFU with padding and recomputation", "% of the GPU's peak", 100, smooth=False),
    Chart("step_seconds", "time of a step", "s", log=True),
    Chart("data_share", "waiting for data", "% of a step", 100),
    Chart("fill", "fill", "% of the computed tokens", 100),
    Chart("peak_gib", "peak memory", "GiB", smooth=False),
)
"""The figures in the order of the page; those that no run has are left out."""


def page(runs: Sequence[RunRecord], most_pictures: int) -> str:
    """The HTML of runs. Damaged pictures are counted in the runs."""
    pictures = strips(runs, most_pictures)
    charts, data = _charts(runs)
    body = (
        f"<header><h1>{text(_title(runs))}</h1>"
        f'<p class="faint">written by ross_mcore {__version__}; all of it is in this file</p></header><main>'
        f'<div class="beside">{sections.what_was_run(runs)}{sections.summary(runs)}</div>'
        f"{charts}{pictures}{sections.answers(runs)}{sections.incidents(runs)}"
        f"{sections.quarantine(runs)}{sections.settings(runs)}</main>"
    )
    style, script = _file("style.css"), _file("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_file("page.html")).substitute(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
        version=__version__,
        title=text(_title(runs)),
        style=style,
        body=body,
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        script=script,
    )


def write(path: Path, content: str) -> None:
    """Raises OSError."""
    replace_file(path, content.encode())


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _title(runs: Sequence[RunRecord]) -> str:
    return f"Training report: {', '.join(run.name for run in runs)}"


def _charts(runs: Sequence[RunRecord]) -> tuple[str, dict[str, Any]]:
    """The section of curves, and the data of its hover texts in the same order."""
    held_out = _held_out(runs)
    others = _others(runs)
    asked = [*CHARTS, *held_out[:MOST_HELD_OUT], *others[:MOST_OTHER]]
    count = sum(chart.name in _figures(run, chart) for chart in asked for run in runs)
    most_points = max(FEWEST_POINTS, min(MOST_POINTS, MOST_ALL_POINTS // max(1, count)))
    first = min(point.iteration for run in runs for s in run.series.values() for point in s.points()[:1])
    last = max(run.iteration for run in runs)
    across = Axis(first if first < last else last - 1, last)
    data: dict[str, Any] = {"first": across.low, "last": across.high, "runs": [run.name for run in runs], "charts": []}

    def drawn(charts: Iterable[Chart]) -> str:
        found = []
        for chart in charts:
            if curves := _curves(runs, chart, most_points):
                found.append(draw(chart, curves, across))
                data["charts"].append(hover_data(curves, chart.unit))
        return f'<div class="charts">{"".join(found)}</div>' if found else ""

    shown = drawn([*CHARTS, *held_out[:MOST_HELD_OUT]])
    rest = drawn(others[:MOST_OTHER])
    left = len(held_out[MOST_HELD_OUT:]) + len(others[MOST_OTHER:]) + len({n for r in runs for n in r.left_out})
    more = [f"<p>{left} more figures are not drawn.</p>"] if left else []
    return section("Curves", _tools(runs), shown, folded("more figures", rest) if rest else "", *more), data


def _tools(runs: Sequence[RunRecord]) -> str:
    boxes = "".join(
        f'<label><input type="checkbox" id="run{number}" checked>{named(number, run.name)}</label>'
        for number, run in enumerate(runs)
    )
    return (
        f'<div class="tools">{boxes}<label><input type="checkbox" id="log">log scale</label>'
        '<label><input type="checkbox" id="raw" checked>raw values</label></div>'
        '<p class="faint">Faint: raw values, from least to most where iterations share a point. Strong: their '
        "mean over a twentieth of the run. Bars at the top: incidents. Dashed: resumed. All over iterations.</p>"
    )


def _held_out(runs: Sequence[RunRecord]) -> list[Chart]:
    names = dict.fromkeys(name for run in runs for name in run.validation)
    return [Chart(name, f"held-out {_of(name)}", log=True, smooth=False) for name in names]


def _of(name: str) -> str:
    """`coco/lm_loss` -> `lm_loss on coco`."""
    group, _, figure = name.rpartition("/")
    return f"{figure} on {group}"


def _others(runs: Sequence[RunRecord]) -> list[Chart]:
    known = {chart.name for chart in CHARTS}
    names = dict.fromkeys(name for run in runs for name in run.series if name not in known)
    charts = [Chart(name, name, log="loss" in name or "norm" in name) for name in names]
    return [chart for chart in charts if any(_is_varied(run, chart.name) for run in runs)]


def _is_varied(run: RunRecord, name: str) -> bool:
    """Whether a figure is more than one number throughout, such as zero bad samples."""
    points = run.series[name].points() if name in run.series else []
    return bool(points) and min(p.least for p in points) < max(p.most for p in points)


def _figures(run: RunRecord, chart: Chart) -> dict[str, Any]:
    return run.validation if chart.title.startswith("held-out") else run.series


def _curves(runs: Sequence[RunRecord], chart: Chart, most_points: int) -> list[Curve]:
    found = []
    for number, run in enumerate(runs):
        series = _figures(run, chart).get(chart.name)
        if series is not None and series.count:
            drawn = curve(number, run.name, series, chart, most_points)
            marks = [one["iteration"] for one in run.incidents], [s.iteration for s in run.events.starts]
            found.append(replace(drawn, incidents=marks[0], starts=marks[1]) if chart.marks else drawn)
    return found
