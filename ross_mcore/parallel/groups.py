"""Process groups of a run. Only this file reads mcore's `parallel_state`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from ross_mcore import platform
from ross_mcore.parallel.layout import DataShare, Layout, Stage


@dataclass(frozen=True)
class Groups:
    """The position of this process in a layout, and its process groups.

    `embedding`: first and last stage of its pipeline, which share a tied embedding; None on middle stages.
    """

    layout: Layout
    rank: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    tensor: ProcessGroup
    pipeline: ProcessGroup
    data: ProcessGroup
    embedding: ProcessGroup | None

    @property
    def stage(self) -> Stage:
        return self.layout.stage(self.pipeline_rank)

    @property
    def data_share(self) -> DataShare:
        """The part of every step that this rank reads."""
        layout = self.layout
        return DataShare(
            self.data_rank, layout.data_parallel, self.tensor_rank, layout.tensor_parallel, self.stage.reads_data
        )

    @property
    def is_logging_rank(self) -> bool:
        """Whether this rank writes the log: it is the first rank that computes the losses."""
        return self.stage.is_last and self.tensor_rank == 0 and self.data_rank == 0

    @staticmethod
    def megatron() -> ProcessGroupCollection:
        """The groups that mcore's schedules take together with a communicator; by default they look them up."""
        return ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "pp", "embd", "pos_embd", "dp_cp"])


def initialize(layout: Layout, seed: int, timeout_minutes: float) -> Groups:
    """Creates the process groups of `layout` and seeds mcore's tensor-parallel random states."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_stages if layout.virtual_stages > 1 else None,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
        create_gloo_process_groups=False,  # second groups, beside NCCL's, for gathers that this program never makes
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
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(with_context_parallel=True),
        embedding=parallel_state.get_embedding_group(check_initialized=False),
    )


@contextmanager
def left_as_found() -> Iterator[None]:
    """Destroys all groups when the body succeeds, unless groups existed before it, such as those of a loaded model."""
    had_groups = dist.is_initialized()
    yield
    if not had_groups:
        destroy()


def destroy() -> None:
    """Destroys all groups; safe to call twice."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def last_collective() -> tuple[str, bool]:
    """The latest collective of this rank, and whether it is unfinished; ("", False) when none is recorded.

    Read from torch's flight recorder, without a call to the device.
    """
    recorder = platform.flight_recorder()
    entries = recorder.get("entries", [])
    if not entries:
        return "", False
    last = entries[-1]
    name, group = last["profiling_name"], last["process_group"]
    number = last["p2p_seq_id" if last.get("is_p2p") else "collective_seq_id"]
    return f"{name} number {number} of {group[1] or group[0]}", not last["retired"]
