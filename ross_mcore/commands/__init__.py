"""The commands: one module each, with `main(arguments, prog) -> exit status`.

The program `ross` and the scripts in tools/ run the same modules. Each parses its arguments before heavy imports, so
that `--help` and errors in arguments appear immediately.
"""

from __future__ import annotations

import argparse
import errno
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ross_mcore.arguments import Parser
from ross_mcore.errors import UserError
from ross_mcore.launcher import record_failure
from ross_mcore.logs import complain

if TYPE_CHECKING:
    from ross_mcore.data.spec import SampleSpec
    from ross_mcore.shards.account import Account


TEMPLATE_HELP = "plain, qwen_2, v1, llama3, chatml, tokenizer (its own chat template), or a YAML file"


class Command(NamedTuple):
    """A subcommand of `ross`: the script in the repository that runs the same module, and one line of help."""

    script: str
    summary: str


COMMANDS = {
    "make-shards": Command("tools/make_shards.py", "LLaVA JSON and pictures -> tar shards with an index"),
    "index-shards": Command("tools/index_shards.py", "index any WebDataset tars, local files or URLs"),
    "inspect-shards": Command("tools/inspect_shards.py", "show lengths, labels, pictures, bad samples of a data set"),
    "precompute": Command("tools/precompute_latents.py", "store latents and features of all pictures in new shards"),
    "convert": Command("tools/convert_hf_to_mcore.py", "Hugging Face folders or a ROSS model -> a checkpoint"),
    "plan": Command("tools/plan_layout.py", "show stages, balance and memory of a run without starting it"),
    "train": Command("pretrain_ross.py", "train a model, in one process or under torchrun"),
    "check": Command("tools/check_checkpoint.py", "verify a checkpoint and print its contents"),
    "report": Command("tools/report.py", "one HTML page about runs: curves, reconstructions, settings compared"),
    "reconstruct": Command("tools/reconstruct.py", "reconstruct pictures from a model's image states"),
    "chat": Command("tools/chat.py", "talk with a model in the terminal, or answer the questions of a file"),
    "serve": Command("tools/serve.py", "an OpenAI-compatible server, and a page to talk to models in a browser"),
    "eval": Command("tools/evaluate.py", "score a model on POPE, MMVP and other questions, or reconstructions"),
    "export": Command("tools/convert_mcore_to_hf.py", "a checkpoint -> a ROSS model or Hugging Face folders"),
}
"""Subcommand -> its script and help, in the usual order of a project."""

UNDER_TORCHRUN = ("train", "precompute", "eval")
"""Commands that run as several processes: `torchrun ... --no-python ross NAME`."""


def build_parser(prog: str, description: str | None, epilog: str | None = None) -> Parser:
    """The parser of a command; scripts are named as subcommands when `prog` is one."""
    return Parser(prog=prog, description=as_started(description or "", prog), epilog=as_started(epilog or "", prog))


