"""The denoiser without recorded values: initialisation, precision, draws of an image, empty batches."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from ross_mcore.architecture import DenoiserConfig, ProjectorConfig
from ross_mcore.models.denoiser import Denoiser
from ross_mcore.models.diffusion import Schedule, keyed_draws, reconstruction_losses
from ross_mcore.models.projector import VisionProjection
from ross_mcore.parallel.layout import PairShare

CONFIG = DenoiserConfig(depth=2, width=32, num_heads=4)
CHANNELS, CONDITION, GRID, DRAWS = 8, 12, 3, 4


def build(seed: int = 0, informative: bool = True) -> Denoiser:
    """A denoiser; `informative` draws the parameters that are initialised to zero too, so that all have an effect."""
    denoiser = Denoiser(CONFIG, CHANNELS, CONDITION, GRID)
    generator = torch.Generator().manual_seed(seed)
    denoiser.reset_parameters(generator)
    if informative:
        with torch.no_grad():
            for parameter in denoiser.parameters():
                if parameter.requires_grad and not parameter.any():
                    parameter.normal_(std=0.1, generator=generator)
    return denoiser


def inputs(images: int):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images * DRAWS, CHANNELS, GRID, GRID, generator=generator)
    timesteps = torch.randint(0, 1000, (images * DRAWS,), generator=generator)
    return x, timesteps, torch.randn(images, GRID**2, CONDITION, generator=generator)


def test_initial_weights():
    """Prediction 0, no gradient to the condition, scales as documented; the same generator gives the same weights."""
    denoiser = build(informative=False)
    x, timesteps, condition = inputs(2)
    condition.requires_grad_()
    prediction = denoiser(x, timesteps, condition)
    assert prediction.shape == x.shape and not prediction.any()
    (prediction - x).square().mean().backward()
    assert not condition.grad.any()
    assert denoiser.final_layer.linear.weight.grad.any()
    assert not denoiser.pos_embed.requires_grad

    again = build(informative=False)
    assert all(torch.equal(a, b) for a, b in zip(denoiser.parameters(), again.parameters(), strict=True))
    other = build(seed=7, informative=False)
    assert not torch.equal(other.z_embedder[1].weight, denoiser.z_embedder[1].weight)
    assert abs(denoiser.z_embedder[1].weight.std().item() - 0.02) < 0.004
    bound = (6 / (CONFIG.width + CHANNELS)) ** 0.5
    assert 0.9 * bound < denoiser.x_embedder.proj.weight.abs().max() <= bound
    assert all(not parameter.any() for name, parameter in denoiser.named_parameters() if name.endswith("bias"))


def test_draws_of_an_image_share_its_condition():
    """A condition repeated by the caller gives the same predictions and, summed over draws, the same gradient."""
    denoiser = build()
    x, timesteps, condition = inputs(3)
    shared = condition.clone().requires_grad_()
    expanded = condition.clone().requires_grad_()
    first = denoiser(x, timesteps, shared)
    second = denoiser(x, timesteps, expanded.repeat_interleave(DRAWS, 0))
    torch.testing.assert_close(first, second)
    for prediction in (first, second):
        prediction.square().mean().backward()
    assert shared.grad.any()
    torch.testing.assert_close(shared.grad, expanded.grad)


def test_computes_in_float32_for_all_inputs():
    """bfloat16 inputs and weights are cast to float32, also under autocast."""
    denoiser = build()
    x, timesteps, condition = inputs(2)
    rounded = condition.bfloat16()
    expected = denoiser(x, timesteps, rounded.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = denoiser(x, timesteps, rounded)
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)

    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(parameter.bfloat16().float())
    expected = denoiser(x, timesteps, condition)
    actual = denoiser.bfloat16()(x, timesteps, condition)
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)


def test_losses_of_disjoint_pairs_add_up():
    """Three images of four draws, split unevenly over five ranks: losses, and gradients of all that trains."""
    denoiser, size = build(), 5
    positions = torch.arange(3)
    draws = keyed_draws(0, positions, positions, DRAWS, (CHANNELS // 4, 2 * GRID, 2 * GRID), GRID)
    latents, whole = inputs(3)[0][:3], inputs(3)[2].requires_grad_()
    expected = reconstruction_losses(denoiser, Schedule.cosine(), whole, latents, draws)
    trained = [whole, *(parameter for parameter in denoiser.parameters() if parameter.requires_grad)]
    gradients = torch.autograd.grad(expected.sum(), trained)

    total = torch.zeros(3)
    for share in (PairShare.of(3, DRAWS, rank, size, turn=3) for rank in range(size)):
        held = slice(share.pictures.start, share.pictures.stop)
        denoise = partial(denoiser, draws_of_each=share.draws_of_each)
        losses = reconstruction_losses(denoise, Schedule.cosine(), whole[held], latents[held], draws[held], share.pairs)
        total = total + F.pad(losses, (held.start, 3 - held.stop))
    torch.testing.assert_close(total, expected)
    for found, gradient in zip(torch.autograd.grad(total.sum(), trained), gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_no_images_give_no_losses_and_zero_gradients():
    denoiser = build()
    none = torch.zeros(0, dtype=torch.int64)
    draws = keyed_draws(0, none, none, DRAWS, (CHANNELS // 4, 2 * GRID, 2 * GRID), GRID)
    condition = torch.zeros(0, GRID**2, CONDITION, requires_grad=True)
    latents = torch.zeros(0, CHANNELS, GRID, GRID)
    losses = reconstruction_losses(denoiser, Schedule.cosine(), condition, latents, draws)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert condition.grad is not None
    for name, parameter in denoiser.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_counts_and_shapes_that_disagree():
    denoiser = build()
    x, timesteps, condition = inputs(2)
    with pytest.raises(ValueError, match="7 latents and 7 timesteps for conditions of 2 images"):
        denoiser(x[:7], timesteps[:7], condition)
    with pytest.raises(ValueError, match="8 latents and 4 timesteps"):
        denoiser(x, timesteps[:4], condition)
    with pytest.raises(ValueError, match="8 latents .* of 0 images"):
        denoiser(x, timesteps, condition[:0])
    with pytest.raises(ValueError, match="expected"):
        denoiser(x, timesteps, condition[:, 1:])


def test_projection():
    projection = VisionProjection(ProjectorConfig("mlp3x_gelu"), 6, 10)
    assert sorted(projection.state_dict()) == [f"{n}.{kind}" for n in (0, 2, 4) for kind in ("bias", "weight")]
    projection.reset_parameters(torch.Generator().manual_seed(0))
    first = [parameter.clone() for parameter in projection.parameters()]
    projection.reset_parameters(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(first, projection.parameters(), strict=True))
    assert projection[0].weight.abs().max() <= 6**-0.5 and projection[2].weight.abs().max() <= 10**-0.5
    assert projection(torch.randn(2, 5, 6)).shape == (2, 5, 10)
    assert projection(torch.zeros(0, 5, 6)).shape == (0, 5, 10)
    assert projection.bfloat16()(torch.randn(2, 5, 6)).dtype == torch.bfloat16
    assert len(VisionProjection(ProjectorConfig("linear"), 6, 10)) == 1
