"""Converts Hugging Face folders (language model, vision tower, VAE), or a full checkpoint of the reference
implementation of ROSS, into one sharded checkpoint that loads at every layout.

Folders are those written by save_pretrained: safetensors, or pytorch_model.bin (one file, or several with an index), of
which only tensors are read and no code is run. Tensors are converted one by one, and an unknown or missing tensor is an
error that names it. No model is built. An interrupted conversion leaves no checkpoint.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ross_mcore.commands import build_parser, refuse

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ross_mcore.architecture import ModelConfig
    from ross_mcore.checkpoint.folder import Checkpoint

SCRIPT = "convert_hf_to_mcore.py"

EXAMPLES = """examples:
  a new model, with random weights in projector and denoiser
    python tools/convert_hf_to_mcore.py --language-model Qwen2-7B-Instruct --pixel-decoder FLUX.1-dev/vae \\
        --vision-model siglip-so400m-patch14-384 --dtype bfloat16 --save checkpoints/base
  the start of the reference's stage 2: the command above, with the weights of its stage 1
        --mm-projector stage1/mm_projector.bin --mm-inv-projector stage1/mm_inv_projector.bin
  the result of the reference's stage 2, with denoiser and VAE
    python tools/convert_hf_to_mcore.py --ross-model ross-qwen2-7b --dtype bfloat16 --save checkpoints/ross

The result is SAVE/iter_0000000, with config.json, tokenizer and the image processor's configuration beside the weights;
give SAVE to --load of pretrain_ross.py. Without --pixel-decoder the model is a plain LLaVA model (lm_loss only).
Peak memory: twice the largest tensor (usually the vocabulary matrix), and a randomly initialised denoiser.
tools/convert_mcore_to_hf.py converts back."""

DTYPE_HELP = """type of language model, tower and projector; denoiser and VAE are float32; keep: all types stay
(default: %(default)s)"""
DEFAULTS = {
    "projector_type": "mlp2x_gelu",
    "denoiser_type": "denoiser_vit3x",
    "denoiser_width": None,
    "vision_select_layer": -2,
    "seed": 42,
    "mm_projector": None,
    "mm_inv_projector": None,
}
"""Options of a model made of separate parts; a ROSS checkpoint contains these values."""


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> argparse.Namespace:
    parser = build_parser(prog, __doc__, EXAMPLES)
    sources = parser.add_argument_group("input").add_argument
    sources("--language-model", type=Path, metavar="DIR", help="Qwen2 or Llama folder")
    sources(
        "--vision-model",
        type=Path,
        metavar="DIR",
        help="SigLIP or CLIP folder, with preprocessor_config.json",
    )
    sources("--pixel-decoder", type=Path, metavar="DIR", help="AutoencoderKL folder, usually vae/")
    sources("--tokenizer", type=Path, metavar="DIR", help="folder of the tokenizer (default: the language model's)")
    sources("--mm-projector", type=Path, metavar="FILE", help="projector of stage 1 (default: random weights)")
    sources("--mm-inv-projector", type=Path, metavar="FILE", help="denoiser of stage 1 (default: random weights)")
    sources(
        "--ross-model",
        type=Path,
        metavar="DIR",
        help="a full checkpoint of the reference, instead of separate parts; --vision-model and --pixel-decoder then "
        "replace the paths of the configurations in its config.json",
    )
    parts = parser.add_argument_group("a model made of separate parts").add_argument
    parts("--projector-type", metavar="T", help="linear or mlp<N>x_gelu (default: mlp2x_gelu)")
    parts("--denoiser-type", metavar="T", help="denoiser_vit<depth>x (default: denoiser_vit3x)")
    parts("--denoiser-width", type=int, metavar="N", help="width (default: the reference's for the depth)")
    parts("--vision-select-layer", type=int, metavar="N", help="hidden state that is the features (default: -2)")
    parts("--seed", type=int, metavar="N", help="seed of random weights (default: 42)")
    result = parser.add_argument_group("output").add_argument
    result("--save", type=Path, required=True, metavar="DIR", help="folder to write the checkpoint into")
    result("--dtype", choices=("float32", "bfloat16", "keep"), default="float32", help=DTYPE_HELP)
    overwrite_help = "replace a converted model in SAVE; a training run there is moved to a folder beside it"
    result("--overwrite", action="store_true", help=overwrite_help)
    options = parser.parse_args(arguments)

    if (options.ross_model is None) == (options.language_model is None):
        parser.error("give either --ross-model, or --language-model and --vision-model")
    if options.ross_model:
        given = [name for name in DEFAULTS if getattr(options, name) is not None]
        if given:
            parser.error(f"--{given[0].replace('_', '-')} cannot be used with --ross-model, which contains it")
    elif options.vision_model is None:
        parser.error("--language-model needs --vision-model")
    if options.mm_inv_projector and not options.pixel_decoder:
        parser.error("--mm-inv-projector needs --pixel-decoder, whose latents it denoises")
    for name, default in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


def fresh_weights(model: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Initial weights of projector and denoiser; they depend on `seed` only."""
    import torch

    from ross_mcore.models.denoiser import Denoiser
    from ross_mcore.models.projector import VisionProjection
    from ross_mcore.parts import DENOISER, PROJECTOR

    generator = torch.Generator().manual_seed(seed)
    hidden = model.language.hidden_size
    projection = VisionProjection(model.projector, model.vision.hidden_size, hidden)
    projection.reset_parameters(generator)
    for name, tensor in projection.state_dict().items():
        yield PROJECTOR.weight(name), tensor
    if model.denoiser and model.pixel_decoder:
        denoiser = Denoiser(model.denoiser, model.pixel_decoder.token_channels, hidden, model.vision.grid)
        denoiser.reset_parameters(generator)
        for name, tensor in denoiser.state_dict().items():
            yield DENOISER.weight(name), tensor


