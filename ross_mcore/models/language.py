"""The language model: Qwen2 or Llama as mcore GPT layers, with mcore's local or Transformer Engine layer spec.

Legend: T tokens of a micro-batch, D hidden size, N selected positions, V padded vocabulary, V/T that of one
tensor-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ross_mcore import platform
from ross_mcore.architecture import LanguageConfig
from ross_mcore.costs import Recompute
from ross_mcore.models.attention import RotaryAngles, SDPACoreAttention
from ross_mcore.models.products import Precision
from ross_mcore.parallel.groups import Groups
from ross_mcore.parallel.layout import Chunk


@dataclass(frozen=True)
class Fp8:
    """FP8 in the decoder's linear layers; fields as in mcore's transformer_config.py, "fp8 related"."""

    format: Literal["e4m3", "hybrid"]
    recipe: Literal["delayed", "tensorwise", "mxfp8", "blockwise"] = "delayed"
    margin: int = 0
    amax_history_len: int = 1
    amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    param: bool = False
    layers_in_bf16: tuple[int, int] | None = None
    """Numbers of first and last layers that stay in bf16."""

    def megatron(self) -> dict[str, Any]:
        """The fields of a TransformerConfig."""
        start, end = self.layers_in_bf16 or (1, 1)
        return {
            "fp8": self.format,
            "fp8_recipe": self.recipe,
            "fp8_margin": self.margin,
            "fp8_amax_history_len": self.amax_history_len,
            "fp8_amax_compute_algo": self.amax_compute_algo,
            "fp8_param": self.param,
            "first_last_layers_bf16": self.layers_in_bf16 is not None,
            "num_layers_at_start_in_bf16": start,
            "num_layers_at_end_in_bf16": end,
        }


@dataclass(frozen=True)
class Execution:
    """How the model is computed: precision, kernels, recomputation, communication."""

    transformer_impl: Literal["local", "transformer_engine"] = "local"
    dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    attention_backend: Literal["auto", "flash", "fused", "unfused"] = "auto"
    fp8: Fp8 | None = None
    gradient_accumulation_fusion: bool = False
    """Add weight gradients to the gradient buffer inside the matrix product: in Transformer Engine's layers, and in
    mcore's own where Apex is installed."""
    tp_comm_overlap: bool = False
    recompute: Recompute = Recompute()  # noqa: RUF009  frozen
    denoiser_precision: Precision = "fp32"
    vae_precision: Precision = "fp32"
    overlap_p2p_communication: bool = True


class RMSNorm(nn.Module):
    """RMSNorm that supports sequence parallelism; mcore's WrappedTorchNorm does not (torch_norm.py:32).

    Under sequence parallelism each rank normalises its piece of the sequence and has one term of the weight's gradient.
    mcore sums marked weights over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # a mark for mcore

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


def transformer_config(language: LanguageConfig, groups: Groups, execution: Execution) -> TransformerConfig:
    """mcore's configuration of this language model in this layout."""
    layout = groups.layout
    interleaved = layout.virtual_stages > 1
    return TransformerConfig(
        num_layers=language.num_hidden_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.intermediate_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_key_value_heads,
        kv_channels=language.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=language.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=language.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=execution.dtype,
        pipeline_dtype=execution.dtype,
        bf16=execution.dtype == torch.bfloat16,
        attention_backend=AttnBackend[execution.attention_backend],
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        pipeline_model_parallel_layout=layout.megatron_pipeline_layout(),
        overlap_p2p_comm=interleaved and execution.overlap_p2p_communication,
        batch_p2p_comm=not (interleaved and execution.overlap_p2p_communication),
        # mcore would wait for the device after every exchange, against a race in versions of torch before 2.0
        batch_p2p_sync=False,
        variable_seq_lengths=layout.pipeline_parallel > 1,  # parallel/exchange.py has them
        moe_token_dispatcher_type="alltoall",  # without experts unused, but the default refuses variable lengths
        sequence_parallel=execution.sequence_parallel and layout.tensor_parallel > 1,
        # losses are divided by the step's labels and images: DDP must sum, the schedule must not divide
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=not platform.has_gpu(),
        deallocate_pipeline_outputs=True,
        # compiled by torch on a GPU, and mcore's plain functions on a CPU
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        # kernels of Transformer Engine
        apply_rope_fusion=execution.transformer_impl == "transformer_engine",
        # kernels of Apex
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=execution.gradient_accumulation_fusion and platform.libraries().gradient_fusion,
        tp_comm_overlap=execution.tp_comm_overlap,
        **(execution.fp8.megatron() if execution.fp8 else {}),
        **_recompute(execution.recompute),
    )


