"""Bad samples: replacements depend on seed and position only, and are the same in every split."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ross_mcore.batch import Sample, collate
from ross_mcore.data import shard_reader as shards_module
from ross_mcore.data.loader import Step
from ross_mcore.data.order import SampleOrder
from ross_mcore.data.replacement import ASKED_FOR, ATTEMPTS, EMPTY, substitute
from ross_mcore.data.sample import ShardDataset
from ross_mcore.errors import ShardReadError
from ross_mcore.shards.writer import ShardWriter
from tests.unit.data.loading import open_loader


def anything(drawn: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.ones(drawn.size, bool)


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 30),
    seed=st.integers(0, 2**63),
    position=st.integers(0, 2**40),
    lengths=st.lists(st.integers(1, 9), min_size=30, max_size=30),
    data=st.data(),
)
def test_every_sample_that_fits_is_tried_once(
    count: int, seed: int, position: int, lengths: list[int], data: st.DataObject
) -> None:
    bad = data.draw(st.integers(0, count - 1))
    known = np.array(lengths)
    peers = range(100, 100 + count)
    fitting = {100 + number for number in range(count) if number != bad and lengths[number] <= lengths[bad]}
    drawn = [
        substitute(100 + bad, peers, lambda numbers: known[numbers - 100] <= lengths[bad], seed, position, attempt)
        for attempt in range(count)
    ]
    assert set(drawn[: len(fitting)]) == fitting
    assert set(drawn[len(fitting) :]) == {EMPTY}


def test_replacements_are_spread_evenly_and_change_with_seed_and_place() -> None:
    drawn = [substitute(0, range(11), anything, 5, position, 0) for position in range(1000)]
    counts = np.bincount(drawn, minlength=11)
    assert counts[0] == 0 and counts[1:].min() > 62 and counts[1:].max() < 138  # 100 each, four deviations
    other_seed = [substitute(0, range(11), anything, 6, position, 0) for position in range(500)]
    assert np.mean(np.array(drawn[:500]) == other_seed) < 0.16


BAD_TEXT, BAD_PICTURE, BAD_BOTH, ANOTHER_LENGTH = (2, 7), (4, 13, 19), (16,), (11,)
BAD = {*BAD_TEXT, *BAD_PICTURE, *BAD_BOTH, *ANOTHER_LENGTH}
"""The samples, of 23, that are damaged after indexing."""


@pytest.fixture(scope="module")
def damaged(
    records: list[dict[str, Any]],
    image_folder: Path,
    open_dataset: Callable[..., ShardDataset],
    shards: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[], ShardDataset]:
    """damaged() -> the data set of 23 samples, opened again, with members overwritten in two shards."""
    folder = tmp_path_factory.mktemp("damaged")
    for path in shards.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    reader = open_dataset(folder).reader
    for number in sorted(BAD):
        row = reader.samples[number]
        with (folder / reader.index["shards"][int(row["shard"])]["name"]).open("r+b") as stream:
            if number in ANOTHER_LENGTH:
                record = json.loads(reader.record_bytes(number))
                record = {"conversations": record["conversations"][:1] + [{"from": "gpt", "value": "A a"}]}
                stream.seek(int(row["text_offset"]))
                stream.write(json.dumps(record).encode().ljust(int(row["text_size"])))
            if number in BAD_TEXT + BAD_BOTH:
                stream.seek(int(row["text_offset"]))
                stream.write(b"\xff" * int(row["text_size"]))
            if number in BAD_PICTURE + BAD_BOTH:
                image = reader.images[int(row["first_image"])]
                stream.seek(int(image["offset"]))
                stream.write(bytes(int(image["size"])))
    return lambda: open_dataset(folder)


STEPS = 6
"""Steps of 8 rows: at least two epochs of 23 samples."""
SEQ_LENGTH = 200
"""Tokens of a row: room for up to three samples."""


def run(
    dataset: ShardDataset,
    packed: bool,
    tp_size: int = 1,
    dp_size: int = 1,
    num_workers: int = 0,
    num_steps: int = STEPS,
    **options: Any,
) -> list[Any]:
    """The steps of every rank of a split, with replacements agreed on as in training, and the samples of every step in
    global order with their pixels, each decoded by the rank that has it in its share."""
    dataset.spec = replace(dataset.spec, seq_length=SEQ_LENGTH)
    order = SampleOrder(len(dataset), 5)
    sizes: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 2, "packed": packed, "seed": 3, **options}
    ranks = [
        open_loader(
            dataset, order, dp_rank=dp, dp_size=dp_size, tp_rank=tp, tp_size=tp_size, num_workers=num_workers, **sizes
        )
        for dp in range(dp_size)
        for tp in range(tp_size)
    ]
    plans = open_loader(dataset, order, reads=False, **sizes)  # a middle stage
    trained = []
    for _ in range(num_steps):
        steps = [next(loader) for loader in ranks]
        planned = next(plans)
        while any(step.bad for step in steps):
            found = list(chain.from_iterable(step.bad for step in steps))
            for loader, step in zip(ranks, steps, strict=True):
                loader.replace(step, found)
            plans.replace(planned, found)
        digests = {loader.digest(step) for loader, step in zip([*ranks, plans], [*steps, planned], strict=True)}
        assert len(digests) == 1 and all(step.quarantined == planned.quarantined for step in steps)
        trained.append((digests.pop(), planned.quarantined, contents(steps, tp_size, dp_size)))
    for loader in ranks:
        loader.close()
    return trained


def contents(steps: list[Step], tp_size: int, dp_size: int) -> list[Any]:
    """(key, position, tokens, pixels of every picture) of a step's samples, in global order."""
    found = []
    for number in range(len(steps[0].micro_batches or [])):
        for dp in range(dp_size):
            parts = [steps[dp * tp_size + tp].micro_batches[number] for tp in range(tp_size)]
            pixels = iter(chain.from_iterable(collate(rows, SEQ_LENGTH, 12).pixels.tolist() for rows in parts))
            samples: list[Sample] = [sample for row in parts[0] for sample in row]
            found += [(s.key, s.position, s.tokens.tolist(), [next(pixels) for _ in s.pixels]) for s in samples]
            assert next(pixels, None) is None
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["a sample a row", "packed"])
def alone(request: pytest.FixtureRequest, damaged: Callable[[], ShardDataset]) -> tuple[bool, list[Any]]:
    return request.param, run(damaged(), request.param)


