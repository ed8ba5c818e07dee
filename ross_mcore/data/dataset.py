"""What a loader, and what reports its samples, need of a data set: one folder, or several as one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ross_mcore.batch import Sample
from ross_mcore.data.replacement import Bad, Named


class SampleDataset(Named, Protocol):
    """Samples by number. Legend: P samples asked for."""

    @property
    def seq_length(self) -> int:
        """Most tokens of a row."""
        ...

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Of a decoded picture: (3, H, W), or (0,) where pixels are not wanted."""
        ...

    def __len__(self) -> int: ...

    def get(self, sample_number: int, position: int) -> Sample:
        """The sample at stream position `position`; its pixels are all None."""
        ...

    def decode(self, sample: Sample, sample_number: int, ordinals: Iterable[int]) -> list[Bad]:
        """Fills in `sample.pixels` at `ordinals`; returns what is wrong with those that had to be left blank.

        A tensor of `pixel_shape` that already stands there is written to instead of a new one.
        """
        ...

    def row_lengths(self, sample_numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens [P] that samples [P] take in a row, images included and cut to `seq_length`; from the index."""
        ...

    def peers(self, sample_number: int) -> range:
        """The samples that may stand in for one."""
        ...
