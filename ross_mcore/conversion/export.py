"""Exports a checkpoint to the formats of Hugging Face, diffusers and the reference, holding one shard at a time.

Everything is planned first, then written into a folder beside the target and renamed: the target exists whole or not at
all.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from ross_mcore.conversion import export_config, llava, mapping
from ross_mcore.conversion.chat_template import as_jinja, gap_of, spec_of
from ross_mcore.conversion.export_config import RunFacts, SpecialTokens
from ross_mcore.conversion.huggingface import GENERATION_CONFIG, read_json
from ross_mcore.conversion.table import AnyEntry, convert_steps, plan_out
from ross_mcore.conversion.tokenizer_files import (
    SLOW_FILES,
    has_chat_template,
    set_chat_template,
    write_json,
    write_tokenizer,
)
from ross_mcore.data.image import ImagePreprocessing
from ross_mcore.data.templates import OF_TOKENIZER, answer_end, end_of_answer
from ross_mcore.errors import CheckpointError, ConversionError
from ross_mcore.models.inventory import inventory
from ross_mcore.parts import DENOISER, LANGUAGE_MODEL, PARTS, PROJECTOR, VAE, VISION_TOWER, Part, part_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LLAVA_PARTS = (VISION_TOWER, PROJECTOR, LANGUAGE_MODEL)
JINJA = "chat_template.jinja"
GIVE_TEMPLATE = "give --template for one"
ADAPTERS = {PROJECTOR: "mm_projector.bin", DENOISER: "mm_inv_projector.bin"}
"""The parts that stage 1 of the reference trains, and the files it saves them in."""


@dataclass(frozen=True)
class ExportOptions:
    """How an export is written."""

    dtype: torch.dtype | None = None
    """Of every tensor; None keeps the dtype of each."""
    max_shard_bytes: int = 5 * 10**9
    mm_vision_tower: str | None = None
    """Path of an existing tower to write into config.json; None writes the tower."""
    mm_pixel_decoder: str | None = None
    """The same of the VAE."""
    relative_paths: bool = False
    """Whether config.json refers to the written folders as `./name`."""
    template: str | None = None
    """A value of --template, of which the chat template is written; None: the training's."""


