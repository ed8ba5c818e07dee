"""Writing a torch_dist checkpoint one whole tensor after another, in one process that never holds two of them.

What mcore's and torch's writers make of a state dict that is in memory, this makes of tensors as they come, so that a
model larger than memory can be converted. The result loads at every layout, like any other checkpoint.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ross_mcore.checkpoint.torch_dist import BACKEND, BACKEND_FILE, COMMON_FILE, INDEX_FILE, sharding_metadata

PART_BYTES = 4 * 2**30
"""A file of tensors is closed when it is larger than this, so that loading ranks can read several at once."""


class TensorWriter:
    """`with TensorWriter(folder) as writer: writer.add(name, tensor)`: on leaving, the index files are written.

    Names are those of the checkpoint, shapes are whole. An exception inside leaves a folder without index.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._parts = 0
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> TensorWriter:
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends one tensor. Raises ValueError when the name was added before."""
        if name in self._tensors:
            raise ValueError(f"tensor {name} is written twice")
        if self._stream is None:
            self._stream = (self._folder / f"__0_{self._parts}.distcp").open("wb")
            self._parts += 1
        file = Path(self._stream.name).name
        # a copy when the tensor is a view: torch.save would write the whole storage behind it
        whole = tensor.detach().cpu().contiguous()
        whole = whole.clone() if whole.untyped_storage().nbytes() != whole.nbytes else whole
        start = self._stream.tell()
        torch.save(whole, self._stream)
        length = self._stream.tell() - start
        origin = torch.Size([0] * whole.dim())
        self._tensors[name] = TensorStorageMetadata(
            TensorProperties(dtype=whole.dtype), whole.size(), [ChunkStorageMetadata(origin, whole.size())]
        )
        self._places[MetadataIndex(name, origin, 0)] = _StorageInfo(file, start, length)
        if start + length > PART_BYTES:
            self._close_part()

    def _close_part(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close_part()
        if error is None:
            with (self._folder / INDEX_FILE).open("wb") as stream:
                pickle.dump(Metadata(self._tensors, storage_data=self._places), stream)
            torch.save({"content_metadata": sharding_metadata()}, self._folder / COMMON_FILE)
            (self._folder / BACKEND_FILE).write_text(json.dumps(BACKEND))
