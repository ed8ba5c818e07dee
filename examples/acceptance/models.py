"""Writes models with random weights in Hugging Face's layout.

small: four layers, with sizes that two ranks divide and FP8 accepts; tower and VAE are the demo's.
medium: 0.7 billion parameters in the language model, with tower and VAE in the shapes of SigLIP-SO400M and the FLUX
VAE.
full: the shapes of Qwen2-7B with its vocabulary, 15 GB, and the same tower and VAE.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).parents[2] / "tests" / "published"
VOCABULARY = 512
"""The demo's tokenizer has 484 entries."""
LANGUAGE: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
    },
    "medium": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "full": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_theta": 1e6,
    },
}


def write_language_model(size: str, folder: Path) -> None:
    import torch
    from transformers import Qwen2ForCausalLM
    from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

    common = {"vocab_size": VOCABULARY, "max_position_embeddings": 32768, "tie_word_embeddings": False}
    torch.set_default_dtype(torch.float32 if size == "small" else torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() and size != "small" else "cpu"):  # draws 7 billion numbers
        model = Qwen2ForCausalLM(Qwen2Config(**common | LANGUAGE[size]))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def write_frozen_parts(folder: Path) -> None:
    """Vision tower and VAE of published shapes."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import SiglipVisionModel
    from transformers.models.siglip.configuration_siglip import SiglipVisionConfig

    tower = PUBLISHED / "siglip-so400m-patch14-384"
    config = json.loads((tower / "config.json").read_text(encoding="utf-8"))
    model = SiglipVisionModel(SiglipVisionConfig(**config.get("vision_config", config)))
    model.to(torch.bfloat16).save_pretrained(folder / "vision_model")
    shutil.copy(tower / "preprocessor_config.json", folder / "vision_model")
    vae = json.loads((PUBLISHED / "flux.1-dev-vae" / "config.json").read_text(encoding="utf-8"))
    AutoencoderKL.from_config(vae).save_pretrained(folder / "pixel_decoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(LANGUAGE), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    import torch

    torch.manual_seed(1)
    write_language_model(options.size, options.out / "language_model")
    if options.size != "small":
        write_frozen_parts(options.out)


if __name__ == "__main__":
    main()
