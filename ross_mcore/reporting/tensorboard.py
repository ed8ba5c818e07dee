"""TensorBoard's file of events.

Written without torch's SummaryWriter, whose thread ends with a traceback at the first failed write.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import RecordWriter, summary

from ross_mcore import checked
from ross_mcore.engine.run import Run
from ross_mcore.engine.state import TrainState
from ross_mcore.errors import LogError
from ross_mcore.logs import LogFile, append
from ross_mcore.reporting.board import Board, compared_options


class TensorBoard(Board):
    """Continues after a state: TensorBoard hides later iterations in other files of the folder."""

    def __init__(self, run: Run, state: TrainState) -> None:
        folder = Path(run.config.logging.tensorboard_dir or run.save_folder / "tensorboard")
        path = folder / f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        version, purge = Event(file_version="brain.Event:2"), SessionLog(status=SessionLog.START)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            append(path, _records(version, Event(step=state.iteration + 1, session_log=purge)))
        except OSError as error:
            reason = "it is not a folder" if isinstance(error, FileExistsError) else checked.reason(error)
            raise LogError(f"{folder} cannot be written: {reason}; give another --tensorboard-dir") from None
        self._file = LogFile(path)

    def start(self, run: Run, state: TrainState) -> None:
        options = "\n".join(f"    {name}: {value}" for name, value in run.config.flat().items())
        self.text(0, "options", checked.without_secrets(options))
        names = [] if run.held_out is None else run.held_out.names
        losses = ["lm_loss"] if run.model_config.denoiser is None else ["lm_loss", "vm_loss"]
        shown = [
            *(f"loss/{loss}" for loss in losses),
            *(f"validation/{loss}/{name}" for name in names for loss in losses),
        ]
        experiment, began, self._ended = summary.hparams(compared_options(run), dict.fromkeys(shown, 0.0))
        self._add(0, experiment, began)

    def finish(self, state: TrainState, stopped_by: str | None) -> None:
        if stopped_by is None:
            self._add(state.iteration, self._ended)

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self._add(iteration, *(summary.scalar(name, value) for name, value in values.items()))

    def picture_named(self, iteration: int, name: str, picture: Tensor) -> None:
        self._add(iteration, summary.image(name, picture, dataformats="CHW"))

    def text(self, iteration: int, name: str, markdown: str) -> None:
        self._add(iteration, summary.text(name, markdown))

    def _add(self, iteration: int, *found: Summary) -> None:
        self._file.append(_records(*(Event(step=iteration, summary=one) for one in found)))


def _records(*events: Event) -> bytes:
    stream = io.BytesIO()
    writer = RecordWriter(stream)
    for event in events:
        event.wall_time = time.time()
        writer.write(event.SerializeToString())
    return stream.getvalue()
