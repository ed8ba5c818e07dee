"""Values from outside: read, or refused with a reason that names the key."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from ross_mcore import checked


@dataclass(frozen=True)
class Facts:
    kind: Literal["a", "b"]
    size: int
    share: float
    name: str | None = None
    mean: tuple[float, float] = (0.0, 0.0)
    on: bool = False
    places: dict[str, int] = field(default_factory=dict)


GOOD: dict[str, Any] = {"kind": "a", "size": 3, "share": 1}


def test_a_dataclass_is_built_from_values_of_its_types() -> None:
    assert checked.build(Facts, GOOD, "it") == Facts("a", 3, 1)
    whole = {**GOOD, "name": "x", "mean": [1, 2.5], "on": True, "places": {"a": 1}}
    assert checked.build(Facts, whole, "it").mean == [1, 2.5]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "c"}, "kind of it is 'c', expected one of a, b"),
        ({"size": 3.0}, "size of it is 3.0, expected a whole number"),
        ({"size": True}, "size of it is True"),
        ({"size": 2**70}, "size of it is 1180591620717411303424"),
        ({"share": float("nan")}, "share of it is nan, expected a number"),
        ({"share": "1"}, "share of it is '1'"),
        ({"name": 3}, "name of it is 3, expected text or null"),
        ({"mean": [1]}, "mean of it is [1], expected a list of 2 numbers"),
        ({"places": {"a": "b"}}, "places of it"),
        ({"surprise": 1}, "it has an unknown key 'surprise'"),
        ({"": 1}, "it has an unknown key ''"),
    ],
)
def test_other_values_are_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        checked.build(Facts, {**GOOD, **change}, "it")
    assert says in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match="it has no key 'size'"):
        checked.build(Facts, {"kind": "a", "share": 1}, "it")
    with pytest.raises(ValueError, match=r"it is \[\], expected a mapping"):
        checked.build(Facts, [], "it")


def test_numbers_have_bounds() -> None:
    assert checked.count({"a": 0}, "a", least=0) == 0 and checked.count({}, "a", 5) == 5
    assert checked.real({"a": 1}, "a", above=0) == 1.0 and checked.switch({"a": None}, "a", True)
    for action in (
        lambda: checked.count({"a": 0}, "a"),
        lambda: checked.count({}, "a"),
        lambda: checked.count({"a": 2**31}, "a"),
        lambda: checked.real({"a": 0}, "a", above=0),
        lambda: checked.real({"a": float("inf")}, "a"),
        lambda: checked.switch({"a": 1}, "a", True),
    ):
        with pytest.raises(ValueError, match="^a is "):
            action()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"\xff{}", "not UTF-8 at byte 0"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "too many digits"),
        (b" " * 2000, "has 2000 bytes, at most 1000"),
    ],
)
def test_files_that_are_not_json(tmp_path: Path, text: bytes, says: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=says):
        checked.read_json(path, most_bytes=200_000 if len(text) != 2000 else 1000)


def test_folders_devices_and_loops_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, Path("/dev/zero"), tmp_path / "loop"):
        with pytest.raises(ValueError, match="regular file|symbolic links"):
            checked.read_json(path)
    with pytest.raises(FileNotFoundError):
        checked.read_json(tmp_path / "none")


def test_yaml_with_exponential_aliases_is_read_and_shown_short(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    assert len(checked.shown(checked.read_yaml(tmp_path / "a.yaml"))) <= checked.MOST_SHOWN_CHARACTERS


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "circle", "hole"])
def test_endless_files_are_not_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "hole":
        path.touch()
        os.truncate(path, 1 << 40)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    for read in (checked.read_json, checked.read_yaml):
        with pytest.raises(ValueError, match="regular file|symbolic links|at most"):
            read(path)
    if kind != "hole":
        with pytest.raises(ValueError, match="regular file|symbolic links"):
            next(checked.read_lines(path))
    assert checked.real_path(path).name == ("zero" if kind == "device" else "a.json")


def test_lines_over_the_bound_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"1234\n12345678901\n\nab")
    assert list(checked.read_lines(tmp_path / "a.jsonl", most_bytes=5)) == [b"1234\n", None, b"\n", b"ab"]


def test_reasons_of_libraries_are_one_printable_line() -> None:
    assert checked.reason(KeyError("x")) == "it is damaged"
    assert checked.reason(ValueError("invalid literal for int() with base 10: b'x'")) == "it is damaged"
    assert checked.reason(RuntimeError("reader failed: no end. This is\nlong")) == "reader failed: no end"
    assert checked.reason(ValueError("bad \x1b[31m byte")) == "bad ?[31m byte"
    assert checked.reason(FileNotFoundError(2, "No such file or directory", "x")) == "No such file or directory"
