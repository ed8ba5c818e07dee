"""The decoder layers on Transformer Engine. Imported only where it is installed and asked for.

Legend: T tokens of a micro-batch, h heads and g groups of this rank.
"""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor


class CoreAttention(TEDotProductAttention):
    """Transformer Engine's attention within segments.

    Segments of one length (rows of one sample each) go to it as a batch (`bshd`), which every backend takes in every
    precision; segments of several lengths as packed sequences (`thd`), for which it has 16-bit kernels alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.qkv_format = "bshd"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """query [T, h, head_dim], key and value [T, g, head_dim] -> [T, h * head_dim]."""
        if packed_seq_params is None:
            raise ValueError("the segments of the micro-batch are missing")
        count, longest = packed_seq_params.cu_seqlens_q.numel() - 1, packed_seq_params.max_seqlen_q
        if count * longest != len(query):
            return super().forward(query, key, value, None, attn_mask_type, None, packed_seq_params)
        rows = (part.unflatten(0, (count, longest)) for part in (query, key, value))
        return super().forward(*rows, None, attn_mask_type).flatten(0, 1)


def layer_spec() -> ModuleSpec:
    """mcore's Transformer Engine layer with that attention."""
    spec = get_gpt_layer_with_transformer_engine_spec()
    spec.submodules.self_attention.submodules.core_attention = CoreAttention
    return spec
