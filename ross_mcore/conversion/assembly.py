"""Makes one checkpoint from several folders: plans every part before it writes anything, then streams the tensors."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ross_mcore.architecture import ModelConfig
from ross_mcore.checked import real_path
from ross_mcore.checkpoint import folder
from ross_mcore.checkpoint.claim import Claim
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.conversion.huggingface import (
    GENERATION_CONFIG,
    RossFolder,
    copy_tokenizer,
    open_ross,
    open_tensors,
    read_json,
)
from ross_mcore.conversion.mapping import ross_table
from ross_mcore.conversion.stream import TensorWriter
from ross_mcore.conversion.table import AnyEntry, convert_in, plan
from ross_mcore.data.tokenizer import load_tokenizer, require_vocabulary
from ross_mcore.errors import ArchitectureError, ConversionError, TokenizerError
from ross_mcore.models.inventory import inventory
from ross_mcore.models.pixel_decoder import PixelDecoder
from ross_mcore.models.vision import VisionModel
from ross_mcore.parts import DENOISER, PARTS, VAE, VISION_TOWER, Part, part_of
from ross_mcore.shapes import Shapes, differences

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """The tensors of `parts`, converted from one folder or adapter file by one table."""

    path: Path
    parts: tuple[Part, ...]
    table: Sequence[AnyEntry]
    configs: tuple[Path, ...] = ()
    """The files that describe the tensors, where they are not one config.json beside them."""


@dataclass(frozen=True)
class Assets:
    """The files beside the tensors. The generation config may be missing; it is kept for exports to Hugging Face."""

    tokenizer: Path
    preprocessor_config: Path
    generation_config: Path

    def copy(self, target: Path) -> None:
        """Copies them into a checkpoint. Raises ConversionError naming a file that is missing or malformed."""
        copy_tokenizer(self.tokenizer, target / folder.TOKENIZER)
        if self.generation_config.is_file():
            read_json(self.generation_config)
            shutil.copyfile(self.generation_config, target / folder.TOKENIZER / GENERATION_CONFIG)
        shutil.copyfile(self.preprocessor_config, target / folder.PREPROCESSOR)


def assemble(
    root: Path,
    model: ModelConfig,
    sources: Sequence[Source],
    fresh: Iterable[tuple[str, Tensor]],
    assets: Assets,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], None] = lambda parameters: None,
    overwrite: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Writes iteration 0 of `root` from the sources, the new tensors of `fresh` and the assets.

    dtype: of all parts except those that are always converted in float32; None keeps the dtype of each tensor, in those
    parts too. advance: called with the number of parameters after each tensor. overwrite: replaces a converted model in
    `root`, and moves a run to a folder beside it. facts: of the model's training elsewhere, for train_state.json. Holds
    one tensor at a time and builds no model.
    Raises ConversionError naming folder and tensor, TokenizerError or CheckpointError; then `root` is as it was.
    """
    is_run = folder.require_room(root, overwrite)
    if is_run and (inside := [path for path in (*(s.path for s in sources), assets.tokenizer) if _is_in(path, root)]):
        raise ConversionError(f"{inside[0]} is in {root}, which would be moved; give another --save folder")
    _require_buildable(model, sources)
    shapes = inventory(model)
    plans = []
    for source in sources:
        tensors = open_tensors(source.path)
        if tensors.unread:
            _logger.warning("%s: %s is read; %s is not", source.path, tensors.read_from, ", ".join(tensors.unread))
        wanted = {name: shape for name, shape in shapes.items() if part_of(name) in source.parts}
        try:
            plans.append((plan(source.table, tensors, wanted, model.language), tensors))
        except ConversionError as error:
            configs = f" ({', '.join(map(str, source.configs))})" if source.configs else ""
            raise ConversionError(
                f"{source.path}: {error}; give weights and a configuration{configs} that belong together"
            ) from None
    moved = None
    if is_run:
        with Claim(root):  # refuses a folder that a run saves to
            moved = folder.set_aside(root)
    try:
        with Claim(root):
            former = folder.checkpoints(root)
            streams = [*(convert_in(steps, tensors, model.language) for steps, tensors in plans), fresh]
            checkpoint = _write(root, model, streams, assets, dtype, advance, facts)
    except BaseException:
        if moved is not None:
            moved.rename(root)
        raise
    if moved is not None:
        _logger.warning("%s held a training run, which is now %s", root, moved)
    elif former:
        _logger.warning("the converted model in %s was replaced", root)
    return checkpoint


