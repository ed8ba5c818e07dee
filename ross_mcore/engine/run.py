"""A training run, and the steps that its loop passes on. training/opening.py opens a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ross_mcore.architecture import ModelConfig, Precomputed
from ross_mcore.checkpoint.claim import Claim
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.config import Config
from ross_mcore.data.loader import StepLoader
from ross_mcore.data.replacement import BadSample
from ross_mcore.data.sources import MixtureDataset
from ross_mcore.engine.engine import Engine, Trained
from ross_mcore.engine.state import TrainState
from ross_mcore.engine.step import AgreedStep, Request
from ross_mcore.parallel.groups import Groups


@dataclass(frozen=True)
class Run:
    """The constants of a run.

    claim: the first rank's claim on the folder of --save; start: the checkpoint the run starts from; resume: whether
    that checkpoint's run is resumed; held_out: validation data; rows_per_step: rows of the global batch;
    warnings: about what the run will learn, for its start; is_stopping: whether this rank was asked to stop, so that
    it must not begin anything long; kernels: which layers compute the language model, and why.
    """

    engine: Engine
    claim: Claim | None
    start: Checkpoint
    resume: bool
    dataset: MixtureDataset
    held_out: MixtureDataset | None
    precomputed: Precomputed
    loader: StepLoader
    rows_per_step: int
    warnings: Sequence[str] = ()
    is_stopping: Callable[[], bool] = lambda: False
    kernels: str = ""

    @property
    def config(self) -> Config:
        return self.engine.config

    @property
    def model_config(self) -> ModelConfig:
        return self.engine.model_config

    @property
    def groups(self) -> Groups:
        return self.engine.groups

    @property
    def train_iters(self) -> int:
        return self.engine.train_iters

    @property
    def save_folder(self) -> Path:
        return Path(self.config.checkpoint.save or "")

    def is_due(self, iteration: int, interval: int | None) -> bool:
        """Whether an iteration is a multiple of `interval`, or the last of the run."""
        return iteration == self.train_iters or bool(interval and iteration % interval == 0)


@dataclass(frozen=True)
class ReadStep:
    """A step that was read and not yet trained on.

    before: the state before it; replaced: the samples that others replace; skipped: by --skip-iterations, so that the
    step is not computed; began: time.perf_counter() before reading.
    """

    before: TrainState
    step: AgreedStep
    replaced: list[BadSample]
    skipped: bool
    began: float

    @property
    def iteration(self) -> int:
        return self.before.iteration + 1

    @property
    def request(self) -> Request:
        """The strongest request of all ranks."""
        return self.step.size.request

    @property
    def interrupted(self) -> bool:
        """Whether a rank was asked to stop, so that the step is not trained on."""
        return self.step.size.interrupted

    @property
    def bad(self) -> list[BadSample]:
        """The replaced samples that count as bad."""
        return [sample for sample in self.replaced if sample.is_bad]

    @property
    def consumed_samples(self) -> int:
        """Samples of the stream up to the end of this step."""
        return self.step.loaded.cursor["consumed_samples"]

    @property
    def bad_samples_so_far(self) -> int:
        return self.before.bad_samples + len(self.bad)


@dataclass(frozen=True)
class StepResult:
    """A finished step. state: after it; trained: None for a skipped one; step_seconds: including reading."""

    read: ReadStep
    state: TrainState
    trained: Trained | None
    step_seconds: float

    @property
    def applied(self) -> bool:
        """Whether the step changed the weights."""
        return self.trained is not None and self.trained.applied
