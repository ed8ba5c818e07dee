from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ross_mcore import platform
from ross_mcore.batch import IGNORE_INDEX, Sample
from ross_mcore.data.loader import Step
from ross_mcore.engine.losses import (
    DataSetLosses,
    MicroBatchLosses,
    Objective,
    combine_losses,
    loss_weights,
    micro_batch_weights,
    weighted_loss,
)
from ross_mcore.engine.step import StepSize, agree_on_step
from ross_mcore.errors import ShardReadError
from ross_mcore.options import TrainingOptions

ONLY: Any = SimpleNamespace(stage=SimpleNamespace(is_last=True), tensor_rank=0, layout=SimpleNamespace(data_parallel=1))
"""The groups of a single rank."""


def test_each_loss_has_its_own_weight() -> None:
    """Gradients of the two sums: 1 / labels and 1 / images of the step, independent of this micro-batch."""
    sums = torch.tensor([[4.0, 3.0], [2.0, 5.0]], requires_grad=True)
    part, divide_by, kept = weighted_loss(sums, rows("i", "t"), loss_weights(labels=3, images=4))
    part.backward()
    assert part.item() == 6 / 3 + 8 / 4
    assert sums.grad is not None and torch.equal(sums.grad, torch.tensor([[1 / 3, 1 / 4]] * 2))
    assert divide_by.item() == 0 and kept.terms.tolist() == [2.0, 2.0] and not kept.terms.requires_grad


@pytest.mark.parametrize("blanks", [0, 3])
def test_the_loss_over_nothing_is_zero_and_keeps_its_graph(blanks: int) -> None:
    sums = torch.tensor([[0.0, 5.0 * blanks]], requires_grad=True)
    part, _, _ = weighted_loss(sums, rows("t"), loss_weights(labels=0, images=0, blanks=blanks))
    assert part.item() == 0 and part.requires_grad


def rows(*kinds: str) -> list[Sample]:
    """`i`: a picture and two labels; `t`: text with three labels; `s`: skipped; `n`: a picture, every label ignored."""

    def sample(kind: str) -> Sample:
        labels = torch.tensor([IGNORE_INDEX, *([1] * {"i": 2, "t": 3, "s": 0, "n": 0}[kind])])
        return Sample(kind, 0, labels, labels, [0] * (kind in "in"), problem="bad" if kind == "s" else None)

    return [sample(kind) for kind in kinds]


@pytest.mark.parametrize(
    ("normalization", "vm_rows", "expected"),
    [
        ("global", "images", (1 / 20, 1 / 4)),
        ("global", "all", (1 / 20, 1 / (4 + 3))),
        ("microbatch", "images", (1 / (8 * (2 + 3)), 1 / (8 * 1))),
        ("microbatch", "all", (1 / (8 * (2 + 3)), 1 / (8 * 2))),
    ],
)
def test_the_four_normalizations(normalization: str, vm_rows: str, expected: tuple[float, float]) -> None:
    """A step of 20 labels, 4 images and 3 blank rows, in 8 micro-batches of which this one has `i t s`."""
    size = StepSize((8,), 20, images=4, blank_samples=3, row_tokens=9, skipped_samples=1, ignored_samples=0)
    options = Objective.of(TrainingOptions(loss_normalization=normalization, vm_loss_rows=vm_rows))  # type: ignore[arg-type]
    assert micro_batch_weights(rows("i", "t", "s"), size, options, count=8) == pytest.approx(expected)
    without_picture = micro_batch_weights(rows("t", "s"), size, options, count=8)
    assert without_picture[1] == (expected[1] if normalization == "global" else 0)


