"""The figures, tokens and pictures shown of a data set are those of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ross_mcore.commands import inspect_shards
from ross_mcore.data.shard_reader import ShardReader
from ross_mcore.data.spec import SampleSpec
from ross_mcore.errors import ShardError
from ross_mcore.shards.inspection import HISTOGRAM_BINS, Histogram, inspect, packing_figures, tokens_of
from ross_mcore.shards.writer import ShardWriter


@pytest.fixture
def tool() -> Callable[..., int]:
    """tool(*flags) -> the exit code of tools/inspect_shards.py, in this process."""

    def run(*flags: Any) -> int:
        try:
            return inspect_shards.main([*map(str, flags)])
        except SystemExit as stop:
            return int(stop.code or 0)

    return run


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=50))
def test_every_value_is_in_the_histogram(values: list[int]) -> None:
    histogram = Histogram.of(np.array(values))
    assert sum(histogram.counts) == len(values) and len(histogram.counts) <= HISTOGRAM_BINS
    assert len(histogram.labels()) == len(histogram.counts)
    for place, count in enumerate(histogram.counts):
        inside = [min(value // histogram.width, HISTOGRAM_BINS - 1) == place for value in values]
        assert sum(inside) == count


def test_figures_are_those_of_the_rows(shards: Path) -> None:
    reader = ShardReader(shards)
    found = inspect(reader, 64, 9)
    rows = reader.samples
    text = rows["text_tokens"].astype(int)
    assert (found["samples"], found["images"], found["shards"]) == (23, 15, 4)
    assert found["images_per_sample"] == {"0": 8, "1": 15}
    assert found["text"]["unit"] == "tokens" and found["text"]["total"] == text.sum()
    assert found["label_share"] == pytest.approx(rows["label_tokens"].sum() / text.sum())
    assert found["without_labels"] == found["pictures_never_shown"] == 0 and found["bad"] == {}
    lengths = text + 9 * rows["image_spans"]
    assert found["packing"]["too_long"] == (lengths > 64).sum()
    assert found["packing"]["filled_unpacked"] == pytest.approx(np.minimum(lengths, 64).mean() / 64)


def test_packing_of_halves_is_perfect_and_of_more_than_halves_is_not() -> None:
    half = packing_figures(np.full(1000, 50), 100)
    assert (half["filled"], half["samples_per_row"], half["rows_of_all_samples"]) == (1.0, 2.0, 500)
    more = packing_figures(np.full(1000, 51), 100)
    assert (more["filled"], more["samples_per_row"], more["rows_of_all_samples"]) == (0.51, 1.0, 1000)
    assert packing_figures(np.full(200_000, 50), 100)["rows_of_all_samples"] == 100_000


def test_without_lengths_text_is_in_words(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out") as writer:
        writer.write("a", b"{}", text_words=3)
        writer.write("b", b"{}", text_words=5)
    found = inspect(ShardReader(tmp_path / "out"), 64, 9)
    assert found["text"]["unit"] == "words" and found["text"]["mean"] == 4
    assert found["packing"] is None and found["label_share"] is None


def test_keys_are_found_whole(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out") as writer:
        for key in ("1", "11", "111", "2"):
            writer.write(key, b"{}")
    reader = ShardReader(tmp_path / "out")
    found = reader.find(("1", "11", "111", "2", "3", ""))
    assert found == {"1": [0], "11": [1], "111": [2], "2": [3], "3": [], "": []}


def test_supervised_tokens_are_the_answer(tokenizer: Any) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A car."}]
    tokens = tokens_of({"conversations": turns}, 1, tokenizer, SampleSpec("qwen_2")).tokens or []
    assert "".join(token.text for token in tokens if token.supervised) == " A car.<|im_end|>"
    assert [token.text for token in tokens].count("<image>") == 1
    with pytest.raises(ShardError, match="plain takes two turns"):
        tokens_of({"conversations": turns * 2}, 1, tokenizer, SampleSpec("plain"))


def test_the_tool_prints_figures(
    tool: Callable[..., int], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool("--data-path", shards, "--seq-length", 128, "--image-tokens", 9) == 0
    said = capsys.readouterr().out
    for part in ("23 in 4 shards", "8 with 0, 15 with 1", "rows of 128 tokens are", "tokens of text, samples", "█"):
        assert part in said
    assert tool("--data-path", shards, "--json") == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 23


def test_the_tool_prints_a_sample_and_its_labels(
    tool: Callable[..., int], shards: Path, golden_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data-path", shards, "--sample", "000000004", "--template", "qwen_2"]
    flags += ["--tokenizer", golden_data / "tok_qwen2"]
    assert tool(*flags) == 0
    said = capsys.readouterr().out
    assert "What is 4?" in said and "[<|im_end|>]" in said and "<image>|" in said
    assert tool(*flags, "--json") == 0
    (sample,) = json.loads(capsys.readouterr().out)["sample"]
    assert sample["record"]["id"] == "r4" and any(token["supervised"] for token in sample["tokens"])


def test_a_sample_is_found_by_the_id_of_its_record(
    tool: Callable[..., int], shards: Path, golden_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every data set of a mixture, with the data set's own template; a key comes first."""
    assert tool("--data-path", shards, "--sample", "r4", "--json") == 0
    (sample,) = json.loads(capsys.readouterr().out)["sample"]
    assert sample["record"]["id"] == "r4" and sample["tokens"] is None
    (tmp_path / "own.yaml").write_text("user: 'Q {text} '\nanswer_start: 'A '\nanswer_end: <|im_end|>\n")
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(
        f"- {{path: {shards}, name: one, template: plain}}\n- {{path: {shards}, name: two, template: own.yaml}}\n"
    )
    flags = ["--data-path", mixture, "--sample", "r4", "--tokenizer", golden_data / "tok_qwen2"]
    assert tool(*flags) == 0
    said = capsys.readouterr().out
    assert said.index("data set one") < said.index("data set two") and said.count('"id": "r4"') == 2
    assert "Q|" in said.rpartition("data set two")[2] and "Q|" not in said.partition("data set two")[0]
    assert tool(*flags, "--json") == 0
    found = json.loads(capsys.readouterr().out)["datasets"]
    assert [len(figures["sample"]) for figures in found] == [1, 1]
    assert tool("--data-path", mixture) == 0
    assert capsys.readouterr().out.count("23 in 4 shards") == 2
    assert tool("--data-path", mixture, "--contact-sheet", tmp_path / "a.png") == 2
    assert "has 2 data sets; give one for --contact-sheet" in capsys.readouterr().err


