"""Compares this trainer with recorded values of the reference implementation, one row per quantity.

Every part, model, tokenizer, template and picture found in the folder is compared, in float32. tools/parity/golden.py
describes the folder, docs/parity.md the rows.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

EXAMPLE = """examples:
  python tools/check_parity.py --golden tests/golden
  torchrun --nproc-per-node 4 tools/check_parity.py --golden tests/golden \\
      --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

Each row shows our value, the recorded value, the largest absolute difference, the largest relative difference (relative
to the largest recorded magnitude), the tolerance, and ok or FAIL. Four kinds of rows are counted apart, never as ok:
  instead         the reference raised or returned NaN; the row describes what this trainer does
  unsupported     recorded behaviour that this trainer does not implement (docs/parity.md)
  not recorded    the folder lacks a value that the row needs
  not comparable  the layout cannot host this model; the row gives the reason, and the other models are compared
Under torchrun only whole models are compared, at the given layout; the other rows need no layout and are skipped.
Exit status: 0 when no row fails, 1 when a row fails, 2 when the folder cannot be used or no model fits the layout."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--golden", type=Path, required=True, metavar="DIR", help="folder of recorded values")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="T", help="[%(default)s]")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="P", help="[%(default)s]")
    parser.add_argument("--sequence-parallel", action="store_true", help="split norms and residuals over the sequence")
    parser.add_argument("--failures-only", action="store_true", help="print only rows that fail, and the summary")
    options = parser.parse_args(arguments)
    if min(options.tensor_model_parallel_size, options.pipeline_model_parallel_size) < 1:
        parser.error("a degree of parallelism is 1 or more")
    return options


def main() -> int:
    options = parse_arguments()

    from ross_mcore import platform

    platform.compute_fp32_exactly()
    import logging

    from parity.report import all_rows
    from parity.rows import HEADER, summary
    from parity.trial import Layout

    from ross_mcore.errors import UserError
    from ross_mcore.parallel import groups

    logging.disable(logging.WARNING)
    first = os.environ.get("RANK", "0") == "0"
    rows = []
    try:
        platform.initialize_process_group(timeout_minutes=10)
        layout = Layout(
            options.tensor_model_parallel_size, options.pipeline_model_parallel_size, options.sequence_parallel
        )
        if first:
            print(HEADER)
        for row in all_rows(options.golden, layout):
            rows.append(row)
            if first and (row.status == "FAIL" or not options.failures_only):
                print(row, flush=True)
        groups.destroy()
    except UserError as error:
        if first:
            print(f"check_parity: {error}", file=sys.stderr)
        return 2
    if not any(row.status in ("ok", "FAIL") for row in rows):
        if first:
            reasons = "".join(f"; {row.name}: {row.ours}" for row in rows if row.status == "not comparable")
            print(f"check_parity: {options.golden} holds nothing to compare at this layout{reasons}", file=sys.stderr)
        return 2
    if first:
        print(summary(rows))
    return int(any(row.status == "FAIL" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
