"""Pictures that a trained model reconstructs from their image states.

    model = ross_mcore.load_model("runs/finetune")
    originals, reconstructions = ross_mcore.reconstruct(model, ["cat.jpg"])

Legend: K pictures, Hd side of a decoded picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ross_mcore.data.conversation import IMAGE_PLACEHOLDER
from ross_mcore.data.image import as_pixels
from ross_mcore.models.diffusion import run_steps
from ross_mcore.models.ross import Reconstructing
from ross_mcore.trained import Picture, TrainedModel, pixels_of, require_model, row_of, run


@torch.no_grad()
def reconstruct(
    trained: TrainedModel,
    pictures: Sequence[Picture],
    *,
    steps: int = 50,
    temperature: float = 1.0,
    batch_size: int = 8,
    seed: int | None = None,
    start_timestep: int | None = None,
    on_step: Callable[[int, Callable[[], Tensor]], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """K pictures -> (originals, reconstructions), both [K, 3, Hd, Hd] in [0, 1].

    Each picture is the prompt of a conversation in `trained.template`, as in training; attention is causal, so later
    tokens do not matter. `seed` of the noise, by default that of load_model. Sampling starts at pure noise, or with
    `start_timestep` t at the picture's own latents noised to t of 999. `on_step(timestep, estimate)` is called in every
    step of every `batch_size` pictures; `estimate()` decodes what the step takes the pictures to be, [k, 3, Hd, Hd].

    Raises ArchitectureError for a model without a denoiser, ImageError for an unusable picture, OSError for an
    unreadable file, ValueError for a number of steps or a timestep out of range.
    """

    def report(timestep: int, estimate: Tensor) -> None:
        if on_step is not None:
            on_step(timestep, lambda: trained.model.pixel_decoder.decode(estimate))

    steps_of_all = reconstruct_steps(trained, pictures, steps, temperature, batch_size, seed, start_timestep)
    return run_steps(steps_of_all, report)


@torch.no_grad()
def reconstruct_steps(
    trained: TrainedModel,
    pictures: Sequence[Picture],
    steps: int = 50,
    temperature: float = 1.0,
    batch_size: int = 8,
    seed: int | None = None,
    start_timestep: int | None = None,
) -> Reconstructing:
    """`reconstruct` as a generator, which yields in every step and returns the same; raises as it does."""
    require_model(trained)
    _ = trained.config.decode_image_size
    if isinstance(pictures, (str, Path, Image.Image)) or not len(pictures):
        raise TypeError("pictures must be a list of at least one picture")
    spec = trained.spec
    originals, reconstructions = [], []
    for start in range(0, len(pictures), batch_size):
        some = pixels_of(pictures[start : start + batch_size], trained, "pictures", start)
        rows = [
            row_of([{"from": "human", "value": IMAGE_PLACEHOLDER}], [pixels], trained, spec, place)
            for place, pixels in enumerate(some, start)
        ]
        batch, hidden = run(trained, rows)
        original, reconstruction = yield from trained.model.reconstruct(
            hidden, batch, steps=steps, temperature=temperature, seed=seed, start_timestep=start_timestep
        )
        originals.append(original.cpu())
        reconstructions.append(reconstruction.cpu())
    return torch.cat(originals), torch.cat(reconstructions)


def as_picture(image: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] -> an 8-bit RGB picture."""
    return Image.fromarray(as_pixels(image))
