"""Validation and reconstructions during a run, and validation of a checkpoint alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from ross_mcore.config import Config
from ross_mcore.data.workers import Interrupted
from ross_mcore.engine.run import Run
from ross_mcore.engine.state import TrainState
from ross_mcore.logs import VALIDATION_FILE, JsonLines, read_entries, say
from ross_mcore.parallel.collectives import all_or_none, from_first_rank, gather
from ross_mcore.reporting.console import say_validation
from ross_mcore.reporting.report import Report
from ross_mcore.training.answers import sample_answers
from ross_mcore.training.learning import about_held_out
from ross_mcore.training.opening import open_validation
from ross_mcore.training.reconstruction import reconstruction_grid
from ross_mcore.training.validation import validate


def evaluate(
    run: Run, state: TrainState, report: Report, between: Callable[[TrainState], None] = lambda _: None
) -> bool:
    """Runs reconstructions, sample answers (--eval-interval) and validation (--valid-interval) when due. Collective.

    False when a rank was asked to stop meanwhile; then validation, if due, has no line in validation.jsonl. between:
    called before every batch of the validation.
    """
    options, iteration = run.config.logging, state.iteration
    try:
        shows = bool(options.eval_interval) and run.is_due(iteration, options.eval_interval)
        if shows and run.model_config.denoiser:
            report.picture(iteration, reconstruction_grid(run.engine, run.dataset, run.is_stopping))
        if shows and options.eval_answers:
            asked = run.dataset if run.held_out is None else run.held_out
            report.answers(iteration, sample_answers(run.engine, asked, iteration, run.is_stopping))
        if run.held_out is not None and run.is_due(iteration, options.valid_interval):
            rows = run.rows_per_step
            found, bad = validate(run.engine, run.held_out, iteration, rows, run.is_stopping, lambda: between(state))
            report.validated(found, bad)
    except Interrupted:
        return False
    return True


def evaluate_missed(run: Run, state: TrainState, report: Report) -> bool:
    """At the start of a resumed run: what was due at its checkpoint, unless validation.jsonl has its line. Collective.

    Reconstructions without a validation have no such mark and are drawn again.
    """
    if not run.resume or run.start.path.parent != run.save_folder:
        return True
    has_line = all_or_none(lambda: run.groups.is_logging_rank and _has_validation(run, state.iteration))
    return any(gather(has_line)) or evaluate(run, state, report)


def validate_checkpoint(config: Config, closing: ExitStack) -> None:
    """Validates a checkpoint once and prints the losses; with --save adds them to validation.jsonl. Collective.

    closing: see `open_run`. Saves nothing. Raises UserError.
    """
    engine, start, held_out = open_validation(config, closing)
    is_logging_rank = engine.groups.is_logging_rank
    if is_logging_rank:
        say(
            f"validation of {start.path}, template {held_out.spec.template}, on "
            f"{', '.join(f'{name} ({size} samples)' for name, size in zip(held_out.names, held_out.sizes))}"
        )
    warnings = from_first_rank(lambda: about_held_out(engine.model_config, held_out, in_training=False))
    training = config.training
    rows = training.global_batch_size or training.global_batch_samples
    found, bad = validate(engine, held_out, start.iteration, rows)
    if is_logging_rank:
        for warning in warnings:
            say(warning)
        say_validation(found, bad)
        if config.checkpoint.save is not None:
            JsonLines(Path(config.checkpoint.save) / VALIDATION_FILE, sys.maxsize).add(asdict(found))
        say("validated; nothing was trained or saved (--train-iters 0)")


def _has_validation(run: Run, iteration: int) -> bool:
    """Raises LogError."""
    path = run.save_folder / VALIDATION_FILE
    return path.exists() and any(entry["iteration"] == iteration for entry in read_entries(path))
