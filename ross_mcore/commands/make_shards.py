"""Turns a LLaVA-format JSON and its image folder into WebDataset tar shards with an index that training reads.

python tools/make_shards.py --data train.json --image-folder images --out shards --tokenizer Qwen2-7B --template qwen_2
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ross_mcore.commands import build_parser, refuse

SCRIPT = "make_shards.py"


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> argparse.Namespace:
    parser = build_parser(prog, __doc__)
    parser.add_argument("--data", type=Path, required=True, help="list of records, .json or .jsonl")
    parser.add_argument("--image-folder", type=Path, required=True, help="what the records' image paths start from")
    parser.add_argument("--out", type=Path, required=True, help="new folder for shards, index and skipped.jsonl")
    parser.add_argument("--shard-size", type=int, default=10_000, metavar="N", help="most samples in a shard")
    parser.add_argument("--max-shard-bytes", type=int, default=1 << 30, metavar="BYTES", help="most bytes in a shard")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="tokenizer folder: counts tokens and labels into the index and lists records that do not fit the template",
    )
    parser.add_argument("--template", help="conversation template the counts are for (plain, qwen_2, v1, llama3)")
    parser.add_argument("--mm-use-im-start-end", action="store_true", help="count as for training with this flag")
    parser.add_argument(
        "--max-images-per-sample", type=int, default=64, metavar="N", help="skip a sample of more pictures (64)"
    )
    parser.add_argument(
        "--max-tokens-per-sample",
        type=int,
        metavar="N",
        help="skip a sample of more tokens of text; needs --tokenizer and --template",
    )
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, help="threads that check pictures")
    parser.add_argument("--follow-links", action="store_true", help="let links lead out of the image folder")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it is a data set already")
    options = parser.parse_args(arguments)
    if (options.tokenizer is None) != (options.template is None):
        parser.error("--tokenizer and --template come together: lengths depend on both")
    if options.mm_use_im_start_end and options.template is None:
        parser.error("--mm-use-im-start-end needs --tokenizer and --template: it changes what they count")
    if options.max_tokens_per_sample is not None and options.template is None:
        parser.error("--max-tokens-per-sample needs --tokenizer and --template, which say what a token is")
    if options.max_images_per_sample < 1 or (options.max_tokens_per_sample or 1) < 1:
        parser.error("--max-images-per-sample and --max-tokens-per-sample must be at least 1")
    if min(options.shard_size, options.max_shard_bytes, options.num_workers) < 1:
        parser.error("--shard-size, --max-shard-bytes and --num-workers must be at least 1")
    if not options.image_folder.is_dir():
        parser.error(f"--image-folder {options.image_folder} is not a folder")
    return options


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options = parse_arguments(arguments, prog)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ross_mcore.data.spec import SampleSpec
    from ross_mcore.data.templates import TRAINING_TEMPLATES
    from ross_mcore.data.tokenizer import load_tokenizer
    from ross_mcore.errors import RecordsError, TokenizerError, UserError
    from ross_mcore.shards.llava import convert_records, read_records
    from ross_mcore.shards.measure import Measure
    from ross_mcore.shards.writer import ShardWriter

    console = Console(stderr=True)
    spec = SampleSpec(
        options.template or "",
        mm_use_im_start_end=options.mm_use_im_start_end,
        max_images_per_sample=options.max_images_per_sample,
        max_tokens_per_sample=options.max_tokens_per_sample,
    )
    try:
        tokenizer = None
        if options.template is not None:
            if options.template not in TRAINING_TEMPLATES:
                raise TokenizerError(f"--template {options.template} is not one of {', '.join(TRAINING_TEMPLATES)}")
            tokenizer = load_tokenizer(options.tokenizer)
        measure = Measure(tokenizer, spec)
        count, records = read_records(options.data)
        columns = TextColumn("records"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        writer = ShardWriter(
            options.out,
            max_samples=options.shard_size,
            max_bytes=options.max_shard_bytes,
            length_source=measure.source,
            overwrite=options.overwrite,
        )
        with writer, Progress(*columns, console=console) as bar:
            task = bar.add_task("records", total=count)
            done = convert_records(
                records,
                options.image_folder,
                writer,
                measure,
                follow_links=options.follow_links,
                num_workers=options.num_workers,
                progress=lambda: bar.advance(task),
            )
    except RecordsError as error:
        named = str(error).startswith(str(options.data))
        return refuse(prog, error if named else f"{options.data}: {error}")
    except (UserError, OSError) as error:
        return refuse(prog, error)
    print(f"{options.out}: {done.samples} samples, {done.images} pictures, of {count} records")
    if done.ignored:
        print(f"{done.ignored} samples without any label: their answers could not be located among their tokens")
    for reason, number in done.skipped.most_common():
        print(f"skipped {number}: {reason} (see {options.out / 'skipped.jsonl'})")
    return 0
