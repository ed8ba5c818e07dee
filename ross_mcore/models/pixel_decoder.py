"""The frozen VAE: encodes images into the latent tokens that the denoiser reconstructs, and decodes latent tokens.

Legend: J images, H W pixels of the tower's input, Hd side at which the VAE sees an image, C latent channels, h = w side
of the VAE's latent, g = h / 2 side of the grid of latent tokens (4C channels each). Source: reference
pixel_decoder/flux_decoder.py and ross_arch.py:487-497.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ross_mcore import platform
from ross_mcore.architecture import PixelDecoderConfig
from ross_mcore.checked import reason, shown
from ross_mcore.errors import ArchitectureError
from ross_mcore.library_configs import VAE_KEYS
from ross_mcore.models.products import Precision
from ross_mcore.shapes import Shapes, conv, linear, norm, within

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


def group_latents(latents: Tensor) -> Tensor:
    """[J, C, h, w] -> latent tokens [J, 4C, g, g]: channel c * 4 + dy * 2 + dx holds pixel (dy, dx) of a 2x2 block."""
    images, channels, height, width = latents.shape
    if not images:  # pixel_unshuffle does not change the shape of an empty tensor
        return latents.new_zeros(0, 4 * channels, height // 2, width // 2)
    return F.pixel_unshuffle(latents, 2)


def ungroup_latents(latent_tokens: Tensor) -> Tensor:
    """Latent tokens [J, 4C, g, g] -> [J, C, 2g, 2g]; the inverse of `group_latents`."""
    return F.pixel_shuffle(latent_tokens, 2)


def sample_latents(posteriors: Tensor, noise: Tensor | None, config: PixelDecoderConfig) -> Tensor:
    """posteriors [J, 2, C, h, w] (mean, log-variance), noise [J, C, h, w] -> latent tokens [J, 4C, g, g] float32.

    Without noise the mean is used. The arithmetic is that of diffusers' DiagonalGaussianDistribution.
    """
    latents, log_variance = posteriors.float().unbind(1)
    if noise is not None:
        latents = latents + torch.exp(0.5 * log_variance) * noise.float()
    return group_latents((latents - config.shift_factor) * config.scaling_factor)


class PixelDecoder(nn.Module):
    """A diffusers `AutoencoderKL` under `autoencoder`, with the library's state-dict names.

    Always frozen, in evaluation mode, with float32 weights: casts of the surrounding model and autocast have no effect.
    Convolutions and matrix products are computed in `precision`, which on a GPU is set and not left to torch, whose
    default for convolutions is TF32. With bf16, norms compute in float32. Posteriors and pictures are float32. Weights
    are random until a state dict is loaded.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        config: PixelDecoderConfig,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        decode_image_size: int,
        encode_batch_size: int | None = None,
        precision: Precision = "fp32",
    ) -> None:
        """image_mean and image_std are the tower's; the VAE runs `encode_batch_size` images at a time.

        By default that is 8 on a GPU, and 1 on a CPU, whose cache does not hold the activations of more.
        Raises ValueError when `decode_image_size` is not a whole number of latent tokens, ArchitectureError when
        diffusers refuses the configuration.
        """
        super().__init__()
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        pixels_per_token = 2 * config.downsampling
        if decode_image_size % pixels_per_token:
            raise ValueError(f"decode_image_size={decode_image_size} is not a multiple of {pixels_per_token} pixels")
        self.config = config
        self.decode_image_size = decode_image_size
        self.encode_batch_size = encode_batch_size or (8 if platform.has_gpu() else 1)
        self.precision = precision
        fields = {name: value for name, value in config.diffusers.items() if name in VAE_KEYS}
        try:
            self.autoencoder = AutoencoderKL.from_config(fields).float()
        except (KeyError, TypeError, ValueError) as error:
            raise ArchitectureError(
                f"config.json: diffusers builds no AutoencoderKL of {shown(fields)}: {reason(error)}"
            ) from None
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.train(False)

    @property
    def grid(self) -> int:
        """Latent tokens along one side."""
        return self.decode_image_size // (2 * self.config.downsampling)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w): the shape of one image's posterior noise."""
        return self.config.latent_channels, 2 * self.grid, 2 * self.grid

    def train(self, mode: bool = True) -> PixelDecoder:
        """Stays in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PixelDecoder:
        """Follows moves between devices but not casts, which would round the target of the loss."""
        moved = fn(torch.empty(0, dtype=torch.float32, device=self.image_mean.device))
        if moved.dtype == torch.float32:
            return super()._apply(fn, recurse)
        return super()._apply(lambda tensor: tensor.to(moved.device), recurse)

    def images_for_encoder(self, pixels: Tensor) -> Tensor:
        """pixels [J, 3, H, W] in the tower's normalisation -> [J, 3, Hd, Hd] in [-1, 1], bilinear, no antialiasing."""
        images = ((pixels.float() * self.image_std + self.image_mean - 0.5) / 0.5).clamp(-1, 1)
        size = (self.decode_image_size, self.decode_image_size)
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def encode(self, pixels: Tensor, posterior_noise: Tensor | None) -> Tensor:
        """pixels [J, 3, H, W] in the tower's normalisation -> latent tokens [J, 4C, g, g] float32.

        With posterior_noise [J, C, h, w] the VAE's posterior is sampled, with None its mode is used. Without images
        nothing is computed. Raises ValueError when the shape of the noise is wrong.
        """
        shape = (len(pixels), *self.latent_shape)
        if posterior_noise is not None and tuple(posterior_noise.shape) != shape:
            raise ValueError(f"posterior noise of shape {list(posterior_noise.shape)}; expected {list(shape)}")
        if not len(pixels):
            return torch.zeros(0, self.config.token_channels, self.grid, self.grid, device=pixels.device)
        return sample_latents(self.posteriors(pixels), posterior_noise, self.config)

    @torch.no_grad()
    def posteriors(self, pixels: Tensor) -> Tensor:
        """pixels [J, 3, H, W] in the tower's normalisation -> [J, 2, C, h, w] float32: mean and log-variance."""
        if not len(pixels):
            return torch.zeros(0, 2, *self.latent_shape, device=pixels.device)
        found = [self._encoded(self.images_for_encoder(part)) for part in pixels.split(self.encode_batch_size)]
        return torch.cat([torch.stack([part.mean, part.logvar], dim=1) for part in found])

    @torch.no_grad()
    def decode(self, latent_tokens: Tensor) -> Tensor:
        """Latent tokens [J, 4C, g, g] -> images [J, 3, Hd, Hd] float32 in [0, 1]; computes nothing without images."""
        if not len(latent_tokens):
            size = self.decode_image_size
            return torch.zeros(0, 3, size, size, device=latent_tokens.device)
        latents = ungroup_latents(latent_tokens.float()) / self.config.scaling_factor + self.config.shift_factor
        images = torch.cat([self._decoded(part) for part in latents.split(self.encode_batch_size)])
        return (images / 2 + 0.5).clamp(0, 1)

    def _encoded(self, images: Tensor) -> DiagonalGaussianDistribution:
        """images [J, 3, Hd, Hd] in [-1, 1] -> the posterior, as diffusers' AutoencoderKL.encode computes it."""
        with self._computing(images.device):
            moments = _computed(self.autoencoder.encoder, images)
            if self.autoencoder.quant_conv is not None:
                moments = self.autoencoder.quant_conv(moments)
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        return DiagonalGaussianDistribution(moments.float())

    def _decoded(self, latents: Tensor) -> Tensor:
        """latents [J, C, h, w] -> images [J, 3, Hd, Hd] float32 in [-1, 1], as AutoencoderKL.decode computes them."""
        with self._computing(latents.device):
            if self.autoencoder.post_quant_conv is not None:
                latents = self.autoencoder.post_quant_conv(latents)
            return _computed(self.autoencoder.decoder, latents).float()

    @contextlib.contextmanager
    def _computing(self, device: torch.device) -> Iterator[None]:
        """Sets the precision of convolutions and products; a VAE that is frozen has no backward pass."""
        is_bf16 = self.precision == "bf16"
        with platform.tf32(self.precision == "tf32"), torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            yield