def _recompute(chosen: Recompute) -> dict[str, Any]:
    """The fields of a TransformerConfig.

    mcore takes `uniform` groups that divide the layers of a chunk, and any `block`: a chunk with fewer recomputes all.
    """
    if chosen.granularity is None:
        return {}
    how: dict[str, Any] = {"recompute_method": chosen.method, "recompute_num_layers": chosen.num_layers}
    if chosen.granularity == "selective":
        how = {"recompute_modules": list(chosen.modules)}
    return {"recompute_granularity": chosen.granularity, **how}


def layer_spec(execution: Execution, num_layers: int) -> TransformerBlockSubmodules | ModuleSpec:
    """The decoder layers of one stage: mcore's own Transformer Engine spec, or the local one with SDPA and RMSNorm."""
    if execution.transformer_impl == "transformer_engine":
        from ross_mcore.models import transformer_engine

        return transformer_engine.layer_spec()
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = SDPACoreAttention
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=RMSNorm)


def _mark_sharded_weights(module: nn.Module) -> None:
    """Marks sharded weights for mcore.

    mcore sets the marks as a side effect of random initialisation (tensor_parallel/layers.py), which is off because
    weights always come from a checkpoint. Without marks the gradient norm counts one rank's shards only.
    """
    sharded_dims = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
    for part in module.modules():
        dim = sharded_dims.get(type(part))
        if dim is not None and part.weight is not None and not hasattr(part.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(part.weight, is_parallel=True, dim=dim, stride=1)


class LanguageModel(GPTModel):
    """GPTModel whose last stage returns hidden states, the input of both the output layer and the denoiser.

    They are the states after the final norm. Logits are computed only at the positions a caller selects, because image
    positions, most of a sequence, never have a label.
    """

    def __init__(
        self, language: LanguageConfig, config: TransformerConfig, groups: Groups, execution: Execution, chunk: Chunk
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=layer_spec(execution, len(chunk.layers)),
            vocab_size=language.padded_vocab_size,
            max_sequence_length=language.max_position_embeddings,
            pre_process=chunk.is_first,
            post_process=chunk.is_last,
            share_embeddings_and_output_weights=language.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=language.rope_theta,
            scatter_embedding_sequence_parallel=False,
            vp_stage=chunk.number if config.virtual_pipeline_model_parallel_size else None,
        )
        self.rotary_pos_emb = RotaryAngles(cast(Any, self).rotary_pos_emb.inv_freq)
        _mark_sharded_weights(self)
        self.real_vocab_size = language.vocab_size
        self.tensor_group = groups.tensor
        if chunk.is_last:
            # the input of the output layer is already gathered over the sequence
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = groups.tensor.size() > 1
        if execution.transformer_impl == "transformer_engine" and execution.gradient_accumulation_fusion:
            from ross_mcore.models import transformer_engine

            transformer_engine.fuse_gradient_accumulation(self.decoder)

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Overrides the last stage's hook (gpt_model.py:_postprocess) to return hidden states."""
        return hidden_states

    def fp8_state(self) -> dict[str, Tensor]:
        """State of FP8 layers beside their weights, see transformer_engine.fp8_state."""
        if self.config.fp8 is None:
            return {}
        from ross_mcore.models import transformer_engine

        return transformer_engine.fp8_state(self.decoder)

    def reset_fp8_weights(self, loaded: dict[str, Any]) -> None:
        """Call after weights are loaded, see transformer_engine.reset_fp8_weights."""
        if self.config.fp8_param:
            from ross_mcore.models import transformer_engine

            transformer_engine.reset_fp8_weights(self, loaded)

    def logits(self, states: Tensor) -> Tensor:
        """states [N, D], equal on all ranks -> this rank's columns of the logits [N, V/T], -inf at padding."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits: Tensor = self.output_layer(states, weight=weight)[0]
        real = self.real_vocab_size - self.tensor_group.rank() * logits.shape[-1]
        if real < logits.shape[-1]:
            with torch.no_grad():  # in place, and unknown to autograd: a softmax is 0 there, and so is its gradient
                logits[:, max(0, real) :] = float("-inf")
        return logits

    def token_losses(self, states: Tensor, labels: Tensor) -> Tensor:
        """states [N, D], labels [N] -> cross-entropies [N] fp32 over the real vocabulary.

        Both functions of mcore compute in one fp32 copy of the logits, which becomes their gradient. The fused one
        rounds the gradient to bf16, as that of bf16 logits is in any case.
        """
        logits = self.logits(states)
        if logits.dtype == torch.bfloat16 and len(labels):  # it cannot split an empty tensor
            return fused_vocab_parallel_cross_entropy(logits, labels, self.tensor_group)
        return tensor_parallel.vocab_parallel_cross_entropy(logits, labels)
