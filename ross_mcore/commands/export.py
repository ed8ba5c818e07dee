"""Converts a trained checkpoint to Hugging Face folders: for the reference implementation of ROSS, or part by part.

  --format ross    the files that stage 2 of the reference saves, and that its load_pretrained_model reads: all tensors
                   by its names (denoiser and VAE too), config.json, tokenizer, generation_config.json. Tower and VAE
                   are written to separate folders too, because its config.json refers to them
  --format stage1  the files that stage 1 of the reference saves: mm_projector.bin, mm_inv_projector.bin, config.json;
                   and tower and VAE in folders, unless --mm-vision-tower and --mm-pixel-decoder give their paths
  --format hf      language_model/ (Qwen2 or Llama, for AutoModelForCausalLM), the tower's folder, pixel_decoder/
                   (AutoencoderKL), projector and denoiser: the input of tools/convert_hf_to_mcore.py
  --format llava   language model, tower and projector as transformers' own LlavaForConditionalGeneration, which
                   pipeline("image-text-to-text") and vLLM load without other code; denoiser and VAE are left out

Padding of the vocabulary is removed, and tied output matrices are not written, as in Hugging Face. Values change only
with --dtype.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from ross_mcore.commands import build_parser, refuse

SCRIPT = "convert_mcore_to_hf.py"

EXAMPLES = """examples:
  python tools/convert_mcore_to_hf.py --load runs/finetune --save ross-qwen2-7b-siglip --dtype bfloat16
  python tools/convert_mcore_to_hf.py --load runs/pretrain --save stage1 --format stage1 \\
      --mm-vision-tower google/siglip-so400m-patch14-384 --mm-pixel-decoder FLUX.1-dev/vae
  python tools/convert_mcore_to_hf.py --load runs/finetune --save ross-llava --format llava --dtype bfloat16

Reads the newest checkpoint of a run, saved at any layout; needs no GPU and builds no model.
Peak memory: one shard (--max-shard-size) and twice the largest group of tensors (a vocabulary matrix, or gate and up
projection of a layer).
SAVE appears only when it is complete."""

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def shard_bytes(text: str) -> int:
    """`5GB` -> 5000000000. Raises ArgumentTypeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text, re.IGNORECASE)
    size = int(float(match[1]) * UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB, 500MB or 2GiB")
    return size


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> argparse.Namespace:
    parser = build_parser(prog, __doc__, EXAMPLES)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="RUN", help="folder of a run, or one of its iter_* folders")
    add("--save", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    add("--format", choices=("ross", "stage1", "hf", "llava"), default="ross", help="see above (default: %(default)s)")
    add(
        "--dtype",
        choices=("keep", "float32", "bfloat16", "float16"),
        default="keep",
        help="type of all tensors; keep: as stored (default: %(default)s)",
    )
    add("--max-shard-size", type=shard_bytes, default="5GB", metavar="SIZE", help="largest file (default: %(default)s)")
    add("--mm-vision-tower", metavar="PATH", help="write this path into config.json, and no tower")
    add("--mm-pixel-decoder", metavar="PATH", help="write this path into config.json, and no VAE")
    add(
        "--relative-paths",
        action="store_true",
        help="refer to tower and VAE as ./NAME in config.json: the folder can be copied, and the reference's code must "
        "then be started inside it (default: absolute paths)",
    )
    add("--template", metavar="T", help="as in training: its chat template is written (default: the training's)")
    options = parser.parse_args(arguments)
    paths = options.mm_vision_tower or options.mm_pixel_decoder or options.relative_paths
    if options.format in ("hf", "llava") and paths:
        parser.error(f"--format {options.format} writes no config.json of the reference, which would contain paths")
    if options.format == "stage1" and options.template:
        parser.error("--format stage1 writes no tokenizer, so there is no chat template")
    return options


def export(options: argparse.Namespace) -> list[str]:
    """Converts; returns remarks for the user. Raises UserError and OSError."""
    import torch
    from rich.progress import Progress

    from ross_mcore.checkpoint.folder import require_intact
    from ross_mcore.conversion.export import FORMATS, Export, ExportOptions
    from ross_mcore.data.tokenizer import load_tokenizer

    checkpoint = require_intact(options.load)
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    with Progress(transient=True) as progress:
        bar = progress.add_task("writing", total=None)
        outgoing = Export(
            checkpoint,
            tokenizer,
            ExportOptions(
                dtype=None if options.dtype == "keep" else getattr(torch, options.dtype),
                max_shard_bytes=options.max_shard_size,
                mm_vision_tower=options.mm_vision_tower,
                mm_pixel_decoder=options.mm_pixel_decoder,
                relative_paths=options.relative_paths,
                template=options.template,
            ),
            advance=lambda parameters: progress.advance(bar, parameters),
        )
        progress.update(bar, total=outgoing.parameters_to_write(options.format))
        FORMATS[options.format](outgoing, options.save)
    return outgoing.notes


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options = parse_arguments(arguments, prog)
    from ross_mcore.errors import UserError

    try:
        remarks = export(options)
    except (UserError, OSError) as error:
        return refuse(prog, error)
    print("\n".join([f"wrote {options.save}", *remarks]))
    return 0
