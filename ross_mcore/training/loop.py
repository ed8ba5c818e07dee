"""train(): the one loop, from options to a trained, saved model."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer

from ross_mcore import config as options
from ross_mcore import platform
from ross_mcore.architecture import ArchitectureError, ModelConfig
from ross_mcore.checkpoint.sharded import (

    Checkpoint,
    CheckpointError,
    find_checkpoint,
    load_model_weights,
    load_training_state,
    require_checkpoint,
    save_checkpoint,
    sharding_metadata,
)
from ross_mcore.config import Config, ConfigError
from ross_mcore.data.loader import Step, StepLoader
from ross_mcore.data.order import SampleOrder
from ross_mcore.data.sample import ShardDataset
from ross_mcore.data.shards import ShardError
from ross_mcore.data.tokenizer import TokenizerError, load_tokenizer
from ross_mcore.models.language import Execution
from ross_mcore.models.ross import RossModel
from ross_mcore.parallel import groups as process_groups
from ross_mcore.parallel.groups import Groups
from ross_mcore.parallel.layout import Layout, LayoutError, make_layout
from ross_mcore.training.evaluation import reconstruction_grid
from ross_mcore.training.metrics import MetricsLog, StepMetrics, duration, step_flops
from ross_mcore.training.optimizer import (
    apply_gradients,
    build_optimizer,
    gradient_norm,
    learning_rate,
    set_learning_rate,
    set_trainable,
)
from ross_mcore.training.step import agree_on_step, combine_losses, finalize_gradients, run_schedule

USER_ERRORS = (ArchitectureError, CheckpointError, ConfigError, LayoutError, ShardError, TokenizerError)


class TrainingError(RuntimeError):
    """The run cannot go on; the last good checkpoint is intact."""


@dataclass(frozen=True)
class TrainState:
    """All a run needs beside weights and moments: everything else is a function of these numbers and the options."""

    iteration: int = 0
    consumed_samples: int = 0
    bad_steps_in_a_row: int = 0
    training_stage: str = ""
    seed: int = 0
    data_fingerprint: str = ""

    def refuse_other(self, started: TrainState) -> None:
        """Raises ConfigError unless `self` (from a checkpoint) continues the run that `started` describes."""
        for name, flag in (("seed", "--seed"), ("data_fingerprint", "--data-path")):
            before, now = getattr(self, name), getattr(started, name)
            if before != now:
                raise ConfigError(
                    f"the checkpoint was trained with {name} {before!r} and this run has {now!r} ({flag}), so it cannot "
                    "be continued exactly; give the same, or start a new run from its weights with --finetune"
                )


class StopRequest:
    """Set by SIGTERM, SIGINT or the time limit; the loop finishes its step, saves and returns."""

    def __init__(self, exit_duration_in_mins: float | None) -> None:
        self.reason: str | None = None
        self._deadline = None if exit_duration_in_mins is None else time.monotonic() + 60 * exit_duration_in_mins
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def __bool__(self) -> bool:
        if self._deadline is not None and time.monotonic() >= self._deadline and self.reason is None:
            self.reason = "--exit-duration-in-mins"
        return self.reason is not None


def train(config: Config) -> int:
    """Trains as `config` says and returns the exit status: 0 when finished or stopped on request, 2 for bad input."""
    try:
        with StopRequest(config.training.exit_duration_in_mins) as stop:
            _train(config, stop)
        process_groups.destroy()
        return 0
    except (*USER_ERRORS, TrainingError) as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not isinstance(error, USER_ERRORS):
            print(f"pretrain_ross.py: error: {error}", file=sys.stderr, flush=True)
        return 2


def _train(config: Config, stop: StopRequest) -> None:
    platform.initialize_process_group(config.parallel.distributed_timeout_minutes)
    device = platform.device()
    start, resume = starting_point(config)
    model_config = start.model_config()
    layout = place(config, model_config)
    groups = process_groups.initialize(layout, config.training.seed, config.parallel.distributed_timeout_minutes)
    dataset = open_dataset(config, model_config, start)
    rows_per_step = config.training.global_batch_size or layout.data_parallel * config.training.micro_batch_size
    train_iters = config.training.train_iters or math.ceil(
        (config.training.train_epochs or 0) * len(dataset) / rows_per_step
    )

    model, optimizer = build(config, model_config, groups, None if resume else start)
    state = TrainState(
        training_stage=config.training.training_stage,
        seed=config.training.seed,
        data_fingerprint=dataset.reader.fingerprint,
    )
    if resume:
        state = restore(start, model, optimizer, state)
    loader = StepLoader(
        dataset,
        SampleOrder(len(dataset), config.training.seed),
        global_batch_size=rows_per_step,
        micro_batch_size=config.training.micro_batch_size,
        dp_rank=groups.data_rank,
        dp_size=layout.data_parallel,
        tp_rank=groups.tensor_rank,
        tp_size=layout.tensor_parallel,
        num_workers=config.data.num_workers,
        consumed_samples=state.consumed_samples,
    )
    save_folder = Path(config.checkpoint.save or "")
    board = Path(config.logging.tensorboard_dir or save_folder / "tensorboard")
    log = MetricsLog(save_folder, board, state.iteration) if groups.speaks else None
    say = _Console(log, config, model_config, layout, rows_per_step, train_iters)
    say.start(start, resume, state, dataset)

    row_multiple = 8 * (layout.tensor_parallel if config.parallel.sequence_parallel else 1)
    micro_batches_per_step = rows_per_step // (layout.data_parallel * config.training.micro_batch_size)
    saved_at = state.iteration if resume else -1
    while state.iteration < train_iters:
        began = time.perf_counter()
        micro_batches = next(loader) if groups.stage.reads_data else None
        data_seconds = time.perf_counter() - began
        size = agree_on_step(micro_batches, bool(stop), groups, row_multiple, device)
        rate = learning_rate(state.iteration, train_iters, config.optimizer)
        set_learning_rate(optimizer, rate)

        model.zero_grad_buffer()
        optimizer.zero_grad()
        sums = run_schedule(
            model,
            micro_batches,
            size,
            num_micro_batches=micro_batches_per_step,
            micro_batch_size=config.training.micro_batch_size,
            image_size=model_config.vision.image_size,
            device=device,
        )
        losses = combine_losses(sums, size, groups, device)
        norm = gradient_norm(optimizer)
        applied = math.isfinite(losses.loss) and math.isfinite(norm)
        if applied:
            apply_gradients(optimizer, norm, config.optimizer.clip_grad)
        platform.synchronize()

        state = replace(
            state,
            iteration=state.iteration + 1,
            consumed_samples=state.consumed_samples + rows_per_step,
            bad_steps_in_a_row=0 if applied else state.bad_steps_in_a_row + 1,
        )
        if log is not None and micro_batches is not None:
            metrics = StepMetrics(
                iteration=state.iteration,
                consumed_samples=state.consumed_samples,
                lm_loss=losses.lm_loss,
                vm_loss=losses.vm_loss,
                loss=losses.loss,
                grad_norm=norm,
                learning_rate=rate,
                num_tokens=size.label_tokens,
                num_images=size.images,
                sample_digest=loader.digest(micro_batches),
                step_seconds=time.perf_counter() - began,
                data_seconds=data_seconds,
                skipped_samples=size.skipped_samples,
                applied=applied,
            )
            log.write(metrics)
            say.step(metrics, size.row_tokens, micro_batches)
        if state.bad_steps_in_a_row >= config.training.max_bad_steps:
            raise TrainingError(
                f"iteration {state.iteration}: the loss or the gradient was not finite {state.bad_steps_in_a_row} "
                f"times in a row (lm_loss {losses.lm_loss}, vm_loss {losses.vm_loss}, gradient norm {norm}); the last "
                f"checkpoint under {save_folder} is intact. Lower --lr, or look at the samples of these iterations"
            )
        every = config.logging.eval_interval
        if every and (state.iteration % every == 0 or state.iteration == train_iters) and model_config.denoiser:
            grid = reconstruction_grid(model, dataset, groups, config, model_config, row_multiple, device)
            if log is not None and grid is not None:
                log.picture(state.iteration, "reconstruction", grid)
        interval = config.checkpoint.save_interval
        if (interval and state.iteration % interval == 0) or size.stop or state.iteration == train_iters:
            save(config, state, model, optimizer, model_config, start)
            saved_at = state.iteration
            say.saved(state)
        if size.stop:
            say.stopped(state, stop)
            break
    else:
        if saved_at != state.iteration:
            save(config, state, model, optimizer, model_config, start)
        say.finished(state)
    loader.close()
    if log is not None:
        log.close()


def starting_point(config: Config) -> tuple[Checkpoint, bool]:
    """The checkpoint to start from, and whether to continue its run (True) or take its weights alone (False)."""
    checkpoint = config.checkpoint
    if not checkpoint.load or not checkpoint.save:
        raise ConfigError(f"--{'save' if checkpoint.load else 'load'} is missing; see pretrain_ross.py --help")
    own = find_checkpoint(Path(checkpoint.save))
    if own is not None:
        if own.train_state().get("training_stage") != config.training.training_stage:
            raise ConfigError(
                f"--save {checkpoint.save} holds a run of training stage "
                f"{own.train_state().get('training_stage')!r}; give another folder"
            )
        return own, True
    found = require_checkpoint(Path(checkpoint.load))
    same_stage = found.train_state().get("training_stage") == config.training.training_stage
    return found, same_stage and not checkpoint.finetune


def place(config: Config, model_config: ModelConfig) -> Layout:
    """The layout of this run, after every check that needs nothing built."""
    parallel = config.parallel
    layout = make_layout(
        model_config,
        world_size=torch.distributed.get_world_size(),
        tensor_parallel=parallel.tensor_model_parallel_size,
        pipeline_parallel=parallel.pipeline_model_parallel_size,
        pipeline_layout=parallel.pipeline_layout,
        llm_trains=config.training.training_stage == "finetune",
        vision_trains=config.optimizer.vision_lr is not None,
    )
    options.check(
        config,
        data_parallel_size=layout.data_parallel,
        backend=platform.backend(),
        has_transformer_engine=platform.has_transformer_engine(),
    )
    return layout


def open_dataset(config: Config, model_config: ModelConfig, start: Checkpoint) -> ShardDataset:
    """The shards of --data-path, read as this run's model and stage need them."""
    return ShardDataset(
        Path(config.data.data_path or ""),
        load_tokenizer(start.tokenizer),
        model_config,
        template=config.template(model_config),
        image_aspect_ratio=config.image_aspect_ratio,
        seq_length=config.data.seq_length,
        supervise_final_eos=config.data.supervise_final_eos,
    )