def test_bad_samples_are_replaced_and_no_others(
    alone: tuple[bool, list[Any]], damaged: Callable[[], ShardDataset]
) -> None:
    packed, steps = alone
    dataset = damaged()
    samples, quarantined = [], {}
    for _, entries, found in steps:
        samples += found
        quarantined |= entries
    reasons = {entry.sample: entry.reason for entry in quarantined.values()}
    expected = BAD if packed else BAD - {*ANOTHER_LENGTH}
    assert set(reasons) == expected, "two epochs see every sample"
    for number, reason in reasons.items():
        kind = {4: "undecodable", 13: "undecodable", 19: "undecodable", 11: "another length"}.get(number, "not JSON")
        assert kind in reason
    planned = SampleOrder(len(dataset), 5)
    trained = {position for _, position, _, _ in samples}
    assert len(trained) == len(samples) and trained >= set(range(46)), "every place of the stream is trained once"
    assert packed == (len(samples) > STEPS * 8)
    for key, position, tokens, _ in samples:
        own = int(planned.sample_at(position)[0])
        number = quarantined[position].replacement if position in quarantined else own
        assert (position in quarantined) == (own in expected)
        assert key == dataset.keys([number])[0] and number not in expected
        assert tokens == dataset.get(number, 0).tokens.tolist()
        assert not packed or len(tokens) <= dataset.row_lengths(np.array([own]))[0]


