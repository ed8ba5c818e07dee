"""Make the demo's vision tower: a small SigLIP vision model, trained on synthetic scenes with their labels.

    python examples/demo/make_tower.py --out examples/demo/weights/vision_model

A real tower has learned from captioned pictures. This one is trained to predict for each patch the colour and the shape
in its quadrant, its position and its pixels. It uses labels: it replaces a pre-trained tower and is not a result.
Training uses ``hidden_states[-2]``, the input of the last layer, so the model has one layer more than is trained. The
held-out colour-shape pairs are never shown.

Shapes: B pictures, T = 16 patches in row-major order, W = width.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

from make_vae import stack_pictures, stack_pixels
from scenes import (
    COLOURS,
    HELD_OUT_PAIRS,
    PICTURE_PIXELS,
    PLACES,
    SHAPES,
    TRAINING_PAIRS,
    Scene,
    draw_scene,
    nearest_colour,
    sample_evaluation_scenes,
    sample_paint,
    sample_scene,
    sample_training_scenes,
)

if TYPE_CHECKING:
    import torch
    from transformers import SiglipVisionModel

PATCH_PIXELS = 16
WIDTH = 64
TRAINED_LAYERS = 2
SELECT_LAYER = -2
LABEL_SMOOTHING = 0.1


def build_tower() -> SiglipVisionModel:
    """Build the tower with random weights, without the pooling head that no training uses."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=TRAINED_LAYERS + 1,
        num_attention_heads=4,
        image_size=PICTURE_PIXELS,
        patch_size=PATCH_PIXELS,
        vision_use_head=False,
    )
    return SiglipVisionModel(config)


def build_heads() -> torch.nn.ModuleDict:
    """Build the linear maps from a patch's feature to its labels; they are discarded after training."""
    from torch import nn

    patches = (PICTURE_PIXELS // PATCH_PIXELS) ** 2
    sizes = {
        "colour": len(COLOURS) + 1,
        "shape": len(SHAPES) + 1,
        "position": patches,
        "pixels": 3 * PATCH_PIXELS**2,
    }
    return nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in sizes.items()})


def label_patches(scenes: list[Scene], colours: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the colour and the shape in each patch's quadrant [B, T]; 0 means empty."""
    import torch

    side = PICTURE_PIXELS // PATCH_PIXELS
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    quadrant_of_patch = (row * 2 // side * 2 + column * 2 // side).flatten()
    occupied = torch.tensor([[quadrant in scene.quadrants for quadrant in range(len(PLACES))] for scene in scenes])
    colour = torch.tensor([list(COLOURS).index(name) + 1 for name in colours])
    shape = torch.tensor([SHAPES.index(scene.shape) + 1 for scene in scenes])
    occupied = occupied[:, quadrant_of_patch]
    return occupied * colour[:, None], occupied * shape[:, None]


def compute_losses(
    tower: SiglipVisionModel, heads: torch.nn.ModuleDict, scenes: list[Scene], paint_rng: random.Random | None = None
) -> dict[str, torch.Tensor]:
    """Return the four losses and, for colour and shape, the share of patches that are right.

    Args:
        tower: The model.
        heads: Output of ``build_heads``.
        scenes: B scenes.
        paint_rng: Paints half of the scenes in any colour, labelled with the nearest name, so that the tower learns
        shape and colour independently.
    """
    import torch
    from torch.nn import functional

    paints = [COLOURS[scene.colour] for scene in scenes]
    if paint_rng is not None:
        paints[::2] = [sample_paint(paint_rng, scene.shape) for scene in scenes[::2]]
    pixels = stack_pixels([draw_scene(scene, paint) for scene, paint in zip(scenes, paints, strict=True)])
    features = tower(pixels, output_hidden_states=True).hidden_states[SELECT_LAYER]
    colour, shape = label_patches(scenes, [nearest_colour(paint) for paint in paints])
    position = torch.arange(features.shape[1]).expand(len(scenes), -1)
    values: dict[str, torch.Tensor] = {}
    for name, labels in (("colour", colour), ("shape", shape), ("position", position)):
        logits = heads[name](features).flatten(0, 1)
        values[name] = functional.cross_entropy(logits, labels.flatten(), label_smoothing=LABEL_SMOOTHING)
        values[f"{name}_right"] = (logits.argmax(dim=1) == labels.flatten()).float().mean()
    patches = functional.unfold(pixels, PATCH_PIXELS, stride=PATCH_PIXELS).transpose(1, 2)
    values["pixels"] = functional.mse_loss(heads["pixels"](features), patches)
    return values


def train(tower: SiglipVisionModel, arguments: argparse.Namespace) -> torch.nn.ModuleDict:
    """Train the tower and its heads over freshly drawn scenes; return the heads."""
    import torch
    from rich.progress import track

    rng = random.Random(f"tower/{arguments.seed}")
    heads = build_heads()
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.lr, betas=(0.9, 0.99), weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
    )
    for step in track(range(arguments.steps), description="vision tower"):
        values = compute_losses(tower, heads, [sample_scene(rng) for _ in range(arguments.batch_size)], rng)
        loss = values["colour"] + values["shape"] + 0.5 * values["position"] + 4 * values["pixels"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}: " + ", ".join(f"{name} {value.item():.4f}" for name, value in values.items()))
    return heads


def scale_features(tower: SiglipVisionModel, target: float) -> None:
    """Bring the root mean square of the selected features to ``target`` without changing their direction.

    All additions to the residual stream are scaled by one factor; the layer norms before attention and MLP remove it
    again. Features of real towers are large too, and small ones have little effect in the language model's layers.
    """
    import torch

    pixels = stack_pictures(sample_training_scenes(200, "tower/scale"))
    with torch.no_grad():
        features = tower(pixels, output_hidden_states=True).hidden_states[SELECT_LAYER]
        factor = target / features.square().mean().sqrt().item()
        outputs = [tower.embeddings.patch_embedding, tower.embeddings.position_embedding]
        for layer in tower.encoder.layers:
            outputs += [layer.self_attn.out_proj, layer.mlp.fc2]
        for module in outputs:
            for parameter in module.parameters():
                parameter.mul_(factor)


def main() -> None:
    """Make the vision tower from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write in the Hugging Face layout")
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--feature-scale", type=float, default=10.0, help="root mean square of the features")
    parser.add_argument("--seed", type=int, default=31, help="seed of the weights and the pictures")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()

    import torch
    from transformers import SiglipImageProcessor

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    start_seconds = time.process_time()
    tower = build_tower()
    heads = train(tower, arguments)
    tower.eval()
    for name, pairs in (("training", TRAINING_PAIRS), ("held-out", HELD_OUT_PAIRS)):
        with torch.no_grad():
            values = compute_losses(
                tower, heads, sample_evaluation_scenes(200 // (4 * len(pairs)), "tower/quality", pairs)
            )
        print(f"{name} pairs: " + ", ".join(f"{key} {value.item():.4f}" for key, value in values.items()))
    scale_features(tower, arguments.feature_scale)
    tower.half().save_pretrained(arguments.out)
    side = {"height": PICTURE_PIXELS, "width": PICTURE_PIXELS}
    processor = SiglipImageProcessor(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3)
    processor.save_pretrained(arguments.out)
    count = sum(parameter.numel() for parameter in tower.parameters())
    print(f"{count} parameters, {time.process_time() - start_seconds:.0f} CPU seconds")


if __name__ == "__main__":
    main()
