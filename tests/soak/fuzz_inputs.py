"""Runs every tool on damaged files. Two outcomes are allowed: it works, or it exits with status 2 and one paragraph
that names the file and the remedy.

    python tests/soak/fuzz_inputs.py --cases 300 --seed 1
    python tests/soak/fuzz_inputs.py --seed 1 --case 137           one case again
    python tests/soak/fuzz_inputs.py --cases 50 --only reconstruct

A failure is a traceback, a hang, too much memory, a file outside the output folder, an incomplete file under a final
name, or an error with internals of the program. Cases depend on the seed; the first of every target damages nothing.
Files and output of failures are kept. Exit status 1 when a case failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # the latter for check_parity.py
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

if TYPE_CHECKING:
    from tests.soak.fuzz.case import Result


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=150, metavar="N", help="number of cases [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the cases [%(default)s]")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="number of the first one [%(default)s]")
    parser.add_argument("--only", metavar="TARGET", help="only targets whose name contains this")
    parser.add_argument("--case", type=int, metavar="K", help="only case number K, and print the tool's message")
    parser.add_argument("--messages", action="store_true", help="print the error of every refused case")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="cases at a time [%(default)s]")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for failures [a temporary folder]")
    options = parser.parse_args(arguments)
    if min(options.cases, options.jobs) < 1 or options.first < 0:
        parser.error("--cases and --jobs are at least 1 and --first not negative")
    return options


def case_numbers(cases: int, first: int, only: str | None, case: int | None) -> list[int]:
    """The numbers of the cases to run. Raises ValueError for `only` that no target's name contains."""
    from tests.soak.fuzz.targets import TARGETS

    if case is not None:
        return [case]
    chosen = {which for which, target in enumerate(TARGETS) if (only or "") in target.name}
    if not chosen:
        raise ValueError(f"--only {only}: the targets are {', '.join(target.name for target in TARGETS)}")
    numbers, number = [], first
    while len(numbers) < cases:
        if number % len(TARGETS) in chosen:
            numbers.append(number)
        number += 1
    return numbers


def fuzz(
    numbers: Iterable[int],
    seed: int,
    work: Path,
    keep: Path,
    report: Callable[[Result], None] = lambda result: None,
    jobs: int = 2,
) -> list[Result]:
    """Makes valid inputs under `work`, runs the cases in `jobs` processes, moves the folders of failures to `keep`.

    The calling process must have one thread and have imported tests/distributed/preload.py. `report` is called with
    this process's results at once, and with those of the other processes when they have ended.
    """
    from tests.soak.fuzz.case import Result
    from tests.soak.fuzz.inputs import make_inputs

    make_inputs(work / "valid", work / "inputs")
    shares = [list(numbers)[job::jobs] for job in range(jobs)]
    others = []
    for job, share in list(enumerate(shares))[1:]:
        child = os.fork()
        if not child:
            status = 1
            try:
                found = [run_and_keep(number, seed, work, keep, f"case{job}") for number in share]
                (work / f"results{job}").write_text(json.dumps([asdict(result) for result in found]))
                status = 0
            finally:
                os._exit(status)
        others.append((child, job))
    results = []
    for number in shares[0]:
        results.append(run_and_keep(number, seed, work, keep, "case0"))
        report(results[-1])
    for child, job in others:
        if os.waitpid(child, 0)[1]:
            raise RuntimeError(f"process {job} of the fuzzer itself failed")
        for found in json.loads((work / f"results{job}").read_text()):
            results.append(Result(**found))
            report(results[-1])
    return sorted(results, key=lambda result: result.number)


def run_and_keep(number: int, seed: int, work: Path, keep: Path, name: str) -> Result:
    """Runs one case in the folder `name` of `work`; moves its files to `keep` if it failed."""
    from tests.soak.fuzz.case import run_case

    folder = work / name
    result = run_case(number, seed, work / "valid", folder)
    if result.problems:
        kept = keep / f"seed{seed}-case{number}"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for path in (folder, *(folder.with_suffix(suffix) for suffix in (".out", ".err", ".acts"))):
            shutil.move(path, kept / path.name)
        (kept / "about.txt").write_text(describe(result, seed) + "\n", "utf-8", "backslashreplace")
    return result


def describe(result: Result, seed: int) -> str:
    """A failure in a few lines, with the command that repeats it."""
    return "\n  ".join(
        [
            f"seed {seed} case {result.number}, {result.target}: {result.what}",
            *(f"FAILED: {problem}" for problem in result.problems),
            f"status {result.status}, {result.message[:1000]}",
            f"again: python tests/soak/fuzz_inputs.py --seed {seed} --case {result.number}",
        ]
    )


def table(results: list[Result]) -> str:
    """A table of the cases of every target: all, worked, refused, failed."""
    counts: dict[str, Counter[str]] = {}
    for result in results:
        ending = "failed" if result.problems else "worked" if result.status == 0 else "refused"
        counts.setdefault(result.target, Counter())[ending] += 1
    rows = [(name, found.total(), found["worked"], found["refused"], found["failed"]) for name, found in counts.items()]
    rows.append(("all", *(sum(row[place] for row in rows) for place in range(1, 5))))
    lines = [f"{'target':30}{'cases':>8}{'worked':>8}{'refused':>9}{'failed':>8}"]
    return "\n".join(lines + [f"{row[0]:30}{row[1]:8}{row[2]:8}{row[3]:9}{row[4]:8}" for row in rows])


def main() -> int:
    options = parse_arguments()
    try:
        numbers = case_numbers(options.cases, options.first, options.only, options.case)
    except ValueError as error:
        print(f"fuzz_inputs: {error}", file=sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    import tests.distributed.preload  # noqa: F401  once, before the first fork

    with tempfile.TemporaryDirectory(prefix="fuzz.") as work:
        keep = options.keep or Path(tempfile.mkdtemp(prefix="fuzz.failures."))
        done: list[Result] = []

        def report(result: Result) -> None:
            done.append(result)
            if result.problems:
                print("\r" + describe(result, options.seed), flush=True)
            elif options.messages and result.status:
                print(f"\r{result.number:5} {result.what[:100]}\n      {result.message}", flush=True)
            failed = sum(bool(found.problems) for found in done)
            bar = "#" * (30 * len(done) // len(numbers))
            print(f"\r[{bar:30}] {len(done)}/{len(numbers)}, {failed} failed", end="", file=sys.stderr, flush=True)

        results = fuzz(numbers, options.seed, Path(work), keep, report, options.jobs)
        print(file=sys.stderr)
        if options.case is not None:
            print(f"{results[0].what}\nstatus {results[0].status}: {results[0].message}")
    print(table(results))
    slowest = max(results, key=lambda result: result.seconds)
    most = max(results, key=lambda result: result.peak_bytes)
    seconds = sum(result.seconds for result in results) / len(results)
    print(f"{seconds:.2f} s per case; the slowest is {slowest.number} with {slowest.seconds:.1f} s")
    print(f"most memory beyond the imports: {most.peak_bytes >> 20} MiB, in case {most.number}")
    if any(result.problems for result in results):
        print(f"failed cases are kept in {keep}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
