"""Which folders are checkpoints, which one is the newest, and which ones are deleted."""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from ross_mcore.architecture import ModelConfig
from ross_mcore.checkpoint import folder
from ross_mcore.checkpoint.folder import POINTER
from ross_mcore.checkpoint.manifest import FORMAT, FileRecord
from ross_mcore.errors import CheckpointError


def write(root: Path, iteration: int, model: ModelConfig, content: str = "weights") -> folder.Checkpoint:
    partial = folder.begin(root, iteration)
    (partial / "__0_0.distcp").write_text(content)
    return folder.publish(root, iteration, model, {"iteration": iteration})


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_published_checkpoint_is_found_from_root_and_from_its_folder(tmp_path: Path, model_config: ModelConfig) -> None:
    saved = write(tmp_path, 100, model_config)
    assert saved.path == tmp_path / "iter_0000100" and saved.iteration == 100
    assert folder.find_checkpoint(tmp_path) == saved == folder.find_checkpoint(saved.path)
    assert saved.train_state() == {"iteration": 100} and saved.model_config() == model_config
    assert names(tmp_path) == ["iter_0000100", "latest_checkpointed_iteration.txt"]
    assert (tmp_path / folder.POINTER).read_text() == "100\n"


def test_nothing_there(tmp_path: Path) -> None:
    assert folder.find_checkpoint(tmp_path) is None
    assert folder.find_checkpoint(tmp_path / "absent") is None
    with pytest.raises(CheckpointError, match="no iter_"):
        folder.require_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        folder.require_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("pointer", [None, "3\n", "100\n", "garbage"])
def test_pointer_is_not_trusted(tmp_path: Path, model_config: ModelConfig, pointer: str | None) -> None:
    for iteration in (100, 200):
        write(tmp_path, iteration, model_config)
    if pointer is None:
        (tmp_path / folder.POINTER).unlink()
    else:
        (tmp_path / folder.POINTER).write_text(pointer)
    found = folder.find_checkpoint(tmp_path)
    assert found is not None and found.iteration == 200


@pytest.mark.parametrize("harm", ["marker", "file", "truncated", "config"])
def test_incomplete_checkpoint_is_ignored(tmp_path: Path, model_config: ModelConfig, harm: str) -> None:
    write(tmp_path, 100, model_config)
    path = write(tmp_path, 200, model_config).path
    if harm == "truncated":
        (path / "__0_0.distcp").write_text("wei")
    else:
        (path / {"marker": folder.MARKER, "file": "__0_0.distcp", "config": "config.json"}[harm]).unlink()
    found = folder.find_checkpoint(tmp_path)
    assert found is not None and found.iteration == 100
    assert folder.find_checkpoint(path) is None
    with pytest.raises(CheckpointError, match="iter_0000200"):
        folder.require_checkpoint(path)


def test_partial_folder_is_ignored_and_removed_by_the_next_save(tmp_path: Path, model_config: ModelConfig) -> None:
    write(tmp_path, 100, model_config)
    (folder.begin(tmp_path, 200) / "__0_0.distcp").write_text("half")
    found = folder.find_checkpoint(tmp_path)
    assert found is not None and found.iteration == 100
    write(tmp_path, 300, model_config)
    assert names(tmp_path) == ["iter_0000100", "iter_0000300", folder.POINTER]


def test_newest_is_the_one_saved_last(tmp_path: Path, model_config: ModelConfig) -> None:
    for iteration in (50, 100, 60):
        write(tmp_path, iteration, model_config)
    assert [checkpoint.iteration for checkpoint in folder.checkpoints(tmp_path)] == [60, 100, 50]


def test_same_iteration_is_replaced(tmp_path: Path, model_config: ModelConfig) -> None:
    write(tmp_path, 5, model_config, "old")
    new = write(tmp_path, 5, model_config, "new")
    assert (new.path / "__0_0.distcp").read_text() == "new" and new.sequence == 2
    assert names(tmp_path) == ["iter_0000005", folder.POINTER]


def test_death_between_the_two_renames_of_a_replacement(tmp_path: Path, model_config: ModelConfig) -> None:
    path = write(tmp_path, 5, model_config, "old").path
    path.rename(path.with_name("iter_0000005.replaced"))
    found = folder.find_checkpoint(tmp_path)
    assert found is not None and found.iteration == 5
    assert write(tmp_path, 5, model_config, "new").path == path


def test_retention(tmp_path: Path, model_config: ModelConfig) -> None:
    for iteration in range(10, 80, 10):
        write(tmp_path, iteration, model_config)
    assert folder.retire(tmp_path) == []
    folder.retire(tmp_path, keep_last=2, save_retain_interval=30)
    assert sorted(c.iteration for c in folder.checkpoints(tmp_path)) == [30, 60, 70]
    folder.retire(tmp_path, save_retain_interval=60)
    assert sorted(c.iteration for c in folder.checkpoints(tmp_path)) == [60, 70]
    folder.retire(tmp_path, keep_last=1)
    assert names(tmp_path) == ["iter_0000070", folder.POINTER]


def test_newest_complete_survives_when_a_newer_one_is_damaged(tmp_path: Path, model_config: ModelConfig) -> None:
    write(tmp_path, 1, model_config)
    write(tmp_path, 2, model_config)
    (write(tmp_path, 3, model_config).path / folder.MARKER).unlink()
    folder.retire(tmp_path, keep_last=1)
    found = folder.find_checkpoint(tmp_path)
    assert found is not None and found.iteration == 2


