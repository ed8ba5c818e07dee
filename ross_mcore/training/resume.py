"""Resume checks: options that must match the checkpoint, options that may change, models that must be the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ross_mcore import checked, platform
from ross_mcore.checked import shown
from ross_mcore.checkpoint.folder import TOKENIZER, Checkpoint, checkpoints
from ross_mcore.checkpoint.manifest import damages
from ross_mcore.config import Config
from ross_mcore.engine.kernels import choose
from ross_mcore.engine.state import TrainState, read_state
from ross_mcore.errors import ArchitectureError, CheckpointError, ConfigError
from ross_mcore.options import flag_of
from ross_mcore.parallel.layout import Layout

IDENTITY = {
    "seed": "--seed",
    "data_fingerprint": "--data-path",
    "global_batch_samples": "--global-batch-samples",
    "global_batch_size": "--global-batch-size, by default --micro-batch-size x data-parallel size",
    "sampler": "--sampler",
    "pack": "--pack",
    "vision_trains": "--vision-lr",
}
"""Fields of TrainState that a resumed run must not change, and their flags: they decide the samples of a step and which
weights have moments. `TrainState.samples`, how samples are read, must not change either."""


def changeable_options(config: Config, train_iters: int) -> dict[str, Any]:
    """Options that may change when a run is resumed; the changes are logged."""
    training, execution = config.training, choose(config, platform.libraries()).config.execution
    return {
        **asdict(config.optimizer),
        "bf16": execution.bf16,
        "denoiser_precision": execution.denoiser_precision,
        "vae_precision": execution.vae_precision,
        "train_iters": train_iters,
        "loss_normalization": training.loss_normalization,
        "vm_loss_rows": training.vm_loss_rows,
        "skip_iterations": training.skip_iterations,
        "skip_samples": config.data.skip_samples,
    }


def continued(start: Checkpoint, started: TrainState, config: Config) -> TrainState:
    """The state in which the run of `start` resumes; `started` is the first state of a new run with today's options.

    Raises ConfigError, with both values, for an option that must not change; CheckpointError for an unreadable state.
    """
    saved = read_state(start)
    for name, flag, before, now in _identity(saved, started):
        is_batch = name in ("global_batch_samples", "global_batch_size")
        if before == now or (is_batch and _may_change_batch(config)):
            continue
        allow = ""
        if is_batch and config.data.sampler == "shuffle":
            allow = "allow the change with --override-global-batch-size, "
        raise ConfigError(
            f"the checkpoint {start.path} was trained with {name} {shown(before)} and this run has {now!r} ({flag}), "
            f"so it cannot be resumed exactly; give the same, {allow}or start a new run from its weights with "
            "--finetune and a --save folder of its own"
        )
    return replace(
        saved,
        global_batch_size=started.global_batch_size,
        global_batch_samples=started.global_batch_samples,
        options=started.options,
    )


def rows_kept(start: Checkpoint, config: Config, layout: Layout) -> int | None:
    """Rows of a step of the run of `start` if --global-batch-samples is as it was, None if they are chosen anew.

    Raises ConfigError when this layout cannot divide them and they must not change; CheckpointError for an unreadable
    state.
    """
    saved, training = read_state(start), config.training
    if training.global_batch_samples is None or saved.global_batch_samples != training.global_batch_samples:
        return None
    rows, multiple = saved.global_batch_size, layout.row_multiple(training.micro_batch_size)
    if rows % multiple == 0:
        return rows
    if _may_change_batch(config):
        return None
    raise ConfigError(
        f"the checkpoint {start.path} was trained with {rows} rows a step (--global-batch-samples "
        f"{training.global_batch_samples}), and here they must be a multiple of {multiple}: --micro-batch-size "
        f"{training.micro_batch_size} x data-parallel size, x pipeline stages if interleaved; give a layout and a "
        "--micro-batch-size that divide them, or allow others with --override-global-batch-size"
    )


def _identity(saved: TrainState, started: TrainState) -> Iterator[tuple[str, str, Any, Any]]:
    """(name, flag, saved value, current value) of every option that must not change."""
    for name, flag in IDENTITY.items():
        yield name, flag, getattr(saved, name), getattr(started, name)
    now = asdict(started.samples)
    for name, before in asdict(saved.samples).items():
        yield name, flag_of(name), before, now[name]


def _may_change_batch(config: Config) -> bool:
    """Whether --override-global-batch-size is given. Raises ConfigError when the order of rows depends on the size."""
    if not config.training.override_global_batch_size:
        return False
    if config.data.sampler != "shuffle":
        raise ConfigError(
            f"--override-global-batch-size with --sampler {config.data.sampler}: that order is made for one batch "
            "size; keep --global-batch-size"
        )
    if config.training.train_epochs is not None:
        raise ConfigError(
            "--override-global-batch-size with --train-epochs: the steps so far had another size, so the number of "
            "steps per epoch is not defined; give --train-iters, counted from the run's first step"
        )
    return True


def started_from(load: Path, start: Checkpoint) -> dict[str, str]:
    """The record of --load in a new run, by which a later start with another one is noticed. Raises CheckpointError."""
    return {"path": str(checked.real_path(load)), "content": start.manifest().content}


def refuse_other_model(own: Checkpoint, load: Path) -> None:
    """Raises ConfigError when --load names another start than that of the run in --save, which resumes from `own`.

    --load may be missing or damaged, because nothing is read from it, and it may be the folder of `own`.
    """
    if checked.real_path(load) in (checked.real_path(own.path), checked.real_path(own.path.parent)):
        return
    try:
        other = next((found for found in checkpoints(load) if not _is_damaged(found)), None)
        if other is None:
            return
        theirs, its = other.model_config().to_dict(), tokenizer_fingerprint(other.tokenizer)
        is_start = _is_start(own.train_state().get("started_from"), load, other)
    except (ArchitectureError, CheckpointError):
        return
    ours, mine = own.model_config().to_dict(), tokenizer_fingerprint(own.tokenizer)
    different = [f"{name} {shown(value)} and {shown(found)}" for name, value, found in _differences("", ours, theirs)]
    if mine != its:
        different.append(f"tokenizer files {mine} and {its}")
    ignored = "That run would be resumed, and --load would not be read"
    if different:
        raise ConfigError(
            f"--save holds a run of another model ({own.path}) than --load ({other.path}): {'; '.join(different[:3])}. "
            f"{ignored}. Give the --load it was started from, or another --save folder"
        )
    if checked.real_path(other.path).parent == checked.real_path(own.path).parent:
        raise ConfigError(
            f"--load names {other.path}, and the newest checkpoint of that run is {own.path}, which would be resumed. "
            "To go back, move the newer checkpoints to another folder; to keep them, give another --save folder"
        )
    if not is_start:
        began = own.train_state()["started_from"].get("path")
        raise ConfigError(
            f"--save holds a run ({own.path}) that started from {began}, and --load {load} has other weights. "
            f"{ignored}. Give --load {own.path.parent} to resume that run, or another --save to start from {load}"
        )


def _is_start(began: Any, load: Path, newest: Checkpoint) -> bool:
    """Whether a run that recorded `began` may have started from --load, whose newest checkpoint is given.

    A run that --load names may have continued since, and deleted the checkpoint in question.
    """
    if not isinstance(began, dict) or not began:  # an old checkpoint, which has no record
        return True
    if began.get("path") == str(checked.real_path(load)) and newest.is_trained:
        return True
    return any(found.manifest().content == began.get("content") for found in checkpoints(load))


def _is_damaged(checkpoint: Checkpoint) -> bool:
    """Whether config.json or the tokenizer differs from the checksums in the marker. Raises CheckpointError."""
    manifest = checkpoint.manifest()
    compared = [name for name in manifest.files if name == "config.json" or name.startswith(f"{TOKENIZER}/")]
    return bool(damages(checkpoint.path, manifest, compared))


def _differences(prefix: str, ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, our value, their value) of every difference between two nested dicts."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        if ours != theirs:
            yield prefix, ours, theirs
        return
    for name in dict.fromkeys([*ours, *theirs]):
        yield from _differences(f"{prefix}.{name}" if prefix else name, ours.get(name), theirs.get(name))


def tokenizer_fingerprint(folder: Path) -> str:
    """16 hex digits, a hash of a tokenizer's folder. Raises CheckpointError for a file that cannot be read."""
    digest = hashlib.sha256()
    try:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
            checked.require_regular(path, checked.MOST_TOKENIZER_FILE_BYTES)
            digest.update(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not a tokenizer's file: {error}; copy the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:16]
