"""The exchange of hidden states between pipeline stages when micro-batches have different lengths.

mcore sends the shape of every tensor before the tensor and reads it from the device (p2p_communication.py:168), which
waits for it twice a micro-batch. Here every rank knows all lengths before the step, so no shape is sent.
Legend: T tokens of a micro-batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ross_mcore.parallel.groups import Groups

Shape = tuple[int, int, int]


def exchange(config: TransformerConfig, groups: Groups, tokens: Sequence[int]) -> dict[str, Any]:
    """Arguments of mcore's schedule for micro-batches of `tokens` [T of each]; none without a pipeline."""
    if groups.layout.pipeline_parallel == 1:
        return {}
    return {"p2p_communicator": PlannedExchange(config, groups, tokens), "pg_collection": groups.megatron()}


class PlannedExchange(P2PCommunicator):  # type: ignore[misc]  # mcore has no types
    """mcore's communicator for one pass through the schedule, with the shapes of all tensors known before it."""

    def __init__(self, config: TransformerConfig, groups: Groups, tokens: Sequence[int]) -> None:
        super().__init__(groups.pipeline, config)
        pieces = groups.layout.tensor_parallel if config.sequence_parallel else 1
        table = get_schedule_table(len(tokens), groups.layout.virtual_stages, config.microbatch_group_size_per_vp_stage)

        def shapes(is_end: bool) -> Iterator[Shape]:
            """Of the tensors [T, 1, D] that are received from one neighbour, in the order in which it computes.

            is_end: the model begins here (forward) or ends here (backward), so this rank receives from the other end of
            the pipeline, and nothing of that rank's last chunk.
            """
            numbers = [number for number, chunk in table if not (is_end and chunk == groups.layout.virtual_stages - 1)]
            return iter([(tokens[number] // pieces, 1, config.hidden_size) for number in numbers])

        self._forward, self._backward = shapes(groups.stage.is_first), shapes(groups.stage.is_last)

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[Shape, Shape]:
        """The shapes received from the previous and the next stage; mcore calls it under `variable_seq_lengths`."""
        nothing = (0, 0, 0)
        return next(self._forward) if recv_prev else nothing, next(self._backward) if recv_next else nothing
