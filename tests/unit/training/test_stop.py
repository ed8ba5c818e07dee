from __future__ import annotations

import os
import signal

import pytest

from ross_mcore.training.stop import Request, Requests


def test_a_request_to_save_is_returned_once_and_the_run_continues() -> None:
    with Requests(None) as requests:
        assert requests.pending() is Request.NOTHING
        os.kill(os.getpid(), signal.SIGUSR1)
        assert [requests.pending() for _ in range(2)] == [Request.SAVE, Request.NOTHING]
        assert requests.reason is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_stop_outranks_a_request_to_save(number: signal.Signals) -> None:
    with Requests(None) as requests:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), number)
        assert [requests.pending() for _ in range(2)] == [Request.STOP] * 2
        assert requests.reason == number.name


def test_the_launchers_copy_of_a_ctrl_c_does_not_abort() -> None:
    with Requests(None) as requests:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.pending() is Request.STOP


def test_the_time_limit_ends_the_run() -> None:
    with Requests(1e-9) as requests:
        assert requests.pending() is Request.STOP and requests.reason == "--exit-duration-in-mins"
    with Requests(60.0) as requests:
        assert requests.pending() is Request.NOTHING


def test_signal_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with Requests(None):
        pass
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1
