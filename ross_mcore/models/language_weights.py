"""Shapes of the language model's weights, without megatron.

Names are those in a checkpoint: mcore names the norms before attention and MLP after the Transformer Engine layers that
they are fused into.
"""

from __future__ import annotations

from ross_mcore.architecture import LanguageConfig
from ross_mcore.shapes import Shapes, within


def weight_shapes(config: LanguageConfig) -> Shapes:
    """Shapes of Qwen2 or Llama as mcore's GPTModel, with the padded vocabulary."""
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    qkv = width + 2 * config.num_key_value_heads * config.head_dim
    shapes: Shapes = {"embedding.word_embeddings.weight": (config.padded_vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= within(
            f"decoder.layers.{layer}.",
            {
                "self_attention.linear_qkv.layer_norm_weight": (hidden,),
                "self_attention.linear_qkv.weight": (qkv, hidden),
                **({"self_attention.linear_qkv.bias": (qkv,)} if config.qkv_bias else {}),
                "self_attention.linear_proj.weight": (hidden, width),
                "mlp.linear_fc1.layer_norm_weight": (hidden,),
                "mlp.linear_fc1.weight": (2 * config.intermediate_size, hidden),
                "mlp.linear_fc2.weight": (hidden, config.intermediate_size),
            },
        )
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["output_layer.weight"] = (config.padded_vocab_size, hidden)
    return shapes
