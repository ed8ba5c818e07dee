"""Process groups of a run. The only reader of mcore's `parallel_state`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from ross_mcore import platform
from ross_mcore.errors import RankError
from ross_mcore.parallel.layout import Layout, Stage

E = TypeVar("E", bound=Exception)
T = TypeVar("T")


@dataclass(frozen=True)
class Groups:
    """This process's place in a layout, and the groups it talks to.

    `embedding`: the first and the last stage of a pipeline, which share a tied embedding; None on the others.
    """

    layout: Layout
    rank: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    tensor: ProcessGroup
    data: ProcessGroup
    embedding: ProcessGroup | None

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
        virtual_pipeline_model_parallel_size=layout.virtual_stages if layout.virtual_stages > 1 else None,
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
        embedding=parallel_state.get_embedding_group(check_initialized=False),
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


def agree(value: int, group: ProcessGroup, device: torch.device) -> bool:
    """Whether every rank of a group has the same 64-bit integer. Collective in the group."""
    extremes = torch.tensor([value, ~value], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    highest, lowest_inverted = extremes.tolist()
    return highest == ~lowest_inverted


def on_all_ranks(error: E) -> E:
    """`error`, noted as one where every rank raises one: after it they can still communicate."""
    error.on_all_ranks = True  # type: ignore[attr-defined]
    return error


def is_on_all_ranks(error: Exception) -> bool:
    """Whether the ranks can still communicate after an error: where one fails alone, others wait in a collective."""
    return getattr(error, "on_all_ranks", False) or dist.get_world_size() == 1


def together(action: Callable[[], T]) -> T:
    """Runs `action` on every rank; when it fails on any, raises on all, after all have tried. Collective.

    A rank raises its own error where it has one, RankError with the first rank's message otherwise. The action must not
    communicate.
    """
    result: Any = None
    problem: Exception | None = None
    try:
        result = action()
    except Exception as error:
        problem = error
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if problem is None else str(problem))
    if problem is not None:
        raise on_all_ranks(problem)
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    if failed:
        raise on_all_ranks(RankError(f"{messages[failed[0]]} (rank {failed[0]})"))
    return result


def from_first_rank(action: Callable[[], T]) -> T:
    """What `action` returns on the first rank, which alone runs it. Collective; raises as `together` does."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, together(lambda: action() if dist.get_rank() == 0 else None))
    return found[0]


def same_on_all_ranks(value: T) -> bool:
    """Whether every rank has an equal value. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(other == value for other in values)


def last_collective() -> tuple[str, bool]:
    """The collective that this rank entered last, and whether it is unfinished; ("", False) when torch knows none.

    It is in torch's flight recorder, which takes note of every collective anyway; the device is not asked.
    """
    recorder = platform.flight_recorder()
    entries = recorder.get("entries", [])
    if not entries:
        return "", False
    last = entries[-1]
    name, group = last["profiling_name"], last["process_group"]
    number = last["p2p_seq_id" if last.get("is_p2p") else "collective_seq_id"]
    return f"{name} number {number} of {group[1] or group[0]}", not last["retired"]
