"""Computes the frozen VAE's posterior and the frozen vision tower's features of all pictures, and writes new shards.

  torchrun --nproc-per-node 8 tools/precompute_latents.py --load base --data-path shards --out shards-latents \\
      --image-aspect-ratio pad --latents --features

Training on the new shards neither decodes pictures nor builds VAE and tower. Its losses are the same: the posterior is
stored, not a sample, so noise is still drawn at every step. After an interruption, run the same command again; finished
shards are kept. Without torchrun, one process computes everything.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ross_mcore.commands import build_parser, refuse

SCRIPT = "precompute_latents.py"


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> argparse.Namespace:
    parser = build_parser(prog, __doc__)
    parser.add_argument("--load", type=Path, required=True, help="checkpoint with the VAE and the tower")
    parser.add_argument("--data-path", type=Path, required=True, help="folder of shards with an index")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new shards")
    parser.add_argument("--latents", action="store_true", help="store the VAE's posterior (default without --features)")
    parser.add_argument("--features", action="store_true", help="store the vision tower's features")
    parser.add_argument(
        "--image-aspect-ratio",
        choices=("square", "pad"),
        required=True,
        help="that of the training; its default is square for pretrain, pad for finetune",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="type of stored values [fp32]",
    )
    parser.add_argument(
        "--drop-images",
        action="store_true",
        help="do not copy pictures; then nothing else can be precomputed later",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="pictures per batch [16]")
    parser.add_argument("--num-workers", type=int, default=4, help="threads per rank that decode pictures [4]")
    parser.add_argument("--data-cache-dir", type=Path, help="folder for shards downloaded from URLs")
    options = parser.parse_args(arguments)
    if min(options.batch_size, options.num_workers) < 1:
        parser.error("--batch-size and --num-workers must be at least 1")
    options.latents = options.latents or not options.features
    return options


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options = parse_arguments(arguments, prog)

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ross_mcore import platform
    from ross_mcore.data.shard_reader import ShardReader
    from ross_mcore.errors import RankError, UserError
    from ross_mcore.launcher import require_rendezvous
    from ross_mcore.parallel.collectives import all_or_none
    from ross_mcore.parallel.groups import destroy
    from ross_mcore.shards.precompute import Precomputation, load_picture_parts

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kinds = [kind for kind in ("latents", "features") if getattr(options, kind)]
    columns = TextColumn("pictures of this rank"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        require_rendezvous()
        platform.initialize_process_group(timeout_minutes=7 * 24 * 60)  # ranks wait for each other only at the end
        reader = all_or_none(lambda: ShardReader(options.data_path, options.data_cache_dir))
        parts = all_or_none(lambda: load_picture_parts(options.load, kinds, options.image_aspect_ratio, options.dtype))
        with Progress(*columns, console=Console(stderr=True), disable=rank > 0) as bar:
            task = bar.add_task("pictures", total=None)
            work = Precomputation(
                reader, options.out, parts, options.drop_images, options.batch_size, options.num_workers
            )
            done = work.run(
                rank, world_size, lambda passed, total: bar.update(task, completed=passed, total=total or 1)
            )
        destroy()
    except (UserError, OSError) as error:
        return refuse(prog, error) if rank == 0 or not isinstance(error, RankError) else 2
    where = f"rank {rank}: " if world_size > 1 else ""
    print(f"{where}{done.pictures} pictures computed, {done.shards} shards, {done.kept} of them finished before")
    for key, reason in done.bad:
        print(f"{where}left out {key}: {reason}", file=sys.stderr)
    if rank == 0:
        about = ", ".join(f"{kind} {source.shape} as {source.dtype}" for kind, source in parts.sources.items())
        print(f"{options.out}: {about} a picture")
    return 0
