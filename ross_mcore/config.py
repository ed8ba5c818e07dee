"""Config: all options of a run, values derived from them, and the checks across sections. Imports no torch."""

from __future__ import annotations

import os
import types
import typing
from dataclasses import dataclass, field, fields
from typing import Any

from ross_mcore.checked import shown
from ross_mcore.costs import LOCAL, TRANSFORMER_ENGINE, Plan, Recompute
from ross_mcore.errors import ConfigError
from ross_mcore.options import (
    CheckpointOptions,
    DataOptions,
    ExecutionOptions,
    LoggingOptions,
    OptimizerOptions,
    ParallelOptions,
    TrainingOptions,
    flag_of,
)
from ross_mcore.parallel.layout import Placement

MOST_NUMBER = 10**18
"""Limit of every option: larger numbers do not fit the 64-bit integers and the JSON that options are stored in."""


@dataclass(frozen=True)
class Config:
    """All options of a run, by section."""

    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    execution: ExecutionOptions = field(default_factory=ExecutionOptions)
    data: DataOptions = field(default_factory=DataOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)

    def __post_init__(self) -> None:
        """Refuses nan, infinity and numbers above MOST_NUMBER."""
        for name, value in self.flat().items():
            if isinstance(value, (int, float)) and not abs(value) <= MOST_NUMBER:
                raise ConfigError(
                    f"{flag_of(name)} must be a finite number of at most {MOST_NUMBER:.0e}, got {shown(value)}"
                )

    @classmethod
    def from_flat(cls, **values: object) -> Config:
        """Builds the sections from flag names (underscores): `Config.from_flat(load="base", lr=2e-5)`.

        Paths become strings. Raises ConfigError for an unknown name or a value of the wrong type.
        """
        sections = {}
        for section in fields(cls):
            part = SECTIONS[section.name]
            names = {f.name for f in fields(part)}
            given = {name: values.pop(name) for name in sorted(names & values.keys())}
            sections[section.name] = part(**_checked_types(part, given))
        if values:
            raise ConfigError(f"no such option: {', '.join(sorted(values))}")
        return cls(**sections)

    def flat(self) -> dict[str, object]:
        """Flag names to values, the inverse of `from_flat`."""
        return {name: value for part in vars(self).values() for name, value in vars(part).items()}

    @property
    def use_distributed_optimizer(self) -> bool:
        chosen = self.parallel.use_distributed_optimizer
        return self.execution.bf16 if chosen is None else chosen

    @property
    def only_validates(self) -> bool:
        """Whether nothing is trained and nothing is saved."""
        return self.training.train_iters == 0

    @property
    def llm_trains(self) -> bool:
        return self.training.training_stage == "finetune"

    @property
    def vision_trains(self) -> bool:
        return self.optimizer.vision_lr is not None

    @property
    def placement(self) -> Placement:
        """The options that decide how the model is placed on ranks."""
        return Placement(
            tensor_parallel=self.parallel.tensor_model_parallel_size,
            pipeline_parallel=self.parallel.pipeline_model_parallel_size,
            pipeline_layout=self.parallel.pipeline_layout,
            layers_per_virtual_stage=self.parallel.num_layers_per_virtual_pipeline_stage,
            plan=self.plan,
        )

    @property
    def plan(self) -> Plan:
        """The options that the time and the memory of a step depend on; those left open are as on a GPU."""
        parallel, execution = self.parallel, self.execution
        return Plan(
            rows=self.training.micro_batch_size,
            tokens=self.data.seq_length,
            packed=self.data.pack,
            llm_trains=self.llm_trains,
            vision_trains=self.vision_trains,
            bf16=execution.bf16,
            fp8=execution.fp8_format is not None,
            denoiser=execution.denoiser_precision or "tf32",
            vae=execution.vae_precision or "tf32",
            kernels=LOCAL if execution.transformer_impl == "local" or not execution.bf16 else TRANSFORMER_ENGINE,
            recompute=self.recompute,
            sequence_parallel=parallel.sequence_parallel,
            distributed_optimizer=self.use_distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce is not False,
            overlap_param_gather=parallel.overlap_param_gather is not False,
        )

    @property
    def recompute(self) -> Recompute:
        """What the backward pass computes again."""
        execution = self.execution
        return Recompute(
            execution.recompute_granularity,
            execution.recompute_method or "uniform",
            execution.recompute_num_layers or 1,
            tuple((execution.recompute_modules or "core_attn").split(",")),
            execution.recompute_denoiser,
        )

    @property
    def image_aspect_ratio(self) -> str:
        return self.data.image_aspect_ratio or ("square" if self.training.training_stage == "pretrain" else "pad")


