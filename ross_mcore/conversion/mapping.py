"""TABLES: names in Hugging Face, diffusers and ROSS checkpoints, and the names under which we store those tensors.

`{layer}` stands for a number, `{name}` for any rest. A source tensor is taken by the first row that knows its name, and
so is a tensor of ours on the way out. Our names are those in the checkpoint (see inventory.py): mcore stores the norms
before attention and MLP under the names of the Transformer Engine layers they are fused into.
"""

from __future__ import annotations

from ross_mcore.architecture import LanguageConfig, ModelConfig
from ross_mcore.conversion.table import QKV, AnyRow, Equal, GatedMLP, Ignored, Same, Vocabulary

_OURS = "language_model.decoder.layers.{layer}."
_HF = "model.layers.{layer}."

LANGUAGE: tuple[AnyRow, ...] = (
    Vocabulary("language_model.embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    Same(_OURS + "self_attention.linear_qkv.layer_norm_weight", _HF + "input_layernorm.weight"),
    QKV(
        _OURS + "self_attention.linear_qkv.weight",
        _HF + "self_attn.q_proj.weight",
        _HF + "self_attn.k_proj.weight",
        _HF + "self_attn.v_proj.weight",
    ),
    QKV(
        _OURS + "self_attention.linear_qkv.bias",
        _HF + "self_attn.q_proj.bias",
        _HF + "self_attn.k_proj.bias",
        _HF + "self_attn.v_proj.bias",
    ),
    Same(_OURS + "self_attention.linear_proj.weight", _HF + "self_attn.o_proj.weight"),
    Same(_OURS + "mlp.linear_fc1.layer_norm_weight", _HF + "post_attention_layernorm.weight"),
    GatedMLP(_OURS + "mlp.linear_fc1.weight", _HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
    Same(_OURS + "mlp.linear_fc2.weight", _HF + "mlp.down_proj.weight"),
    Same("language_model.decoder.final_layernorm.weight", "model.norm.weight"),
    Ignored(_HF + "self_attn.rotary_emb.inv_freq", "a constant that old Llama checkpoints store"),
)
"""Qwen2 and Llama decoders, all but the output matrix."""

OUTPUT_MATRIX: dict[bool, tuple[AnyRow, ...]] = {
    False: (Vocabulary("language_model.output_layer.weight", "lm_head.weight"),),
    True: (Equal("lm_head.weight", "model.embed_tokens.weight"),),
}
"""By `tie_word_embeddings`. A tied model's output matrix is its embedding; where it is stored twice, both are equal."""

VISION: tuple[AnyRow, ...] = (
    Ignored("vision_model.embeddings.position_ids", "a constant that old checkpoints store"),
    Ignored("embeddings.position_ids", "a constant that old checkpoints store"),
    Ignored("text_model.{name}", "the text tower of a two-tower checkpoint"),
    Ignored("visual_projection.weight", "CLIP's projection into the space it shares with text"),
    Ignored("text_projection.weight", "CLIP's projection into the space it shares with images"),
    Ignored("logit_scale", "the temperature of contrastive training"),
    Ignored("logit_bias", "the bias of contrastive training"),
    Same("vision_model.tower.{name}", "vision_model.{name}"),  # transformers 4, and what lies on the hub
    Same("vision_model.tower.{name}", "{name}"),  # transformers 5
)
"""SigLIP and CLIP vision towers, alone or beside their text tower."""

PIXEL_DECODER: tuple[AnyRow, ...] = (Same("pixel_decoder.autoencoder.{name}", "{name}"),)
"""A diffusers AutoencoderKL folder."""

DENOISER: tuple[AnyRow, ...] = (Same("denoiser.{name}", "model.mm_inv_projector.net.{name}"),)

PROJECTOR: dict[bool, tuple[AnyRow, ...]] = {
    False: (Same("vision_projection.{name}", "model.mm_projector.{name}"),),
    True: (Same("vision_projection.0.{name}", "model.mm_projector.{name}"),),
}
"""By whether `projector_type` is `linear`, which the reference makes a bare Linear and we a sequence of one."""

_TOWER = "model.vision_tower.vision_tower."
ROSS: tuple[AnyRow, ...] = (
    *LANGUAGE,
    Ignored(_TOWER + "vision_model.embeddings.position_ids", "a constant that old checkpoints store"),
    Ignored(_TOWER + "embeddings.position_ids", "a constant that old checkpoints store"),
    Same("vision_model.tower.{name}", _TOWER + "vision_model.{name}"),
    Same("vision_model.tower.{name}", _TOWER + "{name}"),
    *DENOISER,
    Same("pixel_decoder.autoencoder.{name}", "model.pixel_decoder.pixel_decoder.{name}"),
)
"""A full checkpoint of the reference implementation, but for projector and output matrix."""


def language_table(language: LanguageConfig) -> tuple[AnyRow, ...]:
    """The rows of a decoder."""
    return (*LANGUAGE, *OUTPUT_MATRIX[language.tie_word_embeddings])


def projector_table(model: ModelConfig) -> tuple[AnyRow, ...]:
    """The rows of a projector, in a full checkpoint and in a stage-1 adapter."""
    return PROJECTOR[model.projector.projector_type == "linear"]


def ross_table(model: ModelConfig) -> tuple[AnyRow, ...]:
    """The rows of a full checkpoint of the reference implementation."""
    return (*ROSS, *projector_table(model), *OUTPUT_MATRIX[model.language.tie_word_embeddings])
