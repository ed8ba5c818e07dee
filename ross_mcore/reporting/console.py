"""The console lines of a run."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from ross_mcore import platform
from ross_mcore.checked import real_path
from ross_mcore.data.replacement import BadSample
from ross_mcore.data.templates import DEFAULT_OF, default_template, end_of_answer
from ross_mcore.engine.precision import execution_of
from ross_mcore.engine.run import Run
from ross_mcore.engine.state import TrainState, changed_options
from ross_mcore.guards.incidents import Incident
from ross_mcore.logs import say
from ross_mcore.parts import DENOISER, PROJECTOR, VAE
from ross_mcore.reporting.averages import Averages
from ross_mcore.reporting.metrics import StepMetrics, Validation, duration, loss_text
from ross_mcore.reporting.reporter import Reporter


class Console(Reporter):
    """Prints on standard output."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self._train_iters, self._save = run.train_iters, run.config.checkpoint.save
        self._first = state.iteration
        self._skipped = self._ignored = 0

    def say(self, text: str) -> None:
        say(text)

    def start(self, run: Run, state: TrainState) -> None:
        layout, dataset = run.groups.layout, run.dataset
        where = f"continues from iteration {state.iteration}" if run.resume else "starts from the weights"
        load, of_run = run.config.checkpoint.load, (run.start.path, run.start.path.parent)
        is_read = not run.resume or load is None or real_path(Path(load)) in map(real_path, of_run)
        unread = "" if is_read else f"; --load {load} is not read, because --save holds this run"
        say(
            f"{run.config.training.training_stage}: {where} of {run.start.path}{unread}\n"
            f"layout: tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x data "
            f"{layout.data_parallel} on {platform.backend()}; stages: {' | '.join(_stages(run))}\n"
            f"{run.kernels}\n"
            f"data: {len(dataset)} samples, {run.rows_per_step} rows a step, {run.train_iters} iterations\n"
            f"{_templates(run)}\n"
            f"precision: {_precision(run)}\n"
            f"process {os.getpid()} on {socket.gethostname()}: SIGUSR1 saves and continues, SIGTERM saves and ends"
        )
        changed = changed_options(run.start.train_state(), state) if run.resume else []
        if changed:
            say(f"changed since that checkpoint: {', '.join(changed)}")
        if given := [kind for kind, is_given in vars(run.precomputed).items() if is_given]:
            say(f"precomputed: {' and '.join(given)} of the pictures are read, not computed")
        several, total = len(dataset.parts) > 1, sum(dataset.counts)
        for name, count, size in dataset.shares if several else ():
            say(f"  {name}: {size} samples, {count / size:.3g} times an epoch, {count / total:.1%} of it")
        for warning in run.warnings:
            say(warning)

    def step(self, metrics: StepMetrics) -> None:
        self._skipped += metrics.skipped_samples
        self._ignored += metrics.ignored_samples

    def averages(self, found: Averages) -> None:
        norm = "-" if found.grad_norm is None else f"{found.grad_norm:.3f}"
        known = found.mfu is not None and found.hardware_mfu is not None
        mfu = f"MFU {found.mfu:.1%} useful, {found.hardware_mfu:.1%} hardware | " if known else ""
        say(
            f"iteration {found.iteration:>{len(str(self._train_iters))}}/{self._train_iters} | "
            f"samples {found.consumed_samples} | "
            f"lm_loss {loss_text(found.lm_loss)} | vm_loss {loss_text(found.vm_loss)} | "
            f"lr {found.learning_rate:.2e} | grad norm {norm} | fill {found.fill:.1%} | "
            f"{found.tokens_per_second:,.0f} tokens/s | "
            f"{found.samples_per_second:.1f} samples/s | {found.teraflops_per_device:.3f} TFLOP/s/device | "
            f"{found.peak_gib:.2f} GiB | {mfu}ETA {duration(found.remaining_seconds)}"
        )

    def incidents(self, found: Sequence[Incident]) -> None:
        for incident in found:
            say(str(incident))

    def validated(self, found: Validation, bad: Sequence[BadSample]) -> None:
        say_validation(found, bad)

    def bad_samples(self, bad: Sequence[BadSample]) -> None:
        _say_bad_samples(bad)

    def finish(self, state: TrainState, stopped_by: str | None) -> None:
        if stopped_by is not None and state.iteration == self._first:
            say(f"stopped by {stopped_by} before a step after iteration {self._first}; nothing was trained or saved")
            return
        if stopped_by is not None:
            say(
                f"stopped by {stopped_by} after iteration {state.iteration}; the same command continues "
                f"from there, at any layout (--load {self._save} does too)"
            )
            return
        skipped = f"; {self._skipped} samples were skipped" if self._skipped else ""
        ignored = f"; {self._ignored} samples had no label" if self._ignored else ""
        say(f"finished {state.iteration} iterations, {state.consumed_samples} samples{skipped}{ignored}")


