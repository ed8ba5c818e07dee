"""Builds a rank's engine: its chunks of the model, wrapped for data parallelism, its optimizer and mcore's hooks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from ross_mcore import platform
from ross_mcore.architecture import NOTHING_PRECOMPUTED, ModelConfig, Precomputed
from ross_mcore.checkpoint.carried import CarriedWeights
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.config import Config
from ross_mcore.engine.chunks import ModelChunks
from ross_mcore.engine.engine import Engine
from ross_mcore.engine.kernels import choose
from ross_mcore.engine.optimizer import build_optimizer, set_trainable
from ross_mcore.engine.precision import execution_of, row_multiple
from ross_mcore.engine.progress import at
from ross_mcore.engine.state import load_weights, restore
from ross_mcore.models.ross import RossModel, RossOptions
from ross_mcore.parallel.groups import Groups
from ross_mcore.parallel.layout import Chunk


@dataclass(frozen=True)
class NotBuilt:
    """Replacements for modules that a run does not build.

    precomputed: the modules whose output is read from the shards; blank_posterior [2, C, h, w]: the VAE's posterior of
    the blank picture; carried: the weights of the modules, for checkpoints.
    """

    precomputed: Precomputed = NOTHING_PRECOMPUTED
    blank_posterior: Tensor | None = None
    carried: CarriedWeights = field(default_factory=CarriedWeights)


@dataclass(frozen=True)
class Span:
    """train_iters: length of the learning-rate schedule; num_datasets: data sets of the mixture."""

    train_iters: int
    num_datasets: int = 1


def build_engine(
    config: Config,
    model_config: ModelConfig,
    groups: Groups,
    start: Checkpoint,
    span: Span,
    *,
    resume: bool = False,
    not_built: NotBuilt | None = None,
) -> Engine:
    """The engine with the weights of `start` and, with `resume`, its moments. Collective; raises CheckpointError.

    Kernels and overlap that the options leave open are chosen for this machine.
    """
    config = choose(config, platform.libraries()).config
    not_built = not_built or NotBuilt()
    model = _build_model(config, model_config, groups, not_built)
    if not resume:  # before the optimizer is built, which copies its masters from the weights
        load_weights(start, model, not_built.carried)
    optimizer = build_optimizer(model, config)
    engine = Engine(
        config=config,
        model_config=model_config,
        groups=groups,
        model=model,
        optimizer=optimizer,
        carried=not_built.carried,
        train_iters=span.train_iters,
        row_multiple=row_multiple(config),
        num_datasets=span.num_datasets,
    )
    _connect_schedule(model, config)
    if resume:
        restore(start, engine)
    return engine


def _build_model(config: Config, model_config: ModelConfig, groups: Groups, not_built: NotBuilt) -> ModelChunks:
    execution, train_vision = execution_of(config), config.vision_trains
    if execution.tp_comm_overlap:
        from ross_mcore.models import transformer_engine

        tokens = row_multiple(config) * config.training.micro_batch_size  # of every row, see row_multiple
        transformer_engine.start_overlap(tokens, model_config.language.hidden_size, groups, execution)
    options = RossOptions(
        seed=config.training.seed,
        train_vision=train_vision,
        precomputed=not_built.precomputed,
        blank_posterior=not_built.blank_posterior,
        decodes=config.logging.eval_interval is not None,
    )
    data_parallel = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.use_distributed_optimizer,
        overlap_grad_reduce=bool(config.parallel.overlap_grad_reduce),
        overlap_param_gather=bool(config.parallel.overlap_param_gather),
        align_param_gather=bool(config.parallel.overlap_param_gather) and len(groups.stage.chunks) > 1,
        fp8_param_gather=config.execution.fp8_param_gather,
    )

    def build_chunk(chunk: Chunk) -> DistributedDataParallel:
        ross = RossModel(model_config, groups, execution, chunk, options)
        set_trainable(ross, config.training.training_stage, train_vision)
        return DistributedDataParallel(config=ross.config, ddp_config=data_parallel, module=ross)

    return ModelChunks(build_chunk(chunk) for chunk in groups.stage.chunks)


def _connect_schedule(model: ModelChunks, config: Config) -> None:
    """Sets the hooks of mcore's schedules, which read them from the first chunk's configuration."""
    schedule = model.first.config
    schedule.finalize_model_grads_func = _finalize_gradients
    if config.parallel.overlap_grad_reduce:
        schedule.no_sync_func = [chunk.no_sync for chunk in model] if len(model) > 1 else model[0].no_sync
    if config.parallel.overlap_param_gather and len(model) > 1:
        # the interleaved schedule starts the gathers of all stages together; the other one starts them per module
        schedule.param_sync_func = model.start_gathering()


def _finalize_gradients(model: list[DistributedDataParallel], _: Tensor | None = None, **options: Any) -> None:
    """mcore's finalize without its division by the number of tokens, because the loss is already normalized."""
    at("gradient reduction")
    finalize_model_grads(model, None, **options)
