"""Small models and folders of their tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from ross_mcore.architecture import (
    DenoiserConfig,
    LanguageConfig,
    ModelConfig,
    PixelDecoderConfig,
    ProjectorConfig,
    VisionConfig,
)


class Held:
    """Tensors in memory, with the interface of a source of a conversion."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> Iterable[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def language_config(family: str = "qwen2", tied: bool = False, groups: int = 2) -> LanguageConfig:
    return LanguageConfig(
        model_type=family,  # type: ignore[arg-type]
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=groups,
        head_dim=4,
        vocab_size=150,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=tied,
        qkv_bias=family == "qwen2",
    )


SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
    "shift_factor": 0.1,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@pytest.fixture
def model_config() -> ModelConfig:
    return ModelConfig(
        language=language_config(),
        vision=VisionConfig(SIGLIP, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        projector=ProjectorConfig(),
        denoiser=DenoiserConfig(depth=2, width=16, num_heads=4),
        pixel_decoder=PixelDecoderConfig(VAE),
    )


def huggingface_language_tensors(config: LanguageConfig, seed: int = 0) -> dict[str, Tensor]:
    """A decoder under Hugging Face's names, every value different."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    tensors = {"model.embed_tokens.weight": draw(config.vocab_size, hidden), "model.norm.weight": draw(hidden)}
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = draw(config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q_proj", width), ("k_proj", keys), ("v_proj", keys)):
            tensors[f"{prefix}self_attn.{name}.weight"] = draw(rows, hidden)
            if config.qkv_bias:
                tensors[f"{prefix}self_attn.{name}.bias"] = draw(rows)
        tensors[f"{prefix}self_attn.o_proj.weight"] = draw(hidden, width)
        tensors[f"{prefix}mlp.gate_proj.weight"] = draw(config.intermediate_size, hidden)
        tensors[f"{prefix}mlp.up_proj.weight"] = draw(config.intermediate_size, hidden)
        tensors[f"{prefix}mlp.down_proj.weight"] = draw(hidden, config.intermediate_size)
        tensors[f"{prefix}input_layernorm.weight"] = draw(hidden)
        tensors[f"{prefix}post_attention_layernorm.weight"] = draw(hidden)
    return tensors


@pytest.fixture
def source_folders(tmp_path: Path, model_config: ModelConfig) -> dict[str, Path]:
    """Folders as save_pretrained writes them: "language", "vision", "pixel_decoder"."""
    from ross_mcore.models import pixel_decoder, vision

    def fill(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}

    def folder(name: str, config: dict[str, Any], tensors: dict[str, Tensor], stem: str = "model") -> Path:
        path = tmp_path / "sources" / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
        save_file(tensors, path / f"{stem}.safetensors")
        return path

    language = model_config.language
    fields = {name: value for name, value in vars(language).items() if name != "qkv_bias"}
    folders = {
        "language": folder("language", fields, huggingface_language_tensors(language)),
        "vision": folder("vision", SIGLIP, fill(vision.weight_shapes(model_config.vision), 1)),
        "pixel_decoder": folder(
            "vae",
            {"_class_name": "AutoencoderKL", **VAE},
            fill(pixel_decoder.weight_shapes(model_config.pixel_decoder), 2),  # type: ignore[arg-type]
            "diffusion_pytorch_model",
        ),
    }
    words = Tokenizer(WordLevel({"a": 0, "<unk>": 1}, "<unk>"))
    words.save(str(folders["language"] / "tokenizer.json"))
    (folders["language"] / "tokenizer_config.json").write_text('{"unk_token": "<unk>"}')
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 28, "width": 28}}
    (folders["vision"] / "preprocessor_config.json").write_text(json.dumps(processor))
    return folders