@pytest.mark.parametrize("split", [{"tp_size": 3, "dp_size": 2}, {"dp_size": 4, "num_workers": 1}], ids=str)
def test_the_same_samples_are_trained_in_every_split(
    alone: tuple[bool, list[Any]], damaged: Callable[[], ShardDataset], split: dict[str, int]
) -> None:
    packed, expected = alone
    assert run(damaged(), packed, num_steps=STEPS // 2, **split) == expected[: STEPS // 2]


LEFT_OUT = {0, 2, 5, 9, 13, 20}
"""Samples named by --skip-samples; 2 and 13 are also bad."""


def test_named_samples_are_skipped_and_all_others_stay(
    alone: tuple[bool, list[Any]], damaged: Callable[[], ShardDataset]
) -> None:
    packed, before = alone
    steps = run(damaged(), packed, skipped=LEFT_OUT)
    split = {"tp_size": 2, "dp_size": 2, "num_workers": 1, "num_steps": STEPS // 2}
    assert run(damaged(), packed, skipped=LEFT_OUT, **split) == steps[: STEPS // 2]
    keys, bad = dict(enumerate(damaged().keys(range(23)))), BAD if packed else BAD - {*ANOTHER_LENGTH}
    seen = set()
    for (_, old, trained), (_, entries, found) in zip(before, steps, strict=True):
        for entry in entries.values():
            assert entry.reason.startswith(ASKED_FOR) == (entry.sample in LEFT_OUT)
            assert entry.replacement not in LEFT_OUT | bad
            seen.add(entry.sample)
        for expected, ours in zip(trained, found, strict=True):
            assert ours[0] not in {keys[number] for number in LEFT_OUT}
            assert ours == expected or ours[1] in entries, "what is not left out stays in its place"
        assert old.keys() <= entries.keys()
    assert seen == LEFT_OUT | bad


def test_a_slot_stays_empty_without_a_replacement(
    records: list[dict[str, Any]], tmp_path: Path, open_dataset: Callable[..., ShardDataset]
) -> None:
    with ShardWriter(tmp_path / "hopeless") as writer:
        for number in range(ATTEMPTS + 5):
            writer.write(str(number), b"broken", [])
    dataset = open_dataset(tmp_path / "hopeless")
    with open_loader(dataset, SampleOrder(len(dataset), 0), global_batch_size=2, micro_batch_size=1) as loader:
        step = next(loader)
        rounds = 0
        while step.bad:
            loader.replace(step, list(step.bad))
            rounds += 1
    assert rounds == ATTEMPTS + 1
    assert loader.keys(step) == [] and all(row.samples.tolist() == [EMPTY] for row in step.rows)
    assert [entry.attempts for entry in step.quarantined.values()] == [ATTEMPTS] * 2
    assert collate(step.micro_batches[0], 8, 12).num_images == 0


def test_a_slot_stays_empty_when_all_samples_are_skipped(
    shards: Path, open_dataset: Callable[..., ShardDataset]
) -> None:
    dataset = open_dataset()
    sizes: dict[str, Any] = {"global_batch_size": 2, "micro_batch_size": 1, "packed": True}
    with open_loader(dataset, SampleOrder(len(dataset), 0), skipped=frozenset(range(len(dataset))), **sizes) as loader:
        step = next(loader)
    assert not step.bad and {entry.reason for entry in step.quarantined.values()} == {ASKED_FOR}
    assert all(sample.problem for rows in step.micro_batches for row in rows for sample in row)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_system_that_fails_is_tried_again_and_then_is_the_step_s_failure(
    shards: Path,
    open_dataset: Callable[..., ShardDataset],
    tmp_path: Path,
    num_workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards_module, "READ_PAUSES_SECONDS", (0.0, 0.0))
    dataset = open_dataset()
    real, calls = os.pread, []

    def failing(handle: int, size: int, offset: int) -> bytes:
        calls.append(offset)
        if len(calls) % 3 or broken:
            raise OSError(5, "Input/output error")
        return real(handle, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    broken = False
    assert dataset.get(0, 0).problem is None and len(calls) == 3
    broken = True
    with open_loader(
        dataset, SampleOrder(len(dataset), 0), global_batch_size=2, micro_batch_size=1, num_workers=num_workers
    ) as loader:
        step = next(loader)
    assert isinstance(step.failure, ShardReadError) and step.micro_batches is None
    assert "Input/output error, 3 times in a row" in str(step.failure) and "Traceback" not in str(step.failure)
