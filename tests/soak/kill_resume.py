"""Trains small models, kills their ranks with SIGKILL anywhere, resumes them until they finish, and compares weights,
moments, counters and logs bit by bit with uninterrupted runs.

    python tests/soak/kill_resume.py --trials 100 --seed 1
    python tests/soak/kill_resume.py --seed 1 --trial 37           one trial again

Every trial is a run of one of six layouts that is killed one to four times. A kill is at the n-th arrival of a rank at
a place of the program (tests/soak/kill/places.py), a little after it, or at any time; it kills one rank, while the
others get SIGTERM and three seconds, or all ranks. Trials depend on the seed and on the clock.
If trials fail, their folders are kept and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # for the server that forks the ranks
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

if TYPE_CHECKING:
    from tests.soak.kill.trial import Trial


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="number of trials [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the trials [%(default)s]")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="number of the first one [%(default)s]")
    parser.add_argument("--trial", type=int, metavar="K", help="only trial number K, and keep its folder")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for evidence [a temporary folder]")
    options = parser.parse_args(arguments)
    if options.trials < 1 or options.first < 0:
        parser.error("--trials is at least 1 and --first not negative")
    return options


def describe(trial: Trial, seed: int) -> str:
    """A failed trial, with the command that repeats it."""
    lines = [f"seed {seed} trial {trial.number}, {trial.row}:"]
    for number, life in enumerate(trial.lives):
        kill = trial.kills[number] if number < len(trial.kills) else None
        lines.append(f"life {number}: {life.place or 'not killed'}, {life.seconds:.1f} s; planned {kill}")
    lines += [f"FAILED: {problem}" for problem in trial.problems]
    lines.append(f"evidence: {trial.folder}")
    lines.append(f"again: python tests/soak/kill_resume.py --seed {seed} --trial {trial.number}")
    return "\n  ".join(lines)


def summary(trials: list[Trial], seconds: float) -> str:
    """Surviving trials, the largest difference of a weight or moment, and the places of the kills."""
    survived = sum(not trial.problems for trial in trials)
    kills = Counter(place for trial in trials for place in trial.places)
    rows = Counter(trial.row for trial in trials)
    lines = [f"{'killed at':34}{'times':>6}"]
    lines += [f"{place:34}{count:6}" for place, count in kills.most_common()]
    return "\n".join(
        [
            "\n".join(lines),
            "",
            "trials: " + ", ".join(f"{count} {row}" for row, count in sorted(rows.items())),
            f"survived {survived} of {len(trials)} trials, {kills.total()} kills, "
            f"{sum(len(trial.lives) for trial in trials)} lives in {seconds:.0f} s",
            f"largest difference of a weight or moment: {max(trial.weights for trial in trials):.1e}",
        ]
    )


def main() -> int:
    options = parse_arguments()
    from tests.soak.kill.trial import Soak

    folder = options.keep or Path(tempfile.mkdtemp(prefix="kill_resume."))
    soak, began = Soak(folder, options.seed), time.monotonic()
    only = options.trial is not None
    numbers = [options.trial] if only else range(options.first, options.first + options.trials)
    done: list[Trial] = []
    for number in numbers:
        trial = soak.run(number)
        done.append(trial)
        if trial.problems:
            print(describe(trial, options.seed), flush=True)
        failed = sum(bool(trial.problems) for trial in done)
        kills = sum(len(trial.places) for trial in done)
        print(f"{len(done)}/{len(numbers)} trials, {kills} kills, {failed} failed", file=sys.stderr, flush=True)
    print(summary(done, time.monotonic() - began))
    if any(trial.problems for trial in done):
        print(f"the evidence is in {folder}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
