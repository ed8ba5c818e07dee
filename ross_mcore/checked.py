"""Reads JSON, YAML and text from outside within bounds, and checks the type and size of values.

All functions raise ValueError with a reason that names the key, in the user's words; callers add the file and the
remedy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import reprlib
import stat
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

MOST_COUNT = 2**31 - 1
MOST_FILE_BYTES = 32 << 20
"""Limit of a JSON file that is read whole: a file of brackets takes twenty times its size in memory."""
MOST_YAML_BYTES = 1 << 20
MOST_TOKENIZER_FILE_BYTES = 128 << 20
MOST_LINE_BYTES = 16 << 20
MOST_SHOWN_CHARACTERS = 80
_SHORT = reprlib.Repr()  # bounded, because YAML aliases can nest a value without end
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = MOST_SHOWN_CHARACTERS


def shown(value: object) -> str:
    """A value as text for a message: one line without control characters, at most MOST_SHOWN_CHARACTERS."""
    text = _SHORT.repr(value)
    return text if len(text) <= MOST_SHOWN_CHARACTERS else text[: MOST_SHOWN_CHARACTERS - 3] + "..."


def reason(error: BaseException) -> str:
    """A library's error as one short line; `it is damaged` for errors whose text means nothing to a user."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    message = " ".join(str(error).split("\n", 1)[0].split()).split(". ")[0].rstrip(". :")
    wordless = isinstance(error, (KeyError, IndexError, AssertionError, AttributeError, TypeError, RecursionError))
    if wordless or " " not in message or any(inside in message for inside in (" object at 0x", "invalid literal")):
        return "it is damaged"
    message = printable(message)
    return message if len(message) <= 200 else message[:197] + "..."


def printable(text: str) -> str:
    """A text for a terminal, with a question mark in place of each control character."""
    return "".join(character if character.isprintable() else "?" for character in text)


SECRET_NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD")
"""Parts of the names of environment variables whose values are never shown."""
SHORTEST_SECRET = 8


def without_secrets(text: str) -> str:
    """`text` without the user part of URLs and without values of environment variables that hold secrets."""
    text = re.sub(r"(?<=://)[^/@\s]+@", "***@", text)
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and any(part in name.upper() for part in SECRET_NAMES):
            text = text.replace(value, "***")
    return text


def read_json(
    path: Path, most_bytes: int = MOST_FILE_BYTES, as_mapping: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """The value in a JSON file; `as_mapping` builds an object from its pairs. Raises ValueError, FileNotFoundError."""
    text = read_text(path, most_bytes)
    try:
        return json.loads(text, object_pairs_hook=as_mapping)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError:  # Python refuses integers of thousands of digits
        raise ValueError("it has a number of too many digits") from None


def real_path(path: Path) -> Path:
    """Path.resolve for any path: links in a circle, for which that raises RuntimeError, stay as they are."""
    return Path(os.path.realpath(path))


def require_regular(path: Path, most_bytes: int | None = None) -> None:
    """Raises ValueError unless `path` is a regular file (a pipe or device may have no end) of at most `most_bytes`.

    Raises FileNotFoundError when it does not exist.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(reason(error)) from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if most_bytes is not None and status.st_size > most_bytes:
        raise ValueError(f"it has {status.st_size} bytes, at most {most_bytes} are read")


def read_lines(path: Path, most_bytes: int = MOST_LINE_BYTES) -> Iterator[bytes | None]:
    """The lines of a file, None for one longer than `most_bytes`. Raises ValueError, OSError."""
    require_regular(path)
    with path.open("rb") as stream:
        while line := stream.readline(most_bytes + 1):
            if len(line) > most_bytes:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(most_bytes)
                yield None
            else:
                yield line


def read_text(path: Path, most_bytes: int = MOST_FILE_BYTES) -> str:
    """The text of a UTF-8 file. Raises ValueError, FileNotFoundError."""
    try:
        require_regular(path, most_bytes)
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(reason(error)) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None


def read_yaml(path: Path) -> Any:
    """The value in a YAML file. Raises ValueError, FileNotFoundError."""
    import yaml

    text = read_text(path, MOST_YAML_BYTES)
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None
    except ValueError:  # from Python's int and date
        raise ValueError("it has a number of too many digits, or a date that does not exist") from None


def mapping(value: Any, what: str) -> dict[str, Any]:
    """`value` if it is a mapping. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {shown(value)}, expected a mapping")
    return value


def count(data: Mapping[str, Any], key: str, default: int | None = None, least: int = 1, most: int = MOST_COUNT) -> int:
    """The whole number at `key` from `least` to `most`; `default` when missing. Raises ValueError."""
    value = default if data.get(key) is None else data[key]
    if value is None:
        raise ValueError(f"{key} is missing, expected a whole number from {least} to {most}")
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{key} is {shown(value)}, expected a whole number from {least} to {most}")
    return value


def real(
    data: Mapping[str, Any], key: str, default: float | None = None, above: float = -math.inf, most: float = 1e30
) -> float:
    """The finite number at `key`, larger than `above`; `default` when missing. Raises ValueError."""
    value = default if data.get(key) is None else data[key]
    if value is None:
        raise ValueError(f"{key} is missing, expected a number")
    if type(value) not in (int, float) or not math.isfinite(value) or not above < value <= most:
        bound = "" if above == -math.inf else f" above {above:g}"
        raise ValueError(f"{key} is {shown(value)}, expected a number{bound}")
    return float(value)


def switch(data: Mapping[str, Any], key: str, default: bool) -> bool:
    """The boolean at `key`; `default` when missing. Raises ValueError."""
    value = default if data.get(key) is None else data[key]
    if type(value) is not bool:
        raise ValueError(f"{key} is {shown(value)}, expected true or false")
    return value


def text(data: Mapping[str, Any], key: str) -> str:
    """The text at `key`. Raises ValueError."""
    value = data.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} is {shown(value)}, expected text")
    return value


def build(kind: type[T], data: Any, what: str) -> T:
    """A dataclass from a mapping of its fields, each checked against its annotation. Raises ValueError."""
    data = mapping(data, what)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    if unknown := [key for key in data if key not in fields]:
        raise ValueError(f"{what} has an unknown key {shown(unknown[0])}")
    for name, field in fields.items():
        if name in data:
            if not _fits(data[name], hints[name]):
                raise ValueError(f"{name} of {what} is {shown(data[name])}, expected {_in_words(hints[name])}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{what} has no key {name!r}")
    return kind(**data)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is typing.Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        parts = [arguments[0]] * len(value) if arguments[-1] is Ellipsis and isinstance(value, list) else arguments
        return isinstance(value, (list, tuple)) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is dict:
        return isinstance(value, dict) and all(_fits(inner, arguments[1]) for inner in value.values())
    if hint is Any:
        return True
    if hint is float:
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value) is hint and (hint is not int or abs(value) < 2**63)


def _in_words(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_in_words, arguments))
    if origin is typing.Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        return "a list of numbers" if arguments[-1] is Ellipsis else f"a list of {len(arguments)} numbers"
    return names.get(hint, "a mapping")
