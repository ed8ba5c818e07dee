"""Makes the initial models of the stamps training from its pictures and captions.

    python examples/stamps/make_parts.py --data runs/stamps/data --out runs/stamps/parts

tokenizer        byte-level BPE, learned from the captions and the chat's system prompt
language_model   Qwen2 with random weights: it learns captions only in training
pixel_decoder    AutoencoderKL with FLUX's latent layout, trained to reproduce the pictures
vision_model     SigLIP tower, trained as the encoder of an autoencoder on the pictures; it never sees a caption

VAE and tower are made from GPL-2 pictures, so they stay in their folder. Two processes train them in parallel.

Shapes: B pictures, P = 64 pixels, T = 16 patches in row-major order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stamps import PICTURE_PIXELS, QUESTION, read_captions

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

PARTS = ("text", "tower", "vae")
SETTINGS = ("vae_steps", "vae_lr", "kl_weight", "latent_noise", "tower_steps", "seed")
COMPLETE = "complete.txt"
"""Written last; contains the fingerprint of the parts' inputs."""
VOCABULARY_LIMIT = 4000
WIDTH = 128
PATCH_PIXELS = 16
TOWER_LAYERS = 2
SELECT_LAYER = -2
"""Training reads the input of the last layer, so the tower has one layer more than is trained here."""


def read_pictures(data: Path) -> Tensor:
    """Every picture of the data set as pixels [B, 3, P, P] from -1 to 1."""
    import numpy as np
    import torch
    from PIL import Image

    paths = [data / "images" / name for name in read_captions(data)]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def write_tokenizer(captions: Sequence[str], out: Path) -> PreTrainedTokenizerBase:
    """Learn the tokenizer from chats about the pictures, with Qwen2's rules, and save it.

    All merges are learned, so that each word is one token, its leading space included.
    """
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    from ross_mcore.data.templates import TEMPLATES

    template = TEMPLATES["qwen_2"]
    chats = [f"{template.system}USER: {QUESTION} ASSISTANT: {caption}" for caption in captions]
    byte_alphabet = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = {"eos_token": template.round_end, "pad_token": "<|endoftext|>", "unk_token": None}
    blank = Qwen2Tokenizer(vocab=byte_alphabet, merges=[], **special)
    tokenizer = blank.train_new_from_iterator(chats, VOCABULARY_LIMIT, show_progress=False)
    tokenizer.save_pretrained(out)
    return tokenizer


def write_language_model(tokenizer: PreTrainedTokenizerBase, out: Path) -> int:
    """Save a Qwen2 of random weights and return its number of parameters.

    Its random layers hide the picture from the denoiser, which reads the image states, so there are few layers and
    ``initializer_range`` is small: with 0.1 and four layers sampled pictures were 3 dB worse.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.03,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(out)
    return sum(parameter.numel() for parameter in model.parameters())


def minimise(
    loss_of: Callable[[Tensor], tuple[Tensor, str]],
    parameters: list[torch.nn.Parameter],
    pixels: Tensor,
    *,
    name: str,
    steps: int,
    batch_size: int,
    lr: float,
) -> None:
    """AdamW with warm-up and cosine decay over random batches; `loss_of` returns a loss and a line about it."""
    import torch
    from rich.progress import track

    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
    )
    order = torch.empty(0, dtype=torch.int64)
    for step in track(range(steps), description=name):
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(pixels))])
        batch, order = order[:batch_size], order[batch_size:]
        loss, line = loss_of(pixels[batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % (steps // 5) == 0:
            print(f"{name}: step {step + 1}/{steps}, {line}", flush=True)


def write_pixel_decoder(pixels: Tensor, out: Path, arguments: argparse.Namespace) -> str:
    """Train the VAE on squared error + KL divergence, bring its latents to mean 0 and variance 1, and save it."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,  # as many groups as channels would normalise every channel alone, and lose colours
        sample_size=PICTURE_PIXELS,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(memory_format=torch.channels_last)
    pixels = pixels.contiguous(memory_format=torch.channels_last)

    def loss_of(batch: Tensor) -> tuple[Tensor, str]:
        posterior = vae.encode(batch).latent_dist
        latents = posterior.sample()
        noisy = latents + arguments.latent_noise * torch.randn_like(latents)
        error = (vae.decode(noisy).sample - batch).square().mean()
        divergence = posterior.kl().mean() / latents[0].numel()
        line = f"squared error {error.item():.4f}, KL {divergence.item():.2f} nats a channel"
        return error + arguments.kl_weight * divergence, line

    minimise(
        loss_of,
        list(vae.parameters()),
        pixels,
        name="VAE",
        steps=arguments.vae_steps,
        batch_size=4,
        lr=arguments.vae_lr,
    )
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.sample()
        error = (vae.decode(latents).sample.clamp(-1, 1) - pixels).square().mean().item()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    vae.to(memory_format=torch.contiguous_format).save_pretrained(out)
    count = sum(parameter.numel() for parameter in vae.parameters())
    return f"VAE: {count:,} parameters, PSNR {10 * math.log10(4 / error):.1f} dB on its training pictures"


