"""The time of a step at a layout, from the cost model of costs.py and a simulated schedule. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ross_mcore.architecture import ModelConfig
from ross_mcore.costs import Data, Plan, first_seconds, last_seconds, layer_seconds, operations
from ross_mcore.machines import GPUS_PER_NODE, Machine
from ross_mcore.parallel.layout import Layout
from ross_mcore.parallel.schedule import makespan

HIDDEN_REDUCTION = 0.75
"""The most of the data-parallel communication that hides behind the passes it overlaps with."""
OPTIMIZER_BYTES = 30
"""Bytes that Adam reads and writes for each parameter a rank updates: gradient, master, two moments, weight."""
GRADIENT_BYTES = 8
"""Bytes for each parameter a rank holds: its gradient cleared, and read for the norm."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and the operations of a GPU in it.

    stages: of a micro-batch, forward and backward, by pipeline rank; passes: of all micro-batches; busy: of the passes,
    what the average rank computes; communication: of gradients and weights over data-parallel ranks that nothing hides;
    between: optimizer, and the host's time between two steps; useful, done: operations without and with padding and
    recomputation.
    """

    stages: tuple[float, ...]
    passes: float
    communication: float
    between: float
    busy: float
    useful: float
    done: float

    @property
    def seconds(self) -> float:
        return self.passes + self.communication + self.between

    def utilization(self, machine: Machine, bf16: bool) -> tuple[float, float]:
        """Useful and hardware MFU: shares of the GPU's peak in the run's precision."""
        peak = machine.peak("bf16" if bf16 else "fp32") * self.seconds
        return self.useful / peak, self.done / peak

    @property
    def idle(self) -> float:
        """The share of the passes that the average rank waits: bubble, imbalance and transfers."""
        return max(0.0, 1 - self.busy / self.passes)


def step_time(
    model: ModelConfig,
    layout: Layout,
    plan: Plan,
    data: Data,
    machine: Machine,
    *,
    micro_batches: int,
    trained: Sequence[float],
) -> StepTime:
    """micro_batches: of a step and rank; trained: parameters that train on a rank of each stage."""
    tensor, stages = layout.tensor_parallel, layout.pipeline_parallel
    plan = replace(plan, frozen_ahead=plan.frozen_ahead and micro_batches > 1)
    layer = layer_seconds(model, plan, data, machine, tensor)
    ends = first_seconds(model, plan, data, machine, tensor), last_seconds(model, plan, data, machine, tensor)
    forward, backward = [], []
    for position, layers in enumerate(layout.layers_per_chunk):
        again = plan.recompute.layers(layers) if plan.recompute.granularity == "full" else layers
        forward.append(layers * layer.forward)
        backward.append(layers * layer.backward + again * layer.again)
        for end, at in zip(ends, (0, len(layout.layers_per_chunk) - 1)):
            if at == position:
                forward[-1] += end.forward
                backward[-1] += end.backward + end.again
    sent = 0.0
    if stages > 1:
        size = plan.slots * model.language.hidden_size * plan.value_bytes / (tensor if plan.sequence_parallel else 1)
        world = tensor * stages * layout.data_parallel
        link = machine.nvlink * machine.shares.nvlink if world <= GPUS_PER_NODE else _network(machine)
        sent = size / link + machine.latency_seconds
    passes = makespan(forward, backward, stages, micro_batches, sent)
    both = [f + b for f, b in zip(forward, backward)]
    per_rank = tuple(sum(both[rank::stages]) for rank in range(stages))

    slowest = max(range(stages), key=lambda rank: trained[rank])
    count = trained[slowest]
    reduced, gathered = _data_parallel(layout, plan, machine, count)
    if plan.overlap_grad_reduce:
        reduced = max((1 - HIDDEN_REDUCTION) * reduced, reduced - sum(backward[slowest::stages]))
    if plan.overlap_param_gather:
        gathered = max((1 - HIDDEN_REDUCTION) * gathered, gathered - sum(forward[slowest::stages]))
    share = layout.data_parallel if plan.distributed_optimizer else 1
    moved = (OPTIMIZER_BYTES / share + GRADIENT_BYTES) * count
    between = moved / (machine.memory_bytes_per_second * machine.shares.memory) + plan.kernels.step_seconds
    samples, slots = micro_batches * plan.samples(data), micro_batches * plan.slots
    attended = data.attended if plan.packed else plan.tokens
    useful, done = operations(model, plan, data, samples, slots, attended, recomputed_layers(layout, plan))
    ranks = tensor * stages
    return StepTime(
        per_rank,
        passes,
        reduced + gathered,
        between,
        micro_batches * sum(per_rank) / stages,
        useful / ranks,
        done / ranks,
    )


def recomputed_layers(layout: Layout, plan: Plan) -> int:
    """Decoder layers, of all stages, that backward computes again whole."""
    return sum(map(plan.recompute.layers, layout.layers_per_chunk))


def _network(machine: Machine) -> float:
    return machine.network * machine.shares.network


def _data_parallel(layout: Layout, plan: Plan, machine: Machine, trained: float) -> tuple[float, float]:
    """Seconds of the reduction of gradients (fp32) and of the gather of weights, for a rank's trained parameters.

    A data-parallel group that spans nodes has as many links between two nodes as members in a node.
    """
    ranks = layout.data_parallel
    if ranks == 1:
        return 0.0, 0.0
    within = max(1, min(GPUS_PER_NODE // layout.tensor_parallel, ranks))
    link = machine.nvlink * machine.shares.nvlink
    if layout.tensor_parallel * ranks > GPUS_PER_NODE:
        link = min(link, within * _network(machine))
    moved = trained * (ranks - 1) / ranks / link
    if not plan.distributed_optimizer:
        return 2 * 4 * moved, 0.0
    return 4 * moved, plan.value_bytes * moved
