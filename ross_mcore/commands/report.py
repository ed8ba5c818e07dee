"""Writes one HTML page about runs: curves, reconstructions, incidents, settings and how they differ.

  python tools/report.py runs/finetune
  python tools/report.py runs/with_vm_loss runs/without --output compared.html

The page is one file that loads nothing: it opens from a mail and without a network. Runs may still be in training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ross_mcore.commands import build_parser, ending_cleanly, interrupted, names_of, refuse

SCRIPT = "report.py"
MOST_RUNS = 8
"""As many runs as there are colours that differ clearly."""
MOST_PICTURES = 48


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> argparse.Namespace:
    parser = build_parser(prog, __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=f"folders of --save, up to {MOST_RUNS}")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="HTML to write [%(default)s]")
    parser.add_argument(
        "--pictures", type=int, default=12, metavar="N", help="most reconstructions of a run, 0 for none [%(default)s]"
    )
    options = parser.parse_args(arguments)
    if len(options.runs) > MOST_RUNS:
        parser.error(f"{len(options.runs)} runs, at most {MOST_RUNS} fit on a page; give fewer")
    if not 0 <= options.pictures <= MOST_PICTURES:
        parser.error(f"--pictures must be between 0 and {MOST_PICTURES}")
    if options.output.is_dir():
        parser.error(f"--output {options.output} is a folder; give a file such as {options.output / 'report.html'}")
    return options


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options = parse_arguments(arguments, prog)
    from rich.console import Console
    from rich.progress import Progress

    from ross_mcore.errors import UserError
    from ross_mcore.run_report.page import page, write
    from ross_mcore.run_report.reading import read_run, run_bytes

    console = Console(stderr=True)
    try:
        with ending_cleanly(), Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("reading", total=sum(map(run_bytes, options.runs)))
            found = [
                read_run(path, name, lambda size: bar.advance(task, size))
                for path, name in zip(options.runs, names_of(options.runs), strict=True)
            ]
            write(options.output, page(found, options.pictures))
    except (UserError, OSError) as error:
        return refuse(prog, error)
    except KeyboardInterrupt:
        return interrupted(prog, f"{options.output} is as it was")
    iterations = ", ".join(f"{run.name} to iteration {run.iteration:,}" for run in found)
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB; {iterations}")
    if damaged := {run.name: sum(run.damaged.values()) for run in found if sum(run.damaged.values())}:
        print(f"left out what is damaged: {', '.join(f'{count} lines of {name}' for name, count in damaged.items())}")
    return 0
