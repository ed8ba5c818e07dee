from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ross_mcore.engine.adam import PlainAdam
from ross_mcore.engine.optimizer import (
    PART_TAGS,
    learning_rate,
    peak_rates,
    set_hyperparameters,
    updates_weights,
    warmup_iterations,
)
from ross_mcore.options import OptimizerOptions

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
def test_schedule_starts_at_zero_peaks_after_warmup_and_ends_at_the_minimum(style: str) -> None:
    options = OptimizerOptions(lr=2.0, min_lr=0.5, lr_decay_style=style, lr_warmup_iters=10)  # type: ignore[arg-type]
    rates = [learning_rate(step, 100, options) for step in range(101)]
    assert rates[0] == 0 and rates[5] == 1.0 and rates[10] == 2.0
    assert rates[100] == (2.0 if style == "constant" else 0.5)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


@pytest.mark.parametrize("run", json.loads((GOLDEN / "data" / "lr_schedule.json").read_text()))
def test_schedule_is_the_recorded_one(run: dict) -> None:
    """The reference's cosine schedule of Hugging Face with ceil(3%) warm-up, two groups; equal up to rounding."""
    options = OptimizerOptions(lr=run["base"], denoiser_lr=run["second_group"], lr_warmup_fraction=0.03)
    assert warmup_iterations(options, run["total_steps"]) == run["warmup"]
    second = peak_rates(options)[PART_TAGS["denoiser"]]
    for step, recorded in enumerate(run["lr_used_at_step"]):
        rates = [learning_rate(step, run["total_steps"], options, peak) for peak in (None, second)]
        assert rates == pytest.approx(recorded, rel=1e-12, abs=1e-18)


def test_the_first_step_of_a_warm_up_updates_nothing() -> None:
    """And no step does when every rate is 0."""
    assert [updates_weights(step, 10, OptimizerOptions(lr=1.0)) for step in (0, 1, 9)] == [False, True, True]
    assert updates_weights(0, 10, OptimizerOptions(lr=0.0, denoiser_lr=1.0, lr_warmup_iters=0))
    assert not updates_weights(5, 10, OptimizerOptions(lr=0.0))


@given(st.integers(1, 10_000), st.floats(0, 0.99))
def test_warmup_never_exceeds_the_run(train_iters: int, fraction: float) -> None:
    options = OptimizerOptions(lr=1.0, lr_warmup_fraction=fraction)
    assert 0 <= warmup_iterations(options, train_iters) <= train_iters


def test_every_part_has_a_rate_and_norms_have_no_decay() -> None:
    """Also with `--lr 0`, where only the denoiser trains; values from a checkpoint are overwritten."""
    options = OptimizerOptions(lr=0.0, denoiser_lr=1e-4, weight_decay=0.1, lr_warmup_iters=0, adam_beta2=0.5)
    groups = [
        {"lr_mult": tag, "wd_mult": wd_mult, "lr": 7.0, "weight_decay": 7.0, "betas": (0, 0), "eps": 7.0}
        for tag in (1.0, *PART_TAGS.values())
        for wd_mult in (1.0, 0.0)
    ]

    class Optimizer:
        param_groups = groups

    set_hyperparameters(Optimizer(), 0, 10, options)  # type: ignore[arg-type]
    rates = {group["lr_mult"]: group["lr"] for group in groups}
    assert rates == {1.0: 0.0, **dict.fromkeys(PART_TAGS.values(), 0.0), PART_TAGS["denoiser"]: 1e-4}
    assert {(group["wd_mult"], group["weight_decay"]) for group in groups} == {(1.0, 0.1), (0.0, 0.0)}
    assert all(group["betas"] == (0.9, 0.5) and group["eps"] == 1e-8 for group in groups)


def test_plain_adam_is_torchs_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    optimizers = PlainAdam([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(5):
        gradient = torch.randn(5)
        for parameter, optimizer in zip((ours, theirs), optimizers):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert optimizers[0].param_groups[0]["step"] == 5


def test_plain_adam_counts_the_steps_of_empty_groups() -> None:
    frozen = torch.nn.Parameter(torch.ones(1))
    optimizer = PlainAdam([frozen])
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1 and not optimizer.state[frozen]
