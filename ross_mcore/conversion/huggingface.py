"""Reads configurations and tensors in the formats of Hugging Face, diffusers and the reference implementation.

Reads only JSON, safetensors and, with `weights_only`, files of torch.save. Nothing is downloaded or executed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ross_mcore import checked
from ross_mcore.architecture import (
    DenoiserConfig,
    LanguageConfig,
    ModelConfig,
    PixelDecoderConfig,
    ProjectorConfig,
    VisionConfig,
)
from ross_mcore.checkpoint.safe_load import LFS_POINTER, read_adapter, read_tensors
from ross_mcore.conversion.export_config import RunFacts, ross_facts
from ross_mcore.data.image import ImageAspectRatio
from ross_mcore.errors import ArchitectureError, ConversionError
from ross_mcore.library_configs import (
    MOST_LAYERS,
    VISION_KEYS,
    check_processor,
    require_plain_latents,
    unused_in_language,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WEIGHT_FILES = (
    *("model.safetensors", "diffusion_pytorch_model.safetensors"),
    *("pytorch_model.bin", "diffusion_pytorch_model.bin"),
)
"""Names of a folder's weights, or of their index with `.index.json`; the first that exists is read, as in transformers.
"""
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TRAINING_FACTS = ("image_aspect_ratio", "mm_use_im_start_end", "tokenizer_model_max_length")
"""Keys of the reference's config.json that say how a model was trained: fields of RunFacts with the same names."""
GENERATION_CONFIG = "generation_config.json"
"""Sampling defaults and the ids that end an answer; kept with the tokenizer, whose ids it holds."""
VISION_DEFAULTS = {
    # transformers' defaults of fields that a config.json may omit
    "siglip_vision_model": {"patch_size": 16, "image_size": 224},
    "clip_vision_model": {"patch_size": 32, "image_size": 224},
}
VISION_COMMON_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
}
VISION_TOWER_OF = {"siglip": "siglip_vision_model", "clip": "clip_vision_model"}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON mapping. Raises ConversionError naming the file."""
    try:
        return checked.mapping(checked.read_json(path), "it")
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist; expected a folder saved with save_pretrained") from None
    except ValueError as error:
        raise ConversionError(f"{path} cannot be read: {error}") from None


def read_language_config(folder: Path) -> LanguageConfig:
    """The decoder in `folder`. Raises ArchitectureError or ConversionError naming the folder."""
    config = read_json(folder / "config.json")
    try:
        return LanguageConfig.from_huggingface(config)
    except ArchitectureError as error:
        raise ArchitectureError(f"{folder / 'config.json'}: {error}") from None


def language_remarks(folder: Path) -> list[str]:
    """What is ignored in the config.json of a language model. Raises ConversionError."""
    path = folder / "config.json"
    return [f"{path}: {remark}" for remark in unused_in_language(read_json(path))]


def read_vision_config(folder: Path, select_layer: int = -2) -> VisionConfig:
    """The vision tower in `folder`, which may also hold a text tower. Raises as `read_language_config` does."""
    config = read_json(folder / "config.json")
    processor = read_json(folder / "preprocessor_config.json")
    try:
        config = _tower_of(config)
        kind = str(config.get("model_type"))
        vision = VisionConfig(
            huggingface={**VISION_COMMON_DEFAULTS, **VISION_DEFAULTS.get(kind, {}), **_without_origin(config)},
            image_mean=_channels(processor, "image_mean"),
            image_std=_channels(processor, "image_std"),
            select_layer=select_layer,
        )
        crop = kind == "clip_vision_model"
        check_processor(processor, crop, vision.image_size, vision.image_mean, vision.image_std)
        return vision
    except ValueError as error:
        raise ArchitectureError(
            f"{folder} (config.json, preprocessor_config.json): {error}; copy it again, or give another"
        ) from None


def _tower_of(config: dict[str, Any]) -> dict[str, Any]:
    """The tower's configuration, also from a model with two towers. Raises ValueError.

    Old CLIP folders describe the tower twice. There transformers follows `vision_config_dict`, and takes its own
    defaults for the keys that it lacks.
    """
    kind = VISION_TOWER_OF.get(str(config.get("model_type")))
    if kind is None:
        return config
    inner, former = (checked.mapping(config.get(k) or {}, k) for k in ("vision_config", "vision_config_dict"))
    whole = {**VISION_COMMON_DEFAULTS, **VISION_DEFAULTS[kind], **former} if former else {}
    for key in VISION_KEYS:
        if key in inner and key in whole and inner[key] != whole[key]:
            raise ValueError(
                f"vision_config has {key}={checked.shown(inner[key])} and vision_config_dict "
                f"{checked.shown(whole[key])}; remove vision_config_dict if the first is right"
            )
    if inner.get("model_type", kind) != kind:
        raise ValueError(f"model_type is {config['model_type']!r} and that in vision_config {inner['model_type']!r}")
    return {"model_type": kind, **inner, **former}


def _channels(processor: dict[str, Any], key: str) -> tuple[float, float, float]:
    """One number for each colour channel. Raises ValueError."""
    values = processor.get(key)
    if not isinstance(values, list) or len(values) != 3:
        raise ValueError(f"{key} is {checked.shown(values)}, expected 3 numbers")
    red, green, blue = (checked.real({key: value}, key) for value in values)
    return red, green, blue


def read_pixel_decoder_config(folder: Path) -> PixelDecoderConfig:
    """The AutoencoderKL in `folder`. Raises as `read_language_config` does."""
    config = read_json(folder / "config.json")
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL" or "latent_channels" not in config:
        hint = "; give its vae/ folder" if (folder / "vae").is_dir() else ""
        kind = checked.shown(config.get("_class_name"))
        raise ArchitectureError(f"{folder / 'config.json'} is that of a {kind}, expected an AutoencoderKL{hint}")
    try:
        require_plain_latents(config)
        return PixelDecoderConfig(_without_origin(config))
    except ValueError as error:
        raise ArchitectureError(f"{folder / 'config.json'}: {error}") from None


@dataclass(frozen=True)
class RossFolder:
    """A full checkpoint of the reference implementation, and the folders that its config.json points to."""

    path: Path
    config: dict[str, Any]
    vision_model: Path
    pixel_decoder: Path | None
    """None for the LLaVA baseline, which has `ross_enable` false."""

    def model_config(self) -> ModelConfig:
        """The architecture. Raises ArchitectureError or ConversionError naming the file and the key."""
        config, file = self.config, self.path / "config.json"
        for key, only in (("s2", False), ("mm_patch_merge_type", "flat")):
            if config.get(key, only) not in (only, None):
                raise ArchitectureError(f"{file}: {key}={checked.shown(config[key])} is not implemented; only {only!r}")
        try:
            vision = read_vision_config(self.vision_model)
            if vision.model_type == "clip_vision_model":  # the reference's SigLIP always reads layer -2
                if config.get("mm_vision_select_feature", "patch") != "patch":
                    raise ArchitectureError("mm_vision_select_feature must be 'patch'")
                layer = checked.count(config, "mm_vision_select_layer", -2, least=-MOST_LAYERS, most=-1)
                vision = read_vision_config(self.vision_model, layer)
            model = ModelConfig(
                language=read_language_config(self.path),
                vision=vision,
                projector=ProjectorConfig(str(config.get("mm_projector_type", "linear"))),
                denoiser=None
                if self.pixel_decoder is None
                else DenoiserConfig.from_type(
                    str(config.get("mm_inv_projector_type")),
                    None if config.get("mm_inv_width") is None else checked.count(config, "mm_inv_width"),
                ),
                pixel_decoder=None if self.pixel_decoder is None else read_pixel_decoder_config(self.pixel_decoder),
            )
        except ArchitectureError as error:
            raise error if str(error).startswith(str(file)) else ArchitectureError(f"{file}: {error}") from None
        except ValueError as error:
            raise ArchitectureError(f"{file}: {error}") from None
        parts = " and ".join(str(part) for part in (self.vision_model, self.pixel_decoder) if part)
        for key, ours in ross_facts(model).items():
            if config.get(key) not in (ours, None):
                raise ArchitectureError(
                    f"{file}: {key} is {checked.shown(config[key])}, but {ours} in {parts}. Give the folders that this "
                    "model was trained with"
                )
        return model

    def training_facts(self) -> dict[str, Any]:
        """How its training read pictures, and where the reference cuts its prompts, for train_state.json.

        Raises ConversionError naming the file and the key.
        """
        known = {key: self.config[key] for key in TRAINING_FACTS if self.config.get(key) is not None}
        try:
            checked.build(RunFacts, known, "it")
            if known.get("image_aspect_ratio", "square") not in get_args(ImageAspectRatio):
                raise ValueError(
                    f"image_aspect_ratio {checked.shown(known['image_aspect_ratio'])} is not implemented; expected one "
                    f"of {', '.join(get_args(ImageAspectRatio))}"
                )
        except ValueError as error:
            raise ConversionError(f"{self.path / 'config.json'}: {error}") from None
        return known


def open_ross(
    folder: Path, base: Path | None = None, vision_model: Path | None = None, pixel_decoder: Path | None = None
) -> RossFolder:
    """Finds the folders of tower and VAE: the given ones, or those named in config.json.

    A relative path in config.json is looked up in `base`, in the working directory, in the checkpoint's folder and in
    all folders above it; at last its final name in the checkpoint's folder. Raises ConversionError naming key and
    remedy.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")

    def find(key: str, flag: str) -> Path:
        named = config.get(key)
        if not isinstance(named, str) or not named:
            raise ConversionError(f"{folder / 'config.json'} has no {key}; give the folder with {flag}")
        real = checked.real_path(folder)
        starts = [*([base] if base else []), Path(), real, *real.parents]
        for candidate in (*(start / named for start in starts), real / Path(named).name):
            with suppress(OSError):  # a name too long for the file system
                if (candidate / "config.json").is_file():
                    return candidate
        raise ConversionError(
            f"{folder / 'config.json'}: {key} {checked.shown(named)} is not a folder with a config.json, as it is or "
            f"relative to the checkpoint; give the folder with {flag}"
        )

    return RossFolder(
        folder,
        config,
        vision_model or find("mm_vision_tower", "--vision-model"),
        (pixel_decoder or find("mm_pixel_decoder", "--pixel-decoder")) if config.get("ross_enable") else None,
    )


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer's files. Raises ConversionError when `source` has none."""
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not any(path.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for path in files):
        raise ConversionError(f"{source} has no tokenizer.json, tokenizer.model or vocab.json; give a folder with one")
    target.mkdir(exist_ok=True)
    for path in files:
        try:
            checked.require_regular(path, checked.MOST_TOKENIZER_FILE_BYTES)
            if path.suffix == ".json":
                checked.read_json(path, checked.MOST_TOKENIZER_FILE_BYTES)
        except ValueError as error:
            raise ConversionError(f"{path} cannot be used: {error}; copy it again") from None
        shutil.copyfile(path, target / path.name)


