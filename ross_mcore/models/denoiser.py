"""The denoiser: a small diffusion transformer with a condition per token, the language model's hidden states.

Legend: I images, k draws of an image, M = I * k noisy latents, C latent channels, g side of the latent grid,
N = g * g tokens, W width of the transformer, Dc width of the condition. Source: reference denoiser_dit.py:101-268
(architecture after DiT, Peebles and Xie 2023, with the condition added per token instead of per image).

Precision: matrix products are computed in the denoiser's `precision` (models/products.py), forward and backward. Norms,
softmax, activations, modulation, residuals and the embedding of timesteps are fp32 in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ross_mcore.architecture import DenoiserConfig
from ross_mcore.models.products import PointConvolution, PreciseLinear, Precision
from ross_mcore.shapes import Shapes, conv, linear, within

CONDITION_NORM_EPSILON = 1e-5
BLOCK_NORM_EPSILON = 1e-6
FREQUENCY_CHANNELS = 256
MAX_PERIOD = 10000.0


def grid_position_embedding(width: int, grid: int) -> Tensor:
    """[1, grid * grid, width] float32: first half of the channels: sin-cos of the column; second half: of the row.

    Each half is [sin | cos] over width / 4 frequencies; computed in float64 (reference denoiser_dit.py:276-323).
    """
    frequencies = MAX_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = line[None, :, :].expand(grid, grid, -1)
    rows = line[:, None, :].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, grid * grid, width).float()


def timestep_frequencies(timesteps: Tensor) -> Tensor:
    """timesteps [M] -> [M, 256] float32: cosines, then sines, of 128 frequencies from 1 down to 1 / 10000."""
    half = FREQUENCY_CHANNELS // 2
    exponents = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def layer_norm(x: Tensor, epsilon: float) -> Tensor:
    """LayerNorm over the last dimension without scale or shift."""
    return F.layer_norm(x, x.shape[-1:], eps=epsilon)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalises x [M, N, W], then scales and shifts each token."""
    return layer_norm(x, BLOCK_NORM_EPSILON) * (1 + scale) + shift


