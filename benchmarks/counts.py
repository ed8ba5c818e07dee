"""Counts of what a step costs on a GPU, taken on this CPU, beside the least possible.

    python benchmarks/counts.py            # all
    python benchmarks/counts.py wire syncs # some

Synchronisations, bytes on the wire and in a save, operations a layer, slots of a row: each module of tools/counting
with a function `rows()` is a section. Counts do not depend on the speed of the machine; tests assert the same numbers.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import counting  # noqa: E402  its folder is on the path from here on
from counting import Row  # noqa: E402


def sections() -> list[str]:
    """Modules of tools/counting that have rows."""
    names = sorted(module.name for module in pkgutil.iter_modules(counting.__path__))
    return [name for name in names if hasattr(importlib.import_module(f"counting.{name}"), "rows")]


def table(rows: list[Row]) -> str:
    """Rows with aligned columns; the last column is free text."""
    lines = [Row("", "count", "aim", ""), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        f"  {line.name:<{widths[0]}}  {line.count:>{widths[1]}}  {line.aim:>{widths[2]}}  {line.meaning}".rstrip()
        for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="*", help=f"of {', '.join(sections())} [all]")
    options = parser.parse_args()
    for name in options.section or sections():
        module = importlib.import_module(f"counting.{name}")
        print(f"{name}: {(module.__doc__ or '').splitlines()[0]}")
        print(table(module.rows()), flush=True)


if __name__ == "__main__":
    main()
