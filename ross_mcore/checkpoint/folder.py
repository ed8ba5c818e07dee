"""Folders of checkpoints: their names, the final marker, the pointer, retention. Files only, no tensors.

```
root/
  latest_checkpointed_iteration.txt     the iteration saved last, for people and scripts
  iter_0000100/                         renamed into place when complete
    complete.json                       the final marker: written last, size and checksum of every other file
    config.json  train_state.json  tokenizer/  preprocessor_config.json
    metadata.json  common.pt  .metadata  __<rank>_<n>.distcp        mcore's torch_dist format
  .iter_0000200.partial/                being written, or left by a dead process: ignored, removed by the next save
  iter_0000300.damaged/                 skipped when a run started, and ignored since
  .lock                                 held by the run that saves here (claim.py)
```

A checkpoint is complete when its marker exists and every file listed there has its size; it is intact when the
checksums match too (verification.py). The *newest* is the one saved last (`sequence` in the marker), not the one of the
largest iteration: a run that was rolled back to iteration 50 and saved at 60 resumes from 60, although its abandoned
branch left a checkpoint at 100.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ross_mcore.architecture import ModelConfig, read_model_config
from ross_mcore.checked import printable, real_path, reason
from ross_mcore.checkpoint.manifest import (
    MARKER,
    FileRecord,
    Manifest,
    damages,
    read_json,
    read_manifest,
    record_of,
    sync,
    wrong_size,
)
from ross_mcore.errors import CheckpointError

LOCK = ".lock"
POINTER = "latest_checkpointed_iteration.txt"
TRAIN_STATE = "train_state.json"
TOKENIZER = "tokenizer"
PREPROCESSOR = "preprocessor_config.json"

# `.replaced`: the former checkpoint of the same iteration, between two renames of `publish`. Still complete.
_NAME = re.compile(r"iter_\d{7,}(\.replaced)?")
_LEFT_OVER = re.compile(r"\.iter_\d{7,}\.(partial|deleting)|\.probe\..+")
REMEDY = "copy the checkpoint again, or take another one"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint. `sequence` counts the saves of its root; the largest is the newest."""

    path: Path
    iteration: int
    sequence: int = 0

    @property
    def tokenizer(self) -> Path:
        return self.path / TOKENIZER

    @property
    def preprocessor_config(self) -> Path:
        return self.path / PREPROCESSOR

    def model_config(self) -> ModelConfig:
        """Reads the architecture. Raises ArchitectureError naming the file."""
        return read_model_config(self.path)

    def image_processor(self) -> dict[str, Any] | None:
        """Reads the image processor's configuration, None where none was saved. Raises CheckpointError."""
        return read_json(self.preprocessor_config) if self.preprocessor_config.exists() else None

    def train_state(self) -> dict[str, Any]:
        """Reads the training loop's state. Raises CheckpointError.

        A converted model has at most a few facts of its training elsewhere, no iteration and no training_stage.
        """
        path = self.path / TRAIN_STATE
        return read_json(path) if path.exists() else {}

    @property
    def is_trained(self) -> bool:
        """Whether a run of this trainer saved it; false for a converted model. Raises CheckpointError."""
        return not self.train_state().keys().isdisjoint(("iteration", "training_stage"))

    def manifest(self) -> Manifest:
        """Reads size and checksum of every file. Raises CheckpointError."""
        return read_manifest(self.path)


def partial_folder(root: Path, iteration: int) -> Path:
    """The folder that the checkpoint of `iteration` is written into before it is published."""
    return root / f".iter_{iteration:07d}.partial"


