"""Looks into a run instead of training it; torchrun starts it on every rank.

  gradients OUT FLAGS           the first step's gradients, of one process, to OUT
  profile OUT FLAGS             two steps of one rank a stage: kernels, busy time, waits of the host
  infinity OUT FLAGS            a weight becomes infinite: the step is not applied, and the weight is named
  compare ONE OTHER TOLERANCE   gradients of two runs, by part of the model

These follow `-m examples.acceptance.probe`. FLAGS are those of pretrain_ross.py. Lines that begin with "note: " are for
the report.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ross_mcore.engine.run import Run

WARM_UP, PROFILED, SHOWN = 3, 2, 15
"""Steps before and in a profile; kernels that it lists."""
KINDS = (
    ("communication", ("nccl", "allreduce", "gloo", "c10d")),
    ("attention", ("flash", "fmha", "attention", "sdpa", "cudnn_generated")),
    ("convolutions", ("conv", "implicit_gemm", "xmma_fprop", "nchw", "nhwc")),
    ("matrix products", ("gemm", "cutlass", "cublas", "nvjet", "matmul", "::mm", "::addmm", "::bmm")),
    ("copies", ("memcpy", "memset", "copy_")),
)
"""Kernels by parts of their names; the first match counts, the rest is pointwise work, norms and sums."""


def note(text: str) -> None:
    print(f"note: {text}", flush=True)


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "other")


def gradients(run: Run, out: Path) -> None:
    engine = run.engine
    computed = engine.gradients(engine.read(run.loader))
    found = {
        name: weight.main_grad.float().cpu()  # type: ignore[attr-defined]  # mcore's buffer
        for name, weight in engine.model.named_weights()
        if weight.requires_grad
    }
    torch.save({"gradients": found, "losses": [computed.losses.lm_loss, computed.losses.vm_loss]}, out)


def compare(one: Path, other: Path, tolerance: float) -> None:
    """Exit status 1 when a part's gradients differ by more than `tolerance` of their largest."""
    from ross_mcore.parts import part_of

    ours, theirs = torch.load(one), torch.load(other)
    furthest: dict[str, float] = {}
    for part in dict.fromkeys(part_of(name).label for name in ours["gradients"]):
        names = [name for name in ours["gradients"] if part_of(name).label == part]
        largest = max(float(theirs["gradients"][name].abs().max()) for name in names)
        apart = max(float((ours["gradients"][n] - theirs["gradients"][n]).abs().max()) for n in names)
        furthest[part] = apart / largest if largest else float(apart > 0)
    losses = [abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"]) if a is not None and b]
    named = ", ".join(f"{part} {share:.1e}" for part, share in furthest.items())
    note(f"{one.stem} against {other.stem}: losses differ by {max(losses):.1e}; of the largest gradient: {named}")
    if max(furthest.values()) > tolerance:
        raise SystemExit(f"more than {tolerance:g} of the largest gradient of a part")


@contextlib.contextmanager
def waits() -> Iterator[Counter[str]]:
    """Counts places where the host waits for the GPU, as torch warns of them; none on a CPU, which has no such mode."""
    found: Counter[str] = Counter()
    if not torch.cuda.is_available():
        yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for each in caught:
        if "synchroniz" in str(each.message):
            found[f"{'/'.join(Path(each.filename).parts[-3:])}:{each.lineno}"] += 1


def profile(run: Run, out: Path) -> None:
    engine, groups = run.engine, run.groups
    for step in range(WARM_UP):
        engine.train(engine.read(run.loader), step)
    on_gpu, looks = torch.cuda.is_available(), groups.data_rank == 0 and groups.tensor_rank == 0
    activities = [torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU]
    with ExitStack() as stack:
        found = stack.enter_context(waits())
        profiler = stack.enter_context(torch.profiler.profile(activities=activities)) if looks else None
        began = time.perf_counter()
        for step in range(WARM_UP, WARM_UP + PROFILED):
            engine.train(engine.read(run.loader), step)
        seconds = time.perf_counter() - began
    if profiler is None:
        return
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        times[event.key] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    kinds: Counter[str] = Counter()
    for kernel, spent in times.items():
        kinds[kind_of(kernel)] += spent
    stage = groups.stage.index
    lines = [f"{1e3 * spent / PROFILED:10.2f} ms a step  {kernel}" for kernel, spent in times.most_common(SHOWN)]
    lines += [f"{count / PROFILED:10.1f} a step  {place}" for place, count in found.most_common()]
    out.mkdir(parents=True, exist_ok=True)
    (out / f"stage{stage}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shares = ", ".join(f"{kind} {spent / seconds:.0%}" for kind, spent in kinds.most_common())
    attention = sorted({kernel for kernel in times if kind_of(kernel) == "attention"}, key=lambda k: -times[k])
    note(f"stage {stage}: {1e3 * seconds / PROFILED:.0f} ms a step; {shares}")
    note(f"stage {stage}: the host waits for the device {found.total() / PROFILED:g} times a step")
    note(f"stage {stage}: attention by {', '.join(attention[:3]) or 'no kernel of that name'}")


def infinity(run: Run, out: Path) -> None:
    from ross_mcore.engine.finite import diagnose

    engine = run.engine
    sound = engine.train(engine.read(run.loader), 0)
    name, weight = next((n, w) for n, w in engine.model.named_weights() if w.requires_grad and "layers." in n)
    if run.groups.rank == 0:
        with torch.no_grad():
            weight.flatten()[0].fill_(float("inf"))
    broken = engine.train(engine.read(run.loader), 1)
    diagnosis = diagnose(engine.model)
    if run.groups.rank == 0:
        note(f"an infinity in {name}: {'not applied' if not broken.applied else 'APPLIED'}; {diagnosis}")
    if not sound.applied or broken.applied or diagnosis.weight is None:
        raise SystemExit("a step with an infinite weight was applied, or the weight was not found")


PROBES: dict[str, Callable[[Run, Path], None]] = {"gradients": gradients, "profile": profile, "infinity": infinity}


def main() -> None:
    kind, out, *rest = sys.argv[1:]
    if kind == "compare":
        compare(Path(out), Path(rest[0]), float(rest[1]))
        return
    from ross_mcore.flags import parse
    from ross_mcore.training.opening import open_run

    config = parse(rest)
    with ExitStack() as closing:
        run, _ = open_run(config, closing)
        PROBES[kind](run, Path(out))


if __name__ == "__main__":
    main()