class Export:
    """Exports one checkpoint. Raises CheckpointError or ConversionError naming a missing or unexpected tensor."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: PreTrainedTokenizerBase,
        options: ExportOptions = ExportOptions(),
        advance: Callable[[int], None] = lambda parameters: None,
    ) -> None:
        """tokenizer: the checkpoint's; token ids in a generation_config.json that came with the model take precedence.

        advance: called with the number of parameters written.
        """
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.options = options
        self.advance = advance
        self.notes: list[str] = []
        self.model = checkpoint.model_config()
        self.source = StoredTensors(checkpoint.path)
        tokens = SpecialTokens(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self.spec = spec_of(checkpoint, options.template, tokenizer)
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
        if options.mm_pixel_decoder and not self.model.pixel_decoder:
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
            self._add_reference_remarks(save, partial)

    def _add_reference_remarks(self, save: Path, written: Path) -> None:
        """Notes what the reference's load_pretrained_model needs to read `save`, one sentence each.

        It chooses its class by the folder's name without case, and reads slow tokenizers only (its builder.py:50-66).
        """
        qwen, name = self.model.language.model_type == "qwen2", checked.real_path(save).name
        if qwen != ("qwen2" in name.lower()):
            wanted = "has Qwen2 in it" if qwen else "does not have qwen2 in it"
            self.notes.append(f"the reference picks its class by the folder's name: rename {name} to one that {wanted}")
        if not any(all((written / name).exists() for name in files) for files in (("tokenizer.model",), SLOW_FILES)):
            self.notes.append(
                "the reference loads a slow tokenizer: put tokenizer.model of the original beside it, or its "
                f"{' and '.join(SLOW_FILES)}"
            )
        if self.run.mm_use_im_start_end and not {"<im_start>", "<im_end>"} <= self.tokenizer.get_vocab().keys():
            self.notes.append(
                "it was trained with <im_start> and <im_end> as text, and the reference's loader adds them as tokens "
                "with new embeddings: for its code, set mm_use_im_start_end in config.json to false"
            )

    def write_llava(self, save: Path) -> None:
        """Writes language model, tower and projector for transformers' LlavaForConditionalGeneration."""
        dtype = self._dtype(LANGUAGE_MODEL)
        tokenizer = llava.llava_tokenizer(self.tokenizer, self.spec)
        rows = max(self.model.language.vocab_size, tokenizer.image_token + 1)
        table = llava.llava_table(self.model, rows)
        pixels = ImagePreprocessing.for_tower(self.model.vision, processor=self.checkpoint.image_processor())
        config = llava.llava_config(self.model, self.tokens, dtype, rows, tokenizer.image_token)
        files = {
            "config.json": config,
            GENERATION_CONFIG: llava.generation_config(self.tokens, tokenizer.ends),
            **tokenizer.files(self.tokenizer, self.model.language.max_position_embeddings),
            **llava.processor_files(self.model, pixels.resample, self.run.image_aspect_ratio),
        }
        with _atomic(save) as partial:
            for name, content in files.items():
                write_json(partial / name, content)
            if tokenizer.chat_template is not None:
                (partial / JINJA).write_text(tokenizer.chat_template, encoding="utf-8")
            self._write_tensors(partial, "model", table, LLAVA_PARTS)
        if tokenizer.chat_template is None:
            self.notes.append(f"it has no chat template, because {self._why_no_template}; {GIVE_TEMPLATE}")
        elif end_of_answer(self.spec, self.tokenizer) is None:
            end = answer_end(self.spec, self.tokenizer)
            self.notes.append(
                f"answers end at {end!r}, which is no token of the tokenizer, so that programs go on to their most new "
                f"tokens: give generate() stop_strings=[{end!r}] and the tokenizer, vLLM stop=[{end!r}]"
            )
        if DENOISER.own(self.source.names()):
            self.notes.append("denoiser and VAE are left out; transformers has no place for them")

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
            write_json(language / "config.json", config)
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
        beside: tuple[Part, ...] = () if self.options.mm_vision_tower else (VISION_TOWER,)
        beside += () if self.options.mm_pixel_decoder else (VAE,)
        return {
            "ross": self.parameters(*PARTS) + self.parameters(*beside),
            "stage1": self.parameters(*ADAPTERS, *beside),
            "hf": self.parameters(*PARTS),
            "llava": self.parameters(*LLAVA_PARTS),
        }[format]

    @property
    def run(self) -> RunFacts:
        """The facts of the training for config.json. Raises CheckpointError for a damaged file."""
        state = self.checkpoint.train_state()
        known = {field.name: state[field.name] for field in fields(RunFacts) if state.get(field.name)}
        known["tower_trained"] = bool(VISION_TOWER.own(self.source.trained))
        if "image_aspect_ratio" in known:  # of several data sets, the first one's
            known["image_aspect_ratio"] = str(known["image_aspect_ratio"]).partition(",")[0]
        try:
            return checked.build(RunFacts, known, "it")
        except ValueError as error:
            raise CheckpointError(f"{self.checkpoint.path / TRAIN_STATE}: {error}; copy the checkpoint again") from None

    def _path_of(self, folder: str, save: Path) -> str:
        """How config.json refers to a folder in `save`."""
        return f"./{folder}" if self.options.relative_paths else str(checked.real_path(save) / folder)

    def _write_config(self, save: Path, partial: Path, saved_by_pretrain: bool = False) -> None:
        """Writes the reference's config.json, and the folders it points to unless their paths were given."""
        has_vae = self.model.pixel_decoder is not None
        tower = self.options.mm_vision_tower or self._path_of(self.tower_folder, save)
        vae = (self.options.mm_pixel_decoder or self._path_of(VAE.prefix, save)) if has_vae else None
        run = replace(self.run, training_stage="pretrain") if saved_by_pretrain else self.run
        config = export_config.ross_config(
            self.model, self.tokens, self._dtype(LANGUAGE_MODEL), run, vision_tower=tower, pixel_decoder=vae
        )
        if saved_by_pretrain:  # stage 1 saves the configuration without a model, hence without these
            del config["architectures"], config["torch_dtype"]
        write_json(partial / "config.json", config)
        if self.options.mm_vision_tower is None:
            self._write_tower(partial)
        if self.options.mm_pixel_decoder is None:
            self._write_pixel_decoder(partial)

    def _write_tokenizer(self, target: Path) -> None:
        """Writes the tokenizer with the chat template of the training, and generation_config.json.

        The tokenizer keeps its own template where the language model was not trained here or was trained with it.
        """
        write_tokenizer(self.checkpoint.tokenizer, target)
        write_json(target / GENERATION_CONFIG, self.generation)
        name, is_own = self.spec.template, self.spec.template.startswith(f"{OF_TOKENIZER}#")
        if name == "plain" and self.run.training_stage == "pretrain" and self.options.template is None:
            return
        if name and not is_own:
            template = as_jinja(self.spec, self.tokenizer, gap_of(self.tokenizer))
            if template is None and has_chat_template(target):
                self.notes.append(f"the tokenizer's chat template was left out, because {self._why_no_template}")
            set_chat_template(target, template)

    @property
    def _why_no_template(self) -> str:
        return "template plain has no turns" if self.spec.template else "this model was converted and not trained"

    def _write_tower(self, partial: Path) -> None:
        target = partial / self.tower_folder
        target.mkdir()
        write_json(target / "config.json", export_config.vision_config(self.model.vision, self._dtype(VISION_TOWER)))
        self.checkpoint.image_processor()  # refuses a malformed file here, not when its copy is read
        shutil.copyfile(self.checkpoint.preprocessor_config, target / "preprocessor_config.json")
        self._write_part(target, "model", VISION_TOWER)

    def _write_pixel_decoder(self, partial: Path) -> None:
        if self.model.pixel_decoder is not None:
            target = partial / VAE.prefix
            target.mkdir()
            write_json(target / "config.json", export_config.pixel_decoder_config(self.model.pixel_decoder.diffusers))
            self._write_part(target, "diffusion_pytorch_model", VAE)

    def _write_adapters(self, partial: Path) -> None:
        for part, file in ADAPTERS.items():
            steps = plan_out(mapping.part_table(part, self.model), part.own(self.source.names()))
            tensors = convert_steps(steps, self.source, self.model.language, self.options.dtype)
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
            item_bytes = (self.options.dtype or self.source.dtype(step.ours)).itemsize
            shapes = step.entry.their_shapes(self.source.shape(step.ours), language)
            for name, shape in zip(step.theirs, shapes, strict=True):
                if name in sizes:
                    raise ConversionError(f"{name} would be written twice, the second time from {step.ours}")
                sizes[name] = math.prod(shape) * item_bytes
        tensors = convert_steps(steps, self.source, language, self.options.dtype)
        shards = _split(sizes, self.options.max_shard_bytes)
        files: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
            self._write_shard(target / file, islice(tensors, len(names)))
            files |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(files.items()))}
            write_json(target / f"{stem}.safetensors.index.json", index)

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
        if self.options.dtype is not None:
            return str(self.options.dtype).removeprefix("torch.")
        name = next(name for name in inventory(self.model) if part_of(name) is part)
        return str(self.source.dtype(name)).removeprefix("torch.")


FORMATS = {
    "ross": Export.write_ross,
    "stage1": Export.write_stage1,
    "hf": Export.write_parts,
    "llava": Export.write_llava,
}


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
