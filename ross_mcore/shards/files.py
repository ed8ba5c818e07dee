"""Files of records: JSON in the layouts that people write, parquet and arrow, and folders of them.

`read_records` counts the records and yields them one after the other. What is not read is named with the remedy, see
UNREAD_FILES.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ross_mcore import checked
from ross_mcore.data.records import TURNS_KEYS, has_turns
from ross_mcore.errors import RecordsError, SampleError
from ross_mcore.shards.tables import open_arrow, open_parquet

REMEDY = "copy it again, or write it again as a JSON list of records, or as .jsonl with one record a line"
HEAD_BYTES = 4096
NOT_SPACE = re.compile(r"\S")
AS_LINES = "to_json('train.jsonl', orient='records', lines=True)"
UNREAD_FILES = {
    (".csv", ".tsv"): f"is CSV; write it as JSON lines, with pandas.read_csv(...).{AS_LINES}",
    (".xlsx", ".xls", ".ods"): f"is a spreadsheet; write it as JSON lines, with pandas.read_excel(...).{AS_LINES}",
    (".gz", ".zst", ".xz", ".bz2", ".zip", ".7z", ".rar"): "is compressed; unpack it first",
    (".tar", ".tgz"): "is a tar; tools/index_shards.py indexes tars of pictures and records for training",
    (".yaml", ".yml"): "is YAML; convert each JSON file that it lists, and mix the data sets by a YAML for --data-path",
    (".pkl", ".pickle", ".pt", ".npy", ".npz", ".h5", ".hdf5", ".mdb", ".lance", ".mds", ".bin", ".idx", ".db"): (
        "is not a file of JSON records; write it as .jsonl with one record a line"
    ),
    (".txt", ".md", ".xml", ".html", ".py"): "is text; write it as .jsonl with one record a line",
}
"""Kinds of files by suffix, and what to do with them."""
MAGIC = {
    b"\x1f\x8b": "is compressed; unpack it first",
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed; unpack it first",
    b"\xff\xfe": "is UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8",
    b"version https://git-lfs": "is a pointer of Git LFS; fetch the file with git lfs pull",
    b"<": "is a web page or XML; download the file again",
}
"""Kinds of files by their first bytes."""
DATA_SET_KEYS = {"file_name", "hf_hub_url", "ms_hub_url", "script_url", "annotation", "annotation_path", "json_path"}
"""Keys of a data set in the lists of LLaMA-Factory and InternVL."""
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "index.json")
SPLIT = re.compile(
    r"(?P<hub>.+)-\d{5}-of-\d{5}.*|(?:.*[^a-z])?(?P<word>train|training|test|validation|valid|val|dev|eval)(?:[^a-z].*)?"
)
"""The split in the name of a file: train-00000-of-00012, or a word of its own."""

Opened = tuple[int, Callable[[], Iterable[Any]]]
"""(number of records, opens them)."""


def read_records(path: Path, split: str | None = None) -> tuple[int, Iterator[Any]]:
    """(number of records, the records) of a file, or of a folder of files of one kind, in the order of their names.

    `split`: which part of a folder that has several. A damaged line of JSON lines is one bad record, a SampleError.
    Raises RecordsError naming the file and the remedy.
    """
    try:
        files = _files_of(path, split) if path.is_dir() else [path]
    except OSError as error:
        raise RecordsError(f"{path} cannot be read: {checked.reason(error)}") from None
    opened = [_open(file, keep=len(files) == 1) for file in files]
    return sum(count for count, _ in opened), chain.from_iterable(read() for _, read in opened)


def _open(path: Path, keep: bool) -> Opened:
    """Opens a file. A list of JSON is parsed to count it: it is kept, or else parsed again, so that few are held."""
    remedy = next((remedy for suffixes, remedy in UNREAD_FILES.items() if path.suffix.lower() in suffixes), None)
    try:
        checked.require_regular(path)
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
        remedy = remedy or next((said for start, said in MAGIC.items() if head.lstrip().startswith(start)), None)
        if remedy is not None:
            raise RecordsError(f"{path} {remedy}")
        if head.startswith(b"PAR1") or path.suffix.lower() in (".parquet", ".pq"):
            return open_parquet(path)
        if head.startswith(b"ARROW1") or path.suffix.lower() in (".arrow", ".feather"):
            return open_arrow(path)
        if _has_lines(path, head):
            count = sum(line is None or bool(line.strip()) for line in checked.read_lines(path))
            return count, lambda: _read_lines(path)
        records = _read_whole(path, head)
        return len(records), (lambda: records) if keep else (lambda: _read_whole(path, head))
    except RecursionError:
        raise RecordsError(f"{path} cannot be read: it is nested too deeply; {REMEDY}") from None
    except RecordsError:
        raise
    except FileNotFoundError:
        raise RecordsError(
            f"{path} does not exist; give a file of records, or a folder (nothing is downloaded)"
        ) from None
    except UnicodeDecodeError as error:
        raise RecordsError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise RecordsError(f"{path} cannot be read: {checked.reason(error)}; {REMEDY}") from None


# -------------------------------------------------------------------------------------------------------------- JSON


def _has_lines(path: Path, head: bytes) -> bool:
    """Whether a file has a JSON value on each line, whatever its suffix: the first line is one, and more follow."""
    first = _text(head).lstrip()[:1]
    opening = _text(head).lstrip().partition(b"\n")[0].strip()
    if first != b"[" and opening != b"{" and path.suffix.lower() in (".jsonl", ".ndjson"):
        return True
    with path.open("rb") as stream:
        lines = (line for line in iter(lambda: stream.readline(checked.MOST_LINE_BYTES), b"") if _text(line).strip())
        try:
            value = json.loads(_text(next(lines, b"")))
        except (ValueError, RecursionError):
            return False
        if isinstance(value, list) and not _are_turns(value):
            return False
        return next(lines, b"") != b"" or (isinstance(value, list) and path.suffix.lower() != ".json")


def _are_turns(value: list[Any]) -> bool:
    return all(isinstance(turn, dict) and ("from" in turn or "role" in turn) for turn in value)


def _text(data: bytes) -> bytes:
    return data.removeprefix(b"\xef\xbb\xbf")


def _read_lines(path: Path) -> Iterator[Any]:
    for line in checked.read_lines(path):
        if line is None:
            yield SampleError(f"the line is over {checked.MOST_LINE_BYTES} bytes")
        elif _text(line).strip():
            try:
                yield json.loads(_text(line))
            except UnicodeDecodeError:
                yield SampleError("the line is not UTF-8")
            except (ValueError, RecursionError):
                yield SampleError("the line is not JSON")


def _read_whole(path: Path, head: bytes) -> Sequence[Any]:
    """The records of a file that is one JSON value. Raises ValueError, RecordsError."""
    opens = _text(head).lstrip()[:1].decode("latin-1")
    closes = {"[": "]", "{": "}"}.get(opens)
    if closes is None:
        raise ValueError("expected a list of records, and it does not begin with [")
    with path.open("rb") as stream:  # a truncated file is not read
        stream.seek(max(0, path.stat().st_size - HEAD_BYTES))
        if not stream.read().rstrip(b" \t\r\n\0").endswith(closes.encode()):
            raise ValueError(f"expected a list of records, and it does not end with {closes}")
    values = _values(_text(path.read_bytes()).decode("utf-8"))
    if len(values) > 1:  # records on several lines each, one after the other
        return [record for value in values for record in (value if isinstance(value, list) else [value])]
    return values[0] if isinstance(values[0], list) else _unwrapped(path, values[0])


def _values(text: str) -> list[Any]:
    """The JSON values in a text, one after the other. Raises ValueError."""
    values, place, decoder = [], 0, json.JSONDecoder()
    while match := NOT_SPACE.search(text, place):
        value, place = decoder.raw_decode(text, match.start())
        values.append(value)
    return values


def _unwrapped(path: Path, data: dict[str, Any]) -> Sequence[Any]:
    """The records in a JSON object: its only list, the values of its ids, or itself. Raises RecordsError."""
    if isinstance(next((data[key] for key in TURNS_KEYS if key in data), None), dict) or (
        {"columns", "index", "data"} <= set(data)
    ):
        raise RecordsError(f"{path} looks like a table of pandas: write it with {AS_LINES}")
    lists = {key: value for key, value in data.items() if isinstance(value, list) and _are_records(value)}
    if "annotations" in lists and "images" in lists:
        raise RecordsError(
            f"{path} looks like COCO annotations: write a record for each annotation, with file_name of its image as "
            "image and conversations"
        )
    if has_turns(data) and not any(has_turns(each) for value in lists.values() for each in value[:1]):
        return [data]
    if len(lists) == 1:
        return next(iter(lists.values()))
    if lists:
        named = " and ".join(f"{checked.shown(key)} ({len(value)} records)" for key, value in lists.items())
        raise RecordsError(f"{path} holds several lists, {named}: write each to a file of its own")
    values = list(data.values())
    if values and all(isinstance(value, dict) for value in values):
        if all(DATA_SET_KEYS & set(value) for value in values):
            raise RecordsError(f"{path} looks like a list of data sets (dataset_info.json): give a file that it names")
        if all(map(has_turns, values)):
            return [{"id": key, **value} for key, value in data.items()]
    raise RecordsError(f"{path} holds {checked.shown(data)}; expected a list of records")


def _are_records(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(each, (dict, list)) for each in value)


# ----------------------------------------------------------------------------------------------------------- folders


@dataclass(frozen=True)
class Kind:
    name: str
    suffixes: tuple[str, ...]


KINDS = (Kind("parquet", (".parquet", ".pq")), Kind("arrow", (".arrow",)), Kind("JSON", (".jsonl", ".json", ".ndjson")))


def _files_of(folder: Path, split: str | None) -> list[Path]:
    """The files of a folder with records, sorted by name. Raises RecordsError when it is not clear which."""
    if (folder / "index.json").is_file() and (folder / "samples.npy").is_file():
        raise RecordsError(f"{folder} is a data set already; train on it with --data-path {folder}")
    if (folder / "dataset_dict.json").is_file():
        splits = {name.name: [name] for name in _folders(folder) if (name / "state.json").is_file()}
        return _files_of(_chosen(folder, splits, split)[0], None)
    if (folder / "state.json").is_file():
        return _saved_files(folder)
    for place in (folder, folder / "data"):
        if found := _of_one_kind(place):
            return _chosen(folder, _by_split(found), split)
    folders = _folders(folder)
    inside = {each.name: each for each in folders if _of_one_kind(each)}
    if split in inside:
        return _files_of(inside[split], None)
    if len(inside) == 1 or (len(folders) == 1 and not inside):
        return _files_of(next(iter(inside.values()), folders[0]), split)
    if inside:
        names = ", ".join([*inside][:5])
        raise RecordsError(f"{folder} has records in several folders, {names}: give one of them")
    if next(folder.glob("*.tar"), None) is not None:
        raise RecordsError(f"{folder} holds tars; tools/index_shards.py --data-path {folder} indexes them for training")
    raise RecordsError(f"{folder} has no .json, .jsonl, .parquet or .arrow file of records; give one that has")


def _folders(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))


def _of_one_kind(folder: Path) -> list[Path]:
    """The files with records of a folder. Raises RecordsError when there are several kinds."""
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    names = [name for name in names if name.name not in METADATA and not name.name.startswith((".", "cache-"))]
    found = {kind.name: [n for n in names if n.suffix.lower() in kind.suffixes and n.is_file()] for kind in KINDS}
    held = {kind: files for kind, files in found.items() if files}
    if len(held) > 1:
        said = " and ".join(f"{len(files)} {kind}" for kind, files in held.items())
        raise RecordsError(f"{folder} holds {said} files: give one file, or a folder with files of one kind")
    return next(iter(held.values()), [])


def _by_split(files: Sequence[Path]) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for file in files:
        match = SPLIT.fullmatch(file.stem.lower())
        splits.setdefault((match["hub"] or match["word"]) if match else "", []).append(file)
    return splits


def _chosen(folder: Path, splits: dict[str, list[Path]], split: str | None) -> list[Path]:
    """The files of a split, of the only one by default. Raises RecordsError."""
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split in splits:
        return splits[split]
    named = ", ".join(sorted(name or "no name" for name in splits)) or "none"
    raise RecordsError(
        f"{folder} has the splits {named}: choose one with --split" + (f", not {split}" if split else "")
    )


def _saved_files(folder: Path) -> list[Path]:
    """The files of a data set saved with `save_to_disk` of Hugging Face's datasets. Raises RecordsError."""
    try:
        state = checked.mapping(checked.read_json(folder / "state.json"), "state.json")
        files = [folder / checked.text(checked.mapping(each, "a file"), "filename") for each in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise RecordsError(f"{folder / 'state.json'} cannot be read: {checked.reason(error)}; save it again") from None
    if state.get("_indices_files"):
        raise RecordsError(f"{folder} was saved with indices; save dataset.flatten_indices() instead")
    if any(file.parent != folder for file in files):
        raise RecordsError(f"{folder / 'state.json'} names a file outside its folder; save it again")
    return files
