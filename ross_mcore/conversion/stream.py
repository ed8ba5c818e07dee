"""Writes a torch_dist checkpoint in one process, one whole tensor after another, holding one at a time.

mcore's and torch's writers need the whole state dict in memory; this one converts models larger than memory. The result
loads at every layout, like any other checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ross_mcore.checkpoint.manifest import FileRecord
from ross_mcore.checkpoint.tensor_file import TensorFile, write_index
from ross_mcore.checkpoint.torch_dist import COMMON_FILE, sharding_metadata

PART_BYTES = 4 * 2**30
"""Size above which a file of tensors is closed and the next one opened, so that ranks can read several at once."""


class TensorWriter:
    """`with TensorWriter(folder) as writer: writer.add(name, tensor)`; the index is written at the end.

    `records`: size and checksum of each file of tensors. An exception inside leaves a folder without index. Raises
    CheckpointError naming the file that cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, STORAGE_TYPES] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._part: TensorFile | None = None
        self.records: dict[str, FileRecord] = {}

    def __enter__(self) -> TensorWriter:
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends one whole tensor under its name in the checkpoint. Raises ValueError when it was added before."""
        if name in self._tensors:
            raise ValueError(f"tensor {name} is written twice")
        if self._part is None:
            self._part = TensorFile(self._folder / f"__0_{len(self.records)}.distcp")
        origin = torch.Size([0] * tensor.dim())
        self._places[MetadataIndex(name, origin, 0)] = self._part.append(tensor)
        self._tensors[name] = TensorStorageMetadata(
            TensorProperties(dtype=tensor.dtype), tensor.size(), [ChunkStorageMetadata(origin, tensor.size())]
        )
        if self._part.record.bytes > PART_BYTES:
            self._close_part()

    def _close_part(self) -> None:
        if self._part is not None:
            self._part.close()
            self.records[self._part.path.name] = self._part.record
            self._part = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            if self._part is not None:
                self._part.__exit__(kind, error, traceback)
            return
        self._close_part()
        write_index(self._folder, Metadata(self._tensors, storage_data=self._places))
        torch.save({"content_metadata": sharding_metadata()}, self._folder / COMMON_FILE)
