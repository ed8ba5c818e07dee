"""The console commands: one module each, with `main(arguments, prog) -> exit status`.

The command `ross` and the scripts in tools/ run the same modules. Each module parses its arguments before it imports
anything heavy, so that help and wrong arguments are answered at once.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple


class Command(NamedTuple):
    """A subcommand of `ross`: the script of the repository that runs the same module, and one line of help."""

    script: str
    summary: str


COMMANDS = {
    "make-shards": Command("tools/make_shards.py", "a LLaVA JSON and its pictures -> tar shards with an index"),
    "index-shards": Command("tools/index_shards.py", "an index for any WebDataset tars, local or behind URLs"),
    "inspect-shards": Command("tools/inspect_shards.py", "lengths, labels, bad samples and pictures of a data set"),
    "precompute": Command("tools/precompute_latents.py", "latents and features of all pictures, into new shards"),
    "convert": Command("tools/convert_hf_to_mcore.py", "Hugging Face folders or a ROSS model -> a checkpoint"),
    "plan": Command("tools/plan_layout.py", "stages, balance and memory of a run, without starting it"),
    "train": Command("pretrain_ross.py", "train a model, on one process or under torchrun"),
    "check": Command("tools/check_checkpoint.py", "verify a checkpoint and print what it holds"),
    "reconstruct": Command("tools/reconstruct.py", "pictures over what a model's image states reconstruct"),
    "export": Command("tools/convert_mcore_to_hf.py", "a checkpoint -> a ROSS model or Hugging Face folders"),
}
"""Subcommand -> its script and help, in the order in which a project needs them."""

UNDER_TORCHRUN = ("train", "precompute")
"""Commands that run as several processes: `torchrun ... --no-python ross NAME`."""


def build_parser(prog: str, description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help keeps its line breaks and names programs as `prog` was started."""
    return argparse.ArgumentParser(
        prog=prog,
        description=as_started(description or "", prog),
        epilog=as_started(epilog or "", prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def refuse(prog: str, message: object) -> int:
    """Prints why `prog` cannot work and returns its exit status."""
    print(f"{prog}: {as_started(str(message), prog)}", file=sys.stderr)
    return 2


def as_started(text: str, prog: str) -> str:
    """`text`, with the scripts that it names replaced by subcommands when `prog` is one of `ross`."""
    if not prog.startswith("ross "):
        return text
    for name, command in COMMANDS.items():
        text = text.replace(f"python {command.script}", f"ross {name}")
        if name in UNDER_TORCHRUN:
            text = text.replace(f" {command.script} -", f" --no-python ross {name} -")
        text = text.replace(command.script, f"ross {name}")
    return text
