"""One checkpoint out of several folders: every part planned before the first byte is written, then streamed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ross_mcore.architecture import ModelConfig
from ross_mcore.checkpoint import folder
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
from ross_mcore.errors import ConversionError
from ross_mcore.models.inventory import inventory
from ross_mcore.parts import DENOISER, PARTS, VAE, Part, part_of
from ross_mcore.shapes import Shapes, differences


@dataclass(frozen=True)
class Source:
    """The tensors of `parts`, from one folder or adapter file, by one table."""

    path: Path
    parts: tuple[Part, ...]
    table: Sequence[AnyEntry]
    configs: tuple[Path, ...] = ()
    """The files that say which tensors there should be, where they are several."""


def assemble(
    root: Path,
    model: ModelConfig,
    sources: Sequence[Source],
    fresh: Iterable[tuple[str, Tensor]],
    tokenizer: Path,
    preprocessor_config: Path,
    generation_config: Path,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], None] = lambda parameters: None,
) -> Checkpoint:
    """Writes iteration 0 of `root`: the sources, the tensors of `fresh`, tokenizer and image processor.

    generation_config: a file that is kept beside the tokenizer where it exists, for the way back to Hugging Face.
    dtype: of all parts but those that are always converted in float32; None keeps each tensor's own, those included.
    `advance` is called with the number of parameters after each tensor. Nothing is built and nothing is held but the
    tensor at hand.
    Raises ConversionError naming folder and tensor, or CheckpointError; leaves nothing half-written.
    """
    shapes = inventory(model)
    plans = []
    for source in sources:
        tensors = open_tensors(source.path)
        wanted = {name: shape for name, shape in shapes.items() if part_of(name) in source.parts}
        try:
            plans.append((plan(source.table, tensors, wanted, model.language), tensors))
        except ConversionError as error:
            configs = f" ({', '.join(map(str, source.configs))})" if source.configs else ""
            raise ConversionError(
                f"{source.path}: {error}; give weights and a configuration{configs} that belong together"
            ) from None
    written, existed = Shapes(), root.exists()
    partial = folder.begin(root, 0)
    try:
        copy_tokenizer(tokenizer, partial / folder.TOKENIZER)
        if generation_config.is_file():
            read_json(generation_config)
            shutil.copyfile(generation_config, partial / folder.TOKENIZER / GENERATION_CONFIG)
        shutil.copyfile(preprocessor_config, partial / folder.PREPROCESSOR)
        with TensorWriter(partial) as writer:
            streams = [convert_in(steps, tensors, model.language) for steps, tensors in plans]
            for stream in (*streams, fresh):
                for name, tensor in stream:
                    if dtype is not None:
                        tensor = tensor.to(torch.float32 if part_of(name).converted_in_float32 else dtype)
                    writer.add(name, tensor)
                    written[name] = tuple(tensor.shape)
                    advance(tensor.numel())
                    del tensor  # before the next one is made
            for difference in differences(shapes, written):
                raise ConversionError(difference.in_words("the architecture"))
        return folder.publish(root, 0, model, records=writer.records)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if not existed:
            with suppress(OSError):
                root.rmdir()
        raise


def import_ross(
    root: Path,
    source: Path | RossFolder,
    tokenizer: Path | None = None,
    base: Path | None = None,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], None] = lambda parameters: None,
) -> Checkpoint:
    """Writes iteration 0 of `root`: a full checkpoint of the reference implementation, nothing dropped.

    source: its folder (`base`: see `open_ross`), or what `open_ross` made of it. tokenizer: a folder, where the
    checkpoint has none. dtype, advance: see `assemble`. Raises ArchitectureError, ConversionError or CheckpointError;
    leaves nothing half-written.
    """
    ross = source if isinstance(source, RossFolder) else open_ross(source, base)
    model = ross.model_config()
    if model.denoiser:
        names = list(open_tensors(ross.path).names())
        for part in (DENOISER, VAE):
            if not any(name.startswith(part.reference) for name in names):
                raise ConversionError(
                    f"{ross.path / 'config.json'} says ross_enable, but there are no tensors {part.reference}*: the "
                    "reference's from_pretrained drops them, so what it saves again has lost them. Take the checkpoint "
                    "that its training wrote, or set ross_enable to false to go on without denoiser and VAE"
                )
    described = (ross.path, ross.vision_model, *([ross.pixel_decoder] if ross.pixel_decoder else []))
    configs = tuple(path / "config.json" for path in described)
    return assemble(
        root,
        model,
        [Source(ross.path, PARTS, ross_table(model), configs)],
        fresh=(),
        tokenizer=tokenizer or ross.path,
        preprocessor_config=ross.vision_model / "preprocessor_config.json",
        generation_config=ross.path / GENERATION_CONFIG,
        dtype=dtype,
        advance=advance,
    )
