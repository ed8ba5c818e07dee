from __future__ import annotations

import pytest
import torch

from ross_mcore import platform

platform.prepare()

from ross_mcore.training.step import StepSize, _loss, combine_losses  # noqa: E402


def test_each_loss_has_its_own_global_denominator() -> None:
    """Gradients of the two sums: 1 / labels and 1 / images, whatever this micro-batch holds."""
    sums = torch.tensor([6.0, 8.0], requires_grad=True)
    part, divide_by, log = _loss(sums, label_tokens=3, images=4)
    part.backward()
    assert part.item() == 6 / 3 + 8 / 4
    assert sums.grad is not None and torch.equal(sums.grad, torch.tensor([1 / 3, 1 / 4]))
    assert divide_by.item() == 0 and not log.requires_grad


def test_nothing_to_learn_from_is_zero_and_keeps_its_graph() -> None:
    sums = torch.zeros(2, requires_grad=True)
    part, _, _ = _loss(sums, label_tokens=0, images=0)
    assert part.item() == 0 and part.requires_grad


def test_losses_are_means_over_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnlyRank:
        tensor_rank = 0

    monkeypatch.setattr("ross_mcore.training.step.sum_over_ranks", lambda values, device: values)
    size = StepSize(seq_length=8, label_tokens=5, images=2, row_tokens=9, skipped_samples=0, stop=False)
    sums = [torch.tensor([4.0, 1.0]), torch.tensor([6.0, 2.0])]
    losses = combine_losses(sums, size, OnlyRank(), torch.device("cpu"))  # type: ignore[arg-type]
    assert (losses.lm_loss, losses.vm_loss, losses.loss) == (2.0, 1.5, 3.5)
