"""Contents of the configuration files beside exported weights, in the fields of transformers 4.43 and the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ross_mcore.architecture import DenoiserConfig, LanguageConfig, ModelConfig, VisionConfig
from ross_mcore.errors import ConversionError

CLASS_NAMES = {"qwen2": "Qwen2", "llama": "Llama"}
VISION_CLASSES = {"siglip_vision_model": "SiglipVisionModel", "clip_vision_model": "CLIPVisionModel"}
FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "qwen2": {"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False},
    "llama": {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rope_scaling": None},
}
"""Fields of a family's config.json beside the common ones. Only these values are implemented here."""
SIGLIP_LAYER = -2
"""The layer that the reference's SigLIP reads, independent of config.json."""


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids of config.json and generation_config.json."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None

    def fields(self) -> dict[str, Any]:
        ids = {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}
        return {key: value for key, value in ids.items() if value is not None}


@dataclass(frozen=True)
class RunFacts:
    """Facts of the training run for config.json; the defaults are those of a model that was not trained here."""

    training_stage: str = "finetune"
    image_aspect_ratio: str = "square"
    mm_use_im_start_end: bool = False
    tokenizer_model_max_length: int | None = None
    """Where the reference cuts prompts, of a model that came with one; None: at the model's last position."""
    tower_trained: bool = False


def language_config(language: LanguageConfig, tokens: SpecialTokens, dtype: str) -> dict[str, Any]:
    """config.json of a plain Qwen2 or Llama; dtype: "bfloat16"."""
    config = {
        "architectures": [f"{CLASS_NAMES[language.model_type]}ForCausalLM"],
        "model_type": language.model_type,
        "torch_dtype": dtype,
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.intermediate_size,
        "num_hidden_layers": language.num_hidden_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_key_value_heads,
        "hidden_act": "silu",
        "max_position_embeddings": language.max_position_embeddings,
        "initializer_range": 0.02,
        "rms_norm_eps": language.rms_norm_eps,
        "rope_theta": language.rope_theta,
        "attention_dropout": 0.0,
        "tie_word_embeddings": language.tie_word_embeddings,
        "use_cache": True,
        **FAMILY_FIELDS[language.model_type],
        **tokens.fields(),
    }
    if language.head_dim * language.num_attention_heads != language.hidden_size:
        config["head_dim"] = language.head_dim
    return config


def ross_config(
    model: ModelConfig, tokens: SpecialTokens, dtype: str, run: RunFacts, vision_tower: str, pixel_decoder: str | None
) -> dict[str, Any]:
    """config.json of a full checkpoint of the reference (its ross_arch.py:75-136, train.py:1170-1206).

    vision_tower, pixel_decoder: paths of their folders. RossFolder (huggingface.py) reads these fields. Raises
    ConversionError for a model that the reference cannot express.
    """
    refuse_other_tower(vision_tower, model.vision)
    language, vision = model.language, model.vision
    if vision.model_type == "siglip_vision_model" and vision.select_layer != SIGLIP_LAYER:
        raise ConversionError(
            f"this model reads layer {vision.select_layer} of its SigLIP tower; the reference always reads "
            f"{SIGLIP_LAYER}. Export its parts with --format hf"
        )
    return {
        **language_config(language, tokens, dtype),
        "architectures": [f"Ross{CLASS_NAMES[language.model_type]}ForCausalLM"],
        "model_type": f"ross_{language.model_type}",
        "mm_vision_tower": vision_tower,
        "mm_vision_select_layer": vision.select_layer,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": run.mm_use_im_start_end,
        "mm_use_im_patch_token": False,
        "unfreeze_mm_vision_tower": run.tower_trained,
        "mm_vision_tower_lr": None,
        "use_mm_proj": True,
        "mm_projector_type": model.projector.projector_type,
        "mm_projector_lr": None,
        "tune_mm_mlp_adapter": run.training_stage == "pretrain",
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": run.image_aspect_ratio,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": run.tokenizer_model_max_length or language.max_position_embeddings,
        "mm_pixel_decoder": pixel_decoder,
        "mm_inv_projector_lr": None,
        **_denoiser_fields(model.denoiser),
        **ross_facts(model),
    }


def _denoiser_fields(denoiser: DenoiserConfig | None) -> dict[str, Any]:
    fields: dict[str, Any] = {"ross_enable": denoiser is not None, "use_mm_inv_proj": denoiser is not None}
    if denoiser is None:
        return {**fields, "mm_inv_projector_type": None, "mm_inv_hidden_size": None, "decode_image_size": None}
    kind = f"denoiser_vit{denoiser.depth}x"
    if denoiser != DenoiserConfig.from_type(kind, denoiser.width):
        heads, draws = denoiser.num_heads, denoiser.draws
        raise ConversionError(f"the reference has no denoiser with {heads} heads and {draws} draws; take --format hf")
    own_width = denoiser.width != DenoiserConfig.from_type(kind).width
    return {**fields, "mm_inv_projector_type": kind, **({"mm_inv_width": denoiser.width} if own_width else {})}


def ross_facts(model: ModelConfig) -> dict[str, Any]:
    """The facts about tower and VAE that the reference's config.json repeats (ross_arch.py:75-136)."""
    facts: dict[str, Any] = {
        "image_embed_len": model.vision.image_tokens,
        "image_mean": list(model.vision.image_mean),
        "image_std": list(model.vision.image_std),
        "mm_hidden_size": model.vision.hidden_size,
    }
    if model.pixel_decoder:
        facts["decode_image_size"] = model.decode_image_size
        facts["mm_inv_hidden_size"] = model.pixel_decoder.token_channels
    return facts


def refuse_other_tower(path: str, vision: VisionConfig) -> None:
    """Raises ConversionError unless the reference builds this kind of tower from `path`: it looks at the name only."""
    clip, siglip = "clip" in path.lower(), "siglip" in path.lower()
    chosen = "clip_vision_model" if clip else "siglip_vision_model" if siglip else "no tower"
    if chosen != vision.model_type:
        wanted = "contains clip" if vision.model_type == "clip_vision_model" else "contains siglip and nowhere clip"
        raise ConversionError(
            f"the reference would build {chosen} from the path {path}, because it looks at the name only, and this is "
            f"a {vision.model_type}. Save where the path {wanted}, or give such a path with --mm-vision-tower"
        )


def generation_config(tokens: SpecialTokens) -> dict[str, Any]:
    """generation_config.json of a model that came without one."""
    return {"_from_model_config": True, **tokens.fields()}


def vision_config(vision: VisionConfig, dtype: str) -> dict[str, Any]:
    """config.json of a tower's own folder, with one dtype: transformers 5 prefers the name `dtype`."""
    own = {key: value for key, value in vision.huggingface.items() if key != "dtype"}
    return {"architectures": [VISION_CLASSES[vision.model_type]], **own, "torch_dtype": dtype}


def pixel_decoder_config(diffusers: dict[str, Any]) -> dict[str, Any]:
    """config.json of an AutoencoderKL's own folder."""
    return {"_class_name": "AutoencoderKL", **diffusers}
