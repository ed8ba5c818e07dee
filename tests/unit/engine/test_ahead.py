"""Values made in a thread ahead of their use: order, errors, and what is left behind."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
import torch

from ross_mcore import platform
from ross_mcore.engine.ahead import made_ahead


def test_the_next_value_is_made_while_one_is_used() -> None:
    made = {number: threading.Event() for number in range(4)}

    def make(number: int) -> int:
        made[number].set()
        return number

    for number, value in enumerate(made_ahead(make, range(4))):
        assert value == number
        assert number == 3 or made[number + 1].wait(10)
        assert number > 1 or not made[number + 2].is_set()


def test_an_error_is_raised_in_its_turn_and_no_thread_is_left() -> None:
    def make(number: int) -> float:
        return 1 / number

    with closing(made_ahead(make, [2, 0, 1])) as values:
        assert next(values) == 0.5
        with pytest.raises(ZeroDivisionError):
            next(values)
    with closing(made_ahead(make, [2, 1, 1])) as values:
        next(values)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_the_thread_uses_the_callers_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a script has chosen it, without torchrun's LOCAL_RANK."""
    used = []
    monkeypatch.setattr(platform, "device", lambda: torch.device("cuda", 3))
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: used.append((gpu.index, threading.current_thread().name)))
    assert list(made_ahead(str, [1])) == ["1"]
    assert used == [(3, "ahead_0")]
