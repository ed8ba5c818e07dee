"""A step of the loop: reads it, trains on it and computes the next state."""

from __future__ import annotations

import time
from dataclasses import replace

from ross_mcore.data.replacement import bad_samples
from ross_mcore.engine.engine import Trained
from ross_mcore.engine.progress import at
from ross_mcore.engine.run import ReadStep, Run, StepResult
from ross_mcore.engine.state import TrainState, remembered
from ross_mcore.engine.step import Request


def read_step(run: Run, state: TrainState, request: Request) -> ReadStep:
    """The step after `state`, with its bad samples replaced. Collective; raises ShardReadError."""
    began, iteration = time.perf_counter(), state.iteration + 1
    at("reading data", iteration=iteration, is_long=True)
    skipped = run.config.training.skips(iteration)
    step = run.engine.read(run.loader, request, replace_bad=not skipped)
    replaced = [] if skipped else bad_samples(iteration, step.loaded.quarantined, run.dataset)
    return ReadStep(state, step, replaced, skipped, began)


def train_step(run: Run, read: ReadStep) -> StepResult:
    """Trains on a step, unless it is skipped. Collective."""
    trained = None if read.skipped else run.engine.train(read.step, read.before.iteration)
    return StepResult(read, _state_after(read, trained), trained, time.perf_counter() - read.began)


def _state_after(read: ReadStep, trained: Trained | None) -> TrainState:
    before = read.before
    state = replace(before, iteration=read.iteration, data=read.step.loaded.cursor, bad_samples=read.bad_samples_so_far)
    if trained is None:
        return state
    if not trained.applied:
        return replace(state, bad_steps_in_a_row=before.bad_steps_in_a_row + 1)
    return replace(
        state,
        bad_steps_in_a_row=0,
        recent_lm_losses=remembered(before.recent_lm_losses, trained.losses.lm_loss),
        recent_vm_losses=remembered(before.recent_vm_losses, trained.losses.vm_loss),
    )
