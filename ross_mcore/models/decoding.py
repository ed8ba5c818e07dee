"""One new token for every row, with the keys and values of those before it in a cache.

mcore's layers compute the same, but start twice as many operations (47 a layer, 24 here) with much of Python between
them, which is what one token costs. So the weights of a model are read here from its modules: the local layers of one
stage, Qwen2 or Llama. Prompts run through mcore's layers, as in training.
Legend: n rows, H hidden size, h heads, g query groups, D size of a head, F inner size of an MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ross_mcore.models.cache import KeyValueCache
from ross_mcore.models.language import LanguageModel


@dataclass(frozen=True)
class _Layer:
    """The weights of a decoder layer, as views: in a group of `qkv` are h / g queries, a key and a value."""

    number: int
    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    projection: Tensor
    mlp_norm: Tensor
    gate_and_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        attention, mlp = layer.self_attention, layer.mlp
        return cls(
            layer.layer_number,
            layer.input_layernorm.weight,
            attention.linear_qkv.weight,
            attention.linear_qkv.bias,
            attention.linear_proj.weight.t(),
            layer.pre_mlp_layernorm.weight,
            mlp.linear_fc1.weight,
            mlp.linear_fc2.weight.t(),
        )


class Decoder:
    """Runs the newest token of every row of a cache."""

    def __init__(self, language: LanguageModel, cache: KeyValueCache) -> None:
        self.language, self.cache = language, cache
        self.layers = [_Layer.of(layer) for layer in language.decoder.layers]
        self.final_norm: Tensor = cast(Any, language.decoder.final_layernorm).weight
        self.epsilon = language.config.layernorm_epsilon

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [n], the newest of every row -> their hidden states after the final norm [n, H]."""
        hidden = F.embedding(tokens, cast(Any, self.language.embedding).word_embeddings.weight)
        angles = self.language.rotary_pos_emb(self.cache.advance())[:, :, 0].to(hidden.dtype)
        cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
        sin[..., : sin.shape[-1] // 2].neg_()
        for layer in self.layers:
            hidden = self._layer(hidden, layer, cos, sin)
        return self._normed(hidden, self.final_norm)

    def _layer(self, hidden: Tensor, layer: _Layer, cos: Tensor, sin: Tensor) -> Tensor:
        """hidden [n, H], cos and sin [n, 1, 1, D] -> [n, H]."""
        config = self.language.config
        rows, groups, size = len(hidden), config.num_query_groups, config.kv_channels
        qkv = F.linear(self._normed(hidden, layer.norm), layer.qkv, layer.qkv_bias).view(rows, groups, -1, size)
        turned, value = qkv[:, :, :-1], qkv[:, :, -1]
        turned = torch.addcmul(turned * cos, turned.roll(size // 2, -1), sin)
        newest = torch.stack((turned[:, :, -1], value))
        attended = self.cache.attend(layer.number, turned[:, :, :-1], newest)
        hidden = torch.addmm(hidden, attended, layer.projection)
        gate, up = F.linear(self._normed(hidden, layer.mlp_norm), layer.gate_and_up).chunk(2, -1)
        return torch.addmm(hidden, F.silu(gate).mul_(up), layer.down)

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self.epsilon)
