"""Saves a model that is spread over ranks, while training continues.

1. `begin_save`, while training waits: ranks plan who writes which tensors; every rank copies its share to host memory.
2. A thread of every rank writes its file, syncs it to the disk and reads it back.
3. When `poll` finds that all threads are done, the first rank gathers the places of all tensors and, in a thread,
   writes the index, the small files and the marker, renames the folder, and deletes older checkpoints.
4. When that is done, `poll` returns the checkpoint.

Threads never communicate; ranks do in `begin_save` and `poll`, which are collective. A replicated tensor is written
once, by the rank with the fewest bytes to write (mcore's fully parallel save). Masters and moments of the distributed
optimizer are on one rank each, which writes them (ranges.py). So a save copies each byte once, to the pinned host
memory of the rank that writes it, gathers nothing, and holds what it writes (tests/distributed/test_saves.py).

mcore's asynchronous save does the same in forked processes. Forking a process with threads, as a process group has, may
deadlock; its shared queue needs a server process and seconds to start; and threads are no slower, because writing and
checksums release the interpreter's lock.

Over torch's async_save: errors of one rank reach all, a save is read back before it is published, and no process is
started. The price, by benchmarks/checkpoint.py, varies with machine and disk: training is blocked for 6 to 18% of a
save that it waits for; writing runs at 0.37 to 0.91 of torch.save and fsync, and at 0.45 to 0.98 of
torch.distributed.checkpoint, which computes no checksum.
"""

from __future__ import annotations

import concurrent.futures
import copy
import io
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, extract_matching_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from ross_mcore import platform
from ross_mcore.architecture import ModelConfig
from ross_mcore.checked import reason
from ross_mcore.checkpoint import folder
from ross_mcore.checkpoint.claim import Claim
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.checkpoint.manifest import FileRecord, checksum
from ross_mcore.checkpoint.safe_load import read_common
from ross_mcore.checkpoint.stand_ins import StandIns
from ross_mcore.checkpoint.tensor_file import TensorFile, write_index
from ross_mcore.checkpoint.torch_dist import COMMON_FILE, sharding_metadata
from ross_mcore.errors import CheckpointError
from ross_mcore.parallel.collectives import all_or_none, gather, gather_on_first_rank, sum_over_ranks

POLL_SECONDS = 0.5
"""How often ranks that wait for a save poll it; far below any timeout of a collective call."""
STAND_INS = "stand_ins"
"""Key of the StandIns in a state."""
ALIGNMENT = 64
"""Bytes; copies of tensors begin at multiples of it."""
T = TypeVar("T")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Destination:
    """Where a checkpoint is saved, and which older ones stay.

    claim: the first rank's lock on `root`, in a run. assets: folder whose tokenizer/ and preprocessor_config.json are
    copied. layout: see `Manifest`. keep_last, save_retain_interval: see `folder.retire`.
    """

    root: Path
    iteration: int
    model_config: ModelConfig
    claim: Claim | None = None
    assets: Path | None = None
    layout: Mapping[str, Any] = field(default_factory=dict)
    keep_last: int | None = None
    save_retain_interval: int | None = None

    @property
    def partial(self) -> Path:
        return folder.partial_folder(self.root, self.iteration)

    def require(self) -> None:
        """Raises CheckpointError when this run no longer holds `root`."""
        if self.claim is not None:
            self.claim.require()

    def begin(self) -> None:
        """Creates the folder to write into. Raises CheckpointError."""
        self.require()
        folder.begin(self.root, self.iteration)


class HostCopies:
    """Host memory for the tensors that one rank writes: one block of their size, reused by later saves, pinned on GPUs.

    Where it cannot be pinned, a warning says so and copies take longer.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def bytes(self) -> int:
        return self._memory.nbytes

    def have_room_for(self, pieces: Mapping[MetadataIndex, Tensor | io.BytesIO]) -> bool:
        """Whether host memory is large enough for copies, when each rank of this machine needs as much."""
        needed = _places(pieces)[1] - self.bytes
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        available: int = psutil.virtual_memory().available
        return needed * ranks < available

    def of(
        self, pieces: Mapping[MetadataIndex, Tensor | io.BytesIO], values: Callable[[Tensor], Tensor]
    ) -> dict[MetadataIndex, Tensor | io.BytesIO]:
        """Copies of the pieces' `values`, which training no longer changes. Waits for the device once, at the end."""
        places, size = _places(pieces)
        if size != self.bytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # before there are two
            self._memory = torch.empty(size, dtype=torch.uint8, device="cpu")
            if problem := platform.pin(self._memory):
                _logger.warning("host memory for saves cannot be pinned (%s): training waits longer for each", problem)
        copies = dict(pieces)
        for index, begin in places.items():
            piece = pieces[index]
            assert isinstance(piece, Tensor)
            copy = self._memory[begin : begin + piece.nbytes].view(piece.dtype).view(piece.shape)
            copies[index] = copy.copy_(values(piece), non_blocking=True)
        platform.synchronize()
        return copies


