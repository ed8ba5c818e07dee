"""Shapes computed by `weight_shapes`, compared with modules on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ross_mcore.architecture import DenoiserConfig, PixelDecoderConfig, ProjectorConfig, VisionConfig
from ross_mcore.models import denoiser, language_weights, pixel_decoder, projector, vision
from ross_mcore.models.denoiser import Denoiser
from ross_mcore.models.projector import VisionProjection
from tests.unit.conversion.conftest import SIGLIP, VAE
from tests.unit.parallel.test_layout import QWEN2_7B

HALF = (0.5, 0.5, 0.5)


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


TYPES = ("down_block_types", "up_block_types")


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("kind", ["siglip_vision_model", "clip_vision_model"])
def test_vision_tower(kind: str, head: bool) -> None:
    from ross_mcore.models.vision import VisionModel

    config = VisionConfig({**SIGLIP, "model_type": kind, "vision_use_head": head}, HALF, HALF)
    with torch.device("meta"):
        assert vision.weight_shapes(config) == shapes_of(VisionModel(config).tower)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers_per_block": 2, "use_quant_conv": True, "use_post_quant_conv": True},
        {"block_out_channels": [4, 8, 8, 16], "mid_block_add_attention": False},
    ],
)
def test_autoencoder(changes: dict[str, Any]) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config = vae_of(changes)
    with torch.device("meta"):
        assert pixel_decoder.weight_shapes(PixelDecoderConfig(config)) == shapes_of(AutoencoderKL.from_config(config))


def vae_of(changes: dict[str, Any]) -> dict[str, Any]:
    """VAE with changes, and as many types of blocks as widths."""
    config = {**VAE, **changes}
    return config | {key: [VAE[key][0]] * len(config["block_out_channels"]) for key in TYPES}


def test_denoiser_and_projector() -> None:
    small = DenoiserConfig(depth=2, width=16, num_heads=4)
    assert denoiser.weight_shapes(small, 8, 24, 3) == shapes_of(Denoiser(small, 8, 24, 3))
    for kind in ("linear", "mlp2x_gelu", "mlp3x_gelu"):
        config = ProjectorConfig(kind)
        assert projector.weight_shapes(config, 8, 12) == shapes_of(VisionProjection(config, 8, 12))


def test_published_parameter_counts() -> None:
    """Qwen2-7B, SigLIP-SO400M, the denoiser and the FLUX VAE, in millions as published."""

    def millions(shapes: dict[str, tuple[int, ...]]) -> float:
        return round(sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e6, 2)

    siglip = {**SIGLIP, "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "image_size": 384}
    flux = vae_of({"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16})
    assert millions(language_weights.weight_shapes(QWEN2_7B)) == 7615.62
    assert millions(vision.weight_shapes(VisionConfig(siglip, HALF, HALF))) == 428.23
    assert millions(denoiser.weight_shapes(DenoiserConfig(), 64, 3584, 27)) == 64.63
    assert millions(pixel_decoder.weight_shapes(PixelDecoderConfig(flux))) == 83.82
