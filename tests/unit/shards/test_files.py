"""Files of records: every layout of JSON, parquet, arrow, folders; what is not read is named with the remedy."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from ross_mcore.errors import RecordsError, SampleError
from ross_mcore.shards import tables
from ross_mcore.shards.files import read_records

TURNS = [{"from": "human", "value": "Why? 猫"}, {"from": "gpt", "value": "So."}]
RECORDS = [{"id": number, "conversations": TURNS} for number in range(5)]
LINES = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)
LIST = json.dumps(RECORDS, ensure_ascii=False)


def table(records: Any = RECORDS) -> pa.Table:
    return pa.Table.from_pylist(records)


def write_parquet(path: Path, records: Any = RECORDS, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table(records), path, **options)


def write_arrow(path: Path, records: Any = RECORDS, make: Any = pa.ipc.new_stream) -> None:
    """As Hugging Face's datasets writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, make(sink, table(records).schema) as writer:
        writer.write_table(table(records), max_chunksize=2)


def write_saved(folder: Path, **state: Any) -> None:
    """A folder as `Dataset.save_to_disk` of Hugging Face's datasets writes it."""
    for number, part in enumerate((RECORDS[:3], RECORDS[3:])):
        write_arrow(folder / f"data-{number:05d}-of-00002.arrow", part)
    write_arrow(folder / "cache-0123.arrow", RECORDS)
    files = [{"filename": f"data-{number:05d}-of-00002.arrow"} for number in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train", **state}))
    (folder / "dataset_info.json").write_text("{}")


READ: dict[str, Callable[[Path], Any]] = {
    "a list": lambda f: save(f / "a.json", LIST),
    "a list on many lines": lambda f: save(f / "a.json", json.dumps(RECORDS, indent=1)),
    "lines": lambda f: save(f / "a.jsonl", LINES),
    "lines with empty ones": lambda f: save(f / "a.jsonl", "\n" + LINES.replace("\n", "\r\n \n") + "\n\n"),
    "lines called .json": lambda f: save(f / "a.json", LINES),
    "a list called .jsonl": lambda f: save(f / "a.jsonl", LIST),
    "a list on many lines called .jsonl": lambda f: save(f / "a.jsonl", json.dumps(RECORDS, indent=1)),
    "a list with a BOM": lambda f: save(f / "a.json", "\ufeff" + LIST),
    "lines with a BOM": lambda f: save(f / "a.jsonl", "\ufeff" + LINES),
    "a name without a suffix": lambda f: save(f / "data", LIST),
    "a list in an object": lambda f: save(f / "a.json", json.dumps({"version": "1", "data": RECORDS})),
    "a record on many lines": lambda f: [
        save(f / "in" / f"{n}.jsonl", json.dumps(r, indent=1)) for n, r in enumerate(RECORDS)
    ],
    "records on many lines": lambda f: save(
        f / "a.jsonl", "\n".join(json.dumps(record, indent=1) for record in RECORDS)
    ),
    "lists one after the other": lambda f: save(
        f / "a.json", lines(0, 2, "[", ",", "]\n") + lines(2, 5, "[", ",", "]")
    ),
    "an object of ids": lambda f: save(f / "a.json", json.dumps({str(r["id"]): r for r in RECORDS})),
    "parquet": lambda f: write_parquet(f / "a.parquet"),
    "parquet of many groups": lambda f: write_parquet(f / "a.parquet", row_group_size=1),
    "arrow": lambda f: write_arrow(f / "a.arrow"),
    "an arrow file": lambda f: write_arrow(f / "a.arrow", make=pa.ipc.new_file),
    "a folder of JSON": lambda f: (
        save(f / "in" / "a.json", lines(0, 2, "[", ",", "]")) and save(f / "in" / "b.jsonl", lines(2))
    ),
    "a file a record": lambda f: [save(f / "in" / f"{n}.json", json.dumps(r, indent=1)) for n, r in enumerate(RECORDS)],
    "a folder of parquet": lambda f: [write_parquet(f / "in" / f"{n}.parquet", [r]) for n, r in enumerate(RECORDS)],
    "a folder of a hub": lambda f: write_hub(f / "in" / "data", {"train": RECORDS}),
    "a configuration of a hub": lambda f: write_hub(f / "in" / "default", {"train": RECORDS}),
    "a saved data set": lambda f: write_saved(f / "in"),
    "a saved data set of one split": lambda f: saved_splits(f / "in", "train"),
}


def save(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(start: int, end: int | None = None, before: str = "", between: str = "\n", after: str = "") -> str:
    return before + between.join(map(json.dumps, RECORDS[start:end])) + after


def write_hub(folder: Path, splits: dict[str, Any]) -> None:
    """A folder as a hub holds it."""
    for split, records in splits.items():
        for number, part in enumerate((records[:2], records[2:])):
            write_parquet(folder / f"{split}-{number:05d}-of-00002-0a1b2c3d.parquet", part)
    save(folder.parent / "README.md", "# A data set")


def saved_splits(folder: Path, *splits: str) -> None:
    for split in splits:
        write_saved(folder / split)
    save(folder / "dataset_dict.json", json.dumps({"splits": splits}))


def only(folder: Path) -> Path:
    return next(folder.iterdir())


@pytest.mark.parametrize("name", READ)
def test_records_of_every_layout_are_read(name: str, tmp_path: Path) -> None:
    READ[name](tmp_path)
    count, records = read_records(only(tmp_path))
    found = [{**record, "id": int(record["id"])} for record in records]
    assert found == RECORDS and count == len(found)


def test_a_line_of_turns_is_a_record(tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", f"{json.dumps(TURNS)}\n")
    assert list(read_records(tmp_path / "a.jsonl")[1]) == [TURNS]


def test_a_damaged_line_is_a_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ross_mcore.checked.MOST_LINE_BYTES", 100)
    save(tmp_path / "a.jsonl", f"{lines(4)}\n{{broken\n{lines(4)}")
    count, records = read_records(tmp_path / "a.jsonl")
    first, second, third = records
    assert count == 3 and first == third == RECORDS[4]
    assert isinstance(second, SampleError) and str(second) == "the line is not JSON"
    save(tmp_path / "a.jsonl", b'{"a": "caf\xe9"}\n')
    assert str(next(read_records(tmp_path / "a.jsonl")[1])) == "the line is not UTF-8"


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match="someone/LLaVA-Data does not exist; give a file of records, or a folder"):
        read_records(Path("someone/LLaVA-Data"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_is_chosen(split: str, tmp_path: Path) -> None:
    write_hub(tmp_path / "hub" / "data", {"train": RECORDS, "test": RECORDS[:3]})
    saved_splits(tmp_path / "saved", "train", "test")
    save(tmp_path / "json" / "llava_train.json", LIST)
    save(tmp_path / "json" / "llava_test.json", json.dumps(RECORDS[:3]))
    for name, number in {"train": 5, "test": 3}.items():
        save(tmp_path / "converted" / "default" / name / "0000.jsonl", lines(0, number))
    expected = {
        "converted": {"train": 5, "test": 3},
        "hub": {"train": 5, "test": 3},
        "saved": {"train": 5, "test": 5},
        "json": {"train": 5, "test": 3},
    }
    for folder, counts in expected.items():
        assert read_records(tmp_path / folder, split)[0] == counts[split]
        with pytest.raises(RecordsError, match="(splits test, train: choose one with --split|folders, test, train)"):
            read_records(tmp_path / folder)


def test_few_rows_are_held_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of parquet holds thousands of pictures: only ROWS_AT_ONCE of them become Python objects."""
    write_parquet(tmp_path / "a.parquet", [{"id": n, "conversations": TURNS} for n in range(100)])
    sizes = []
    whole = pyarrow.parquet.ParquetFile.iter_batches

    def watched(file: Any, size: int) -> Any:
        for batch in whole(file, size):
            sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", watched)
    count, records = read_records(tmp_path / "a.parquet")
    assert count == 100 and next(records)["id"] == 0 and sizes == [tables.ROWS_AT_ONCE]


UNREAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "CSV": (lambda f: save(f / "a.csv", "id,image\n"), "is CSV; write it as JSON lines, with pandas.read_csv"),
    "a spreadsheet": (lambda f: save(f / "a.xlsx", b"PK\x03\x04"), "is a spreadsheet"),
    "compressed": (lambda f: save(f / "a.jsonl.gz", b"\x1f\x8b\x08"), "is compressed; unpack it first"),
    "compressed under another name": (lambda f: save(f / "a.json", b"\x1f\x8b\x08"), "is compressed"),
    "a tar": (lambda f: save(f / "a.tar", b""), "tools/index_shards.py"),
    "YAML": (lambda f: save(f / "a.yaml", "datasets: []"), "is YAML; convert each JSON file"),
    "pickled": (lambda f: save(f / "a.pkl", b""), "not a file of JSON records"),
    "text": (lambda f: save(f / "a.txt", "x"), "is text"),
    "UTF-16": (lambda f: save(f / "a.json", LIST.encode("utf-16")), "is UTF-16; save it as UTF-8"),
    "Latin-1": (lambda f: save(f / "a.json", '[{"a": "caf\u00e9"}]'.encode("latin-1")), "is not UTF-8 at byte 11"),
    "a pointer": (lambda f: save(f / "a.parquet", "version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "a web page": (lambda f: save(f / "a.json", "\n<!DOCTYPE html>404"), "is a web page or XML; download"),
    "a table of pandas": (lambda f: save(f / "a.json", json.dumps({"conversations": {"0": TURNS}})), "table of pandas"),
    "a split table of pandas": (
        lambda f: save(f / "a.json", json.dumps({"columns": ["id"], "index": [0], "data": [[1]]})),
        "looks like a table of pandas",
    ),
    "an empty file": (lambda f: save(f / "a.json", ""), "it does not begin with ["),
    "a truncated list": (lambda f: save(f / "a.json", LIST[:-40]), "it does not end with ]"),
    "a number": (lambda f: save(f / "a.json", "7"), "it does not begin with ["),
    "no list": (lambda f: save(f / "a.json", '{"a": 1}'), "expected a list of records"),
    "several lists": (
        lambda f: save(f / "a.json", json.dumps({"train": RECORDS, "test": RECORDS[:1]})),
        "holds several lists, 'train' (5 records) and 'test' (1 records): write each to a file",
    ),
    "COCO": (
        lambda f: save(f / "a.json", json.dumps({"images": [{"id": 1}], "annotations": [{"image_id": 1}]})),
        "looks like COCO annotations",
    ),
    "LLaMA-Factory's list": (
        lambda f: save(f / "a.json", json.dumps({"mine": {"file_name": "mine.json"}})),
        "looks like a list of data sets (dataset_info.json)",
    ),
    "damaged parquet": (lambda f: save(f / "a.parquet", b"PAR1" + bytes(100)), "a.parquet cannot be read"),
    "damaged arrow": (lambda f: save(f / "a.arrow", b"\xff\xff\xff\xff" + b"\1" * 100), "a.arrow cannot be read"),
    "nested too deeply": (lambda f: save(f / "a.json", "[" * 100_000 + "]" * 100_000), "nested too deeply"),
    "an empty folder": (lambda f: (f / "in").mkdir(), "no .json, .jsonl, .parquet or .arrow file"),
    "a folder of tars": (lambda f: save(f / "in" / "a.tar", b""), "holds tars; tools/index_shards.py --data-path"),
    "a folder of two kinds": (
        lambda f: save(f / "in" / "a.json", LIST) and write_parquet(f / "in" / "b.parquet"),
        "holds 1 parquet and 1 JSON files",
    ),
    "two folders": (
        lambda f: save(f / "in" / "a" / "a.json", LIST) and save(f / "in" / "b" / "a.json", LIST),
        "in several folders, a, b: give one",
    ),
    "a data set": (
        lambda f: save(f / "in" / "index.json", "{}") and save(f / "in" / "samples.npy", b""),
        "is a data set already",
    ),
    "a saved data set with indices": (lambda f: write_saved(f / "in", _indices_files=[{"a": 1}]), "flatten_indices"),
    "a saved data set elsewhere": (
        lambda f: write_saved(f / "in", _data_files=[{"filename": "../a.arrow"}]),
        "names a file outside its folder",
    ),
    "a damaged state": (lambda f: write_saved(f / "in", _data_files=3), "state.json cannot be read"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_is_named(name: str, tmp_path: Path) -> None:
    make, reason = UNREAD[name]
    make(tmp_path)
    with pytest.raises(RecordsError) as error:
        list(read_records(only(tmp_path))[1])
    assert reason in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RecordsError, match=r"pip install 'ross_mcore\[parquet\]'"):
        read_records(tmp_path / "a.parquet")
