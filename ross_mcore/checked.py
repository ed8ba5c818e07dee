"""JSON and YAML that somebody else wrote: read within bounds, their values of the right kind and size, or a reason why.

Everything here raises ValueError with a reason that names the key and never the program's inside; callers put the file
in front and say what to do.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
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
"""Of a JSON file that is read whole: brackets alone would make twenty times as much of it in memory."""
MOST_YAML_BYTES = 1 << 20
MOST_TOKENIZER_FILE_BYTES = 128 << 20
MOST_LINE_BYTES = 16 << 20
MOST_SHOWN_CHARACTERS = 80
_SHORT = reprlib.Repr()  # of what may be nested without end, as YAML's aliases make it
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = MOST_SHOWN_CHARACTERS


def shown(value: object) -> str:
    """A value for a message: on one line, without control characters, not long."""
    text = _SHORT.repr(value)
    return text if len(text) <= MOST_SHOWN_CHARACTERS else text[: MOST_SHOWN_CHARACTERS - 3] + "..."


def reason(error: BaseException) -> str:
    """What a library said, in one short line; for an error without words, that something is damaged."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = " ".join(str(error).split("\n", 1)[0].split()).split(". ")[0].rstrip(". :")
    wordless = isinstance(error, (KeyError, IndexError, AssertionError, AttributeError, TypeError, RecursionError))
    if wordless or " " not in said or any(inside in said for inside in (" object at 0x", "invalid literal")):
        return "it is damaged"
    said = printable(said)
    return said if len(said) <= 200 else said[:197] + "..."


def printable(text: str) -> str:
    """A text for a terminal, with a question mark for each character that would steer it."""
    return "".join(character if character.isprintable() else "?" for character in text)


def read_json(
    path: Path, most_bytes: int = MOST_FILE_BYTES, as_mapping: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """What a JSON file holds; `as_mapping` makes a mapping of its pairs. Raises ValueError, FileNotFoundError."""
    text = read_text(path, most_bytes)
    try:
        return json.loads(text, object_pairs_hook=as_mapping)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError:  # Python reads no integer of thousands of digits
        raise ValueError("it has a number of too many digits") from None


def real_path(path: Path) -> Path:
    """As Path.resolve, which raises RuntimeError for links in a circle; here they stay what they are."""
    return Path(os.path.realpath(path))


def require_regular(path: Path, most_bytes: int | None = None) -> None:
    """Raises ValueError for a pipe, a device or a folder, which may have no end, or a file of more bytes.

    Raises FileNotFoundError too.
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
    """The lines of a file, None in the place of a longer one. Raises ValueError, OSError."""
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
    """A file of UTF-8. Raises ValueError, FileNotFoundError."""
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
    """What a YAML file holds. Raises ValueError, FileNotFoundError."""
    import yaml

    text = read_text(path, MOST_YAML_BYTES)
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None
    except ValueError:  # of Python's own int and date
        raise ValueError("it has a number of too many digits, or a date that there is not") from None


def mapping(value: Any, what: str) -> dict[str, Any]:
    """`value`, which is a mapping. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {shown(value)}, expected a mapping")
    return value


def count(data: Mapping[str, Any], key: str, default: int | None = None, least: int = 1, most: int = MOST_COUNT) -> int:
    """A whole number of a mapping; `default` where there is none. Raises ValueError."""
    value = default if data.get(key) is None else data[key]
    if value is None:
        raise ValueError(f"{key} is missing, expected a whole number from {least} to {most}")
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{key} is {shown(value)}, expected a whole number from {least} to {most}")
    return value


def real(
    data: Mapping[str, Any], key: str, default: float | None = None, above: float = -math.inf, most: float = 1e30
) -> float:
    """A finite number of a mapping, larger than `above`. Raises ValueError."""
    value = default if data.get(key) is None else data[key]
    if value is None:
        raise ValueError(f"{key} is missing, expected a number")
    if type(value) not in (int, float) or not math.isfinite(value) or not above < value <= most:
        bound = "" if above == -math.inf else f" above {above:g}"
        raise ValueError(f"{key} is {shown(value)}, expected a number{bound}")
    return float(value)


def switch(data: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false of a mapping. Raises ValueError."""
    value = default if data.get(key) is None else data[key]
    if type(value) is not bool:
        raise ValueError(f"{key} is {shown(value)}, expected true or false")
    return value


def text(data: Mapping[str, Any], key: str) -> str:
    """A text of a mapping. Raises ValueError."""
    value = data.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} is {shown(value)}, expected text")
    return value


def build(kind: type[T], data: Any, what: str) -> T:
    """A dataclass from a mapping of its fields, each of the type that it is annotated with. Raises ValueError."""
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
