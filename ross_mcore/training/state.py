"""What a run is beside its options: weights, moments and a few numbers; how they are restored."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from ross_mcore.checkpoint.carried import CarriedWeights
from ross_mcore.checkpoint.sharded import (
    Checkpoint,
    CheckpointError,
    load_training_state,
    sharding_metadata,
)
from ross_mcore.checkpoint.torch_dist import FP8_PREFIX
from ross_mcore.config import ConfigError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """All a run needs beside weights and moments: everything else is a function of these numbers and the options.

    `data` is the loader's state, the place of the next row; `bad_samples` counts those replaced so far.
    """

    iteration: int = 0
    data: dict[str, int] = field(default_factory=dict)
    bad_steps_in_a_row: int = 0
    bad_samples: int = 0
    training_stage: str = ""
    seed: int = 0
    data_fingerprint: str = ""
    global_batch_size: int = 0
    seq_length: int = 0
    template: str = ""
    image_aspect_ratio: str = ""
    sampler: str = "shuffle"
    mm_use_im_start_end: bool = False
    pack: bool = False
    max_images_per_sample: int = 64
    max_tokens_per_sample: int | None = None

    @property
    def consumed_samples(self) -> int:
        return self.data.get("consumed_samples", 0)

    def refuse_other(self, started: TrainState) -> None:
        """Raises ConfigError unless `self` (from a checkpoint) continues the run that `started` describes."""
        flags = {"data_fingerprint": "--data-path"}
        for name in RUN_IDENTITY:
            before, now = getattr(self, name), getattr(started, name)
            if before != now:
                flag = flags.get(name, "--" + name.replace("_", "-"))
                raise ConfigError(
                    f"the checkpoint was trained with {name} {before!r} and this run has {now!r} ({flag}), so it "
                    "cannot be continued exactly; give the same, or start a new run from its weights with --finetune "
                    "and a --save folder of its own"
                )


RUN_IDENTITY = (
    "seed",
    "data_fingerprint",
    "global_batch_size",
    "seq_length",
    "template",
    "image_aspect_ratio",
    "sampler",
    "mm_use_im_start_end",
    "pack",
    "max_images_per_sample",
    "max_tokens_per_sample",
)
"""What decides which samples a step trains on and how they read: a run that goes on must not change it."""


def sharded_state(model: DistributedDataParallel, optimizer: MegatronOptimizer, is_loading: bool) -> dict[str, Any]:
    """Model, optimizer and FP8 scales as a checkpoint holds them."""
    weights = model.module.sharded_state_dict(metadata=sharding_metadata())
    state = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=sharding_metadata()),
    }
    replica = (0, model.module.groups.tensor_rank, model.module.groups.data_rank)
    scales = {
        name: ShardedTensor.from_rank_offsets(FP8_PREFIX + name, tensor, replica_id=replica)
        for name, tensor in model.module.language_model.fp8_state().items()
    }
    return {**state, "fp8": scales} if scales else state


def restore(
    start: Checkpoint,
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    carried: CarriedWeights,
    started: TrainState,
) -> TrainState:
    """Loads weights, moments and the loop's state. Raises ConfigError when seed or data are not the run's own."""
    wanted = sharded_state(model, optimizer, is_loading=True)
    loaded = load_training_state(start, {**wanted, "model": {**wanted["model"], **carried.pieces()}})
    carried.take(loaded["model"])
    try:
        state = TrainState(**loaded["train_state"])
    except TypeError as error:
        raise CheckpointError(
            f"{start.path / 'train_state.json'} is of another version of this trainer: {error}"
        ) from None
    state.refuse_other(started)
    model.module.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    _restore_fp8(model, loaded.get("fp8", {}), start)
    return state


def _restore_fp8(model: DistributedDataParallel, stored: dict[str, Tensor], start: Checkpoint) -> None:
    own = model.module.language_model.fp8_state()
    for name, tensor in stored.items():
        own[name].copy_(tensor)
    if len(stored) < len(own) and model.module.groups.rank == 0:
        _logger.warning("%s has no FP8 histories of this length: FP8 scales start afresh", start.path)
