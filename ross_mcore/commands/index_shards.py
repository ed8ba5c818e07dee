"""Makes any WebDataset tars usable for training: writes the index that training reads beside them, or into --out.

Each sample is `KEY.jpg|jpeg|png|webp` (several pictures: KEY.0.jpg, KEY.1.jpg, ...) with either `KEY.json`, a LLaVA
record or conversation, or `KEY.txt`, a caption or a text in which <image> shows where the pictures stand. The tars are
only read. Run it again after shards came, went or changed: those that did not are not read again.

  python tools/index_shards.py --data-path shards --tokenizer Qwen2-7B-Instruct --template qwen_2
  python tools/index_shards.py --data-path 's3://bucket/cc3m-{00000..00331}.tar' --out index/cc3m \\
      --tokenizer Qwen2-7B-Instruct --template plain

Train with --data-path and the folder that holds the index. What cannot be trained on is left out and listed in
quarantine.jsonl there. Exit status 2: nothing usable, wrong arguments, or more was bad than --max-bad-fraction allows.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from ross_mcore.commands import build_parser, refuse

SCRIPT = "index_shards.py"


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> argparse.Namespace:
    parser = build_parser(prog, __doc__)
    parser.add_argument(
        "--data-path", nargs="+", required=True, metavar="PLACE", help="folders of *.tar, tars, patterns or URLs"
    )
    parser.add_argument("--out", type=Path, help="folder of the index; default: the one folder that --data-path names")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder: measures samples' lengths, as packing needs")
    parser.add_argument("--template", help="conversation template the lengths are for (plain, qwen_2, v1, llama3)")
    parser.add_argument("--mm-use-im-start-end", action="store_true", help="measure as for training with this flag")
    parser.add_argument(
        "--max-images-per-sample", type=int, default=64, metavar="N", help="leave out a sample of more pictures (64)"
    )
    parser.add_argument(
        "--max-tokens-per-sample",
        type=int,
        metavar="N",
        help="leave out a sample of more tokens of text; needs --tokenizer and --template",
    )
    parser.add_argument(
        "--verify-images",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode every picture now, so that training meets no broken one",
    )
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.001, metavar="F", help="most samples that may be bad (0.001)"
    )
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, help="processes; 0: in this one")
    parser.add_argument("--data-cache-dir", type=Path, help="keep shards from URLs here, for training to find")
    parser.add_argument("--data-cache-bytes", type=int, default=64 << 30, metavar="BYTES", help="most bytes kept there")
    options = parser.parse_args(arguments)
    if (options.tokenizer is None) != (options.template is None):
        parser.error("--tokenizer and --template come together: lengths depend on both")
    if options.mm_use_im_start_end and options.template is None:
        parser.error("--mm-use-im-start-end needs --tokenizer and --template: it changes what they count")
    if options.max_tokens_per_sample is not None and options.template is None:
        parser.error("--max-tokens-per-sample needs --tokenizer and --template, which say what a token is")
    if options.max_images_per_sample < 1 or (options.max_tokens_per_sample or 1) < 1:
        parser.error("--max-images-per-sample and --max-tokens-per-sample must be at least 1")
    if not 0 <= options.max_bad_fraction <= 1 or options.num_workers < 0 or options.data_cache_bytes < 1:
        parser.error("--max-bad-fraction is between 0 and 1, --num-workers not negative, --data-cache-bytes positive")
    if options.out is None:
        folder = Path(options.data_path[0])
        if len(options.data_path) > 1 or not folder.is_dir():
            parser.error("give --out, which is needed unless --data-path is one local folder")
        options.out = folder
    return options


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options = parse_arguments(arguments, prog)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from ross_mcore.data.spec import SampleSpec
    from ross_mcore.data.templates import TRAINING_TEMPLATES
    from ross_mcore.errors import TokenizerError, UserError
    from ross_mcore.shards.indexer import Settings, find_shards, index_shards

    columns = TextColumn("shards"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    start = time.monotonic()
    try:
        if options.template is not None and options.template not in TRAINING_TEMPLATES:
            raise TokenizerError(f"--template {options.template} is not one of {', '.join(TRAINING_TEMPLATES)}")
        spec = SampleSpec(
            options.template or "",
            mm_use_im_start_end=options.mm_use_im_start_end,
            max_images_per_sample=options.max_images_per_sample,
            max_tokens_per_sample=options.max_tokens_per_sample,
        )
        cache = options.data_cache_dir, options.data_cache_bytes
        settings = Settings(options.tokenizer, spec, options.verify_images, *cache)
        shards = find_shards(options.data_path, options.out)
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("shards", total=None)
            done = index_shards(
                shards,
                options.out,
                settings,
                max_bad_fraction=options.max_bad_fraction,
                num_workers=options.num_workers,
                progress=lambda passed, total: bar.update(task, completed=passed, total=total),
            )
    except (UserError, OSError) as error:
        return refuse(prog, error)
    seconds = time.monotonic() - start
    print(f"{options.out}: {done.samples} samples, {done.images} pictures in {done.shards} shards")
    print(f"{done.reread} shards read, {done.shards - done.reread} unchanged, in {seconds:.1f} s")
    if done.others:
        print(f"{done.others} members of the tars belong to no sample")
    if done.bad or done.over_bounds:
        print(f"bad: {done.bad} ({done.bad_fraction:.4%}), over the bounds: {done.over_bounds}; see quarantine.jsonl")
        for reason, count in done.reasons.most_common():
            print(f"  {count} x {reason}")
    return 0
