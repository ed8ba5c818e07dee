"""The figures of a step and of a validation."""

from __future__ import annotations

from dataclasses import dataclass, field

from ross_mcore.engine.losses import DataSetLosses, Losses
from ross_mcore.engine.optimizer import learning_rate, peak_rates, trained_parts
from ross_mcore.engine.run import Run, StepResult
from ross_mcore.parts import DENOISER, Part
from ross_mcore.reporting.utilization import Utilization


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl.

    epoch: passes over the data so far; lm_loss, vm_loss: means over the step's labels and images; loss: their sum, in
    which a loss over nothing is 0; grad_norm: before clipping; learning_rate: that of --lr in this step; grad_norms,
    learning_rates: those of each part that trains; vm_loss_by_timestep: means over the draws in ranges of timesteps,
    absent without a denoiser; mfu: the share of the GPUs' peak, null where it is not known; num_tokens: labels;
    num_images: images; sample_digest: hash of the ids of the trained samples, in global order; step_seconds: the whole
    step; data_seconds: its wait for the loader; bad_samples: replaced ones; skipped_samples: empty rows;
    ignored_samples: rows without any label; peak_memory_bytes: the largest of all ranks up to this step, on the GPU or
    in RAM; fill: share of the computed tokens that are not padding; applied: false when the update was skipped, on
    request or because a number was not finite; datasets: the losses of each data set, absent with a single one. A loss
    over nothing is null: lm_loss of a step without labels, vm_loss of a step without images or of a model without a
    denoiser. So are numbers that are not finite, and those of a skipped step.
    """

    iteration: int
    consumed_samples: int
    lm_loss: float | None
    vm_loss: float | None
    loss: float | None
    grad_norm: float | None
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
    fill: float | None
    applied: bool
    epoch: float = 0.0
    mfu: float | None = None
    grad_norms: dict[str, float] = field(default_factory=dict)
    learning_rates: dict[str, float] = field(default_factory=dict)
    vm_loss_by_timestep: dict[str, float | None] = field(default_factory=dict)
    datasets: dict[str, DataSetLosses] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run, result: StepResult) -> StepMetrics:
        """The figures of a step. A skipped step has no losses."""
        read, trained = result.read, result.trained
        size, names = read.step.size, run.dataset.names
        losses = Losses(None, None) if trained is None else trained.losses
        samples = result.state.consumed_samples - read.before.consumed_samples
        is_computed = trained is not None and size.row_tokens > 0
        options, parts = run.config.optimizer, reported_parts(run)
        peaks, done = peak_rates(options), (read.before.iteration, run.train_iters, options)
        norms = {} if trained is None else trained.norms.parts
        return cls(
            iteration=result.state.iteration,
            consumed_samples=result.state.consumed_samples,
            lm_loss=losses.lm_loss,
            vm_loss=losses.vm_loss,
            loss=None if trained is None else losses.loss,
            grad_norm=None if trained is None else trained.grad_norm,
            learning_rate=learning_rate(*done),
            num_tokens=0 if trained is None else size.label_tokens,
            num_images=0 if trained is None else size.images,
            sample_digest=run.loader.digest(read.step.loaded),
            step_seconds=result.step_seconds,
            data_seconds=read.step.read_seconds,
            bad_samples=len(read.bad),
            skipped_samples=size.skipped_samples,
            ignored_samples=size.ignored_samples,
            peak_memory_bytes=size.peak_memory_bytes,
            fill=None if trained is None else size.row_tokens / size.slots,
            applied=result.applied,
            epoch=result.state.consumed_samples / len(run.dataset),
            mfu=Utilization.of(run, [size], samples, result.step_seconds).mfu if is_computed else None,
            grad_norms={part.figure: norms[part.optimizer_tag] for part in parts if norms},
            learning_rates={part.figure: learning_rate(*done, peaks[part.optimizer_tag]) for part in parts},
            vm_loss_by_timestep=losses.timesteps,
            datasets=dict(zip(names, losses.datasets)) if len(names) > 1 else {},
        )


def reported_parts(run: Run) -> list[Part]:
    """The parts that train, in the order of the forward pass."""
    has_denoiser = run.model_config.denoiser is not None
    return [part for part in trained_parts(run.config) if part is not DENOISER or has_denoiser]


@dataclass(frozen=True)
class SampleAnswer:
    """One line of answers.jsonl: a greedy answer to the question of a held-out sample, and the sample's own."""

    iteration: int
    dataset: str
    sample: str
    question: str
    expected: str
    answer: str


@dataclass(frozen=True)
class Validation:
    """One line of validation.jsonl: the losses of every data set, over the same samples every time."""

    iteration: int
    datasets: dict[str, DataSetLosses]
    seconds: float


def loss_text(loss: float | None) -> str:
    """0.5 -> `0.5000`; a loss over nothing -> `-`."""
    return "-" if loss is None else f"{loss:.4f}"


def duration(seconds: float) -> str:
    """3725.0 -> `1:02:05`."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