def test_damaged_checkpoints_are_renamed_and_do_not_count(tmp_path: Path, model_config: ModelConfig) -> None:
    """3 has a flipped byte, which only a verified start detects; 4 lost its marker."""
    good = [write(tmp_path, iteration, model_config) for iteration in (1, 2)]
    write(tmp_path, 3, model_config)
    (write(tmp_path, 4, model_config).path / folder.MARKER).unlink()
    folder.tidy(tmp_path, good[-1])
    aside = ["iter_0000003.damaged", "iter_0000004.damaged"]
    assert names(tmp_path) == ["iter_0000001", "iter_0000002", *aside, POINTER]
    assert (tmp_path / POINTER).read_text() == "2\n"
    write(tmp_path, 3, model_config)
    folder.retire(tmp_path, keep_last=2)
    assert [checkpoint.iteration for checkpoint in folder.checkpoints(tmp_path)] == [3, 2]


def test_a_checkpoint_that_cannot_be_deleted_does_not_stop_a_save(
    tmp_path: Path, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for iteration in (1, 2, 3):
        write(tmp_path, iteration, model_config)
    real = folder.shutil.rmtree

    def cannot(path: Path) -> None:
        if "iter_0000001" in path.name:
            raise OSError(39, "Directory not empty", str(path))
        real(path)

    monkeypatch.setattr(folder.shutil, "rmtree", cannot)
    assert folder.retire(tmp_path, keep_last=1) == [tmp_path / "iter_0000002"]
    write(tmp_path, 4, model_config)
    assert [checkpoint.iteration for checkpoint in folder.checkpoints(tmp_path)] == [4, 3]
    assert ".iter_0000001.deleting is no longer needed, but cannot be removed" in caplog.text
    assert "removed" not in caplog.text.replace("cannot be removed", "")


def test_pointer_that_cannot_be_replaced_does_not_fail_a_save(
    tmp_path: Path, model_config: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / POINTER).mkdir()
    assert write(tmp_path, 1, model_config).iteration == 1
    assert "iter_0000001 is complete, but" in caplog.text


@pytest.mark.parametrize("keywords", [{"keep_last": 0}, {"save_retain_interval": -1}])
def test_retention_of_nothing_is_refused(tmp_path: Path, keywords: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        folder.retire(tmp_path, **keywords)


def test_assets_outlive_the_checkpoint_they_came_from(tmp_path: Path, model_config: ModelConfig) -> None:
    assets = tmp_path / "base"
    (assets / folder.TOKENIZER).mkdir(parents=True)
    (assets / folder.TOKENIZER / "tokenizer.json").write_text("{}")
    (assets / folder.PREPROCESSOR).write_text("{}")
    root = tmp_path / "run"
    folder.begin(root, 1)
    folder.publish(root, 1, model_config, assets=assets)
    folder.begin(root, 2)
    saved = folder.publish(root, 2, model_config, assets=tmp_path / "gone")
    assert (saved.tokenizer / "tokenizer.json").is_file() and saved.preprocessor_config.is_file()
    folder.begin(tmp_path / "other", 1)
    with pytest.raises(CheckpointError, match="gone has no tokenizer"):
        folder.publish(tmp_path / "other", 1, model_config, assets=tmp_path / "gone")


def test_train_state_that_json_cannot_hold_is_refused(tmp_path: Path, model_config: ModelConfig) -> None:
    folder.begin(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"train_state\.json"):
        folder.publish(tmp_path, 1, model_config, {"model": object()})
    assert folder.find_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_marker_that_points_outside_is_refused(tmp_path: Path, model_config: ModelConfig, name: str) -> None:
    checkpoint = write(tmp_path, 1, model_config)
    manifest = checkpoint.manifest()
    hostile = replace(manifest, files={**manifest.files, name: FileRecord(3, 0)})
    (checkpoint.path / folder.MARKER).write_text(hostile.text())
    with pytest.raises(CheckpointError, match="outside"):
        folder.require_checkpoint(checkpoint.path)


def test_marker_has_size_and_checksum_of_every_file(tmp_path: Path, model_config: ModelConfig) -> None:
    checkpoint = write(tmp_path, 1, model_config, "weights")
    files = checkpoint.manifest().files
    assert set(files) == {"__0_0.distcp", "config.json", "train_state.json"}
    assert files["__0_0.distcp"] == FileRecord(7, zlib.crc32(b"weights"))


@pytest.mark.parametrize("change", ['"iteration": 2', '"sequence": 9', '"bytes": 6'])
def test_changed_marker_is_noticed(tmp_path: Path, model_config: ModelConfig, change: str) -> None:
    marker = write(tmp_path, 1, model_config).path / folder.MARKER
    key = change.split(":")[0]
    marker.write_text(re.sub(rf"{key}: \d+", change, marker.read_text(), count=1))
    with pytest.raises(CheckpointError, match=r"complete\.json is damaged"):
        folder.require_checkpoint(marker.parent)
    assert folder.find_checkpoint(tmp_path) is None


def test_checkpoints_without_checksums_are_read(tmp_path: Path, model_config: ModelConfig) -> None:
    checkpoint = write(tmp_path, 1, model_config)
    sizes = {name: record.bytes for name, record in checkpoint.manifest().files.items()}
    first_version = {"format": FORMAT, "version": 1, "iteration": 1, "sequence": 1, "files": sizes}
    (checkpoint.path / folder.MARKER).write_text(json.dumps(first_version))
    assert folder.find_checkpoint(tmp_path) == checkpoint
    assert not checkpoint.manifest().has_checksums
