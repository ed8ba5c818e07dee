"""Shards: written data is read back, by offset and by any WebDataset reader; no incomplete files remain."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ross_mcore.data.shard_reader import ShardReader
from ross_mcore.errors import ShardError
from ross_mcore.shards.index_parts import make_folder
from ross_mcore.shards.writer import ShardWriter


def test_round_trip(shards: Path, records: list[dict[str, Any]], image_folder: Path) -> None:
    reader = ShardReader(shards)
    assert len(reader) == len(records)
    assert reader.keys(range(len(reader))) == [f"{number:09d}" for number in range(len(records))]
    for number, record in enumerate(records):
        assert json.loads(reader.record_bytes(number)) == record
        assert reader.samples[number]["num_images"] == ("image" in record)
        if "image" in record:
            assert reader.image_bytes(number, 0) == (image_folder / record["image"]).read_bytes()


def test_offsets_are_those_of_the_tar(shards: Path) -> None:
    reader = ShardReader(shards)
    number = 0
    for shard in reader.index["shards"]:
        with tarfile.open(shards / shard["name"]) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    row = reader.samples[number]
                    assert (row["text_offset"], row["text_size"]) == (member.offset_data, member.size)
                    number += 1
    assert number == len(reader)
    assert len(reader.index["shards"]) == 4


def test_webdataset_reads_the_shards(shards: Path, records: list[dict[str, Any]]) -> None:
    import webdataset

    paths = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [json.loads(sample["json"])["id"] for sample in samples] == [record["id"] for record in records]
    assert [{"png", "jpg", "webp"} & set(s) != set() for s in samples] == ["image" in record for record in records]


def test_text_lengths_are_in_the_index(shards: Path, tokenizer: Any) -> None:
    from ross_mcore.data.spec import SampleSpec
    from ross_mcore.data.templates import tokenize_conversation

    reader = ShardReader(shards)
    assert reader.length_source is not None and reader.length_source.template == "qwen_2"
    spec = SampleSpec("qwen_2")
    for number in range(len(reader)):
        record = json.loads(reader.record_bytes(number))
        tokenized = tokenize_conversation(record["conversations"], int("image" in record), tokenizer, spec)
        row = reader.samples[number]
        assert row["text_tokens"] + row["image_spans"] == len(tokenized.input_ids)
        assert row["label_tokens"] == sum(label >= 0 for label in tokenized.labels) > 3
        assert row["text_words"] == sum(len(turn["value"].split()) for turn in record["conversations"])
        assert row["image_spans"] == ("image" in record)


def test_several_pictures_keep_their_order(encoded: Any, tmp_path: Path) -> None:
    pictures = [("png", encoded(4 + n, 4)) for n in range(12)]
    with ShardWriter(tmp_path / "out") as writer:
        writer.write("a", b"{}", pictures)
        writer.write("b", b"{}", pictures[:1])
    reader = ShardReader(tmp_path / "out")
    assert [reader.image_bytes(0, n) for n in range(12)] == [data for _, data in pictures]
    assert reader.image_bytes(1, 0) == pictures[0][1]


def test_fingerprint_is_of_the_content_not_of_the_sharding(tmp_path: Path) -> None:
    def make(name: str, texts: list[str], size: int) -> str:
        with ShardWriter(tmp_path / name, max_samples=size) as writer:
            for number, text in enumerate(texts):
                writer.write(f"{number}", json.dumps({"text": text}).encode())
        return ShardReader(tmp_path / name).fingerprint

    first = make("a", ["x", "y", "z"], 1)
    assert first == make("b", ["x", "y", "z"], 3)
    assert first != make("c", ["x", "z", "y"], 3)


def test_reader_survives_pickling_and_forking(shards: Path) -> None:
    reader = ShardReader(shards)
    expected = [reader.record_bytes(number) for number in range(len(reader))]
    assert [pickle.loads(pickle.dumps(reader)).record_bytes(number) for number in range(len(reader))] == expected
    child = os.fork()
    if child == 0:
        os._exit(int([reader.record_bytes(number) for number in range(len(reader))] != expected))
    assert os.waitpid(child, 0)[1] == 0
    assert [reader.record_bytes(number) for number in range(len(reader))] == expected


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "out", max_samples=1) as writer:
        for number in range(5):
            writer.write(f"{number}", b"{}")
        assert not (tmp_path / "out").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_no_sample_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no usable sample"), ShardWriter(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_overwriting_needs_permission_and_a_data_set(tmp_path: Path) -> None:
    def make(text: bytes, overwrite: bool) -> None:
        with ShardWriter(tmp_path / "out", overwrite=overwrite) as writer:
            writer.write("k", text)

    make(b"1", False)
    with pytest.raises(ShardError, match="not empty"):
        make(b"2", False)
    make(b"3", True)
    assert ShardReader(tmp_path / "out").record_bytes(0) == b"3"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out" / "index.json").unlink()
    with pytest.raises(ShardError, match="not a data set"):
        make(b"4", True)


def test_a_folder_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ShardError, match="is a link; give the folder that it leads to"):
        ShardWriter(tmp_path / "out", overwrite=True)
    with pytest.raises(ShardError, match="is a link; remove it"):
        make_folder(tmp_path / "out")
    make_folder(tmp_path / "new" / "folder")
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match="file/in it cannot be made: Not a directory"):
        make_folder(tmp_path / "file" / "in it")


@pytest.mark.parametrize("key", ["", "../x", "a/b", "a.b", "ä", "a b"])
def test_keys_that_are_no_plain_names_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ShardError, match="key"), ShardWriter(tmp_path / "out") as writer:
        writer.write(key, b"{}")


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="key twice"), ShardWriter(tmp_path / "out") as writer:
        writer.write("k", b"{}")
        writer.write("k", b"{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "index.json").write_text("{"), "index.json"),
        (lambda f: (f / "index.json").write_text('{"format": "other"}'), "not the index"),
        (lambda f: _edit(f, lambda i: i["shards"][0].update(name="../x.tar")), "plain file name"),
        (lambda f: _edit(f, lambda i: i["shards"][0].update(name="/a/../x.tar")), "absolute path or URL"),
        (lambda f: _edit(f, lambda i: i.update(num_samples=7)), "add up"),
        (lambda f: _edit(f, lambda i: i.pop("num_images")), "malformed"),
        (lambda f: (f / "shard-00000.tar").write_bytes(b"short"), "bytes of the index"),
        (lambda f: (f / "shard-00000.tar").unlink(), "cannot be read"),
        (lambda f: (f / "keys.txt").unlink(), "keys.txt"),
        (lambda f: (f / "samples.npy").write_bytes(b"nonsense"), "samples.npy"),
        (lambda f: np.save(f / "samples.npy", np.zeros(3)), "rows of"),
        (lambda f: np.save(f / "images.npy", np.array([{}], dtype=object), allow_pickle=True), "images.npy"),
    ],
)
def test_a_damaged_data_set_is_refused_by_name(encoded: Any, tmp_path: Path, damage: Any, message: str) -> None:
    with ShardWriter(tmp_path / "out") as writer:
        writer.write("k", b"{}", [("png", encoded(4, 4))])
    damage(tmp_path / "out")
    with pytest.raises(ShardError, match=message):
        ShardReader(tmp_path / "out")


def test_an_older_index_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out") as writer:
        writer.write("k", b"{}")
    _edit(tmp_path / "out", lambda index: index.update(version=1))
    with pytest.raises(ShardError, match="version 1 index and this program reads version 4; make .*index_shards"):
        ShardReader(tmp_path / "out")


def _edit(folder: Path, change: Any) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def test_member_sizes_are_checked_before_reading(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out") as writer:
        writer.write("k", b"{}")
    table = np.load(tmp_path / "out" / "samples.npy")
    table["text_size"] = 2**31
    np.save(tmp_path / "out" / "samples.npy", table)
    with pytest.raises(ShardError, match="allowed"):
        ShardReader(tmp_path / "out").record_bytes(0)