def write_vision_model(pixels: Tensor, out: Path, arguments: argparse.Namespace) -> str:
    """Train the tower with a linear map from every patch's feature back to the patch and its place, and save it."""
    import torch
    from torch import nn
    from torch.nn import functional
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=TOWER_LAYERS + 1,
        num_attention_heads=4,
        image_size=PICTURE_PIXELS,
        patch_size=PATCH_PIXELS,
        vision_use_head=False,
    )
    tower = SiglipVisionModel(config)
    patches = (PICTURE_PIXELS // PATCH_PIXELS) ** 2
    to_pixels, to_place = nn.Linear(WIDTH, 3 * PATCH_PIXELS**2), nn.Linear(WIDTH, patches)

    def loss_of(batch: Tensor) -> tuple[Tensor, str]:
        features = tower(batch, output_hidden_states=True).hidden_states[SELECT_LAYER]
        shown = functional.unfold(batch, PATCH_PIXELS, stride=PATCH_PIXELS).transpose(1, 2)
        error = functional.mse_loss(to_pixels(features), shown)
        places = torch.arange(patches).repeat(len(batch))
        place_loss = functional.cross_entropy(to_place(features).flatten(0, 1), places)
        return error + 0.05 * place_loss, f"squared error {error.item():.4f}, place {place_loss.item():.4f}"

    parameters = [*tower.parameters(), *to_pixels.parameters(), *to_place.parameters()]
    minimise(loss_of, parameters, pixels, name="vision tower", steps=arguments.tower_steps, batch_size=16, lr=2e-3)
    tower.save_pretrained(out)
    side = {"height": PICTURE_PIXELS, "width": PICTURE_PIXELS}
    processor = SiglipImageProcessor(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3)
    processor.save_pretrained(out)
    return f"vision tower: {sum(parameter.numel() for parameter in tower.parameters()):,} parameters"


def fingerprint(arguments: argparse.Namespace) -> str:
    """16 hex digits that change with the pictures, the captions, the settings and this script."""
    captions = read_captions(arguments.data)
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(json.dumps([settings(arguments), captions]).encode("utf-8"))
    for name in captions:
        digest.update((arguments.data / "images" / name).read_bytes())
    return digest.hexdigest()[:16]


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings that the parts depend on, besides the pictures."""
    return {name: getattr(arguments, name) for name in SETTINGS}


def make(part: str, arguments: argparse.Namespace) -> str:
    """Make one of PARTS in this process; returns a line about it."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    began, data, out = time.perf_counter(), arguments.data, arguments.out
    if part == "vae":
        line = write_pixel_decoder(read_pictures(data), out / "pixel_decoder", arguments)
    elif part == "tower":
        line = write_vision_model(read_pictures(data), out / "vision_model", arguments)
    else:
        tokenizer = write_tokenizer(list(read_captions(data).values()), out / "tokenizer")
        count = write_language_model(tokenizer, out / "language_model")
        line = f"tokenizer: {len(tokenizer)} entries; language model: {count:,} parameters, random"
    return f"{line}; {time.perf_counter() - began:.0f} s"


def make_all(arguments: argparse.Namespace) -> None:
    """Make all parts, the tower in a second process in parallel with the VAE, and print a line about each."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings(arguments).items()]
    folders = ["--data", str(arguments.data), "--out", str(arguments.out)]
    command = [sys.executable, str(Path(__file__).resolve()), *folders, *options, "--only", "tower"]
    print(make("text", arguments), flush=True)
    tower = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        print(make("vae", arguments), flush=True)
        output, _ = tower.communicate()
    finally:
        tower.kill()
    if tower.returncode:
        raise SystemExit(f"make_parts: `{' '.join(command[1:])}` ended with status {tower.returncode}")
    print(output.splitlines()[-1], flush=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or `arguments` in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="output of stamps.py")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the parts, each in its library's layout")
    add("--only", choices=PARTS, nargs="+", help="make these, in this process; by default all")
    add("--vae-steps", type=int, default=2000, metavar="N", help="training steps of 4 pictures [%(default)s]")
    add("--vae-lr", type=float, default=4e-3, metavar="X", help="highest learning rate of the VAE [%(default)s]")
    add("--kl-weight", type=float, default=1e-4, metavar="X", help="weight of the KL divergence [%(default)s]")
    add(
        "--latent-noise",
        type=float,
        default=0.5,
        metavar="X",
        help="noise on the decoder's training latents [%(default)s]",
    )
    add("--tower-steps", type=int, default=1000, metavar="N", help="training steps of 16 pictures [%(default)s]")
    add("--seed", type=int, default=0, help="of weights, batches and noise [%(default)s]")
    return parser.parse_args(arguments)


def main() -> None:
    """Make the parts from the command line."""
    arguments = parse_arguments()
    if arguments.only:
        for part in arguments.only:
            print(make(part, arguments), flush=True)
        return
    complete, made_of = arguments.out / COMPLETE, fingerprint(arguments)
    if complete.exists() and complete.read_text(encoding="utf-8").strip() == made_of:
        print(f"{arguments.out} holds the parts made of these pictures; remove it to make them again")
        return
    complete.unlink(missing_ok=True)
    make_all(arguments)
    complete.write_text(made_of + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
