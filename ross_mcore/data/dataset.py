"""SampleDataset: the interface of a data set, which is one folder or a mixture of several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ross_mcore.batch import Sample
from ross_mcore.data.replacement import Bad, Named


class SampleDataset(Named, Protocol):
    """Samples by number. Legend: P requested samples."""

    @property
    def seq_length(self) -> int:
        """Maximum number of tokens in a row."""
        ...

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Shape of a decoded picture: (3, H, W), or (0,) if pixels are not needed."""
        ...

    def __len__(self) -> int: ...

    def get(self, sample_number: int, position: int) -> Sample:
        """The sample at stream position `position`; its pixels are all None."""
        ...

    def decode(self, sample: Sample, sample_number: int, ordinals: Iterable[int]) -> list[Bad]:
        """Fills `sample.pixels` at `ordinals`; returns the errors of pictures that are left blank.

        A tensor of `pixel_shape` that is already there is written in place.
        """
        ...

    def row_lengths(self, sample_numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens [P] of samples [P] in a row, images included, cut to `seq_length`; from the index."""
        ...

    def peers(self, sample_number: int) -> range:
        """The samples that may replace a bad one."""
        ...
