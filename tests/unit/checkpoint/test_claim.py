"""One run at a time saves into a folder, and only into the folder it started with."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ross_mcore.checkpoint import claim
from ross_mcore.checkpoint.claim import LOCK, Claim
from ross_mcore.errors import CheckpointError

HOLD = """
import os, sys, time
from pathlib import Path
from ross_mcore.checkpoint.claim import Claim
with Claim(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `run`, with a child process like a data worker."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        yield process
        for number in (process.pid, child):
            os.kill(number, signal.SIGKILL)


@pytest.mark.slow
def test_second_run_is_refused_until_the_first_is_dead(
    tmp_path: Path, other_run: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "WAIT_SECONDS", 0.3)
    with (
        pytest.raises(CheckpointError, match=rf"run is held by process {other_run.pid} on .*, which is still running"),
        Claim(tmp_path / "run"),
    ):
        pass
    os.kill(other_run.pid, signal.SIGKILL)  # its child lives on
    monkeypatch.setattr(claim, "WAIT_SECONDS", 20)
    with Claim(tmp_path / "run") as mine:
        mine.require()


def test_failed_start_leaves_nothing(tmp_path: Path) -> None:
    with Claim(tmp_path / "run"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    assert not (tmp_path / "run").exists()
    with Claim(tmp_path / "run"):
        (tmp_path / "run" / "metrics.jsonl").touch()
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_deleted_folder_is_created_again(tmp_path: Path) -> None:
    with Claim(tmp_path / "a" / "run") as mine:
        (tmp_path / "a" / "run" / LOCK).unlink()
        (tmp_path / "a" / "run").rmdir()
        (tmp_path / "a").rmdir()
        mine.require()
        mine.require()
        assert (tmp_path / "a" / "run" / LOCK).exists()


def test_folder_taken_by_another_run_is_refused(tmp_path: Path) -> None:
    """On a file system without locks."""
    with Claim(tmp_path) as mine:
        (tmp_path / "new").write_text('{"host": "node7", "process": 31}')
        (tmp_path / "new").replace(tmp_path / LOCK)
        with pytest.raises(CheckpointError, match="was taken by process 31 on 'node7': stop one of the two runs"):
            mine.require()


@pytest.mark.parametrize("inside", [".", "runs/a"])
def test_nothing_is_written_under_a_mount_that_vanished(tmp_path: Path, inside: str) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    (tmp_path / "disk").mkdir()
    with tempfile.TemporaryDirectory(dir=shared) as mounted:
        (tmp_path / "mount").symlink_to(mounted)
        with Claim(tmp_path / "mount" / inside) as mine:
            mine.require()
            (tmp_path / "mount").unlink()
            (tmp_path / "mount").symlink_to(tmp_path / "disk")
            with pytest.raises(CheckpointError, match="no longer on the file system where .*: mount that .* again"):
                mine.require()
            assert not list((tmp_path / "disk").iterdir())
            (tmp_path / "mount").unlink()
            (tmp_path / "mount").symlink_to(mounted)
            mine.require()


@pytest.mark.parametrize("kind", ["file", "link", "file in the way", "pipe as lock", "link as lock", "device"])
def test_unwritable_folder_is_named(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "run"
    if kind == "file":
        root.touch()
    elif kind == "link":
        root.symlink_to(tmp_path / "nowhere" / "else")
    elif kind == "file in the way":
        (tmp_path / "file").touch()
        root = tmp_path / "file" / "run"
    elif kind == "device":
        root = Path("/dev/null")
    else:
        root.mkdir()
        os.mkfifo(root / LOCK) if kind == "pipe as lock" else (root / LOCK).symlink_to(tmp_path / "outside")
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"(run|null) cannot be written: .*; give another --save"), Claim(root):
        pass
    assert time.monotonic() - began < 5 and not (tmp_path / "outside").exists()


def test_folder_of_one_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="iter_0000004 is one checkpoint; give the folder of a run"):
        Claim(tmp_path / "iter_0000004").__enter__()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EXDEV, errno.EPERM, errno.ENOTSUP])
def test_a_place_where_no_folder_can_be_renamed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    rename = os.rename

    def of_files_only(source: str, target: str) -> None:
        if Path(source).is_dir() and any(Path(source).iterdir()):
            raise OSError(number, os.strerror(number), source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", of_files_only)
    run = tmp_path / "run"
    with (
        pytest.raises(CheckpointError, match=rf"cannot be renamed there \({os.strerror(number)}\).*gcsfuse"),
        Claim(run),
    ):
        pass
    assert not run.exists()
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="gcsfuse"), Claim(run):
        pass
    assert {path.name for path in run.iterdir()} == {"metrics.jsonl", LOCK}
    monkeypatch.undo()
    with Claim(run):  # the folder is free again, and nothing of the probe is left
        assert {path.name for path in run.iterdir()} == {"metrics.jsonl", LOCK}
