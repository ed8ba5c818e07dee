"""train(): the one loop, from options to a trained, saved model."""

from __future__ import annotations

import math
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from ross_mcore import platform
from ross_mcore.config import Config
from ross_mcore.data.loader import Step
from ross_mcore.engine.optimizer import apply_gradients, gradient_norm, learning_rate, set_hyperparameters
from ross_mcore.engine.state import TrainState
from ross_mcore.engine.step import (
    Losses,
    MicroBatchLosses,
    StepSize,
    agree_on_step,
    combine_losses,
    replace_bad_samples,
    run_schedule,
)
from ross_mcore.errors import TrainingError, UserError
from ross_mcore.guards.bad_samples import QUARANTINE_FILE, BadSample, bad_samples, is_over_budget
from ross_mcore.guards.finite import all_finite, diagnose
from ross_mcore.guards.incidents import INCIDENTS_FILE, Incident, samples_behind
from ross_mcore.guards.progress import at
from ross_mcore.guards.replicas import ReplicaCheck
from ross_mcore.guards.spikes import find_spike, remembered
from ross_mcore.guards.watchdog import Watchdog
from ross_mcore.parallel import groups as process_groups
from ross_mcore.parallel.collectives import all_or_none, is_on_all_ranks
from ross_mcore.reporting.logs import complain
from ross_mcore.reporting.metrics import StepMetrics
from ross_mcore.reporting.report import Report
from ross_mcore.training.checkpointer import Saver
from ross_mcore.training.reconstruction import reconstruction_grid
from ross_mcore.training.run import Run, open_run
from ross_mcore.training.stop import Asked, Requests
from ross_mcore.training.validation import validate


def train(config: Config) -> int:
    """Trains as `config` says and returns the exit status: 0 when finished or stopped on request, 2 for bad input.

    The process itself ends when another rank died or hangs (watchdog.py).
    """
    try:
        with Requests(config.training.exit_duration_in_mins) as requests, ExitStack() as closing:
            _train(config, requests, closing)
        process_groups.destroy()
        return 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            complain(f"pretrain_ross.py: error: {error}")
        return 2


def _train(config: Config, requests: Requests, closing: ExitStack) -> None:
    platform.initialize_process_group(config.parallel.distributed_timeout_minutes)
    closing.enter_context(Watchdog(60 * config.parallel.distributed_timeout_minutes))
    run, state = open_run(config, closing)
    report = all_or_none(lambda: _open_report(run, state))
    saver = Saver(run, report.console.say)
    replicas = ReplicaCheck(run, report.console.say)
    stopped_by: str | None = None
    try:
        _require_sound(replicas.at_start(state.iteration))
        while state.iteration < run.train_iters and stopped_by is None:
            taken = _take_step(run, state, report, requests.asked())
            _report_step(run, report, taken)
            incidents = _incidents(run, state, taken)
            report.incidents(incidents)
            state, asked = _with_losses(taken), taken.size.asked
            _require_sound(replicas.after_step(state.iteration, taken.applied))  # before any save
            at("looking after a save")
            saver.after_step(state)
            _require_progress(run, state, incidents)
            _evaluate(run, state, report)
            stopped_by = _why_to_stop(run, state, asked, requests)
            if asked or _is_due(state, run, config.checkpoint.save_interval):
                at("saving a checkpoint", is_long=True)
                saver.save(state)
    except Exception as error:
        if is_on_all_ranks(error):
            at("waiting for a save", is_long=True)
            saver.wait(state.iteration, "the run ends")
        raise
    at("saving the last checkpoint", is_long=True)
    saver.finish(state)
    if stopped_by is not None:
        report.console.stopped(state, stopped_by)
    else:
        report.console.finished(state)
    report.close()


def _open_report(run: Run, state: TrainState) -> Report:
    report = all_or_none(lambda: Report(run, state))
    report.console.start(run.start, run.resume, state, run.dataset)
    return report


@dataclass(frozen=True)
class _TakenStep:
    """An optimizer step that was taken, and the state after it; not `applied` when its numbers were not finite, or when
    it was `skipped` on request, which leaves losses and norm unknown (NaN). `parts`: what the last stage kept of it."""

    state: TrainState
    step: Step
    size: StepSize
    bad: list[BadSample]
    losses: Losses
    grad_norm: float
    learning_rate: float
    applied: bool
    skipped: bool
    parts: list[MicroBatchLosses]
    step_seconds: float
    data_seconds: float


