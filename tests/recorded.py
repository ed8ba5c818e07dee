"""The recorded models of tests/golden as checkpoints of this trainer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ross_mcore.architecture import ModelConfig
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.conversion.assembly import import_ross
from ross_mcore.conversion.huggingface import open_ross

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("qwen2_siglip", "llama_clip")
TOKENIZERS = {"qwen2_siglip": "tok_qwen2", "llama_clip": "tok_llama_legacyF"}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def recorded_config(family: str) -> ModelConfig:
    """The architecture of `model_<family>`, from the reference's own config.json."""
    return open_ross(GOLDEN / f"model_{family}" / "hf_checkpoint", base=GOLDEN).model_config()


def recorded_checkpoint(family: str, root: Path) -> Checkpoint:
    """`model_<family>` converted into `root`, every tensor of the reference's checkpoint included."""
    source = GOLDEN / f"model_{family}" / "hf_checkpoint"
    return import_ross(root, source, tokenizer=GOLDEN / "data" / TOKENIZERS[family], base=GOLDEN)


def tied_source(folder: Path) -> Path:
    """The recorded Qwen2 model with its output matrix tied to the embedding; no recorded values exist for it."""

    def tie(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config["tie_word_embeddings"] = True
        del tensors["lm_head.weight"]

    return _changed_source(folder, tie)


def deep_source(folder: Path) -> Path:
    """The recorded Qwen2 model with its decoder layers repeated; no recorded values exist for it."""

    def repeat(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        layers = config["num_hidden_layers"]
        config["num_hidden_layers"] = 2 * layers
        for name in [name for name in tensors if name.startswith("model.layers.")]:
            number, rest = name.removeprefix("model.layers.").split(".", 1)
            tensors[f"model.layers.{int(number) + layers}.{rest}"] = tensors[name].clone()

    return _changed_source(folder, repeat)


def one_key_value_head_source(folder: Path) -> Path:
    """The recorded Qwen2 model with the first of its two key-value heads; no recorded values exist for it."""

    def keep_first_head(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config["num_key_value_heads"] = 1
        rows = config["hidden_size"] // config["num_attention_heads"]
        for name in tensors:
            if name.startswith("model.layers.") and name.split(".")[4] in ("k_proj", "v_proj"):
                tensors[name] = tensors[name][:rows].clone()

    return _changed_source(folder, keep_first_head)


def _changed_source(folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    recorded = GOLDEN / "model_qwen2_siglip" / "hf_checkpoint"
    folder.mkdir(parents=True)
    config, tensors = read_json(recorded / "config.json"), load_file(recorded / "model.safetensors")
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


CHANGED = {"tied": tied_source, "deep": deep_source}


def changed_checkpoint(kind: str, root: Path) -> Checkpoint:
    """The model of `CHANGED[kind]`, converted into `root`."""
    source = CHANGED[kind](root.with_name(root.name + "_source"))
    return import_ross(root, source, tokenizer=GOLDEN / "data" / TOKENIZERS["qwen2_siglip"], base=GOLDEN)


def recorded_tensors(family: str) -> dict[str, torch.Tensor]:
    """oracle.safetensors; floats stored as float16 are returned as float32."""
    tensors = load_file(GOLDEN / f"model_{family}" / "oracle.safetensors")
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
