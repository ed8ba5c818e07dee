"""The engine: one rank's model, optimizer and process groups, and the only place where steps are computed.

Training, validation, reconstructions and the comparison with recorded values all read a step (`read` or `agree`), then
`train` on it or compute its `losses` or `hidden` states. Every method is collective: all ranks call it.

Legend: T tokens of a micro-batch, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ross_mcore import platform
from ross_mcore.architecture import ModelConfig
from ross_mcore.batch import Batch, Draws, collate, segments
from ross_mcore.checkpoint.carried import CarriedWeights
from ross_mcore.config import Config
from ross_mcore.data.loader import Step, StepLoader
from ross_mcore.engine.ahead import made_ahead
from ross_mcore.engine.chunks import ModelChunks
from ross_mcore.engine.finite import all_finite
from ross_mcore.engine.frozen import with_frozen_parts
from ross_mcore.engine.losses import (
    DataSetLosses,
    Losses,
    MicroBatchLosses,
    Objective,
    combine_losses,
    micro_batch_weights,
    weighted_loss,
)
from ross_mcore.engine.optimizer import GradientNorms, apply_gradients, gradient_norms, set_hyperparameters
from ross_mcore.engine.progress import at
from ross_mcore.engine.step import AgreedStep, Request, agree_on_step, samples_of
from ross_mcore.parallel.collectives import gather
from ross_mcore.parallel.exchange import exchange
from ross_mcore.parallel.groups import Groups


@dataclass(frozen=True)
class Randomness:
    """The denoiser's random draws: `recorded`, one for each micro-batch, or from `seed` (default: the model's)."""

    recorded: Sequence[Draws] | None = None
    seed: int | None = None


KEYED = Randomness()


@dataclass(frozen=True)
class Computed:
    """The losses of a step, and the losses of every micro-batch on the last stage; [] on other stages."""

    losses: Losses
    kept: list[MicroBatchLosses]


@dataclass(frozen=True)
class Trained(Computed):
    """A step that was trained on.

    norms: of the gradients, before clipping; applied: False when a loss, the norm or a weight was not finite on any
    rank, so that no weight was changed.
    """

    norms: GradientNorms
    applied: bool

    @property
    def grad_norm(self) -> float:
        return self.norms.total


@dataclass(frozen=True)
class Engine:
    """One rank's model and optimizer; built by engine/setup.py.

    carried: weights of parts that are not built, for checkpoints; train_iters: length of the learning-rate schedule;
    row_multiple: rows are padded to a multiple of this many tokens; num_datasets: training data sets with own losses.
    """

    config: Config
    model_config: ModelConfig
    groups: Groups
    model: ModelChunks
    optimizer: MegatronOptimizer
    carried: CarriedWeights
    train_iters: int
    row_multiple: int
    num_datasets: int = 1

    @property
    def device(self) -> torch.device:
        return platform.device()

    @property
    def objective(self) -> Objective:
        """The training objective."""
        return Objective.of(self.config.training)

    def read(self, loader: StepLoader, request: Request = Request.NOTHING, replace_bad: bool = True) -> AgreedStep:
        """The loader's next step, with its bad samples replaced by the same ones on all ranks.

        All ranks exchange their bad samples and make the same replacements; a step without bad samples costs no more
        than `agree`. Raises ShardReadError on all ranks when one cannot read. A step that is `interrupted` on any rank
        must not be computed.
        """
        began = time.perf_counter()
        found = next(loader)
        read_seconds = time.perf_counter() - began
        at("agreeing on the step")
        agreed = self.agree(found, request)
        while replace_bad and agreed.size.found_bad and not agreed.size.interrupted:
            loader.replace(found, chain.from_iterable(gather(found.bad)))
            agreed = self.agree(found, agreed.size.request)
        return replace(agreed, read_seconds=read_seconds)

    def agree(self, step: Step, request: Request = Request.NOTHING) -> AgreedStep:
        """A step that this rank has read, with the size on which all ranks agree."""
        return AgreedStep(step, agree_on_step(step, self.groups, self.row_multiple, self.device, request))

    def train(self, step: AgreedStep, steps_done: int, randomness: Randomness = KEYED) -> Trained:
        """The optimizer step after `steps_done` others; returns when the device has finished it."""
        options = self.config.optimizer
        set_hyperparameters(self.optimizer, steps_done, self.train_iters, options)
        computed = self.gradients(step, randomness=randomness)
        at("gradient norm")
        norms = gradient_norms(self.optimizer)
        applied = all_finite(self.model, self.device, (computed.losses.loss, norms.total))
        if applied:
            at("optimizer step")
            apply_gradients(self.optimizer, norms.total, options.clip_grad)
            self.model.weights_changed()
        at("waiting for the device")
        platform.synchronize()
        return Trained(computed.losses, computed.kept, norms, applied)

    def gradients(
        self, step: AgreedStep, objective: Objective | None = None, randomness: Randomness = KEYED
    ) -> Computed:
        """Forward and backward: returns the step's losses and leaves the reduced gradients in the model."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._losses(step, objective, randomness, forward_only=False)

    @torch.no_grad()
    def losses(self, step: AgreedStep, objective: Objective | None = None, randomness: Randomness = KEYED) -> Computed:
        """Forward only; by default with the training objective."""
        self.model.gather_weights()
        return self._losses(step, objective, randomness, forward_only=True)

    @torch.no_grad()
    def evaluate(self, steps: Iterable[AgreedStep], objective: Objective, randomness: Randomness) -> DataSetLosses:
        """Means over all labels and all images of several steps of one data set."""
        self.model.gather_weights()
        kept = [part for step in steps for part in self._schedule(step, "losses", objective, randomness, True)]
        at("losses")
        return self._combined(kept, 1).datasets[0]

    @torch.no_grad()
    def hidden(self, step: AgreedStep) -> list[Tensor]:
        """Hidden states [T, 1, D] after the final norm, one for each micro-batch, on the last stage; [] on others."""
        self.model.gather_weights()
        return self._schedule(step, "hidden", self.objective, KEYED, forward_only=True)

    def _losses(
        self, step: AgreedStep, objective: Objective | None, randomness: Randomness, forward_only: bool
    ) -> Computed:
        kept = self._schedule(step, "losses", objective or self.objective, randomness, forward_only)
        at("losses")
        return Computed(self._combined(kept, self.num_datasets), kept)

    def _combined(self, kept: list[MicroBatchLosses], num_datasets: int) -> Losses:
        denoises = self.model_config.denoiser is not None
        return combine_losses(kept, self.groups, self.device, denoises=denoises, num_datasets=num_datasets)

    def _schedule(
        self,
        step: AgreedStep,
        output: Literal["losses", "hidden"],
        objective: Objective,
        randomness: Randomness,
        forward_only: bool,
    ) -> list[Any]:
        """Runs all micro-batches through mcore's schedule; the last stage's result of each, [] on other stages."""
        size, image_size = step.size, self.model_config.vision.image_size
        count, with_blanks = size.micro_batches, objective.with_blank_samples
        reads = self.groups.stage.reads_data

        def prepare(number: int) -> Batch:
            rows = step.rows_of(number)
            assert rows is not None
            batch = collate(rows, size.seq_lengths[number], image_size, step.slots_of(number), with_blanks, number)
            if output == "losses":
                recorded = None if randomness.recorded is None else randomness.recorded[number]
                batch.draws = self.model.last.draws(batch, randomness.seed, recorded)
            return batch.pinned()

        def forward_step(numbers: Iterator[int], wrapped: DistributedDataParallel) -> tuple[Tensor, Any]:
            number = next(numbers)
            at(f"forward and backward, micro-batch {number + 1} of {count}")
            model = wrapped.module
            # chunks run the micro-batches in order, and of a rank's chunks at most one takes the batch
            takes_batch = model.pre_process or model.post_process
            batch = next(batches) if takes_batch else None
            result = wrapped(batch, segments(step.slots_of(number), size.seq_lengths[number]), output=output)
            if output == "hidden":
                return result, lambda hidden, non_loss_data=True: hidden
            samples = samples_of([(step.rows_of(number) or []) if takes_batch else []])
            weights = micro_batch_weights(samples, size, objective, count * self.groups.layout.data_parallel)
            return result, partial(weighted_loss, samples=samples, weights=weights, with_blank_samples=with_blanks)

        tokens = [length * size.rows for length in size.seq_lengths]
        reader = self.model.first if self.groups.stage.is_first else self.model.last
        with closing(made_ahead(prepare, range(count if reads else 0))) as collated:
            batches = with_frozen_parts(collated, reader, self.device, output)
            found: list[Any] = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(range(count)) for _ in self.model],
                model=list(self.model),
                num_microbatches=count,
                seq_length=max(tokens),
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=output == "hidden",
                **exchange(self.model.first.config, self.groups, tokens),
            )
        return found
