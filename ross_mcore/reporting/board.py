"""What TensorBoard and trackers have in common: named scalars, pictures and texts of an iteration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from ross_mcore.checked import without_secrets
from ross_mcore.data.replacement import BadSample
from ross_mcore.engine.run import Run
from ross_mcore.reporting.averages import Averages
from ross_mcore.reporting.metrics import SampleAnswer, Validation
from ross_mcore.reporting.reporter import Reporter

COMPARED = (
    *("training_stage", "lr", "projector_lr", "denoiser_lr", "vision_lr", "lr_decay_style", "lr_warmup_fraction"),
    *("weight_decay", "clip_grad", "loss_normalization", "vm_loss_rows", "global_batch_size", "global_batch_samples"),
    *("seq_length", "pack", "template", "sampler", "seed", "bf16", "tensor_model_parallel_size"),
    *("pipeline_model_parallel_size", "load", "data_path"),
)
"""Options by which runs are compared."""


class Board(Reporter, ABC):
    """Turns events into scalars, pictures and texts, for a subclass to write."""

    @abstractmethod
    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Values by name; the text before the first slash is the group."""

    @abstractmethod
    def picture_named(self, iteration: int, name: str, picture: Tensor) -> None:
        """picture [3, H, W] in [0, 1]."""

    @abstractmethod
    def text(self, iteration: int, name: str, markdown: str) -> None: ...

    def averages(self, found: Averages) -> None:
        self.scalars(found.iteration, found.scalars())

    def validated(self, found: Validation, bad: Sequence[BadSample]) -> None:
        losses = {f"validation/{tag}": value for tag, value in validation_losses(found).items()}
        self.scalars(found.iteration, losses)

    def picture(self, iteration: int, grid: Tensor) -> None:
        self.picture_named(iteration, "reconstruction", grid)

    def answers(self, iteration: int, found: Sequence[SampleAnswer]) -> None:
        self.text(iteration, "answers", answer_table(found))


def validation_losses(found: Validation) -> dict[str, float]:
    """`lm_loss/NAME` and `vm_loss/NAME` of every data set that has them."""
    losses = {
        f"{loss}/{name}": getattr(own, loss) for name, own in found.datasets.items() for loss in ("lm_loss", "vm_loss")
    }
    return {name: value for name, value in losses.items() if value is not None}


def compared_options(run: Run) -> dict[str, str | float | bool]:
    """The options by which runs are compared, without secrets and without those that are not given."""
    values = {**run.config.flat(), "train_iters": run.train_iters, "global_batch_size": run.rows_per_step}
    kept = {name: values[name] for name in (*COMPARED, "train_iters")}
    given = {name: value for name, value in kept.items() if isinstance(value, (str, float, int, bool))}
    return {name: without_secrets(value) if isinstance(value, str) else value for name, value in given.items()}


def answer_table(found: Sequence[SampleAnswer]) -> str:
    """A table in Markdown."""
    rows = [(one.question, one.answer, one.expected) for one in found]
    lines = ["| question | answer | expected |", "|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").replace("<", "&lt;").split())