def _take_step(run: Run, state: TrainState, report: Report, asked: Asked) -> _TakenStep:
    """Reads, computes and applies the step after `state`: everything of an iteration that changes weights."""
    began = time.perf_counter()
    at("reading data", iteration=state.iteration + 1, is_long=True)
    step = next(run.loader)
    data_seconds = time.perf_counter() - began
    at("agreeing on the step")
    size = agree_on_step(step, run.groups, run.row_multiple, run.device, asked)
    rate = learning_rate(state.iteration, run.train_iters, run.config.optimizer)
    after = replace(state, iteration=state.iteration + 1, data=step.cursor)
    if run.config.training.skips(after.iteration):
        unknown, seconds = Losses(math.nan, math.nan), time.perf_counter() - began
        size = replace(size, label_tokens=0, images=0, row_tokens=0)  # nothing of it is computed
        return _TakenStep(after, step, size, [], unknown, math.nan, rate, False, True, [], seconds, data_seconds)

    size = replace_bad_samples(step, size, run.loader, run.groups, run.row_multiple, run.device)
    left_out = bad_samples(after.iteration, step, run.dataset)
    report.bad_samples(left_out)
    bad = [entry for entry in left_out if entry.is_bad]
    after = replace(after, bad_samples=state.bad_samples + len(bad))
    _require_budget(after, bad, run.config)

    set_hyperparameters(run.optimizer, state.iteration, run.train_iters, run.config.optimizer)
    losses, norm, parts = _compute_gradients(run, step, size)
    applied = all_finite(run.model, run.device, (losses.loss, norm))
    if applied:
        at("optimizer step")
        apply_gradients(run.optimizer, norm, run.config.optimizer.clip_grad)
        run.model.weights_changed()
    at("waiting for the device")
    platform.synchronize()
    after = replace(after, bad_steps_in_a_row=0 if applied else state.bad_steps_in_a_row + 1)
    seconds = time.perf_counter() - began
    return _TakenStep(after, step, size, bad, losses, norm, rate, applied, False, parts, seconds, data_seconds)


def _compute_gradients(run: Run, step: Step, size: StepSize) -> tuple[Losses, float, list[MicroBatchLosses]]:
    """The step's losses, the norm of its gradients, which are reduced and left in the model, and what the last stage
    kept of every micro-batch."""
    run.model.zero_grad_buffer()
    run.optimizer.zero_grad()
    parts = run_schedule(
        run.model,
        step,
        size,
        run.groups,
        run.config.training,
        image_size=run.model_config.vision.image_size,
        device=run.device,
    )
    at("losses")
    losses = combine_losses(parts, run.groups, run.device, len(run.dataset.parts))
    at("gradient norm")
    return losses, gradient_norm(run.optimizer), parts


def _report_step(run: Run, report: Report, taken: _TakenStep) -> None:
    if not report.speaks:
        return
    at("writing the log")
    losses, size, state = taken.losses, taken.size, taken.state
    metrics = StepMetrics(
        iteration=state.iteration,
        consumed_samples=state.consumed_samples,
        lm_loss=losses.lm_loss,
        vm_loss=losses.vm_loss,
        loss=losses.loss,
        grad_norm=taken.grad_norm,
        learning_rate=taken.learning_rate,
        num_tokens=size.label_tokens,
        num_images=size.images,
        sample_digest=run.loader.digest(taken.step),
        step_seconds=taken.step_seconds,
        data_seconds=taken.data_seconds,
        bad_samples=len(taken.bad),
        skipped_samples=size.skipped_samples,
        ignored_samples=size.ignored_samples,
        peak_memory_bytes=size.peak_memory_bytes,
        applied=taken.applied,
        datasets=dict(zip(run.dataset.names, losses.datasets)) if len(run.dataset.parts) > 1 else {},
    )
    report.step(metrics, size.row_tokens)