class PatchEmbedding(nn.Module):
    """One token per latent pixel: x [M, C, g, g] -> [M, N, W], tokens in row-major order."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = PointConvolution(channels, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class TimestepEmbedding(nn.Module):
    """timesteps [M] -> [M, W], fp32 in every precision: M rows are little work, and cosines need more than 8 bits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(PreciseLinear(FREQUENCY_CHANNELS, width), nn.SiLU(), PreciseLinear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.mlp(timestep_frequencies(timesteps))


class SelfAttention(nn.Module):
    """Full (not causal) multi-head attention: x [M, N, W] -> [M, N, W].

    Between the two linear layers it is torch's attention in the dtype of the factors: bf16, or fp32 also for tf32.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = PreciseLinear(width, 3 * width)
        self.proj = PreciseLinear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # without latents no kernel runs; query and key are views of the same tensor as value, so gradients stay defined
        attended = F.scaled_dot_product_attention(query, key, value) if len(x) else value
        return self.proj(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """x [M, N, W] -> [M, N, W] through 4 W channels and a tanh-approximated GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = PreciseLinear(width, 4 * width)
        self.fc2 = PreciseLinear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DenoiserBlock(nn.Module):
    """Attention and MLP; the condition of each token shifts, scales and gates them (adaLN-zero)."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.attn = SelfAttention(config.width, config.num_heads)
        self.mlp = FeedForward(config.width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), PreciseLinear(config.width, 6 * config.width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [M, N, W], condition [M, N, W] -> [M, N, W]."""
        modulation = self.adaLN_modulation(condition).float()
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, 2)
        x = x + gate_attn * self.attn(modulate(x, shift_attn, scale_attn))
        return x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """x [M, N, W], condition [M, N, W] -> [M, N, C]."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = PreciseLinear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), PreciseLinear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).float().chunk(2, 2)
        return self.linear(modulate(x, shift, scale)).float()


class Denoiser(nn.Module):
    """Predicts the noise in latents; state-dict names are those inside the reference's `mm_inv_projector.net.`.

    Computes in `precision` for inputs and weights of any dtype, also under autocast. `pos_embed` is a fixed table by
    default; the reference trains it in stage 1 (`pos_embed.requires_grad_(True)` does the same).
    """

    def __init__(
        self,
        config: DenoiserConfig,
        in_channels: int,
        condition_size: int,
        grid: int,
        precision: Precision = "fp32",
        recompute: bool = False,
    ) -> None:
        """recompute: whether backward computes the blocks again instead of keeping what it reads of them."""
        super().__init__()
        self.recompute = recompute
        self.config = config
        self.in_channels = in_channels
        self.condition_size = condition_size
        self.grid = grid
        width = config.width
        self.pos_embed = nn.Parameter(torch.empty(1, grid * grid, width), requires_grad=False)
        self.x_embedder = PatchEmbedding(in_channels, width)
        self.t_embedder = TimestepEmbedding(width)
        self.z_embedder = nn.Sequential(nn.SiLU(), PreciseLinear(condition_size, width))
        self.blocks = nn.ModuleList([DenoiserBlock(config) for _ in range(config.depth)])
        self.final_layer = FinalLayer(width, in_channels)
        for module in (self.x_embedder, self.z_embedder, self.blocks, self.final_layer):
            for part in module.modules():
                if isinstance(part, (PreciseLinear, PointConvolution)):
                    part.precision = precision
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the initial weights, with which the prediction and the gradient of the condition are 0.

        Biases are 0, matrices Xavier-uniform; the embedders of condition and timestep are N(0, 0.02); the modulations
        and the last layer are 0 (reference denoiser_dit.py:139-173). Numbers are drawn in float32 on the generator's
        device (default: the CPU's default generator), in an order fixed by the architecture.
        """
        generator = generator or torch.default_generator
        self.pos_embed.copy_(grid_position_embedding(self.config.width, self.grid))
        for name, parameter in self.named_parameters():
            if name == "pos_embed":
                continue
            value = torch.zeros(parameter.shape, device=generator.device)
            if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer"):
                pass
            elif name.startswith(("t_embedder", "z_embedder")):
                value.normal_(std=0.02, generator=generator)
            else:  # a 1x1 convolution is a matrix once flattened
                nn.init.xavier_uniform_(value.flatten(1), generator=generator)
            parameter.copy_(value)

    def forward(
        self, x: Tensor, timesteps: Tensor, condition: Tensor, draws_of_each: Sequence[int] | None = None
    ) -> Tensor:
        """x [M, C, g, g], timesteps [M] int64, condition [I, N, Dc] -> predicted noise [M, C, g, g] float32.

        The latents of an image are neighbours and share its condition, which is embedded once: `draws_of_each` of each
        image, by default k, so that M = I * k. The condition is the hidden state before the reference's `ln_pre`, a
        LayerNorm that is applied here. Raises ValueError when counts or shapes disagree.
        """
        num_images = len(condition)
        counts = [len(x) // max(num_images, 1)] * num_images if draws_of_each is None else list(draws_of_each)
        if len(counts) != num_images or sum(counts) != len(x) or len(x) != timesteps.numel():
            raise ValueError(
                f"{len(x)} latents and {timesteps.numel()} timesteps for conditions of {num_images} images"
            )
        latent_shape, condition_shape = (self.in_channels, self.grid, self.grid), (self.grid**2, self.condition_size)
        if tuple(x.shape[1:]) != latent_shape or tuple(condition.shape[1:]) != condition_shape:
            raise ValueError(
                f"latents of shape {list(x.shape)} and condition of shape {list(condition.shape)}; "
                f"expected [M, *{latent_shape}] and [I, *{condition_shape}]"
            )
        with torch.autocast(device_type=x.device.type, enabled=False):
            embedded = self.z_embedder(layer_norm(condition.float(), CONDITION_NORM_EPSILON))
            steps = self.t_embedder(timesteps)[:, None]
            if len(set(counts)) > 1:
                modulation = torch.cat([one + own for one, own in zip(embedded, steps.split(counts), strict=True)])
            else:
                by_image = steps.view(num_images, max(counts, default=0), 1, self.config.width)
                modulation = (embedded[:, None] + by_image).flatten(0, 1)
            hidden = self.x_embedder(x.float()) + self.pos_embed.float()
            for block in self.blocks:
                if self.recompute and torch.is_grad_enabled():  # a block draws no random numbers
                    hidden = checkpoint(block, hidden, modulation, use_reentrant=False, preserve_rng_state=False)
                else:
                    hidden = block(hidden, modulation)
            prediction = self.final_layer(hidden, modulation)
            return prediction.transpose(1, 2).unflatten(2, (self.grid, self.grid))


def weight_shapes(config: DenoiserConfig, in_channels: int, condition_size: int, grid: int) -> Shapes:
    """Shapes of the weights of a Denoiser."""
    width = config.width
    shapes: Shapes = {"pos_embed": (1, grid**2, width)}
    shapes |= conv("x_embedder.proj", width, in_channels, kernel=1)
    shapes |= linear("t_embedder.mlp.0", width, FREQUENCY_CHANNELS) | linear("t_embedder.mlp.2", width, width)
    shapes |= linear("z_embedder.1", width, condition_size)
    for block in range(config.depth):
        shapes |= within(
            f"blocks.{block}.",
            linear("attn.qkv", 3 * width, width)
            | linear("attn.proj", width, width)
            | linear("mlp.fc1", 4 * width, width)
            | linear("mlp.fc2", width, 4 * width)
            | linear("adaLN_modulation.1", 6 * width, width),
        )
    return (
        shapes
        | linear("final_layer.linear", in_channels, width)
        | linear("final_layer.adaLN_modulation.1", 2 * width, width)
    )
