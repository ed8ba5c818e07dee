"""Folders of runs that no training wrote."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import RecordWriter, summary

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&lt;\x1b[31m"


def metrics(iteration: int, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {
        "iteration": iteration,
        "consumed_samples": 8 * iteration,
        "lm_loss": 1 / iteration,
        "vm_loss": None,
        "grad_norm": 0.5 + iteration % 2,
        "step_seconds": 0.5,
        "data_seconds": 0.05,
        "peak_memory_bytes": 2**30,
        "fill": 0.9,
        **more,
    }


def lines(entries: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def picture(level: int, size: tuple[int, int] = (12, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (level, 0, 0)).save(stream, format="PNG")
    return stream.getvalue()


def image(step: int, data: bytes) -> Event:
    shown = Summary.Image(height=8, width=12, colorspace=3, encoded_image_string=data)
    return Event(step=step, summary=Summary(value=[Summary.Value(tag="reconstruction", image=shown)]))


def start(step: int) -> Event:
    return Event(step=step, wall_time=1.7e9 + step, session_log=SessionLog(status=SessionLog.START))


def scalar(step: int, tag: str, value: float) -> Event:
    return Event(step=step, summary=summary.scalar(tag, value))


def write_events(path: Path, *events: Event) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    writer = RecordWriter(stream)
    for event in events:
        writer.write(event.SerializeToString())
    path.write_bytes(stream.getvalue())


def make_run(
    folder: Path, iterations: int = 30, options: str = "    lr: 0.1\n    seed: 1", text: str = "plain"
) -> Path:
    """A run with everything that a report shows; `text` stands wherever a file has text from outside."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(lines([metrics(n) for n in range(1, iterations + 1)]))
    losses = {text: {"lm_loss": 0.7, "vm_loss": 0.2, "samples": 4}}
    validations = [{"iteration": n, "datasets": losses} for n in (10, 20)]
    (folder / "validation.jsonl").write_text(lines(validations))
    sample = {"position": 1, "key": text, "shard": text, "lm_loss": 1.0, "vm_loss": None}
    incident = {"iteration": 7, "kind": text, "reason": text, "samples": [sample] * 5}
    (folder / "incidents.jsonl").write_text(lines([incident]))
    bad = {"iteration": 3, "position": 1, "shard": text, "key": text, "reason": f"{text}: {text}", "replaced_by": None}
    (folder / "quarantine.jsonl").write_text(lines([bad] * 4 + [{**bad, "reason": "empty"}]))
    asked = {"dataset": text, "sample": text, "question": text, "expected": text}
    (folder / "answers.jsonl").write_text(lines([{"iteration": n, "answer": f"{text} {n}", **asked} for n in (10, 20)]))
    texts = Event(step=0, summary=summary.text("options", f"{options}\n    data_path: {text}"))
    pictures = [image(n, picture(n)) for n in (10, 20, 30)]
    write_events(folder / "tensorboard" / "events.out.tfevents.1.host.1", start(1), texts, *pictures)
    return folder