def _checked_types(section: type, values: dict[str, object]) -> dict[str, Any]:
    """Values for the fields of a section, paths as strings. Raises ConfigError for a value of the wrong type."""
    hints = typing.get_type_hints(section)
    checked = {n: os.fspath(v) if isinstance(v, os.PathLike) else v for n, v in values.items()}
    for name, value in checked.items():
        is_union = typing.get_origin(hints[name]) in (typing.Union, types.UnionType)
        kinds = typing.get_args(hints[name]) if is_union else (hints[name],)
        if not any(_is_a(value, kind) for kind in kinds):
            raise ConfigError(f"{flag_of(name)} is {shown(value)}, expected {' or '.join(map(_described, kinds))}")
    return checked


def _is_a(value: object, kind: Any) -> bool:
    """Whether a value is of a field's type; a whole number is a float too, and a bool is neither."""
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    return "None" if kind is type(None) else str(kind.__name__)


SECTIONS = {
    "parallel": ParallelOptions,
    "execution": ExecutionOptions,
    "data": DataOptions,
    "training": TrainingOptions,
    "optimizer": OptimizerOptions,
    "checkpoint": CheckpointOptions,
    "logging": LoggingOptions,
}


def require_complete(config: Config) -> None:
    """Raises ConfigError unless --load, --save, --data-path and the length of the run are given.

    A validation alone (--train-iters 0) needs --load and --valid-data-path.
    """
    if config.only_validates and not config.data.valid_data_path:
        raise ConfigError("--train-iters 0 trains nothing; it validates --load: give the data with --valid-data-path")
    for value, flag in (
        (config.checkpoint.load, "--load"),
        (config.checkpoint.save or config.only_validates, "--save"),
        (config.data.data_path or config.only_validates, "--data-path"),
        (
            config.training.train_iters or config.training.train_epochs or config.only_validates,
            "--train-iters or --train-epochs",
        ),
    ):
        if not value:
            raise ConfigError(f"{flag} is missing; see --help")


def check(config: Config, *, data_parallel_size: int, virtual_stages: int = 1) -> None:
    """Raises ConfigError, before anything is built, for options that do not fit together; it names flag and remedy.

    Precision and kernels are checked in engine/precision.py.
    """
    parallel, training = config.parallel, config.training
    for name in ("valid_interval", "valid_samples"):
        if getattr(config.logging, name) is not None and not config.data.valid_data_path:
            raise ConfigError(f"{flag_of(name)} needs --valid-data-path: what to measure")
    if virtual_stages > 1:
        _check_interleaving(config, data_parallel_size)
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise ConfigError("--sequence-parallel needs --tensor-model-parallel-size 2 or more; remove it")
    if training.global_batch_size is not None:
        rows = data_parallel_size * training.micro_batch_size
        if training.global_batch_size % rows:
            raise ConfigError(
                f"--global-batch-size {training.global_batch_size} is not a multiple of data-parallel size "
                f"{data_parallel_size} x --micro-batch-size {training.micro_batch_size} = {rows}; "
                f"use a multiple of {rows}"
            )


def _check_interleaving(config: Config, data_parallel_size: int) -> None:
    """The requirements of mcore's interleaved schedule (pipeline_parallel/schedules.py)."""
    parallel, training = config.parallel, config.training
    stages = parallel.pipeline_model_parallel_size
    if stages == 2 and not parallel.overlap_p2p_communication:
        raise ConfigError(
            "--no-overlap-p2p-communication with two interleaved pipeline stages: a stage sends forward and backward "
            "tensors to the same neighbour in one batch and would mix them up; remove the flag"
        )
    rows = data_parallel_size * training.micro_batch_size
    if training.global_batch_samples is None and (training.global_batch_size or rows) // rows % stages:
        raise ConfigError(
            f"--global-batch-size {training.global_batch_size or rows}: the interleaved schedule needs a multiple of "
            f"{stages} micro-batches a rank, one for every pipeline stage; use a multiple of {stages * rows}"
        )