def build(
    config: Config, model_config: ModelConfig, groups: Groups, weights: Checkpoint | None
) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """This stage's part of the model, wrapped for data parallelism, and its optimizer; `weights` are loaded first."""
    execution = Execution(
        transformer_impl=config.execution.transformer_impl,
        dtype=torch.bfloat16 if config.execution.bf16 else torch.float32,
        sequence_parallel=config.parallel.sequence_parallel,
        fp8_format=config.execution.fp8_format,
        recompute_granularity=config.execution.recompute_granularity,
    )
    train_vision = config.optimizer.vision_lr is not None
    ross = RossModel(model_config, groups, execution, seed=config.training.seed, train_vision=train_vision)
    if weights is not None:
        ross.load_state_dict(load_model_weights(weights, ross.sharded_state_dict(metadata=sharding_metadata())))
    set_trainable(ross, config.training.training_stage, train_vision)
    model = DistributedDataParallel(
        config=ross.config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        ),
        module=ross,
    )
    optimizer = build_optimizer(model, config)
    ross.config.finalize_model_grads_func = finalize_gradients
    if config.parallel.overlap_grad_reduce:
        ross.config.no_sync_func = model.no_sync
    return model, optimizer


def sharded_state(model: DistributedDataParallel, optimizer: MegatronOptimizer, is_loading: bool) -> dict[str, Any]:
    """Model and optimizer as a checkpoint holds them."""
    weights = model.module.sharded_state_dict(metadata=sharding_metadata())
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=sharding_metadata()),
    }


