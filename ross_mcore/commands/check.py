"""Verifies all files of a checkpoint by their checksums and prints the checkpoint's contents.

  python tools/check_checkpoint.py runs/finetune                  the newest checkpoint of a run
  python tools/check_checkpoint.py runs/finetune/iter_0000500     this checkpoint
  python tools/check_checkpoint.py runs/finetune --all --json     all checkpoints of a run, as one JSON object

No tensor is loaded: parameters per part, element types, optimizer state and layout come from small files. To compute
checksums, the large files are read once, at the speed of the disk; --no-verify skips this.
Exit status: 0 intact, 1 a file is damaged or incomplete (each is named), 2 no checkpoint found.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ross_mcore.commands import build_parser, refuse

if TYPE_CHECKING:
    from rich.console import Console

    from ross_mcore.checkpoint.folder import Checkpoint

SCRIPT = "check_checkpoint.py"


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> argparse.Namespace:
    parser = build_parser(prog, __doc__)
    parser.add_argument("path", type=Path, help="a run's folder (--save), a converted model, or one iter_* folder")
    parser.add_argument("--all", action="store_true", help="check all checkpoints of the folder, not only the newest")
    parser.add_argument("--no-verify", action="store_true", help="compare sizes of files only, not checksums")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_args(arguments)


def check(checkpoint: Checkpoint, verify: bool, advance: Callable[[int], None]) -> dict[str, Any]:
    """The description of a checkpoint, with damaged files among its problems."""
    from ross_mcore.checkpoint.contents import describe
    from ross_mcore.checkpoint.manifest import damages
    from ross_mcore.errors import UserError
    from ross_mcore.models.inventory import inventory

    manifest = checkpoint.manifest()
    problems = damages(checkpoint.path, manifest, manifest.files, advance) if verify else []
    try:
        found = describe(checkpoint, inventory)
    except UserError as error:
        found = {"path": str(checkpoint.path), "iteration": checkpoint.iteration, "problems": []}
        problems = problems or [str(error)]
    return found | {"verified": verify and manifest.has_checksums, "problems": problems + found["problems"]}


def count(number: float) -> str:
    """6738415616 -> 6.74 B"""
    for factor, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.2f}{unit}"
    return f"{number:.0f}"


def size(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.2f} MiB"


def print_checkpoint(found: dict[str, Any], console: Console) -> None:
    """Prints the result of `check`. Names and values come from files, so the console must not read markup."""
    from rich.table import Table

    from ross_mcore.checked import printable

    def show(text: str, style: str = "") -> None:
        console.print(printable(text), style=style)

    show(found["path"], "bold")
    if "parts" in found:
        stage = found["training_stage"]
        samples = found["consumed_samples"]
        what = "a model, no training state" if samples is None else f"{stage}, {samples:,} samples consumed"
        show(f"  iteration {found['iteration']}: {what}")
        layout = found["layout"] or {"not recorded": ""}
        show("  saved at: " + ", ".join(f"{k} {v}".strip() for k, v in layout.items()))
        table = Table("part", "parameters", "trained", "bytes", "type", box=None, padding=(0, 2))
        for part, own in found["parts"].items():
            types = ", ".join(own["dtypes"])
            trained = count(own["trained_parameters"]) if own["trained_parameters"] else "-"
            table.add_row(part, count(own["parameters"]), trained, size(own["bytes"]), types)
        if (optimizer := found["optimizer"]) is not None:
            kinds = "optimizer: " + ", ".join(optimizer["state"])
            table.add_row(printable(kinds), "", "", size(optimizer["bytes"]), ", ".join(optimizer["dtypes"]))
        table.add_row("all files", "", "", size(found["bytes"]), f"{found['files']} files")
        console.print(table)
        for name in found["unlisted"]:
            show(f"  {name} does not belong to it")
    if found["problems"]:
        for problem in found["problems"][:20]:
            show(f"  {problem}", "red")
        if (rest := len(found["problems"]) - 20) > 0:
            show(f"  and {rest} more", "red")
    else:
        compared = "all checksums are right" if found["verified"] else "all sizes are right; content is not compared"
        show(f"  intact: {compared}", "green")


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options = parse_arguments(arguments, prog)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from ross_mcore.checkpoint.folder import nothing_at, scan
    from ross_mcore.errors import UserError

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    try:
        complete, incomplete = scan(options.path)
        if not complete and not incomplete:
            raise nothing_at(options.path, [])
        chosen = complete if options.all else complete[:1]
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=options.no_verify) as progress:
            bar = progress.add_task("", total=sum(checkpoint.manifest().bytes for checkpoint in chosen))
            found = [check(c, not options.no_verify, lambda count: progress.advance(bar, count)) for c in chosen]
    except UserError as error:
        return refuse(prog, error)
    is_intact = not incomplete and not any(one["problems"] for one in found)
    if options.json:
        print(json.dumps({"intact": is_intact, "incomplete": incomplete, "checkpoints": found}, indent=1))
        return 0 if is_intact else 1
    console = Console(markup=False, emoji=False, highlight=False)
    for one in found:
        print_checkpoint(one, console)
    for problem in incomplete:
        console.print(problem, style="red")
    return 0 if is_intact else 1
