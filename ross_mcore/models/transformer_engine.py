"""The decoder layers on Transformer Engine. Imported only where it is installed and asked for.

Legend: T tokens of a micro-batch, h heads and g groups of this rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.fp8_utils import TE_LINEAR_TYPES, get_fp8_recipe, is_float8tensor
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from ross_mcore import platform
from ross_mcore.models.language import Execution
from ross_mcore.parallel.groups import Groups


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


def fp8_state(decoder: TransformerBlock) -> dict[str, Tensor]:
    """Scales and amax histories of delayed FP8 scaling, by layer and module; nothing with another recipe.

    The tensors are the layers' own: copying into them sets the state. Transformer Engine makes them in the first pass,
    or here when that has not been. It would save them inside a pickle per module (`get_extra_state`).
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


def start_overlap(tokens: int, hidden_size: int, groups: Groups, execution: Execution) -> None:
    """Makes the buffers of --tp-comm-overlap, for micro-batches of that many tokens. Collective; once in a process.

    Tensor-parallel ranks are neighbours, as Transformer Engine takes them to be.
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


def took_weights(module: nn.Module, loaded: dict[str, Any]) -> None:
    """Makes weights that are kept in FP8 forget what they were before these were loaded, which was no weight at all.

    mcore takes the masters of a new optimizer from what Transformer Engine keeps of a weight
    before the first cast (distrib_optimizer.py:385), and delayed scaling takes scales from the maxima seen.
    """
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    weights: Iterable[tuple[str, Any]] = module.named_parameters()  # tensors of Transformer Engine's types among them
    for name, weight in weights:
        if is_float8tensor(weight):
            weight._high_precision_init_val = loaded[name]
            if isinstance(weight._quantizer, Float8Quantizer):
                weight._quantizer.amax.copy_(loaded[name].abs().max())
