"""Speed of two ranks of one thread beside one, on the same global batch of 16 samples.

    python benchmarks/parallel.py           # about four minutes
    python benchmarks/parallel.py --turns 1 # a first look

The model and the samples of benchmarks/step.py, one sample a micro-batch, in fp32, stage 2: TP2, PP2 (16 micro-batches,
so 1F1B is at most 1.88 times as fast), DP2, and DP2 with the distributed optimizer and overlap. Layouts run in turn,
each one step to warm up and one that counts; compared are the least times by the clock, so the machine must be idle.
Of each layout the processor's seconds are shown too: where their sum over the ranks is more than one rank's, work is
done twice or bytes are copied; where one rank has more than another, the other waits.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from counting.model import STEP, Wanted, opened, write_checkpoint, write_shards  # noqa: E402
from counting.ranks import on_ranks  # noqa: E402

SAMPLES = 16
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "DP2": (2, {}),
    "DP2, distributed optimizer": (
        2,
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
}
"""Name -> ranks and flags."""


def measure(base: Path, shards: Path, save: Path, turns: int, names: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Of each turn of each layout: (seconds by the clock, of the processor) of this rank's step."""
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(turns):
        for name in names:
            ranks, flags = LAYOUTS[name]
            if rank >= ranks:
                continue
            os.environ["WORLD_SIZE"] = str(ranks)
            run_folder = save / f"{name} {turn}"
            with opened(base, shards, run_folder, global_batch_size=SAMPLES, micro_batch_size=1, **flags) as run:
                engine = run.engine
                for done in range(2):
                    step = engine.read(run.loader)
                    engine.agree(step.loaded)  # all ranks begin together
                    began = time.perf_counter(), time.process_time()
                    engine.train(step, done)
                    engine.agree(step.loaded)  # as the next step begins: all ranks have finished
                    taken = time.perf_counter() - began[0], time.process_time() - began[1]
            found[name].append(taken)
            os.environ["WORLD_SIZE"] = str(world)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2, help="of every layout [%(default)s]")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS), metavar="NAME")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_checkpoint(folder, STEP)
        wanted = [Wanted(128 + 52 * number // (SAMPLES - 1), 75) for number in range(SAMPLES)]
        shards = write_shards(folder, STEP, wanted)
        given = base, shards, folder / "runs", options.turns, options.layouts
        ranks = on_ranks(measure, 2, *given, limit_seconds=3600)
    one = min(clock for clock, _ in ranks[0][options.layouts[0]])
    for name in options.layouts:
        used = [min(processor for _, processor in rank[name]) for rank in ranks if rank[name]]
        taken = min(max(clocks) for clocks in zip(*([c for c, _ in rank[name]] for rank in ranks if rank[name])))
        shown = " + ".join(f"{seconds:.1f}" for seconds in used)
        ratio = f"{one / taken:.2f}x" if name != options.layouts[0] else ""
        print(f"{name:<28} {taken:6.1f} s  {ratio:>6}   processor {shown} s", flush=True)


if __name__ == "__main__":
    main()
