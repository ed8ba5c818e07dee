"""Kernels that a decoder layer, the loss and the optimizer's step start: operations of torch that are not views.

A function that torch.compile turns into one kernel on a GPU, and a kernel of Transformer Engine, is one operation.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor

from counting.dispatch import Operations
from ross_mcore import platform
from ross_mcore.architecture import LanguageConfig
from ross_mcore.models.attention import packed_sequence
from ross_mcore.models.language import Execution, LanguageModel, transformer_config
from ross_mcore.parallel import groups
from ross_mcore.parallel.layout import Layout

LANGUAGE = LanguageConfig(
    model_type="qwen2",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=250,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
    qkv_bias=True,
)
SEGMENTS = (40, 24)
"""Lengths of the samples of a packed row."""


Within = Callable[[Operations], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Kernels:
    """Kernels by name."""

    forward: Counter[str]
    backward: Counter[str]

    def __str__(self) -> str:
        return f"{self.forward.total()} + {self.backward.total()}"


def language_model(layers: int, execution: Execution) -> DistributedDataParallel:
    """A small decoder of `layers` layers on this process alone, with weights that are not zero."""
    platform.initialize_process_group(1)
    here = groups.initialize(Layout(1, 1, 1, (layers,)), 1, 1)
    language = replace(LANGUAGE, num_hidden_layers=layers)
    config = transformer_config(language, here, execution)
    model = LanguageModel(language, config, here, execution, here.stage.chunks[0])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05 + name.endswith("norm.weight"))
    return DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)


def of_model(
    layers: int, execution: Execution, segments: Sequence[int] = SEGMENTS, within: Within = Operations.compiled
) -> Kernels:
    """The kernels of a decoder of `layers` layers for one micro-batch. within: what counts as one kernel."""
    model = language_model(layers, execution)
    hidden = torch.randn(sum(segments), 1, LANGUAGE.hidden_size, dtype=execution.dtype, requires_grad=True)

    def forward() -> Tensor:
        states: Tensor = model(None, None, None, decoder_input=hidden, packed_seq_params=packed_sequence(segments))
        return states.sum()

    forward().backward()  # once before, because some modules prepare themselves in their first pass
    with Operations() as operations, within(operations):
        total = forward()
        passed, operations.found = operations.found, Counter()
        total.backward()
    return Kernels(passed, operations.found)


def of_layer(execution: Execution, segments: Sequence[int] = SEGMENTS, within: Within = Operations.compiled) -> Kernels:
    """The kernels of one decoder layer: those that a third layer adds to two."""
    two, three = (of_model(layers, execution, segments, within) for layers in (2, 3))
    return Kernels(three.forward - two.forward, three.backward - two.backward)
