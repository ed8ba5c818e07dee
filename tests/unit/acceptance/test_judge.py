"""Judging the figures of a training."""

from __future__ import annotations

import math
from typing import Any

import pytest

from examples.acceptance.judge import Speed, difference, notes, planned, problem, speed, stall


def steps(*losses: float, **changes: Any) -> list[dict[str, Any]]:
    return [
        {"iteration": n, "applied": True, "lm_loss": x, "vm_loss": x, "sample_digest": str(n)} | changes
        for n, x in enumerate(losses, start=1)
    ]


def test_a_training_that_went_well_falls_and_is_whole() -> None:
    assert problem(steps(3.0, 3.1, 2.0), 3) is None
    assert "2 iterations are logged" in str(problem(steps(3.0, 2.0), 3))
    assert "lm_loss does not fall: 3.0000" in str(problem(steps(3.0, 2.0, 3.5), 3))
    assert problem(steps(3.0, 2.0, 3.5), 3, falls=False) is None
    assert "iteration 1 was not applied" in str(problem(steps(3.0, 2.0, 1.0, applied=False), 3))


def test_difference_is_the_largest_relative_one_over_the_same_samples() -> None:
    assert difference(steps(2.0, 1.0), steps(2.0, 1.25)) == pytest.approx(0.2)
    assert difference(steps(2.0), steps(2.0, 1.0)) == math.inf
    assert difference(steps(2.0, sample_digest="a"), steps(2.0, sample_digest="b")) == math.inf
    assert difference(steps(2.0, vm_loss=None), steps(2.0, vm_loss=None)) == math.inf
    assert difference([], []) == math.inf


def test_speed_is_the_median_of_the_lines_after_the_first_ones() -> None:
    """In the console's format (reporting/console.py)."""
    line = (
        "iteration {0:>2}/12 | samples 8 | lm_loss 1.0000 | vm_loss 0.5000 | lr 1.00e-03 | grad norm 1.000 | "
        "{1:,.0f} tokens/s | {2:.1f} samples/s | 0.500 TFLOP/s/device | {3:.2f} GiB | ETA 0:01"
    )
    tokens = [1, 1, 1, 1, 4000, 2000, 3000]
    log = "\n".join(line.format(n, count, count / 100, n / 10) for n, count in enumerate(tokens, start=1))
    assert speed(log) == Speed(3000, 30, 0.5, 0.7)
    assert speed("nothing") is None


def test_figures_beside_the_speed() -> None:
    """In the words of tools/plan_layout.py and of the checkpointer."""
    table = (
        " stage  layers  ms   weights  GB a rank\n 0      16      105  4.9      37.6\n 1      12      101  4.0  30.1"
    )
    assert planned(f"{table}\nstep: 1.83 s") == pytest.approx(37.6e9 / 2**30) and planned("none") is None
    saved = "saved iteration 20: 12 MiB in 3.0 s, training blocked for {} s"
    assert stall("\n".join(saved.format(seconds) for seconds in (0.5, 2.5))) == 2.5 and stall("") is None
    assert notes("note: one\n[rank0]: note: no\nnote: two\n") == ["one", "two"]