def convert_parts(options: argparse.Namespace, dtype: torch.dtype | None) -> Checkpoint:
    """Converts language model, tower and VAE; projector and denoiser come from stage 1 or are random."""
    from ross_mcore.architecture import DenoiserConfig, ModelConfig, ProjectorConfig
    from ross_mcore.conversion import huggingface, mapping
    from ross_mcore.conversion.assembly import Assets, Source, assemble
    from ross_mcore.parts import DENOISER, LANGUAGE_MODEL, PROJECTOR, VAE, VISION_TOWER, part_of

    language, vision, vae = options.language_model, options.vision_model, options.pixel_decoder
    model = ModelConfig(
        language=huggingface.read_language_config(language),
        vision=huggingface.read_vision_config(vision, options.vision_select_layer),
        projector=ProjectorConfig(options.projector_type),
        denoiser=DenoiserConfig.from_type(options.denoiser_type, options.denoiser_width) if vae else None,
        pixel_decoder=huggingface.read_pixel_decoder_config(vae) if vae else None,
    )
    given = {
        LANGUAGE_MODEL: language,
        VISION_TOWER: vision,
        VAE: vae,
        PROJECTOR: options.mm_projector,
        DENOISER: options.mm_inv_projector,
    }
    sources = [Source(path, (part,), mapping.part_table(part, model)) for part, path in given.items() if path]
    fresh = (item for item in fresh_weights(model, options.seed) if not given[part_of(item[0])])
    processor = vision / "preprocessor_config.json"
    assets = Assets(options.tokenizer or language, processor, language / huggingface.GENERATION_CONFIG)
    with progress_bar(model) as advance:
        return assemble(options.save, model, sources, fresh, assets, dtype, advance, options.overwrite)


def convert_ross(options: argparse.Namespace, dtype: torch.dtype | None) -> Checkpoint:
    """Converts a full checkpoint of the reference."""
    from ross_mcore.conversion.assembly import import_ross
    from ross_mcore.conversion.huggingface import open_ross

    ross = open_ross(options.ross_model, vision_model=options.vision_model, pixel_decoder=options.pixel_decoder)
    with progress_bar(ross.model_config()) as advance:
        return import_ross(
            options.save, ross, options.tokenizer, dtype=dtype, advance=advance, overwrite=options.overwrite
        )


@contextmanager
def progress_bar(model: ModelConfig) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar; yields a function to call with the number of parameters just written."""
    from rich.progress import Progress

    from ross_mcore.models.inventory import inventory

    with Progress(transient=True) as progress:
        bar = progress.add_task("converting", total=sum(math.prod(shape) for shape in inventory(model).values()))
        yield lambda parameters: progress.advance(bar, parameters)


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options = parse_arguments(arguments, prog)
    import torch

    from ross_mcore.conversion.huggingface import language_remarks
    from ross_mcore.errors import UserError

    dtype = None if options.dtype == "keep" else getattr(torch, options.dtype)
    try:
        checkpoint = (convert_ross if options.ross_model else convert_parts)(options, dtype)
    except (UserError, OSError) as error:
        return refuse(prog, error)
    for remark in language_remarks(options.ross_model or options.language_model):
        print(f"note: {remark}")
    print(f"wrote {checkpoint.path}; train from it with --load {options.save}")
    return 0
