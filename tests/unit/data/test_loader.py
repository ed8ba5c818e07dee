"""The loader: the same stream for every split, number of workers and start; workers start and end without errors."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from ross_mcore.batch import Sample, collate
from ross_mcore.data.loader import Step, StepLoader
from ross_mcore.data.order import ModalityLengthOrder, SampleOrder
from ross_mcore.data.sample import ShardDataset
from tests.unit.data.loading import open_loader


@pytest.fixture(scope="module")
def make(open_dataset: Callable[..., ShardDataset]) -> Callable[..., StepLoader]:
    """make(**settings) -> a loader over global batches of 8."""
    dataset = open_dataset()

    def build(**settings: int) -> StepLoader:
        sizes = {"global_batch_size": 8, "micro_batch_size": 2} | settings
        return open_loader(dataset, SampleOrder(len(dataset), 5), **sizes)  # type: ignore[arg-type]

    return build


def steps(loader: StepLoader, count: int) -> list[Step]:
    with loader:
        return [next(loader) for _ in range(count)]


def contents(sample: Sample) -> tuple:
    pixels = [None if picture is None else picture.tolist() for picture in sample.pixels]
    return sample.key, sample.position, sample.tokens.tolist(), sample.labels.tolist(), sample.image_starts, pixels


def samples_of(step: Step) -> list[Sample]:
    return [sample for rows in step.micro_batches or [] for row in rows for sample in row]


def flat(found: list[Step]) -> list[tuple]:
    return [contents(sample) for step in found for rows in step.micro_batches for row in rows for sample in row]


@pytest.mark.parametrize("settings", [{"micro_batch_size": 4}, {"micro_batch_size": 1, "num_workers": 2}])
def test_the_modality_order_is_the_same_in_every_split(
    open_dataset: Callable[..., ShardDataset], settings: dict[str, int]
) -> None:
    """Five steps are more than an epoch; every process computes the epochs itself."""
    dataset = open_dataset()

    def read(**sizes: int) -> list[Step]:
        order = ModalityLengthOrder(dataset.modality_lengths(), 8, 5)
        return steps(open_loader(dataset, order, global_batch_size=8, **sizes), 5)  # type: ignore[arg-type]

    whole = read(micro_batch_size=8)
    assert flat(read(**settings)) == flat(whole)
    assert len({bool(sample.image_starts) for row in whole[0].micro_batches[0] for sample in row}) == 1


@pytest.fixture(scope="module")
def reference(make: Callable[..., StepLoader]) -> list[tuple]:
    """Five steps, more than an epoch, read by one rank without workers."""
    return flat(steps(make(), 5))


def test_a_step_is_the_global_batch_in_order(make: Callable[..., StepLoader]) -> None:
    loader = make()
    first, second = steps(loader, 2)
    assert [len(micro_batch) for micro_batch in first.micro_batches] == [2, 2, 2, 2]
    assert [sample.position for micro_batch in second.micro_batches for row in micro_batch for sample in row] == list(
        range(8, 16)
    )
    assert [row.positions.tolist() for row in second.rows] == [[place] for place in range(8, 16)]
    assert second.slots is None and second.bad == []
    keys = [sample.key for micro_batch in second.micro_batches for row in micro_batch for sample in row]
    assert keys == loader.dataset.keys(SampleOrder(len(loader.dataset), 5).sample_at(range(8, 16)))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(make: Callable[..., StepLoader], reference: list[tuple], num_workers: int) -> None:
    assert flat(steps(make(num_workers=num_workers), 5)) == reference


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 1), (1, 8), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)])
def test_every_split_gives_the_same_global_batches(
    make: Callable[..., StepLoader], reference: list[tuple], dp_size: int, micro_batch_size: int
) -> None:
    settings = {"dp_size": dp_size, "micro_batch_size": micro_batch_size}
    ranks = [steps(make(dp_rank=rank, **settings), 5) for rank in range(dp_size)]
    merged = [
        sample
        for step in range(5)
        for number in range(len(ranks[0][step].micro_batches))
        for rank in ranks
        for (sample,) in rank[step].micro_batches[number]
    ]
    assert [contents(sample) for sample in merged] == reference


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_continues_the_stream(
    make: Callable[..., StepLoader], reference: list[tuple], num_workers: int
) -> None:
    with make(num_workers=num_workers) as loader:
        next(loader), next(loader)
        state = loader.state_dict()
    assert state["consumed_samples"] == state["consumed_rows"] == 16
    assert flat(steps(make(state=state), 3)) == reference[16:]
    other = make(num_workers=num_workers, micro_batch_size=4)
    next(other)
    other.load_state_dict(state)
    assert flat(steps(other, 3)) == reference[16:]
    with pytest.raises(ValueError, match="consumed_rows"):
        other.load_state_dict({})


def test_the_digest_is_the_same_on_every_rank(make: Callable[..., StepLoader]) -> None:
    digests = set()
    for settings in ({}, {"dp_size": 2, "dp_rank": 1}, {"tp_size": 2, "tp_rank": 1}, {"micro_batch_size": 4}):
        loader = make(**settings)
        digests.add(tuple(loader.digest(step) for step in steps(loader, 3)))
    assert len(digests) == 1
    assert len(set(digests.pop())) == 3


@pytest.mark.parametrize("tp_size", [1, 2, 3, 5])
def test_tensor_parallel_ranks_share_the_pictures(
    make: Callable[..., StepLoader], reference: list[tuple], tp_size: int
) -> None:
    ranks = [steps(make(tp_rank=rank, tp_size=tp_size, micro_batch_size=4), 5) for rank in range(tp_size)]
    place = 0
    for step in zip(*ranks, strict=True):
        for micro_batch in zip(*(rank.micro_batches for rank in step), strict=True):
            batches = [collate(samples, 128, 12) for samples in micro_batch]
            for batch in batches[1:]:
                assert torch.equal(batch.tokens, batches[0].tokens) and torch.equal(batch.labels, batches[0].labels)
                assert torch.equal(batch.image_starts, batches[0].image_starts)
            counts = [len(batch.pixels) for batch in batches]
            assert sum(counts) == batches[0].num_images and max(counts) - min(counts) <= 1
            expected = [p for sample in reference[place : place + 4] for p in sample[5]]
            assert torch.cat([batch.pixels for batch in batches]).tolist() == expected
            place += 4


def test_without_pixels_nothing_is_decoded(make: Callable[..., StepLoader]) -> None:
    with make() as loader:
        full = next(loader)
    numbers = [int(number) for row in full.rows for number in row.samples]
    for one, number in zip(samples_of(full), numbers, strict=True):
        other = loader.dataset.get(number, one.position)
        assert torch.equal(one.tokens, other.tokens) and one.image_starts == other.image_starts
        assert other.pixels == [None] * len(one.pixels)


def test_a_micro_batch_of_nothing_but_problems_passes(
    one_sample: Callable[..., Path], open_dataset: Callable[..., ShardDataset]
) -> None:
    dataset = open_dataset(one_sample(b"broken"))
    with open_loader(dataset, SampleOrder(1, 0), global_batch_size=2, micro_batch_size=2, num_workers=1) as loader:
        (micro_batch,) = next(loader).micro_batches
    assert all(sample.problem for row in micro_batch for sample in row)
    assert collate(micro_batch, 8, 12).num_images == 0


def test_bad_pictures_are_reported_from_workers(
    one_sample: Callable[..., Path], open_dataset: Callable[..., ShardDataset]
) -> None:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
    dataset = open_dataset(one_sample({"conversations": turns}, [("png", b"broken")]))
    with open_loader(dataset, SampleOrder(1, 0), global_batch_size=2, micro_batch_size=1, num_workers=1) as loader:
        step = next(loader)
    assert [(bad.position, bad.ordinal) for bad in step.bad] == [(0, 0), (1, 0)]
    assert all("undecodable" in bad.reason for bad in step.bad)


def test_sizes_that_do_not_divide_are_refused(make: Callable[..., StepLoader]) -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        make(dp_size=3)
    with pytest.raises(ValueError, match="23"):
        loader = make()
        open_loader(loader.dataset, SampleOrder(22, 0), global_batch_size=8, micro_batch_size=2)


def test_workers_ignore_signals_and_end_with_close(make: Callable[..., StepLoader], reference: list[tuple]) -> None:
    others = psutil.Process().children()  # of tests before this one
    loader = make(num_workers=2)
    found = [next(loader)]
    workers = [child for child in psutil.Process().children() if child not in others]
    assert len(workers) >= 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    found += [next(loader) for _ in range(4)]
    assert flat(found) == reference
    loader.close()
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
