"""A run that learned nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ross_mcore.engine.losses import Losses
from ross_mcore.errors import TrainingError
from ross_mcore.guards.learned import Learned


def step(iteration: int, kind: str, learned_before: bool = False) -> Any:
    """A finished step: `learned`, `skipped`, `nan` or `empty`."""
    losses = {"learned": Losses(1.0, None), "nan": Losses(float("nan"), None), "empty": Losses(None, None)}
    trained = None if kind == "skipped" else SimpleNamespace(losses=losses[kind], applied=kind != "nan")
    recent = (1.0,) if learned_before else ()
    state = SimpleNamespace(iteration=iteration, recent_lm_losses=recent, recent_vm_losses=())
    return SimpleNamespace(state=state, trained=trained)


def end_of(kinds: list[str], learned_before: bool = False, train_iters: int = 8) -> str:
    """The error after the last step of a run whose last iterations are `kinds`, "" if there is none."""
    guard = Learned(SimpleNamespace(train_iters=train_iters), print)  # type: ignore[arg-type]
    *first, last = enumerate(kinds, train_iters - len(kinds) + 1)
    for iteration, kind in first:
        guard.after_step(step(iteration, kind, learned_before), [])
    try:
        guard.after_step(step(*last, learned_before), [])
    except TrainingError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        (["skipped"] * 8, "iterations 1 to 8: 8 named by --skip-iterations; .* name fewer iterations"),
        (["nan", "nan", "skipped"], "iterations 6 to 8: 2 not finite, 1 named by --skip-iterations; .* lower --lr"),
        (["empty"] * 8, "8 without any label or image; the last iteration is not saved. To train, raise --seq-length"),
    ],
)
def test_a_run_that_learned_nothing_ends_with_an_error(kinds: list[str], says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        raise TrainingError(end_of(kinds))


def test_one_step_is_enough() -> None:
    assert not end_of(["nan", "learned", "skipped"])
    assert not end_of(["skipped", "skipped"], learned_before=True)
    assert "1 not finite" in end_of(["nan"], learned_before=True)
