"""Keyed draws, sampler and loss without recorded values: independence, statistics, empty batches."""

from __future__ import annotations

import pytest
import torch

from ross_mcore.batch import Draws
from ross_mcore.models import diffusion
from ross_mcore.models.diffusion import (
    Schedule,
    by_timestep,
    draw_seed,
    keyed_draws,
    pair_losses,
    reconstruction_losses,
    run_steps,
    spaced_timesteps,
    timestep_ranges,
)

LATENT, GRID, DRAWS = (2, 4, 4), 2, 4


def keyed(positions, ordinals, seed=1):
    return keyed_draws(seed, torch.tensor(positions), torch.tensor(ordinals), DRAWS, LATENT, GRID)


def test_an_image_draws_the_same_in_every_batch():
    """Draws depend on positions and ordinals, not on batch size, order or neighbours."""
    whole = keyed([5, 5, 9, 2**40], [0, 1, 0, 0])
    for image in range(4):
        alone = keyed([[5, 5, 9, 2**40][image]], [[0, 1, 0, 0][image]])
        for name in ("posterior_noise", "timesteps", "noise"):
            assert torch.equal(getattr(whole, name)[image], getattr(alone, name)[0])
    reordered = keyed([9, 5], [0, 1])
    assert torch.equal(reordered.noise, whole.noise[[2, 1]])


def test_draws_depend_on_seed_position_and_ordinal():
    keys = {(seed, position, ordinal) for seed in range(4) for position in range(50) for ordinal in range(4)}
    seeds = {draw_seed(*key) for key in keys}
    assert len(seeds) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    noises = [keyed([3], [0]), keyed([3], [0], seed=2), keyed([4], [0]), keyed([3], [1])]
    assert len({draws.noise.sum().item() for draws in noises}) == len(noises)


def test_draws_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    keyed([1, 2], [0, 0])
    assert torch.equal(torch.rand(3), expected)


def test_statistics_of_draws():
    """2000 images: means within five standard errors, every decile of timesteps used."""
    draws = keyed(list(range(2000)), [0] * 2000)
    for noise in (draws.posterior_noise, draws.noise):
        assert abs(noise.mean().item()) < 5 / noise.numel() ** 0.5
        assert abs(noise.var().item() - 1) < 5 * (2 / noise.numel()) ** 0.5
    assert draws.timesteps.min() >= 0 and draws.timesteps.max() <= 999
    counts = torch.bincount(draws.timesteps.flatten() // 100, minlength=10)
    assert (counts - 800).abs().max() < 5 * 800**0.5


def test_shapes_and_counts():
    draws = keyed([], [])
    assert draws.posterior_noise.shape == (0, *LATENT) and draws.timesteps.shape == (0, DRAWS)
    assert draws.noise.shape == (0, DRAWS, 8, GRID, GRID)
    with pytest.raises(ValueError, match="2 image positions, but 1 image ordinals"):
        keyed([1, 2], [0])


def test_spaced_timesteps():
    assert spaced_timesteps(1000, 1000) == list(range(1000))
    assert spaced_timesteps(1000, 1) == [0]
    for steps in (2, 7, 10, 25, 50, 250, 999):
        chosen = spaced_timesteps(1000, steps)
        assert len(set(chosen)) == steps and chosen == sorted(chosen) and (chosen[0], chosen[-1]) == (0, 999)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"{steps} sampling steps"):
            spaced_timesteps(1000, steps)


def test_respacing_keeps_the_marginals():
    schedule = Schedule.cosine()
    respaced = schedule.respace(25)
    assert respaced.num_timesteps == 25
    torch.testing.assert_close(
        respaced.alphas_cumprod, schedule.alphas_cumprod[respaced.timestep_map], rtol=1e-9, atol=0
    )


def ideal_denoiser(schedule: Schedule, mean: float, deviation: float):
    """The best noise prediction for data that is N(mean, deviation^2) in every pixel."""

    def denoise(x, timesteps):
        signal = schedule.sqrt_alphas_cumprod.float()[timesteps].view(-1, 1, 1, 1)
        noise = schedule.sqrt_one_minus_alphas_cumprod.float()[timesteps].view(-1, 1, 1, 1)
        return noise * (x - signal * mean) / (signal**2 * deviation**2 + noise**2)

    return denoise


def drawn(shape, steps, seed):
    """The first latent and the noise of every step."""
    generator = torch.Generator().manual_seed(seed)
    start, *noises = [torch.randn(shape, generator=generator) for _ in range(1 + steps)]
    return start, noises


