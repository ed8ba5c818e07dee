"""Survey: what a run will find in a data set's samples, counted before it starts.

By the index where its lengths have the run's tokenizer and template. Samples that the row cuts, of which the index does
not know where labels and pictures are, and all samples of another index are tokenized: up to PROBED_SAMPLES, spread
over the data.
Legend: N samples of the data set, or those tokenized when the index does not have its lengths.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ross_mcore.data.lengths import length_source
from ross_mcore.data.order import evenly_spaced
from ross_mcore.data.remote import is_remote
from ross_mcore.data.sample import NOTHING_TO_LEARN, ShardDataset
from ross_mcore.data.templates import why_without_labels, writable_templates
from ross_mcore.errors import ConversationError, ShardError

PROBED_SAMPLES = 512
PROBED_REMOTE_SHARDS = 2
"""Of shards behind URLs, which are fetched whole, only this many are read."""
KEPT = 5
"""Number of samples named for every outcome."""


@dataclass
class Found:
    """Samples with the same outcome: `count`, estimated where only some were tokenized, and the first `numbers`."""

    count: float = 0.0
    numbers: list[int] = field(default_factory=list)

    def add(self, count: float, *numbers: int) -> None:
        self.count += count
        self.numbers = [*self.numbers, *numbers][:KEPT]


@dataclass
class Survey:
    """Outcomes of all samples.

    pictured: with a picture; labelled: with a label; unlabelled: whole and without a label; cut_unlabelled: cut, and no
    label is left; nothing: by reason, those that are empty rows or bad; lengths [N]: tokens, images included, before
    any cut where the index has them; tokenized: number of samples that were tokenized.
    """

    samples: int
    by_index: bool
    pictured: Found = field(default_factory=Found)
    labelled: Found = field(default_factory=Found)
    unlabelled: Found = field(default_factory=Found)
    cut_unlabelled: Found = field(default_factory=Found)
    nothing: dict[str, Found] = field(default_factory=dict)
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    tokenized: int = 0

    @property
    def without_labels(self) -> Found:
        """Samples that train on their pictures alone, or on nothing because their answers have no label."""
        whole, cut = self.unlabelled, self.cut_unlabelled
        return Found(whole.count + cut.count, [*whole.numbers, *cut.numbers][:KEPT])

    @property
    def empty(self) -> float:
        """Number of samples that are empty rows or bad."""
        return sum(found.count for found in self.nothing.values())


def survey(dataset: ShardDataset) -> Survey:
    """Raises ShardReadError when a sample cannot be read."""
    reader, spec = dataset.reader, dataset.spec
    by_index = reader.length_source == length_source(dataset.tokenizer, spec)
    found, to_read = Survey(len(dataset), by_index), np.arange(len(dataset))
    if by_index:
        rows = reader.samples
        found.lengths = dataset.whole_lengths(rows)
        rest = np.ones(len(dataset), np.bool_)
        for reason, over in zip(spec.bounds.reasons, dataset.over_bounds(rows), strict=True):
            _add(found.nothing.setdefault(reason, Found()), rest & over)
            rest &= ~over
        cut, has_label = found.lengths > spec.seq_length, rows["label_tokens"] > 0
        _add(found.pictured, rest & ~cut & (rows["image_spans"] > 0))
        _add(found.labelled, rest & ~cut & has_label)
        _add(found.unlabelled, rest & ~cut & ~has_label)
        to_read = np.flatnonzero(rest & cut)
    numbers = _spread(dataset, to_read)
    found.tokenized = len(numbers)
    tokenized = []
    for number in numbers:
        sample = dataset.get(number, position=0)
        tokens = sample.tokens.numel()
        tokenized.append(tokens)
        if sample.problem is not None and sample.problem != NOTHING_TO_LEARN:
            outcome = found.nothing.setdefault(sample.problem, Found())
        elif sample.label_tokens:
            outcome = found.labelled
        else:
            outcome = found.cut_unlabelled if by_index or tokens >= spec.seq_length else found.unlabelled
        outcome.add(len(to_read) / len(numbers), number)
        if sample.image_starts:
            found.pictured.add(len(to_read) / len(numbers), number)
    if not by_index:
        found.lengths = np.array(tokenized, np.int64)
    found.nothing = {reason: outcome for reason, outcome in found.nothing.items() if outcome.count}
    return found


def why_unlabelled(dataset: ShardDataset, number: int) -> str:
    """Why a sample has no label, as a short reason."""
    try:
        record, num_images = dataset.record(number)
    except (ShardError, ConversationError) as error:
        return str(error)
    turns, images = record.get("conversations"), dataset.image_tokens
    return why_without_labels(turns, num_images, dataset.tokenizer, dataset.spec, images) or NOTHING_TO_LEARN


def fitting_templates(dataset: ShardDataset, numbers: list[int]) -> list[str]:
    """The templates of conversations under which all these samples have labels."""
    fitting = []
    for template in writable_templates(dataset.tokenizer):
        other = copy.copy(dataset)
        other.spec = replace(dataset.spec, template=template)
        if template not in ("plain", dataset.spec.template) and all(other.get(n, 0).label_tokens for n in numbers):
            fitting.append(template)
    return fitting


def _add(outcome: Found, which: NDArray[np.bool_]) -> None:
    numbers = np.flatnonzero(which)
    outcome.add(numbers.size, *numbers[:KEPT].tolist())


def _spread(dataset: ShardDataset, numbers: NDArray[np.int64]) -> list[int]:
    """Up to PROBED_SAMPLES of `numbers`, evenly spaced."""
    reader = dataset.reader
    if numbers.size and any(is_remote(shard["name"]) for shard in reader.index["shards"]):
        shards = reader.samples["shard"][numbers]
        numbers = numbers[np.isin(shards, np.unique(shards)[:PROBED_REMOTE_SHARDS])]
    places = evenly_spaced(numbers.size, PROBED_SAMPLES) if numbers.size else []
    return [int(numbers[place]) for place in places]