def _computed(part: nn.Module, images: Tensor) -> Tensor:
    """part(images); on a GPU with the channels of a pixel side by side, the order of its fast convolutions.

    The weights are reordered for the call, at most a millisecond of memory traffic, and stay as they are stored. A CPU
    is a fifth faster in that order too, but its group norm then subtracts squares: recorded values differ by 2e-3.
    """
    if not platform.has_gpu():
        return part(images)
    last = torch.channels_last
    weights = {name: w.contiguous(memory_format=last) if w.ndim == 4 else w for name, w in part.named_parameters()}
    return functional_call(part, weights, (images.contiguous(memory_format=last),))


def weight_shapes(config: PixelDecoderConfig) -> Shapes:
    """Shapes of the weights of a diffusers AutoencoderKL with plain down and up blocks (FLUX, SDXL, SD)."""
    vae = config.diffusers
    blocks = [int(width) for width in vae["block_out_channels"]]
    layers, latent = int(vae.get("layers_per_block", 1)), config.latent_channels
    attention = bool(vae.get("mid_block_add_attention", True))
    last = len(blocks) - 1

    shapes = within("encoder.", conv("conv_in", blocks[0], int(vae.get("in_channels", 3)), 3))
    for index, width in enumerate(blocks):
        block = _resnets([blocks[max(index - 1, 0)]] + [width] * (layers - 1), width)
        block |= conv("downsamplers.0.conv", width, width, 3) if index < last else {}
        shapes |= within(f"encoder.down_blocks.{index}.", block)
    shapes |= within("encoder.", _middle(blocks[-1], attention, 2 * latent, blocks[-1]))

    shapes |= within("decoder.", conv("conv_in", blocks[-1], latent, 3))
    upwards = blocks[::-1]
    for index, width in enumerate(upwards):
        block = _resnets([upwards[max(index - 1, 0)]] + [width] * layers, width)
        block |= conv("upsamplers.0.conv", width, width, 3) if index < last else {}
        shapes |= within(f"decoder.up_blocks.{index}.", block)
    shapes |= within("decoder.", _middle(blocks[-1], attention, int(vae.get("out_channels", 3)), blocks[0]))

    shapes |= conv("quant_conv", 2 * latent, 2 * latent, 1) if vae.get("use_quant_conv", True) else {}
    shapes |= conv("post_quant_conv", latent, latent, 1) if vae.get("use_post_quant_conv", True) else {}
    return shapes


def _middle(width: int, attention: bool, out_channels: int, out_width: int) -> Shapes:
    """The middle block of an encoder or decoder, and the last norm and convolution."""
    middle = _resnets([width, width], width)
    if attention:
        middle |= norm("attentions.0.group_norm", width)
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            middle |= linear(f"attentions.0.{projection}", width, width)
    end = norm("conv_norm_out", out_width) | conv("conv_out", out_channels, out_width, 3)
    return within("mid_block.", middle) | end


def _resnets(inputs: list[int], width: int) -> Shapes:
    """Residual blocks of one level; `inputs` are their input channels."""
    shapes: Shapes = {}
    for index, channels in enumerate(inputs):
        resnet = norm("norm1", channels) | conv("conv1", width, channels, 3)
        resnet |= norm("norm2", width) | conv("conv2", width, width, 3)
        resnet |= conv("conv_shortcut", width, channels, 1) if channels != width else {}
        shapes |= within(f"resnets.{index}.", resnet)
    return shapes
