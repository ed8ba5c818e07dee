"""The VAE with recorded weights, beyond the recorded values (those are in test_recorded.py)."""

from __future__ import annotations

import json

import pytest
import torch
from parity.rows import compare
from safetensors.torch import load_file

from ross_mcore.architecture import PixelDecoderConfig
from ross_mcore.models.pixel_decoder import PixelDecoder, group_latents, ungroup_latents


@pytest.fixture(scope="module", params=["siglip", "clip"])
def case(request, recorded, recorded_json, golden):
    tensors, metadata = recorded(f"vae_target_{request.param}.safetensors")
    decoder = PixelDecoder(
        PixelDecoderConfig(recorded_json("components/tiny_vae/config.json")),
        json.loads(metadata["mean"]),
        json.loads(metadata["std"]),
        int(metadata["decode_image_size"]),
        encode_batch_size=2,
    )
    state = load_file(golden / "components/tiny_vae/diffusion_pytorch_model.safetensors")
    decoder.autoencoder.load_state_dict(state)
    return decoder, tensors


def test_ungrouping_inverts_grouping(case):
    _, tensors = case
    assert torch.equal(ungroup_latents(group_latents(tensors["group_demo_in"])), tensors["group_demo_in"])


def test_decode_inverts_the_scaling(case):
    """The reference never decodes; the VAE itself, fed the unscaled posterior mean, must give the same picture."""
    decoder, tensors = case
    expected = (decoder.autoencoder.decode(tensors["post_mean"]).sample / 2 + 0.5).clamp(0, 1)
    assert compare("vae", "picture", decoder.decode(tensors["z_q_mode"]), expected).status == "ok"


def test_frozen_float32_and_empty(case):
    """Stays frozen, in evaluation mode and in float32 in a model that is trained and cast; no images, no work."""
    decoder, tensors = case
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    torch.nn.ModuleList([decoder]).train().bfloat16()
    assert not any(module.training for module in decoder.modules())
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    assert decoder.image_mean.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    assert all(name.startswith("autoencoder.") for name in before)
    assert decoder.double().encode(tensors["images"].bfloat16(), None).dtype == torch.float32

    empty = decoder.encode(tensors["images"][:0], tensors["posterior_noise"][:0])
    assert empty.shape == (0, 64, decoder.grid, decoder.grid)
    assert decoder.decode(empty).shape == (0, 3, decoder.decode_image_size, decoder.decode_image_size)


def test_counts_and_sizes_that_disagree(case):
    decoder, tensors = case
    with pytest.raises(ValueError, match=r"posterior noise of shape \[2, .*expected \[3, "):
        decoder.encode(tensors["images"], tensors["posterior_noise"][:2])
    with pytest.raises(ValueError, match="decode_image_size=60 is not a multiple of 16"):
        PixelDecoder(decoder.config, [0.5] * 3, [0.5] * 3, 60)
