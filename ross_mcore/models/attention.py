"""Attention within the segments of a micro-batch: their description for mcore's layers, rotary angles, local attention.

Legend: T tokens of a micro-batch, n segments, D size of a head, h heads and g query groups of this rank.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ross_mcore import platform
from ross_mcore.models.cache import KeyValueCache


@dataclass
class PackedSequence(PackedSeqParams):
    """A micro-batch as one sequence, whose tokens attend to each other within segments.

    For mcore it is a sequence of one long sample (`sbhd`), because its `thd` format reads lengths back from the device
    for the rotary embedding of every layer; only core attention knows of segments. lengths: of the n segments, on the
    host; positions [T] int64: of each token in its segment; `cu_seqlens_q` [n + 1] int32: where segments begin and end;
    cache: where the keys and values of the segments go, None in training.
    """

    lengths: tuple[int, ...] = ()
    positions: Tensor = field(default_factory=lambda: torch.empty(0))
    cache: KeyValueCache | None = None

    @property
    def is_rectangular(self) -> bool:
        """Whether all segments have one length, as rows of one sample do."""
        return len(set(self.lengths)) == 1

    def thd(self) -> PackedSeqParams:
        """The description that Transformer Engine's attention takes."""
        ends, longest = self.cu_seqlens_q, self.max_seqlen_q
        return PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)


def packed_sequence(segments: Sequence[int], cache: KeyValueCache | None = None) -> PackedSequence:
    """The description of a micro-batch with segments of these lengths, its tensors on this process's device."""
    ends = torch.tensor([0, *accumulate(segments)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in segments])
    ends, positions = (platform.upload(tensor, platform.device()) for tensor in (ends, positions))
    longest = max(segments)
    return PackedSequence(
        "sbhd",
        ends,
        ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=tuple(segments),
        positions=positions,
        cache=cache,
    )


class RotaryAngles(nn.Module):
    """The rotary angles of all tokens of a micro-batch, computed once and used by all layers.

    Replaces mcore's RotaryEmbedding, which makes a table of the first positions. GPTModel asks it for a length and
    passes that back to `forward`; here these are positions.
    """

    def __init__(self, inverse_frequencies: Tensor) -> None:
        """inverse_frequencies [D / 2] float32."""
        super().__init__()
        self.inverse_frequencies = inverse_frequencies

    def get_rotary_seq_len(self, *arguments: Any, **_: Any) -> Tensor:
        """The positions [T] of the sequence, the last argument."""
        packed: PackedSequence = arguments[-1]
        return packed.positions

    def forward(self, positions: Tensor, **_: Any) -> Tensor:
        """positions [T] -> angles [T, 1, 1, D] float32, those of each half of a head side by side."""
        angles = torch.outer(positions.float(), self.inverse_frequencies)
        return torch.cat((angles, angles), dim=-1)[:, None, None]


@functools.cache
def varlen_attention() -> Callable[..., Tensor] | None:
    """torch's attention for segments of any length in one call, in 16 bits on a GPU from Ampere; None without it.

    That of torch 2.10 takes no scale; the first that is documented with grouped queries too is of 2.12.
    """
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention import varlen

    attend = cast(Callable[..., Tensor], varlen.varlen_attn)  # a pair only with return_aux
    return attend if {"scale", "window_size", "enable_gqa"} <= inspect.signature(attend).parameters.keys() else None


def padded_length(length: int) -> int:
    """The length to which a segment is padded: few lengths, because a GPU's libraries plan a call for each shape.

    Less than 32 tokens more, or an eighth of a segment of 256 tokens and more; 56 lengths up to 4,096 tokens.
    """
    step = 32 if length <= 512 else 64 if length <= 2048 else 128 * max(1, length // 8192)
    return -(-length // step) * step


class SDPACoreAttention(nn.Module):
    """Causal core attention within segments, with grouped queries, by torch.

    One call in 16 bits on a GPU (`varlen_attn`); otherwise one call of scaled_dot_product_attention for every segment,
    padded to one of few lengths, and one for all segments if they have one length. Nothing is computed between
    segments: padding is behind the tokens, which do not attend to what follows them.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.layer, self.scale = layer_number, softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSequence,
        **_: Any,
    ) -> Tensor:
        """query [T, 1, h, D], key and value [T, 1, g, D] of this rank -> [T, 1, h * D]."""
        if attention_mask is not None:
            raise ValueError("the local attention is causal within segments and takes no explicit mask")
        query, key, value = (part.squeeze(1) for part in (query, key, value))
        if packed_seq_params.cache is not None:
            packed_seq_params.cache.fill(self.layer, key, value)
        if query.element_size() == 2 and platform.is_ampere() and (attend := varlen_attention()):
            return self._varlen(attend, query, key, value, packed_seq_params).flatten(1)[:, None]
        lengths = packed_seq_params.lengths
        if packed_seq_params.is_rectangular:
            return self._attend(query, key, value, lengths[0])[:, None]
        parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), lengths, strict=True)
        return torch.cat([self._attend(*part) for part in parts])[:, None]

    def _varlen(
        self, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, packed: PackedSequence
    ) -> Tensor:
        """[T, h, D] -> [T, h, D]."""
        ends, longest = packed.cu_seqlens_q, packed.max_seqlen_q
        return attend(
            *(query, key, value, ends, ends, longest, longest),
            scale=self.scale,
            window_size=(-1, 0),  # causal
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        """n segments of one length: [n * length, h, D] -> [n * length, h * D]."""
        more = padded_length(length) - length
        q, k, v = (part.unflatten(0, (-1, length)) for part in (query, key, value))
        if more:
            q, k, v = (F.pad(part, (0, 0, 0, 0, 0, more)) for part in (q, k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2)[:, :length].flatten(0, 1).flatten(1)
