"""Dataclass fields -> command-line flags and YAML keys. Nothing else parses training arguments.

A field gives a flag's name, type and default; the text under the field is the flag's help. YAML files of `--config`
use the same names: the command line wins over them, a later file over an earlier one. A recipe is a YAML file that is
installed with the package; its name is its path without the suffix.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ross_mcore import checked
from ross_mcore.arguments import LISTED, Parser, answer
from ross_mcore.config import SECTIONS, Config, require_complete
from ross_mcore.errors import ConfigError
from ross_mcore.options import flag_of

SCRIPT = "pretrain_ross.py"
RECIPES = Path(__file__).parent / "recipes"

DESCRIPTION = """\
Train a ROSS model: a vision tower, a projector and a Qwen2 or Llama language model on lm_loss, and a denoiser that
reconstructs the image's latents from the model's own image states on vm_loss. The architecture is read from --load.
"""
EPILOG = """\
example, four processes as two pipeline stages of two tensor-parallel ranks:
  torchrun --nproc-per-node 4 {started} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 \\
      --load base --data-path shards --save runs/pretrain --train-iters 1000 --global-batch-size 64
The same command again continues a run that was stopped.
"""


@functools.cache
def field_help(section: type) -> dict[str, str]:
    """Field name -> the string literal under it in the class body."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    texts: dict[str, str] = {}
    for statement, after in zip(definition.body, definition.body[1:]):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            texts[statement.target.id] = " ".join(str(after.value.value).split())
    return texts


def build_parser(prog: str = SCRIPT) -> Parser:
    """The parser of `prog`. Defaults are suppressed, so that the parsed values are those that were given."""
    started = prog if prog == SCRIPT else f"--no-python {prog}"
    parser = Parser(
        prog=prog,
        usage=f"torchrun --nproc-per-node N {started} [--config YAML] [options]",
        description=DESCRIPTION,
        epilog=EPILOG.format(started=started),
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="YAML", help="options from a YAML file or a recipe; repeatable"
    )
    for section in SECTIONS.values():
        group = parser.add_argument_group((section.__doc__ or section.__name__).strip())
        hints, texts = typing.get_type_hints(section), field_help(section)
        for item in dataclasses.fields(section):
            kind = _without_none(hints[item.name])
            default = "" if item.default is None else f" [{item.default}]"
            options: dict[str, Any] = {
                "dest": item.name,
                "default": argparse.SUPPRESS,
                "help": (texts[item.name] + default).replace("%", "%%"),
            }
            if kind is bool:
                group.add_argument(flag_of(item.name), action=argparse.BooleanOptionalAction, **options)
            elif typing.get_origin(kind) is typing.Literal:
                group.add_argument(flag_of(item.name), choices=typing.get_args(kind), **options)
            else:
                metavar = {int: "N", float: "X", str: "TEXT"}[kind]
                group.add_argument(flag_of(item.name), type=kind, metavar=metavar, **options)
    return parser


EXCLUSIVE = (
    ("train_iters", "train_epochs"),
    ("global_batch_size", "global_batch_samples"),
    ("lr_warmup_iters", "lr_warmup_fraction"),
)
"""Pairs of options that exclude each other; on the command line, one replaces the other of a YAML file."""


def parse(argv: Sequence[str] | None = None, complete: bool = True, prog: str = SCRIPT) -> Config:
    """Command line and YAML -> Config; on an error prints one paragraph and exits with status 2.

    `complete=False` accepts options that a run still lacks. `prog` is the program that errors name.
    """
    parser = build_parser(prog)
    given = vars(parser.parse_args(argv))
    files = given.pop("config")
    try:
        merged: dict[str, Any] = {}
        for source in (*(read_yaml(path, parser) for path in files), given):
            for pair in EXCLUSIVE:
                if any(source.get(name) is not None for name in pair):
                    for name in pair:
                        merged.pop(name, None)
            merged.update(source)
        config = Config.from_flat(**merged)
        if complete:
            require_complete(config)
        return config
    except ConfigError as error:
        parser.refuse(str(error))


def recipes() -> dict[str, Path]:
    """The installed recipes: name, as `train_ross/pretrain_siglip_qwen2`, to file."""
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in sorted(RECIPES.rglob("*.yaml"))}


def _read_file_or_recipe(path: str) -> Any:
    try:
        return checked.read_yaml(Path(path))
    except FileNotFoundError:
        return checked.read_yaml(recipes().get(path, Path(path)))


class _Refusing(Parser):
    """Turns the parser's exit into a ConfigError that names the YAML file."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def read_yaml(path: str, parser: Parser) -> dict[str, Any]:
    """Options from a YAML mapping of flag names (dashes or underscores), checked like the command line.

    `path` is a file or the name of a recipe. Raises ConfigError.
    """
    try:
        data = _read_file_or_recipe(path) or {}
    except FileNotFoundError:
        raise ConfigError(
            f"--config {path}: no such file; give a YAML file of options, or a recipe: {', '.join(recipes())}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"--config {path}: expected a mapping of option names to values")
    known = {name for section in SECTIONS.values() for name in (f.name for f in dataclasses.fields(section))}
    tokens: list[str] = []
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(
                f"--config {path}: unknown option {checked.shown(key)}{answer(name, parser.flags()) or LISTED}"
            )
        if isinstance(value, bool):
            tokens.append(flag_of(name) if value else "--no-" + flag_of(name)[2:])
        elif isinstance(value, (str, int, float)):
            tokens.append(f"{flag_of(name)}={value}")
        elif value is not None:
            raise ConfigError(f"--config {path}: {key} must be a single value, got {type(value).__name__}")
    strict = _Refusing(prog=parser.prog, parents=[parser], add_help=False, conflict_handler="resolve")
    try:
        values = vars(strict.parse_args(tokens))
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from None
    values.pop("config", None)
    return values


def _without_none(kind: Any) -> Any:
    """`int | None` -> `int`."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind
