"""train(): the training loop, from options to a saved model."""

from __future__ import annotations

from contextlib import ExitStack

from ross_mcore.config import Config
from ross_mcore.engine.run import Run
from ross_mcore.engine.state import TrainState
from ross_mcore.engine.step import Request
from ross_mcore.guards.table import Guards
from ross_mcore.reporting.report import Report, open_report
from ross_mcore.training.checkpointer import Checkpointer
from ross_mcore.training.evaluation import evaluate, evaluate_missed, validate_checkpoint
from ross_mcore.training.opening import open_run
from ross_mcore.training.step import read_step, train_step
from ross_mcore.training.stop import Requests


def train(config: Config) -> None:
    """Trains until the run of `config` is finished or stopped on request; or only validates. Raises UserError.

    When another rank dies or is blocked, the process itself ends (guards/watchdog.py).
    """
    with Requests.of(config.training) as requests, ExitStack() as closing:
        with requests.starting():
            if config.only_validates:
                validate_checkpoint(config, closing)
                return
            run, state = open_run(config, closing, requests.is_stopping)
        with open_report(run, state) as report:
            _train(run, state, requests, report)


def _train(run: Run, state: TrainState, requests: Requests, report: Report) -> None:
    """Trains step by step, then saves a last checkpoint."""
    guards, checkpointer = Guards(run, report.say), Checkpointer(run, report.say)
    first, stopped_by = state.iteration, None
    with checkpointer:
        guards.at_start(state)
        is_complete = evaluate_missed(run, state, report)
        while state.iteration < run.train_iters and stopped_by is None:
            read = read_step(run, state, requests.pending())
            if read.interrupted:
                stopped_by = requests.why_to_stop(state.iteration, Request.STOP)
                break
            report.bad_samples(read.replaced)
            guards.after_read(read)

            result = train_step(run, read)
            state = result.state
            report.step(result)
            guards.after_step(result, report.incidents)
            checkpointer.after_step(state)

            stopped_by = requests.why_to_stop(state.iteration, read.request)
            checkpointer.save_if_due(state, Request.STOP if stopped_by else read.request)
            # after the save: a run that is stopped or killed meanwhile has its step, and evaluates at its next start
            is_complete = evaluate(run, state, report, checkpointer.after_step)
        if not is_complete:
            stopped_by = requests.why_to_stop(state.iteration, Request.STOP)
    if stopped_by is None or state.iteration > first:
        checkpointer.finish(state)
    report.finish(state, stopped_by)
