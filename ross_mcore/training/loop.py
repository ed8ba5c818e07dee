"""train(): the one loop, from options to a trained, saved model."""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ross_mcore import platform
from ross_mcore.architecture import ArchitectureError
from ross_mcore.checkpoint.carried import CarriedWeights
from ross_mcore.checkpoint.folder import CheckpointError
from ross_mcore.config import Config, ConfigError
from ross_mcore.data.loader import Step, StepLoader
from ross_mcore.data.shards import ShardError, ShardReadError
from ross_mcore.data.tokenizer import TokenizerError
from ross_mcore.parallel import groups as process_groups
from ross_mcore.parallel.groups import RankError
from ross_mcore.parallel.layout import LayoutError
from ross_mcore.training.console import Console
from ross_mcore.training.evaluation import reconstruction_grid
from ross_mcore.training.metrics import MetricsLog, StepMetrics
from ross_mcore.training.optimizer import apply_gradients, gradient_norm, learning_rate, set_hyperparameters
from ross_mcore.training.precomputed import blank_posterior, choose_precomputed, read_pictures_as, unused_parts
from ross_mcore.training.quarantine import QUARANTINE_FILE, BadSample, QuarantineLog, bad_samples, is_over_budget
from ross_mcore.training.start import build, iterations_of, open_dataset, place, sample_order, starting_point
from ross_mcore.training.state import TrainState, restore, save
from ross_mcore.training.step import agree_on_step, combine_losses, replace_bad_samples, run_schedule
from ross_mcore.training.stop import StopRequest
from ross_mcore.training.validation import validate

USER_ERRORS = (
    ArchitectureError,
    CheckpointError,
    ConfigError,
    LayoutError,
    platform.PlatformError,
    RankError,
    ShardError,
    ShardReadError,
    TokenizerError,
)
"""What bad input raises; a start that fails does so on every rank, and the first one speaks."""


class TrainingError(RuntimeError):
    """The run cannot go on; the last good checkpoint is intact."""


def train(config: Config) -> int:
    """Trains as `config` says and returns the exit status: 0 when finished or stopped on request, 2 for bad input."""
    try:
        with StopRequest(config.training.exit_duration_in_mins) as stop, ExitStack() as closing:
            _train(config, stop, closing)
        process_groups.destroy()
        return 0
    except (*USER_ERRORS, TrainingError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"pretrain_ross.py: error: {error}", file=sys.stderr, flush=True)
        return 2


