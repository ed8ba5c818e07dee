"""Attention within the segments of a micro-batch, and their description for mcore's layers.

Legend: T tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ross_mcore import platform


def packed_sequence(segments: Sequence[int]) -> PackedSeqParams:
    """mcore's description of a micro-batch whose tokens attend to each other within segments of these lengths."""
    ends = torch.tensor([0, *accumulate(segments)], dtype=torch.int32, device=platform.device())
    longest = max(segments)
    return PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)


class SDPACoreAttention(nn.Module):
    """Causal core attention within segments, by torch's scaled_dot_product_attention, with grouped queries.

    Each segment is a separate call, so that nothing is computed between segments; segments of one length (rows of one
    sample each) are one call.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> Tensor:
        """query [T, heads, head_dim], key and value [T, groups, head_dim] of this rank -> [T, heads * head_dim]."""
        if attention_mask is not None:
            raise ValueError("the local attention is causal within segments and takes no explicit mask")
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        if len(set(lengths)) == 1:
            return self._attend(query, key, value, lengths[0])
        parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), lengths)
        return torch.cat([self._attend(q, k, v, length) for q, k, v, length in parts])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        """n segments of one length: [n * length, heads, head_dim] -> [n * length, heads * head_dim]."""
        q, k, v = (part.unflatten(0, (-1, length)).transpose(1, 2) for part in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).flatten(0, 1).flatten(1)
