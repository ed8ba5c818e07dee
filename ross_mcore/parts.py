"""Table of the model's parts, and pure functions that look up a weight's part by its name.

The name of a weight starts with the prefix of its part, in the model and in checkpoints. Freezing, learning rates,
placement, memory, diagnosis, conversion and pass-through weights are all derived from this table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ross_mcore.architecture import ModelConfig
from ross_mcore.errors import ArchitectureError


@dataclass(frozen=True)
class Section:
    """The weights of a part whose names continue with `prefix`."""

    prefix: str
    label: str
    """Its name in messages."""
    stage: Literal["first", "last", "of its layer"]
    """The pipeline stage that hosts it; "of its layer": the one with the decoder layer whose number follows."""
    last_when_tied: bool = False
    """Whether the last stage hosts it too when the output layer is tied to the embedding."""
    sharded: str = "(?!)"
    """Regular expression, after `prefix`, of the weights that are sharded over the tensor-parallel group."""


@dataclass(frozen=True)
class Part:
    """One part of the model."""

    prefix: str
    """First component of its weights' names: the attribute of RossModel that holds it."""
    label: str
    """Its name in messages."""
    trains: Literal["always", "in finetune", "with a rate of its own", "never"]
    """When it trains; exceptions for single weights are in the function `trains`."""
    sections: tuple[Section, ...]
    """In the order of the forward pass."""
    splits_images: bool
    """Whether every tensor-parallel rank has all its weights and computes a share of the images."""
    reference: str
    """Prefix of its weights in a checkpoint of the reference implementation."""
    rate_option: str | None = None
    """The option with its peak learning rate; None: --lr."""
    optimizer_tag: float = 1.0
    """`lr_mult` of its parameter groups, see engine/optimizer.py."""
    converted_in_float32: bool = False
    """Whether conversions store it in float32 for every --dtype."""
    runs_in_float32: bool = False
    """Whether its weights are float32 in a bf16 run."""
    precomputed_as: Literal["features", "latents"] | None = None
    """The field of Precomputed with which it is not built; its weights are then passed through to checkpoints."""
    library_config: Callable[[ModelConfig], dict[str, Any]] | None = None
    """Returns its library's configuration, which enters its fingerprint."""

    @property
    def figure(self) -> str:
        """Its name in metrics."""
        return self.label.replace(" ", "_")

    def weight(self, name: str) -> str:
        """The full name of its weight `name`."""
        return f"{self.prefix}.{name}"

    def own(self, names: Iterable[str]) -> list[str]:
        """The names in `names` that are its weights."""
        return [name for name in names if name.startswith(f"{self.prefix}.")]


def _vae_config(model: ModelConfig) -> dict[str, Any]:
    """Raises ArchitectureError for a model without a VAE."""
    if model.pixel_decoder is None:
        raise ArchitectureError("this model has no pixel decoder")
    return model.pixel_decoder.diffusers


VISION_TOWER = Part(
    "vision_model",
    "vision tower",
    trains="with a rate of its own",
    sections=(Section("", "vision tower", "first"),),
    splits_images=True,
    reference="model.vision_tower.vision_tower.",
    rate_option="vision_lr",
    optimizer_tag=2.0,
    precomputed_as="features",
    library_config=lambda model: model.vision.huggingface,
)
PROJECTOR = Part(
    "vision_projection",
    "projector",
    trains="always",
    sections=(Section("", "projector", "first"),),
    splits_images=True,
    reference="model.mm_projector.",
    rate_option="projector_lr",
    optimizer_tag=3.0,
)
LANGUAGE_MODEL = Part(
    "language_model",
    "language model",
    trains="in finetune",
    sections=(
        Section("embedding", "embedding", "first", last_when_tied=True, sharded=r"\.word_embeddings\.weight"),
        Section(
            "decoder.layers.",
            "decoder layer",
            "of its layer",
            sharded=r"\d+\.(self_attention\.(linear_qkv\.(weight|bias)|linear_proj\.weight)|mlp\.linear_fc[12]\.weight)",
        ),
        Section("decoder.final_", "final norm", "last"),
        Section("output_layer.", "output layer", "last", sharded="weight"),
    ),
    splits_images=False,
    reference="model.",
)
DENOISER = Part(
    "denoiser",
    "denoiser",
    trains="always",
    sections=(Section("", "denoiser", "last"),),
    splits_images=True,
    reference="model.mm_inv_projector.net.",
    rate_option="denoiser_lr",
    optimizer_tag=4.0,
    converted_in_float32=True,
)
VAE = Part(
    "pixel_decoder",
    "VAE",
    trains="never",
    sections=(Section("", "VAE", "last"),),
    splits_images=True,
    reference="model.pixel_decoder.pixel_decoder.",
    converted_in_float32=True,
    runs_in_float32=True,
    precomputed_as="latents",
    library_config=_vae_config,
)

