"""Gaussian diffusion in latent space: the noise schedule, the training loss, the ancestral sampler, keyed random draws.

Legend: I images, k draws of an image, M latents, C latent channels, g side of the grid of latent tokens, T timesteps.
Sources: DDPM (Ho et al. 2020), the cosine schedule of Nichol and Dhariwal 2021, reference
diffusion_utils/gaussian_diffusion.py, respace.py and __init__.py. Only the variant that ROSS uses is implemented: the
model predicts the noise, the loss is the mean squared error, the variance is fixed (FIXED_LARGE).
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ross_mcore.batch import Draws

Samples = TypeVar("Samples")

TRAIN_TIMESTEPS = 1000
MAX_BETA = 0.999
TIMESTEP_RANGES = 4
"""Ranges of equal length that the timesteps are divided into, for losses by timestep."""


def cosine_betas(num_timesteps: int) -> Tensor:
    """[T] float64: 1 - f((i + 1) / T) / f(i / T), at most 0.999, with f(t) = cos^2((t + 0.008) / 1.008 * pi / 2)."""

    def remaining(fraction: float) -> float:
        return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [1 - remaining((i + 1) / num_timesteps) / remaining(i / num_timesteps) for i in range(num_timesteps)]
    return torch.tensor(betas, dtype=torch.float64).clamp(max=MAX_BETA)


def spaced_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """`steps` evenly spaced timesteps from 0 to num_timesteps - 1, both included (reference respace.py).

    Raises ValueError unless 1 <= steps <= num_timesteps.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"{steps} sampling steps of {num_timesteps} timesteps; expected 1 to {num_timesteps}")
    stride = (num_timesteps - 1) / (steps - 1) if steps > 1 else 1.0
    # the reference sums the stride up; a product could round to another timestep
    chosen, current = [], 0.0
    for _ in range(steps):
        chosen.append(round(current))
        current += stride
    return chosen


