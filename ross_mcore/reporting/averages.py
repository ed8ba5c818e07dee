"""Means of a run's figures over --log-interval iterations, for the console and TensorBoard."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.distributed as dist

from ross_mcore import platform
from ross_mcore.costs import Data, Plan, operations
from ross_mcore.engine.losses import DataSetLosses
from ross_mcore.engine.run import Run, StepResult
from ross_mcore.engine.step import StepSize
from ross_mcore.machines import CPU, machine_of
from ross_mcore.parallel.timing import recomputed_layers
from ross_mcore.reporting.metrics import StepMetrics


@dataclass(frozen=True)
class Averages:
    """Means over the last iterations, up to `iteration`; losses and the norm over applied steps only.

    lm_loss: over the steps with labels, vm_loss: over those with images; None without any such step. data_share: share
    of the time spent waiting for data; fill: share of the computed tokens that are not padding; remaining_seconds: of
    the run, at this speed; datasets: see means_by_data_set. teraflops_per_device and mfu, a share of the GPU's peak,
    count the useful operations, hardware_mfu those of padding and recomputation too; None on a device whose peak is not
    known.
    """

    iteration: int
    consumed_samples: int
    lm_loss: float | None
    vm_loss: float | None
    loss: float | None
    grad_norm: float | None
    learning_rate: float
    tokens_per_second: float
    samples_per_second: float
    teraflops_per_device: float
    mfu: float | None
    hardware_mfu: float | None
    peak_gib: float
    data_share: float
    fill: float
    remaining_seconds: float
    datasets: dict[str, float]

    def scalars(self) -> dict[str, float]:
        """The values by TensorBoard's names, without those that are None."""
        named = {name: getattr(self, name) for name in ("lm_loss", "vm_loss", "loss", "grad_norm", "learning_rate")}
        losses = {name: value for name, value in named.items() if value is not None}
        speed = ("tokens_per_second", "samples_per_second", "teraflops_per_device", "data_share", "fill")
        known = [name for name in ("mfu", "hardware_mfu") if getattr(self, name) is not None]
        throughput = {f"throughput/{name}": getattr(self, name) for name in (*speed, *known)}
        return {**losses, **throughput, "memory/peak_gib": self.peak_gib, **self.datasets}


def means_by_data_set(steps: list[dict[str, DataSetLosses]]) -> dict[str, float]:
    """TensorBoard scalars of every data set over some steps: samples, and losses weighted by labels or images."""
    scalars: dict[str, float] = {}
    for name in steps[0] if steps else ():
        own = [step[name] for step in steps]
        scalars[f"samples/{name}"] = sum(losses.samples for losses in own)
        for loss, weight in (("lm_loss", "labels"), ("vm_loss", "images")):
            terms = [(getattr(x, loss), getattr(x, weight)) for x in own if getattr(x, loss) is not None]
            if total := sum(count for _, count in terms):
                scalars[f"{loss}/{name}"] = sum(value * count for value, count in terms) / total
    return scalars


def peak_operations(plan: Plan, device_name: str) -> float:
    """Operations a second of a GPU's matrix products in the run's precision, by its data sheet; 0 if not known."""
    machine = machine_of(device_name)
    return 0.0 if machine in (None, CPU) else machine.peak("bf16" if plan.bf16 else "fp32")


class Window:
    """The steps since the last averages."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._steps: list[tuple[StepMetrics, StepSize]] = []
        self._samples = 0

    def add(self, metrics: StepMetrics, result: StepResult) -> Averages | None:
        """Adds a step, unless it was skipped or empty; returns the averages when they are due."""
        size = result.read.step.size
        if result.trained is not None and size.row_tokens:
            self._steps.append((metrics, size))
            self._samples += metrics.consumed_samples - result.read.before.consumed_samples
        is_due = self._run.is_due(metrics.iteration, self._run.config.logging.log_interval)
        if not self._steps or not is_due:
            return None
        found = self._averages(metrics)
        self._steps.clear()
        self._samples = 0
        return found

    def _averages(self, last: StepMetrics) -> Averages:
        run, steps = self._run, [metrics for metrics, _ in self._steps]
        applied = [metrics for metrics in steps if metrics.applied]
        seconds, tokens = sum(m.step_seconds for m in steps), sum(size.row_tokens for _, size in self._steps)

        def mean(name: str) -> float | None:
            values = [value for m in applied if (value := getattr(m, name)) is not None]
            return sum(values) / len(values) if values else None

        labels, images = sum(m.num_tokens for m in steps), sum(m.num_images for m in steps)
        slots, layout = sum(size.slots for _, size in self._steps), run.groups.layout
        plan = replace(run.config.plan, precomputed=run.precomputed)
        each = tokens / self._samples
        data = Data(each, each, images / self._samples, labels / self._samples)
        attended = each if plan.packed else slots / len(steps) / run.rows_per_step
        recomputed = recomputed_layers(layout, plan)
        useful, done = operations(run.model_config, plan, data, self._samples, slots, attended, recomputed)
        peak = seconds * dist.get_world_size() * peak_operations(plan, platform.device_name())
        return Averages(
            iteration=last.iteration,
            consumed_samples=last.consumed_samples,
            lm_loss=mean("lm_loss"),
            vm_loss=mean("vm_loss"),
            loss=mean("loss"),
            grad_norm=mean("grad_norm"),
            learning_rate=last.learning_rate,
            tokens_per_second=tokens / seconds,
            samples_per_second=self._samples / seconds,
            teraflops_per_device=useful / seconds / dist.get_world_size() / 1e12,
            mfu=useful / peak if peak else None,
            hardware_mfu=done / peak if peak else None,
            peak_gib=last.peak_memory_bytes / 2**30,
            data_share=sum(m.data_seconds for m in steps) / seconds,
            fill=tokens / slots,
            remaining_seconds=(run.train_iters - last.iteration) * seconds / len(steps),
            datasets=means_by_data_set([m.datasets for m in applied]),
        )
