"""What stands in for a bad sample: a function of the seed and the sample's place in the stream alone.

So all ranks of every layout train the same samples, and a run that is resumed replaces as it would have. Legend: P
samples drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ross_mcore.data.order import keys, permute

ATTEMPTS = 10
"""Samples tried in place of a bad one before its slot stays empty."""
SEARCHED_SAMPLES = 1 << 20
"""Drawn to find one that fits, about a second when none does."""
EMPTY = -1
"""In place of a sample number: nothing could stand in."""
TEXT = -1
ASKED_FOR = "named by --skip-samples"
"""The reason of a sample that is left out because somebody said so, and not because it is bad."""
_DRAWN_AT_ONCE = 4096
_PURPOSE = 0x5B5  # keeps these draws apart from those of the order


@dataclass(frozen=True)
class Replacement:
    """How bad samples are replaced: `seed` decides what stands in; `attempts`: tried before a place stays empty.

    Samples numbered in `skipped` are replaced as if they were bad.
    """

    seed: int = 0
    attempts: int = ATTEMPTS
    skipped: frozenset[int] = frozenset()


NOTHING_SKIPPED = Replacement()


@dataclass(frozen=True, order=True)
class Bad:
    """What one rank found wrong: with the text (`ordinal` is TEXT) or picture `ordinal` of the sample at `position`."""

    position: int
    ordinal: int
    reason: str


@dataclass
class Quarantined:
    """A planned sample that could not be trained on.

    `sample`: its number, `replacement`: that of the one trained in its place, EMPTY when none could be; `attempts`: how
    many were tried.
    """

    position: int
    sample: int
    reason: str
    attempts: int = 0
    replacement: int = EMPTY


class Named(Protocol):
    """A data set that knows the names of its samples."""

    def keys(self, sample_numbers: Sequence[int]) -> list[str]: ...

    def shard(self, sample_number: int) -> str: ...


@dataclass(frozen=True)
class BadSample:
    """One line of quarantine.jsonl: a place of the stream whose own sample was not trained.

    position: its place in the stream; replaced_by: the key of the sample trained there, None when none could be. With
    the reason ASKED_FOR it is not bad, but named by --skip-samples.
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
    """What was replaced in a step, in the order of the stream; the same on all ranks."""

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
    """The sample to try in place of `sample` at stream position `position`, EMPTY when no other is left.

    The samples `peers` are drawn in an order keyed by (seed, position), and those that `fits` [P] -> [P] rejects passed
    over: the result is number `attempt` (from 0) of the rest. So no attempt tries a sample twice.
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
