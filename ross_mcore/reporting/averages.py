"""Means of a run's figures over --log-interval iterations, for the console, TensorBoard and trackers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch.distributed as dist

from ross_mcore.engine.losses import DataSetLosses
from ross_mcore.engine.run import Run, StepResult
from ross_mcore.engine.step import StepSize
from ross_mcore.reporting.metrics import StepMetrics
from ross_mcore.reporting.utilization import Utilization


@dataclass(frozen=True)
class Averages:
    """Means over the last iterations, up to `iteration`; losses and norms over applied steps only.

    lm_loss: over the steps with labels, vm_loss: over those with images; None without any such step. bad_samples,
    skipped_samples: their numbers in these iterations; data_share: share of the time spent waiting for data; fill:
    share of the computed tokens that are not padding; remaining_seconds: of the run, at this speed, with the run's
    share of validations, pictures and saves so far; datasets: see means_by_data_set. teraflops_per_device and mfu, a
    share of the GPU's peak, count the useful operations, hardware_mfu those of padding and recomputation too; None on a
    device whose peak is not known. By part: grad_norms, learning_rates of the last step; by range of timesteps:
    vm_loss_by_timestep.
    """

    iteration: int
    consumed_samples: int
    epoch: float
    lm_loss: float | None
    vm_loss: float | None
    loss: float | None
    grad_norm: float | None
    learning_rate: float
    grad_norms: dict[str, float]
    learning_rates: dict[str, float]
    vm_loss_by_timestep: dict[str, float]
    bad_samples: int
    skipped_samples: int
    step_seconds: float
    data_seconds: float
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
        """The values by their names in TensorBoard, without those that are None.

        TensorBoard sorts groups, the text before the slash, by name and opens the first: no name is before `loss`.
        """
        losses = {"lm_loss": self.lm_loss, "vm_loss": self.vm_loss, "total": self.loss}
        timesteps = {f"vm_loss_{name}": value for name, value in self.vm_loss_by_timestep.items()}
        progress = ("epoch", "consumed_samples", "bad_samples", "skipped_samples")
        speed = ("tokens_per_second", "samples_per_second", "teraflops_per_device", "data_share", "fill")
        groups: dict[str, Mapping[str, float | None]] = {
            "loss": losses,
            "loss_by_timestep": timesteps,
            "memory": {"peak_gib": self.peak_gib},
            "norm": {"all": self.grad_norm, **self.grad_norms},
            "progress": {name: getattr(self, name) for name in progress},
            "rate": {"lr": self.learning_rate, **self.learning_rates},
            "throughput": {name: getattr(self, name) for name in (*speed, "step_seconds", "data_seconds")}
            | {f"{name}_percent": _percent(getattr(self, name)) for name in ("mfu", "hardware_mfu")},
        }
        named = {f"{group}/{name}": value for group, own in groups.items() for name, value in own.items()}
        return {name: value for name, value in named.items() if value is not None} | self.datasets


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def means_by_data_set(steps: list[dict[str, DataSetLosses]]) -> dict[str, float]:
    """TensorBoard scalars of every data set over some steps: samples, and losses weighted by labels or images."""
    scalars: dict[str, float] = {}
    for name in steps[0] if steps else ():
        own = [step[name] for step in steps]
        scalars[f"samples/{name}"] = sum(losses.samples for losses in own)
        for loss, weight in (("lm_loss", "labels"), ("vm_loss", "images")):
            terms = [(getattr(x, loss), getattr(x, weight)) for x in own if getattr(x, loss) is not None]
            if total := sum(count for _, count in terms):
                scalars[f"loss_by_data_set/{loss}/{name}"] = sum(value * count for value, count in terms) / total
    return scalars


def mean_of_each(steps: Iterable[Mapping[str, float | None]]) -> dict[str, float]:
    """The mean of each value by name, over the steps that have it."""
    values: dict[str, list[float]] = {}
    for step in steps:
        for name, value in step.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: sum(own) / len(own) for name, own in values.items()}


class Window:
    """The steps since the last averages."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._steps: list[tuple[StepMetrics, StepSize]] = []
        self._samples = 0
        self._began, self._in_steps, self._count = time.monotonic(), 0.0, 0

    def add(self, metrics: StepMetrics, result: StepResult) -> Averages | None:
        """Adds a step, unless it was skipped or empty; returns the averages when they are due."""
        self._in_steps += result.step_seconds
        self._count += 1
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
        run, steps, sizes = self._run, *map(list, zip(*self._steps, strict=True))
        applied = [metrics for metrics in steps if metrics.applied]
        seconds, tokens = sum(m.step_seconds for m in steps), sum(size.row_tokens for size in sizes)
        waited = sum(m.data_seconds for m in steps)
        means = mean_of_each({name: getattr(m, name) for name in _MEANS} for m in applied)
        use = Utilization.of(run, sizes, self._samples, seconds)
        between = max(0.0, time.monotonic() - self._began - self._in_steps) / self._count
        return Averages(
            iteration=last.iteration,
            consumed_samples=last.consumed_samples,
            epoch=last.epoch,
            **{name: means.get(name) for name in _MEANS},
            learning_rate=last.learning_rate,
            grad_norms=mean_of_each(m.grad_norms for m in applied),
            learning_rates=last.learning_rates,
            vm_loss_by_timestep=mean_of_each(m.vm_loss_by_timestep for m in applied),
            bad_samples=sum(m.bad_samples for m in steps),
            skipped_samples=sum(m.skipped_samples for m in steps),
            step_seconds=seconds / len(steps),
            data_seconds=waited / len(steps),
            tokens_per_second=tokens / seconds,
            samples_per_second=self._samples / seconds,
            teraflops_per_device=use.useful / dist.get_world_size() / 1e12,
            mfu=use.mfu,
            hardware_mfu=use.hardware_mfu,
            peak_gib=last.peak_memory_bytes / 2**30,
            data_share=waited / seconds,
            fill=tokens / sum(size.slots for size in sizes),
            remaining_seconds=(run.train_iters - last.iteration) * (seconds / len(steps) + between),
            datasets=means_by_data_set([m.datasets for m in applied]),
        )


_MEANS = ("lm_loss", "vm_loss", "loss", "grad_norm")
