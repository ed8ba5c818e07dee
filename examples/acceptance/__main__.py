"""Checks on one machine that everything works, measures its speed, and writes OUT/report.md.

Without GPUs the parts run on gloo with a tiny model (the CPU form). Exit status: 0 no part failed, 1 a part failed, 2
options that cannot work, 130 interrupted with Ctrl-C. The report is written in all cases except 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from examples.acceptance.curves import svg
from examples.acceptance.judge import LOSSES
from examples.acceptance.parts import PARTS, Machine
from examples.acceptance.report import FAIL, PASS, Report, markdown
from examples.acceptance.runner import Runner, shown

MOST_RANKS = 8
RANKS_ON_CPU = 4
INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""
FIRST = ("environment", "prepare")
"""Parts that the others need."""
CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    listed = "\n".join(f"  {part.name:14}{part.title}" for part in PARTS)
    parser = argparse.ArgumentParser(
        prog="examples/gpu_acceptance.sh",
        description=__doc__,
        epilog=f"parts:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/acceptance"), help="folder of the report [%(default)s]")
    parser.add_argument("--cpu", action="store_true", help="the CPU form, even if there are GPUs")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="maximum number of processes [the GPUs, 4 in the CPU form]"
    )
    parser.add_argument("--parts", metavar="A,B", help="only these, and environment and prepare [those with a share]")
    options = parser.parse_args(arguments)
    names = [part.name for part in PARTS]
    options.named = options.parts.split(",") if options.parts else []
    chosen = options.named or names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--parts {','.join(unknown)}: the parts are {', '.join(names)}")
    if options.ranks is not None and options.ranks < 1:
        parser.error(f"--ranks {options.ranks}: at least 1")
    options.parts = [part for part in PARTS if part.name in chosen or part.name in FIRST]
    options.out = options.out.resolve()
    if options.out.is_dir() and any(options.out.iterdir()) and not (options.out / "report.md").exists():
        parser.error(f"--out {options.out}: it has other contents; give an empty folder or a new one")
    return options


def write(report: Report, out: Path) -> None:
    """Writes the report so far and a picture of each loss's curves."""
    pictures = []
    for loss in LOSSES:
        if curves := report.curves(loss):
            pictures.append(f"{loss}.svg")
            (out / pictures[-1]).write_text(svg(f"{loss} by iteration", curves), encoding="utf-8")
    (out / "report.md").write_text(markdown(report, pictures), encoding="utf-8")


def main() -> int:
    options = parse_arguments()
    out: Path = options.out
    report = Report(shown(sys.argv[1:]), "")
    runner = Runner(out, Machine(gpu=False, ranks=1), CPU if options.cpu else {})
    try:
        runner.clear()
        for part in options.parts:
            print(f"{part.name}: {part.title} ...", end=" ", flush=True)
            outcome = runner.run(part)
            report.outcomes.append(outcome)
            print(f"{outcome.status} {outcome.why}".rstrip(), flush=True)
            if part.name == "environment" and outcome.status == PASS:
                runner = _runner_for_machine(report, options)
            write(report, out)
            if part.name in FIRST and outcome.status == FAIL:
                report.unfinished = f"nothing else can run without {part.name}"
                break
    except KeyboardInterrupt:
        report.unfinished = "it was interrupted"
        return INTERRUPTED
    finally:
        write(report, out)
        print(f"the report is {out / 'report.md'}")
    return int(report.failed)


def _runner_for_machine(report: Report, options: argparse.Namespace) -> Runner:
    """A runner for the machine that the environment part found; adds it to the report."""
    log = (options.out / "logs" / "environment.log").read_text(encoding="utf-8")
    found, _ = json.JSONDecoder().raw_decode(log, log.index("\n{") + 1)  # libraries may print text before and after it
    gpus = found["gpus"]
    ranks = min(options.ranks or MOST_RANKS, gpus) if gpus else options.ranks or RANKS_ON_CPU
    report.environment = found["rows"]
    report.form = f"on {gpus} GPUs, {ranks} ranks at most" if gpus else f"the CPU form, {ranks} ranks at most"
    return Runner(options.out, Machine(bool(gpus), ranks, found["lacks"]), {} if gpus else CPU, options.named)


if __name__ == "__main__":
    raise SystemExit(main())
