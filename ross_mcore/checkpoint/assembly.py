"""One checkpoint out of several folders: every part planned before the first byte is written, then streamed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ross_mcore.architecture import ModelConfig
from ross_mcore.checkpoint import folder
from ross_mcore.checkpoint.convert import AnyRow, ConversionError, convert_in, plan
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.checkpoint.huggingface import SafetensorsFolder, copy_tokenizer
from ross_mcore.checkpoint.inventory import inventory
from ross_mcore.checkpoint.stream import TensorWriter


@dataclass(frozen=True)
class Part:
    """Tensors whose names (ours) begin with `prefixes`, from one folder, by one table, stored in one dtype."""

    path: Path
    prefixes: tuple[str, ...]
    table: Sequence[AnyRow]
    dtype: torch.dtype | None = None


def assemble(
    root: Path,
    model: ModelConfig,
    parts: Sequence[Part],
    fresh: Iterable[tuple[str, Tensor]],
    tokenizer: Path,
    preprocessor_config: Path,
    advance: Callable[[int], None] = lambda parameters: None,
) -> Checkpoint:
    """Writes iteration 0 of `root`: the parts, the tensors of `fresh`, tokenizer and image processor.

    `advance` is called with the number of parameters after each tensor. Nothing is built and nothing is held but the
    tensor at hand. Raises ConversionError naming folder and tensor, or CheckpointError; leaves nothing half-written.
    """
    shapes = inventory(model)
    plans = []
    for part in parts:
        source = SafetensorsFolder(part.path)
        wanted = {name: shape for name, shape in shapes.items() if name.startswith(part.prefixes)}
        try:
            plans.append((plan(part.table, source, wanted, model.language), source, part.dtype))
        except ConversionError as error:
            raise ConversionError(f"{part.path}: {error}") from None
    missing = set(shapes)
    partial = folder.begin(root, 0)
    try:
        copy_tokenizer(tokenizer, partial / folder.TOKENIZER)
        shutil.copyfile(preprocessor_config, partial / folder.PREPROCESSOR)
        with TensorWriter(partial) as writer:
            streams = [convert_in(steps, source, model.language, dtype) for steps, source, dtype in plans]
            for stream in (*streams, fresh):
                for name, tensor in stream:
                    if shapes.get(name) != tuple(tensor.shape):
                        raise ConversionError(f"{name} has shape {list(tensor.shape)}, expected {shapes.get(name)}")
                    writer.add(name, tensor)
                    missing.discard(name)
                    advance(tensor.numel())
                    del tensor  # before the next one is made
            if missing:
                raise ConversionError(f"nothing was given for {min(missing)} and {len(missing) - 1} more")
        return folder.publish(root, 0, partial, model)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
