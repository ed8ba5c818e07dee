"""Indexes WebDataset tars for training. The index is written to their folder, or to --out.

Each sample is `KEY.jpg` or a picture of another format (several: KEY.0.jpg, KEY.1.jpg, ...) with either `KEY.json`, a
record or its turns, or `KEY.txt`, a caption or a text in which <image> marks the places of pictures; docs/data.md lists
all forms. The tars are not changed. Run the command again when shards are added, removed or changed; unchanged shards
are not read again.

  python tools/index_shards.py --data-path shards --tokenizer Qwen2-7B-Instruct --template qwen_2
  python tools/index_shards.py --data-path 's3://bucket/cc3m-{00000..00331}.tar' --out index/cc3m \\
      --tokenizer Qwen2-7B-Instruct --template plain

Train with --data-path and the folder of the index. Unusable samples are skipped and listed in quarantine.jsonl there.
Exit status 2: wrong arguments, no usable sample, or more bad samples than --max-bad-fraction allows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ross_mcore.commands import (
    add_sample_options,
    build_parser,
    check_sample_options,
    ending_cleanly,
    interrupted,
    print_account,
    refuse,
    sample_spec,
)

SCRIPT = "index_shards.py"


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> argparse.Namespace:
    parser = build_parser(prog, __doc__)
    parser.add_argument(
        "--data-path", nargs="+", required=True, metavar="PLACE", help="folders of *.tar, tars, patterns or URLs"
    )
    parser.add_argument("--out", type=Path, help="folder of the index; default: the folder in --data-path")
    add_sample_options(parser)
    parser.add_argument(
        "--verify-images",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode every picture now, so that broken ones are found before training",
    )
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, help="worker processes; 0: none")
    parser.add_argument("--data-cache-dir", type=Path, help="folder for shards from URLs; training uses it too")
    parser.add_argument("--data-cache-bytes", type=int, default=64 << 30, metavar="BYTES", help="limit of its size")
    parser.add_argument("--overwrite", action="store_true", help="replace the index of other shards in --out")
    options = parser.parse_args(arguments)
    check_sample_options(parser, options)
    if options.num_workers < 0 or options.data_cache_bytes < 1:
        parser.error("--num-workers is not negative, --data-cache-bytes positive")
    if options.out is None:
        folder = Path(options.data_path[0])
        if len(options.data_path) > 1 or not folder.is_dir():
            parser.error("give --out; only for a single local folder in --data-path it is not needed")
        options.out = folder
    return options


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options = parse_arguments(arguments, prog)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from ross_mcore.errors import UserError
    from ross_mcore.shards.indexer import Settings, compressed_shards, find_shards, index_shards, require_own_index

    columns = TextColumn("shards"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    start = time.monotonic()
    try:
        cache = options.data_cache_dir, options.data_cache_bytes
        settings = Settings(options.tokenizer, sample_spec(options), options.verify_images, *cache)
        shards = find_shards(options.data_path, options.out)
        if not options.overwrite:
            require_own_index(shards, options.out)
        if compressed := compressed_shards(options.data_path):
            print(f"not read, because they are compressed: {', '.join(compressed[:5])}; unpack them", file=sys.stderr)
        with ending_cleanly(), Progress(*columns, console=Console(stderr=True)) as bar:
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
    except KeyboardInterrupt:
        return interrupted(prog, "finished shards are kept, and the same command continues")
    seconds, account = time.monotonic() - start, done.account
    if options.json:
        print(json.dumps({"folder": str(options.out), "account": account.as_json()}, indent=1, ensure_ascii=False))
        return 0
    print(f"{options.out}: {done.samples} samples, {account.pictures} pictures in {done.shards} shards")
    print(f"{done.reread} shards read, {done.shards - done.reread} unchanged, in {seconds:.1f} s")
    if done.others:
        print(done.unused_members)
    print_account(account)
    if done.lists:
        print(f"the samples left out: {', '.join(map(str, done.lists))}")
    return 0
