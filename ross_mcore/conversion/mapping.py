"""Tables of tensor names in Hugging Face, diffusers and ROSS checkpoints, and of our names for the same tensors.

`{layer}` matches a number, `{name}` any text. The first entry that matches a tensor's name converts it, in both
directions. Our names are those in the checkpoint, see models/inventory.py.
"""

from __future__ import annotations

from ross_mcore import parts
from ross_mcore.architecture import ModelConfig
from ross_mcore.conversion.table import QKV, AnyEntry, Equal, GatedMLP, Ignored, Same, Vocabulary
from ross_mcore.parts import Part

_OURS = parts.LANGUAGE_MODEL.weight("decoder.layers.{layer}.")
_HF = "model.layers.{layer}."
_TOWER = parts.VISION_TOWER.weight("tower.{name}")
_CONSTANT = "a constant that old checkpoints hold"
_AUTOENCODER = parts.VAE.weight("autoencoder.{name}")

LANGUAGE: tuple[AnyEntry, ...] = (
    Vocabulary(parts.LANGUAGE_MODEL.weight("embedding.word_embeddings.weight"), "model.embed_tokens.weight"),
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
    Same(parts.LANGUAGE_MODEL.weight("decoder.final_layernorm.weight"), "model.norm.weight"),
    Ignored(_HF + "self_attn.rotary_emb.inv_freq", _CONSTANT),
)
"""Qwen2 and Llama decoders, without the output matrix."""

OUTPUT_MATRIX: dict[bool, tuple[AnyEntry, ...]] = {
    False: (Vocabulary(parts.LANGUAGE_MODEL.weight("output_layer.weight"), "lm_head.weight"),),
    True: (Equal("lm_head.weight", "model.embed_tokens.weight"),),
}
"""By `tie_word_embeddings`. A tied model's output matrix is its embedding; stored twice, both must be equal."""

VISION: tuple[AnyEntry, ...] = (
    Ignored(parts.TRANSFORMERS_4_TOWER + "embeddings.position_ids", _CONSTANT),
    Ignored("embeddings.position_ids", _CONSTANT),
    Ignored("text_model.{name}", "the text tower of a two-tower checkpoint"),
    Ignored("visual_projection.weight", "CLIP's projection of images into the space shared with text"),
    Ignored("text_projection.weight", "CLIP's projection of text into the space shared with images"),
    Ignored("logit_scale", "the temperature of contrastive training"),
    Ignored("logit_bias", "the bias of contrastive training"),
    Same(_TOWER, parts.TRANSFORMERS_4_TOWER + "{name}"),
    Same(_TOWER, "{name}"),
)
"""SigLIP and CLIP vision towers, alone or beside their text tower."""

PIXEL_DECODER: tuple[AnyEntry, ...] = (Same(_AUTOENCODER, "{name}"),)
"""A diffusers AutoencoderKL folder."""

DENOISER: tuple[AnyEntry, ...] = (Same(parts.DENOISER.weight("{name}"), parts.DENOISER.reference + "{name}"),)

PROJECTOR: dict[bool, tuple[AnyEntry, ...]] = {
    False: (Same(parts.PROJECTOR.weight("{name}"), parts.PROJECTOR.reference + "{name}"),),
    True: (Same(parts.PROJECTOR.weight("0.{name}"), parts.PROJECTOR.reference + "{name}"),),
}
"""By whether `projector_type` is `linear`: a bare Linear in the reference, a sequence of one Linear here."""

ROSS: tuple[AnyEntry, ...] = (
    *LANGUAGE,
    Ignored(parts.VISION_TOWER.reference + parts.TRANSFORMERS_4_TOWER + "embeddings.position_ids", _CONSTANT),
    Ignored(parts.VISION_TOWER.reference + "embeddings.position_ids", _CONSTANT),
    Same(_TOWER, parts.VISION_TOWER.reference + parts.TRANSFORMERS_4_TOWER + "{name}"),
    Same(_TOWER, parts.VISION_TOWER.reference + "{name}"),
    *DENOISER,
    Same(_AUTOENCODER, parts.VAE.reference + "{name}"),
)
"""A full checkpoint of the reference implementation, without projector and output matrix."""


def part_table(part: Part, model: ModelConfig) -> tuple[AnyEntry, ...]:
    """The entries of one part in a folder of its library, or in an adapter of the reference."""
    return {
        parts.VISION_TOWER: VISION,
        parts.PROJECTOR: PROJECTOR[model.projector.projector_type == "linear"],
        parts.LANGUAGE_MODEL: (*LANGUAGE, *OUTPUT_MATRIX[model.language.tie_word_embeddings]),
        parts.DENOISER: DENOISER,
        parts.VAE: PIXEL_DECODER,
    }[part]


def ross_table(model: ModelConfig) -> tuple[AnyEntry, ...]:
    """The entries of a full checkpoint of the reference implementation."""
    return (*ROSS, *part_table(parts.PROJECTOR, model), *OUTPUT_MATRIX[model.language.tie_word_embeddings])
