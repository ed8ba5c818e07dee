"""No file of a checkpoint can run code; every damaged one is named."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ross_mcore.checkpoint.safe_load import (
    ALLOWED,
    read_adapter,
    read_common,
    read_metadata,
    read_tensor,
    tensor_shapes,
)
from ross_mcore.checkpoint.torch_dist import COMMON_FILE, INDEX_FILE, sharding_metadata
from ross_mcore.conversion.stream import TensorWriter
from ross_mcore.errors import CheckpointError


class Payload:
    """An object whose unpickling creates a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.target),))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    with TensorWriter(path) as writer:
        writer.add("a.weight", torch.arange(6.0).view(2, 3))
        writer.add("b", torch.tensor(3, dtype=torch.int64))
        writer.add("c.view", torch.arange(100.0)[::7].to(torch.bfloat16))
    return path


def test_stream_round_trip(stored: Path) -> None:
    metadata = read_metadata(stored)
    assert tensor_shapes(metadata) == {"a.weight": (2, 3), "b": (), "c.view": (15,)}
    assert torch.equal(read_tensor(stored, metadata, "a.weight"), torch.arange(6.0).view(2, 3))
    assert read_tensor(stored, metadata, "b").item() == 3
    assert torch.equal(read_tensor(stored, metadata, "c.view"), torch.arange(100.0)[::7].to(torch.bfloat16))
    assert read_common(stored) == {"content_metadata": sharding_metadata()}


def test_mcore_reads_what_the_stream_wrote(stored: Path) -> None:
    """mcore's own (unsafe) readers accept the files: the format is theirs."""
    with (stored / INDEX_FILE).open("rb") as stream:
        assert isinstance(pickle.load(stream), Metadata)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_index_that_would_run_code_is_refused(stored: Path, tmp_path: Path, protocol: int) -> None:
    metadata = read_metadata(stored)
    metadata.planner_data = Payload(tmp_path / "evil")
    (stored / INDEX_FILE).write_bytes(pickle.dumps(metadata, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"\.metadata is not the index.*(mkdir|_reconstructor).*refused"):
        read_metadata(stored)
    assert not (tmp_path / "evil").exists()


def test_common_state_that_would_run_code_is_refused(stored: Path, tmp_path: Path) -> None:
    torch.save({"content_metadata": Payload(tmp_path / "evil")}, stored / COMMON_FILE)
    with pytest.raises(CheckpointError, match=r"common\.pt was refused"):
        read_common(stored)
    (stored / COMMON_FILE).write_bytes(pickle.dumps(Payload(tmp_path / "evil")))
    with pytest.raises(CheckpointError, match=r"common\.pt was refused"):
        read_common(stored)
    assert not (tmp_path / "evil").exists()


def test_tensor_that_would_run_code_is_refused(stored: Path, tmp_path: Path) -> None:
    metadata = read_metadata(stored)
    torch.save(Payload(tmp_path / "evil"), stored / "__0_1.distcp")
    place = _StorageInfo("__0_1.distcp", 0, (stored / "__0_1.distcp").stat().st_size)
    metadata.storage_data[MetadataIndex("b", torch.Size([]))] = place
    with pytest.raises(CheckpointError, match=r"b cannot be read from .*__0_1\.distcp"):
        read_tensor(stored, metadata, "b")
    assert not (tmp_path / "evil").exists()


def test_a_class_cannot_be_changed_by_a_pickle(stored: Path) -> None:
    # GLOBAL Metadata, BUILD with (None, {"version": 1}): sets an attribute of the class itself
    name = "torch.distributed.checkpoint.metadata\nMetadata\n"
    (stored / INDEX_FILE).write_bytes(b"\x80\x02c" + name.encode() + b"N}X\x07\x00\x00\x00versionK\x01s\x86b.")
    before = Metadata.version
    with pytest.raises(CheckpointError, match="change a class"):
        read_metadata(stored)
    assert Metadata.version is before


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file", "absent.distcp", ""])
def test_index_that_points_elsewhere_is_refused(stored: Path, name: str) -> None:
    (stored.parent / "secret").write_text("x")
    metadata = read_metadata(stored)
    for place in metadata.storage_data.values():
        place.relative_path = name
    (stored / INDEX_FILE).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="not a file beside it"):
        read_metadata(stored)


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"hello", b"\x80\x04N.", b"\x80\x04K\x01.", b"\x80\x05\x96" + b"\xff" * 8]
)
def test_damaged_index_is_named(stored: Path, content: bytes) -> None:
    (stored / INDEX_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata is not the index"):
        read_metadata(stored)


def test_every_truncation_of_an_index_is_refused(stored: Path) -> None:
    whole = (stored / INDEX_FILE).read_bytes()
    for length in range(0, len(whole), 37):
        (stored / INDEX_FILE).write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_metadata(stored)


def test_damaged_tensor_file_is_named(stored: Path) -> None:
    metadata = read_metadata(stored)
    path = stored / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"c\.view cannot be read from .*__0_0\.distcp"):
        read_tensor(stored, metadata, "c.view")
    with pytest.raises(CheckpointError, match="no tensor d"):
        read_tensor(stored, metadata, "d")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (torch.arange(6.0), r"a piece is of shape \[6\], expected \[2, 3\]"),
        ({"a": torch.arange(6.0).view(2, 3)}, r"a piece is no tensor, expected \[2, 3\]"),
        (torch.arange(6.0).view(3, 2).t(), "not stored contiguously"),
        (torch.arange(6.0).expand(2, 2, 6)[0, :, :3], "not stored contiguously"),
    ],
)
def test_piece_that_differs_from_the_index_is_refused(stored: Path, other: Any, says: str) -> None:
    metadata = read_metadata(stored)
    torch.save(other, stored / "__0_1.distcp")
    index = MetadataIndex("a.weight", torch.Size([0, 0]))
    metadata.storage_data[index] = _StorageInfo("__0_1.distcp", 0, (stored / "__0_1.distcp").stat().st_size)
    with pytest.raises(CheckpointError, match=rf"a\.weight cannot be read from .*__0_1\.distcp: .*{says}"):
        read_tensor(stored, metadata, "a.weight")


