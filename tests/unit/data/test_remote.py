"""Shards behind URLs: the same samples as from the disk, fetched once, in a cache that keeps its limit."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from ross_mcore.data import remote
from ross_mcore.data.remote import ShardCache, identify, is_remote, list_shards
from ross_mcore.data.shard_reader import ShardReader
from ross_mcore.errors import RemoteError, ShardError, ShardReadError
from ross_mcore.shards.indexer import Settings, find_shards, index_shards


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0)


@pytest.fixture
def stored(shards: Path) -> Iterator[str]:
    """A URL of a folder in memory that holds the shards of the data set, without its index."""
    files = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        files.pipe(f"/bucket/{path.name}", path.read_bytes())
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


def tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


@pytest.mark.parametrize("place", ["{}", "{}/*.tar", "{}/shard-{{00000..00003}}.tar"])
def test_samples_are_those_of_the_disk(place: str, stored: str, shards: Path, tmp_path: Path) -> None:
    found = find_shards([place.format(stored)], tmp_path)
    index_shards(found, tmp_path, Settings())
    local, reader = ShardReader(shards), ShardReader(tmp_path, tmp_path / "cache", 1 << 20)
    assert reader.fingerprint == local.fingerprint and reader.index["shards"][0]["name"].startswith("memory://")
    for number in range(len(local)):
        assert reader.record_bytes(number) == local.record_bytes(number)
        for ordinal in range(local.samples[number]["num_images"]):
            assert reader.image_bytes(number, ordinal) == local.image_bytes(number, ordinal)
    assert len(tars(tmp_path / "cache")) == 4
    assert pickle.loads(pickle.dumps(reader)).record_bytes(5) == local.record_bytes(5)
    assert index_shards(found, tmp_path, Settings()).reread == 0
    assert not list(tmp_path.glob(".index*")), "what was fetched to index it stays behind"


def test_a_changed_shard_is_indexed_again_and_never_mixed_up(stored: str, shards: Path, tmp_path: Path) -> None:
    cache = Settings(cache_folder=tmp_path / "cache")
    index_shards(find_shards([stored], tmp_path), tmp_path, cache)
    old = ShardReader(tmp_path, tmp_path / "other")
    files = fsspec.filesystem("memory")
    changed = files.cat("/bucket/shard-00001.tar").replace(b"What is 7?", b"What is 8?")
    files.pipe("/bucket/shard-00001.tar", changed)
    with pytest.raises(ShardReadError, match="shard-00001.tar is not what was indexed.*index_shards"):
        old.record_bytes(7)
    assert index_shards(find_shards([stored], tmp_path), tmp_path, cache).reread == 1
    assert b"What is 8?" in ShardReader(tmp_path, tmp_path / "cache").record_bytes(7)


def test_a_folder_in_the_place_of_a_copy_is_named(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path)
    cache.path("a.tar", None).mkdir()
    with pytest.raises(RemoteError, match=r"\.tar is in the way: .*; remove it"), cache.open("a.tar", 3, None):
        pass


def test_a_cache_folder_is_needed_and_named(stored: str, tmp_path: Path) -> None:
    index_shards(find_shards([stored], tmp_path), tmp_path, Settings())
    with pytest.raises(ShardError, match="memory://.* not a local file: .*--data-cache-dir"):
        ShardReader(tmp_path)


def test_the_limit_holds_and_the_least_recently_used_is_removed(stored: str, tmp_path: Path) -> None:
    names = list_shards(stored)
    sizes = {name: identify(name) for name in names}
    limit = sum(size for size, _ in list(sizes.values())[:2]) + 100
    cache = ShardCache(tmp_path / "cache", limit)

    def use(name: str) -> None:
        with cache.open(name, *sizes[name]):
            pass
        os.utime(cache.path(name, sizes[name][1]), ns=(use.clock, use.clock))  # type: ignore[attr-defined]
        use.clock += 1  # type: ignore[attr-defined]

    use.clock = 1  # type: ignore[attr-defined]
    for name in (names[0], names[1], names[0], names[2]):
        use(name)
        assert sum(path.stat().st_size for path in tars(cache.folder)) <= limit
    held = set(tars(cache.folder))
    assert held == {cache.path(name, sizes[name][1]) for name in (names[0], names[2])}


def test_open_copies_are_never_removed(stored: str, tmp_path: Path) -> None:
    names = list_shards(stored)
    sizes = {name: identify(name) for name in names}
    cache = ShardCache(tmp_path / "cache", max(size for size, _ in sizes.values()))
    with cache.open(names[0], *sizes[names[0]]) as first:
        with cache.open(names[1], *sizes[names[1]]):
            assert len(tars(cache.folder)) == 2
        assert cache.path(names[0], sizes[names[0]][1]).exists() and os.pread(first, 8, 0)
    with cache.open(names[2], *sizes[names[2]]):
        assert list(tars(cache.folder)) == [cache.path(names[2], sizes[names[2]][1])]


def test_a_shard_larger_than_the_cache_is_refused_with_the_flag(stored: str, tmp_path: Path) -> None:
    index_shards(find_shards([stored], tmp_path), tmp_path, Settings())
    with pytest.raises(ShardReadError, match="may hold 99: raise --data-cache-bytes"):
        ShardReader(tmp_path, tmp_path / "cache", 99).record_bytes(0)


def test_the_cache_may_be_wiped_at_any_time(
    stored: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_shards(find_shards([stored], tmp_path), tmp_path, Settings())
    expected = ShardReader(shards).record_bytes(0)
    reader = ShardReader(tmp_path, tmp_path / "cache")
    for damage in (shutil.rmtree, lambda cache: [path.write_bytes(b"x") for path in tars(cache)]):
        assert reader.record_bytes(0) == expected
        damage(tmp_path / "cache")
        assert reader.record_bytes(0) == expected
    shutil.rmtree(tmp_path / "cache")
    download, wiped = remote._download, []

    def wipe_once(location: str, target: Path, *rest: Any) -> None:
        download(location, target, *rest)
        if not wiped:
            wiped.append(target)
            shutil.rmtree(tmp_path / "cache")

    monkeypatch.setattr(remote, "_download", wipe_once)
    assert reader.record_bytes(0) == expected and wiped


def test_processes_fetch_a_shard_once(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = (shards / "shard-00000.tar").as_uri()
    size, tag = identify(location)
    assert tag is not None
    download, log = remote._download, tmp_path / "log"

    def logged(*arguments: Any) -> None:
        with log.open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        time.sleep(0.3)  # long enough for the others to come
        download(*arguments)

    monkeypatch.setattr(remote, "_download", logged)
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            with ShardCache(tmp_path / "cache").open(location, size, tag) as handle:
                os._exit(int(len(os.pread(handle, size, 0)) != size))
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert len(log.read_text().splitlines()) == 1


def test_a_store_that_fails_is_asked_three_times_and_leaves_nothing(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_shards(find_shards([stored], tmp_path), tmp_path, Settings())
    files, asked = fsspec.filesystem("memory"), []
    original = type(files).open

    def failing(self: Any, path: str, *rest: Any, **options: Any) -> Any:
        asked.append(path)
        if len(asked) % 4:
            raise TimeoutError("no answer")
        return original(self, path, *rest, **options)

    monkeypatch.setattr(type(files), "open", failing)
    reader = ShardReader(tmp_path, tmp_path / "cache")
    with pytest.raises(ShardReadError, match="could not be fetched in 3 attempts: TimeoutError: no answer"):
        reader.record_bytes(0)
    assert len(asked) == 3
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}
    assert json.loads(reader.record_bytes(0))["id"] == "r0"


def test_a_shard_that_comes_short_is_an_error(stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = list_shards(stored)[0]
    size, tag = identify(name)
    monkeypatch.setattr(remote, "identify", lambda _: (size + 5, tag))
    cache = ShardCache(tmp_path)
    with pytest.raises(RemoteError, match=f"{size} of {size + 5} bytes came"), cache.open(name, size + 5, tag):
        pass


@pytest.mark.parametrize(("place", "remote_"), [("s3://b/k.tar", True), ("/a/b.tar", False), ("a:/b.tar", False)])
def test_urls_are_recognised(place: str, remote_: bool) -> None:
    assert is_remote(place) == remote_


def test_a_protocol_without_its_package_says_what_to_install(tmp_path: Path, shards: Path) -> None:
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["name"] = "gs://bucket/a.tar"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ShardError, match=r"gs:// needs a package that is not installed.*pip install 'fsspec\[gs\]'"):
        ShardReader(folder, tmp_path / "cache")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(shards: Path) -> Iterator[Callable[[str], str]]:
    """web(name) -> the URL of a file of the data set, from a server of this process."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield lambda name: f"http://127.0.0.1:{server.server_port}/{name}"
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="fsspec reads http with aiohttp")
def test_over_http(web: Callable[[str], str], shards: Path, tmp_path: Path) -> None:
    index_shards(find_shards([web("shard-{00000..00003}.tar")], tmp_path), tmp_path, Settings())
    local, reader = ShardReader(shards), ShardReader(tmp_path, tmp_path / "cache")
    assert [reader.record_bytes(n) for n in range(23)] == [local.record_bytes(n) for n in range(23)]
    with pytest.raises(RemoteError, match="nothing.tar"):
        find_shards([web("nothing.tar")], tmp_path)