def restore(
    start: Checkpoint, model: DistributedDataParallel, optimizer: MegatronOptimizer, started: TrainState
) -> TrainState:
    """Loads weights, moments and the loop's state. Raises ConfigError when seed or data are not the run's own."""
    loaded = load_training_state(start, sharded_state(model, optimizer, is_loading=True))
    state = TrainState(**loaded["train_state"])
    state.refuse_other(started)
    model.module.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    return state


def save(
    config: Config,
    state: TrainState,
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    model_config: ModelConfig,
    assets: Checkpoint,
) -> None:
    """Writes a checkpoint of this iteration under --save, with tokenizer and image processor beside the weights."""
    save_checkpoint(
        Path(config.checkpoint.save or ""),
        state.iteration,
        {**sharded_state(model, optimizer, is_loading=False), "train_state": asdict(state)},
        model_config,
        assets=assets.path,
        keep_last=config.checkpoint.keep_last,
        save_retain_interval=config.checkpoint.save_retain_interval,
    )


class _Console:
    """The lines a person reads. Only the rank that holds the log prints."""

    def __init__(
        self,
        log: MetricsLog | None,
        config: Config,
        model_config: ModelConfig,
        layout: Layout,
        rows_per_step: int,
        train_iters: int,
    ) -> None:
        self.log, self.config, self.model_config, self.layout = log, config, model_config, layout
        self.rows_per_step, self.train_iters = rows_per_step, train_iters
        self._window: list[tuple[StepMetrics, int]] = []
        self.skipped = 0

    def say(self, text: str) -> None:
        if self.log is not None:
            print(text, flush=True)

    def start(self, start: Checkpoint, resume: bool, state: TrainState, dataset: ShardDataset) -> None:
        layout, stages = self.layout, []
        for index in range(layout.pipeline_parallel):
            stage = layout.stage(index)
            parts = (["vision, projector"] if stage.is_first else []) + [f"{len(stage.layers)} layers"]
            parts += ["VAE, denoiser"] if stage.is_last and self.model_config.denoiser else []
            stages.append(" + ".join(parts))
        where = f"continues from iteration {state.iteration}" if resume else "starts from the weights"
        self.say(
            f"{self.config.training.training_stage}: {where} of {start.path}\n"
            f"layout: tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x data "
            f"{layout.data_parallel} on {platform.backend()}; stages: {' | '.join(stages)}\n"
            f"data: {len(dataset)} samples, {self.rows_per_step} a step, {self.train_iters} iterations"
        )
        if self.log is not None:
            self.log.text("options", "\n".join(f"    {k}: {v}" for k, v in self.config.flat().items()))

    def step(self, metrics: StepMetrics, row_tokens: int, step: Step) -> None:
        self._window.append((metrics, row_tokens))
        self.skipped += metrics.skipped_samples
        for warning in step.warnings:
            self.say(f"iteration {metrics.iteration}: {warning}")
        for sample in (sample for rows in step for sample in rows if sample.problem):
            self.say(f"iteration {metrics.iteration}: sample {sample.key} skipped: {sample.problem}")
        if not metrics.applied:
            keys = [sample.key for rows in step for sample in rows]
            self.say(
                f"iteration {metrics.iteration}: update skipped, lm_loss {metrics.lm_loss}, vm_loss {metrics.vm_loss}, "
                f"gradient norm {metrics.grad_norm}; samples {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}"
            )
        last = metrics.iteration == self.train_iters
        if metrics.iteration % self.config.logging.log_interval and not last:
            return
        count = len(self._window)
        seconds = sum(m.step_seconds for m, _ in self._window)
        tokens = sum(t for _, t in self._window)

        def mean(name: str) -> float:
            return sum(getattr(m, name) for m, _ in self._window) / count

        flops = step_flops(
            self.model_config,
            llm_trains=self.config.training.training_stage == "finetune",
            vision_trains=self.config.optimizer.vision_lr is not None,
            row_tokens=tokens,
            rows=count * self.rows_per_step,
            labels=sum(m.num_tokens for m, _ in self._window),
            images=sum(m.num_images for m, _ in self._window),
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
            "throughput/samples_per_second": count * self.rows_per_step / seconds,
            "throughput/teraflops_per_device": flops / seconds / devices / 1e12,
            "throughput/data_share": sum(m.data_seconds for m, _ in self._window) / seconds,
        }
        self.say(
            f"iteration {metrics.iteration:>{len(str(self.train_iters))}}/{self.train_iters} | "
            f"samples {metrics.consumed_samples} | lm_loss {scalars['lm_loss']:.4f} | vm_loss {scalars['vm_loss']:.4f} | "
            f"lr {metrics.learning_rate:.2e} | grad norm {scalars['grad_norm']:.3f} | "
            f"{scalars['throughput/tokens_per_second']:,.0f} tokens/s | "
            f"{scalars['throughput/samples_per_second']:.1f} samples/s | "
            f"{scalars['throughput/teraflops_per_device']:.3f} TFLOP/s/device | ETA {duration(remaining)}"
        )
        if self.log is not None:
            self.log.scalars(metrics.iteration, scalars)
        self._window.clear()

    def saved(self, state: TrainState) -> None:
        self.say(f"saved iteration {state.iteration} under {self.config.checkpoint.save}")

    def stopped(self, state: TrainState, stop: StopRequest) -> None:
        self.say(
            f"stopped by {stop.reason or 'another rank'} after iteration {state.iteration}; the same command continues "
            f"from there, at any layout (--load {self.config.checkpoint.save} does too)"
        )

    def finished(self, state: TrainState) -> None:
        skipped = f"; {self.skipped} samples were skipped" if self.skipped else ""
        self.say(f"finished {state.iteration} iterations, {state.consumed_samples} samples{skipped}")
