"""Full checkpoints of the reference in every combination of families, made with the libraries' own modules."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ross_mcore.architecture import DenoiserConfig
from ross_mcore.models.denoiser import Denoiser
from tests.recorded import GOLDEN

VOCABULARY = 613
"""A prime above the tokenizers' largest id: no padding multiple divides it."""
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
TOKENIZERS = {"qwen2": GOLDEN / "data" / "tok_qwen2", "llama": GOLDEN / "data" / "tok_llama_legacyF"}
AUTOENCODER = GOLDEN / "components" / "tiny_vae"


@dataclass(frozen=True)
class Source:
    """Which checkpoint to make. `tower_prefix`: how its tower's names begin, `vision_model.` or nothing."""

    language: str
    tower: str
    tied: bool = False
    dtype: torch.dtype = torch.float32
    tower_prefix: str = "vision_model."
    projector_type: str = "mlp2x_gelu"

    @property
    def name(self) -> str:
        return f"{self.language}_{self.tower}_{'tied' if self.tied else 'untied'}"

    @property
    def tokenizer(self) -> Path:
        return TOKENIZERS[self.language]


SOURCES = [
    Source(language, tower, tied)
    for language in ("qwen2", "llama")
    for tower in ("siglip", "clip")
    for tied in (False, True)
]


def write_source(
    folder: Path, source: Source, shape: dict[str, int] | None = None, vocabulary: int = VOCABULARY
) -> Path:
    """Writes `folder`/ross, `folder`/<tower>_tower and returns the former; random weights, the tiny recorded VAE."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPVisionModel, LlamaForCausalLM, Qwen2ForCausalLM, SiglipVisionModel
    from transformers.models.clip.configuration_clip import CLIPVisionConfig
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
    from transformers.models.siglip.configuration_siglip import SiglipVisionConfig

    torch.manual_seed(7)
    shape = {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": vocabulary, **(shape or {})}
    fields: dict[str, Any] = {**shape, "tie_word_embeddings": source.tied, "max_position_embeddings": 256}
    view = {**TOWER, "image_size": 28, "patch_size": 14}
    hidden, tower_hidden = shape["hidden_size"], TOWER["hidden_size"]
    with torch.device("meta"):  # names and shapes are what is wanted
        language: nn.Module = {
            "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**fields)),
            "llama": lambda: LlamaForCausalLM(LlamaConfig(**fields)),
        }[source.language]()
        tower: nn.Module = {
            "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**view)),
            "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**view)),
        }[source.tower]()
        vae = AutoencoderKL.from_config(json.loads((AUTOENCODER / "config.json").read_text()))
        denoiser = Denoiser(DenoiserConfig(depth=2, width=32), 64, hidden, 2)
        projector: nn.Module = nn.Linear(tower_hidden, hidden)
        if source.projector_type != "linear":
            projector = nn.Sequential(projector, nn.GELU(), nn.Linear(hidden, hidden))

    tensors: dict[str, Tensor] = dict(language.state_dict())
    if source.tied:
        del tensors["lm_head.weight"]
    tower_state = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    for prefix, state in (
        (f"model.vision_tower.vision_tower.{source.tower_prefix}", tower_state),
        ("model.mm_projector.", projector.state_dict()),
        ("model.mm_inv_projector.net.", denoiser.state_dict()),
        ("model.pixel_decoder.pixel_decoder.", vae.state_dict()),
    ):
        tensors |= {prefix + name: tensor for name, tensor in state.items()}
    tensors = {name: torch.randn(tensor.shape).to(source.dtype) for name, tensor in tensors.items()}
    ross, tower_folder = folder / "ross", folder / f"{source.tower}_tower"
    ross.mkdir(parents=True)
    tower_folder.mkdir()
    save_file(tensors, ross / "model.safetensors", metadata={"format": "pt"})
    kind = {"siglip": "siglip_vision_model", "clip": "clip_vision_model"}[source.tower]
    (tower_folder / "config.json").write_text(json.dumps({"model_type": kind, **view}))
    processor = GOLDEN / "components" / f"tiny_{source.tower}" / "preprocessor_config.json"
    size = json.loads((tower_folder / "config.json").read_text())["image_size"]
    square = {"height": size, "width": size}
    sizes = {"size": square} if source.tower == "siglip" else {"size": {"shortest_edge": size}, "crop_size": square}
    (tower_folder / "preprocessor_config.json").write_text(json.dumps(json.loads(processor.read_text()) | sizes))
    config = {
        **fields,
        "model_type": f"ross_{source.language}",
        "rope_theta": 10000.0,
        "mm_vision_tower": tower_folder.name,
        "mm_pixel_decoder": str(AUTOENCODER),
        "mm_projector_type": source.projector_type,
        "ross_enable": True,
        "mm_inv_projector_type": "denoiser_vit2x",
        "mm_inv_width": 32,
    }
    (ross / "config.json").write_text(json.dumps(config))
    return ross