class Schedule:
    """Tables of a diffusion process over the timesteps kept in `timestep_map`; all [T], float64, on the CPU.

    Values from the tables are cast to float32 before arithmetic, as in the reference, and are on `device` from the
    start. `timesteps` arguments index the tables; `timestep_map` [T] int64 holds the timesteps of the full process,
    which the denoiser gets as input. Not a module, so it is not saved with a checkpoint and not cast with a model.
    """

    def __init__(
        self, betas: Tensor, timestep_map: Sequence[int] | None = None, device: torch.device | None = None
    ) -> None:
        self.device = device
        kept = list(range(len(betas))) if timestep_map is None else list(timestep_map)
        self.full_betas = betas.double()
        self.timestep_map = torch.tensor(kept, dtype=torch.int64)
        full_alphas_cumprod = torch.cumprod(1 - self.full_betas, 0)[self.timestep_map]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), full_alphas_cumprod[:-1]])
        # the reference recomputes betas from the products, even when every timestep is kept
        self.betas = 1 - full_alphas_cumprod / previous
        self.alphas_cumprod = torch.cumprod(1 - self.betas, 0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()
        self.sqrt_recip_alphas_cumprod = (1 / self.alphas_cumprod).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / self.alphas_cumprod - 1).sqrt()
        self.posterior_variance = self.betas * (1 - before) / (1 - self.alphas_cumprod)
        # the variance at t = 0 is 0; its logarithm is that of t = 1 instead
        second = self.posterior_variance[1:2] if len(kept) > 1 else self.betas
        self.posterior_log_variance_clipped = torch.cat([second, self.posterior_variance[1:]]).log()
        self.posterior_mean_coef1 = self.betas * before.sqrt() / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1 - before) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)
        self.fixed_large_variance = torch.cat([second, self.betas[1:]])
        """Variance of the noise that the sampler adds: beta_t, at t = 0 the posterior variance of t = 1."""
        self._values = {
            name: table.float().to(device)
            for name, table in vars(self).items()
            if isinstance(table, Tensor) and len(table) == len(kept)
        }

    @classmethod
    def cosine(cls, device: torch.device | None = None) -> Schedule:
        """The process that ROSS trains with."""
        return cls(cosine_betas(TRAIN_TIMESTEPS), device=device)

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    def respace(self, steps: int, last: int | None = None) -> Schedule:
        """A process of `steps` timesteps, for faster sampling; the marginals at the timesteps it keeps are the same.

        It ends at timestep `last`, by default at that of pure noise; of 0 to `last` there are last + 1, and it has at
        most so many. Raises ValueError for numbers out of range.
        """
        every = len(self.full_betas)
        if last is None:
            return Schedule(self.full_betas, spaced_timesteps(every, steps), self.device)
        if not 0 <= last < every:
            raise ValueError(f"a sampling that starts at timestep {last} of {every}; expected 0 to {every - 1}")
        kept = [last] if steps == 1 else spaced_timesteps(last + 1, min(steps, last + 1))
        return Schedule(self.full_betas, kept, self.device)

    def _at(self, table: str, timesteps: Tensor, like: Tensor) -> Tensor:
        """The name of a table, timesteps [M] -> its values, float32, shaped to broadcast against `like`."""
        values = self._values[table][timesteps]
        return values.view(-1, *[1] * (like.dim() - 1))

    def q_sample(self, x_start: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """x_start [M, ...], timesteps [M], noise [M, ...] -> x_t [M, ...]: the noisy latent at `timesteps`."""
        signal = self._at("sqrt_alphas_cumprod", timesteps, x_start)
        return signal * x_start + self._at("sqrt_one_minus_alphas_cumprod", timesteps, x_start) * noise

    def posterior(self, x_start: Tensor, x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q(x_{t-1} | x_t, x_0), DDPM equation 7: mean [M, ...], variance and clipped log-variance (broadcastable)."""
        mean = self._at("posterior_mean_coef1", timesteps, x_t) * x_start
        mean = mean + self._at("posterior_mean_coef2", timesteps, x_t) * x_t
        variance = self._at("posterior_variance", timesteps, x_t)
        return mean, variance, self._at("posterior_log_variance_clipped", timesteps, x_t)

    def predict_start(self, x_t: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """x_t [M, ...], timesteps [M], (predicted) noise [M, ...] -> the x_0 [M, ...] that they imply."""
        scaled = self._at("sqrt_recip_alphas_cumprod", timesteps, x_t) * x_t
        return scaled - self._at("sqrt_recipm1_alphas_cumprod", timesteps, x_t) * noise


def epsilon_loss(prediction: Tensor, noise: Tensor) -> Tensor:
    """prediction [M, C, g, g], noise [M, C, g, g] -> [M]: mean squared error of each latent."""
    return (noise - prediction).square().flatten(1).mean(1)


def run_steps(
    steps: Generator[tuple[int, Tensor], None, Samples], on_step: Callable[[int, Tensor], None] | None = None
) -> Samples:
    """Takes all steps of a sampling; `on_step` gets what each yields."""
    while True:
        try:
            timestep, estimate = next(steps)
        except StopIteration as finished:
            return cast(Samples, finished.value)
        if on_step is not None:
            on_step(timestep, estimate)


@torch.no_grad()
def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    start: Tensor,
    noises: Iterable[Tensor],
    *,
    temperature: float = 1.0,
    clip: float | None = None,
) -> Generator[tuple[int, Tensor], None, Tensor]:
    """Ancestral sampling (DDPM algorithm 2): start [M, C, g, g] -> latents [M, C, g, g] float32 on its device.

    Yields in each step its timestep of the full process and its estimate of x_0, and returns the latents: `run_steps`.

    denoise(x [M, C, g, g], timesteps [M]) returns the predicted noise; its timesteps are those of the full process.
    `start` is Gaussian noise, or latents at the schedule's last timestep. `noises` has one more [M, C, g, g] on any
    device for each timestep, in the order used; the last is not used. `temperature` scales them; `clip` bounds the
    estimate of x_0 to [-clip, clip]. The reference does not bound it; but the cosine schedule ends at a signal of 5e-5,
    where an error of 0.1 in the predicted noise is an error of 2,000 in x_0 and spoils the sample. Raises ValueError
    when the number of noises or their shape is wrong. Source: reference gaussian_diffusion.py (p_sample_loop) and
    denoiser_dit.py:250-268.
    """
    x = start.float()
    deviations = schedule.fixed_large_variance.sqrt().float()
    for step, fresh in zip(reversed(range(schedule.num_timesteps)), noises, strict=True):
        if fresh.shape != x.shape:
            raise ValueError(f"start has shape {list(x.shape)}, but a noise {list(fresh.shape)}")
        timesteps = torch.full((len(x),), step, dtype=torch.int64, device=x.device)
        noise = denoise(x, torch.full_like(timesteps, int(schedule.timestep_map[step]))).float()
        estimate = schedule.predict_start(x, timesteps, noise)
        if clip is not None:
            estimate = estimate.clamp(-clip, clip)
        yield int(schedule.timestep_map[step]), estimate
        x = schedule.posterior(estimate, x, timesteps)[0]
        if step:
            x = x + temperature * float(deviations[step]) * fresh.to(x)
    return x


def draw_seed(seed: int, position: int, ordinal: int) -> int:
    """A 63-bit hash of the run's seed, the sample's position in the stream, and the image's number in the sample."""
    digest = hashlib.blake2b(struct.pack("<3q", seed, position, ordinal), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_draws(
    seed: int,
    positions: Tensor,
    ordinals: Tensor,
    draws: int,
    latent_shape: Sequence[int],
    grid: int,
) -> Draws:
    """positions [I], ordinals [I], latent_shape (C, h, w), grid g -> float32 draws on the CPU.

    Each image has its own generator, seeded by `draw_seed`, which draws posterior noise, timesteps and noise in this
    order: the same in every batch, rank, layout and resumed run. (PyTorch's CPU generator keeps 32 bits of a seed, so
    among millions of images a few pairs have equal draws.) Raises ValueError when the numbers of positions and
    ordinals differ.
    """
    if positions.numel() != ordinals.numel():
        raise ValueError(f"{positions.numel()} image positions, but {ordinals.numel()} image ordinals")
    images = positions.numel()
    channels = latent_shape[0]
    posterior_noise = torch.empty(images, *latent_shape)
    timesteps = torch.empty(images, draws, dtype=torch.int64)
    noise = torch.empty(images, draws, 4 * channels, grid, grid)
    generator = torch.Generator()
    for image, (position, ordinal) in enumerate(zip(positions.tolist(), ordinals.tolist(), strict=True)):
        generator.manual_seed(draw_seed(seed, position, ordinal))
        posterior_noise[image].normal_(generator=generator)
        timesteps[image].random_(0, TRAIN_TIMESTEPS, generator=generator)
        noise[image].normal_(generator=generator)
    return Draws(posterior_noise, timesteps, noise)


def reconstruction_losses(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: Schedule,
    condition: Tensor,
    latents: Tensor,
    draws: Draws,
    pairs: range | None = None,
) -> Tensor:
    """The losses of `pair_losses`, with the same arguments -> [I] float32: mean loss of each image's draws."""
    pairs = range(draws.timesteps.numel()) if pairs is None else pairs
    return mean_over_draws(pair_losses(denoiser, schedule, condition, latents, draws, pairs), draws, pairs)


def mean_over_draws(losses: Tensor, draws: Draws, pairs: range) -> Tensor:
    """losses [M] of some (image, draw) pairs, draws of I images -> [I].

    Losses of other pairs count as 0, so that the results of disjoint pairs add up.
    """
    images, repeats = draws.timesteps.shape
    return F.pad(losses, (pairs.start, images * repeats - pairs.stop)).view(images, repeats).mean(1)


def by_timestep(losses: Tensor, timesteps: Tensor) -> Tensor:
    """losses [M], timesteps [M] -> [M, TIMESTEP_RANGES, 2]: in a pair's range its loss and 1, in the others 0."""
    ranges = torch.arange(TIMESTEP_RANGES, device=losses.device)
    within = (timesteps[:, None] * TIMESTEP_RANGES // TRAIN_TIMESTEPS == ranges).to(losses.dtype)
    return torch.stack([within * losses[:, None], within], dim=2)


def timestep_ranges() -> list[str]:
    """The names of the ranges: first and last timestep."""
    length = TRAIN_TIMESTEPS // TIMESTEP_RANGES
    return [f"{first}-{first + length - 1}" for first in range(0, TRAIN_TIMESTEPS, length)]


def pair_losses(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: Schedule,
    condition: Tensor,
    latents: Tensor,
    draws: Draws,
    pairs: range,
) -> Tensor:
    """condition [I, N, Dc], latents [I, 4C, g, g], draws of I images -> [M] float32: the losses of (image, draw) pairs.

    `pairs`: those of the I * k pairs that are computed. The reference tiles its batch draw after draw (reference
    ross_arch.py:466-512); here the draws of an image are neighbours, which changes no loss and no gradient. Without
    images the result is empty, but still depends on the condition and the denoiser's parameters in autograd. Raises
    ValueError when the numbers of images differ.
    """
    images, repeats = draws.timesteps.shape
    if not len(condition) == len(latents) == images:
        raise ValueError(f"conditions of {len(condition)} images, latents of {len(latents)}, draws of {images}")
    computed = slice(pairs.start, pairs.stop)
    x_start = latents.float().repeat_interleave(repeats, dim=0)[computed]
    timesteps, noise = draws.timesteps.flatten()[computed], draws.noise.float().flatten(0, 1)[computed]
    prediction = denoiser(schedule.q_sample(x_start, timesteps, noise), timesteps, condition)
    return epsilon_loss(prediction, noise)
