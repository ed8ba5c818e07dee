"""Reads torch_dist checkpoints and adapters without running code from their pickles (pieces.py reads the tensors).

| pickle | read by mcore 0.16.1 and torch with | here |
|---|---|---|
| `.metadata`: shape of every tensor, its files and bytes | `pickle.load` | an unpickler for the classes of ALLOWED |
| `common.pt`: parameter groups of the optimizer, content metadata | torch's default | `weights_only=True` |
| `*.distcp`, tensors | `weights_only=True` | the same |
| `*.distcp`, mcore's ShardedObject | `weights_only=False` | `weights_only=True` (sharded.py, _LoadPlanner) |
| `mm_projector.bin`, of the reference | torch's default | `weights_only=True` |

(torch: distributed/checkpoint/filesystem.py, FileSystemReader; default_planner.py, load_bytes. mcore:
dist_checkpointing/strategies/common.py. No class is added to those that weights_only accepts.)

Over torch's FileSystemReader: code in a pickle is refused instead of run, and an error names the damaged tensor and
file. The price is unpickling in Python: the index of 3,000 tensors takes 8 to 13 times as long as pickle.load, 0.6 s on
a busy machine (benchmarks/checkpoint.py).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import math
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from ross_mcore.checked import reason, shown
from ross_mcore.checkpoint.folder import REMEDY
from ross_mcore.checkpoint.pieces import Room, Slice, read_block, require_stored
from ross_mcore.checkpoint.torch_dist import COMMON_FILE, INDEX_FILE, OPTIMIZER_PREFIX
from ross_mcore.errors import CheckpointError

ALLOWED = {
    # descriptions of tensors and byte ranges: dataclasses and enums without side effects
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    # constants: sizes, dtypes, memory layouts (looked up by name)
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},
}
"""Module -> names that a `.metadata` file may use."""
LFS_POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS has not fetched."""


class _Unpickler(pickle._Unpickler):
    """Builds the classes of ALLOWED only. Python's, not C's unpickler: here BUILD can be kept from changing a class."""

    stack: list[Any]
    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise CheckpointError(f"it uses {shown(f'{module}.{name}')}, which no checkpoint needs: refused")
        return getattr(importlib.import_module(module), name)

    def load_build(self) -> None:
        if callable(self.stack[-2]):
            raise CheckpointError("it tries to change a class: refused")
        super().load_build()  # type: ignore[misc]  # not in typeshed

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]  # no other class looks it up here
    for _unused in ("BYTEARRAY8", "NEXT_BUFFER", "PERSID", "BINPERSID", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
        del dispatch[getattr(pickle, _unused)[0]]


def read_metadata(folder: Path) -> Metadata:
    """Reads the index of a torch_dist checkpoint: name, shape and place of every tensor.

    Raises CheckpointError when it is missing or malformed, uses a class that is not in ALLOWED, or points to bytes
    outside the folder.
    """
    path = Path(folder) / INDEX_FILE
    try:
        with path.open("rb") as stream:
            metadata = _Unpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError("it holds another kind of object")
        _check_places(path.parent, metadata)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: this is not a sharded checkpoint") from None
    except Exception as error:  # a hostile pickle can raise anything
        raise CheckpointError(f"{path} is not the index of a checkpoint: {_why(error)}; {REMEDY}") from None
    return metadata


def _check_places(folder: Path, metadata: Metadata) -> None:
    """Raises CheckpointError for a place outside the folder's files, and for a tensor that its pieces cannot fill."""
    sizes: dict[str, int] = {}
    for where, place in metadata.storage_data.items():
        name, start, length = place.relative_path, place.offset, place.length
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"it places tensors in {shown(name)}, which is not a file beside it")
        if name not in sizes:
            sizes[name] = (folder / name).stat().st_size
        if type(start) is not int or type(length) is not int or not 0 <= start <= start + length <= sizes[name]:
            raise CheckpointError(f"it places {shown(where.fqn)} at byte {shown(start)} of {name}, beyond its end")
        if getattr(place, "transform_descriptors", None):
            raise CheckpointError(f"it lists {shown(where.fqn)} as compressed, which this trainer never does")
    for name, item in metadata.state_dict_metadata.items():
        if not isinstance(item, TensorStorageMetadata):
            continue
        if not isinstance(name, str) or not item.chunks:
            raise CheckpointError(f"it lists no pieces of {shown(name)}")
        volumes = [math.prod(chunk.sizes) for chunk in item.chunks]
        if sum(volumes) != math.prod(item.size) or (len(volumes) > 1 and not all(volumes)):
            raise CheckpointError(f"it lists {len(volumes)} pieces of {shown(name)}, which do not add up to its shape")
        places = [metadata.storage_data[MetadataIndex(name, chunk.offsets)] for chunk in item.chunks]
        if math.prod(item.size) * item.properties.dtype.itemsize > sum(place.length for place in places):
            raise CheckpointError(f"it gives {name} the shape {shown(list(item.size))}, larger than its bytes hold")


