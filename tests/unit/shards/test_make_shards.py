"""From LLaVA JSON to a data set: every record is stored or listed with a reason; the tool's errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ross_mcore.commands import make_shards
from ross_mcore.data.shard_reader import UNKNOWN_LENGTH, ShardReader
from ross_mcore.errors import SampleError
from ross_mcore.shards import llava
from ross_mcore.shards.pictures import PictureFolder

TOOL = Path(__file__).parents[3] / "tools" / "make_shards.py"
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A car."}]
TEXT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., int]:
    """make(*flags) -> exit code of the tool on tmp_path/data.json, in this process; bad records are allowed."""
    (tmp_path / "images").mkdir()

    def run(*flags: str, data: str = "data.json") -> int:
        named = ["--data", tmp_path / data, "--image-folder", tmp_path / "images", "--out", tmp_path / "out"]
        named += ["--max-bad-fraction", 1, *flags]
        try:
            return make_shards.main([*map(str, named)])
        except SystemExit as stop:
            return int(stop.code or 0)

    return run


def write(tmp_path: Path, records: Any) -> None:
    (tmp_path / "data.json").write_text(json.dumps(records))


def test_every_record_is_stored_or_listed(
    make: Callable[..., int], tmp_path: Path, encoded: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    whole = encoded(40, 40, "JPEG")
    (tmp_path / "secret.png").write_bytes(encoded(4, 4))
    (images / "good.jpg").write_bytes(whole)
    (images / "misnamed.jpg").write_bytes(encoded(5, 5, "PNG"))
    (images / "old.gif").write_bytes(encoded(6, 6, "GIF"))
    (images / "cut.jpg").write_bytes(whole[:-200])
    (images / "text.png").write_text("not a picture")
    (images / "empty.png").write_bytes(b"")
    (images / "folder.png").mkdir()
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    cases: list[tuple[Any, str | None]] = [
        ({"id": "a", "image": "good.jpg", "conversations": TURNS}, None),
        ({"image": "misnamed.jpg", "conversations": TURNS}, None),
        ({"id": "gif", "image": "old.gif", "conversations": TURNS}, None),
        ({"id": "one", "image": ["good.jpg"], "conversations": TURNS}, None),
        ({"id": "a", "conversations": TEXT}, None),
        ({"id": 7, "image": "cut.jpg", "conversations": TURNS}, "truncated"),
        ({"image": "text.png", "conversations": TURNS}, "undecodable"),
        ({"image": "empty.png", "conversations": TURNS}, "undecodable"),
        ({"image": "missing.png", "conversations": TURNS}, "No such file"),
        ({"image": "folder.png", "conversations": TURNS}, "regular file"),
        ({"image": "link.png", "conversations": TURNS}, "link"),
        ({"image": "../secret.png", "conversations": TURNS}, "leaves the image folder"),
        ({"image": str(tmp_path / "secret.png"), "conversations": TURNS}, "leaves the image folder"),
        ({"image": "a" * 5000, "conversations": TURNS}, "cannot be read"),
        ({"image": "nul\0", "conversations": TURNS}, "not a path"),
        ({"image": 3, "conversations": TURNS}, "not a path"),
        ({"image": ["good.jpg", "good.jpg"], "conversations": TURNS}, None),
        ({"image": ["good.jpg", "good.jpg"], "conversations": TURNS * 3}, "3 <image> in the text, 2 pictures"),
        ({"image": ["good.jpg"] * 65, "conversations": TURNS}, "it has over 64 pictures"),
        ({"image": ["good.jpg"] * 2, "conversations": [*TURNS, *TURNS]}, None),
        ({"conversations": [{"from": "system", "value": 3}]}, "a turn has no text"),
        ({"image": "good.jpg"}, "list of turns"),
        ({"conversations": {"a": 1}}, "list of turns"),
        (None, "not a JSON object"),
        ([1], "not a JSON object"),
        ({"conversations": [{"from": "human", "value": "\ud800"}]}, "Unicode"),
    ]
    write(tmp_path, [record for record, _ in cases])
    assert make() == 0
    listed = {
        line["record"]: line for line in map(json.loads, (tmp_path / "out/skipped.jsonl").read_text().splitlines())
    }
    reader = ShardReader(tmp_path / "out")
    stored = {int(key): number for number, key in enumerate(reader.keys(range(len(reader))))}
    assert sorted([*listed, *stored]) == list(range(len(cases)))
    for number, (record, reason) in enumerate(cases):
        if reason is None:
            found = json.loads(reader.record_bytes(stored[number]))
            assert found == {"id": f"{number:09d}", **record}
        else:
            assert reason in listed[number]["reason"], number
    assert listed[5]["id"] == 7 and listed[5]["image"] == "cut.jpg"
    assert reader.image_bytes(stored[0], 0) == whole
    assert reader.image_bytes(stored[1], 0).startswith(b"\x89PNG") and reader.image_bytes(stored[2], 0)[1:4] == b"PNG"
    said = capsys.readouterr().out
    assert "7 samples, 8 pictures, of 26 records" in said and "2 x the image is undecodable (0000000" in said
    assert "1 x it has over 64 pictures (000000018)" in said and str(tmp_path / "out/skipped.jsonl") in said


def test_links_may_be_followed(make: Callable[..., int], tmp_path: Path, encoded: Any) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(encoded(4, 4))
    (tmp_path / "images" / "coco").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "secret.png").write_bytes(encoded(4, 4))
    names = ["coco/a.png", "../secret.png", str(tmp_path / "secret.png")]
    write(tmp_path, [{"image": name, "conversations": TURNS} for name in names])
    assert make() == 2
    assert make("--follow-links") == 0
    assert len(ShardReader(tmp_path / "out")) == 1


def test_lengths_come_with_a_tokenizer(make: Callable[..., int], tmp_path: Path, golden_data: Path) -> None:
    write(tmp_path, [{"conversations": TEXT}, {"conversations": [*TEXT, *TEXT]}, {"conversations": TEXT[:1] * 2}])
    assert make("--tokenizer", str(golden_data / "tok_qwen2"), "--template", "qwen_2", "--shard-size", "1") == 0
    reader = ShardReader(tmp_path / "out")
    assert len(reader) == len(reader.index["shards"]) == 2
    assert reader.length_source is not None and reader.length_source.template == "qwen_2"
    assert 0 < reader.samples[0]["text_tokens"] < reader.samples[1]["text_tokens"]
    assert 0 < reader.samples[0]["label_tokens"] < reader.samples[1]["label_tokens"]
    assert reader.samples["text_words"].tolist() == [2, 4]


def test_words_are_counted_without_a_tokenizer(make: Callable[..., int], tmp_path: Path) -> None:
    write(tmp_path, [{"conversations": [{"from": "system", "value": " a  b\n\tc "}]}])
    assert make() == 0
    rows = ShardReader(tmp_path / "out").samples
    assert rows["text_words"].tolist() == [3] and rows["label_tokens"].tolist() == [UNKNOWN_LENGTH]


def test_samples_without_labels_are_counted(
    make: Callable[..., int], tmp_path: Path, golden_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unanswered = [TEXT[0], {"from": "gpt", "value": ""}]
    write(tmp_path, [{"conversations": TEXT}, {"conversations": unanswered}])
    assert make("--tokenizer", str(golden_data / "tok_qwen2"), "--template", "qwen_2") == 0
    assert ShardReader(tmp_path / "out").samples["label_tokens"].tolist()[1] == 0
    assert "without labels  1 samples (50.00%)" in capsys.readouterr().out


def test_counts_follow_the_text_around_pictures(
    make: Callable[..., int], tmp_path: Path, golden_data: Path, encoded: Any
) -> None:
    (tmp_path / "images" / "a.png").write_bytes(encoded(4, 4))
    write(tmp_path, [{"image": "a.png", "conversations": TURNS}])
    counted = ("--tokenizer", str(golden_data / "tok_qwen2"), "--template", "qwen_2", "--overwrite")
    assert make(*counted) == 0
    plain = ShardReader(tmp_path / "out")
    assert make(*counted, "--mm-use-im-start-end") == 0
    wrapped = ShardReader(tmp_path / "out")
    assert wrapped.samples[0]["text_tokens"] > plain.samples[0]["text_tokens"]
    assert wrapped.length_source != plain.length_source and wrapped.length_source.mm_use_im_start_end
    assert make("--mm-use-im-start-end", "--overwrite") == 2


def test_json_lines_with_a_damaged_line(make: Callable[..., int], tmp_path: Path) -> None:
    good = json.dumps({"conversations": TEXT})
    (tmp_path / "data.jsonl").write_text(f"{good}\n{{broken\n\n{good}\n")
    assert make(data="data.jsonl") == 0
    assert ShardReader(tmp_path / "out").keys([0, 1]) == ["000000000", "000000002"]


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("{", [], "data.json"),
        ('{"a": 1}', [], "expected a list"),
        ("[]", [], "no usable sample"),
        ("[1, 2]", [], "2 x the record is not a JSON object"),
        ("[1]", ["--tokenizer", "nowhere", "--template", "plain"], "nowhere"),
        ("[1]", ["--tokenizer", "nowhere", "--template", "alpaca"], "alpaca"),
        ("[1]", ["--tokenizer", "nowhere", "--template", "v1_qwen2"], "v1_qwen2 is not one of"),
        ("[1]", ["--template", "plain"], "need each other"),
        ("[1]", ["--shard-size", "0"], "at least 1"),
        ("[1]", ["--max-images-per-sample", "0"], "at least 1"),
        ("[1]", ["--max-tokens-per-sample", "9"], "needs --tokenizer and --template"),
        ("[1]", ["--image-folder", "nowhere"], "not a folder"),
    ],
)
def test_errors_are_one_paragraph_and_leave_nothing(
    make: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    flags: list[str],
    message: str,
) -> None:
    (tmp_path / "data.json").write_text(content)
    assert make(*flags) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    listed = ["out.skipped.jsonl"] if " x " in message else []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "images", *listed]


def test_a_signal_leaves_nothing_behind(
    make: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, [{"conversations": TEXT}] * 9)
    monkeypatch.setattr(llava, "_encode", lambda _: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert make() == 130 and "stopped by a signal; nothing was written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "images"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_full_folder_is_not_overwritten(
    make: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, [{"conversations": TEXT}])
    assert make() == 0 and make() == 2
    assert "--overwrite" in capsys.readouterr().err
    write(tmp_path, [{"conversations": TEXT}, {"conversations": TEXT}])
    assert make("--overwrite") == 0
    assert len(ShardReader(tmp_path / "out")) == 2


def test_help_needs_no_library() -> None:
    code = f"import runpy, sys; sys.argv = ['x', '--help']; runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--image-folder" in done.stdout
    assert not any(f" {name}\n" in done.stderr for name in ("torch", "numpy", "PIL", "rich", "transformers"))


@pytest.mark.parametrize("name", ["\ud800.png", "file:///a%00b.png", "file://[a/b.png"])
def test_a_name_that_no_file_can_have_is_a_reason(tmp_path: Path, name: str) -> None:
    with pytest.raises(SampleError, match="image is not a path"):
        PictureFolder(tmp_path, False).read(name)
