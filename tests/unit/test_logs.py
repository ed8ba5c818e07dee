"""Files and lines that cannot be written: reported once, and the run continues."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ross_mcore.engine.state import TrainState
from ross_mcore.errors import LogError
from ross_mcore.logs import JsonLines
from ross_mcore.reporting.tensorboard import TensorBoard


def board_in(folder: Path, iteration: int) -> TensorBoard:
    run: Any = SimpleNamespace(config=SimpleNamespace(logging=SimpleNamespace(tensorboard_dir=str(folder))))
    return TensorBoard(run, TrainState(iteration))


@contextmanager
def no_room(path: Path) -> Iterator[None]:
    """Half a line fits."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@contextmanager
def a_full_device(path: Path) -> Iterator[None]:
    with _replaced(path):
        path.symlink_to("/dev/full")
        yield
        path.unlink()


@contextmanager
def a_folder_in_the_way(path: Path) -> Iterator[None]:
    with _replaced(path):
        path.mkdir()
        yield
        path.rmdir()


@contextmanager
def gone_with_its_folder(path: Path) -> Iterator[None]:
    away = path.parent.rename(path.parent.with_name("away"))
    yield
    away.rename(path.parent)


@contextmanager
def _replaced(path: Path) -> Iterator[None]:
    kept = path.rename(path.with_suffix(".kept"))
    yield
    kept.rename(path)


FAULTS = [
    (no_room, "File too large"),
    (a_full_device, "No space left on device"),
    (a_folder_in_the_way, "Is a directory"),
    (gone_with_its_folder, "No such file or directory"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_a_run_continues_without_a_file_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture, fault: Callable, reason: str
) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    log = JsonLines(path, 0)
    for _ in range(2):  # a second failure is reported again
        log.add({"iteration": 1}, {"iteration": 2, "loss": float("nan")})
        with fault(path):
            log.add({"iteration": 3, "reason": "of many words"})
            log.add({"iteration": 4, "reason": "of many words"})
        log.add({"iteration": 5})
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2
        assert lines[0].startswith(f"warning: {path} cannot be written: {reason}; training continues")
        assert lines[1].startswith(f"{path} is written again")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["iteration"] for entry in entries] == [1, 2, 5, 1, 2, 5] and entries[1]["loss"] is None


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_a_run_continues_without_a_tensorboard_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture, fault: Callable, reason: str
) -> None:
    board = board_in(tmp_path / "board", 0)
    (path,) = (tmp_path / "board").iterdir()
    for step in range(1, 6):
        if step in (2, 3):
            with fault(path):
                board.scalars(step, {"loss": 1.0, "grad_norm": 1.0})
        else:
            board.scalars(step, {"loss": 1.0})
    printed = capsys.readouterr()
    assert printed.out.count(f"warning: {path} cannot be written: {reason}; ") == 1 and not printed.err
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 4, 5]


def test_nothing_is_written_below_a_vanished_mount(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user is not allowed to mount")
    log = JsonLines(tmp_path / "metrics.jsonl", 0)
    log.add({"iteration": 1})
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
    log.add({"iteration": 2})
    assert not list(tmp_path.iterdir())
    assert "metrics.jsonl cannot be written: its file system is no longer mounted; " in capsys.readouterr().out


def test_a_board_resumes_after_an_iteration(tmp_path: Path) -> None:
    for number, last in ((0, 3), (2, 4)):
        board = board_in(tmp_path, number)
        board.text(0, "options", "of the run")
        for step in range(number + 1, last + 1):
            board.scalars(step, {"loss": float(number)})
        (path,) = tmp_path.glob("events*")
        path.rename(tmp_path / f"{number}.tfevents")  # a second file in the same second would have the same name
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0), (2, 0), (3, 2), (4, 2)]


def test_a_file_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    (tmp_path / "metrics.partial").mkdir()
    with pytest.raises(LogError, match=r"metrics\.partial cannot be written: Is a directory; move it away"):
        JsonLines(tmp_path / "metrics.jsonl", 1)
    with pytest.raises(LogError, match=r"metrics\.jsonl cannot be written: No such file or directory; give another"):
        JsonLines(tmp_path / "nowhere" / "metrics.jsonl", 0)
    (tmp_path / "board").write_text("")
    with pytest.raises(LogError, match=r"board cannot be written: it is not a folder; give another --tensorboard-dir"):
        board_in(tmp_path / "board", 0)
    with pytest.raises(LogError, match="Not a directory; give another --tensorboard-dir"):
        board_in(tmp_path / "board" / "within", 0)


BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}


def print_lines(**streams: int) -> subprocess.CompletedProcess:
    code = "from ross_mcore.logs import complain, say\nsay('one')\nsay('two')\ncomplain('three')"
    return subprocess.run([sys.executable, "-c", code], timeout=60, env=BUFFERED, **streams)


def test_standard_output_that_cannot_be_written_is_reported_once() -> None:
    read, closed = os.pipe()
    os.close(read)
    full = os.open("/dev/full", os.O_WRONLY)
    for output, reason in ((full, "No space left on device"), (closed, "Broken pipe")):
        done = print_lines(stdout=output, stderr=subprocess.PIPE)
        expected = f"warning: standard output cannot be written: {reason}; training continues\nthree\n"
        assert (done.returncode, done.stderr.decode()) == (0, expected)
        assert print_lines(stdout=output, stderr=output).returncode == 0
    done = print_lines(stdout=subprocess.PIPE, stderr=full)
    assert (done.returncode, done.stdout) == (0, b"one\ntwo\n")


def test_lines_are_printed_again_when_standard_output_has_room(tmp_path: Path) -> None:
    code = """
import resource
from ross_mcore.logs import say
say("one")
resource.setrlimit(resource.RLIMIT_FSIZE, (4, -1))
say("two")
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
say("three")
"""
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True, timeout=60, env=BUFFERED)
    assert (tmp_path / "out").read_text() == "one\nthree\n"
