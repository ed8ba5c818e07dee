"""The three tools print the same account of a data set, also when a shard changes or the index is an old one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ross_mcore.commands import index_shards, inspect_shards, make_shards
from ross_mcore.errors import ShardError
from ross_mcore.shards.account import Account
from ross_mcore.shards.indexer import Settings, find_shards
from ross_mcore.shards.indexer import index_shards as index_tars
from tests.cases.case import TOKENIZER
from tests.unit.shards.tars import JPEG, TEXT, TURNS, sample, tar


@pytest.fixture
def tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """tools(command, *flags) -> (status, stdout), with qwen_2's labels."""

    def run(command: Any, *flags: Any) -> tuple[int, str]:
        if command is not inspect_shards:
            flags = (*flags, "--tokenizer", TOKENIZER, "--template", "qwen_2", "--num-workers", 1)
        capsys.readouterr()
        status = command.main([*map(str, flags)])
        return status, capsys.readouterr().out

    return run


def messy(folder: Path) -> list[Any]:
    """Records of all kinds; pictures in `folder`/images."""
    (folder / "images").mkdir()
    (folder / "images" / "a.jpg").write_bytes(JPEG)
    silent = [TURNS[0], {"from": "gpt", "value": ""}]
    return [
        *[{"image": "a.jpg", "conversations": TURNS} for _ in range(4)],
        {"image": ["a.jpg", "a.jpg"], "conversations": TURNS},
        {"conversations": TEXT},
        {"conversations": [TEXT[0], silent[1]]},
        {"image": "a.jpg", "conversations": silent},
        {"image": "missing.jpg", "conversations": TURNS},
        {"image": "a.jpg"},
        None,
        {"image": ["a.jpg"] * 65, "conversations": TURNS},
    ]


def account_in(output: str) -> str:
    """The printed account."""
    lines = output.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("records  "))
    last = next(number for number, line in enumerate(lines) if line.startswith("one colour"))
    return "\n".join(lines[first : last + 1])


def test_the_three_tools_print_the_same_account(tools: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(messy(tmp_path)))
    out = tmp_path / "out"
    flags = ["--data", tmp_path / "data.json", "--image-folder", tmp_path / "images", "--out", out, "--shard-size", 3]
    status, said = tools(make_shards, *flags, "--max-bad-fraction", 0.5)
    assert status == 0 and "8 samples, 7 pictures, of 12 records" in said
    printed = account_in(said)
    for part in (
        "records         12\n",
        "trained on      7 ",
        "skipped         2 ",
        "bad             3 ",
        "several: 1",
    ):
        assert part in printed
    assert "without labels  2 samples, 1 of them train on their pictures alone (25.00%)" in printed
    assert account_in(tools(inspect_shards, "--data-path", out)[1]) == printed
    for place in ([], ["--out", tmp_path / "elsewhere"]):
        status, said = tools(index_shards, "--data-path", out, *place)
        assert status == 0 and account_in(said) == printed
        folder = place[-1] if place else out
        assert account_in(tools(inspect_shards, "--data-path", folder)[1]) == printed
    older = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    for line in older:
        del line["outcome"]
    (out / "skipped.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in older))
    said = tools(index_shards, "--data-path", out)[1]
    assert account_in(said) == printed and said.endswith(f"left out: {out / 'skipped.jsonl'}\n")
    found = json.loads(tools(inspect_shards, "--data-path", out, "--json")[1])["account"]
    assert found == json.loads(tools(index_shards, "--data-path", out, "--json")[1])["account"]
    assert (found["records"], found["trained"], found["bad"]["the image cannot be read"]["count"]) == (12, 7, 1)


def test_a_shard_that_changes_is_counted_again(tools: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.tar").write_bytes(tar(sample(f"k{number}"), sample(f"bad{number}", b"{")))

    def indexed() -> Account:
        status, said = tools(index_shards, "--data-path", tmp_path, "--max-bad-fraction", 1, "--json")
        assert status == 0
        return Account.from_json(json.loads(said)["account"])

    before = indexed()
    assert (before.records, before.bad.total) == (6, 3)
    (tmp_path / "1.tar").write_bytes(tar(sample("k1"), sample("k1b"), sample("k1c")))
    after = indexed()
    assert (after.records, after.trained, after.bad.total) == (7, 5, 2)
    assert list(after.bad.first.values()) == [["bad0", "bad2"]]


@pytest.mark.parametrize("line", ["[]", "{", '{"record": "x", "reason": "a"}', '{"record": 1, "reason": 3}'])
def test_a_damaged_list_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.tar").write_bytes(tar(sample("k")))
    (tmp_path / "skipped.jsonl").write_text(f'{{"record": 1, "reason": "a"}}\n{line}\n')
    with pytest.raises(ShardError, match=r"skipped\.jsonl cannot be read: line 2: .*remove the list"):
        index_tars(find_shards([str(tmp_path)], tmp_path), tmp_path, Settings())


def test_the_list_of_a_refusal_is_kept_until_it_works(tools: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(messy(tmp_path)))
    flags = ["--data", tmp_path / "data.json", "--image-folder", tmp_path / "images", "--out", tmp_path / "out"]
    assert tools(make_shards, *flags)[0] == 2
    kept = tmp_path / "out.skipped.jsonl"
    listed = [json.loads(line) for line in kept.read_text().splitlines()]
    bad = [(number, "bad") for number in (8, 9, 10)]
    assert [(line["record"], line["outcome"]) for line in listed] == [*bad, (11, "skipped")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "images", "out.skipped.jsonl"]
    assert tools(make_shards, *flags, "--max-bad-fraction", 0.3)[0] == 0 and not kept.exists()
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 4
