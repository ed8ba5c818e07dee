"""Names and shapes of all tensors of a model's checkpoint, computed from its architecture.

A conversion must fill exactly these. Also counts parameters without building anything.
"""

from __future__ import annotations

from ross_mcore.architecture import ModelConfig
from ross_mcore.models import denoiser, language_weights, pixel_decoder, projector, vision
from ross_mcore.parts import DENOISER, LANGUAGE_MODEL, PROJECTOR, VAE, VISION_TOWER
from ross_mcore.shapes import Shapes, within


def inventory(model: ModelConfig) -> Shapes:
    """All weights of a model. Raises KeyError for a key that a library's configuration lacks."""
    tower, width = model.vision, model.language.hidden_size
    shapes = within(LANGUAGE_MODEL.weight(""), language_weights.weight_shapes(model.language))
    shapes |= within(VISION_TOWER.weight("tower."), vision.weight_shapes(tower))
    shapes |= within(PROJECTOR.weight(""), projector.weight_shapes(model.projector, tower.hidden_size, width))
    if model.denoiser and (vae := model.pixel_decoder):
        found = denoiser.weight_shapes(model.denoiser, vae.token_channels, width, tower.grid)
        shapes |= within(DENOISER.weight(""), found)
        shapes |= within(VAE.weight("autoencoder."), pixel_decoder.weight_shapes(vae))
    return shapes
