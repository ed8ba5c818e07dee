"""The denoiser and its loss against the reference's RossDenoiser: prediction, losses and every gradient."""

from __future__ import annotations

import json
import math

import pytest
import torch

from ross_mcore.architecture import DenoiserConfig
from ross_mcore.models.denoiser import (
    CONDITION_NORM_EPSILON,
    Denoiser,
    grid_position_embedding,
    layer_norm,
    timestep_frequencies,
)
from ross_mcore.models.diffusion import Draws, Schedule, reconstruction_losses

DRAWS = 4
SINUSOID_TOLERANCE = 1e-4
"""exp in float32 is not the same on every processor: MKL has one kernel per instruction set. One unit in the last place
of a frequency, 6e-8, is 6e-5 of a cosine at t = 999. Measured 3e-5 with AVX-512 and 6e-5 with AVX2, but 0 with SSE4.2,
which the recording must have used. The gradient of the weight that multiplies the sinusoid inherits this (1.4e-5);
everything else stays within 1e-5."""


def image_major(tiled: torch.Tensor) -> torch.Tensor:
    """The reference's [draws * I, ...], draw after draw -> [I, draws, ...]."""
    return tiled.unflatten(0, (DRAWS, -1)).transpose(0, 1)


@pytest.fixture(scope="module", params=["denoiser_dit_small", "denoiser_dit_729"])
def case(request, recorded):
    tensors, metadata = recorded(f"{request.param}.safetensors")
    config = DenoiserConfig(
        depth=int(metadata["depth"]), width=int(metadata["width"]), num_heads=int(metadata["num_heads"]), draws=DRAWS
    )
    grid = math.isqrt(int(metadata["n_patches"]))
    denoiser = Denoiser(config, int(metadata["x_channel"]), int(metadata["z_channel"]), grid)
    state = {name[len("sd.net.") :]: value for name, value in tensors.items() if name.startswith("sd.net.")}
    denoiser.load_state_dict(state)
    return denoiser, tensors, metadata


def test_fixed_tables(case, assert_close):
    denoiser, tensors, _ = case
    expected = tensors["sd.net.pos_embed"]
    assert_close("pos_embed", grid_position_embedding(denoiser.config.width, denoiser.grid), expected, 1e-6)
    assert_close("ln_pre", layer_norm(tensors["in.z_hidden"], CONDITION_NORM_EPSILON), tensors["out.ln_pre"])
    if "out.t_sinusoid" in tensors:
        assert_close("sinusoid", timestep_frequencies(tensors["in.t"]), tensors["out.t_sinusoid"], SINUSOID_TOLERANCE)
        assert_close("t_embed", denoiser.t_embedder(tensors["in.t"]), tensors["out.t_embed"])


def test_loss_prediction_and_every_gradient(case, assert_close):
    denoiser, tensors, metadata = case
    denoiser.zero_grad()
    condition = tensors["in.z_hidden"].clone().requires_grad_()
    draws = Draws(torch.empty(0), image_major(tensors["in.t"]), image_major(tensors["in.noise"]))
    predictions = []

    def watched(x, timesteps, hidden):
        predictions.append(denoiser(x, timesteps, hidden))
        return predictions[-1]

    losses = reconstruction_losses(watched, Schedule.cosine(), condition, tensors["in.target"], draws)
    losses.mean().backward()

    assert_close("prediction", predictions[0], image_major(tensors["out.pred"]).flatten(0, 1))
    assert_close("losses", losses, image_major(tensors["out.loss_per_sample"]).mean(1))
    assert_close("mean loss", losses.mean(), tensors["out.loss_mean"])
    assert_close("gradient of the condition", condition.grad, tensors["grad_in.z_hidden"])
    fixed = {name.removeprefix("net.") for name in json.loads(metadata["no_grad_params"])}
    for name, parameter in denoiser.named_parameters():
        if name in fixed:
            assert parameter.grad is None
        else:
            tolerance = SINUSOID_TOLERANCE if name == "t_embedder.mlp.0.weight" else 1e-5
            assert_close(f"gradient of {name}", parameter.grad, tensors[f"grad.net.{name}"], tolerance)


def test_zero_initialised_parameters_are_the_references(case):
    denoiser, _, metadata = case
    fresh = Denoiser(denoiser.config, denoiser.in_channels, denoiser.condition_size, denoiser.grid)
    zero = {name for name, parameter in fresh.named_parameters() if not parameter.any()}
    assert zero == {name.removeprefix("net.") for name in json.loads(metadata["zero_at_init"])}