def _why(error: Exception) -> str:
    """The reason for an error of reading a pickle or an archive, in one line."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or holds more than tensors and plain data"
    return reason(error)


def read_common(folder: Path, content: IO[bytes] | None = None) -> dict[str, Any]:
    """Reads `common.pt`, or `content`, before it is written there.

    Raises CheckpointError when it is missing, damaged or holds more than plain data.
    """
    path = Path(folder) / COMMON_FILE
    try:
        with path.open("rb") if content is None else contextlib.nullcontext(content) as file:
            require_stored(file)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is not complete") from None
    except Exception as error:  # UnpicklingError, EOFError, RuntimeError of the zip reader ...
        raise CheckpointError(f"{path} was refused: {_why(error)}; {REMEDY}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a mapping")
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Memory-maps a dictionary of tensors in a file of torch.save. Raises CheckpointError naming the file."""
    again = "copy the file again, or save it again"
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise CheckpointError(_not_an_archive(path))
            file.seek(0)
            require_stored(file)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # as in read_common
        raise CheckpointError(f"{path} was refused: {_why(error)}; {again}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path} is not a dictionary of tensors; save a model's state_dict()")
    for name, tensor in state.items():
        if not _is_stored(tensor):
            raise CheckpointError(f"{path}: {shown(name)} is not a plain tensor; have it saved again")
    return {str(name): tensor.detach() for name, tensor in state.items()}


def _not_an_archive(path: Path) -> str:
    """Why a file is not the zip archive that torch.save has written since torch 1.6."""
    with path.open("rb") as file:
        begin = file.read(64)
    if begin.startswith(LFS_POINTER):
        return "it is a Git LFS pointer, not the weights: run git lfs pull in its folder"
    if begin[:1] == b"\x80":  # a pickle
        return (
            "it is in the format of torch before 1.6, which cannot be read piece by piece: write it anew with "
            "torch.save(torch.load(path, weights_only=True), path)"
        )
    return "it is damaged, or no file of torch.save"


def read_adapter(path: Path) -> dict[str, Tensor]:
    """`read_tensors` of a file with floating-point tensors only."""
    state = read_tensors(path)
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {shown(name)} is not a plain floating-point tensor; have it saved again")
    return state


def _is_stored(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are stored: an expanded view repeats some, a sparse or meta tensor lacks some."""
    is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return is_dense and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize


def tensors_of(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Name -> description of every stored tensor."""
    items = metadata.state_dict_metadata.items()
    return {name: item for name, item in items if isinstance(item, TensorStorageMetadata)}


def tensor_shapes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Name -> global shape of every stored tensor."""
    return {name: tuple(item.size) for name, item in tensors_of(metadata).items()}


def read_tensor(folder: Path, metadata: Metadata, name: str) -> Tensor:
    """Reads one whole tensor from its pieces. Raises CheckpointError naming the tensor and its file."""
    item = metadata.state_dict_metadata.get(name)
    if not isinstance(item, TensorStorageMetadata):
        raise CheckpointError(f"{folder} has no tensor {name}")
    whole, room = torch.empty(item.size, dtype=item.properties.dtype), Room()
    file = INDEX_FILE
    try:
        for chunk in item.chunks:
            place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            file = place.relative_path
            target = narrow_tensor_by_index(whole, chunk.offsets, chunk.sizes)
            with (Path(folder) / file).open("rb") as stream:
                read_block(Slice(stream, place.offset, place.length), chunk.sizes, [0] * whole.dim(), target, room)
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(f"{name} cannot be read from {folder / file}: {_why(error)}; {REMEDY}") from None
    return whole


class StoredTensors:
    """The model's tensors in a checkpoint, each read when asked for. Raises as `read_metadata` and `read_tensor` do.

    `shapes`: of the model's tensors by name. `trained`: the names of those with optimizer state. `described`: shape,
    dtype and pieces of every tensor, those of the optimizer included.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._metadata = folder, read_metadata(folder)
        self.described, stored = tensors_of(self._metadata), tensor_shapes(self._metadata)
        self.shapes = {name: shape for name, shape in stored.items() if not name.startswith(OPTIMIZER_PREFIX)}
        self.trained = {own for own in self.shapes if f"{OPTIMIZER_PREFIX}state.exp_avg.{own}" in stored}

    def names(self) -> Iterable[str]:
        return self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self.described[name].properties.dtype

    def read(self, name: str) -> Tensor:
        return read_tensor(self._folder, self._metadata, name)


class Reader(FileSystemReader):
    """torch's reader of tensor bytes, with metadata that was read safely, into existing memory."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._folder, self._metadata = folder, metadata

    def read_metadata(self) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Raises CheckpointError naming the file."""
        tensors = tensors_of(self._metadata).items()
        shapes = {MetadataIndex(n, chunk.offsets): chunk.sizes for n, item in tensors for chunk in item.chunks}
        room = Room()
        placed = [(self._metadata.storage_data[item.storage_index], item) for item in plan.items]
        placed.sort(key=lambda pair: (pair[0].relative_path, pair[0].offset))
        for file, own in itertools.groupby(placed, key=lambda pair: pair[0].relative_path):
            path = Path(self._folder) / file
            try:
                with path.open("rb") as stream:
                    for place, item in own:
                        view = Slice(stream, place.offset, place.length)
                        if item.type == LoadItemType.BYTE_IO:
                            planner.load_bytes(item, io.BytesIO(view.read()))
                            continue
                        target = planner.resolve_tensor(item)
                        read_block(view, shapes[item.storage_index], item.storage_offsets, target.detach(), room)
                        planner.commit_tensor(item, target)
            except Exception as error:  # a damaged file can raise anything
                raise CheckpointError(f"{path} cannot be read: {_why(error)}; {REMEDY}") from None
        done: Future[None] = Future()
        done.set_result(None)
        return done
