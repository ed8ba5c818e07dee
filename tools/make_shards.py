"""Turns a LLaVA-format JSON and its image folder into WebDataset tar shards with an index that training reads.

    python tools/make_shards.py --data train.json --image-folder images --out shards --tokenizer Qwen2-7B --template qwen_2
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter, deque
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="list of records, .json or .jsonl")
    parser.add_argument("--image-folder", type=Path, required=True, help="what the records' image paths start from")
    parser.add_argument("--out", type=Path, required=True, help="new folder for shards, index and skipped.jsonl")
    parser.add_argument("--shard-size", type=int, default=10_000, metavar="N", help="most samples in a shard")
    parser.add_argument("--max-shard-bytes", type=int, default=1 << 30, metavar="BYTES", help="most bytes in a shard")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder: stores text lengths, which packing needs")
    parser.add_argument("--template", help="conversation template the lengths are for (plain, qwen_2, v1)")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, help="threads that check pictures")
    parser.add_argument("--follow-links", action="store_true", help="let links lead out of the image folder")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it is a data set already")
    options = parser.parse_args(arguments)
    if (options.tokenizer is None) != (options.template is None):
        parser.error("--tokenizer and --template come together: lengths depend on both")
    if min(options.shard_size, options.max_shard_bytes, options.num_workers) < 1:
        parser.error("--shard-size, --max-shard-bytes and --num-workers must be at least 1")
    if not options.image_folder.is_dir():
        parser.error(f"--image-folder {options.image_folder} is not a folder")
    return options


def main() -> int:
    options = parse_arguments()
    from concurrent.futures import Future, ThreadPoolExecutor

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ross_mcore.data.conversation import TEMPLATES
    from ross_mcore.data.llava import RecordsError, SkippedRecord, admit_record, read_records
    from ross_mcore.data.shard_writer import ShardWriter
    from ross_mcore.data.shards import LengthSource, ShardError
    from ross_mcore.data.tokenizer import TokenizerError, fingerprint_tokenizer, load_tokenizer

    console = Console(stderr=True)
    try:
        if options.template is not None and options.template not in TEMPLATES:
            raise RecordsError(f"--template {options.template}: expected one of {', '.join(TEMPLATES)}")
        tokenizer = source = None
        if options.tokenizer is not None:
            tokenizer = load_tokenizer(options.tokenizer)
            source = LengthSource(fingerprint_tokenizer(tokenizer), options.template)
        reasons: Counter[str] = Counter()
        mismatches = 0
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        total = None if options.data.suffix == ".jsonl" else sum(1 for _ in read_records(options.data))
        writer = ShardWriter(
            options.out,
            max_samples=options.shard_size,
            max_bytes=options.max_shard_bytes,
            length_source=source,
            overwrite=options.overwrite,
        )
        with writer, ThreadPoolExecutor(options.num_workers) as pool, Progress(*columns, console=console) as bar:
            skipped = open(writer.folder / "skipped.jsonl", "w", encoding="utf-8")
            task = bar.add_task("records", total=total)
            waiting: deque[tuple[int, object, Future]] = deque()

            def take() -> int:
                number, record, future = waiting.popleft()
                bar.advance(task)
                try:
                    sample = future.result()
                    writer.write(sample.key, sample.record, sample.images, sample.text_tokens, sample.image_spans)
                    return int(sample.mismatch)
                except SkippedRecord as error:
                    about = record if isinstance(record, dict) else {}
                    reasons[str(error).partition(":")[0]] += 1
                    line = {"record": number, "id": about.get("id"), "image": about.get("image"), "reason": str(error)}
                    skipped.write(json.dumps(line, ensure_ascii=False) + "\n")
                    return 0

            with skipped:
                for number, record in enumerate(read_records(options.data)):
                    work = (number, record, options.image_folder, tokenizer, options.template, options.follow_links)
                    waiting.append((number, record, pool.submit(admit_record, *work)))
                    mismatches += take() if len(waiting) > 4 * options.num_workers else 0
                while waiting:
                    mismatches += take()
    except (RecordsError, ShardError, TokenizerError) as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
