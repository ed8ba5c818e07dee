"""Checks of the configuration dictionaries of transformers and diffusers, and the keys in them that are used.

Tower and VAE are built from these keys only; others have no effect. Keys that would change the result, and that nothing
here computes, are refused. Pure functions that raise ValueError with the key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ross_mcore import checked

MOST_LAYERS = 4096
"""Limit for every part; a damaged file with more would fill the memory before it is noticed."""
MOST_WIDTH = 1 << 20

NOT_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(
        ("embedding_multiplier", "logits_scaling", "logit_scale", "residual_multiplier", "scale_emb"), (1,)
    ),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), (1,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"), ()),
    **dict.fromkeys(("use_logn_attn", "use_dynamic_ntk"), (False,)),
    **dict.fromkeys(("text_config", "attention_multiplier", "scale_depth", "dim_model_base", "clip_qkv"), ()),
    **dict.fromkeys(
        (
            "use_qk_norm",
            "qk_layernorm",
            "use_mrope",
            "alibi",
            "rope_interleaved",
            "rope_interleave",
            "parallel_residual",
        ),
        (False,),
    ),
    **dict.fromkeys(("use_sliding_window", "use_bidirectional_attention", "no_rope_layers"), (False, [])),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (0, 1)),
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
}
"""Keys of a decoder's config.json that change its results -> the values under which they do not; null never does."""
LLAMA_NOT_IMPLEMENTED: dict[str, tuple[object, ...]] = {"attention_bias": (False,), "mlp_bias": (False,)}
DROPOUT = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob")
DEFAULT_ROPE_THETA = 10000.0
ROPE_KEYS = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
LANGUAGE_KEYS = {
    *NOT_IMPLEMENTED,
    *LLAMA_NOT_IMPLEMENTED,
    *("model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
    *("rope_scaling", "rope_parameters", "sliding_window", "max_window_layers", "layer_types", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "use_cache", "torch_dtype", "dtype"),
    *("initializer_range", "pretraining_tp", "transformers_version", "quantization_config", "ross_enable"),
    *("image_embed_len", "image_mean", "image_std", "image_aspect_ratio", "decode_image_size", "use_mm_proj"),
    *("use_mm_inv_proj", "freeze_mm_mlp_adapter", "tune_mm_mlp_adapter", "unfreeze_mm_vision_tower"),
}
"""Keys of a decoder's config.json that are used, checked, or known to have no effect on a training."""

VISION_SIZES = ("hidden_size", "num_hidden_layers", "image_size", "patch_size")
VISION_COUNTS = ("intermediate_size", "num_attention_heads", "num_channels")
VISION_KEYS = (
    *VISION_SIZES,
    *VISION_COUNTS,
    *("hidden_act", "layer_norm_eps", "attention_dropout", "vision_use_head"),
)
VAE_COUNTS = {"latent_channels": None, "in_channels": 3, "out_channels": 3}
VAE_SWITCHES = ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
VAE_KEYS = (
    *VAE_COUNTS,
    *VAE_SWITCHES,
    *("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "norm_num_groups", "act_fn"),
    *("scaling_factor", "shift_factor"),
)


def check_language(config: dict[str, Any], family: str) -> None:
    """Checks that the config.json of a Qwen2 or Llama decoder asks for nothing that is not implemented."""
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"quantization_config: the weights are quantised ({checked.shown(method)}); give the model's original "
            "folder, in bfloat16, float16 or float32"
        )
    neutral = NOT_IMPLEMENTED | (LLAMA_NOT_IMPLEMENTED if family == "llama" else {})
    for key, values in neutral.items():
        if (value := config.get(key)) is not None and value not in values:
            only = f"only {values[0]!r} is" if values else "no value is"
            raise ValueError(f"{key}={checked.shown(value)} is not implemented ({only}), and the model depends on it")
    kinds = config.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * checked.count(config, "num_hidden_layers", most=MOST_LAYERS):
        raise ValueError(
            f"layer_types is {checked.shown(kinds)}: only 'full_attention' for each of num_hidden_layers is implemented"
        )
    if config.get("hidden_act", "silu") is None:
        raise ValueError("hidden_act is null, expected 'silu'")
    window = config.get("sliding_window")
    if family == "llama" and window is not None and window != 0:
        raise ValueError(
            f"sliding_window={checked.shown(window)} in a config.json of model_type llama, which has none: these are "
            "weights of another family (Mistral?), which is not implemented"
        )


def rope_theta(config: dict[str, Any]) -> float:
    """The base of a decoder's plain rotary embeddings, where transformers 4 and 5 keep it; 10000 where none is given.

    Refuses scaled embeddings, and two places that differ: each version of transformers would follow another one.
    """
    places = {name: checked.mapping(config.get(name) or {}, name) for name in ("rope_parameters", "rope_scaling")}
    for name, place in places.items():
        if nested := [key for key, value in place.items() if isinstance(value, dict)]:
            raise ValueError(f"{name} differs by kind of layer ({checked.shown(nested[0])}), which is not implemented")
    given = {name: _rope_facts(name, place) for name, place in places.items() if place}
    first, second = given.get("rope_parameters"), given.get("rope_scaling")
    if first is not None and second is not None and first != second:
        raise ValueError(
            f"rope_parameters is {checked.shown(first)} and rope_scaling {checked.shown(second)}: two rotary "
            "embeddings for one model; remove the key that it was not trained with"
        )
    for name, facts in given.items():
        if facts["type"] != "default":
            raise ValueError(
                f"{name}: rope scaling of type {checked.shown(facts['type'])} is not implemented; only plain rotary "
                "embeddings"
            )
        if unused := [key for key, value in facts.items() if key not in ROPE_KEYS and value is not None]:
            raise ValueError(f"{name} has {unused[0]} and no rope_type that uses it: add the rope_type, or remove it")
        checked.real({"partial_rotary_factor": 1.0} | facts, "partial_rotary_factor", above=0)
        if facts.get("partial_rotary_factor") not in (None, 1):
            raise ValueError(f"{name}: partial_rotary_factor={facts['partial_rotary_factor']} is not implemented")
    found = {"rope_theta": checked.real(config, "rope_theta", above=0)} if "rope_theta" in config else {}
    top = found.get("rope_theta", DEFAULT_ROPE_THETA)
    found |= {
        f"{name}.rope_theta": checked.real(place, "rope_theta", top, 0) for name, place in places.items() if place
    }
    if len(set(found.values())) > 1:
        listed = " and ".join(f"{name}={value:g}" for name, value in found.items())
        raise ValueError(f"{listed}: two bases for one model; remove the one that it was not trained with")
    return next(iter(found.values()), DEFAULT_ROPE_THETA)


def _rope_facts(name: str, place: dict[str, Any]) -> dict[str, Any]:
    """A rope dictionary with its type under "type" and without rope_theta."""
    kinds = {checked.text(place, key) for key in ("rope_type", "type") if place.get(key) is not None}
    if len(kinds) > 1:
        raise ValueError(f"{name} has rope_type={place['rope_type']!r} and type={place['type']!r}; remove one of them")
    other = {key: value for key, value in place.items() if key not in ("rope_theta", "rope_type", "type")}
    return {"type": next(iter(kinds), "default"), **other}


def unused_in_language(config: dict[str, Any]) -> Iterator[str]:
    """One remark for each kind of key in a decoder's config.json that has no effect here."""
    for key in DROPOUT:
        if config.get(key):
            yield f"{key}={checked.shown(config[key])} is ignored: training here has no dropout in the language model"
    own = ("mm_", "_", "tokenizer_")
    unknown = [key for key in config if key not in LANGUAGE_KEYS and key not in DROPOUT and not key.startswith(own)]
    if unknown:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        yield f"not used: {', '.join(map(checked.printable, unknown[:8]))}{more}"


def check_vision(tower: dict[str, Any]) -> None:
    """Checks the configuration of a SigLIP or CLIP vision tower."""
    if tower.get("quantization_config"):
        raise ValueError("quantization_config: the weights are quantised; give the tower's original folder")
    for key in VISION_SIZES + tuple(key for key in VISION_COUNTS if key in tower):
        checked.count(tower, key, most=MOST_LAYERS if key == "num_hidden_layers" else MOST_WIDTH)
    checked.real(tower, "layer_norm_eps", 1e-6, above=0)
    checked.real(tower, "attention_dropout", 0.0)
    checked.switch(tower, "vision_use_head", True)
    if tower["patch_size"] > tower["image_size"]:
        raise ValueError(f"patch_size {tower['patch_size']} is above image_size {tower['image_size']}")
    if tower.get("num_channels", 3) != 3:
        raise ValueError(f"num_channels is {tower['num_channels']}; pictures have 3")
    if tower["hidden_size"] % tower.get("num_attention_heads", 1):
        raise ValueError(
            f"hidden_size {tower['hidden_size']} is not a multiple of {tower['num_attention_heads']} heads"
        )


def check_processor(
    processor: dict[str, Any],
    crop: bool,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> None:
    """Checks the preprocessor_config.json of a tower with pictures of `size`; `crop`: as CLIP's, else as SigLIP's.

    Raises ValueError for the first setting that differs from the preprocessing in data/image.py.
    """
    sides = {"height": size, "width": size}
    wanted: dict[str, tuple[Any, ...]] = {
        "resample": (3, 2),
        "rescale_factor": (1 / 255,),
        "image_mean": (list(mean),),
        "image_std": (list(std),),
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), (True,)),
        **dict.fromkeys(("do_pad", "max_num_patches"), (None, False)),
        "do_center_crop": (True,) if crop else (None, False),
        "size": ({"shortest_edge": size}, size) if crop else (sides, size),
    }
    if crop:
        wanted["crop_size"] = (sides, size)
    for name, values in wanted.items():
        given = processor.get(name, values[0])
        if given not in values or (type(given) is bool) != (type(values[-1]) is bool) and given is not None:
            expected = " or ".join(repr(value) for value in values if value is not None)
            raise ValueError(f"{name}={checked.shown(given)} is not implemented; expected {expected}")


