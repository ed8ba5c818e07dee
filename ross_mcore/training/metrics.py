"""Where figures go: the console line, `metrics.jsonl`, TensorBoard, and pictures beside what the model sees in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ross_mcore.architecture import ModelConfig
from ross_mcore.flops import forward_flops

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl.

    lm_loss, vm_loss, loss: means over the step's labels and images; grad_norm: before clipping; learning_rate: of this
    step, before any group's multiplier; num_tokens: labels; num_images: images; sample_digest: of the step's sample ids
    in global order; skipped_samples: empty rows; applied: false when the update was skipped because a loss or the
    gradient was not finite; step_seconds: whole step, of which data_seconds waiting for the loader.
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
    skipped_samples: int
    applied: bool


def step_flops(
    model: ModelConfig, *, llm_trains: bool, vision_trains: bool, row_tokens: int, rows: int, labels: int, images: int
) -> float:
    """Operations a step needs (recomputation not counted): forward, and backward where a gradient flows."""
    if not rows:
        return 0.0
    parts = forward_flops(model, row_tokens / rows, labels / rows, images / rows)
    language = 3 if llm_trains else 2
    return rows * (
        parts.vision_model * (3 if vision_trains else 1)
        + 3 * parts.vision_projection
        + language * (model.language.num_hidden_layers * parts.layer + parts.output_layer)
        + parts.pixel_decoder
        + 3 * parts.denoiser
    )


def duration(seconds: float) -> str:
    """3725.0 -> `1:02:05`."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a metrics file; a last line cut by a crash is left out."""
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            try:
                yield json.loads(line)
            except ValueError:
                return


class MetricsLog:
    """Writes a run's figures; one rank holds it. Lines after `iteration` (of a branch left by a crash) are dropped."""

    def __init__(self, save: Path, tensorboard: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        save.mkdir(parents=True, exist_ok=True)
        self.path = save / METRICS_FILE
        if self.path.exists():
            kept = [entry for entry in read_metrics(self.path) if entry.get("iteration", 0) <= iteration]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
            partial.replace(self.path)
        self._stream: IO[str] = self.path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(tensorboard), purge_step=iteration + 1)

    def write(self, metrics: StepMetrics) -> None:
        self._stream.write(json.dumps(asdict(metrics)) + "\n")

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
