"""Stands in for quantized weights while a save is planned; their values are made one weight at a time, when copied.

The weights of --fp8-param-gather are saved in bf16. All of a rank's weights in bf16 would take as much memory as a
second model, and the rank writes only a part of them.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor


class StandIns:
    """Meta tensors of the weights' shapes."""

    def __init__(self, weights: dict[str, Any] | None = None) -> None:
        """Puts them into a model's sharded state dict in place of quantized weights."""
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # the storage of a stand-in -> it, and its weight
        for value in nested_values(weights or {}):
            if is_float8tensor(value.data):
                weight, value.data = value.data, torch.empty(value.data.shape, dtype=value.data.dtype, device="meta")
                self._made[value.data.untyped_storage()._cdata] = (value.data, weight)

    def values(self, piece: Tensor) -> Tensor:
        """The piece itself, or of a view of a stand-in, that view of the weight's values."""
        if piece.device.type != "meta":
            return piece.detach()
        _, weight = self._made[piece.untyped_storage()._cdata]
        whole: Tensor = dequantize_fp8_tensor(weight)
        return whole.as_strided(piece.shape, piece.stride(), piece.storage_offset())