def check_autoencoder(vae: dict[str, Any]) -> None:
    """Checks the configuration of a diffusers AutoencoderKL."""
    blocks = vae.get("block_out_channels")
    if not isinstance(blocks, list) or not 0 < len(blocks) <= 16:
        raise ValueError(f"block_out_channels is {checked.shown(blocks)}, expected a list of up to 16 whole numbers")
    groups = checked.count(vae, "norm_num_groups", 32, most=MOST_WIDTH)
    for width in blocks:
        checked.count({"block_out_channels": width}, "block_out_channels", most=MOST_WIDTH)
        if width % groups and "norm_num_groups" in vae:
            raise ValueError(f"block_out_channels has {width}, not a multiple of norm_num_groups {groups}")
    for key, default in VAE_COUNTS.items():
        checked.count(vae, key, default, most=MOST_WIDTH)
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        kinds = vae.get(key, [kind])  # diffusers' default
        if not isinstance(kinds, list) or any(other != kind for other in kinds):
            raise ValueError(f"{key} is {checked.shown(kinds)}; only {kind} is implemented")
        if len(kinds) != len(blocks):
            raise ValueError(f"{key} has {len(kinds)} blocks, expected the {len(blocks)} of block_out_channels")
    if vae.get("scaling_factor", 1) is None:
        raise ValueError("scaling_factor is null, expected a number: latents cannot be given unit variance without")
    checked.count(vae, "layers_per_block", 1, most=64)
    checked.real(vae, "scaling_factor", 0.18215, above=0)
    checked.real(vae, "shift_factor", 0.0)
    for key in VAE_SWITCHES:
        checked.switch(vae, key, True)


def require_plain_latents(vae: dict[str, Any]) -> None:
    """Refuses a VAE whose latents are normalised channel by channel: the reference's are not, nor are ours."""
    for key in ("latents_mean", "latents_std"):
        if vae.get(key) is not None:
            raise ValueError(
                f"{key}={checked.shown(vae[key])}: latents normalised by channel are not implemented, only "
                "scaling_factor and shift_factor; give another VAE (FLUX.1's, SDXL's)"
            )
