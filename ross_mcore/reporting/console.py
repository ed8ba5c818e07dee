"""The lines a person reads while a run trains."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Sequence

import torch

from ross_mcore import platform
from ross_mcore.architecture import NOTHING_PRECOMPUTED, ModelConfig, Precomputed
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.config import Config
from ross_mcore.data.sample import IgnoredLabels
from ross_mcore.data.sources import MixtureDataset
from ross_mcore.engine.state import TrainState
from ross_mcore.engine.step import DataSetLosses
from ross_mcore.flops import forward_flops, step_flops
from ross_mcore.guards.bad_samples import BadSample
from ross_mcore.parallel.layout import Layout
from ross_mcore.parts import DENOISER, PROJECTOR, VAE
from ross_mcore.reporting.logs import say
from ross_mcore.reporting.metrics import MetricsLog, StepMetrics, Validation, duration
from ross_mcore.training.resume import changes

IGNORED_SHARE_TO_WARN = 0.01


def ignored_warning(found: IgnoredLabels, template: str) -> str | None:
    """What to say when more than IGNORED_SHARE_TO_WARN of the samples have no label."""
    if found.share <= IGNORED_SHARE_TO_WARN:
        return None
    how = "by the index" if found.from_index else f"of {found.looked_at} tokenized, spread over the data"
    return (
        f"warning: {found.share:.1%} of the samples have no label ({found.ignored} {how}), so nothing is learned from "
        f"their text; the first are {', '.join(found.keys)}. Usually --template {template} does not fit the tokenizer "
        "or the data, so that the answers are not found among the tokens"
    )


def means_by_data_set(steps: list[dict[str, DataSetLosses]]) -> dict[str, float]:
    """TensorBoard scalars of every data set over some steps: samples, and losses weighted by what they are over."""
    scalars: dict[str, float] = {}
    for name in steps[0] if steps else ():
        own = [step[name] for step in steps]
        scalars[f"samples/{name}"] = sum(losses.samples for losses in own)
        for loss, weight in (("lm_loss", "labels"), ("vm_loss", "images")):
            parts = [(getattr(x, loss), getattr(x, weight)) for x in own if getattr(x, loss) is not None]
            if over := sum(count for _, count in parts):
                scalars[f"{loss}/{name}"] = sum(value * count for value, count in parts) / over
    return scalars


class Console:
    """The lines a person reads. Only the rank that holds the log prints."""

    def __init__(
        self,
        log: MetricsLog | None,
        config: Config,
        model_config: ModelConfig,
        layout: Layout,
        rows_per_step: int,
        train_iters: int,
        precomputed: Precomputed = NOTHING_PRECOMPUTED,
    ) -> None:
        self.precomputed = precomputed
        self.log, self.config, self.model_config, self.layout = log, config, model_config, layout
        self.rows_per_step, self.train_iters = rows_per_step, train_iters
        self._window: list[tuple[StepMetrics, int]] = []
        self.skipped = self.ignored = 0

    def say(self, text: str) -> None:
        if self.log is not None:
            say(text)

    def start(self, start: Checkpoint, resume: bool, state: TrainState, dataset: MixtureDataset) -> None:
        layout, stages = self.layout, []
        for index in range(layout.pipeline_parallel):
            stage = layout.stage(index)
            tower = "" if self.precomputed.features else "vision, "
            vae = "" if self.precomputed.latents else f"{VAE.label}, "
            parts = ([f"{tower}{PROJECTOR.label}"] if stage.is_first else []) + [f"{len(stage.layers)} layers"]
            parts += [f"{vae}{DENOISER.label}"] if stage.is_last and self.model_config.denoiser else []
            stages.append(" + ".join(parts))
        where = f"continues from iteration {state.iteration}" if resume else "starts from the weights"
        changed = changes(start.train_state(), state) if resume and self.log is not None else []
        self.say(
            f"{self.config.training.training_stage}: {where} of {start.path}\n"
            f"layout: tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x data "
            f"{layout.data_parallel} on {platform.backend()}; stages: {' | '.join(stages)}\n"
            f"data: {len(dataset)} samples, {self.rows_per_step} a step, {self.train_iters} iterations\n"
            f"process {os.getpid()} on {socket.gethostname()}: SIGUSR1 saves and goes on, SIGTERM saves and ends"
        )
        if changed:
            self.say(f"changed since that checkpoint: {', '.join(changed)}")
        if given := [kind for kind, is_given in vars(self.precomputed).items() if is_given]:
            self.say(f"precomputed: {' and '.join(given)} of the pictures are read, not computed")
        if len(dataset.parts) > 1:
            total = sum(dataset.counts)
            for name, count, size in dataset.shares:
                self.say(f"  {name}: {size} samples, {count / size:.3g} times an epoch, {count / total:.1%} of it")
        if self.log is not None:
            for name, part in zip(dataset.names, dataset.parts):
                if warning := ignored_warning(part.ignored_labels(), part.template):
                    self.say(f"{name}: {warning}" if len(dataset.parts) > 1 else warning)
            self.log.text("options", "\n".join(f"    {k}: {v}" for k, v in self.config.flat().items()))

    def step(self, metrics: StepMetrics, row_tokens: int) -> None:
        """One iteration, of `row_tokens` that are not padding; without any, nothing was computed."""
        if row_tokens:
            self._window.append((metrics, row_tokens))
        self.skipped += metrics.skipped_samples
        self.ignored += metrics.ignored_samples
        last = metrics.iteration == self.train_iters
        if not self._window or (metrics.iteration % self.config.logging.log_interval and not last):
            return
        count = len(self._window)
        seconds = sum(m.step_seconds for m, _ in self._window)
        tokens = sum(t for _, t in self._window)

        def mean(name: str) -> float:
            values = [getattr(m, name) for m, _ in self._window if m.applied]
            return sum(values) / len(values) if values else math.nan

        rows = count * self.rows_per_step
        labels, images = (sum(getattr(m, name) for m, _ in self._window) for name in ("num_tokens", "num_images"))
        flops = rows * step_flops(
            forward_flops(self.model_config, tokens / rows, labels / rows, images / rows, self.precomputed),
            self.model_config.language.num_hidden_layers,
            llm_trains=self.config.llm_trains,
            vision_trains=self.config.vision_trains,
        )
        devices = torch.distributed.get_world_size()
        remaining = (self.train_iters - metrics.iteration) * seconds / count
        scalars = {
            "lm_loss": mean("lm_loss"),
            "vm_loss": mean("vm_loss"),
            "loss": mean("loss"),
            "grad_norm": mean("grad_norm"),
            "learning_rate": metrics.learning_rate,
            "throughput/tokens_per_second": tokens / seconds,
            "throughput/samples_per_second": rows / seconds,
            "throughput/teraflops_per_device": flops / seconds / devices / 1e12,
            "memory/peak_gib": metrics.peak_memory_bytes / 2**30,
            "throughput/data_share": sum(m.data_seconds for m, _ in self._window) / seconds,
        }
        scalars |= means_by_data_set([m.datasets for m, _ in self._window if m.applied])
        self.say(
            f"iteration {metrics.iteration:>{len(str(self.train_iters))}}/{self.train_iters} | "
            f"samples {metrics.consumed_samples} | "
            f"lm_loss {scalars['lm_loss']:.4f} | vm_loss {scalars['vm_loss']:.4f} | "
            f"lr {metrics.learning_rate:.2e} | grad norm {scalars['grad_norm']:.3f} | "
            f"{scalars['throughput/tokens_per_second']:,.0f} tokens/s | "
            f"{scalars['throughput/samples_per_second']:.1f} samples/s | "
            f"{scalars['throughput/teraflops_per_device']:.3f} TFLOP/s/device | "
            f"{scalars['memory/peak_gib']:.2f} GiB | ETA {duration(remaining)}"
        )
        if self.log is not None:
            self.log.scalars(metrics.iteration, scalars)
        self._window.clear()

    def validated(self, found: Validation) -> None:
        for name, own in found.datasets.items():
            lm_loss, vm_loss = (f"{x:.4f}" if x is not None else "-" for x in (own.lm_loss, own.vm_loss))
            self.say(
                f"validation after iteration {found.iteration} | {name} | lm_loss {lm_loss} | vm_loss {vm_loss} | "
                f"{own.samples} samples, {own.labels} labels, {own.images} images"
            )
        if self.log is not None:
            self.log.write_validation(found)

    def bad_samples(self, bad: Sequence[BadSample]) -> None:
        for entry in bad:
            instead = "its place stays empty" if entry.replaced_by is None else f"{entry.replaced_by} takes its place"
            where = f"iteration {entry.iteration}: sample {entry.key} of {entry.shard}"
            what = "bad" if entry.is_bad else "left out"
            self.say(f"{where} is {what}: {entry.reason}; {instead}")

    def stopped(self, state: TrainState, reason: str) -> None:
        self.say(
            f"stopped by {reason} after iteration {state.iteration}; the same command continues "
            f"from there, at any layout (--load {self.config.checkpoint.save} does too)"
        )

    def finished(self, state: TrainState) -> None:
        skipped = f"; {self.skipped} samples were skipped" if self.skipped else ""
        ignored = f"; {self.ignored} samples had no label" if self.ignored else ""
        self.say(f"finished {state.iteration} iterations, {state.consumed_samples} samples{skipped}{ignored}")
