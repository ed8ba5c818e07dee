"""Trials: the runs, the places where ranks are killed, and the comparison at the end."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.distributed.cases import PACKED, Case, layout
from tests.distributed.conftest import write_shards
from tests.distributed.test_stream import overwrite
from tests.recorded import recorded_checkpoint
from tests.soak.kill.compare import compare
from tests.soak.kill.life import Kill, Life, live
from tests.soak.kill.places import Errand

TRAIN_ITERS = 6
MOST_KILLS = 4
MOST_LIVES = 12
LONGEST_DELAY_SECONDS = 0.05
"""About one step: a rank that is killed within this time after its arrival is anywhere in the operation."""

ROWS = {
    "one process": Case("", 1, {"num_workers": 1, "keep_last": 1}, common=PACKED),
    "dp2 distributed overlap": Case("", 2, layout(use_distributed_optimizer=True, overlap_grad_reduce=True)),
    "tp2+sp": Case("", 2, layout(2, sequence_parallel=True, keep_last=1)),
    "pp2": Case("", 2, layout(1, 2, num_workers=1)),
    "tp2xpp2": Case("", 4, layout(2, 2, save_interval=1), common=PACKED),
    "pp2xdp2 distributed": Case("", 4, layout(1, 2, use_distributed_optimizer=True, keep_last=1)),
}
"""Two samples of the data have invalid JSON and two a picture of zero bytes, so that every run replaces some samples
and lists them in quarantine.jsonl."""


@dataclass(frozen=True)
class Material:
    """Data and checkpoint of all trials, and their folder."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Material:
        recorded_checkpoint("qwen2_siglip", folder / "base")
        write_shards(folder / "whole", "mixed")
        overwrite(folder / "whole", folder / "shards")
        return cls(folder)

    def flags(self, case: Case, save: Path) -> dict[str, Any]:
        return {
            "load": str(self.folder / "base"),
            "data_path": str(self.folder / "shards"),
            "valid_data_path": str(self.folder / "whole"),
            "valid_interval": 4,
            "valid_samples": 2,
            "max_bad_fraction": 1.0,
            "save": str(save),
            "training_stage": "finetune",
            "seq_length": 256,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "train_iters": TRAIN_ITERS,
            "lr": 1e-3,
            "lr_warmup_iters": 2,
            "num_workers": 0,
            "pack": False,
            "log_interval": 1,
            "save_interval": 2,
            "keep_last": 2,
            "distributed_timeout_minutes": 1,
            **dict(case.common),
            **case.flags,
        }


@dataclass(frozen=True)
class Uninterrupted:
    """The uninterrupted run of a row, with the arrivals of each rank and its duration."""

    folder: Path
    arrivals: list[Counter[str]]
    seconds: float


@dataclass
class Trial:
    """A killed run: its lives and the comparison at the end."""

    number: int
    row: str
    folder: Path
    lives: list[Life] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    weights: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def places(self) -> list[str]:
        """The places of the kills."""
        return [life.place for life in self.lives if life.place is not None]


class Soak:
    """Makes the uninterrupted run of a row when it is first needed, and trials."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.material = Material.make(folder / "material")
        self._uninterrupted: dict[str, Uninterrupted] = {}

    def uninterrupted(self, row: str) -> Uninterrupted:
        """Raises RuntimeError when it fails."""
        if row not in self._uninterrupted:
            folder, case = self.folder / f"uninterrupted {row}", ROWS[row]
            life = live(self.material.flags(case, folder / "run"), case.world, folder / "life", None)
            if life.problem:
                raise RuntimeError(f"{row}: the run that nobody kills failed, see {folder}: {life.problem}")
            counts = [json.loads((folder / "life" / f"rank{rank}.counts").read_text()) for rank in range(case.world)]
            self._uninterrupted[row] = Uninterrupted(folder / "run", [Counter(c) for c in counts], life.seconds)
        return self._uninterrupted[row]

    def run(self, number: int, row: str | None = None) -> Trial:
        """Runs trial `number`; its folder is kept if there are problems."""
        draw = random.Random(f"{self.seed} {number}")
        row = row or draw.choice(list(ROWS))
        expected, case = self.uninterrupted(row), ROWS[row]
        trial = Trial(number, row, self.folder / f"trial{number}")
        flags, kills = self.material.flags(case, trial.folder / "run"), draw.randint(1, MOST_KILLS)
        while len(trial.lives) < MOST_LIVES:
            kill = plan(draw, expected) if len(trial.kills) < kills else None
            life = live(flags, case.world, trial.folder / f"life{len(trial.lives)}", kill)
            trial.lives.append(life)
            if kill is not None:
                trial.kills.append(kill)
            if life.problem:
                trial.problems.append(f"life {len(trial.lives) - 1}: {life.problem}")
                break
            if life.finished:
                found = compare(trial.folder / "run", expected.folder)
                trial.weights, trial.problems = found.weights, found.problems
                break
            if draw.random() < 0.3:
                tear_last_line(trial.folder / "run" / "metrics.jsonl", draw)
        if not trial.problems:
            shutil.rmtree(trial.folder)
        return trial


def plan(draw: random.Random, expected: Uninterrupted) -> Kill:
    """A random kill: at a place of the rank's arrivals, or at any time."""
    rank, everyone = draw.randrange(len(expected.arrivals)), draw.random() < 0.5
    if draw.random() < 0.25:
        return Kill(rank, everyone, after=draw.uniform(0, 0.8 * expected.seconds))
    arrivals = expected.arrivals[rank]
    place = draw.choice(sorted(arrivals))
    # the first half, because later lives are shorter
    nth = draw.randint(1, max(1, arrivals[place] // 2))
    delay = draw.choice([None, draw.uniform(0, LONGEST_DELAY_SECONDS)])
    return Kill(rank, everyone, Errand(place, nth, delay))


def tear_last_line(path: Path, draw: random.Random) -> None:
    """Leaves half a line at the end, as after a power failure."""
    if path.exists() and (lines := [line for line in path.read_bytes().splitlines() if len(line) > 1]):
        with path.open("ab") as stream:
            stream.write(lines[-1][: draw.randint(1, len(lines[-1]) - 1)])
