"""Opens a run: claims --save, finds the checkpoint, opens the data, places the model and builds the engine."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from ross_mcore import checked, platform
from ross_mcore.architecture import ModelConfig, Precomputed
from ross_mcore.checkpoint.carried import CarriedWeights
from ross_mcore.checkpoint.claim import Claim
from ross_mcore.checkpoint.fit import architecture_of
from ross_mcore.checkpoint.folder import REMEDY, TRAIN_STATE, Checkpoint
from ross_mcore.config import Config
from ross_mcore.data.loader import StepLoader, StepPlan
from ross_mcore.data.replacement import Replacement
from ross_mcore.data.sample import ShardDataset
from ross_mcore.data.sources import MixtureDataset
from ross_mcore.data.workers import (
    MORE_SHARED_MEMORY,
    SHARED_MEMORY,
    ahead_of_a_step,
    largest_batch_bytes,
    prefetched_bytes,
    require_shared_memory,
)
from ross_mcore.engine.engine import Engine
from ross_mcore.engine.finite import all_finite, diagnose
from ross_mcore.engine.precision import kernels_in_words
from ross_mcore.engine.progress import at
from ross_mcore.engine.run import Run
from ross_mcore.engine.setup import NotBuilt, Span, build_engine
from ross_mcore.engine.state import TrainState
from ross_mcore.errors import CheckpointError
from ross_mcore.guards.watchdog import Watchdog
from ross_mcore.launcher import require_rendezvous
from ross_mcore.models.inventory import inventory
from ross_mcore.parallel import groups as process_groups
from ross_mcore.parallel.collectives import all_or_none, from_first_rank, gather
from ross_mcore.parallel.groups import Groups
from ross_mcore.reporting.services import require_installed
from ross_mcore.training.facts import facts, layout_of
from ross_mcore.training.learning import about_held_out, check_data, check_schedule
from ross_mcore.training.precomputed import blank_posterior, choose_precomputed, read_pictures_as, unused_parts
from ross_mcore.training.resume import changeable_options, continued, refuse_other_model, rows_kept, started_from
from ross_mcore.training.start import (
    about_balance,
    mean_sample,
    open_dataset,
    place,
    plan_steps,
    skipped_samples,
    starting_point,
)


def open_run(
    config: Config, closing: ExitStack, is_stopping: Callable[[], bool] = lambda: False
) -> tuple[Run, TrainState]:
    """The run of `config` and the state in which it begins. Collective.

    `closing` ends the data workers, releases the first rank's claim on the folder of --save, and leaves the process
    groups after a run without an error. is_stopping: see Run.
    """
    claim = _join(config, closing)
    start, resume = _starting_point(config)
    model_config = all_or_none(lambda: architecture_of(start, inventory))
    dataset = _open_data(config, model_config, start, config.data.data_path)
    valid_data_path = config.data.valid_data_path
    held_out = None if valid_data_path is None else _open_data(config, model_config, start, valid_data_path)
    datasets = [dataset] if held_out is None else [dataset, held_out]
    precomputed, groups, remarks = _place(config, model_config, start, datasets)
    at("looking at the data", is_long=True)
    warnings = [*remarks, *from_first_rank(lambda: check_data(config, model_config, dataset))]
    if held_out is not None:
        warnings += from_first_rank(lambda: about_held_out(model_config, held_out, in_training=True))
    kept = all_or_none(lambda: rows_kept(start, config, groups.layout)) if resume else None
    steps = plan_steps(config, dataset, groups.layout, kept)
    order, rows_per_step, train_iters = steps.order, steps.rows, steps.iterations
    skipped = all_or_none(lambda: skipped_samples(config, dataset))
    warnings += [*steps.remarks, *check_schedule(config, order, dataset, rows_per_step, train_iters)]

    state = _first_state(config, dataset, rows_per_step, train_iters)
    if resume:
        state = all_or_none(lambda: continued(start, state, config))
    if checked.real_path(start.path.parent) != checked.real_path(Path(config.checkpoint.save or "")):
        load = Path(config.checkpoint.load or "")
        state = replace(state, started_from=all_or_none(lambda: started_from(load, start)))
    about = from_first_rank(lambda: facts(layout_of(groups.layout, config), dataset, held_out))
    state = replace(state, facts=about)
    not_built = _not_built(config, start, precomputed, groups, datasets)
    span = Span(train_iters, len(dataset.parts))
    engine = build_engine(config, model_config, groups, start, span, resume=resume, not_built=not_built)
    if not all_finite(engine.model, engine.device):
        diagnosis = diagnose(engine.model)
        raise CheckpointError(f"{start.path} cannot be trained: its {diagnosis}; give another checkpoint")
    # with --loss-normalization microbatch, as in the reference, it matters which rows share a micro-batch
    sorts_rows = config.training.loss_normalization == "global"
    plan = StepPlan(rows_per_step, config.training.micro_batch_size, config.data.pack, sorts_rows)
    replacement = Replacement(config.training.seed, skipped=frozenset(skipped))
    workers = config.data.num_workers
    loader = closing.enter_context(
        StepLoader(dataset, order, plan, groups.data_share, replacement, workers, is_stopping)
    )
    loader.ahead = _reading_ahead(config, dataset, groups, loader.num_microbatches)
    if 0 < workers * loader.ahead < loader.num_microbatches:
        warnings.append(
            f"warning: the data workers of a rank read {workers * loader.ahead} of the {loader.num_microbatches} "
            f"micro-batches of a step ahead, as more would fill over half of the free {SHARED_MEMORY}: "
            f"{MORE_SHARED_MEMORY}"
        )
    if state.iteration or state.data:
        try:
            loader.load_state_dict(state.data)
        except ValueError as error:  # a wrong place in the data; every rank reads it from the same file
            raise CheckpointError(f"{start.path / TRAIN_STATE}: {error}; {REMEDY}") from None
    kernels = kernels_in_words(config, platform.libraries())
    constants = engine, claim, start, resume, dataset, held_out, precomputed, loader, rows_per_step
    return Run(*constants, warnings, is_stopping, kernels), state


def open_validation(config: Config, closing: ExitStack) -> tuple[Engine, Checkpoint, MixtureDataset]:
    """The engine with the weights of a checkpoint, that checkpoint, and the data to validate it on. Collective.

    closing: see `open_run`. --save may be missing.
    """
    _join(config, closing)
    start, _ = _starting_point(config)
    model_config = all_or_none(lambda: architecture_of(start, inventory))
    held_out = _open_data(config, model_config, start, config.data.valid_data_path)
    precomputed, groups, _ = _place(config, model_config, start, [held_out])
    not_built = _not_built(config, start, precomputed, groups, [held_out])
    return build_engine(config, model_config, groups, start, Span(0), not_built=not_built), start, held_out


def _join(config: Config, closing: ExitStack) -> Claim | None:
    """Joins the process group and claims --save; returns the claim on the first rank. Collective.

    Raises ConfigError for a tracker that is not installed.
    """
    require_installed(config.logging.trackers)
    require_rendezvous()
    closing.enter_context(process_groups.left_as_found())
    platform.initialize_process_group(config.parallel.distributed_timeout_minutes)
    closing.enter_context(Watchdog(60 * config.parallel.distributed_timeout_minutes))
    return all_or_none(lambda: _claim(config, closing))


def _starting_point(config: Config) -> tuple[Checkpoint, bool]:
    """As `starting_point`; a run in --save that did not start from --load is refused. Collective."""
    start, resume = starting_point(config)
    if resume and config.checkpoint.load is not None:
        all_or_none(lambda: refuse_other_model(start, Path(config.checkpoint.load or "")))
    return start, resume


def _claim(config: Config, closing: ExitStack) -> Claim | None:
    save = config.checkpoint.save
    return None if save is None or dist.get_rank() else closing.enter_context(Claim(Path(save)))


def _open_data(config: Config, model_config: ModelConfig, start: Checkpoint, path: str | None) -> MixtureDataset:
    return all_or_none(lambda: open_dataset(config, model_config, start, path or ""))


def _place(
    config: Config, model_config: ModelConfig, start: Checkpoint, datasets: list[MixtureDataset]
) -> tuple[Precomputed, Groups, list[str]]:
    """Which parts of pictures are read, this rank's place, and remarks on it.

    The data sets then read what its stage needs.
    """
    parts = _parts(datasets)
    precomputed = choose_precomputed(config, model_config, start, parts)
    data, device_name = from_first_rank(lambda: (mean_sample(datasets[0]), platform.device_name()))
    layout = all_or_none(lambda: place(config, model_config, precomputed, data, device_name))
    groups = process_groups.initialize(layout, config.training.seed, config.parallel.distributed_timeout_minutes)
    all_or_none(lambda: read_pictures_as(parts, precomputed, groups.stage, model_config))
    _require_shared_memory(config, datasets, groups)
    return precomputed, groups, about_balance(config, data, device_name)


def _not_built(
    config: Config, start: Checkpoint, precomputed: Precomputed, groups: Groups, datasets: list[MixtureDataset]
) -> NotBuilt:
    unused = unused_parts(config, precomputed)
    carried = all_or_none(lambda: CarriedWeights(start, unused, holds=groups.rank == 0))
    blank = all_or_none(lambda: blank_posterior(_parts(datasets)))
    return NotBuilt(precomputed, blank, carried)


def _parts(datasets: list[MixtureDataset]) -> list[ShardDataset]:
    return [part for dataset in datasets for part in dataset.parts]


def _require_shared_memory(config: Config, datasets: list[MixtureDataset], groups: Groups) -> None:
    """Raises WorkerError on every rank when a machine has no room for what the workers of its ranks send."""
    share, rows = groups.data_share, config.training.micro_batch_size

    def needed(parts: list[ShardDataset]) -> int:
        largest = largest_batch_bytes(parts, rows, config.data.pack, share.tp_size)
        return prefetched_bytes(largest, config.data.num_workers)

    here = _on_this_machine(sum(needed(dataset.parts) for dataset in datasets) if share.reads else 0)
    all_or_none(lambda: require_shared_memory(sum(here), len(here)))


def _reading_ahead(config: Config, dataset: MixtureDataset, groups: Groups, micro_batches: int) -> int:
    """Micro-batches that every worker of this rank reads ahead. Collective."""
    share, rows = groups.data_share, config.training.micro_batch_size
    largest = largest_batch_bytes(dataset.parts, rows, config.data.pack, share.tp_size) if share.reads else 0
    return ahead_of_a_step(micro_batches, config.data.num_workers, sum(_on_this_machine(largest)))


def _on_this_machine(count: int) -> list[int]:
    """The counts of the ranks of this machine that are not zero. Collective."""
    host = socket.gethostname()
    return [other for name, other in gather((host, count)) if name == host and other]


def _first_state(config: Config, dataset: MixtureDataset, rows_per_step: int, train_iters: int) -> TrainState:
    """The state at iteration 0, with the values that a resumed run must not change."""
    return TrainState(
        training_stage=config.training.training_stage,
        seed=config.training.seed,
        data_fingerprint=dataset.fingerprint,
        global_batch_size=rows_per_step,
        global_batch_samples=config.training.global_batch_samples,
        samples=dataset.spec,
        sampler=config.data.sampler,
        pack=config.data.pack,
        vision_trains=config.vision_trains,
        options=changeable_options(config, train_iters),
    )