def inspect(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`. Raises CheckpointError with the reason when it is not complete."""
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        if problem := wrong_size(folder, name, record):
            raise CheckpointError(problem)
    return Checkpoint(folder, manifest.iteration, manifest.sequence)


def scan(path: Path) -> tuple[list[Checkpoint], list[str]]:
    """The complete checkpoints at `path`, newest first, and one message for each of the others.

    path: a run's root, or the folder of one iteration. The pointer file is not read. Not collective. Raises
    CheckpointError when the folder cannot be read.
    """
    path, found, problems = Path(path), [], []
    try:
        names = sorted(p for p in path.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()) if path.is_dir() else []
        for folder in [path] if is_iteration(path) else names:
            try:
                found.append(inspect(folder))
            except CheckpointError as error:
                problems.append(str(error))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    found.sort(key=lambda c: (c.sequence, c.iteration, not c.path.name.endswith(".replaced")), reverse=True)
    return found, problems


def is_iteration(path: Path) -> bool:
    """Whether a path is the folder of one checkpoint, not a run's root."""
    return _NAME.fullmatch(path.name) is not None or (path / MARKER).exists()


def checkpoints(root: Path) -> list[Checkpoint]:
    """Every complete checkpoint of a run's root, newest first."""
    return scan(root)[0]


def find_checkpoint(path: Path) -> Checkpoint | None:
    """The newest complete checkpoint at `path`, None where there is none. Logs those it ignores."""
    found, problems = scan(path)
    for problem in problems:
        _logger.warning("ignored: %s", problem)
    return found[0] if found else None


def require_checkpoint(path: Path) -> Checkpoint:
    """`find_checkpoint`; raises CheckpointError when there is none."""
    if (found := find_checkpoint(path)) is None:
        raise nothing_at(path, scan(path)[1])
    return found


def require_intact(path: Path) -> Checkpoint:
    """`require_checkpoint`, after reading every file in this process. Raises CheckpointError when one is damaged."""
    checkpoint = require_checkpoint(path)
    manifest = checkpoint.manifest()
    if problems := damages(checkpoint.path, manifest, manifest.files):
        raise CheckpointError("; ".join([*problems, REMEDY]))
    return checkpoint


def nothing_at(path: Path, problems: list[str]) -> CheckpointError:
    """The error when no checkpoint at `path` can be loaded. problems: of the incomplete or damaged ones there."""
    if not Path(path).is_dir():
        return CheckpointError(
            f"{path} does not exist or is not a folder, so there is no checkpoint to load; give another path"
        )
    none = "it has no iter_* folder. Give a folder that a training run or tools/convert_hf_to_mcore.py wrote"
    reasons = "; ".join([*problems, REMEDY]) if problems else none
    return CheckpointError(f"{path} holds no complete checkpoint: {reasons}")


def require_renames(root: Path) -> None:
    """Raises CheckpointError where a folder cannot be renamed: object stores mounted as file systems often cannot.

    Checkpoints, exported models and data sets are complete when their folder gets its name.
    """
    folders: list[Path] = []
    try:
        folders.append(Path(tempfile.mkdtemp(prefix=".probe.", dir=root)))
        probe, renamed = folders[0], root / f"{folders[0].name}.renamed"
        folders.append(renamed)
        _write_text(probe / "file", "content")
        sync(probe)
        try:
            probe.rename(renamed)
        except OSError as error:
            raise CheckpointError(
                f"{root}: a folder with a file in it cannot be renamed there ({reason(error)}), so nothing could be "
                "completed. Buckets mounted with gcsfuse (without a hierarchical namespace) or mountpoint-s3 are such "
                "places: give a folder on a local or shared disk, and copy the result to the bucket"
            ) from None
    except OSError as error:
        raise CheckpointError(f"{root} cannot be written: {reason(error)}; give another folder, or make room") from None
    finally:
        for path in folders:
            shutil.rmtree(path, ignore_errors=True)


def require_room(root: Path, overwrite: bool = False) -> bool:
    """Raises CheckpointError unless a converted model may be written into `root`: an empty folder, or one to replace.

    overwrite: allows a folder of this trainer's checkpoints. Returns whether a run is there, which `set_aside` moves; a
    converted model is replaced in place.
    """
    if is_iteration(root):
        raise CheckpointError(f"{root} is one checkpoint; give --save a folder of its own")
    try:
        names = sorted(path.name for path in root.iterdir()) if root.exists() else []
    except OSError as error:
        raise CheckpointError(f"{root} cannot be read: {error.strerror}; give another --save") from None
    names = [name for name in names if name != LOCK and not _LEFT_OVER.fullmatch(name)]
    if not names:
        return False
    found, problems = scan(root)
    runs = [checkpoint for checkpoint in found if checkpoint.iteration or checkpoint.is_trained]
    if not found and not problems:
        raise CheckpointError(f"{root} is not empty (it has {printable(names[0])}); give --save a folder of its own")
    is_run = bool(runs) or set(names) - {POINTER, "iter_0000000"} != set()
    kind = f"a training run ({runs[0].path.name})" if runs else "checkpoints" if is_run else "a converted model"
    if not overwrite:
        then = "moves the run to a folder beside it" if is_run else "replaces it"
        raise CheckpointError(f"{root} holds {kind}; give another --save folder, or add --overwrite, which {then}")
    return is_run


def set_aside(root: Path) -> Path:
    """Renames a run's folder to `<root>.replaced`, with a number if that exists. Raises CheckpointError."""
    root = real_path(root)
    names = (root.with_name(f"{root.name}.replaced{f'-{n}' if n else ''}") for n in itertools.count())
    aside = next(path for path in names if not path.exists())
    try:
        root.rename(aside)
    except OSError as error:
        raise CheckpointError(f"{root} holds a run and cannot be moved: {error}; give another --save folder") from None
    return aside


def begin(root: Path, iteration: int) -> Path:
    """Creates `partial_folder`, and removes unfinished folders of dead processes. Raises CheckpointError."""
    partial = partial_folder(root, iteration)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(root)
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(
            f"cannot write a checkpoint under {root}: {reason(error)}; give another --save, or make room"
        ) from None
    return partial


def tidy(root: Path, newest: Checkpoint | None) -> None:
    """Removes unfinished folders of dead processes and renames damaged checkpoints, so that `retire` counts neither.

    newest: the intact checkpoint of `root` that a run resumes from, None for a new run; newer ones were skipped because
    they are damaged. Called when a run starts; failures are logged.
    """
    if not root.is_dir():
        return
    try:
        _remove_left_overs(root)
        intact = [c.path for c in checkpoints(root) if newest is None or c.sequence <= newest.sequence]
        for folder in root.iterdir():
            if _NAME.fullmatch(folder.name) and folder.is_dir() and folder not in intact:
                _set_aside(folder)
        if newest is not None:
            _point_to(root, newest.iteration)
    except (CheckpointError, OSError) as error:
        _logger.warning("%s cannot be cleaned up: %s", root, error)


def _set_aside(folder: Path) -> None:
    aside = folder.with_name(folder.name.removesuffix(".replaced") + ".damaged")
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)
    _logger.warning("%s is damaged and was renamed to %s; delete it when you no longer need it", folder, aside.name)


def _remove_left_overs(root: Path) -> None:
    for left_over in root.iterdir():
        if _LEFT_OVER.fullmatch(left_over.name):
            try:
                if left_over.is_dir() and not left_over.is_symlink():
                    shutil.rmtree(left_over)
                else:
                    left_over.unlink()
            except OSError as error:
                _logger.warning("%s is no longer needed, but cannot be removed: %s", left_over, error)
            else:
                _logger.warning("removed %s, which a dead process did not finish", left_over)


def _point_to(root: Path, iteration: int) -> None:
    new = root / (POINTER + ".new")
    new.unlink(missing_ok=True)  # it may be a link
    _write_text(new, f"{iteration}\n")
    new.replace(root / POINTER)
    sync(root)


def publish(
    root: Path,
    iteration: int,
    model_config: ModelConfig,
    train_state: dict[str, Any] | None = None,
    assets: Path | None = None,
    records: Mapping[str, FileRecord] | None = None,
    layout: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Completes `partial_folder` and makes it the newest checkpoint of `root`: small files, marker, rename, pointer.

    assets: a folder with `tokenizer/` and `preprocessor_config.json`, for example the checkpoint that was loaded; if it
    no longer exists, the newest checkpoint of `root` that has them is used. records: of files that are synced to the
    disk already and are not read again. layout: see `Manifest`.
    Raises CheckpointError; in any case, checkpoints that were complete before stay complete.
    """
    partial, target = partial_folder(root, iteration), root / f"iter_{iteration:07d}"
    former = target.with_name(target.name + ".replaced")
    try:
        if assets is not None:
            _copy_assets([assets, *(checkpoint.path for checkpoint in checkpoints(root))], partial)
        _write_json(partial / "config.json", model_config.to_dict())
        if train_state is not None:
            _write_json(partial / TRAIN_STATE, train_state)
        written = dict(records or {})
        for path in sorted(p for p in partial.rglob("*") if p.is_file()):
            name = path.relative_to(partial).as_posix()
            written[name] = written.get(name) or record_of(path)
        sequence = max((c.sequence for c in checkpoints(root)), default=0) + 1
        _write_text(partial / MARKER, Manifest(iteration, sequence, written, layout or {}).text())
        inspect(partial)
        for folder in (*(p for p in partial.rglob("*") if p.is_dir()), partial):
            sync(folder)
        if target.exists():  # a death before the second rename leaves it complete, as `former`
            _remove(former)
            target.rename(former)
        partial.rename(target)
        sync(root)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {iteration} under {root} was not completed: {reason(error)}; "
            "correct this, or give another folder"
        ) from None
    try:
        _remove(former)
        _point_to(root, iteration)
    except OSError as error:
        _logger.warning("%s is complete, but %s is not up to date: %s", target, root, error)
    return inspect(target)


def _copy_assets(sources: list[Path], target: Path) -> None:
    """Copies tokenizer and image processor from the first of `sources` that has both."""
    for source in sources:
        if (source / TOKENIZER).is_dir() and (source / PREPROCESSOR).is_file():
            shutil.copytree(source / TOKENIZER, target / TOKENIZER)
            shutil.copyfile(source / PREPROCESSOR, target / PREPROCESSOR)
            return
    raise CheckpointError(f"{sources[0]} has no {TOKENIZER}/ and {PREPROCESSOR} to copy into the checkpoint")


def retire(root: Path, keep_last: int | None = None, save_retain_interval: int | None = None) -> list[Path]:
    """Deletes old checkpoints, never the newest complete one, and returns their paths. Failures are logged.

    keep_last: how many of the newest stay. save_retain_interval: checkpoints whose iteration it divides stay; given
    alone, only those and the newest. Neither: nothing is deleted. Raises ValueError for a value below 1.
    """
    for name, value in (("keep_last", keep_last), ("save_retain_interval", save_retain_interval)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    if keep_last is None and save_retain_interval is None:
        return []
    old = [
        checkpoint.path
        for checkpoint in checkpoints(root)[keep_last or 1 :]
        if save_retain_interval is None or checkpoint.iteration % save_retain_interval
    ]
    deleted = []
    for path in old:
        try:
            _remove(path)
            deleted.append(path)
        except OSError as error:
            _logger.warning("%s is no longer needed, but cannot be deleted: %s", path, error)
    return deleted


def _remove(folder: Path) -> None:
    """Deletes a checkpoint, if it exists; a death half way leaves none that looks complete. Raises OSError."""
    name = folder.name.removesuffix(".replaced")
    doomed = folder.with_name(f".{name}.deleting")
    if doomed.exists():
        shutil.rmtree(doomed)
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    try:
        text = json.dumps(data, indent=2)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be written as JSON: {error}") from None
    _write_text(path, text + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)
