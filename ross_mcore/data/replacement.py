"""Replacement of bad samples: a function of the seed and the sample's stream position.

So all ranks of every layout train on the same samples, and a resumed run replaces the same. Legend: P drawn samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ross_mcore.data.order import keys, permute

ATTEMPTS = 10
"""Maximum number of replacements to try for a bad sample."""
SEARCHED_SAMPLES = 1 << 20
"""Maximum number of draws to find one that fits: about a second."""
EMPTY = -1
"""In place of a sample number: no replacement was found."""
TEXT = -1
ASKED_FOR = "named by --skip-samples"
"""The reason of a sample that is not bad but skipped by an option."""
_DRAWN_AT_ONCE = 4096
_PURPOSE = 0x5B5  # keeps these draws apart from those of the order


@dataclass(frozen=True)
class Replacement:
    """How bad samples are replaced: `seed` of the draws, number of `attempts` per sample.

    Samples with numbers in `skipped` are replaced as if they were bad.
    """

    seed: int = 0
    attempts: int = ATTEMPTS
    skipped: frozenset[int] = frozenset()


NOTHING_SKIPPED = Replacement()


@dataclass(frozen=True, order=True)
class Bad:
    """An error that a rank found in the text (`ordinal` is TEXT) or picture `ordinal` of the sample at `position`."""

    position: int
    ordinal: int
    reason: str


@dataclass
class Quarantined:
    """A planned sample that is replaced.

    `sample`: its number; `replacement`: that of its replacement, EMPTY if none was found; `attempts`: how many were
    tried.
    """

    position: int
    sample: int
    reason: str
    attempts: int = 0
    replacement: int = EMPTY


class Named(Protocol):
    """A data set with names of its samples."""

    def keys(self, sample_numbers: Sequence[int]) -> list[str]:
        """The samples' keys, from the index alone."""
        ...

    def shard(self, sample_number: int) -> str:
        """The name of a sample's shard."""
        ...


@dataclass(frozen=True)
class BadSample:
    """One line of quarantine.jsonl: a planned sample that was not trained on.

    position: its stream position; replaced_by: the key of its replacement, None if there is none.
    """

    iteration: int
    position: int
    shard: str
    key: str
    reason: str
    replaced_by: str | None

    @property
    def is_bad(self) -> bool:
        return self.reason != ASKED_FOR


def bad_samples(iteration: int, quarantined: Mapping[int, Quarantined], dataset: Named) -> list[BadSample]:
    """The samples replaced in a step, in stream order; the same on all ranks."""

    def key(number: int) -> str:
        return dataset.keys([number])[0]

    return [
        BadSample(
            iteration,
            position,
            dataset.shard(entry.sample),
            key(entry.sample),
            entry.reason,
            None if entry.replacement == EMPTY else key(entry.replacement),
        )
        for position, entry in sorted(quarantined.items())
    ]


def substitute(
    sample: int,
    peers: range,
    fits: Callable[[NDArray[np.int64]], NDArray[np.bool_]],
    seed: int,
    position: int,
    attempt: int,
) -> int:
    """The sample to try in place of `sample` at stream position `position`, EMPTY if there is none.

    The samples `peers` are drawn in an order keyed by (seed, position), without those that `fits` [P] -> [P] rejects:
    the result is number `attempt` (from 0) of the rest. So no attempt tries a sample twice.
    """
    key = keys(seed, _PURPOSE, position)
    for start in range(0, min(len(peers), SEARCHED_SAMPLES), _DRAWN_AT_ONCE):
        places = np.arange(start, min(len(peers), start + _DRAWN_AT_ONCE))
        drawn = peers.start + permute(places, len(peers), key)
        fitting = drawn[(drawn != sample) & fits(drawn)]
        if attempt < fitting.size:
            return int(fitting[attempt])
        attempt -= fitting.size
    return EMPTY
