"""A run that is saved at one layout and resumed at another trains like one that was never interrupted.

Every row of PAIRS: two steps at one layout; their checkpoint is loaded at the other and saved again untouched, with the
same bits of every weight and moment; then ten more steps, whose losses and gradient norms are compared with those of
one uninterrupted process.
`pytest -s tests/distributed/test_layout_pairs.py` prints the differences as a table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ross_mcore.checkpoint.folder import require_checkpoint
from tests.distributed.cases import INTERLEAVED, PACKED, Case, layout
from tests.distributed.conftest import moved, run_options, train_one_rank
from tests.distributed.harness import meeting_place, run_ranks

pytestmark = pytest.mark.slow

SAVED_AT, STEPS_AFTER = 2, 10
TRAIN_ITERS = SAVED_AT + STEPS_AFTER
FIGURES = ("lm_loss", "vm_loss", "grad_norm")
ALIKE = ("sample_digest", "num_tokens", "num_images", "learning_rate", "consumed_samples")

LAYOUTS = {
    "one process": Case("", 1),
    "tp2": Case("", 2, layout(2)),
    "tp2+sp": Case("", 2, layout(2, sequence_parallel=True)),
    "pp2": Case("", 2, layout(1, 2)),
    "pp2 layers 3,1": Case("", 2, layout(1, 2, pipeline_layout="3,1")),
    "pp2 layers 1,3": Case("", 2, layout(1, 2, pipeline_layout="1,3")),
    "pp3": Case("", 3, layout(1, 3)),
    "dp2": Case("", 2),
    "dp2 overlap": Case("", 2, layout(overlap_grad_reduce=True)),
    "dp2 distributed": Case("", 2, layout(use_distributed_optimizer=True)),
    "dp4 distributed": Case("", 4, layout(use_distributed_optimizer=True, micro_batch_size=1)),
    "tp2xpp2": Case("", 4, layout(2, 2)),
    "tp2xpp2+sp": Case("", 4, layout(2, 2, sequence_parallel=True)),
    "tp2xpp2+sp distributed overlap": Case(
        "", 4, layout(2, 2, sequence_parallel=True, use_distributed_optimizer=True, overlap_grad_reduce=True)
    ),
    "tp2xdp2 distributed overlap": Case("", 4, layout(2, use_distributed_optimizer=True, overlap_grad_reduce=True)),
    "pp2xvpp2": Case("", 2, layout(1, 2, **INTERLEAVED)),
    "pp2xvpp2xdp2 distributed": Case("", 4, layout(1, 2, use_distributed_optimizer=True, **INTERLEAVED)),
    "tp2xdp2": Case("", 4, layout(2)),
    "pp2xdp2": Case("", 4, layout(1, 2)),
    "pp2xdp2 distributed": Case("", 4, layout(1, 2, use_distributed_optimizer=True)),
}
"""Layouts by their names in the printed table. tp, pp, dp: tensor, pipeline and data parallel; vpp: interleaved; sp:
sequence parallel; distributed: with the distributed optimizer; overlap: of the gradient reduction."""

WORK = {
    "finetune": Case("", 1),
    "pretrain": Case("", 1, stage="pretrain"),
    "packed": Case("", 1, common=PACKED),
    "two data sets, packed": Case("", 1, data="mixture", common=PACKED),
    # bf16 has 8 bits (4e-3), so sums in another order round differently
    "bf16": Case("", 1, common=(("bf16", True),), relative=3e-2),
    "bf16 tied": Case("", 1, family="tied", common=(("bf16", True),), relative=3e-2),
    "bf16 plain": Case("", 1, common=(("bf16", True), ("use_distributed_optimizer", False)), relative=3e-2),
}
"""The training work, as the one-process run that all layouts are compared with."""


@dataclass(frozen=True)
class Pair:
    saved: str
    loaded: str
    work: str = "finetune"
    then: str = ""
    """The work after loading, if it differs from the work before."""

    @property
    def after(self) -> str:
        return self.then or self.work

    def __str__(self) -> str:
        work = f"{self.work} -> {self.then}" if self.then else self.work
        return f"{self.saved} -> {self.loaded}" + ("" if work == "finetune" else f" ({work})")


PAIRS = [
    Pair("one process", "tp2xpp2+sp"),
    Pair("one process", "dp4 distributed"),
    Pair("tp2xpp2+sp", "one process"),
    Pair("tp2xpp2+sp", "tp2xpp2+sp distributed overlap"),
    Pair("tp2", "tp2+sp"),
    Pair("tp2", "dp2 overlap"),
    Pair("tp2", "tp2xdp2 distributed overlap"),
    Pair("pp2 layers 3,1", "pp2 layers 1,3"),
    Pair("pp2 layers 3,1", "tp2xpp2"),
    Pair("pp3", "tp2"),
    Pair("pp3", "pp2xdp2 distributed"),
    Pair("tp2xdp2 distributed overlap", "pp2xdp2 distributed"),
    Pair("tp2xdp2 distributed overlap", "one process"),
    Pair("dp2 distributed", "pp2"),
    Pair("dp2 distributed", "dp2 distributed"),
    Pair("pp2xvpp2", "tp2xdp2 distributed overlap"),
    Pair("dp2 distributed", "pp2xvpp2xdp2 distributed"),
    Pair("pp3", "tp2", "pretrain"),
    Pair("dp2 distributed", "pp3", "pretrain"),
    Pair("tp2xpp2", "pp2xdp2", "packed"),
    Pair("tp2xpp2", "pp2", "two data sets, packed"),
    Pair("tp2xpp2", "dp2", "bf16"),
    Pair("pp2xdp2 distributed", "dp2", "bf16 tied"),
    Pair("tp2xpp2", "dp2", "bf16 plain"),
    Pair("tp2xpp2", "pp2", "bf16", "bf16 plain"),
    Pair("pp2", "tp2xdp2", "bf16 plain", "bf16"),
    Pair("tp2", "pp2", "bf16 plain", "finetune"),
    Pair("pp2", "tp2", "bf16", "finetune"),
    Pair("pp2", "dp2 distributed", "bf16", "finetune"),
    Pair("pp2", "tp2", "finetune", "bf16 plain"),
    Pair("tp2xpp2+sp distributed overlap", "dp2", "finetune", "bf16"),
]
"""In pretrain at pp3, the middle stage trains nothing."""


RUNS_TOGETHER = 4
"""Number of runs one after another in the same processes; starting processes takes as long as a run."""


@dataclass
class Job:
    """A run or a part of one: its folder, its options and the iteration after which it stops."""

    folder: Path
    case: Case
    flags: dict[str, Any]
    stop_after: int | None = None


def train_one_after_another(jobs: list[tuple[dict[str, Any], int | None]], ports: list[int]) -> None:
    """Runs all jobs on each rank. Every run has its own port for the rendezvous."""
    for (flags, stop_after), port in zip(jobs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        train_one_rank(flags, stop_after)


class Runs:
    """The runs of the table, made on first use, together with others of the same number of ranks."""

    def __init__(self, root: Path, options: Callable[..., dict[str, Any]]) -> None:
        self._root, self._options = root, options
        self._made: set[str] = set()

    def reference(self, work: str) -> Path:
        """The uninterrupted run in one process."""
        self._make([self._job(f"reference {name}", case) for name, case in WORK.items()])
        return self._root / f"reference {work}"

    def source(self, pair: Pair) -> Path:
        """The run that was stopped after SAVED_AT iterations."""
        rows = [other for other in PAIRS if LAYOUTS[other.saved].world == LAYOUTS[pair.saved].world]
        cases = {self._source(other): self._case(other.saved, other.work) for other in rows}
        self._make([self._job(name, case, SAVED_AT) for name, case in cases.items()])
        return self._root / self._source(pair)

    def resaved(self, pair: Pair) -> Path:
        """The checkpoint saved at the second layout before its first step; the run then continued."""
        jobs = []
        for other in PAIRS:
            if LAYOUTS[other.loaded].world == LAYOUTS[pair.loaded].world:
                case, source = self._case(other.loaded, other.after), {"load": str(self.source(other))}
                jobs.append(self._job(str(other), case, train_iters=SAVED_AT, **source))
                jobs.append(self._job(str(other), case, **source))
        self._make(jobs)
        return self._root / str(pair)

    @staticmethod
    def _case(place: str, work: str) -> Case:
        return replace(WORK[work], world=LAYOUTS[place].world, flags=LAYOUTS[place].flags)

    @staticmethod
    def _source(pair: Pair) -> str:
        return f"source {pair.saved} {pair.work}"

    def _job(self, name: str, case: Case, stop_after: int | None = None, **flags: Any) -> Job:
        options = self._options(case, self._root / name, **{"train_iters": TRAIN_ITERS, "save_interval": None, **flags})
        return Job(self._root / name, case, options, stop_after)

    def _make(self, jobs: list[Job]) -> None:
        """Runs the jobs that have not run yet; all have the same number of ranks."""
        jobs = [job for job in jobs if job.folder.name not in self._made]
        self._made.update(job.folder.name for job in jobs)
        for first in range(0, len(jobs), RUNS_TOGETHER):
            some = jobs[first : first + RUNS_TOGETHER]
            work = [(job.flags, job.stop_after) for job in some]
            places = [meeting_place() for _ in some]
            run_ranks(train_one_after_another, some[0].case.world, work, [place.port for place in places])


@pytest.fixture(scope="module")
def runs(workplace: Path, base: Callable[[str], Path], shards: Callable[[str], Path]) -> Runs:
    def options(case: Case, folder: Path, **flags: Any) -> dict[str, Any]:
        return run_options(case, folder, base, shards, **flags)

    return Runs(workplace / "pairs", options)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Lines to print at the end."""
    lines: list[str] = []
    yield lines
    print("\n\n| saved -> loaded | weights and moments moved |", " | ".join(FIGURES), "|")
    print("|---" * (len(FIGURES) + 2) + "|")
    print("\n".join(lines))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_run_resumes_at_another_layout(pair: Pair, runs: Runs, table: list[str]) -> None:
    relative = max(WORK[work].relative for work in (pair.work, pair.after))
    expected, run = metrics(runs.reference(pair.after)), runs.resaved(pair)
    ours = metrics(run)
    assert [entry["iteration"] for entry in ours] == list(range(SAVED_AT + 1, TRAIN_ITERS + 1))

    at = f"iter_{SAVED_AT:07d}"
    source = runs.source(pair)
    assert require_checkpoint(source).iteration == SAVED_AT
    difference = moved(source / at, run / at)

    largest = dict.fromkeys(FIGURES, 0.0)
    for entry, other in zip(ours, expected[SAVED_AT:], strict=True):
        for name in FIGURES:
            largest[name] = max(largest[name], abs(entry[name] - other[name]) / abs(other[name]))
    table.append(f"| {pair} | {difference:.0e} | {' | '.join(f'{value:.1e}' for value in largest.values())} |")
    assert difference == 0
    assert all(value <= relative for value in largest.values()), largest
    for entry, other in zip(ours, expected[SAVED_AT:], strict=True):
        assert {name: entry[name] for name in ALIKE} == {name: other[name] for name in ALIKE}