@pytest.fixture
def only_rank() -> Iterator[None]:
    if dist.is_initialized():  # by a test before this one
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("only_rank")
@pytest.mark.parametrize(("with_blank_samples", "first_vm_loss"), [(False, 7.0), (True, (7 + 5) / 2)])
def test_losses_are_the_sum_of_the_terms_and_split_by_data_set(with_blank_samples: bool, first_vm_loss: float) -> None:
    """Two micro-batches: data set 0 has a picture and a text, 1 a picture without labels, 2 a skipped sample."""
    groups = SimpleNamespace(tensor_rank=0)
    samples = [replace(sample, source=source) for sample, source in zip(rows("i", "n", "t", "s"), (0, 1, 0, 2))]
    sums = torch.tensor([[4.0, 7.0], [0.0, 3.0], [6.0, 5.0 * with_blank_samples], [0.0, 0.0]], dtype=torch.float64)
    draws = torch.tensor([[0.5, 1, 2.5, 3], [0.25, 1, 0, 0], [0, 0, 2, 1], [0, 0, 0, 0]], dtype=torch.float64)
    sums = torch.cat([sums, draws, torch.zeros(4, 4, dtype=torch.float64)], dim=1)
    kept = [
        MicroBatchLosses.of(samples[place], terms, sums[place], with_blank_samples)
        for place, terms in ((slice(0, 1), torch.tensor([0.5, 0.25])), (slice(1, 4), torch.tensor([1.5, 1.25])))
    ]
    losses = combine_losses(kept, groups, torch.device("cpu"), denoises=True, num_datasets=3)  # type: ignore[arg-type]
    assert (losses.lm_loss, losses.vm_loss, losses.loss) == (2.0, 1.5, 3.5)
    assert list(losses.timesteps.values()) == [0.75 / 2, 4.5 / 4, None, None]
    assert losses.datasets == (
        DataSetLosses(2, 2 + 3, 1, 10 / 5, first_vm_loss),
        DataSetLosses(1, 0, 1, None, 3.0),
        DataSetLosses(0, 0, 0, None, None),
    )


@pytest.mark.usefixtures("only_rank")
def test_rows_without_labels_are_counted_beside_skipped_ones() -> None:
    micro_batches = [[rows("i", "n"), rows("s")], [rows("t", "n", "n")]]
    step = Step([], None, micro_batches, [], {})
    size = agree_on_step(step, ONLY, 8, torch.device("cpu"))
    assert (size.skipped_samples, size.ignored_samples) == (1, 3)
    assert (size.label_tokens, size.images, size.blank_samples) == (2 + 3, 4, 1)
    assert 0 < size.peak_memory_bytes <= platform.peak_memory_bytes()


@pytest.mark.usefixtures("only_rank")
@pytest.mark.parametrize("slots", [None, [[[9, 4], [5]], [[17], [2]]]])
def test_a_micro_batch_is_as_long_as_its_longest_row(slots: list[list[list[int]]] | None) -> None:
    """Rows of 4 + 3 and 5 tokens in the first of two micro-batches, 1 and 2 in the second; or as planned."""
    row = [[Sample("", 0, tokens := torch.zeros(n), tokens) for n in lengths] for lengths in ([4, 3], [5], [1], [2])]
    agreed = agree_on_step(Step([], slots, [row[:2], row[2:]], [], {}), ONLY, 4, torch.device("cpu"))
    assert agreed.seq_lengths == ((8, 4) if slots is None else (16, 20))
    assert (agreed.row_tokens, agreed.slots) == (15, 2 * sum(agreed.seq_lengths))


@pytest.mark.usefixtures("only_rank")
@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (ShardReadError("a.tar: Input/output error"), ShardReadError, r"a\.tar: Input/output error \(rank 0\)"),
        (RuntimeError("a worker was killed"), RuntimeError, "a worker was killed"),
    ],
)
def test_a_rank_that_cannot_read_is_named(failure: Exception, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        agree_on_step(Step([], None, None, [], {}, failure), ONLY, 8, torch.device("cpu"))


def test_a_step_without_any_label_is_zero_and_not_nan() -> None:
    size = StepSize((8,), 0, images=1, blank_samples=0, row_tokens=1, skipped_samples=0, ignored_samples=1)
    for normalization in ("global", "microbatch"):
        options = Objective.of(TrainingOptions(loss_normalization=normalization))  # type: ignore[arg-type]
        weights = micro_batch_weights(rows("n"), size, options, count=1)
        total, _, kept = weighted_loss(torch.tensor([[0.0, 3.0]]), rows("n"), weights)
        assert kept.terms.tolist() == [0, 3] and total == 3
