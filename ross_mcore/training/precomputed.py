"""Decides at start which precomputed parts of pictures a run reads, from the data sets and the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from ross_mcore.architecture import ModelConfig, Precomputed
from ross_mcore.checkpoint.fingerprint import part_fingerprint
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.config import Config
from ross_mcore.data.precomputed import PrecomputedParts, part_source
from ross_mcore.data.sample import ShardDataset
from ross_mcore.errors import ConfigError
from ross_mcore.parallel.collectives import all_or_none, from_first_rank
from ross_mcore.parallel.layout import Stage
from ross_mcore.parts import precomputed_part


def choose_precomputed(
    config: Config, model_config: ModelConfig, start: Checkpoint, datasets: Sequence[ShardDataset]
) -> Precomputed:
    """The precomputed parts that are read from the shards. Collective.

    Features only for a frozen tower, latents only for a denoiser, and either only when the data sets have it. Raises
    ConfigError when another VAE, tower or preprocessing made them, or when only some of the data sets have them;
    ShardError for incomplete parts.
    """
    pictured = [part for part in datasets if part.reader.num_images]
    kinds = all_or_none(lambda: _kinds_held(config, model_config, pictured))
    weights = {kind: from_first_rank(partial(part_fingerprint, start, precomputed_part(kind))) for kind in kinds}
    chosen = Precomputed(features="features" in kinds, latents="latents" in kinds)

    def check() -> None:
        for part in pictured:
            _require_same(part, weights, model_config, start)
            computes = not chosen.features or (model_config.denoiser is not None and not chosen.latents)
            if computes and part.reader.pictures_left_out:
                raise ConfigError(
                    f"{part.reader.folder} was written without pictures (--drop-images) and this run needs them "
                    f"(precomputed parts it can use: {', '.join(kinds) or 'none'})"
                )

    all_or_none(check)
    return chosen


def _kinds_held(config: Config, model_config: ModelConfig, pictured: list[ShardDataset]) -> list[str]:
    """The kinds of parts that this run can use and its data sets have."""
    if not config.data.precomputed:
        return []
    usable = {"features": config.optimizer.vision_lr is None, "latents": model_config.denoiser is not None}
    kinds = []
    for kind in (kind for kind, is_usable in usable.items() if is_usable):
        lacking = [str(part.reader.folder) for part in pictured if kind not in part.reader.precomputed]
        if lacking and len(lacking) < len(pictured):
            raise ConfigError(
                f"{', '.join(lacking)} has no precomputed {kind} and other data sets have them: make them there too "
                "(tools/precompute_latents.py), or pass --no-precomputed"
            )
        if pictured and not lacking:
            kinds.append(kind)
    return kinds


def _require_same(part: ShardDataset, weights: dict[str, str], model_config: ModelConfig, start: Checkpoint) -> None:
    """Raises ConfigError unless the stored parts of a data set are those that this run would compute."""
    sources = PrecomputedParts(part.reader).sources if weights else {}
    for kind, fingerprint in weights.items():
        ours = part_source(kind, fingerprint, model_config, part.preprocessing, sources[kind].dtype)
        difference = sources[kind].difference(ours)
        if difference is not None:
            raise ConfigError(
                f"the {kind} in {part.reader.folder} are not what this run would compute: {difference}. Make them "
                f"again with tools/precompute_latents.py --load {start.path}, or pass --no-precomputed"
            )


def read_pictures_as(
    datasets: Sequence[ShardDataset], precomputed: Precomputed, stage: Stage, model_config: ModelConfig
) -> None:
    """Makes the data sets read only what this pipeline stage needs of a picture. Raises ShardError."""
    wanted = set()
    if stage.is_first:
        wanted.add("features" if precomputed.features else "pixels")
    if stage.is_last and model_config.denoiser is not None:
        wanted.add("latents" if precomputed.latents else "pixels")
    for part in datasets:
        part.read_as(frozenset(wanted))


def blank_posterior(datasets: Sequence[ShardDataset]) -> torch.Tensor | None:
    """The VAE's posterior of the blank picture, from the first data set that has it."""
    stored = [part.stored for part in datasets if part.stored is not None and "latents" in part.stored.sources]
    return stored[0].blank("latents") if stored else None


def unused_parts(config: Config, precomputed: Precomputed) -> list[str]:
    """Prefixes of the parts that no rank builds. --eval-interval needs the VAE to decode."""
    decodes = config.logging.eval_interval is not None
    unused = {"features": precomputed.features, "latents": precomputed.latents and not decodes}
    return [precomputed_part(kind).prefix for kind, is_unused in unused.items() if is_unused]
