"""Loading damaged checkpoints, and saving to faulty disks."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from ross_mcore.architecture import ModelConfig
from ross_mcore.checkpoint import folder, manifest, saving, sharded
from ross_mcore.checkpoint.manifest import FileRecord
from ross_mcore.checkpoint.verification import find_intact, share_of_files
from ross_mcore.errors import CheckpointError

TENSORS = "__0_0.distcp"


pytestmark = pytest.mark.usefixtures("process_group")


def state(value: float = 1.0, elements: int = 40_000) -> dict[str, Any]:
    weight = ShardedTensor.from_rank_offsets("weight", torch.full((elements,), value))
    return {"model": {"weight": weight}, "train_state": {"iteration": int(value)}}


def save(root: Path, iteration: int, model: ModelConfig) -> folder.Checkpoint:
    return sharded.save_checkpoint(root, iteration, state(float(iteration)), model)


def flip(path: Path, byte: int = -100) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped byte": (lambda path: flip(path / TENSORS), rf"{TENSORS} is damaged: its content has crc32"),
    "flipped byte in a tensor": (lambda path: flip(path / TENSORS, 9999), rf"{TENSORS} is damaged: its content has"),
    "flipped byte in a small file": (lambda path: flip(path / "config.json"), r"config\.json is damaged: its content"),
    "flipped byte in the index": (lambda path: flip(path / ".metadata"), r"\.metadata is damaged: its content"),
    "flipped byte in the marker": (lambda path: flip(path / folder.MARKER, -40), r"complete\.json"),
    "truncated file": (lambda path: truncate(path / TENSORS), rf"{TENSORS} has \d+ bytes, expected \d+: it is damaged"),
    "missing file": (lambda path: (path / TENSORS).unlink(), rf"{TENSORS} is missing"),
    "missing marker": (lambda path: (path / folder.MARKER).unlink(), r"iter_0000002 is not a complete checkpoint"),
    "empty folder": (lambda path: [p.unlink() for p in path.iterdir()] and None, r"iter_0000002 is not a complete"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, model_config: ModelConfig, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    good, newest = save(tmp_path, 1, model_config), save(tmp_path, 2, model_config)
    assert find_intact(tmp_path) == newest == find_intact(newest.path) and not caplog.records
    harm, message = FAULTS[fault]
    harm(newest.path)
    assert find_intact(tmp_path) == good
    (record,) = caplog.records
    assert re.search(rf"not used: .*{message}.* Going back to {re.escape(str(good.path))}$", record.getMessage())
    with pytest.raises(CheckpointError, match=message):
        find_intact(newest.path)
    shutil.rmtree(good.path)
    with pytest.raises(CheckpointError, match=f"holds no complete checkpoint: .*{message}"):
        find_intact(tmp_path)


def test_checksums_can_be_skipped(tmp_path: Path, model_config: ModelConfig) -> None:
    newest = save(tmp_path, 1, model_config)
    flip(newest.path / TENSORS)
    assert find_intact(tmp_path, verify=False) == newest
    with pytest.raises(CheckpointError, match="is damaged"):
        folder.require_intact(tmp_path)


def test_missing_checkpoints_are_not_damage(tmp_path: Path, model_config: ModelConfig) -> None:
    assert find_intact(tmp_path) is None and find_intact(tmp_path / "absent") is None
    folder.begin(tmp_path, 1)
    assert find_intact(tmp_path) is None


def test_checkpoint_without_checksums_is_used_with_a_warning(
    tmp_path: Path, model_config: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    saved = save(tmp_path, 1, model_config)
    sizes = {name: record.bytes for name, record in saved.manifest().files.items()}
    marker = {"format": manifest.FORMAT, "version": 1, "iteration": 1, "sequence": 1, "files": sizes}
    (saved.path / folder.MARKER).write_text(json.dumps(marker))
    assert find_intact(tmp_path) == saved
    assert "has no checksums" in caplog.text
    loaded = sharded.load_model_weights(saved, state(0.0)["model"])
    assert torch.equal(loaded["weight"], torch.full((40_000,), 1.0))


def test_ranks_share_the_files(tmp_path: Path, model_config: ModelConfig) -> None:
    saved = save(tmp_path, 1, model_config).manifest()
    files = {f"file{size}": FileRecord(size, 0) for size in (7, 5, 4, 3, 1)}
    some = replace(saved, files=files)
    assert [share_of_files(some, rank, 2) for rank in range(2)] == [["file7", "file3"], ["file5", "file4", "file1"]]
    assert sorted(name for rank in range(9) for name in share_of_files(some, rank, 9)) == sorted(files)


@contextmanager
def full_disk(root: Path) -> Iterator[None]:
    """A file system of 64 KiB where one may be mounted, else a limit on the size of files."""
    with mounted(root, "size=64k") as is_mounted:
        if is_mounted:
            yield
            return
        former = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, former[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)


@contextmanager
def read_only(root: Path) -> Iterator[None]:
    with mounted(root, "ro") as is_mounted:
        root.chmod(0o555) if not is_mounted else None
        if not is_mounted and os.access(root, os.W_OK):
            pytest.skip("this user may write everywhere and mount nothing")
        yield
        root.chmod(0o755) if not is_mounted else None


@contextmanager
def mounted(root: Path, options: str) -> Iterator[bool]:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(root)]
    done = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "--lazy", str(root)], check=True)


@contextmanager
def vanishes(root: Path) -> Iterator[None]:
    """The folder is deleted between planning and writing."""
    plan = saving._plan

    def then_vanish(tensors: dict[str, Any]) -> Any:
        found = plan(tensors)
        shutil.rmtree(root)
        return found

    saving._plan = then_vanish
    try:
        yield
    finally:
        saving._plan = plan


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (full_disk, rf"{TENSORS} cannot be written: ({os.strerror(errno.ENOSPC)}|{os.strerror(errno.EFBIG)})"),
        (read_only, r"cannot write a checkpoint under .*Read-only|cannot write a checkpoint under .*Permission"),
        (vanishes, rf"{TENSORS} cannot be written: No such file or directory"),
    ],
)
@pytest.mark.parametrize("copied", [False, True])
def test_save_to_a_faulty_disk_names_the_file_and_the_next_one_succeeds(
    tmp_path: Path, model_config: ModelConfig, fault: Callable[[Path], Any], message: str, copied: bool
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    copies = saving.HostCopies() if copied else None
    with fault(root):
        with pytest.raises(CheckpointError, match=message) as error:
            saving.begin_save(saving.Destination(root, 1, model_config), state(), copies).finish()
        assert str(root) in str(error.value)
        assert not root.exists() or not list(root.iterdir())  # the space is given back
    assert save(root, 1, model_config) == find_intact(root)


def test_disk_that_reads_back_other_bytes_is_detected(
    tmp_path: Path, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(tmp_path, 1, model_config)
    close = saving.TensorFile.close

    def close_and_flip(self: saving.TensorFile) -> None:
        close(self)
        flip(self.path)

    monkeypatch.setattr(saving.TensorFile, "close", close_and_flip)
    with pytest.raises(CheckpointError, match=rf"{TENSORS} was written with crc32 \w+ and reads back with \w+"):
        sharded.save_checkpoint(tmp_path, 2, state(), model_config, keep_last=1)
    assert folder.checkpoints(tmp_path) == [good]


def test_training_may_change_the_state_while_it_is_written(tmp_path: Path, model_config: ModelConfig) -> None:
    """And the memory of the copy is reused for the next save."""
    copies, places = saving.HostCopies(), set()
    for iteration in (1, 2):
        changing = state(float(iteration), elements=1_000_000)
        running = saving.begin_save(saving.Destination(tmp_path, iteration, model_config), changing, copies)
        assert running.is_copied
        places.add(copies._memory.data_ptr())
        changing["model"]["weight"].data.fill_(-1.0)
        saved = running.finish()
        assert saved.copy_bytes == copies.bytes == 4_000_000 and saved.bytes > 4_000_000
        loaded = sharded.load_model_weights(saved.checkpoint, state(0.0, 1_000_000)["model"])
        assert torch.equal(loaded["weight"], torch.full((1_000_000,), float(iteration)))
    assert len(places) == 1


def test_progress_of_a_slow_save_is_reported(
    tmp_path: Path, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No piece is written before progress of the one before it is reported."""
    append, may_write = saving.TensorFile.append, threading.Semaphore(1)

    def slow_append(self: saving.TensorFile, piece: Any) -> Any:
        assert may_write.acquire(timeout=60)
        return append(self, piece)

    monkeypatch.setattr(saving.TensorFile, "append", slow_append)
    monkeypatch.setattr(saving, "POLL_SECONDS", 0.01)
    pieces = {f"{n}": ShardedTensor.from_rank_offsets(f"{n}", torch.zeros(9)) for n in range(5)}
    heard = 0

    def moving() -> None:
        nonlocal heard
        heard += 1
        may_write.release()

    running = saving.begin_save(saving.Destination(tmp_path, 1, model_config), {"model": pieces, "train_state": {}})
    running.finish(moving)
    assert 4 <= heard <= 6


def test_older_checkpoints_stay_until_the_new_one_is_complete(
    tmp_path: Path, model_config: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    old = save(tmp_path, 1, model_config)
    running = saving.begin_save(saving.Destination(tmp_path, 2, model_config, keep_last=1), state())
    assert folder.checkpoints(tmp_path) == [old]
    saved = running.finish()
    assert folder.checkpoints(tmp_path) == [saved.checkpoint]
