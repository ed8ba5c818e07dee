"""Indexing tars of other programs: the index, the shards read again, and the tool's output."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ross_mcore.commands import index_shards as command
from ross_mcore.data.lengths import length_source, stale_lengths
from ross_mcore.data.shard_reader import UNKNOWN_LENGTH, ShardReader
from ross_mcore.data.spec import SampleSpec
from ross_mcore.errors import SampleError, TooManyBad
from ross_mcore.shards import indexer
from ross_mcore.shards.index_parts import PARTS
from ross_mcore.shards.indexer import Settings, find_shards, index_shards
from ross_mcore.shards.measure import Measure
from tests.unit.shards.tars import RECORD, TURNS, around, caption, header_at, indexed, sample, tar, turns


def test_shards_of_make_shards_get_the_same_index(
    shards: Path, tokenizer: Any, golden_data: Path, tmp_path: Path
) -> None:
    done = index_shards(
        find_shards([str(shards)], tmp_path / "out"),
        tmp_path / "out",
        Settings(golden_data / "tok_qwen2", SampleSpec("qwen_2")),
    )
    first, second = ShardReader(shards), ShardReader(tmp_path / "out")
    assert done.bad == 0 and first.fingerprint == second.fingerprint
    assert np.array_equal(first.samples, second.samples) and np.array_equal(first.images, second.images)
    assert first.keys(range(len(first))) == second.keys(range(len(second)))
    assert [second.record_bytes(n) for n in range(23)] == [first.record_bytes(n) for n in range(23)]
    assert second.length_source == length_source(tokenizer, SampleSpec("qwen_2"))


def test_captions_and_turns_are_read_as_records(tmp_path: Path) -> None:
    """Training reads the conversation that the index measured, from every kind of text."""
    reader, _ = indexed(tar(caption("a", b"\xef\xbb\xbf a car\n"), sample("b", TURNS), sample("c")), tmp_path)
    assert reader is not None
    records = [json.loads(reader.record_bytes(number)) for number in range(3)]
    caption_turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a car"}]
    assert records == [{"conversations": caption_turns}, {"conversations": TURNS}, json.loads(RECORD)]
    assert reader.samples["text_words"].tolist() == [3, 4, 4]
    assert reader.samples["text_tokens"].tolist() == [UNKNOWN_LENGTH] * 3


def test_only_what_changed_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.tar").write_bytes(tar(sample(f"k{number}")))

    def again(**options: Any) -> tuple[int, list[str]]:
        done = index_shards(find_shards([str(folder)], folder), folder, Settings(**options))
        reader = ShardReader(folder)
        return done.reread, reader.keys(range(len(reader)))

    assert again() == (3, ["k0", "k1", "k2"])
    assert again() == again(verify_images=False) == (0, ["k0", "k1", "k2"])
    (folder / "1.tar").write_bytes(tar(sample("k1"), sample("new")))
    assert again() == (1, ["k0", "k1", "new", "k2"])
    os.utime(folder / "2.tar", ns=(1, 1))
    assert again()[0] == 1
    next((folder / PARTS).iterdir()).write_bytes(b"damaged")
    assert again()[0] == 1
    (folder / "0.tar").unlink()
    assert again() == (0, ["k1", "new", "k2"]) and len(list((folder / PARTS).iterdir())) == 2


def test_pictures_that_were_not_decoded_are_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(sample("k"), sample("bad", image=b"x")))
    places = find_shards([str(tmp_path)], tmp_path)
    assert index_shards(places, tmp_path, Settings(verify_images=False)).samples == 2
    assert index_shards(places, tmp_path, Settings(), max_bad_fraction=0.5).samples == 1


def test_too_much_damage_is_refused_with_the_list(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(around(sample("bad", b"{")))
    places = find_shards([str(tmp_path)], tmp_path)
    with pytest.raises(TooManyBad, match="1 of 3 samples are bad.*max-bad-fraction 0.3.*1 x the record is not JSON"):
        index_shards(places, tmp_path, Settings(), max_bad_fraction=0.3)
    assert not (tmp_path / "index.json").exists()
    assert json.loads((tmp_path / "quarantine.jsonl").read_text())["key"] == "bad"
    assert index_shards(places, tmp_path, Settings(), max_bad_fraction=0.4).reread == 0


def test_lost_bytes_count_as_the_samples_they_would_have_held(tmp_path: Path) -> None:
    many = [sample(f"{number:03d}") for number in range(40)]
    data = tar(*many)
    half = header_at("020.jpg", data)
    (tmp_path / "a.tar").write_bytes(data[:half] + b"\x01" * (len(tar(*many, end=False)) - half))
    done = index_shards(find_shards([str(tmp_path)], tmp_path), tmp_path, Settings(), max_bad_fraction=1)
    assert done.samples == 20 and done.bad == 20


def test_stale_lengths_name_the_command(tmp_path: Path, tokenizer: Any, golden_data: Path) -> None:
    (tmp_path / "a.tar").write_bytes(around())
    folder = golden_data / "tok_qwen2"
    source = length_source(tokenizer, SampleSpec("qwen_2"))
    index_shards(find_shards([str(tmp_path)], tmp_path), tmp_path, Settings())
    said = stale_lengths(ShardReader(tmp_path), source, folder)
    assert (
        said is not None
        and f"python tools/index_shards.py --data-path {tmp_path} --tokenizer {folder} --template" in said
    )
    index_shards(find_shards([str(tmp_path)], tmp_path), tmp_path, Settings(folder, SampleSpec("qwen_2")))
    reader = ShardReader(tmp_path)
    assert stale_lengths(reader, source, folder) is None
    for other, what in (
        (length_source(tokenizer, SampleSpec("plain")), "another template"),
        (length_source(tokenizer, SampleSpec("qwen_2", mm_use_im_start_end=True)), "another mm_use_im_start_end"),
        (type(source)("0", "qwen_2", False, source.image_tokens), "another tokenizer"),
        (type(source)(source.tokenizer, "qwen_2", False, "0"), "another treatment of pictures"),
    ):
        said = stale_lengths(reader, other, folder)
        assert said is not None and what in said and ("--mm-use" in said) == other.mm_use_im_start_end
    reader.samples = reader.samples.copy()
    reader.samples["image_spans"] = 0  # as earlier versions measured pictures without <image>
    assert "without the pictures of 2 samples" in (stale_lengths(reader, source, folder) or "")


def test_measuring_with_a_template_refuses_what_does_not_fit(tokenizer: Any) -> None:
    measure = Measure(tokenizer, SampleSpec("plain"))
    with pytest.raises(SampleError, match="plain takes two turns"):
        measure(turns(TURNS * 2), 1)
    row = measure(turns(TURNS), 1)
    assert row["image_spans"] == 1 and row["label_tokens"] > 0 and row["text_words"] == 4


@pytest.fixture
def tool() -> Callable[..., int]:
    """tool(*flags) -> the exit code of tools/index_shards.py, in this process."""

    def run(*flags: Any) -> int:
        try:
            return command.main([*map(str, flags)])
        except SystemExit as stop:
            return int(stop.code or 0)

    return run


def test_the_tool_prints_the_outcome(
    tool: Callable[..., int], tmp_path: Path, golden_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        (tmp_path / "in" / f"s-{number:03d}.tar").write_bytes(around(sample("bad", b"{")))
    flags = ["--data-path", f"{tmp_path}/in/s-{{000..001}}.tar", "--out", tmp_path / "out", "--num-workers", "2"]
    flags += ["--tokenizer", golden_data / "tok_qwen2", "--template", "qwen_2"]
    assert tool(*flags) == 2
    assert "max-bad-fraction" in capsys.readouterr().err
    assert tool(*flags, "--max-bad-fraction", "0.5") == 0
    said = capsys.readouterr().out
    assert (
        "4 samples, 4 pictures in 2 shards" in said and "2 x the record is not JSON" in said and "0 shards read" in said
    )
    reader = ShardReader(tmp_path / "out")
    assert reader.quarantined == 2 and reader.length_source is not None
    assert reader.index["shards"][0]["name"] == str(tmp_path / "in" / "s-000.tar")
    assert tool("--data-path", tmp_path / "out", "--max-bad-fraction", "0.5", "--num-workers", "0") == 0
    assert len(ShardReader(tmp_path / "out")) == 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_signal_leaves_finished_shards(
    tool: Callable[..., int], tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(tar(sample(f"k{number}")))

    def stop(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(indexer, "wait" if num_workers else "index_tar", stop)
    assert tool("--data-path", tmp_path, "--num-workers", num_workers) == 130
    assert "stopped by a signal; finished shards are kept" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "1.tar", PARTS]
    assert not list((tmp_path / PARTS).glob(".*")) and not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-path", "nowhere"], "give --out"),
        (["--data-path", "nowhere", "--out", "{out}"], "nowhere names no tar: it does not exist"),
        (["--data-path", "{{nowhere,here}}-{{0..2}}", "--out", "{out}"], "nowhere-0 names no tar: it does not exist"),
        (["--data-path", "*.rat", "--out", "{out}"], "names no tar"),
        (["--data-path", "{out}", "--template", "plain"], "need each other"),
        (["--data-path", "{out}", "--tokenizer", "x", "--template", "alpaca"], "not one of"),
        (["--data-path", "nosuch://a/b.tar", "--out", "{out}"], "nosuch"),
        (["--data-path", "gs://a/b.tar", "--out", "{out}"], "gs:// needs a package that is not installed"),
    ],
)
def test_wrong_arguments_are_one_paragraph(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert tool(*(flag.format(out=tmp_path) for flag in flags)) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
