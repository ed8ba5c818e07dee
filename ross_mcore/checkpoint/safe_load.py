"""Reading torch_dist checkpoints without running code from them: the one place where a pickle is opened.

Three files of the format are pickles. What mcore 0.16.1 and torch do with them, and what is done here:

| file | by default | here |
|---|---|---|
| `.metadata`: shapes, and which bytes of which file hold what | `pickle.load` | an unpickler that knows ALLOWED only |
| `common.pt`: optimizer parameter groups, content metadata | torch's default | `weights_only=True` |
| `*.distcp`, tensors | `weights_only=True` | the same |
| `*.distcp`, mcore's ShardedObject | `weights_only=False` | `weights_only=True` |

(torch: distributed/checkpoint/filesystem.py, FileSystemReader; default_planner.py, load_bytes. mcore:
dist_checkpointing/strategies/common.py. No class is added to what weights_only accepts.)
"""

from __future__ import annotations

import importlib
import io
import pickle
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, StateDict
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemReader, Metadata, ReadItem, TensorStorageMetadata, load

from ross_mcore.checkpoint.folder import CheckpointError

METADATA = ".metadata"

ALLOWED = {
    # plain descriptions of tensors and of byte ranges: dataclasses and enums without side effects
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
    # constants: sizes, element types, memory layouts (looked up by name)
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}
"""Module -> names that a `.metadata` file may mention."""


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Builds the classes of ALLOWED. In Python, not C, so that a class itself cannot be changed by a BUILD opcode."""

    dispatch = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise CheckpointError(f"it mentions {module}.{name}, which a checkpoint has no use for: refused")
        return getattr(importlib.import_module(module), name)

    def load_build(self) -> None:
        if isinstance(self.stack[-2], type) or callable(self.stack[-2]):
            raise CheckpointError("it tries to change a class: refused")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build
    for unused in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.PERSID, pickle.BINPERSID, pickle.INST, pickle.OBJ):
        del dispatch[unused[0]]


def read_metadata(folder: Path) -> Metadata:
    """The index of a torch_dist checkpoint: name, shape and place of every tensor.

    Raises CheckpointError when it is missing, malformed, mentions a class that is not in ALLOWED, or points to bytes
    outside the folder.
    """
    path = Path(folder) / METADATA
    try:
        with path.open("rb") as stream:
            metadata = _Unpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"it holds a {type(metadata).__name__}")
        for index, place in metadata.storage_data.items():
            name = place.relative_path
            if not isinstance(name, str) or Path(name).name != name or not (path.parent / name).is_file():
                raise CheckpointError(f"{index.fqn} is said to lie in {name!r}, which is not a file beside it")
        for name, item in metadata.state_dict_metadata.items():
            if not isinstance(name, str) or (isinstance(item, TensorStorageMetadata) and not item.chunks):
                raise CheckpointError(f"{name!r} is described without any part")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: this is not a sharded checkpoint") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not the index of a checkpoint: {error}") from None
    except Exception as error:  # a hostile pickle can raise anything
        raise CheckpointError(f"{path} is not the index of a checkpoint: {type(error).__name__}: {error}") from None
    return metadata


class Reader(FileSystemReader):
    """torch's reader of tensor bytes, given metadata that has been read safely."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        return self._metadata


class LoadPlanner(MCoreLoadPlanner):
    """mcore's planner, except that an object is read as data, never as code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        self.state_dict[name] = torch.load(value, map_location="cpu", weights_only=True)


class SafeLoadStrategy(TorchDistLoadShardedStrategy):
    """TorchDistLoadShardedStrategy.load (mcore 0.16.1, strategies/torch.py:762) with the reader and planner above."""

    def __init__(self, metadata: Metadata) -> None:
        super().__init__()
        self._metadata = metadata

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> StateDict:
        tensors = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        by_key, flat_mapping, rename_mapping = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        torch_state = mcore_to_pyt_state_dict(by_key, True)
        planner = LoadPlanner(shapes_validation_sharded_tensors=tensors, flatten_state_dict=False)
        load(cast(dict[str, Any], torch_state), storage_reader=Reader(checkpoint_dir, self._metadata), planner=planner)
        loaded = {key: _unwrap_pyt_sharded_tensor(value) for key, value in torch_state.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(loaded, flat_mapping, rename_mapping)
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded


class SafeCommonStrategy(TorchCommonLoadStrategy):
    """The part of the state that is the same on all ranks, as `read_common` gave it."""

    def __init__(self, common: StateDict) -> None:
        self._common = common

    def load_common(self, checkpoint_dir: str | Path) -> StateDict:
        return self._common


def read_common(folder: Path) -> StateDict:
    """Reads `common.pt`. Raises CheckpointError when it is missing, damaged or holds more than plain data."""
    path = Path(folder) / COMMON_STATE_FNAME
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is not complete") from None
    except Exception as error:  # UnpicklingError, EOFError, RuntimeError of the zip reader ...
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CheckpointError(f"{path} was refused: {type(error).__name__}: {reason}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a mapping")
    return state
