"""Pieces of a file of tensors: writing them with a checksum, reading each as a file of its own."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ross_mcore.checkpoint import tensor_file
from ross_mcore.checkpoint.manifest import FileRecord
from ross_mcore.checkpoint.pieces import Slice
from ross_mcore.checkpoint.tensor_file import TensorFile

CONTENT = bytes(range(200))
BEGIN, LENGTH = 50, 100


@given(st.lists(st.tuples(st.integers(-20, 120), st.sampled_from([0, 1, 2]), st.integers(-1, 120)), max_size=8))
def test_a_slice_is_read_like_a_file_of_its_bytes(steps: list[tuple[int, int, int]]) -> None:
    own = Slice(io.BufferedReader(io.BytesIO(CONTENT)), BEGIN, LENGTH)  # type: ignore[arg-type]
    real = io.BytesIO(CONTENT[BEGIN:][:LENGTH])
    for offset, whence, count in steps:
        if not (whence == io.SEEK_SET and offset < 0):  # an error of BytesIO
            assert own.seek(offset, whence) == real.seek(offset, whence) == own.tell()
        assert own.read(count) == real.read(count)


def test_record_matches_a_file_that_is_written_to_the_disk_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "_STEP_BYTES", 2**12)
    with TensorFile(tmp_path / "tensors") as file:
        places = [file.append(torch.arange(5000.0) + number) for number in range(4)]
    content = (tmp_path / "tensors").read_bytes()
    assert file.record == FileRecord(len(content), zlib.crc32(content))
    for number, place in enumerate(places):
        piece = io.BytesIO(content[place.offset :][: place.length])
        assert torch.equal(torch.load(piece, weights_only=True), torch.arange(5000.0) + number)
