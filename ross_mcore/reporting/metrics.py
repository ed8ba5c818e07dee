"""Where figures go: `metrics.jsonl` and TensorBoard, and how pictures are laid out beside their reconstructions."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ross_mcore.reporting.logs import JsonLines

if TYPE_CHECKING:
    from ross_mcore.engine.step import DataSetLosses

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"


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


class MetricsLog:
    """Writes a run's figures from `iteration` on; one rank holds it. Raises LogError where it cannot be begun."""

    def __init__(self, save: Path, tensorboard: Path, iteration: int) -> None:
        from ross_mcore.reporting.tensorboard import Board  # one rank needs TensorBoard

        self._metrics = JsonLines(save / METRICS_FILE, iteration)
        self._metrics.append(b"")  # the file is there from the start, for who follows it
        self._validation = JsonLines(save / VALIDATION_FILE, iteration)
        self._board = Board(tensorboard, iteration)

    def write(self, metrics: StepMetrics) -> None:
        entry = asdict(metrics)
        if not entry["datasets"]:
            del entry["datasets"]
        self._metrics.add(entry)

    def write_validation(self, found: Validation) -> None:
        self._validation.add(asdict(found))
        losses = {
            f"validation_{loss}/{name}": getattr(own, loss)
            for name, own in found.datasets.items()
            for loss in ("lm_loss", "vm_loss")
        }
        self.scalars(found.iteration, {name: loss for name, loss in losses.items() if loss is not None})

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        self._board.scalars(iteration, values)

    def picture(self, iteration: int, name: str, image: Tensor) -> None:
        """image [3, H, W] in [0, 1]."""
        self._board.picture(iteration, name, image)

    def text(self, name: str, value: str) -> None:
        self._board.text(name, value)


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