PARTS = (VISION_TOWER, PROJECTOR, LANGUAGE_MODEL, DENOISER, VAE)
"""In the order of the forward pass."""

DENOISER_POSITIONS = DENOISER.weight("pos_embed")
"""The denoiser's position table; the reference trains it in pretraining only (ROSS train.py:1170-1206)."""

TRANSFORMERS_4_TOWER = "vision_model."
"""Prefix of a tower's weights in transformers 4 and on the hub; transformers 5 has none."""

_PART = re.compile(rf"(?:^|\.)({'|'.join(part.prefix for part in PARTS)})\.(.*)")


@dataclass(frozen=True)
class Place:
    """A weight's section in the model.

    number: of the section, in the order of the forward pass; layer: of the decoder layer, -1 in other sections.
    """

    number: int
    layer: int
    section: Section
    rest: str
    """The name after the section's prefix."""


_SECTIONS = [(part, section) for part in PARTS for section in part.sections]


def part_of(name: str) -> Part:
    """The part of a weight or of its moments, whose names continue before the prefix. Raises ValueError for others."""
    found = _PART.search(name)
    if found is None:
        raise ValueError(f"{name} is not a weight of any part of the model")
    return next(part for part in PARTS if part.prefix == found[1])


def place_of(name: str) -> Place | None:
    """The section of a weight or of its moments; None for other names."""
    found = _PART.search(name)
    for number, (part, section) in enumerate(_SECTIONS):
        if found and part.prefix == found[1] and found[2].startswith(section.prefix):
            rest = found[2].removeprefix(section.prefix)
            layer = re.match(r"\d+(?=\.)", rest) if section.stage == "of its layer" else None
            return Place(number, int(layer[0]) if layer else -1, section, rest)
    return None


def order_of(name: str) -> tuple[int, int]:
    """Sort key for names of weights: the order of the forward pass; other names come last."""
    place = place_of(name)
    return (len(_SECTIONS), -1) if place is None else (place.number, place.layer)


def label_of(name: str) -> str:
    """Name for messages of a weight's section; decoder layers with their number, from 0."""
    place = place_of(name)
    if place is None:
        return "model"
    return place.section.label + (f" {place.layer}" if place.layer >= 0 else "")


def is_sharded(name: str) -> bool:
    """Whether a weight is sharded over the tensor-parallel group."""
    place = place_of(name)
    return place is not None and re.fullmatch(place.section.sharded, place.rest) is not None


def trains(name: str, llm_trains: bool, vision_trains: bool) -> bool:
    """Whether a weight trains, as in the reference (ROSS train.py:1170-1206).

    llm_trains: true in fine-tuning; vision_trains: true when --vision-lr is given.
    """
    if name == DENOISER_POSITIONS and llm_trains:
        return False
    return {
        "always": True,
        "in finetune": llm_trains,
        "with a rate of its own": vision_trains,
        "never": False,
    }[part_of(name).trains]


def precomputed_part(kind: str) -> Part:
    """The part that computes the "features" or the "latents" of a picture."""
    return next(part for part in PARTS if part.precomputed_as == kind)
