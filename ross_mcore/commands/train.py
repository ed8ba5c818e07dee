"""Trains a ROSS model: options -> Config -> train(config)."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from ross_mcore.commands import as_started
from ross_mcore.launcher import record_failure

if TYPE_CHECKING:
    from ross_mcore.config import Config

SCRIPT = "pretrain_ross.py"


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    """Trains and returns the exit status: 0 when finished or stopped on request, 2 for bad input."""
    from ross_mcore.flags import parse

    config = parse(arguments, prog=prog)
    return train_status(config, prog)  # heavy imports come after the arguments are checked


def train_status(config: Config, prog: str = SCRIPT) -> int:
    """Trains; returns 0 when finished or stopped on request, 2 after an error, which the first rank prints.

    Returns 128 + the number of the signal after SIGTERM or Ctrl-C before training began.
    """
    from ross_mcore.errors import UserError
    from ross_mcore.logs import complain
    from ross_mcore.training.loop import train
    from ross_mcore.training.stop import StoppedAtStart

    is_first = os.environ.get("RANK", "0") == "0"
    try:
        train(config)
    except (KeyboardInterrupt, StoppedAtStart) as stop:
        if is_first:
            complain(f"{prog}: {str(stop) or 'interrupted'}")
        return 128 + (signal.SIGTERM if isinstance(stop, StoppedAtStart) else signal.SIGINT)
    except UserError as error:
        text = as_started(f"{prog}: error: {error}", prog)
        record_failure(text)
        if is_first:
            complain(text)
        return 2
    return 0


def run(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    """Runs `main` as the only work of a process: handles signals until training does, and exits at once on failure."""

    def end_at_once(number: int, _: object) -> NoReturn:
        """Handles signals before training does (training/stop.py), for example during imports, which take seconds."""
        what = (
            "interrupted" if number == signal.SIGINT else "stopped by SIGTERM before training began; nothing is saved"
        )
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):
                os.write(2, f"{prog}: {what}\n".encode())
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_at_once)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a request to save, but there is nothing to save yet
    try:
        status = main(arguments, prog)
    except Exception:
        record_failure(traceback.format_exc())
        raise
    if status:  # torch's threads sometimes abort a process while its interpreter ends
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)
    return status
