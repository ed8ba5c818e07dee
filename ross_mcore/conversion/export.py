"""Exports a checkpoint to the formats of Hugging Face, diffusers and the reference, holding one shard at a time.

Everything is planned first, then written into a folder beside the target and renamed: the target exists whole or not at
all.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ross_mcore import checked
from ross_mcore.checkpoint.fit import require_fit
from ross_mcore.checkpoint.folder import TRAIN_STATE, Checkpoint, require_renames
from ross_mcore.checkpoint.manifest import sync
from ross_mcore.checkpoint.safe_load import StoredTensors
from ross_mcore.checkpoint.tensor_file import in_own_storage
from ross_mcore.conversion import export_config, mapping
from ross_mcore.conversion.export_config import RunFacts, SpecialTokens
from ross_mcore.conversion.huggingface import GENERATION_CONFIG, copy_tokenizer, read_json
from ross_mcore.conversion.table import AnyEntry, convert_steps, plan_out
from ross_mcore.errors import CheckpointError, ConversionError
from ross_mcore.models.inventory import inventory
from ross_mcore.parts import DENOISER, LANGUAGE_MODEL, PARTS, PROJECTOR, VAE, VISION_TOWER, Part, part_of

ADAPTERS = {PROJECTOR: "mm_projector.bin", DENOISER: "mm_inv_projector.bin"}
"""The parts that stage 1 of the reference trains, and the files it saves them in."""


class Export:
    """Exports one checkpoint. Raises CheckpointError or ConversionError naming a missing or unexpected tensor."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: SpecialTokens,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = 5 * 10**9,
        mm_vision_tower: str | None = None,
        mm_pixel_decoder: str | None = None,
        advance: Callable[[int], None] = lambda parameters: None,
    ) -> None:
        """tokens: the tokenizer's; those of the generation_config.json that came with the model take precedence.

        dtype: of every tensor; None keeps the dtype of each. mm_vision_tower, mm_pixel_decoder: paths of existing
        folders to write into config.json; None writes the folders. advance: called with the number of parameters
        written.
        """
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.max_shard_bytes = max_shard_bytes
        self.mm_vision_tower = mm_vision_tower
        self.mm_pixel_decoder = mm_pixel_decoder
        self.advance = advance
        self.model = checkpoint.model_config()
        self.source = StoredTensors(checkpoint.path)
        brought = checkpoint.tokenizer / GENERATION_CONFIG
        self.generation = read_json(brought) if brought.exists() else export_config.generation_config(tokens)
        given = {key: value for key, value in self.generation.items() if not isinstance(value, list)}
        try:
            self.tokens = SpecialTokens(
                bos=_token_id(given, "bos_token_id", tokens.bos),
                eos=_token_id(given, "eos_token_id", tokens.eos),
                pad=tokens.pad,
            )
        except ValueError as error:
            raise ConversionError(f"{brought}: {error}; copy the file again, or remove it") from None
        require_fit(checkpoint, self.model, self.source, inventory)
        if mm_pixel_decoder and not self.model.pixel_decoder:
            raise ConversionError(f"{checkpoint.path} has no pixel decoder whose path could be stated")

    @property
    def tower_folder(self) -> str:
        """Named after the kind of tower, because the reference chooses its class by the name."""
        return f"{self.model.vision.model_type.split('_')[0]}_vision_tower"

    def write_ross(self, save: Path) -> None:
        """Writes a full checkpoint of the reference; tower and VAE also in folders of their own."""
        with _atomic(save) as partial:
            self._write_config(save, partial)
            self._write_tensors(partial, "model", mapping.ross_table(self.model))
            self._write_tokenizer(partial)

    def remarks(self, save: Path) -> list[str]:
        """The changes that the reference's load_pretrained_model needs to read `save`, one sentence each.

        It chooses its class by the folder's name, and reads slow tokenizers only (reference builder.py).
        """
        qwen, name = self.model.language.model_type == "qwen2", checked.real_path(save).name
        found = []
        if qwen != ("qwen2" in name):
            wanted = "has qwen2 in it" if qwen else "does not have qwen2 in it"
            found.append(f"the reference picks its class by the folder's name: rename {name} to one that {wanted}")
        settings = self.checkpoint.tokenizer / "tokenizer_config.json"
        kind = str(read_json(settings).get("tokenizer_class")) if settings.exists() else ""
        needed = ("vocab.json", "merges.txt") if qwen else ("tokenizer.model",) if kind.startswith("Llama") else ()
        missing = [file for file in needed if not (self.checkpoint.tokenizer / file).exists()]
        if missing:
            found.append(f"the reference loads a slow tokenizer: put {' and '.join(missing)} of the original beside it")
        return found

    def write_stage1(self, save: Path) -> None:
        """Writes mm_projector.bin, mm_inv_projector.bin and config.json, as stage 1 of the reference does."""
        with _atomic(save) as partial:
            self._write_config(save, partial, saved_by_pretrain=True)
            self._write_adapters(partial)

    def write_parts(self, save: Path) -> None:
        """Writes language model, tower and VAE in the formats of their libraries, and the adapters of stage 1."""
        with _atomic(save) as partial:
            language = partial / LANGUAGE_MODEL.prefix
            language.mkdir()
            config = export_config.language_config(self.model.language, self.tokens, self._dtype(LANGUAGE_MODEL))
            _write_json(language / "config.json", config)
            self._write_part(language, "model", LANGUAGE_MODEL)
            self._write_tokenizer(language)
            self._write_tower(partial)
            self._write_pixel_decoder(partial)
            self._write_adapters(partial)

    def parameters(self, *parts: Part) -> int:
        """The number of parameters of `parts`."""
        return sum(math.prod(shape) for name, shape in self.source.shapes.items() if part_of(name) in parts)

    def parameters_to_write(self, format: str) -> int:
        """The number of parameters that an export writes. format: one of FORMATS."""
        beside: tuple[Part, ...] = () if self.mm_vision_tower else (VISION_TOWER,)
        beside += () if self.mm_pixel_decoder else (VAE,)
        return {
            "ross": self.parameters(*PARTS) + self.parameters(*beside),
            "stage1": self.parameters(*ADAPTERS, *beside),
            "hf": self.parameters(*PARTS),
        }[format]

    def _write_config(self, save: Path, partial: Path, saved_by_pretrain: bool = False) -> None:
        """Writes the reference's config.json, and the folders it points to unless their paths were given."""
        has_vae = self.model.pixel_decoder is not None
        tower = self.mm_vision_tower or str(checked.real_path(save) / self.tower_folder)
        vae = (self.mm_pixel_decoder or str(checked.real_path(save) / VAE.prefix)) if has_vae else None
        state = self.checkpoint.train_state()
        known = {key: state[key] for key in ("training_stage", "image_aspect_ratio", "seq_length") if state.get(key)}
        if saved_by_pretrain:
            known["training_stage"] = "pretrain"
        known["tower_trained"] = bool(VISION_TOWER.own(self.source.trained))
        try:
            run = checked.build(RunFacts, known, "it")
        except ValueError as error:
            raise CheckpointError(f"{self.checkpoint.path / TRAIN_STATE}: {error}; copy the checkpoint again") from None
        config = export_config.ross_config(
            self.model, self.tokens, self._dtype(LANGUAGE_MODEL), run, vision_tower=tower, pixel_decoder=vae
        )
        if saved_by_pretrain:  # stage 1 saves the configuration without a model, hence without these
            del config["architectures"], config["torch_dtype"]
        _write_json(partial / "config.json", config)
        if self.mm_vision_tower is None:
            self._write_tower(partial)
        if self.mm_pixel_decoder is None:
            self._write_pixel_decoder(partial)

    def _write_tokenizer(self, target: Path) -> None:
        copy_tokenizer(self.checkpoint.tokenizer, target)
        _write_json(target / GENERATION_CONFIG, self.generation)

    def _write_tower(self, partial: Path) -> None:
        target = partial / self.tower_folder
        target.mkdir()
        _write_json(target / "config.json", export_config.vision_config(self.model.vision, self._dtype(VISION_TOWER)))
        self.checkpoint.image_processor()  # refuses a malformed file here, not when its copy is read
        shutil.copyfile(self.checkpoint.preprocessor_config, target / "preprocessor_config.json")
        self._write_part(target, "model", VISION_TOWER)

    def _write_pixel_decoder(self, partial: Path) -> None:
        if self.model.pixel_decoder is not None:
            target = partial / VAE.prefix
            target.mkdir()
            _write_json(target / "config.json", export_config.pixel_decoder_config(self.model.pixel_decoder.diffusers))
            self._write_part(target, "diffusion_pytorch_model", VAE)

    def _write_adapters(self, partial: Path) -> None:
        for part, file in ADAPTERS.items():
            steps = plan_out(mapping.part_table(part, self.model), part.own(self.source.names()))
            tensors = convert_steps(steps, self.source, self.model.language, self.dtype)
            torch.save({name: in_own_storage(tensor) for name, tensor in tensors}, partial / file)
            self.advance(self.parameters(part))

    def _write_part(self, target: Path, stem: str, part: Part) -> None:
        self._write_tensors(target, stem, mapping.part_table(part, self.model), [part])

    def _write_tensors(self, target: Path, stem: str, table: Sequence[AnyEntry], parts: Sequence[Part] = PARTS) -> None:
        """Writes the tensors of `parts`, converted by `table`, to one file or to several with an index."""
        language = self.model.language
        steps = plan_out(table, [name for name in inventory(self.model) if part_of(name) in parts])
        sizes = {}
        for step in steps:
            item_bytes = (self.dtype or self.source.dtype(step.ours)).itemsize
            shapes = step.entry.their_shapes(self.source.shape(step.ours), language)
            for name, shape in zip(step.theirs, shapes, strict=True):
                if name in sizes:
                    raise ConversionError(f"{name} would be written twice, the second time from {step.ours}")
                sizes[name] = math.prod(shape) * item_bytes
        tensors = convert_steps(steps, self.source, language, self.dtype)
        shards = _split(sizes, self.max_shard_bytes)
        files: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
            self._write_shard(target / file, islice(tensors, len(names)))
            files |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(files.items()))}
            _write_json(target / f"{stem}.safetensors.index.json", index)

    def _write_shard(self, path: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        shard = {}
        for name, tensor in tensors:
            shard[name] = tensor
            self.advance(tensor.numel())
            del tensor  # before the next one is made
        try:
            save_file(shard, path, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk
            raise CheckpointError(f"{path} was not written: {error}") from None
        shutil.copymode(path.with_name("config.json"), path)  # safetensors makes its files readable by the owner only

    def _dtype(self, part: Part) -> str:
        """`torch_dtype` of a part: the dtype of its first tensor."""
        if self.dtype is not None:
            return str(self.dtype).removeprefix("torch.")
        name = next(name for name in inventory(self.model) if part_of(name) is part)
        return str(self.source.dtype(name)).removeprefix("torch.")


FORMATS = {"ross": Export.write_ross, "stage1": Export.write_stage1, "hf": Export.write_parts}


@contextmanager
def _atomic(save: Path) -> Iterator[Path]:
    """A folder beside `save` that is renamed to it at the end; one left by a dead process is removed first.

    Raises CheckpointError when `save` is a file or not empty.
    """
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise CheckpointError(f"{save} exists already; give --save a folder that does not")
    save = checked.real_path(save)
    partial = save.with_name(f".{save.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    try:
        save.parent.mkdir(parents=True, exist_ok=True)
        require_renames(save.parent)
        partial.mkdir()
        yield partial
        for path in (*(path for path in partial.rglob("*") if path.is_file()), partial):
            sync(path)
        partial.rename(save)
        sync(save.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _token_id(config: dict[str, Any], key: str, default: int | None) -> int | None:
    """Raises ValueError."""
    return default if config.get(key) is None else checked.count(config, key, least=0)


def _split(sizes: dict[str, int], most: int) -> list[list[str]]:
    """Names in order, in groups of at most `most` bytes; a larger tensor is a group of its own."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    return groups


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
