"""What a training run works with, and what passes between the parts of its loop. training/opening.py opens a run."""

from __future__ import annotations

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
from ross_mcore.engine.step import AgreedStep, Asked
from ross_mcore.parallel.groups import Groups


@dataclass(frozen=True)
class Run:
    """What stays the same while a run trains.

    claim: the first rank's hold on the folder of --save; start: the checkpoint begun from; resume: whether its run is
    continued; held_out: the data of validation; rows_per_step: of the global batch.
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
        """Whether an iteration is one of those every `interval`, or the last of the run."""
        return iteration == self.train_iters or bool(interval and iteration % interval == 0)


@dataclass(frozen=True)
class ReadStep:
    """A step that was read and not yet trained on.

    before: the state that it follows; replaced: the samples that others stand in for; skipped: named by
    --skip-iterations, so that nothing of it is computed; began: time.perf_counter() before reading.
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
    def asked(self) -> Asked:
        """The most that any rank was asked to do after the step."""
        return self.step.size.asked

    @property
    def bad(self) -> list[BadSample]:
        """The replaced samples that count as bad."""
        return [sample for sample in self.replaced if sample.is_bad]

    @property
    def consumed_samples(self) -> int:
        """Samples of the stream up to and with this step."""
        return self.step.step.cursor["consumed_samples"]

    @property
    def bad_samples_so_far(self) -> int:
        return self.before.bad_samples + len(self.bad)


@dataclass(frozen=True)
class StepResult:
    """A finished step. state: after it; trained: None for a skipped one; step_seconds: with reading."""

    read: ReadStep
    state: TrainState
    trained: Trained | None
    step_seconds: float

    @property
    def applied(self) -> bool:
        """Whether it changed weights."""
        return self.trained is not None and self.trained.applied
