"""Process groups of a run. The only reader of mcore's `parallel_state`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from ross_mcore.parallel.layout import Layout, Stage


@dataclass(frozen=True)
class Groups:
    """This process's place in a layout, and the groups it talks to."""

    layout: Layout
    rank: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    tensor: ProcessGroup
    data: ProcessGroup

    @property
    def stage(self) -> Stage:
        return self.layout.stage(self.pipeline_rank)

    @property
    def speaks(self) -> bool:
        """Whether this rank writes the log: the first of the ranks that compute the losses."""
        return self.stage.is_last and self.tensor_rank == 0 and self.data_rank == 0


def initialize(layout: Layout, seed: int, timeout_minutes: float) -> Groups:
    """Creates the process groups of `layout` and seeds the tensor-parallel random states."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
    )
    tensor_parallel.random.initialize_rng_tracker(force_reset=True)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Groups(
        layout=layout,
        rank=dist.get_rank(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )


def destroy() -> None:
    """Leaves every group; safe to call twice."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Sum of each value over all processes, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def largest_over_ranks(values: list[int], device: torch.device) -> list[int]:
    """Maximum of each value over all processes."""
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()