def _is_in(path: Path, root: Path) -> bool:
    return real_path(path).is_relative_to(real_path(root))


def _write(
    root: Path,
    model: ModelConfig,
    streams: Sequence[Iterable[tuple[str, Tensor]]],
    assets: Assets,
    dtype: torch.dtype | None,
    advance: Callable[[int], None],
    facts: Mapping[str, Any] | None,
) -> Checkpoint:
    """Writes all tensors of `streams` and the assets; after an error nothing is left of them."""
    written = Shapes()
    partial = folder.begin(root, 0)
    try:
        assets.copy(partial)
        _require_tokenizer(assets.tokenizer, partial / folder.TOKENIZER, model.language.vocab_size)
        with TensorWriter(partial) as writer:
            for stream in streams:
                for name, tensor in stream:
                    if dtype is not None:
                        tensor = tensor.to(torch.float32 if part_of(name).converted_in_float32 else dtype)
                    writer.add(name, tensor)
                    written[name] = tuple(tensor.shape)
                    advance(tensor.numel())
                    del tensor  # before the next one is made
            for difference in differences(inventory(model), written):
                raise ConversionError(difference.in_words("the architecture"))
        return folder.publish(root, 0, model, dict(facts) if facts else None, records=writer.records)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _require_buildable(model: ModelConfig, sources: Sequence[Source]) -> None:
    """Raises ArchitectureError where transformers or diffusers build no such tower or VAE, as training would."""
    vision, part = model.vision, VISION_TOWER
    try:
        with torch.device("meta"):  # no memory, no weights
            VisionModel(vision)
            part = VAE
            if model.pixel_decoder is not None:
                PixelDecoder(model.pixel_decoder, vision.image_mean, vision.image_std, model.decode_image_size)
    except ArchitectureError as error:
        source = next(source for source in sources if part in source.parts)
        files = " or ".join(map(str, source.configs or [source.path / "config.json"]))
        reason = str(error).removeprefix("config.json: ")
        raise ArchitectureError(f"{files}: {reason}; give a {part.label} that its library builds") from None


def _require_tokenizer(source: Path, copied: Path, vocab_size: int) -> None:
    """Raises TokenizerError, naming the source, unless training can use the copied files with this vocabulary."""
    try:
        require_vocabulary(load_tokenizer(copied), vocab_size, str(copied))
    except TokenizerError as error:
        raise TokenizerError(str(error).replace(str(copied), str(source))) from None


def import_ross(
    root: Path,
    source: Path | RossFolder,
    tokenizer: Path | None = None,
    base: Path | None = None,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], None] = lambda parameters: None,
    overwrite: bool = False,
) -> Checkpoint:
    """Writes iteration 0 of `root` from a full checkpoint of the reference implementation, with all its tensors.

    source: its folder (`base`: see `open_ross`), or the RossFolder of `open_ross`. tokenizer: a folder, where the
    checkpoint has none. dtype, advance, overwrite: see `assemble`. Raises ArchitectureError, ConversionError,
    TokenizerError or CheckpointError; then `root` is as it was.
    """
    ross = source if isinstance(source, RossFolder) else open_ross(source, base)
    model = ross.model_config()
    if model.denoiser:
        names = list(open_tensors(ross.path).names())
        for part in (DENOISER, VAE):
            if not any(name.startswith(part.reference) for name in names):
                raise ConversionError(
                    f"{ross.path / 'config.json'} has ross_enable, but there are no tensors {part.reference}*: the "
                    "reference's from_pretrained drops them, so a model that it saved again has lost them. Use the "
                    "checkpoint that its training wrote, or set ross_enable to false to continue without denoiser and "
                    "VAE"
                )
    described = (ross.path, ross.vision_model, *([ross.pixel_decoder] if ross.pixel_decoder else []))
    source_of_all = Source(ross.path, PARTS, ross_table(model), tuple(path / "config.json" for path in described))
    processor = ross.vision_model / "preprocessor_config.json"
    assets = Assets(tokenizer or ross.path, processor, ross.path / GENERATION_CONFIG)
    return assemble(root, model, [source_of_all], (), assets, dtype, advance, overwrite, ross.training_facts())
