"""What a process does for the program that started it: prints an error once per machine, and leaves it for torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Name of the variable in which torchrun gives a process the file of its error."""


def is_first_of_machine() -> bool:
    """Whether this process prints what all processes of its machine would print."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def record_failure(message: str) -> None:
    """Writes the message that torchrun's summary shows for this process. Does nothing without torchrun.

    Format: torch/distributed/elastic/multiprocessing/errors/error_handler.py; the summary prints `py_callstack`.
    """
    path = os.environ.get(ERROR_FILE)
    if path is None:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")
