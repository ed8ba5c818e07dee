"""Converts records and their pictures to WebDataset tar shards with an index for training; see docs/data.md.

python tools/make_shards.py --data train.json --image-folder images --out shards --tokenizer Qwen2-7B --template qwen_2

Each record is trained on, skipped (over the bounds) or bad; the table at the end counts them, with reasons, and
skipped.jsonl in --out lists those left out.
Exit status 2: wrong arguments, no usable sample, or more bad records than --max-bad-fraction allows. Then nothing is
written but that list, as OUT.skipped.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
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

SCRIPT = "make_shards.py"


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> argparse.Namespace:
    parser = build_parser(prog, __doc__)
    parser.add_argument("--data", type=Path, required=True, help="records: .json, .jsonl, .parquet, or a folder")
    parser.add_argument("--split", metavar="NAME", help="part of a folder that has several: train, test, ...")
    parser.add_argument("--image-folder", type=Path, help="folder of the records' image paths, if they have any")
    parser.add_argument("--out", type=Path, required=True, help="new folder for shards, index and skipped.jsonl")
    parser.add_argument("--shard-size", type=int, default=10_000, metavar="N", help="limit of samples per shard")
    parser.add_argument("--max-shard-bytes", type=int, default=1 << 30, metavar="BYTES", help="limit of a shard's size")
    add_sample_options(parser)
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, help="threads that check pictures")
    parser.add_argument("--follow-links", action="store_true", help="follow links that leave the image folder")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it is a data set")
    options = parser.parse_args(arguments)
    check_sample_options(parser, options)
    if min(options.shard_size, options.max_shard_bytes, options.num_workers) < 1:
        parser.error("--shard-size, --max-shard-bytes and --num-workers must be at least 1")
    if options.image_folder is not None and not options.image_folder.is_dir():
        parser.error(f"--image-folder {options.image_folder} is not a folder")
    return options


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options = parse_arguments(arguments, prog)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ross_mcore.errors import RecordsError, TooManyBad, UserError
    from ross_mcore.shards.files import read_records
    from ross_mcore.shards.llava import convert_records
    from ross_mcore.shards.measure import Measure
    from ross_mcore.shards.writer import ShardWriter

    console = Console(stderr=True)
    try:
        spec = sample_spec(options)
        measure = Measure(spec=spec)
        if options.template is not None:
            measure = Measure.with_tokenizer(options.tokenizer, spec)
        count, records = read_records(options.data, options.split)
        columns = TextColumn("records"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        writer = ShardWriter(
            options.out,
            max_samples=options.shard_size,
            max_bytes=options.max_shard_bytes,
            length_source=measure.source,
            overwrite=options.overwrite,
        )
        with ending_cleanly(), writer, Progress(*columns, console=console) as bar:
            task = bar.add_task("records", total=count)
            account = convert_records(
                records,
                options.image_folder,
                writer,
                measure,
                follow_links=options.follow_links,
                max_bad_fraction=options.max_bad_fraction,
                num_workers=options.num_workers,
                progress=lambda: bar.advance(task),
            )
    except (RecordsError, TooManyBad) as error:
        named = str(error).startswith(str(options.data))
        return refuse(prog, error if named else f"{options.data}: {error}")
    except (UserError, OSError) as error:
        return refuse(prog, error)
    except KeyboardInterrupt:
        return interrupted(prog, "nothing was written")
    if options.json:
        print(json.dumps({"folder": str(options.out), "account": account.as_json()}, indent=1, ensure_ascii=False))
        return 0
    print(f"{options.out}: {account.samples} samples, {account.pictures} pictures, of {count} records")
    print_account(account)
    if account.samples < account.records:
        print(f"the records left out: {options.out / 'skipped.jsonl'}")
    return 0
