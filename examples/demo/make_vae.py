"""Make the demo's pixel decoder: a small AutoencoderKL with FLUX's latent layout, trained on synthetic scenes.

    python examples/demo/make_vae.py --out examples/demo/weights/pixel_decoder

The latents have 16 channels at an eighth of the picture's side, there are no quantisation convolutions, and
``shift_factor`` and ``scaling_factor`` bring the latents to mean 0 and the standard deviation of ``LATENT_DEVIATION``.
Noise on the latents during training makes the decoder robust to errors of a denoiser. The held-out colour-shape pairs
are never shown.

Shapes: B pictures, P = 64 pixels.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from scenes import (
    HELD_OUT_PAIRS,
    PICTURE_PIXELS,
    TRAINING_PAIRS,
    Scene,
    draw_scene,
    sample_evaluation_scenes,
    sample_scene,
    sample_training_scenes,
)
from templates import share_named_rightly

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image

LATENT_DEVIATION = 0.3
"""Of the latents that the denoiser gets. With 1, noise hides the colour at a tenth of the timesteps only; training then
makes little of the condition, and samples, which start from noise alone, swap colours."""


def build_vae() -> AutoencoderKL:
    """Build the autoencoder with random weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=PICTURE_PIXELS,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def stack_pictures(scenes: list[Scene]) -> torch.Tensor:
    """Draw scenes as pixels [B, 3, P, P] from -1 to 1."""
    return stack_pixels([draw_scene(scene) for scene in scenes])


def stack_pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """Turn pictures into pixels [B, 3, P, P] from -1 to 1."""
    import numpy as np
    import torch

    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_sample(rng: random.Random) -> Image.Image:
    """Draw a picture of a sampled scene."""
    return draw_scene(sample_scene(rng))


def train(
    vae: AutoencoderKL, arguments: argparse.Namespace, draw: Callable[[random.Random], Image.Image] = draw_sample
) -> None:
    """Minimise squared error + KL divergence over pictures that ``draw`` makes."""
    import torch
    from rich.progress import track

    rng = random.Random(f"vae/{arguments.seed}")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=arguments.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / arguments.steps))),
    )
    for step in track(range(arguments.steps), description="pixel decoder"):
        pixels = stack_pixels([draw(rng) for _ in range(arguments.batch_size)])
        posterior = vae.encode(pixels).latent_dist
        latents = posterior.sample()
        latents = latents + arguments.latent_noise * torch.randn_like(latents)
        error = (vae.decode(latents).sample - pixels).square().mean()
        divergence = posterior.kl().mean() / latents[0].numel()
        loss = error + arguments.kl_weight * divergence
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}: squared error {error.item():.5f}, KL {divergence.item():.3f} nats a channel")


def normalise_latents(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Set the config's shift and scale: posterior samples of these pictures have mean 0 and LATENT_DEVIATION."""
    import torch

    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.sample()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=LATENT_DEVIATION / latents.std().item())


def measure_round_trip(vae: AutoencoderKL, scenes: list[Scene]) -> tuple[float, float]:
    """Return the PSNR in dB and the share of shapes named rightly after encoding and decoding."""
    import torch

    pixels = stack_pictures(scenes)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels).latent_dist.sample()).sample.clamp(-1, 1)
    psnr = 10 * math.log10(4 / (decoded - pixels).square().mean().item())
    pictures = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return psnr, share_named_rightly(list(pictures), scenes)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its defaults made the demo's weights."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write in the diffusers layout")
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--kl-weight", type=float, default=3e-4, help="weight of the KL divergence")
    parser.add_argument(
        "--latent-noise", type=float, default=0.1, help="standard deviation of the noise on the latents"
    )
    parser.add_argument("--seed", type=int, default=21, help="seed of the weights and the pictures")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser


def main() -> None:
    """Make the pixel decoder from the command line."""
    arguments = build_parser().parse_args()

    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    start_seconds = time.process_time()
    vae = build_vae()
    train(vae, arguments)
    vae.eval()
    normalise_latents(vae, stack_pictures(sample_training_scenes(200, "vae/latents")))
    for name, pairs in (("training", TRAINING_PAIRS), ("held-out", HELD_OUT_PAIRS)):
        psnr, share = measure_round_trip(vae, sample_evaluation_scenes(200 // (4 * len(pairs)), "vae/quality", pairs))
        print(f"{name} pairs: PSNR {psnr:.1f} dB, {share:.1%} of the shapes named rightly")
    vae.half().save_pretrained(arguments.out)
    print(
        f"{sum(p.numel() for p in vae.parameters())} parameters, {time.process_time() - start_seconds:.0f} CPU seconds"
    )


if __name__ == "__main__":
    main()
