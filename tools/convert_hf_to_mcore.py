"""Makes one sharded checkpoint, loadable at every layout, of a language model, a vision tower and a VAE.

Reads folders saved with save_pretrained (safetensors only), streams them tensor by tensor, and adds a projector and a
denoiser with fresh weights. No model is built, so memory stays near the largest tensor.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ross_mcore.architecture import ModelConfig
    from ross_mcore.checkpoint.folder import Checkpoint

EXAMPLE = """example:
  python tools/convert_hf_to_mcore.py --language-model Qwen2-7B-Instruct --vision-model siglip-so400m-patch14-384 \\
      --pixel-decoder FLUX.1-dev/vae --dtype bfloat16 --save checkpoints/base

The result, SAVE/iter_0000000, is what --load of pretrain_ross.py takes. It holds config.json, the tokenizer and the
image processor's configuration beside the weights. Without --pixel-decoder it is a plain LLaVA model (lm_loss alone).
Peak memory: the largest tensor (usually the vocabulary matrix), its converted copy, and the denoiser."""

DTYPE_HELP = "of language model, tower and projector; denoiser and VAE stay in float32 (default: %(default)s)"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--language-model", type=Path, required=True, metavar="DIR", help="Qwen2 or Llama")
    add("--vision-model", type=Path, required=True, metavar="DIR", help="SigLIP or CLIP, with preprocessor_config.json")
    add("--pixel-decoder", type=Path, metavar="DIR", help="AutoencoderKL, the vae/ folder itself")
    add("--tokenizer", type=Path, metavar="DIR", help="where the tokenizer lies, if not with the language model")
    add("--save", type=Path, required=True, metavar="DIR", help="folder to write the checkpoint into")
    add("--projector-type", default="mlp2x_gelu", help="linear or mlp<N>x_gelu (default: %(default)s)")
    add("--denoiser-type", default="denoiser_vit3x", help="denoiser_vit<depth>x (default: %(default)s)")
    add("--denoiser-width", type=int, metavar="N", help="instead of the reference's width for that depth")
    add("--vision-select-layer", type=int, default=-2, help="hidden state that is the feature (default: %(default)s)")
    add("--seed", type=int, default=42, help="of the fresh weights (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=DTYPE_HELP)
    return parser.parse_args(arguments)


def fresh_weights(model: ModelConfig, seed: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Projector and denoiser as they start training, drawn from `seed` alone."""
    import torch

    from ross_mcore.models.denoiser import Denoiser
    from ross_mcore.models.projector import VisionProjection

    generator = torch.Generator().manual_seed(seed)
    hidden = model.language.hidden_size
    projection = VisionProjection(model.projector, model.vision.hidden_size, hidden)
    projection.reset_parameters(generator)
    for name, tensor in projection.state_dict().items():
        yield f"vision_projection.{name}", tensor.to(dtype)
    if model.denoiser and model.pixel_decoder:
        denoiser = Denoiser(model.denoiser, model.pixel_decoder.token_channels, hidden, model.vision.grid)
        denoiser.reset_parameters(generator)
        for name, tensor in denoiser.state_dict().items():
            yield f"denoiser.{name}", tensor


def convert(options: argparse.Namespace) -> Checkpoint:
    """Reads the configurations, then writes the checkpoint. Raises the package's errors."""
    import torch
    from rich.progress import Progress

    from ross_mcore.architecture import DenoiserConfig, ModelConfig, ProjectorConfig
    from ross_mcore.checkpoint import huggingface, mapping
    from ross_mcore.checkpoint.assembly import Part, assemble
    from ross_mcore.checkpoint.inventory import inventory

    language, vision, vae = options.language_model, options.vision_model, options.pixel_decoder
    model = ModelConfig(
        language=huggingface.read_language_config(language),
        vision=huggingface.read_vision_config(vision, options.vision_select_layer),
        projector=ProjectorConfig(options.projector_type),
        denoiser=DenoiserConfig.from_type(options.denoiser_type, options.denoiser_width) if vae else None,
        pixel_decoder=huggingface.read_pixel_decoder_config(vae) if vae else None,
    )
    dtype = getattr(torch, options.dtype)
    output_matrix = mapping.OUTPUT_MATRIX[model.language.tie_word_embeddings]
    parts = [
        Part(language, ("language_model.",), (*mapping.LANGUAGE, *output_matrix), dtype),
        Part(vision, ("vision_model.",), mapping.VISION, dtype),
        *([Part(vae, ("pixel_decoder.",), mapping.PIXEL_DECODER, torch.float32)] if vae else []),
    ]
    with Progress(transient=True) as progress:
        bar = progress.add_task("converting", total=sum(math.prod(shape) for shape in inventory(model).values()))
        return assemble(
            options.save,
            model,
            parts,
            fresh_weights(model, options.seed, dtype),
            tokenizer=options.tokenizer or language,
            preprocessor_config=vision / "preprocessor_config.json",
            advance=lambda parameters: progress.advance(bar, parameters),
        )


def main() -> int:
    options = parse_arguments()
    from ross_mcore.architecture import ArchitectureError
    from ross_mcore.checkpoint.convert import ConversionError
    from ross_mcore.checkpoint.folder import CheckpointError

    try:
        checkpoint = convert(options)
    except (ArchitectureError, ConversionError, CheckpointError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    print(f"wrote {checkpoint.path}; train from it with --load {options.save}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
