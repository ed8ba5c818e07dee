"""Reconstructs pictures from a trained model's image states: each picture, and below it the denoiser's reconstruction.

python tools/reconstruct.py --load runs/finetune --image cat.jpg dog.png --output reconstruction.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ross_mcore.commands import build_parser, refuse

SCRIPT = "reconstruct.py"


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> argparse.Namespace:
    parser = build_parser(prog, __doc__)
    parser.add_argument("--load", type=Path, required=True, metavar="RUN", help="folder of a run or of a checkpoint")
    parser.add_argument("--image", type=Path, required=True, nargs="+", metavar="FILE", help="pictures of any format")
    parser.add_argument("--output", type=Path, default=Path("reconstruction.png"), help="PNG to write [%(default)s]")
    parser.add_argument("--image-aspect-ratio", choices=("square", "pad"), help="[as in the run's training]")
    parser.add_argument("--truncated-images", choices=("refuse", "fill"), help="[as in the run's training]")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="sampling steps, up to 1000 [%(default)s]")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="scale of the noise of each step [%(default)s]"
    )
    parser.add_argument(
        "--start-timestep",
        type=int,
        metavar="T",
        help="noise each picture to timestep T of 999 and denoise it from there [from pure noise]",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling [%(default)s]")
    options = parser.parse_args(arguments)
    if not 1 <= options.steps <= 1000:
        parser.error("--steps must be between 1 and 1000")
    if options.start_timestep is not None and not 0 <= options.start_timestep <= 999:
        parser.error("--start-timestep must be between 0 and 999")
    missing = [str(path) for path in options.image if not path.is_file()]
    if missing:
        parser.error(f"--image: no such file: {', '.join(missing)}; give files of pictures")
    return options


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options = parse_arguments(arguments, prog)
    from ross_mcore.errors import UserError
    from ross_mcore.inference import as_picture, reconstruct
    from ross_mcore.reporting.pictures import picture_grid
    from ross_mcore.trained import load_model, read_picture

    try:
        trained = load_model(options.load, seed=options.seed)
        preprocessing = trained.preprocessing(options.image_aspect_ratio)
        truncated = options.truncated_images or trained.spec.truncated_images
        pictures = [read_picture(path, preprocessing, truncated) for path in options.image]
        sampling = {
            "steps": options.steps,
            "temperature": options.temperature,
            "start_timestep": options.start_timestep,
        }
        grid = picture_grid(list(reconstruct(trained, pictures, **sampling)))
        partial = options.output.with_name(options.output.name + ".partial")
        partial.unlink(missing_ok=True)  # it may be a link
        as_picture(grid).save(partial, format="PNG")
        partial.replace(options.output)
    except (UserError, OSError) as error:
        return refuse(prog, error)
    print(f"{options.output}: {len(pictures)} pictures, each over its reconstruction")
    return 0