def _train(config: Config, stop: StopRequest, closing: ExitStack) -> None:
    platform.initialize_process_group(config.parallel.distributed_timeout_minutes)
    device = platform.device()
    start, resume = starting_point(config)
    model_config = start.model_config()
    dataset = process_groups.together(lambda: open_dataset(config, model_config, start, config.data.data_path or ""))
    held_out = None
    if config.data.valid_data_path is not None:
        held_out = process_groups.together(
            lambda: open_dataset(config, model_config, start, config.data.valid_data_path or "")
        )
    parts_of_data = [*dataset.parts, *(held_out.parts if held_out is not None else [])]
    precomputed = choose_precomputed(config, model_config, start, parts_of_data)
    layout = process_groups.together(lambda: place(config, model_config, precomputed))
    groups = process_groups.initialize(layout, config.training.seed, config.parallel.distributed_timeout_minutes)
    process_groups.together(lambda: read_pictures_as(parts_of_data, precomputed, groups.stage, model_config))
    rows_per_step = config.training.global_batch_size or layout.data_parallel * config.training.micro_batch_size
    order = sample_order(config, dataset, rows_per_step)
    train_iters = config.training.train_iters or iterations_of(config, dataset, order, rows_per_step)

    unused = unused_parts(config, precomputed)
    carried = process_groups.together(lambda: CarriedWeights(start, unused, holds=groups.rank == 0))
    weights = None if resume else start
    model, optimizer = build(
        config, model_config, groups, weights, precomputed, blank_posterior(parts_of_data), carried
    )
    state = TrainState(
        training_stage=config.training.training_stage,
        seed=config.training.seed,
        data_fingerprint=dataset.fingerprint,
        global_batch_size=rows_per_step,
        seq_length=config.data.seq_length,
        template=dataset.template,
        image_aspect_ratio=dataset.image_aspect_ratio,
        sampler=config.data.sampler,
        mm_use_im_start_end=config.data.mm_use_im_start_end,
        pack=config.data.pack,
        max_images_per_sample=config.data.max_images_per_sample,
        max_tokens_per_sample=config.data.max_tokens_per_sample,
    )
    if resume:
        state = restore(start, model, optimizer, carried, state)
    loader = StepLoader(
        dataset,
        order,
        global_batch_size=rows_per_step,
        micro_batch_size=config.training.micro_batch_size,
        packed=config.data.pack,
        dp_rank=groups.data_rank,
        dp_size=layout.data_parallel,
        tp_rank=groups.tensor_rank,
        tp_size=layout.tensor_parallel,
        reads=groups.stage.reads_data,
        num_workers=config.data.num_workers,
        seed=config.training.seed,
        state=state.data or None,
    )
    closing.enter_context(loader)
    save_folder = Path(config.checkpoint.save or "")
    board = Path(config.logging.tensorboard_dir or save_folder / "tensorboard")
    log = MetricsLog(save_folder, board, state.iteration) if groups.speaks else None
    quarantine = QuarantineLog(save_folder, state.iteration) if groups.speaks else None
    say = Console(log, config, model_config, layout, rows_per_step, train_iters, precomputed)
    process_groups.together(lambda: say.start(start, resume, state, dataset))

    row_multiple = 8 * (layout.tensor_parallel if config.parallel.sequence_parallel else 1)
    saved = resume and start.path.parent == save_folder  # a finished run that is continued elsewhere is saved there
    while state.iteration < train_iters:
        began = time.perf_counter()
        step = next(loader)
        data_seconds = time.perf_counter() - began
        size = agree_on_step(step, bool(stop), groups, row_multiple, device)
        size = replace_bad_samples(step, size, loader, groups, row_multiple, device)
        bad = bad_samples(state.iteration + 1, step, dataset)
        if quarantine is not None:
            quarantine.write(bad)
        say.bad_samples(bad)
        state = replace(state, bad_samples=state.bad_samples + len(bad))
        _require_budget(state, step, bad, config)
        rate = learning_rate(state.iteration, train_iters, config.optimizer)
        set_hyperparameters(optimizer, state.iteration, train_iters, config.optimizer)

        model.zero_grad_buffer()
        optimizer.zero_grad()
        parts = run_schedule(
            model,
            step,
            size,
            groups,
            config.training,
            image_size=model_config.vision.image_size,
            device=device,
        )
        losses = combine_losses(parts, groups, device, len(dataset.parts))
        norm = gradient_norm(optimizer)
        applied = math.isfinite(losses.loss) and math.isfinite(norm)
        if applied:
            apply_gradients(optimizer, norm, config.optimizer.clip_grad)
        platform.synchronize()

        state = replace(
            state,
            iteration=state.iteration + 1,
            data=step.cursor,
            bad_steps_in_a_row=0 if applied else state.bad_steps_in_a_row + 1,
        )
        if log is not None:
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
                sample_digest=loader.digest(step),
                step_seconds=time.perf_counter() - began,
                data_seconds=data_seconds,
                bad_samples=len(bad),
                skipped_samples=size.skipped_samples,
                ignored_samples=size.ignored_samples,
                applied=applied,
                datasets=dict(zip(dataset.names, losses.datasets)) if len(dataset.parts) > 1 else {},
            )
            log.write(metrics)
            say.step(metrics, size.row_tokens, [] if applied else loader.keys(step))
        if state.bad_steps_in_a_row >= config.training.max_bad_steps:
            raise TrainingError(
                f"iteration {state.iteration}: the loss or the gradient was not finite {state.bad_steps_in_a_row} "
                f"times in a row (lm_loss {losses.lm_loss}, vm_loss {losses.vm_loss}, gradient norm {norm}); the last "
                f"checkpoint under {save_folder} is intact. Lower --lr, or look at the samples of these iterations"
            )
        last, every = state.iteration == train_iters, config.logging.valid_interval
        if held_out is not None and (last or (every and state.iteration % every == 0)):
            found, bad = validate(state.iteration, model, held_out, groups, config, model_config, row_multiple, device)
            say.bad_samples(bad)
            say.validated(found)
        every = config.logging.eval_interval
        if every and (state.iteration % every == 0 or last) and model_config.denoiser:
            grid = reconstruction_grid(model, dataset, groups, config, model_config, row_multiple, device)
            if log is not None and grid is not None:
                log.picture(state.iteration, "reconstruction", grid)
        interval = config.checkpoint.save_interval
        if (interval and state.iteration % interval == 0) or size.stop or state.iteration == train_iters:
            save(config, state, model, optimizer, carried, model_config, start)
            saved = True
            say.saved(state)
        if size.stop:
            say.stopped(state, stop)
            break
    else:
        if not saved:
            save(config, state, model, optimizer, carried, model_config, start)
            say.saved(state)
        say.finished(state)
    if quarantine is not None and (summary := quarantine.summary()):
        say.say(summary)
    if log is not None:
        log.close()


def _require_budget(state: TrainState, step: Step, bad: list[BadSample], config: Config) -> None:
    """Raises TrainingError, on all ranks alike, when more samples were bad than --max-bad-fraction allows."""
    consumed, limit = step.cursor["consumed_samples"], config.data.max_bad_fraction
    if bad and is_over_budget(state.bad_samples, consumed, limit):
        raise TrainingError(
            f"iteration {state.iteration + 1}: {state.bad_samples} of {consumed} samples so far were bad, more than "
            f"--max-bad-fraction {limit}; the last one is {bad[-1].key} of {bad[-1].shard}: {bad[-1].reason}. All are "
            f"in {Path(config.checkpoint.save or '') / QUARANTINE_FILE}. Index the shards again "
            f"(tools/index_shards.py leaves bad samples out), or raise the limit; the last checkpoint is intact"
        )
