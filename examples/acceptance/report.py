"""The outcome of all parts as one Markdown page. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.acceptance.curves import sparkline
from examples.acceptance.judge import LOSSES, Speed
from examples.acceptance.parts import Part

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
TAIL = 20
"""Lines of a failed command's output in the report."""


@dataclass(frozen=True)
class Result:
    """The outcome of a training.

    steps: its metrics.jsonl; difference: from the training that it is compared with; planned: memory in GiB that
    tools/plan_layout.py expects of the fullest rank; stall: seconds for which a save blocked it.
    """

    name: str
    status: str
    why: str = ""
    steps: Sequence[dict[str, Any]] = ()
    difference: float | None = None
    speed: Speed | None = None
    planned: float | None = None
    stall: float | None = None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a part.

    why: the missing need, or the failure; last_lines: the end of a failed command's output; notes: findings of its
    commands.
    """

    part: Part
    status: str
    why: str = ""
    results: Sequence[Result] = ()
    last_lines: str = ""
    seconds: float = 0.0
    notes: Sequence[str] = ()


@dataclass
class Report:
    """The report so far. form: GPUs or CPU form; environment: rows of its table."""

    command: str
    form: str
    environment: Mapping[str, str] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    unfinished: str = ""

    @property
    def failed(self) -> bool:
        return any(outcome.status == FAIL for outcome in self.outcomes)

    def curves(self, loss: str) -> dict[str, list[float]]:
        """Values of one loss by name of training, for each training that passed, without steps that do not have it."""
        results = [result for outcome in self.outcomes for result in outcome.results if result.status == PASS]
        return {r.name: [step[loss] for step in r.steps if step[loss] is not None] for r in results}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; characters that would end a cell are escaped."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + "---|" * len(header), *lines[1:], ""]


def markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    """The page. pictures: files in its folder, shown with the curves."""
    counts = {status: sum(o.status == status for o in report.outcomes) for status in (PASS, FAIL, SKIP)}
    lines = [
        "# Acceptance of ross_mcore on one machine",
        "",
        f"`{report.command}`, {report.form}: "
        f"{counts[PASS]} parts passed, {counts[FAIL]} failed, {counts[SKIP]} were skipped.",
        "",
    ]
    if report.unfinished:
        lines += [f"**Not complete**: {report.unfinished}.", ""]
    lines += ["## Parts", ""]
    lines += table(
        ("part", "", "subject", "reason", "seconds"),
        ((o.part.name, f"**{o.status}**", o.part.title, o.why, f"{o.seconds:.0f}") for o in report.outcomes),
    )
    lines += ["## Environment", "", *table(("", ""), report.environment.items())]
    for outcome in report.outcomes:
        lines += _comparison(outcome)
        if outcome.notes:
            lines += [f"## Found by {outcome.part.name}", "", *(f"- {text}" for text in outcome.notes), ""]
    lines += _curves(report, pictures)
    lines += _speeds(report)
    for outcome in report.outcomes:
        if outcome.last_lines:
            lines += [f"## Last lines of {outcome.part.name}", "", "```", outcome.last_lines, "```", ""]
    return "\n".join(lines)


def _comparison(outcome: Outcome) -> list[str]:
    """A part's trainings compared with their reference."""
    if not outcome.results:
        return []
    against, tolerance = outcome.part.against, outcome.part.tolerance
    lines = [f"## {outcome.part.name}: {outcome.part.title}", ""]
    if against and tolerance:
        lines += [f"Compared with *{against}*, step by step; tolerance: {tolerance.why}.", ""]
    rows = []
    for result in outcome.results:
        far = "-" if result.difference is None else f"{result.difference:.1e}"
        losses = [[step[name] for step in result.steps if step[name] is not None] for name in LOSSES]
        ends = [f"{values[0]:.4f} to {values[-1]:.4f}" if values else "-" for values in losses]
        rows.append((result.name, f"**{result.status}**", far, *ends, result.why))
    return lines + table(("training", "", "largest relative difference of a loss", *LOSSES, "reason"), rows)


def _curves(report: Report, pictures: Sequence[str]) -> list[str]:
    found = {loss: report.curves(loss) for loss in LOSSES}
    if not any(found.values()):
        return []
    lines = ["## Loss curves", "", *(f"![{name}]({name})" for name in pictures), ""]
    for loss, curves in found.items():
        alike: dict[str, list[str]] = {}
        for name, values in curves.items():
            alike.setdefault(" ".join(f"{value:.4f}" for value in values), []).append(name)
        rows = [("; ".join(names), sparkline(curves[names[0]]), values) for values, names in alike.items()]
        lines += table((loss, "", "by iteration"), rows)
    return lines


def _speeds(report: Report) -> list[str]:
    rows: dict[str, tuple[str, ...]] = {}
    for result in (result for outcome in report.outcomes for result in outcome.results):
        if result.speed is not None:
            s = result.speed
            beside = ("-" if value is None else f"{value:.1f}" for value in (result.planned, result.stall))
            figures = f"{s.tokens:,.0f}", f"{s.samples:.1f}", f"{s.teraflops:.3f}", f"{s.memory:.2f}", *beside
            rows[result.name] = result.name, *figures
    if not rows:
        return []
    header = ("training", "tokens/s", "rows/s", "TFLOP/s/device", "peak GiB of a rank", "planned GiB", "save, s")
    note = (
        "Medians after the first steps; of a save, how long training was blocked. Trainings without a size are of a "
        "tiny model: their speed means nothing."
    )
    return ["## Speed and memory", "", note, "", *table(header, rows.values())]
