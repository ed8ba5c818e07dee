"""Convergence of FP8 on the stand-ins: the demo's second stage in fp32, bf16 and FP8 on the same samples and draws.

Starts every run from the weights of the demo's first stage (`run_demo.py --only-pretrain`, or a whole demo), trains
each in one process of one thread, two at a time, and writes one picture and one table. docs/gpu.md describes the result
and its limits.

    python -m tests.te.convergence --demo runs/demo --out runs/fp8_convergence --picture docs/fp8_convergence.svg
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ross_mcore.checkpoint.folder import find_checkpoint
from tests.te import standin
from tests.te.curves import Curve, Panel, draw

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"
WINDOW = 20
"""Number of steps averaged in a figure of the table and in a point of the curves."""

LOSSES = ("lm_loss", "vm_loss")

ENGINE = ("--transformer-impl", "transformer_engine")
FP8 = (*ENGINE, "--bf16", "--fp8-format", "hybrid")
DELAYED = ("--fp8-recipe", "delayed", "--fp8-amax-history-len", "16", "--fp8-amax-compute-algo", "max")


@dataclass(frozen=True)
class Way:
    """One method to compute the same training."""

    name: str
    flags: tuple[str, ...]
    colour: str
    is_dashed: bool = False


WAYS = (
    Way("fp32", (), "#1f2933"),
    Way("fp32, TE layers", ENGINE, "#9aa5b1", is_dashed=True),
    Way("bf16", (*ENGINE, "--bf16"), "#2e7dd1"),
    Way("FP8 delayed", (*FP8, *DELAYED), "#d9480f"),
    Way("FP8 tensorwise", (*FP8, "--fp8-recipe", "tensorwise"), "#2b8a3e"),
)
"""The first is the reference of the others. The second differs from it only in the order of sums, so it shows the
difference between two runs of the same arithmetic."""


@dataclass(frozen=True)
class Outcome:
    """A finished run: its steps, both losses over the held-out questions, the share answered correctly."""

    steps: list[dict[str, Any]]
    held_out: dict[str, float]
    accuracy: float


def run(arguments: Sequence[str | Path], log: Path) -> None:
    """Runs Python with `arguments` from the top of the repository, in one thread. Exits if it fails."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=False)
    if status.returncode:
        raise SystemExit(f"convergence: {' '.join(command)} failed; its last words:\n{log.read_text()[-2000:]}")


def training_command(way: Way, seed: int, iterations: int | None, demo: Path, out: Path) -> list[str | Path]:
    command: list[str | Path] = ["-m", "tests.te.pretrain_ross", "--config", DEMO / "finetune.yaml"]
    command += ["--load", demo / "pretrain", "--data-path", demo / "shards" / "finetune"]
    command += ["--valid-data-path", out / "shards" / "heldout", "--save", folder_of(way, seed, out)]
    command += ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--seed", str(seed)]
    return command + (["--train-iters", str(iterations)] if iterations else []) + list(way.flags)


def folder_of(way: Way, seed: int, out: Path) -> Path:
    return out / f"{way.name.lower().replace(',', '').replace(' ', '_')}_seed_{seed}"