def add_sample_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of make-shards and index-shards that decide which samples are used and how they are measured."""
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder: stores token and label counts, for packing")
    parser.add_argument("--template", help=f"conversation template of the counts: {TEMPLATE_HELP}")
    parser.add_argument("--mm-use-im-start-end", action="store_true", help="count as in training with this flag")
    parser.add_argument(
        "--max-images-per-sample", type=int, default=64, metavar="N", help="skip samples with more pictures (64)"
    )
    parser.add_argument(
        "--max-tokens-per-sample",
        type=int,
        metavar="N",
        help="skip samples with more tokens of text; needs --tokenizer and --template",
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.001,
        metavar="F",
        help="limit of the share of bad samples (0.001); more are refused",
    )
    parser.add_argument(
        "--truncated-images",
        choices=("refuse", "fill"),
        default="refuse",
        help="pictures whose files are cut off are bad, or filled with grey or black as the reference does (refuse)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def check_sample_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if (options.tokenizer is None) != (options.template is None):
        parser.error("--tokenizer and --template need each other: lengths depend on both")
    if options.mm_use_im_start_end and options.template is None:
        parser.error("--mm-use-im-start-end needs --tokenizer and --template: it changes the counts")
    if options.max_tokens_per_sample is not None and options.template is None:
        parser.error("--max-tokens-per-sample needs --tokenizer and --template, which define the tokens")
    if not 0 <= options.max_bad_fraction <= 1:
        parser.error("--max-bad-fraction is between 0 and 1")
    if options.max_images_per_sample < 1 or (options.max_tokens_per_sample or 1) < 1:
        parser.error("--max-images-per-sample and --max-tokens-per-sample must be at least 1")


def sample_spec(options: argparse.Namespace) -> SampleSpec:
    """The spec of the sample options. Raises TokenizerError for a template that is unknown or does not fit."""
    from ross_mcore.data.spec import SampleSpec
    from ross_mcore.data.templates import require_known, with_template
    from ross_mcore.data.tokenizer import load_tokenizer

    spec = SampleSpec(
        mm_use_im_start_end=options.mm_use_im_start_end,
        max_images_per_sample=options.max_images_per_sample,
        max_tokens_per_sample=options.max_tokens_per_sample,
        truncated_images=options.truncated_images,
    )
    if options.template is None:
        return spec
    require_known(options.template)
    return with_template(spec, options.template, load_tokenizer(options.tokenizer))


def print_account(account: Account) -> None:
    """Prints what training will see of a data set, the same text for all tools; red in a terminal is to be mended."""
    from rich.console import Console
    from rich.text import Text

    console, lines = Console(markup=False, emoji=False, highlight=False), account.lines()
    width = max(len(line.name) for line in lines) + 2
    for line in lines:
        console.print(Text(f"{line.name:<{width}}{line.text}", "red" if line.is_wrong else ""), soft_wrap=True)


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its own, with as many of those above it as tell it from the others.

    The folder of a single checkpoint (iter_*) always has its run's name before it; folders given twice are numbered.
    """
    whole = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length - parts[-1].startswith("iter_") :]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{parts[-1]} {number}" for number, parts in enumerate(whole, start=1)]


REMEDIES = {
    errno.ENOENT: "give a path that exists",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EISDIR: "this is a folder; give a file",
    errno.EACCES: "give this user the right to it, or another path",
    errno.EPERM: "give this user the right to it, or another path",
    errno.EROFS: "give a path that can be written",
    errno.ENOSPC: "free some space, or give a path on another disk",
    errno.EDQUOT: "free some space, or give a path on another disk",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "a link on this path leads to itself",
}
"""Errors of the operating system -> what to do."""


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that nothing half-written and no process is left."""

    def end(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def interrupted(prog: str, what: str) -> int:
    """Prints that `prog` was stopped by a signal, and what is left of its work; returns the exit status 130."""
    print(f"{prog}: stopped by a signal; {what}", file=sys.stderr)
    return 130


def refuse(prog: str, error: object) -> int:
    """Prints an error or message of `prog`, leaves it for torchrun, and returns the exit status 2."""
    text = f"{prog}: {as_started(describe(error), prog)}"
    record_failure(text)
    complain(text)
    return 2


def describe(error: object) -> str:
    """An error as one paragraph: an OSError of Python as `file: reason; remedy`."""
    if isinstance(error, UserError) or not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{files or 'a file'}: {error.strerror}; {REMEDIES.get(error.errno or 0, 'try again, or give another path')}"


def as_started(text: str, prog: str) -> str:
    """Replaces names of scripts in `text` by subcommands when `prog` is a subcommand of `ross`."""
    if not prog.startswith("ross "):
        return text
    for name, command in COMMANDS.items():
        text = text.replace(f"python {command.script}", f"ross {name}")
        if name in UNDER_TORCHRUN:
            text = text.replace(f" {command.script} -", f" --no-python ross {name} -")
        text = text.replace(command.script, f"ross {name}")
    return text
