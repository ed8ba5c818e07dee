"""`ross COMMAND ...`, also `python -m ross_mcore COMMAND ...`: runs one of the commands in ross_mcore/commands."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

from ross_mcore import __version__
from ross_mcore.arguments import Parser
from ross_mcore.commands import COMMANDS

EPILOG = """\
`ross COMMAND --help` lists the options of a command. Several processes are started by torchrun:
  torchrun --nproc-per-node 8 --no-python ross train --config train_ross/pretrain_siglip_qwen2 ...
  torchrun --nproc-per-node 8 -m ross_mcore train --config train_ross/pretrain_siglip_qwen2 ...
"""


def build_parser() -> Parser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    parser = Parser(
        prog="ross",
        usage="ross COMMAND [options]",
        description="\n".join(("Model-parallel training of ROSS. The commands:", *lines)),
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"ross_mcore {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names and returns its exit status; wrong arguments exit with 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean ross {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
        parser.refuse(f"{words[0]} is not a command; {hint}")
    name: str = parser.parse_args(words[:1]).command
    module = importlib.import_module(f"ross_mcore.commands.{name.replace('-', '_')}")
    run = module.run if name == "train" else module.main
    return int(run(words[1:], f"ross {name}"))


if __name__ == "__main__":
    sys.exit(main())
