"""The recorded models of tests/golden as checkpoints of this trainer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ross_mcore.architecture import (
    DenoiserConfig,
    LanguageConfig,
    ModelConfig,
    PixelDecoderConfig,
    ProjectorConfig,
    VisionConfig,
)
from ross_mcore.checkpoint import mapping
from ross_mcore.checkpoint.assembly import Part, assemble
from ross_mcore.checkpoint.folder import Checkpoint

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("qwen2_siglip", "llama_clip")
TOKENIZERS = {"qwen2_siglip": "tok_qwen2", "llama_clip": "tok_llama_legacyF"}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def recorded_config(family: str) -> ModelConfig:
    """The architecture of `model_<family>`, from the reference's own config.json."""
    config = read_json(GOLDEN / f"model_{family}" / "hf_checkpoint" / "config.json")
    return ModelConfig(
        language=LanguageConfig.from_huggingface(config),
        vision=VisionConfig(
            read_json(GOLDEN / config["mm_vision_tower"] / "config.json"),
            tuple(config["image_mean"]),
            tuple(config["image_std"]),
            config["mm_vision_select_layer"],
        ),
        projector=ProjectorConfig(config["mm_projector_type"]),
        denoiser=DenoiserConfig.from_type(config["mm_inv_projector_type"], config["mm_inv_width"]),
        pixel_decoder=PixelDecoderConfig(read_json(GOLDEN / config["mm_pixel_decoder"] / "config.json")),
    )


def recorded_checkpoint(family: str, root: Path) -> Checkpoint:
    """`model_<family>` converted into `root`, every tensor of the reference's checkpoint included."""
    config = recorded_config(family)
    table = (
        *mapping.ROSS,
        *mapping.PROJECTOR[config.projector.depth == 1],
        *mapping.OUTPUT_MATRIX[config.language.tie_word_embeddings],
    )
    tower = read_json(GOLDEN / f"model_{family}" / "hf_checkpoint" / "config.json")["mm_vision_tower"]
    return assemble(
        root,
        config,
        [Part(GOLDEN / f"model_{family}" / "hf_checkpoint", ("",), table)],
        fresh=(),
        tokenizer=GOLDEN / "data" / TOKENIZERS[family],
        preprocessor_config=GOLDEN / tower / "preprocessor_config.json",
    )


def tied_checkpoint(root: Path) -> Checkpoint:
    """The recorded Qwen2 model with its output matrix tied to the embedding (no recorded values exist for it)."""
    family = "qwen2_siglip"
    config = recorded_config(family)
    config = replace(config, language=replace(config.language, tie_word_embeddings=True))
    tensors = load_file(GOLDEN / f"model_{family}" / "hf_checkpoint" / "model.safetensors")
    del tensors["lm_head.weight"]
    folder = root.with_name(root.name + "_source")
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    table = (*mapping.ROSS, *mapping.PROJECTOR[False], *mapping.OUTPUT_MATRIX[True])
    return assemble(
        root,
        config,
        [Part(folder, ("",), table)],
        fresh=(),
        tokenizer=GOLDEN / "data" / TOKENIZERS[family],
        preprocessor_config=GOLDEN / "components" / "tiny_siglip" / "preprocessor_config.json",
    )


def recorded_tensors(family: str) -> dict[str, torch.Tensor]:
    """oracle.safetensors; floats that were stored as fp16 come back as float32."""
    tensors = load_file(GOLDEN / f"model_{family}" / "oracle.safetensors")
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