def _places(pieces: Mapping[MetadataIndex, Tensor | io.BytesIO]) -> tuple[dict[MetadataIndex, int], int]:
    """Where each tensor begins in one block of memory, and the block's size in bytes."""
    places, end = {}, 0
    for index, piece in pieces.items():
        if isinstance(piece, Tensor):
            places[index] = end
            end += -(-piece.nbytes // ALIGNMENT) * ALIGNMENT
    return places, end


@dataclass(frozen=True)
class _Written:
    """The file that one rank has written, and the place of every piece in it."""

    places: dict[MetadataIndex, _StorageInfo]
    records: dict[str, FileRecord]


@dataclass(frozen=True)
class Saved:
    """A finished save. `bytes` of tensors; `copy_bytes`: the largest copy that a rank holds in host memory."""

    checkpoint: Checkpoint
    bytes: int
    copy_bytes: int
    seconds: float


def begin_save(destination: Destination, state: dict[str, Any], copies: HostCopies | None = None) -> RunningSave:
    """Starts to save. Collective. Training may change the state afterwards if it was copied (`RunningSave.is_copied`).

    state: sharded state dicts ("model", "optimizer"), other entries that are the same on all ranks, "train_state", a
    JSON-able dict, and STAND_INS, if the model's has any. It is not changed. copies: None, or too little host memory,
    means that the state's own memory is read until the save is finished.
    Raises CheckpointError on every rank when any rank fails; complete checkpoints stay complete.
    """
    first, values = dist.get_rank() == 0, state.get(STAND_INS, StandIns()).values
    all_or_none(lambda: destination.begin() if first else None, CheckpointError)
    try:
        tensors, common = all_or_none(lambda: split_state(state), CheckpointError)
        pieces, metadata = _plan(tensors)
        common_file = all_or_none(lambda: _pickled(common, destination.partial), CheckpointError)
        if copies is not None and all(gather(copies.have_room_for(pieces))):
            pieces = all_or_none(partial(copies.of, pieces, values), CheckpointError)
        else:
            copies = None
    except BaseException:
        _discard(destination)
        raise
    write = partial(_write, destination.partial, pieces, values)
    return RunningSave(destination, write, metadata, common_file, state.get("train_state"), copies)


class RunningSave:
    """A save in progress, returned by `begin_save`."""

    def __init__(
        self,
        destination: Destination,
        write: Callable[[Callable[[int], None]], _Written],
        metadata: Metadata | None,
        common_file: bytes,
        train_state: dict[str, Any] | None,
        copies: HostCopies | None,
    ) -> None:
        self.destination, self._metadata = destination, metadata
        self._common_file, self._train_state = common_file, train_state
        self.is_copied = copies is not None
        self._copy_bytes = copies.bytes if copies is not None else 0
        self._began = time.monotonic()
        self._moved = 0
        self._heard = 0.0
        self._written = _in_thread(lambda: write(self._advance))
        self._published: concurrent.futures.Future[Saved | None] | None = None

    def poll(self) -> Saved | None:
        """The checkpoint once it is complete. Collective. Raises CheckpointError on every rank when any failed."""
        current = self._published or self._written
        waiting, self._heard = sum_over_ranks([float(not current.done()), float(self._moved)], platform.device())
        if waiting:
            return None
        try:
            if self._published is not None:
                done = gather(all_or_none(self._published.result, CheckpointError))[0]
                assert done is not None  # the first rank published
                return done
            written = all_or_none(self._written.result, CheckpointError)
            all_written, copied = gather_on_first_rank(written), max(gather(self._copy_bytes))
        except CheckpointError:
            _discard(self.destination)
            raise
        self._published = _in_thread(lambda: self._publish(all_written, copied))
        return None

    def finish(self, moving: Callable[[], None] = lambda: None) -> Saved:
        """Waits for the checkpoint. Collective; raises as `poll` does.

        moving: called on every rank whenever any rank has written or read back more.
        """
        before = self._heard
        while (saved := self.poll()) is None:
            if self._heard > before:
                before = self._heard
                moving()
            current: concurrent.futures.Future[Any] = self._published or self._written
            concurrent.futures.wait([current], timeout=POLL_SECONDS)
        return saved

    def _advance(self, count: int) -> None:
        self._moved += count

    def _publish(self, written: list[_Written], copy_bytes: int) -> Saved | None:
        """On the first rank: completes the folder and deletes older checkpoints."""
        if self._metadata is None:
            return None
        to, partial = self.destination, self.destination.partial
        self._metadata.storage_data = {index: place for own in written for index, place in own.places.items()}
        records = {name: record for own in written for name, record in own.records.items()}
        to.require()
        try:
            write_index(partial, self._metadata)
            (partial / COMMON_FILE).write_bytes(self._common_file)
        except OSError as error:
            raise CheckpointError(f"{partial} cannot be written: {reason(error)}") from None
        checkpoint = folder.publish(
            to.root, to.iteration, to.model_config, self._train_state, to.assets, records, to.layout
        )
        folder.retire(to.root, to.keep_last, to.save_retain_interval)
        total = sum(record.bytes for record in records.values())
        return Saved(checkpoint, total, copy_bytes, time.monotonic() - self._began)


def split_state(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a state into this rank's sharded tensors and the plain entries that are the same on every rank."""
    plain = {key: value for key, value in state.items() if key not in ("train_state", STAND_INS)}
    # copies the nested dicts, because mcore applies its factories in place
    nested, _ = extract_matching_values(plain, lambda value: not is_extra_state(value))
    pieces, common = save_preprocess(nested, validate_access_integrity=False)
    common["content_metadata"] = sharding_metadata()
    return pieces, common


def is_extra_state(value: Any) -> bool:
    """Whether a value is mcore's `_extra_state` of a module: empty, or a pickle of Transformer Engine's FP8 scales.

    It is neither written nor read, because a pickle can run code; scales are saved as tensors (FP8_PREFIX).
    """
    return isinstance(value, ShardedObject) and value.key.endswith("_extra_state")


def _plan(tensors: dict[str, Any]) -> tuple[dict[MetadataIndex, Tensor | io.BytesIO], Metadata | None]:
    """The pieces that this rank writes, and on the first rank the index of all, still without places. Collective."""

    def share_out() -> dict[str, Any]:
        # copies, because mcore marks in each whether this rank writes it
        own: dict[str, Any] = dict_list_map_outplace(
            lambda v: copy.copy(v) if isinstance(v, ShardedTensor) else v, tensors
        )
        distribution = determine_main_replica_uniform_distribution(own, dist.group.WORLD)
        distribute_main_replicas_with_precomputed_distribution(own, dist.group.WORLD, distribution)
        validate_sharding_integrity(determine_global_metadata(own)[1])
        return own

    own = all_or_none(share_out, CheckpointError)
    by_name, _, _ = _replace_state_dict_keys_with_sharded_keys(own, keep_only_main_replica=True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    first = dist.get_rank() == 0

    def local_plan() -> Any:
        planner.set_up_planner(mcore_to_pyt_state_dict(by_name, is_loading=False), is_coordinator=first)
        return planner.create_local_plan()

    plan = all_or_none(local_plan, CheckpointError)
    plans = gather_on_first_rank(plan)
    metadata = all_or_none(lambda: planner.create_global_plan(plans)[1] if first else None, CheckpointError)
    return {item.index: planner.resolve_data(item) for item in plan.items}, metadata


def _pickled(common: dict[str, Any], partial: Path) -> bytes:
    """The content of common.pt. Raises CheckpointError when it cannot be read back safely."""
    stream = io.BytesIO()
    torch.save(common, stream)
    stream.seek(0)
    read_common(partial, stream)
    return stream.getvalue()


def _write(
    partial: Path,
    pieces: dict[MetadataIndex, Tensor | io.BytesIO],
    values: Callable[[Tensor], Tensor],
    advance: Callable[[int], None],
) -> _Written:
    """Writes this rank's file, syncs it and reads it back. Raises CheckpointError naming it.

    advance: called with the number of bytes just written or read.
    """
    if not pieces:
        return _Written({}, {})
    path = partial / f"__{dist.get_rank()}_0.distcp"
    with TensorFile(path) as file:
        places = {}
        for index, piece in pieces.items():
            places[index] = file.append(values(piece) if isinstance(piece, Tensor) else piece)
            advance(places[index].length)
    try:
        found = checksum(path, advance, from_disk=True)
    except OSError as error:
        raise CheckpointError(f"{path} was written but cannot be read back: {error.strerror}") from None
    if found != file.record.crc32:
        raise CheckpointError(
            f"{path} was written with crc32 {file.record.crc32:08x} and reads back with {found:08x}: check the disk "
            "and its controller"
        )
    return _Written(places, {path.name: file.record})


def _in_thread(action: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Runs an action in a thread that does not keep the process from ending."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def _discard(destination: Destination) -> None:
    """Deletes the folder of a failed save."""
    if dist.get_rank() == 0:
        shutil.rmtree(destination.partial, ignore_errors=True)