def _without_origin(config: dict[str, Any]) -> dict[str, Any]:
    """Without keys that begin with an underscore, which name the version and the path that wrote the folder."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _require_finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    """`tensor`, read from `path`. Raises ConversionError for one that training would refuse to start from."""
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):  # without a copy
        raise ConversionError(
            f"{path}: tensor {checked.printable(name)} has numbers that are not finite, from which no training can "
            "start; give other weights"
        )
    return tensor


def open_tensors(path: Path) -> AdapterFile | WeightsFolder:
    """Opens a folder of weights or a stage-1 adapter file. Raises ConversionError or CheckpointError naming it."""
    return AdapterFile(path) if Path(path).is_file() else WeightsFolder(path)


class AdapterFile:
    """`mm_projector.bin` or `mm_inv_projector.bin` of stage 1 of the reference or of LLaVA.

    Prefixes before `mm_projector.` become `model.`, as in the reference: `model.mm_projector.0.weight`.
    Raises CheckpointError when the file is not a plain dictionary of tensors.
    """

    read_from = ""
    unread: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[str, Tensor] = {
            re.sub(r"^.*?(mm_projector|mm_inv_projector)\.", r"model.\1.", str(name)): tensor
            for name, tensor in read_adapter(path).items()
        }

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return _require_finite(self._path, name, self._tensors[name])


class _Pickled:
    """A file of torch.save, with the methods of an open safetensors file that are used here."""

    def __init__(self, path: Path) -> None:
        self._tensors = read_tensors(path)

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]


class WeightsFolder:
    """The tensors of one file of WEIGHT_FILES, or of several with an index, each read when asked for.

    `read_from`: the name of that file or index. `unread`: other weights beside it that are not read.
    Raises ConversionError when there are none, when the index names a file outside the folder, or when a file is
    missing or damaged; CheckpointError for a pickle that holds more than tensors.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)
        self._file_of: dict[str, str] = {}
        self._open: tuple[str, Any] | None = None
        there = [name for file in WEIGHT_FILES for name in (file, f"{file}.index.json") if self._exists(name)]
        if not there:
            raise ConversionError(self._nothing_to_read())
        self.read_from, *self.unread = there
        if not self.read_from.endswith(".json"):
            self._file_of = dict.fromkeys(self._shard(self.read_from).keys(), self.read_from)
            return
        index = self._folder / self.read_from
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConversionError(f"{index} has no mapping 'weight_map'")
        self._file_of = {str(name): str(file) for name, file in weight_map.items()}
        suffix = Path(self.read_from.removesuffix(".index.json")).suffix
        for file in sorted(set(self._file_of.values())):
            if Path(file).name != file or not file.endswith(suffix):
                raise ConversionError(f"{index} names {checked.shown(file)}, which is not a file of that folder")
            listed = {name for name, where in self._file_of.items() if where == file}
            held = set(self._shard(file).keys())
            if listed != held:
                example = sorted(listed ^ held)[0]
                where = "in the index but not in the file" if example in listed else "in the file but not in the index"
                raise ConversionError(f"{self._folder / file}: tensor {checked.shown(example)} is {where}")

    def _exists(self, name: str) -> bool:
        return (self._folder / name).exists()

    def _nothing_to_read(self) -> str:
        """The message for a folder without a file of WEIGHT_FILES."""
        if not self._folder.is_dir():
            return f"{self._folder} does not exist or is not a folder; give one of safetensors"
        others = sorted(path.name for pattern in OTHER_WEIGHTS for path in self._folder.glob(pattern))
        found = f"; it has {checked.printable(others[0])}, which is not read" if others else ""
        return (
            f"{self._folder} has no {', '.join(WEIGHT_FILES)} (nor an index of several){found}: give a folder written "
            "by save_pretrained"
        )

    def _shard(self, file: str) -> Any:
        """An open file; the last one stays open for the next tensor."""
        if self._open is None or self._open[0] != file:
            self._open = None
            self._open = (file, self._opened(file))
        return self._open[1]

    def _opened(self, file: str) -> Any:
        path = self._folder / file
        if not path.is_file():
            raise ConversionError(f"{path} is missing, but the index names it")
        if not file.endswith(".safetensors"):
            return _Pickled(path)
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            with path.open("rb") as stream:
                is_pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
            problem = "is a Git LFS pointer, not the weights" if is_pointer else "is not a whole safetensors file"
            remedy = "run git lfs pull in its folder" if is_pointer else "copy it again"
            raise ConversionError(f"{path} {problem}: {checked.reason(error)}; {remedy}") from None

    def names(self) -> Iterable[str]:
        return self._file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        shard = self._shard(self._file_of[name])
        return shard.shape(name) if isinstance(shard, _Pickled) else tuple(shard.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        # opened again for each tensor: in one memory map, every page read so far would stay in memory
        file = self._file_of[name]
        tensor: Tensor = self._opened(file).get_tensor(name)
        if tensor.dtype not in FLOATS:
            raise ConversionError(
                f"{self._folder / file}: tensor {name} is {tensor.dtype}; only plain floats can be converted: give a "
                "folder of those"
            )
        return _require_finite(self._folder / file, name, tensor)