def _precision(run: Run) -> str:
    """The line that says in which precision each part computes."""
    execution = execution_of(run.config)
    main = "bf16" if run.config.execution.bf16 else "fp32"
    main += f", linear layers of the decoder {execution.fp8.recipe} FP8" if execution.fp8 else ""
    if run.model_config.denoiser is None:
        return main
    vae = "" if run.precomputed.latents else f", {VAE.label} {execution.vae_precision}"
    return f"{main}; {DENOISER.label} {execution.denoiser_precision}{vae}"


def _templates(run: Run) -> str:
    """The line that names the templates, why they are used, and the tokenizer; warnings about them."""
    config, tokenizer = run.config, run.dataset.parts[0].tokenizer
    named = list(dict.fromkeys(part.spec.template for part in run.dataset.parts))
    default = default_template(config.training.training_stage, run.model_config.language.model_type, tokenizer)
    is_default = config.data.template is None and named == [default]
    why = DEFAULT_OF[named[0]] if is_default else "as given"
    line = f"template: {', '.join(named)} ({why}); tokenizer: {tokenizer.name_or_path}"
    for spec in {part.spec.template: part.spec for part in run.dataset.parts}.values():
        if spec.template != "plain" and end_of_answer(spec, tokenizer) is None:
            line += f"\nwarning: what ends an answer in {spec.template} is not one token, so a model may never stop"
    return line


def say_validation(found: Validation, bad: Sequence[BadSample]) -> None:
    """Prints the bad samples of a validation, and its losses."""
    _say_bad_samples(bad)
    for name, own in found.datasets.items():
        say(
            f"validation after iteration {found.iteration} | {name} | lm_loss {loss_text(own.lm_loss)} | "
            f"vm_loss {loss_text(own.vm_loss)} | {own.samples} samples, {own.labels} labels, {own.images} images"
        )


def _say_bad_samples(bad: Sequence[BadSample]) -> None:
    for sample in bad:
        replacement = "its place stays empty" if sample.replaced_by is None else f"{sample.replaced_by} replaces it"
        kind = "bad" if sample.is_bad else "left out"
        say(
            f"iteration {sample.iteration}: sample {sample.key} of {sample.shard} is {kind}: {sample.reason}; "
            f"{replacement}"
        )


def _stages(run: Run) -> Iterator[str]:
    """The parts on each pipeline stage, as text."""
    layout, precomputed = run.groups.layout, run.precomputed
    for index in range(layout.pipeline_parallel):
        stage = layout.stage(index)
        tower = "" if precomputed.features else "vision, "
        vae = "" if precomputed.latents else f"{VAE.label}, "
        parts = ([f"{tower}{PROJECTOR.label}"] if stage.is_first else []) + [f"{len(stage.layers)} layers"]
        yield " + ".join(parts + ([f"{vae}{DENOISER.label}"] if stage.is_last and run.model_config.denoiser else []))
