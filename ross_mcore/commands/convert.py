"""Makes one sharded checkpoint, loadable at every layout, of a language model, a vision tower and a VAE, or of a full
checkpoint of the reference implementation of ROSS.

Folders are those of save_pretrained. They are streamed tensor by tensor; every tensor finds its place or the tool stops
and names it. No model is built, and a run that is stopped leaves nothing.
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
  a new model, projector and denoiser with fresh weights
    python tools/convert_hf_to_mcore.py --language-model Qwen2-7B-Instruct --pixel-decoder FLUX.1-dev/vae \\
        --vision-model siglip-so400m-patch14-384 --dtype bfloat16 --save checkpoints/base
  as stage 2 of the reference starts: the same, and what its stage 1 has trained
        --mm-projector stage1/mm_projector.bin --mm-inv-projector stage1/mm_inv_projector.bin
  what stage 2 of the reference has trained, denoiser and VAE included
    python tools/convert_hf_to_mcore.py --ross-model ross-qwen2-7b --dtype bfloat16 --save checkpoints/ross

The result, SAVE/iter_0000000, is what --load of pretrain_ross.py takes. It holds config.json, the tokenizer and the
image processor's configuration beside the weights. Without --pixel-decoder it is a plain LLaVA model (lm_loss alone).
Peak memory: twice the largest tensor (usually the vocabulary matrix), and the denoiser if it is fresh.
tools/convert_mcore_to_hf.py is the way back."""

DTYPE_HELP = """of language model, tower and projector, while denoiser and VAE are kept in float32; keep leaves every
tensor as it is (default: %(default)s)"""
DEFAULTS = {
    "projector_type": "mlp2x_gelu",
    "denoiser_type": "denoiser_vit3x",
    "denoiser_width": None,
    "vision_select_layer": -2,
    "seed": 42,
    "mm_projector": None,
    "mm_inv_projector": None,
}
"""Options that describe a model made of parts; a ROSS checkpoint says these things itself."""


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> argparse.Namespace:
    parser = build_parser(prog, __doc__, EXAMPLES)
    sources = parser.add_argument_group("what is read").add_argument
    sources("--language-model", type=Path, metavar="DIR", help="Qwen2 or Llama")
    sources("--vision-model", type=Path, metavar="DIR", help="SigLIP or CLIP, with preprocessor_config.json")
    sources("--pixel-decoder", type=Path, metavar="DIR", help="AutoencoderKL, the vae/ folder itself")
    sources("--tokenizer", type=Path, metavar="DIR", help="where the tokenizer lies, if not with the language model")
    sources("--mm-projector", type=Path, metavar="FILE", help="stage-1 projector, instead of a fresh one")
    sources("--mm-inv-projector", type=Path, metavar="FILE", help="stage-1 denoiser, instead of a fresh one")
    sources(
        "--ross-model",
        type=Path,
        metavar="DIR",
        help="a full checkpoint of the reference, instead of parts; --vision-model and --pixel-decoder then say where "
        "the configurations lie, if not where its config.json says",
    )
    parts = parser.add_argument_group("a model made of parts").add_argument
    parts("--projector-type", metavar="T", help="linear or mlp<N>x_gelu (default: mlp2x_gelu)")
    parts("--denoiser-type", metavar="T", help="denoiser_vit<depth>x (default: denoiser_vit3x)")
    parts("--denoiser-width", type=int, metavar="N", help="instead of the reference's width for that depth")
    parts("--vision-select-layer", type=int, metavar="N", help="hidden state that is the feature (default: -2)")
    parts("--seed", type=int, metavar="N", help="of fresh weights (default: 42)")
    result = parser.add_argument_group("what is written").add_argument
    result("--save", type=Path, required=True, metavar="DIR", help="folder to write the checkpoint into")
    result("--dtype", choices=("float32", "bfloat16", "keep"), default="float32", help=DTYPE_HELP)
    options = parser.parse_args(arguments)

    if (options.ross_model is None) == (options.language_model is None):
        parser.error("give either --ross-model, or --language-model and --vision-model")
    if options.ross_model:
        given = [name for name in DEFAULTS if getattr(options, name) is not None]
        if given:
            parser.error(f"--{given[0].replace('_', '-')} does not go with --ross-model, which has it already")
    elif options.vision_model is None:
        parser.error("--language-model needs --vision-model")
    if options.mm_inv_projector and not options.pixel_decoder:
        parser.error("--mm-inv-projector needs --pixel-decoder, whose latents it denoises")
    for name, default in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


def fresh_weights(model: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Projector and denoiser as they start training, drawn from `seed` alone."""
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
    """Language model, tower and VAE from folders, projector and denoiser from stage 1 or fresh."""
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
        return assemble(options.save, model, sources, fresh, assets, dtype, advance)


def convert_ross(options: argparse.Namespace, dtype: torch.dtype | None) -> Checkpoint:
    """A full checkpoint of the reference."""
    from ross_mcore.conversion.assembly import import_ross
    from ross_mcore.conversion.huggingface import open_ross

    ross = open_ross(options.ross_model, vision_model=options.vision_model, pixel_decoder=options.pixel_decoder)
    with progress_bar(ross.model_config()) as advance:
        return import_ross(options.save, ross, options.tokenizer, dtype=dtype, advance=advance)


@contextmanager
def progress_bar(model: ModelConfig) -> Iterator[Callable[[int], None]]:
    """A bar over the model's parameters; yields what to call with the number just written."""
    from rich.progress import Progress

    from ross_mcore.models.inventory import inventory

    with Progress(transient=True) as progress:
        bar = progress.add_task("converting", total=sum(math.prod(shape) for shape in inventory(model).values()))
        yield lambda parameters: progress.advance(bar, parameters)


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options = parse_arguments(arguments, prog)
    import torch

    from ross_mcore.errors import UserError

    dtype = None if options.dtype == "keep" else getattr(torch, options.dtype)
    try:
        checkpoint = (convert_ross if options.ross_model else convert_parts)(options, dtype)
    except (UserError, OSError) as error:
        return refuse(prog, error)
    print(f"wrote {checkpoint.path}; train from it with --load {options.save}")
    return 0