def _incidents(run: Run, before: TrainState, taken: _TakenStep) -> list[Incident]:
    """What of a step somebody should look at; `before` has the losses that it is compared with. Collective."""
    iteration, losses, factor = taken.state.iteration, taken.losses, run.config.training.loss_spike_factor
    behind = partial(samples_behind, parts=taken.parts, step=taken.step, groups=run.groups, dataset=run.dataset)
    if taken.skipped:
        return [Incident(iteration, "skipped", "named by --skip-iterations", [])]
    at("looking at losses")
    if not taken.applied:
        figures = f"lm_loss {losses.lm_loss}, vm_loss {losses.vm_loss}, gradient norm {taken.grad_norm}"
        return [Incident(iteration, "not finite", f"{figures}; {diagnose(run.model)}", behind(None))]
    spikes = [
        find_spike("lm_loss", losses.lm_loss, before.recent_lm_losses, factor) if taken.size.label_tokens else None,
        find_spike("vm_loss", losses.vm_loss, before.recent_vm_losses, factor) if taken.size.images else None,
    ]
    return [Incident(iteration, "spike", str(spike), behind(spike.loss)) for spike in spikes if spike is not None]


def _with_losses(taken: _TakenStep) -> TrainState:
    """The state after a step, which later ones are compared with."""
    state, size, losses = taken.state, taken.size, taken.losses
    if taken.applied and size.label_tokens:
        state = replace(state, recent_lm_losses=remembered(state.recent_lm_losses, losses.lm_loss))
    if taken.applied and size.images:
        state = replace(state, recent_vm_losses=remembered(state.recent_vm_losses, losses.vm_loss))
    return state


def _evaluate(run: Run, state: TrainState, report: Report) -> None:
    """Validation and reconstructions, where this iteration is one of theirs."""
    logging = run.config.logging
    if run.held_out is not None and _is_due(state, run, logging.valid_interval):
        arguments = run.groups, run.config, run.model_config, run.row_multiple, run.device
        report.validated(*validate(state.iteration, run.model, run.held_out, *arguments))
    if logging.eval_interval and run.model_config.denoiser and _is_due(state, run, logging.eval_interval):
        arguments = run.groups, run.config, run.model_config, run.row_multiple, run.device
        report.picture(state.iteration, reconstruction_grid(run.model, run.dataset, *arguments))


def _is_due(state: TrainState, run: Run, interval: int | None) -> bool:
    """Whether an iteration is one of those every `interval`, or the last of the run."""
    return state.iteration == run.train_iters or bool(interval and state.iteration % interval == 0)


def _why_to_stop(run: Run, state: TrainState, asked: Asked, requests: Requests) -> str | None:
    """What ends the run after this iteration, on all ranks alike; None for nothing."""
    interval = run.config.training.exit_interval
    if asked is Asked.STOP:
        return requests.reason or "another rank"
    return f"--exit-interval {interval}" if interval and state.iteration % interval == 0 else None


def _require_progress(run: Run, state: TrainState, incidents: list[Incident]) -> None:
    """Raises TrainingError, on all ranks alike, after --max-bad-steps steps in a row whose numbers were not finite."""
    if state.bad_steps_in_a_row >= run.config.training.max_bad_steps:
        reasons = "; ".join(incident.reason for incident in incidents)
        raise TrainingError(
            f"iteration {state.iteration}: numbers were not finite {state.bad_steps_in_a_row} times in a row "
            f"({reasons}); the last checkpoint under {run.save_folder} is intact. Lower --lr, or look at the samples "
            f"that {run.save_folder / INCIDENTS_FILE} names (tools/inspect_shards.py --sample) and leave them out "
            "with --skip-samples"
        )


def _require_sound(problem: str | None) -> None:
    """Raises TrainingError where a check of the weights, on all ranks alike, found a problem."""
    if problem is not None:
        raise TrainingError(problem)


def _require_budget(state: TrainState, bad: list[BadSample], config: Config) -> None:
    """Raises TrainingError, on all ranks alike, when more samples were bad than --max-bad-fraction allows."""
    consumed, limit = state.consumed_samples, config.data.max_bad_fraction
    if bad and is_over_budget(state.bad_samples, consumed, limit):
        raise TrainingError(
            f"iteration {state.iteration}: {state.bad_samples} of {consumed} samples so far were bad, more than "
            f"--max-bad-fraction {limit}; the last one is {bad[-1].key} of {bad[-1].shard}: {bad[-1].reason}. All are "
            f"in {config.checkpoint.save}/{QUARANTINE_FILE}. Index the shards again (tools/index_shards.py leaves bad "
            f"samples out), or raise the limit; the last checkpoint is intact"
        )
