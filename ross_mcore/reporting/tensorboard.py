"""A file of TensorBoard's.

Its records are those of torch's SummaryWriter, whose thread ends with a traceback at the first it cannot write.
"""

from __future__ import annotations

import io
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import RecordWriter, summary

from ross_mcore import checked
from ross_mcore.errors import LogError
from ross_mcore.reporting.logs import LogFile, append


class Board:
    """Goes on after `iteration`: TensorBoard no longer shows what others of the folder say of later ones.

    Raises LogError where the file cannot be begun.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        path = folder / f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        version, purge = Event(file_version="brain.Event:2"), SessionLog(status=SessionLog.START)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            append(path, _records(version, Event(step=iteration + 1, session_log=purge)))
        except OSError as error:
            reason = "it is not a folder" if isinstance(error, FileExistsError) else checked.reason(error)
            raise LogError(f"{folder} cannot be written: {reason}; give another --tensorboard-dir") from None
        self._file = LogFile(path)

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        self._add(iteration, *(summary.scalar(name, value) for name, value in values.items()))

    def picture(self, iteration: int, name: str, image: Tensor) -> None:
        """image [3, H, W] in [0, 1]."""
        self._add(iteration, summary.image(name, image, dataformats="CHW"))

    def text(self, name: str, value: str) -> None:
        self._add(0, summary.text(name, value))

    def _add(self, iteration: int, *found: Summary) -> None:
        self._file.append(_records(*(Event(step=iteration, summary=one) for one in found)))


def _records(*events: Event) -> bytes:
    stream = io.BytesIO()
    writer = RecordWriter(stream)
    for event in events:
        event.wall_time = time.time()
        writer.write(event.SerializeToString())
    return stream.getvalue()