def sample(*arguments, on_step=None, **options):
    return run_steps(diffusion.sample(*arguments, **options), on_step)


def test_sampler_reproduces_a_distribution():
    """With the ideal denoiser of N(1.5, 0.5^2), 250 steps must give that mean and deviation to three percent."""
    schedule = Schedule.cosine()
    denoise = ideal_denoiser(schedule, 1.5, 0.5)
    samples = sample(denoise, schedule.respace(250), *drawn((8, 4, 16, 16), 250, seed=0))
    assert abs(samples.mean().item() - 1.5) < 0.03
    assert abs(samples.std().item() - 0.5) < 0.015


def test_sampler_options():
    schedule = Schedule.cosine()
    denoise = ideal_denoiser(schedule, 1.5, 0.5)
    start, noises = drawn((2, 1, 4, 4), 5, seed=3)

    def run(start=start, noises=noises, **options):
        return sample(denoise, schedule.respace(5), start, noises, **options)

    assert torch.equal(run(), run(noises=(noise.double() for noise in noises)))
    assert torch.equal(run(), run(noises=[*noises[:-1], torch.zeros(2, 1, 4, 4)]))
    assert not torch.equal(run(), run(temperature=0.5))
    assert run(temperature=0.0).std() < run().std()
    assert run(clip=1.0).abs().max() <= 1
    with pytest.raises(ValueError, match="start has shape"):
        run(start=torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="shorter"):
        run(noises=noises[1:])


def test_sampling_starts_at_noisy_latents_of_any_timestep():
    """From latents noised to t the ideal denoiser finds the same distribution; its steps are evenly spaced from t."""
    schedule, seen = Schedule.cosine(), []
    start, noises = drawn((8, 4, 16, 16), 100, seed=1)
    latents = 1.5 + 0.5 * torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    noisy = schedule.q_sample(latents, torch.full((8,), 400), start)
    respaced = schedule.respace(100, last=400)
    denoise = ideal_denoiser(schedule, 1.5, 0.5)
    samples = sample(denoise, respaced, noisy, noises, on_step=lambda t, estimate: seen.append((t, estimate)))
    assert abs(samples.mean().item() - 1.5) < 0.03 and abs(samples.std().item() - 0.5) < 0.015
    assert [t for t, _ in seen] == spaced_timesteps(401, 100)[::-1]
    torch.testing.assert_close(seen[-1][1], samples)  # the last step keeps its estimate
    near = (samples - latents).abs().mean()
    assert near < (samples[1:] - latents[:-1]).abs().mean()  # it is still the same picture
    assert schedule.respace(50, last=9).timestep_map.tolist() == list(range(10))
    assert schedule.respace(1, last=300).timestep_map.tolist() == [300]
    with pytest.raises(ValueError, match="timestep 1000 of 1000; expected 0 to 999"):
        schedule.respace(5, last=1000)


def test_one_step_gives_the_estimate():
    schedule = Schedule.cosine().respace(1)
    x = torch.randn(2, 1, 4, 4)
    noise = torch.randn(2, 1, 4, 4)
    estimate = sample(lambda latents, timesteps: noise, schedule, x, [torch.zeros_like(x)])
    torch.testing.assert_close(estimate, schedule.predict_start(x, torch.zeros(2, dtype=torch.int64), noise))


def test_losses_are_per_image_means_and_strict_about_counts():
    draws = keyed([1, 2, 3], [0, 0, 0])
    condition, latents = torch.zeros(3, 4, 5), torch.randn(3, 8, GRID, GRID)
    schedule = Schedule.cosine()
    losses = reconstruction_losses(lambda x, t, c: torch.zeros_like(x), schedule, condition, latents, draws)
    torch.testing.assert_close(losses, draws.noise.square().flatten(1).mean(1))
    pairs = range(5, 9)
    some = pair_losses(lambda x, t, c: torch.zeros_like(x), schedule, condition, latents, draws, pairs)
    timesteps = torch.tensor([0, 249, 250, 999])
    sums = by_timestep(some, timesteps).sum(0)
    assert timestep_ranges() == ["0-249", "250-499", "500-749", "750-999"]
    torch.testing.assert_close(sums[:, 0], torch.stack([some[:2].sum(), some[2], some[2] * 0, some[3]]))
    assert sums[:, 1].tolist() == [2, 1, 0, 1]
    one = Draws(draws.posterior_noise[:1], draws.timesteps[:1], draws.noise[:1])
    with pytest.raises(ValueError, match="conditions of 3 images, latents of 3, draws of 1"):
        reconstruction_losses(lambda x, t, c: x, schedule, condition, latents, one)
