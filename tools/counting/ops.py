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

from counting import Row
from counting.dispatch import Operations
from ross_mcore import platform
from ross_mcore.architecture import LanguageConfig
from ross_mcore.config import Config
from ross_mcore.engine.chunks import ModelChunks
from ross_mcore.engine.finite import all_finite
from ross_mcore.engine.optimizer import apply_gradients, build_optimizer, gradient_norms
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
SEGMENTS = (64, 32)
"""Lengths of the samples of a packed row."""
ONE_CALL = (32, 32)
"""Lengths for which the local attention is one call on a CPU, too, as it is for all lengths on a GPU."""


Within = Callable[[Operations], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Kernels:
    """Kernels by name."""

    forward: Counter[str]
    backward: Counter[str]

    def __str__(self) -> str:
        return f"{self.forward.total()} + {self.backward.total()}"


class _Whole(torch.nn.Module):
    """A model whose weights have the names of a RossModel's."""

    def __init__(self, language_model: LanguageModel) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, hidden: Tensor, segments: Sequence[int]) -> Tensor:
        states: Tensor = self.language_model(
            None, None, None, decoder_input=hidden, packed_seq_params=packed_sequence(segments)
        )
        return states


def decoder(
    layers: int, execution: Execution, sharded: bool = False, language: LanguageConfig = LANGUAGE
) -> DistributedDataParallel:
    """A decoder of `layers` layers of these sizes on this process alone, with weights that are not zero."""
    platform.initialize_process_group(1)
    here = groups.initialize(Layout(1, 1, 1, (layers,)), 1, 1)
    language = replace(language, num_hidden_layers=layers)
    config = transformer_config(language, here, execution)
    model = LanguageModel(language, config, here, execution, here.stage.chunks[0])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05 + name.endswith("norm.weight"))
    parallel = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=sharded)
    return DistributedDataParallel(config, parallel, _Whole(model))


def of_model(
    layers: int, execution: Execution, segments: Sequence[int] = SEGMENTS, within: Within = Operations.compiled
) -> Kernels:
    """The kernels of a decoder of `layers` layers for one micro-batch. within: what counts as one kernel."""
    model = decoder(layers, execution)
    hidden = torch.randn(sum(segments), 1, LANGUAGE.hidden_size, dtype=execution.dtype, requires_grad=True)

    def forward() -> Tensor:
        states: Tensor = model(hidden, segments)
        return states.sum()

    forward().backward()  # once before, because some modules prepare themselves in their first pass
    with Operations() as operations, within(operations):
        total = forward()
        passed, operations.found = operations.found, Counter()
        total.backward()
    return Kernels(passed, operations.found)


def of_layer(execution: Execution, segments: Sequence[int] = SEGMENTS, within: Within = Operations.compiled) -> Kernels:
    """The kernels of one decoder layer: those that a second layer adds to one."""
    one, two = (of_model(layers, execution, segments, within) for layers in (1, 2))
    return Kernels(two.forward - one.forward, two.backward - one.backward)


def of_optimizer(layers: int, bf16: bool) -> Operations:
    """The kernels and reads of a step after the backward pass: norm, check of all weights, clipping, and update."""
    execution = Execution(dtype=torch.bfloat16 if bf16 else torch.float32)
    model = ModelChunks([decoder(layers, execution, sharded=bf16)])
    optimizer = build_optimizer(model, Config.from_flat(bf16=bf16, training_stage="finetune"))
    for weight in model.parameters():
        weight.main_grad.fill_(1.0)
    with Operations() as operations, operations.with_lists():
        grad_norm = gradient_norms(optimizer).total
        assert all_finite(model, platform.device(), [grad_norm])
        apply_gradients(optimizer, grad_norm, clip_grad=1.0)
    return operations


def rows() -> list[Row]:
    """For benchmarks/counts.py."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        kernels = of_layer(Execution(dtype=dtype), ONE_CALL)
        name = f"local decoder layer, {str(dtype).removeprefix('torch.')}, packed"
        found.append(Row(name, str(kernels), "", "kernels of the forward + backward pass"))
    for bf16 in (False, True):
        two, three = (of_optimizer(layers, bf16) for layers in (2, 3))
        name = f"optimizer's step, {'bf16' if bf16 else 'fp32'}, a layer more"
        aim = "7" if bf16 else "0"
        found.append(Row(name, str(three.found.total() - two.found.total()), aim, "kernels; in bf16 copies of masters"))
        found.append(Row(f"{name}, reads", str(three.reads - two.reads), "0", "values that the host reads"))
    return found
