"""Validation and reconstructions during a run."""

from __future__ import annotations

from ross_mcore.engine.run import Run
from ross_mcore.engine.state import TrainState
from ross_mcore.reporting.report import Report
from ross_mcore.training.reconstruction import reconstruction_grid
from ross_mcore.training.validation import validate


def evaluate(run: Run, state: TrainState, report: Report) -> None:
    """Runs validation (--valid-interval) and reconstructions (--eval-interval) when they are due. Collective."""
    options, iteration = run.config.logging, state.iteration
    if run.held_out is not None and run.is_due(iteration, options.valid_interval):
        report.validated(*validate(run.engine, run.held_out, iteration))
    if options.eval_interval and run.model_config.denoiser and run.is_due(iteration, options.eval_interval):
        report.picture(iteration, reconstruction_grid(run.engine, run.dataset))
