"""Bytes that a rank copies, gathers and holds to save its part of a checkpoint, and reads to load it."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from counting import Row
from counting.ranks import on_ranks
from ross_mcore.checkpoint import safe_load, saving
from ross_mcore.checkpoint.pieces import Room, Slice
from ross_mcore.checkpoint.saving import Destination, HostCopies, begin_save
from ross_mcore.engine.run import Run
from ross_mcore.engine.state import restore, sharded_state


class Watch(TorchDispatchMode):
    """Adds up, in bytes, what the operations of this thread do.

    copied: floating-point values that are written to new or other memory. gathered: floating-point values that
    collectives bring to this rank. peak: the most memory that tensors made meanwhile have at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copied = self.gathered = self.peak = self._live = 0

    def _allocate(self, count: int) -> None:
        self._live += count
        self.peak = max(self.peak, self._live)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.gathered += sum(tensor.nbytes for tensor in _tensors(args[0]) if tensor.is_floating_point())
            return result
        given = _tensors((args, kwargs))
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            is_new = storage.data_ptr() not in known
            if is_new:
                self._allocate(storage.nbytes())
                weakref.finalize(storage, self._allocate, -storage.nbytes())
            if tensor.is_floating_point() and given and (is_new or func._schema.is_mutable):
                self.copied += tensor.nbytes
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.device.type != "meta"]


@dataclass(frozen=True)
class Counts:
    """Of one rank, in bytes. written: tensors in its file; held: host memory for copies, also between saves.

    peak: the most new memory during the save, host copies included. needed: this rank's part of the state, which it
    loads; read: from files, for that.
    """

    written: int
    held: int
    copied: int
    gathered: int
    peak: int
    needed: int
    read: int
    read_copied: int
    read_peak: int


def counted(run: Run, root: Path) -> Counts:
    """Saves the state of `run` under `root` in the background, then loads it. Collective."""
    copies, destination = HostCopies(), Destination(root, 1, run.model_config)
    with _files() as files:
        with Watch() as save:
            state = sharded_state(run.engine, is_loading=False)
            running = begin_save(destination, {**state, "train_state": {"iteration": 1}}, copies)
            del state
        saved = running.finish()
        with Watch() as load:
            restore(saved.checkpoint, run.engine)
    return Counts(
        files.written,
        copies.bytes,
        save.copied + files.copied,
        save.gathered,
        save.peak + files.peak,
        files.needed,
        files.read,
        load.copied,
        load.peak,
    )


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp4": (4, {"micro_batch_size": 1}),
    "tp2xpp2xdp2": (8, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "micro_batch_size": 1}),
}
"""Name -> processes and flags; bf16, with the distributed optimizer."""


def count_layout(base: Path, shards: Path, folder: Path, name: str) -> Counts:
    """On every rank of a layout."""
    from counting.model import opened

    with opened(base, shards, folder / "run", bf16=True, **LAYOUTS[name][1]) as run:
        return counted(run, folder)


def rows() -> list[Row]:
    from counting.model import SMALL, Wanted, write_checkpoint, write_shards

    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = write_checkpoint(folder, SMALL)
        shards = write_shards(folder, SMALL, [Wanted(64, 20) for _ in range(24)])
        for name, (world, _) in LAYOUTS.items():
            ranks = on_ranks(count_layout, world, base, shards, folder / name, name)
            figures = [
                ("copied", max(r.copied / r.written for r in ranks), "<= 1.1", "a byte written; the worst rank"),
                ("gathered", max(r.gathered / r.written for r in ranks), "0", "a byte written"),
                ("held in host memory", max(r.held / r.written for r in ranks), "<= 1.1", "a byte written"),
                ("peak of new memory", max(r.peak / r.written for r in ranks), "<= 1.1", "a byte written"),
                ("read to resume", max(r.read / r.needed for r in ranks), "<= 1.1", "a byte of this rank's state"),
            ]
            found += [Row(f"bytes {what}, {name}", f"{value:.3f}", aim, of) for what, value, aim, of in figures]
    return found


@dataclass
class _Files:
    written: int = 0
    copied: int = 0
    peak: int = 0
    needed: int = 0
    read: int = 0


@contextmanager
def _files() -> Iterator[_Files]:
    """Counts what is written and read, and what the thread that writes does."""
    found, write, read_block, readinto = _Files(), saving._write, safe_load.read_block, Slice.readinto

    def write_counted(partial: Path, pieces: dict[Any, Any], *rest: Any) -> Any:
        found.written += sum(piece.nbytes for piece in pieces.values() if isinstance(piece, Tensor))
        with Watch() as own:
            written = write(partial, pieces, *rest)
        found.copied, found.peak = found.copied + own.copied, found.peak + own.peak
        return written

    def read_counted(view: Slice, shape: Any, starts: Any, target: Tensor, room: Room) -> None:
        last = 0  # earlier ones are of the archive's directory

        def readinto_counted(self: Slice, buffer: Any) -> int:
            nonlocal last
            last = readinto(self, buffer)
            return last

        Slice.readinto = readinto_counted  # type: ignore[method-assign]  # for this block
        read_block(view, shape, starts, target, room)
        found.needed, found.read = found.needed + target.nbytes, found.read + last

    saving._write, safe_load.read_block = write_counted, read_counted  # type: ignore[assignment]  # as wide
    try:
        yield found
    finally:
        saving._write, safe_load.read_block = write, read_block
        Slice.readinto = readinto  # type: ignore[method-assign]  # as before