def test_piece_with_a_shape_larger_than_its_bytes_is_refused(stored: Path) -> None:
    """Other pieces follow in the file."""
    metadata = read_metadata(stored)
    path = stored / "__0_0.distcp"
    place = metadata.storage_data[MetadataIndex("a.weight", torch.Size([0, 0]))]
    piece = path.read_bytes()[place.offset :][: place.length]
    # the pickled numbers: of elements, the shape, the strides
    huge = piece.replace(b"K\x06", b"K\xff", 1).replace(b"K\x02K\x03\x86", b"K\xffK\x01\x86")
    huge = huge.replace(b"K\x03K\x01\x86", b"K\x01K\x01\x86")
    metadata.state_dict_metadata["a.weight"] = TensorStorageMetadata(
        TensorProperties(dtype=torch.float32),
        torch.Size([255, 1]),
        [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([255, 1]))],
    )
    path.write_bytes(path.read_bytes()[: place.offset] + huge + path.read_bytes()[place.offset + place.length :])
    with pytest.raises(CheckpointError, match=r"a\.weight cannot be read from .*__0_0\.distcp: .*ends too early"):
        read_tensor(stored, metadata, "a.weight")


def test_tensor_whose_pieces_do_not_add_up_is_refused(stored: Path) -> None:
    """A million empty pieces would be read one after another; too few would leave memory that was never filled."""
    metadata = read_metadata(stored)
    (whole,) = metadata.state_dict_metadata["a.weight"].chunks
    place = metadata.storage_data[MetadataIndex("a.weight", whole.offsets)]
    empty = [ChunkStorageMetadata(torch.Size([0, column]), torch.Size([0, 3])) for column in range(1000)]
    half = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([1, 3]))
    for chunks in ([whole, *empty], [whole, whole], [half], [half, half, half]):
        metadata.state_dict_metadata["a.weight"].chunks = chunks
        metadata.storage_data |= {MetadataIndex("a.weight", chunk.offsets): place for chunk in chunks}
        (stored / INDEX_FILE).write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match=r"pieces of 'a\.weight', which do not add up to its shape"):
            read_metadata(stored)


def compress(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_compressed_archive_is_refused_before_it_is_unpacked(stored: Path, tmp_path: Path) -> None:
    """A few kilobytes may unpack to more than fits in memory."""
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "adapter.bin")
    compress(tmp_path / "adapter.bin")
    with pytest.raises(CheckpointError, match=r"adapter\.bin was refused: .*is compressed"):
        read_adapter(tmp_path / "adapter.bin")
    compress(stored / COMMON_FILE)
    with pytest.raises(CheckpointError, match=r"common\.pt was refused: .*is compressed"):
        read_common(stored)
    metadata = read_metadata(stored)
    torch.save(torch.zeros(2, 3), stored / "__0_1.distcp")
    compress(stored / "__0_1.distcp")
    size = (stored / "__0_1.distcp").stat().st_size
    metadata.storage_data[MetadataIndex("a.weight", torch.Size([0, 0]))] = _StorageInfo("__0_1.distcp", 0, size)
    with pytest.raises(CheckpointError, match=r"a\.weight cannot be read from .*__0_1\.distcp: .*is compressed"):
        read_tensor(stored, metadata, "a.weight")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\.metadata is missing"):
        read_metadata(tmp_path)
    with pytest.raises(CheckpointError, match=r"common\.pt is missing"):
        read_common(tmp_path)


def test_allow_list_is_frozen() -> None:
    """Whoever adds a name has to change this test too."""
    assert set(ALLOWED) == {
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.filesystem",
        "torch",
        "torch.serialization",
    }
    assert ALLOWED["torch.serialization"] == {"_get_layout"}
    assert ALLOWED["torch.distributed.checkpoint.filesystem"] == {"_StorageInfo"}
    assert all(name == "Size" or isinstance(getattr(torch, name), torch.dtype) for name in ALLOWED["torch"])
    assert len(ALLOWED["torch.distributed.checkpoint.metadata"]) == 8


@pytest.mark.parametrize("kind", ["sparse", "of one stored number", "without storage", "of integers"])
def test_an_adapter_of_other_tensors_is_refused(tmp_path: Path, kind: str) -> None:
    tensors = {
        "sparse": torch.zeros(3, 4).to_sparse(),
        "of one stored number": torch.zeros(1).expand(2**40),
        "without storage": torch.empty(3, 4, device="meta"),
        "of integers": torch.zeros(3, 4, dtype=torch.int64),
    }
    torch.save({"good": torch.zeros(3)}, tmp_path / "a.bin")
    assert list(read_adapter(tmp_path / "a.bin")) == ["good"]
    torch.save({"model.mm_projector.0.weight": tensors[kind]}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"a\.bin.*mm_projector\.0\.weight.*saved again|a\.bin was refused"):
        read_adapter(tmp_path / "a.bin")
