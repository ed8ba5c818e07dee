"""Operations of steps, and what share of the devices' peak they are (MFU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from ross_mcore import platform
from ross_mcore.costs import Data, Plan, operations
from ross_mcore.engine.run import Run
from ross_mcore.engine.step import StepSize
from ross_mcore.machines import CPU, machine_of
from ross_mcore.parallel.timing import recomputed_layers


@dataclass(frozen=True)
class Utilization:
    """Operations a second, of all devices: useful ones, and `done` with padding and recomputation; peak: by the data
    sheet of the GPUs, 0 where it is not known."""

    useful: float
    done: float
    peak: float

    @property
    def mfu(self) -> float | None:
        """The share of the peak that is useful; None without a known peak."""
        return self.useful / self.peak if self.peak else None

    @property
    def hardware_mfu(self) -> float | None:
        return self.done / self.peak if self.peak else None

    @classmethod
    def of(cls, run: Run, sizes: Sequence[StepSize], samples: int, seconds: float) -> Utilization:
        """Of computed steps, which have `samples` samples and took `seconds`."""
        plan = replace(run.config.plan, precomputed=run.precomputed)
        tokens, slots = sum(size.row_tokens for size in sizes), sum(size.slots for size in sizes)
        images, labels = sum(size.images for size in sizes), sum(size.label_tokens for size in sizes)
        each = tokens / samples
        attended = each if plan.packed else slots / len(sizes) / run.rows_per_step
        recomputed = recomputed_layers(run.groups.layout, plan)
        data = Data(each, each, images / samples, labels / samples)
        useful, done = operations(run.model_config, plan, data, samples, slots, attended, recomputed)
        peak = dist.get_world_size() * peak_operations(plan, platform.device_name())
        return cls(useful / seconds, done / seconds, peak)


def peak_operations(plan: Plan, device_name: str) -> float:
    """Operations a second of a GPU's matrix products in the run's precision, by its data sheet; 0 if not known."""
    machine = machine_of(device_name)
    return 0.0 if machine in (None, CPU) else machine.peak("bf16" if plan.bf16 else "fp32")