def outcome_of(folder: Path, demo: Path) -> Outcome:
    """Reads a run's output; its weights answer the demo's held-out questions in fp32, with the local layers."""
    from ross_mcore.trained import load_model

    sys.path[:0] = [str(DEMO)] if str(DEMO) not in sys.path else []
    from run_demo import accuracy, metrics_of

    validation = json.loads((folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    (held_out,) = validation["datasets"].values()
    records = json.loads((demo / "data" / "heldout.json").read_text(encoding="utf-8"))
    share, _ = accuracy(load_model(folder), records, demo / "data")
    return Outcome(metrics_of(folder), {loss: held_out[loss] for loss in LOSSES}, share)


def assert_same_work(outcomes: Sequence[Outcome]) -> None:
    """Checks that all runs trained, step by step, on the same samples, labels and pictures."""
    names = ("sample_digest", "num_tokens", "num_images")
    work = [[[step[name] for name in names] for step in outcome.steps] for outcome in outcomes]
    if any(other != work[0] for other in work[1:]):
        raise SystemExit("convergence: the runs did not train on the same samples; make them again")
    if not all(step["applied"] for outcome in outcomes for step in outcome.steps):
        raise SystemExit("convergence: a run left out steps, whose losses or gradients were not finite; see its log")


def table(outcomes: dict[tuple[str, int], Outcome], seeds: Sequence[int]) -> str:
    """Markdown: means over the seeds, and in brackets the differences from fp32 for each seed."""
    titles = (f"lm_loss, last {WINDOW} steps", f"vm_loss, last {WINDOW} steps", "held-out lm_loss", "held-out vm_loss")
    lines = [f"| | {' | '.join(titles)} | held-out answers right |", "|---" * (len(titles) + 2) + "|"]
    for way in WAYS:
        ours, theirs = ([outcomes[name, seed] for seed in seeds] for name in (way.name, WAYS[0].name))
        cells = []
        for values, references in zip(zip(*map(losses_of, ours)), zip(*map(losses_of, theirs))):
            differences = ", ".join(f"{round(a - b, 4) + 0.0:+.4f}" for a, b in zip(values, references))
            cells.append(f"{fmean(values):.4f}" + (f" ({differences})" if way != WAYS[0] else ""))
        cells.append(", ".join(f"{outcome.accuracy:.1%}" for outcome in ours))
        lines.append(f"| {way.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def losses_of(outcome: Outcome) -> list[float]:
    """Both losses at the end of training, then over the held-out questions."""
    trained = [fmean(step[loss] for step in outcome.steps[-WINDOW:] if step[loss] is not None) for loss in LOSSES]
    return trained + [outcome.held_out[loss] for loss in LOSSES]


def picture(outcomes: Sequence[Outcome], seed: int) -> str:
    """The curves of one seed as an SVG."""
    titles = {"lm_loss": "lm_loss: next words of the answers", "vm_loss": "vm_loss: noise in the pictures' latents"}
    panels = [
        Panel(
            title,
            [
                Curve(way.name, way.colour, [step[loss] for step in outcome.steps], way.is_dashed)
                for way, outcome in zip(WAYS, outcomes, strict=True)
            ],
        )
        for loss, title in titles.items()
    ]
    subtitle = (
        f"The demo's second stage, {len(outcomes[0].steps)} steps of 8 samples, seed {seed}; means over {WINDOW} "
        "steps. Transformer Engine's Python layer, its kernels emulated on a CPU."
    )
    return draw("FP8, bf16 and fp32", subtitle, panels, WINDOW)


def train_all(runs: Sequence[tuple[Way, int]], iterations: int | None, demo: Path, out: Path) -> None:
    """Makes all runs of `out` again, two at a time."""
    if find_checkpoint(demo / "pretrain") is None:
        raise SystemExit(f"{demo} has no first stage; run examples/demo/run_demo.py --out {demo} --only-pretrain")
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    shards = ["tools/make_shards.py", "--data", demo / "data" / "heldout.json", "--image-folder", demo / "data"]
    run([*shards, "--out", out / "shards" / "heldout"], out / "shards.log")

    def train(way: Way, seed: int) -> None:
        folder = folder_of(way, seed, out)
        run(training_command(way, seed, iterations, demo, out), folder.with_suffix(".log"))
        print(f"{time.perf_counter() - began:5.0f} s  {way.name}, seed {seed}", flush=True)

    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(train, *zip(*runs)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--demo", type=Path, default=Path("runs/demo"), help="folder with the first stage [%(default)s]"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/fp8_convergence"), help="folder of the runs [%(default)s]"
    )
    parser.add_argument("--picture", type=Path, required=True, help="SVG to write")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[42, 43], help="curves are drawn for the first %(default)s"
    )
    parser.add_argument("--train-iters", type=int, help="instead of the recipe's")
    parser.add_argument(
        "--redraw", action="store_true", help="table and picture of the runs in --out, without training"
    )
    options = parser.parse_args()
    demo, out, seeds = options.demo.resolve(), options.out.resolve(), options.seeds
    runs = [(way, seed) for seed in seeds for way in WAYS]
    began = time.perf_counter()
    if not options.redraw:
        train_all(runs, options.train_iters, demo, out)

    standin.install()
    outcomes = {(way.name, seed): outcome_of(folder_of(way, seed, out), demo) for way, seed in runs}
    for seed in seeds:
        assert_same_work([outcomes[way.name, seed] for way in WAYS])
    options.picture.write_text(picture([outcomes[way.name, seeds[0]] for way in WAYS], seeds[0]), encoding="utf-8")
    print(table(outcomes, seeds))
    print(f"{options.picture} is written; total time {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