def test_why_a_sample_has_no_label_is_printed(tokenizer: Any) -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": ""}]
    assert tokens_of({"conversations": turns}, 0, tokenizer, SampleSpec("qwen_2")).without_labels == (
        "every answer is empty"
    )


def test_the_contact_sheet_shows_the_pictures(
    tool: Callable[..., int], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    assert tool("--data-path", shards, "--contact-sheet", sheet, "--contact-samples", 23) == 0
    with Image.open(sheet) as drawn:
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 24) or []}
        assert drawn.width > 6 * 224
    assert {(10, 40, 90), (40, 40, 90)} & colours, "the colours that the pictures are filled with"
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_bad_samples_are_counted_by_reason(shards: Path, tmp_path: Path, tool: Callable[..., int], capsys: Any) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    lines = [{"shard": "s", "key": "k", "reason": reason} for reason in ("broken: a", "broken: b", "[/x] \x1b[31m")]
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert inspect(ShardReader(folder))["bad"] == {"broken": 2, "[/x] \x1b[31m": 1}
    without_account(folder)
    assert tool("--data-path", folder) == 0
    said = capsys.readouterr().out
    assert "not counted: index the shards again" in said and "3 left out" in said and "1 x [/x] ?[31m" in said
    (folder / "quarantine.jsonl").write_text("[]\n")
    assert tool("--data-path", folder) == 2 and "quarantine.jsonl" in capsys.readouterr().err


def without_account(folder: Path) -> None:
    """Makes the index one of an older version."""
    index = json.loads((folder / "index.json").read_text())
    del index["account"]
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sample", "nothing"], "no sample has the key 'nothing' or this id; the first keys"),
        (["--template", "plain"], "need each other"),
        (["--seq-length", "5"], "need each other"),
        (["--data-path", "nowhere"], "index_shards.py --data-path nowhere"),
    ],
)
def test_wrong_arguments_are_one_paragraph(
    tool: Callable[..., int], shards: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert tool("--data-path", shards, *flags) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
