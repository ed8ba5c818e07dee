"""Decoder layers on Transformer Engine. Imported only when --transformer-impl selects it.

Legend: T tokens of a micro-batch, h heads and g query groups of this rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.fp8_utils import TE_LINEAR_TYPES, get_fp8_recipe, is_float8tensor
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from ross_mcore import platform
from ross_mcore.models.attention import PackedSequence
from ross_mcore.models.language import Execution
from ross_mcore.parallel.groups import Groups


class CoreAttention(TEDotProductAttention):
    """Transformer Engine's attention within segments.

    Segments of one length (rows of one sample each) are passed as a batch (`bshd`), which every backend supports in
    every precision; segments of several lengths as packed sequences (`thd`), for which it has 16-bit kernels only.
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
        packed_seq_params: PackedSequence | None = None,
        **_: Any,
    ) -> Tensor:
        """query [T, 1, h, head_dim], key and value [T, 1, g, head_dim] -> [T, 1, h * head_dim]."""
        if packed_seq_params is None:
            raise ValueError("the segments of the micro-batch are missing")
        query, key, value = (part.squeeze(1) for part in (query, key, value))
        if not packed_seq_params.is_rectangular:
            attended = super().forward(query, key, value, None, attn_mask_type, None, packed_seq_params.thd())
            return attended.flatten(1)[:, None]
        rows = (part.unflatten(0, (-1, packed_seq_params.lengths[0])) for part in (query, key, value))
        return super().forward(*rows, None, attn_mask_type).flatten(0, 1)[:, None]


def layer_spec() -> ModuleSpec:
    """mcore's Transformer Engine layer with CoreAttention."""
    spec = get_gpt_layer_with_transformer_engine_spec()
    spec.submodules.self_attention.submodules.core_attention = CoreAttention
    return spec


def fp8_state(decoder: TransformerBlock) -> dict[str, Tensor]:
    """Scales and amax histories of delayed FP8 scaling, by layer and module; empty with another recipe.

    The tensors are not copies: copying into them sets the state. Before the first forward pass they are created here.
    Transformer Engine's own `get_extra_state` would pickle them per module.
    """
    recipe = get_fp8_recipe(decoder.config) if decoder.config.fp8 else None
    if recipe is None or not recipe.delayed():
        return {}
    state = {}
    for layer in decoder.layers:
        for name, module in layer.named_modules():
            if not isinstance(module, TE_LINEAR_TYPES):
                continue
            if not module.fp8_meta_tensors_initialized:
                module.fp8_meta["num_gemms"] = 1
                module.init_fp8_meta_tensors(recipe)
            for direction in ("fwd", "bwd"):
                scaling = module.fp8_meta[f"scaling_{direction}"]
                where = f"layers.{layer.layer_number - 1}.{name}"
                state[f"{where}.scale_{direction}"] = scaling.scale
                state[f"{where}.amax_history_{direction}"] = scaling.amax_history
    return state


def fuse_gradient_accumulation(decoder: TransformerBlock) -> None:
    """Makes the linear layers add the gradients of their weights to `main_grad` inside the matrix product.

    mcore's option for it would also need Apex's extension, for its own output layer (tensor_parallel/layers.py:924).
    """
    for module in decoder.modules():
        if isinstance(module, TE_LINEAR_TYPES):
            module.fuse_wgrad_accumulation = True


def start_overlap(tokens: int, hidden_size: int, groups: Groups, execution: Execution) -> None:
    """Creates the buffers of --tp-comm-overlap for micro-batches of `tokens` tokens. Collective; once per process.

    Transformer Engine assumes that tensor-parallel ranks are neighbours, and they are.
    """
    from transformer_engine.pytorch.module import base

    modes = [base.UserBufferQuantizationMode.FP8 if execution.fp8 else base.UserBufferQuantizationMode.NONE]
    if execution.fp8 and execution.fp8.layers_in_bf16:
        modes.append(base.UserBufferQuantizationMode.NONE)
    base.initialize_ub(
        shape=[tokens, hidden_size],
        tp_size=groups.tensor.size(),
        quantization_modes=modes,
        dtype=execution.dtype,
        bootstrap_backend=platform.backend(),
    )


def reset_fp8_weights(module: nn.Module, loaded: dict[str, Any]) -> None:
    """Replaces the values that FP8 weights keep from before loading, which are uninitialised memory.

    mcore copies a new optimizer's masters from the value that Transformer Engine keeps of a weight before its first
    cast (distrib_optimizer.py:385), and delayed scaling computes scales from the largest values seen.
    """
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    weights: Iterable[tuple[str, Any]] = module.named_parameters()  # some have Transformer Engine's types
    for name, weight in weights:
        if is_float8tensor(weight):
            weight._high_precision_init_val = loaded[name]
            if isinstance(weight._quantizer, Float8Quantizer):
                weight._quantizer.amax.copy_(loaded[name].abs().max())
