"""Scores of benchmarks as JSON, as Markdown and as tables in a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ross_mcore import checked
from ross_mcore.evaluation.items import Judged, by_category
from ross_mcore.evaluation.table import Benchmark
from ross_mcore.logs import replace_file

SCORES, RESULTS, TABLE = "scores.json", "results.json", "results.md"
DECIMALS = {"SSIM": 4, "PSNR": 2}

Line = list[str]


def summarise(name: str, benchmark: str, checkpoint: str, row: Benchmark, judged: Sequence[Judged]) -> dict[str, Any]:
    """The entry of a benchmark in results.json."""
    bad = sum(each.is_bad for each in judged)
    return {
        "name": name,
        "benchmark": benchmark,
        "checkpoint": checkpoint,
        "questions": len(judged),
        "bad": bad,
        "bad_are": "left out" if row.makes == "reconstructions" else "wrong",
        "unread": sum(each.read is None for each in judged) - bad if row.makes == "answers" else 0,
        "scores": row.score(judged),
        "categories": {
            category: {"questions": len(some), "scores": row.score(some)}
            for category, some in by_category(judged).items()
        },
    }


def write_results(out: Path, name: str, entry: dict[str, Any]) -> None:
    """Writes the scores of one benchmark, and the tables of all that `out` has. Raises OSError."""
    replace_file(out / name / SCORES, _json(entry))
    entries = list(_entries(out))
    replace_file(out / RESULTS, _json(entries))
    replace_file(out / TABLE, "\n".join(markdown(each) for each in entries).encode())


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _entries(out: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(out.glob(f"*/{SCORES}")):
        try:
            entry = checked.read_json(file)
        except ValueError:
            continue  # not one of ours
        if isinstance(entry, dict) and {"name", "scores", "categories"} <= set(entry):
            yield entry


def title(entry: dict[str, Any]) -> str:
    """Name, checkpoint and counts of a benchmark, as one line."""
    counts = [f"{entry['questions']} {_counted(entry)}"]
    counts += [f"{entry['bad']} bad, {entry['bad_are']}"] if entry["bad"] else []
    counts += [f"{entry['unread']} answers not recognised, wrong"] if entry["unread"] else []
    benchmark = "" if entry["name"] == entry["benchmark"] else f" ({entry['benchmark']})"
    return f"{entry['name']}{benchmark}: {entry['checkpoint']}, {'; '.join(counts)}"


def table(entry: dict[str, Any]) -> tuple[Line, list[Line]]:
    """The header and the lines of a benchmark's table: all questions, then each category."""
    names = list(entry["scores"])
    lines = [_line("all", entry["questions"], entry["scores"], names)]
    lines += [_line(name, part["questions"], part["scores"], names) for name, part in entry["categories"].items()]
    return ["", _counted(entry), *names], lines


def _counted(entry: dict[str, Any]) -> str:
    return "pictures" if "PSNR" in entry["scores"] else "questions"


def _line(name: str, count: int, scores: dict[str, float], names: Sequence[str]) -> Line:
    values = [f"{scores[each]:.{DECIMALS.get(each, 1)}f}" if each in scores else "" for each in names]
    return [name, str(count), *values]


def markdown(entry: dict[str, Any]) -> str:
    header, lines = table(entry)
    rows = [header, ["---", *["--:"] * (len(header) - 1)], *lines]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return f"## {title(entry)}\n\n{body}\n"


def print_results(entries: Sequence[dict[str, Any]]) -> None:
    """Prints a table for each benchmark."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, highlight=False)
    for entry in entries:
        header, lines = table(entry)
        shown = Table()
        for name in header:
            shown.add_column(name, justify="right" if name else "left")
        for line in lines:
            shown.add_row(*map(checked.printable, line))
        console.print(checked.printable(title(entry)), soft_wrap=True)
        console.print(shown)
