"""Where figures go: `metrics.jsonl` and TensorBoard, and how pictures are laid out beside their reconstructions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from ross_mcore import checked

if TYPE_CHECKING:
    from ross_mcore.training.step import DataSetLosses

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"


class LogError(RuntimeError):
    """A file of figures that cannot be read or begun; the message names it."""


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl.

    lm_loss, vm_loss, loss: means over the step's labels and images; grad_norm: before clipping; learning_rate: of this
    step and `--lr`; num_tokens: labels; num_images: images; sample_digest: of the ids of the samples trained, in global
    order; step_seconds: the whole step, of which data_seconds waiting for the loader; bad_samples: those that others
    took the places of; skipped_samples: empty rows; ignored_samples: rows without any label; peak_memory_bytes: the
    most that any rank has held so far, before this step, on its GPU or in RAM; applied: false when the update was
    skipped, on request or because a number was not finite (null then, as what was not computed); datasets: what each
    data set had of it (DataSetLosses), left out when there is one.
    """

    iteration: int
    consumed_samples: int
    lm_loss: float
    vm_loss: float
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_images: int
    sample_digest: str
    step_seconds: float
    data_seconds: float
    bad_samples: int
    skipped_samples: int
    ignored_samples: int
    peak_memory_bytes: int
    applied: bool
    datasets: dict[str, DataSetLosses] = field(default_factory=dict)


@dataclass(frozen=True)
class Validation:
    """One line of validation.jsonl: what every data set had, over samples that never change."""

    iteration: int
    datasets: dict[str, DataSetLosses]
    seconds: float


def duration(seconds: float) -> str:
    """3725.0 -> `1:02:05`."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of lines that each have an iteration. Raises LogError.

    What is none is passed over: a last line cut by a crash, or one that damage made unreadable.
    """
    try:
        for line in checked.read_lines(path):
            try:
                entry = json.loads(line or b"")
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and type(entry.get("iteration")) is int:
                yield entry
    except (OSError, ValueError) as error:
        raise LogError(
            f"{path} cannot be read: {checked.reason(error)}; move it away, or give another --save"
        ) from None


def finite(value: Any) -> Any:
    """`value` with None for every number in it that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """Writes a run's figures; one rank holds it. Lines after `iteration` (of a branch left by a crash) are dropped."""

    def __init__(self, save: Path, tensorboard: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        save.mkdir(parents=True, exist_ok=True)
        self._save = save
        for name in (METRICS_FILE, VALIDATION_FILE):
            drop_after(iteration, save / name)
        self._stream: IO[str] = (save / METRICS_FILE).open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(tensorboard), purge_step=iteration + 1)

    def write(self, metrics: StepMetrics) -> None:
        entry = asdict(metrics)
        if not entry["datasets"]:
            del entry["datasets"]
        self._stream.write(json.dumps(finite(entry)) + "\n")

    def write_validation(self, found: Validation) -> None:
        with (self._save / VALIDATION_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(finite(asdict(found))) + "\n")
        losses = {
            f"validation_{loss}/{name}": getattr(own, loss)
            for name, own in found.datasets.items()
            for loss in ("lm_loss", "vm_loss")
        }
        self.scalars(found.iteration, {name: loss for name, loss in losses.items() if loss is not None})

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, iteration)
        self._board.flush()

    def picture(self, iteration: int, name: str, image: Tensor) -> None:
        """image [3, H, W] in [0, 1]."""
        self._board.add_image(name, image, iteration)
        self._board.flush()

    def text(self, name: str, value: str) -> None:
        self._board.add_text(name, value, 0)

    def close(self) -> None:
        self._stream.close()
        self._board.close()


def drop_after(iteration: int, path: Path) -> None:
    """Leaves the lines of a file, if there is one, up to `iteration`."""
    if path.exists() or path.is_symlink():
        kept = [entry for entry in read_metrics(path) if entry["iteration"] <= iteration]
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)  # what waits there may be a link
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        partial.replace(path)


def picture_grid(rows: list[Tensor], gap: int = 2) -> Tensor:
    """Rows of [K, 3, H, W] pictures in [0, 1] -> one picture [3, R (H + gap) + gap, K (W + gap) + gap], white gaps."""
    if len({tuple(row.shape) for row in rows}) != 1:
        raise ValueError(f"rows of a grid differ in shape: {[list(row.shape) for row in rows]}")
    count, channels, height, width = rows[0].shape
    grid = torch.ones(channels, len(rows) * (height + gap) + gap, count * (width + gap) + gap)
    for r, row in enumerate(rows):
        for k, picture in enumerate(row.cpu().float()):
            top, left = gap + r * (height + gap), gap + k * (width + gap)
            grid[:, top : top + height, left : left + width] = picture
    return grid
