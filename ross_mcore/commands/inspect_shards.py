"""Shows figures of a data set before training: sizes, lengths, labels, bad samples.

  python tools/inspect_shards.py --data-path shards/finetune --seq-length 2048 --image-tokens 729
  python tools/inspect_shards.py --data-path shards/finetune --contact-sheet sheet.png
  python tools/inspect_shards.py --data-path shards/finetune --sample 000000123 \\
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

    from ross_mcore.shards.inspection import Token

SCRIPT = "inspect_shards.py"


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> argparse.Namespace:
    parser = build_parser(prog, __doc__)
    parser.add_argument("--data-path", type=Path, required=True, help="folder with an index")
    parser.add_argument("--seq-length", type=int, metavar="N", help="tokens of a row, to show how full packed rows are")
    parser.add_argument(
        "--image-tokens", type=int, metavar="N", help="tokens per picture: 729 for siglip-so400m-384, 576 for clip-336"
    )
    parser.add_argument("--sample", metavar="KEY", help="print this record, and with the next two flags its tokens")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder")
    parser.add_argument("--template", help=f"conversation template: {TEMPLATE_HELP}")
    parser.add_argument("--mm-use-im-start-end", action="store_true", help="tokens as in training with this flag")
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help="draw samples with their texts")
    parser.add_argument("--contact-samples", type=int, default=24, metavar="N", help="number of samples in it (24)")
    parser.add_argument("--data-cache-dir", type=Path, help="folder for shards downloaded from URLs")
    parser.add_argument("--data-cache-bytes", type=int, default=64 << 30, metavar="BYTES", help="limit of its size")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(arguments)
    if (options.tokenizer is None) != (options.template is None):
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


def print_sample(key: str, record: dict[str, Any], tokens: list[Token] | None, console: Console) -> None:
    from rich.json import JSON
    from rich.text import Text

    from ross_mcore.checked import printable

    console.rule(Text(key))
    console.print(JSON(json.dumps(record)))
    if tokens is None:
        return
    styles = {True: "bold green", False: "dim"}
    shown = Text("\n")
    for token in tokens:
        text = printable(token.text.replace("\n", "\\n"))
        shown.append(f"[{text}]" if token.supervised else text, styles[token.supervised]).append("|", "dim")
    console.print(shown, highlight=False)
    supervised = sum(token.supervised for token in tokens)
    console.print(f"{len(tokens)} tokens (an image counts as one), {supervised} in brackets are supervised")


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options = parse_arguments(arguments, prog)
    from rich.console import Console

    from ross_mcore.data.shard_reader import ShardReader
    from ross_mcore.data.spec import SampleSpec
    from ross_mcore.data.templates import require_known, with_template
    from ross_mcore.data.tokenizer import load_tokenizer
    from ross_mcore.errors import ShardError, UserError
    from ross_mcore.shards.inspection import inspect, record_of, tokens_of, write_contact_sheet

    console = Console(markup=False, emoji=False)
    try:
        if options.template is not None:
            require_known(options.template)
        reader = ShardReader(options.data_path, options.data_cache_dir, options.data_cache_bytes)
        found = inspect(reader, options.seq_length, options.image_tokens)
        if options.seq_length and found["packing"] is None:
            raise ShardError(f"{options.data_path}: packing needs lengths; index it with --tokenizer and --template")
        found["sample"], found["contact_sheet"] = [], None
        tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
        numbers = [] if options.sample is None else reader.find([options.sample])[options.sample]
        if options.sample is not None and not numbers:
            first = reader.keys(range(min(3, len(reader))))
            raise ShardError(f"{options.data_path}: no sample has the key {options.sample!r}; the first keys: {first}")
        samples = []
        for number in numbers:
            record, tokens = record_of(reader, number), None
            if tokenizer is not None:
                spec = SampleSpec(mm_use_im_start_end=options.mm_use_im_start_end)
                spec = with_template(spec, options.template, tokenizer)
                tokens = tokens_of(record, int(reader.samples[number]["num_images"]), tokenizer, spec)
            samples.append((record, tokens))
        if options.contact_sheet is not None:
            found["contact_sheet"] = write_contact_sheet(reader, options.contact_sheet, options.contact_samples)
    except (UserError, OSError) as error:
        return refuse(prog, error)
    if options.json:
        found["sample"] = [{"record": r, "tokens": t and [asdict(token) for token in t]} for r, t in samples]
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return 0
    if samples:
        for record, tokens in samples:
            print_sample(options.sample, record, tokens, console)
    else:
        print_figures(found, console)
    if options.contact_sheet is not None:
        print(f"{options.contact_sheet}: {len(found['contact_sheet'])} samples")
    return 0
