"""A save or load that fails on one rank fails on all, with the same message; existing checkpoints stay intact."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ross_mcore import platform
from ross_mcore.architecture import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from ross_mcore.checkpoint import folder
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.errors import CheckpointError
from tests.distributed.cases import Case
from tests.distributed.conftest import run_options
from tests.distributed.harness import run_ranks

LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 8, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}


def model_config() -> ModelConfig:
    """Any architecture: these checkpoints hold one matrix."""
    language = LanguageConfig.from_huggingface({**LLAMA, "num_attention_heads": 1})
    return ModelConfig(language, VisionConfig(CLIP, (0, 0, 0), (1, 1, 1)), ProjectorConfig(), None, None)


FAILURES = {
    "prepare": "ZeroDivisionError: division by zero (rank 1)",
    "write": "__1_0.distcp cannot be written: File too large (rank 1)",
    "write a copy": "__1_0.distcp cannot be written: File too large (rank 1)",
    "load": "it lacks other",
    "damaged": "__1_0.distcp is damaged: its content has crc32",
}
"""What fails on rank 1 -> the message on both ranks."""


def fail_on_rank_one(root: str) -> None:
    """On both ranks, for each of FAILURES: a good save, then one that fails on rank 1, then the good one is loaded."""
    platform.initialize_process_group(1)
    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing import ShardedTensor

    from ross_mcore.checkpoint import saving, sharded
    from ross_mcore.checkpoint.verification import find_intact

    rank, split_state = dist.get_rank(), saving.split_state

    def state(columns: int = 30_000) -> dict[str, Any]:
        mine = torch.full((2, columns), float(rank))
        return {"model": {"w": ShardedTensor.from_rank_offsets("w", mine, (0, rank, 2))}, "train_state": {}}

    def fail(where: str, place: Path, good: Checkpoint, save: Callable[..., Checkpoint]) -> None:
        if where == "load":
            other = "other" if rank else "w"
            wanted = {other: ShardedTensor.from_rank_offsets(other, torch.zeros(2, 3), (0, rank, 2))}
            sharded.load_model_weights(good, wanted)
        elif where == "prepare":
            if rank == 1:
                saving.split_state = lambda state: 1 / 0
            save(2)
        elif where == "damaged":
            damaged = save(2)
            if rank == 1:
                content = bytearray((damaged.path / "__1_0.distcp").read_bytes())
                content[5000] ^= 1
                (damaged.path / "__1_0.distcp").write_bytes(content)
            dist.barrier()
            assert find_intact(place) == good  # all ranks agree, although only one read the file
            find_intact(damaged.path)
        else:  # on rank 1, files may not grow beyond 64 KiB
            if rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
            save(2, saving.HostCopies() if where == "write a copy" else None)

    for where, message in FAILURES.items():
        place = Path(root) / where

        def save(iteration: int, copies: saving.HostCopies | None = None, to: Path = place) -> Checkpoint:
            return (
                saving.begin_save(saving.Destination(to, iteration, model_config()), state(), copies)
                .finish()
                .checkpoint
            )

        good = save(1)
        try:
            fail(where, place, good, save)
        except CheckpointError as error:
            assert message in str(error), str(error)
        else:
            raise AssertionError(f"{where}: nothing was refused")
        saving.split_state = split_state
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert find_intact(place) == good
        loaded = sharded.load_model_weights(good, state()["model"])
        assert torch.equal(loaded["w"], torch.full((2, 30_000), float(rank)))
    dist.destroy_process_group()


def test_failure_on_one_rank_ends_all(tmp_path: Path) -> None:
    run_ranks(fail_on_rank_one, 2, str(tmp_path))


def train_with_a_full_disk(flags: dict[str, Any]) -> None:
    """Rank 1 cannot write tensors until five steps are logged; the other files are smaller than the limit."""
    from ross_mcore.commands.train import train_status
    from ross_mcore.config import Config

    metrics = Path(flags["save"]) / "metrics.jsonl"

    def make_room() -> None:
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 5:
            time.sleep(0.02)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, resource.RLIM_INFINITY))
        threading.Thread(target=make_room, daemon=True).start()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = train_status(Config.from_flat(**flags))
    found = [line for line in output.getvalue().splitlines() if "could not be saved" in line]
    if status or (output.getvalue() and not found):
        raise SystemExit(f"status {status}: {output.getvalue()}")
    if found:
        assert "__1_0.distcp cannot be written: File too large (rank 1)" in found[0], found
        assert "it is tried again after iteration" in found[0]


def test_a_run_continues_without_checkpoints_until_the_disk_has_room(
    base: Callable[[str], Path], shards: Callable[[str], Path], tmp_path: Path
) -> None:
    flags = {
        "load": str(base("qwen2_siglip")),
        "data_path": str(shards("mixed")),
        "save": str(tmp_path / "run"),
        "training_stage": "finetune",
        "global_batch_size": 2,
        "micro_batch_size": 1,
        "train_iters": 9,
        "save_interval": 2,
        "num_workers": 0,
        "distributed_timeout_minutes": 1,
    }
    run_ranks(train_with_a_full_disk, 2, flags)
    saved = folder.checkpoints(tmp_path / "run")
    assert saved[0].iteration == 9 and saved[0].manifest().layout["data_parallel_size"] == 2
    assert not list((tmp_path / "run").glob(".iter_*"))


def fail_while_saving(flags: dict[str, Any], where: str, ends: list[int | str]) -> None:
    """While iteration 1 is being saved, iteration 2 fails on the last rank; ends: the expected end of each rank."""
    from ross_mcore.checkpoint import saving
    from ross_mcore.commands.train import train_status
    from ross_mcore.config import Config
    from ross_mcore.data.loader import StepLoader
    from ross_mcore.errors import ShardReadError
    from ross_mcore.reporting.files import MetricsFile

    rank, write, read, log = int(os.environ["RANK"]), saving._write, StepLoader._read, MetricsFile.step

    def write_slowly(*arguments: Any) -> Any:
        time.sleep(2)
        return write(*arguments)

    def fail_to_read(loader: Any) -> Any:
        if where != "log" and rank == len(ends) - 1 and list(Path(flags["save"]).glob(".iter_*")):
            raise ShardReadError("a.tar: Input/output error") if where == "shard" else MemoryError("none is left")
        return read(loader)

    def fail_to_log(self: Any, metrics: Any) -> None:
        if where == "log" and metrics.iteration == 2:
            raise OSError("No space left on device")
        log(self, metrics)

    saving._write, StepLoader._read, MetricsFile.step = write_slowly, fail_to_read, fail_to_log
    end: int | str
    try:
        end = train_status(Config.from_flat(**flags))
    except (MemoryError, OSError) as error:
        end = type(error).__name__
    assert end == ends[rank], end


@pytest.mark.parametrize(
    ("where", "ends"), [("shard", [2, 2]), ("memory", [2, "MemoryError"]), ("log", ["OSError"])], ids=str
)
def test_a_running_save_is_finished_before_a_failed_run_ends(
    where: str, ends: list[int | str], base: Callable[[str], Path], shards: Callable[[str], Path], tmp_path: Path
) -> None:
    """When all ranks fail at one point: one of them cannot read, or a run of one process has any error."""
    flags = run_options(Case("", len(ends)), tmp_path / "run", base, shards, save_interval=1)
    run_ranks(fail_while_saving, len(ends), flags, where, ends)
    assert [found.iteration for found in folder.checkpoints(tmp_path / "run")] == [1]
    assert not list((tmp_path / "run").glob(".iter_*"))
