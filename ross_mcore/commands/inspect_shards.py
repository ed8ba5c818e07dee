"""Shows figures of a data set before training: sizes, lengths, labels, bad samples.

  python tools/inspect_shards.py --data-path shards/finetune --seq-length 2048 --image-tokens 729
  python tools/inspect_shards.py --data-path shards/finetune --contact-sheet sheet.png
  python tools/inspect_shards.py --data-path shards/finetune --sample 000000123 \\
      --tokenizer Qwen2-7B-Instruct --template qwen_2
  python tools/inspect_shards.py --data-path mixture.yaml --sample coco_000000123 \\
      --tokenizer Qwen2-7B-Instruct --template qwen_2

The account counts every record of the data: trained on, skipped or bad, with reasons, as make_shards.py or
index_shards.py counted it. Red lines name what to mend.
Signs of a problem: few labels, or many samples without labels: the template does not fit the tokenizer; pictures of one
colour: empty pictures, or a format that is read wrongly; packed rows filled far below 95%: --seq-length is too small
for the samples; in the contact sheet: texts that do not match their pictures.
Figures come from the index, in seconds for every size; --sample and --contact-sheet read the shards.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ross_mcore.commands import TEMPLATE_HELP, build_parser, print_account, refuse

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from ross_mcore.data.shard_reader import ShardReader
    from ross_mcore.shards.inspection import Inspected

SCRIPT = "inspect_shards.py"


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> argparse.Namespace:
    parser = build_parser(prog, __doc__)
    parser.add_argument("--data-path", type=Path, required=True, help="folder with an index, or a YAML file of several")
    parser.add_argument("--seq-length", type=int, metavar="N", help="tokens of a row, to show how full packed rows are")
    parser.add_argument(
        "--image-tokens", type=int, metavar="N", help="tokens per picture: 729 for siglip-so400m-384, 576 for clip-336"
    )
    parser.add_argument(
        "--sample", metavar="ID", help="print the record of this key or id, and with the next two flags its tokens"
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder")
    parser.add_argument("--template", help=f"conversation template: {TEMPLATE_HELP}")
    parser.add_argument("--mm-use-im-start-end", action="store_true", help="tokens as in training with this flag")
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help="draw samples with their texts")
    parser.add_argument("--contact-samples", type=int, default=24, metavar="N", help="number of samples in it (24)")
    parser.add_argument("--data-cache-dir", type=Path, help="folder for shards downloaded from URLs")
    parser.add_argument("--data-cache-bytes", type=int, default=64 << 30, metavar="BYTES", help="limit of its size")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(arguments)
    is_mixture = options.data_path.is_file()  # whose data sets may have templates of their own
    if (options.tokenizer is None) != (options.template is None) and not (is_mixture and options.template is None):
        parser.error("--tokenizer and --template need each other: tokens depend on both")
    if (options.seq_length is None) != (options.image_tokens is None):
        parser.error("--seq-length and --image-tokens need each other: the fill of rows depends on both")
    if min(options.seq_length or 1, options.contact_samples, options.data_cache_bytes) < 1 or (
        options.image_tokens is not None and options.image_tokens < 0
    ):
        parser.error("--seq-length, --contact-samples and --data-cache-bytes are positive, --image-tokens not negative")
    return options


def print_figures(found: dict[str, Any], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from ross_mcore.checked import printable
    from ross_mcore.shards.account import Account

    samples, text, measured = found["samples"], found["text"], found["measured_with"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("samples", f"{samples:,} in {found['shards']} shards, {found['bytes'] / 2**30:.2f} GiB")
    pictures = ", ".join(f"{n:,} with {count}" for count, n in found["images_per_sample"].items())
    table.add_row("pictures", f"{found['images']:,} (samples: {pictures})")
    unit, longest = text["unit"], text["longest"]
    table.add_row(
        f"text {unit}",
        f"mean {text['mean']:.1f}, median {text['median']:.0f}, 95% below {text['p95']:.0f}, longest {longest:,}",
    )
    if measured is None:
        table.add_row("labels", "not measured: tools/index_shards.py with --tokenizer and --template counts them")
    else:
        table.add_row("labels", f"{found['label_tokens']:,} = {found['label_share']:.1%} of the text tokens")
    if found["account"] is None:
        table.add_row("account", "not counted: index the shards again (tools/index_shards.py)", style="red")
        bad = sum(found["bad"].values())
        table.add_row("bad", f"{bad:,} left out ({bad / (samples + bad):.4%})", style="red" if bad else "")
        for reason, count in found["bad"].items():
            table.add_row("", printable(f"{count:,} x {reason}"))
    packing = found["packing"]
    if packing is not None:
        table.add_row(
            "packing",
            f"rows of {packing['seq_length']:,} tokens are {packing['filled']:.1%} full with "
            f"{packing['samples_per_row']:.2f} samples each ({packing['filled_unpacked']:.1%} with one); "
            f"{packing['rows_of_all_samples']:,} rows an epoch; {packing['too_long']:,} samples are longer than a row",
        )
    console.print(table)
    if found["account"] is not None:
        console.print("\naccount of the records")
        print_account(Account.from_json(found["account"]))
    console.print(f"\n{unit} of text, samples")
    most, width = max(text["histogram"].values()), max(10, console.width - 36)
    for label, count in text["histogram"].items():
        bar = "█" * -(-count * width // most)
        console.print(Text.assemble(f"{label:>14} ", (bar, "cyan"), f" {count:,}"))


def print_sample(key: str, sample: Inspected, console: Console) -> None:
    from rich.json import JSON
    from rich.text import Text

    from ross_mcore.checked import printable

    console.rule(Text(key))
    console.print(JSON(json.dumps(sample.record)))
    if sample.tokens is None:
        return
    styles = {True: "bold green", False: "dim"}
    shown = Text("\n")
    for token in sample.tokens:
        text = printable(token.text.replace("\n", "\\n"))
        shown.append(f"[{text}]" if token.supervised else text, styles[token.supervised]).append("|", "dim")
    console.print(shown, highlight=False)
    supervised = sum(token.supervised for token in sample.tokens)
    console.print(f"{len(sample.tokens)} tokens (an image counts as one), {supervised} in brackets are supervised")
    if sample.without_labels is not None:
        console.print(f"without labels: {printable(sample.without_labels)}", style="red")


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options = parse_arguments(arguments, prog)
    from rich.console import Console

    from ross_mcore.data.shard_reader import ShardReader
    from ross_mcore.data.sources import read_sources
    from ross_mcore.data.templates import require_known
    from ross_mcore.data.tokenizer import load_tokenizer
    from ross_mcore.errors import ShardError, UserError
    from ross_mcore.shards.inspection import inspect, write_contact_sheet

    console = Console(markup=False, emoji=False)
    try:
        if options.template is not None:
            require_known(options.template)
        sources = read_sources(options.data_path)
        if len(sources) > 1 and options.contact_sheet is not None:
            raise ShardError(f"{options.data_path} has {len(sources)} data sets; give one for --contact-sheet")
        readers = [ShardReader(source.path, options.data_cache_dir, options.data_cache_bytes) for source in sources]
        tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
        found = [inspect(reader, options.seq_length, options.image_tokens) for reader in readers]
        for source, figures in zip(sources, found, strict=True):
            if options.seq_length and figures["packing"] is None:
                raise ShardError(f"{source.path}: packing needs lengths; index it with --tokenizer and --template")
        samples = [
            samples_of(options, reader, source.template or options.template, tokenizer)
            for source, reader in zip(sources, readers, strict=True)
        ]
        if options.sample is not None and not any(samples):
            raise ShardError(not_found(options, readers))
        sheet = None
        if options.contact_sheet is not None:
            sheet = write_contact_sheet(readers[0], options.contact_sheet, options.contact_samples)
    except (UserError, OSError) as error:
        return refuse(prog, error)
    if options.json:
        for figures, shown in zip(found, samples, strict=True):
            figures["sample"] = [asdict(sample) for sample in shown]
            figures["contact_sheet"] = sheet
        whole: Any = {"datasets": found} if options.data_path.is_file() else found[0]
        print(json.dumps(whole, indent=1, ensure_ascii=False))
        return 0
    for source, figures, shown in zip(sources, found, samples, strict=True):
        if len(sources) > 1 and (shown or options.sample is None):
            console.print(f"data set {source.name}", style="bold")
        for sample in shown:
            print_sample(options.sample, sample, console)
        if options.sample is None:
            print_figures(figures, console)
    if sheet is not None:
        print(f"{options.contact_sheet}: {len(sheet)} samples")
    return 0


def samples_of(
    options: argparse.Namespace,
    reader: ShardReader,
    template: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[Inspected]:
    """The samples of a data set that --sample names."""
    from rich.console import Console
    from rich.progress import Progress

    from ross_mcore.data.spec import SampleSpec
    from ross_mcore.data.templates import with_template
    from ross_mcore.shards.inspection import Inspected, find_samples, record_of, tokens_of

    if options.sample is None:
        return []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("records", total=len(reader), visible=False)
        numbers = find_samples(reader, options.sample, lambda read: bar.update(task, completed=read, visible=read > 0))
    records = [record_of(reader, number) for number in numbers]
    if tokenizer is None or template is None or not numbers:
        return [Inspected(record) for record in records]
    spec = with_template(SampleSpec(mm_use_im_start_end=options.mm_use_im_start_end), template, tokenizer)
    images = [int(reader.samples[number]["num_images"]) for number in numbers]
    return [tokens_of(record, count, tokenizer, spec) for record, count in zip(records, images, strict=True)]


def not_found(options: argparse.Namespace, readers: Sequence[ShardReader]) -> str:
    from ross_mcore.checked import shown
    from ross_mcore.data.remote import is_remote
    from ross_mcore.shards.inspection import MOST_SEARCHED

    ids = " or this id"
    if any(is_remote(shard["name"]) for reader in readers for shard in reader.index["shards"]):
        ids = ", and ids are not looked up in shards behind URLs"
    elif max(map(len, readers)) > MOST_SEARCHED:
        ids = f", and none of the first {MOST_SEARCHED:,} records has this id"
    first = [key for reader in readers for key in reader.keys(range(min(3, len(reader))))]
    named = f"{options.data_path}: no sample has the key {shown(options.sample)}{ids}"
    return f"{named}; the first keys: {first}; give one of keys.txt"
