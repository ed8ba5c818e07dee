"""Runs benchmarks and writes what they print into benchmarks/RESULTS.md, with the machine and the versions.

    python benchmarks/run.py             # all: `make bench`
    python benchmarks/run.py --quick     # the fast ones, shorter
    python benchmarks/run.py step order  # some

RESULTS.md keeps the latest lines of each benchmark, so that one can be run again alone. Times need an idle machine;
counts do not.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "RESULTS.md"
ARGUMENTS: dict[str, tuple[list[str], list[str] | None]] = {
    "counts": ([], ["wire"]),
    "step": ([], ["--quick"]),
    "parallel": ([], None),
    "attention": ([], []),
    "generation": ([], None),
    "labelled_logits": ([], []),
    "order": ([], []),
    "packing": ([], []),
    "packed_training": (["--rows", "8", "--repeats", "1"], None),
    "precomputed": (["--repeats", "1"], None),
    "data": (["--repeats", "3"], None),
    "checkpoint": ([], None),
}
"""Benchmark -> its arguments here, and those of --quick; None: not with --quick."""
NOISE = re.compile(r"USDT:|Writing model shards|Loading weights|━━|^\s*$")


def machine() -> str:
    """One line: processor, cores, memory and versions."""
    processor = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    names = ("torch", "megatron-core", "transformers", "diffusers", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    cores = len(os.sched_getaffinity(0))
    return (
        f"{processor[1] if processor else platform.machine()}, {cores} cores, {memory:.0f} GB; "
        f"Python {platform.python_version()}, {versions}"
    )


def read_results() -> dict[str, str]:
    """Name of a benchmark -> its section."""
    if not RESULTS.exists():
        return {}
    _, *sections = re.split(r"^## ", RESULTS.read_text(encoding="utf-8"), flags=re.M)
    return {section.partition("\n")[0].strip(): section for section in sections}


def write_results(sections: dict[str, str]) -> None:
    order = [*ARGUMENTS, *(name for name in sections if name not in ARGUMENTS)]
    text = "# Results of the benchmarks\n\nWritten by `make bench`; docs/performance.md explains them.\n\n"
    text += "\n".join(f"## {sections[name].rstrip()}\n" for name in order if name in sections)
    RESULTS.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", nargs="*", choices=[[], *ARGUMENTS], help="[all]", metavar="BENCHMARK")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    missing = {path.stem for path in FOLDER.glob("*.py")} - set(ARGUMENTS) - {Path(__file__).stem}
    if missing:
        raise SystemExit(f"{', '.join(sorted(missing))}: not in ARGUMENTS of {Path(__file__).name}")
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1"}
    for name in options.benchmark or ARGUMENTS:
        given = ARGUMENTS[name][options.quick]
        if given is None:
            continue
        print(f"== {name}", flush=True)
        began, load = time.perf_counter(), os.getloadavg()[0]
        words = [sys.executable, str(FOLDER / f"{name}.py"), *given]
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr.strip() or done.stdout.strip()}")
        lines = "\n".join(line for line in done.stdout.splitlines() if not NOISE.search(line))
        print(lines, flush=True)
        when = f"{datetime.date.today()}, {time.perf_counter() - began:.0f} s, load before {load:.1f}"
        sections = read_results()
        sections[name] = f"{name}\n\n{when}. {machine()}.\n\n```\n{lines}\n```\n"
        write_results(sections)


if __name__ == "__main__":
    main()
