"""Checks of the configuration dictionaries of transformers and diffusers, and the keys in them that are used.

Tower and VAE are built from these keys only; others have no effect. Pure functions that raise ValueError with the key.
"""

from __future__ import annotations

from typing import Any

from ross_mcore import checked

MOST_LAYERS = 4096
"""Limit for every part; a damaged file with more would fill the memory before it is noticed."""
MOST_WIDTH = 1 << 20

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


def check_vision(tower: dict[str, Any]) -> None:
    """Checks the configuration of a SigLIP or CLIP vision tower."""
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
        kinds = vae.get(key, [])
        if not isinstance(kinds, list) or any(other != kind for other in kinds):
            raise ValueError(f"{key} is {checked.shown(kinds)}; only {kind} is implemented")
    checked.count(vae, "layers_per_block", 1, most=64)
    checked.real(vae, "scaling_factor", 0.18215, above=0)
    checked.real(vae, "shift_factor", 0.0)
    for key in VAE_SWITCHES:
        checked.switch(vae, key, True)
