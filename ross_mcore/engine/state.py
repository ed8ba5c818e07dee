"""The state of a run: weights, moments and a few numbers, and how they are saved and restored."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from ross_mcore import checked
from ross_mcore.checkpoint.carried import CarriedWeights
from ross_mcore.checkpoint.folder import TRAIN_STATE, Checkpoint
from ross_mcore.checkpoint.ranges import sharded_range
from ross_mcore.checkpoint.saving import STAND_INS
from ross_mcore.checkpoint.sharded import load_model_weights, load_training_state
from ross_mcore.checkpoint.stand_ins import StandIns
from ross_mcore.checkpoint.torch_dist import (
    FP8_PREFIX,
    MASTER_PREFIX,
    OPTIMIZER_PREFIX,
    PLAIN_MASTER_PREFIX,
    PLAIN_MASTERS,
    SHARDED_STATE,
    sharding_metadata,
)
from ross_mcore.data.spec import SampleSpec
from ross_mcore.engine.chunks import ModelChunks
from ross_mcore.engine.engine import Engine
from ross_mcore.errors import CheckpointError
from ross_mcore.options import flag_of

CARRIED = "carried"
"""The key, in a model's state, of the weights of parts that are not built."""

_logger = logging.getLogger(__name__)


RECENT_LOSSES = 100


def remembered(recent: Sequence[float], value: float | None) -> tuple[float, ...]:
    """`recent` with `value`, if there is one: at most RECENT_LOSSES of them."""
    return tuple(recent) if value is None else (*recent, value)[-RECENT_LOSSES:]


@dataclass(frozen=True)
class TrainState:
    """The state of a run besides weights and moments; everything else follows from it and the options.

    data: the loader's state, the place of the next row; bad_samples: so far, without those of --skip-samples; recent
    losses: of the last applied steps, for comparison with the next ones (guards/spikes.py); options: these may change
    when the run is resumed, the fields after it may not (training/resume.py); samples: the SampleSpec of all data sets;
    started_from: path and content of the checkpoint that --load named when the run began, empty in old checkpoints;
    facts: about the run's last start (training/facts.py), for people, empty in old checkpoints.
    """

    iteration: int = 0
    data: dict[str, int] = field(default_factory=dict)
    bad_steps_in_a_row: int = 0
    bad_samples: int = 0
    recent_lm_losses: tuple[float, ...] = ()
    recent_vm_losses: tuple[float, ...] = ()
    started_from: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    training_stage: str = ""
    seed: int = 0
    data_fingerprint: str = ""
    global_batch_size: int = 0
    global_batch_samples: int | None = None
    samples: SampleSpec = SampleSpec()
    sampler: str = "shuffle"
    pack: bool = False
    vision_trains: bool = False

    @property
    def consumed_samples(self) -> int:
        return self.data.get("consumed_samples", 0)

    def to_dict(self) -> dict[str, Any]:
        """The content of train_state.json, in which the fields of `samples` are among the others."""
        own = asdict(self)
        samples: dict[str, Any] = own.pop("samples")
        return own | samples

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> TrainState:
        """The inverse of `to_dict`. Raises ValueError for an unknown key or a value of another type."""
        names = {field.name for field in fields(SampleSpec)}
        own = {name: value for name, value in saved.items() if name not in names}
        return checked.build(cls, {"samples": SampleSpec.from_state(saved), **own}, "it")


def read_state(checkpoint: Checkpoint) -> TrainState:
    """The state saved in a checkpoint. Raises CheckpointError naming the file and the key."""
    file = checkpoint.path / TRAIN_STATE
    try:
        state = TrainState.from_dict(checkpoint.train_state())
        counts = {name: getattr(state, name) for name in ("iteration", "bad_steps_in_a_row", "bad_samples")}
        for name in counts:
            checked.count(counts, name, least=0)
        if state.iteration != checkpoint.iteration:
            raise ValueError(f"iteration is {state.iteration}, the checkpoint's is {checkpoint.iteration}")
    except ValueError as error:
        raise CheckpointError(
            f"{file} is damaged, or of another version of this trainer: {error}; copy the checkpoint again, or start "
            "a new run from its weights with --finetune"
        ) from None
    return state


def changed_options(saved: Mapping[str, Any], started: TrainState) -> list[str]:
    """`--lr 0.001 -> 0.0005` for every option that differs from the saved train_state.json."""
    name = "global_batch_size"
    before = {**saved.get("options", {}), name: saved.get(name)}
    now = {**started.options, name: started.global_batch_size}
    return [
        f"{flag_of(name)} {value} -> {now[name]}"
        for name, value in before.items()
        if name in now and value != now[name]
    ]


def sharded_state(engine: Engine, is_loading: bool) -> dict[str, Any]:
    """Model, optimizer and FP8 scales in the form of a checkpoint. Collective."""
    model, groups = engine.model, engine.groups
    weights = model.sharded_weights()
    moments = _sharded_moments(engine.optimizer, weights, is_loading)
    if PLAIN_MASTERS in moments:
        moments[PLAIN_MASTERS] = _numbered_masters(moments[PLAIN_MASTERS])
    state: dict[str, Any] = {"optimizer": moments}
    if is_loading:
        force_all_tensors_to_non_fp8(weights)  # the FP8 weights of --fp8-param-gather are read in bf16
    else:
        state[STAND_INS] = StandIns(weights)  # and saved so
    state["model"] = {**weights, CARRIED: engine.carried.pieces()}
    scales = {
        name: ShardedTensor.from_rank_offsets(
            FP8_PREFIX + name, tensor, replica_id=(0, groups.tensor_rank, groups.data_rank)
        )
        for name, tensor in model.fp8_state().items()
    }
    return {**state, "fp8": scales} if scales else state


def _sharded_moments(optimizer: MegatronOptimizer, weights: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    """Masters, moments and parameter groups, under mcore's names.

    Of the distributed optimizer, each rank gives views of its own share. mcore would gather all shares on every
    data-parallel rank, and read all of them there. fp32 weights are their own masters, so they are not saved twice.
    """
    part = optimizer.chained_optimizers[0] if optimizer.chained_optimizers else None
    if not isinstance(part, DistributedOptimizer) or part.is_stub_optimizer:
        state: dict[str, Any] = optimizer.sharded_state_dict(weights, is_loading, metadata=sharding_metadata())
        return state
    sharded = {id(value.data): value for value in nested_values(weights)}
    pieces: list[ShardedTensor] = []
    for weight in part.model_param_gbuf_map:
        begin = part._get_model_param_range_map(weight)["param"].start
        for kind, own in part._get_main_param_and_optimizer_states(weight).items():
            if kind != "step" and (kind != "param" or weight.dtype != torch.float32):
                whole = sharded[id(weight)]
                pieces += sharded_range(whole, f"{OPTIMIZER_PREFIX}state.{kind}.{whole.key}", own.detach(), begin)
    if not is_loading:  # the last stage's copy of a tied embedding, of which other ranges may be on a rank
        pieces = [piece for piece in pieces if piece.replica_id[0] == 0]
    return {**part.state_dict(), SHARDED_STATE: dict(enumerate(pieces))}


def _numbered_masters(groups: list[list[Any]]) -> dict[int, Any]:
    """The masters of all groups by number, with the names that the distributed optimizer gives masters in checkpoints.

    By number, because mcore drops empty lists (groups without parameters on this stage), so that later masters would be
    loaded into the wrong group.
    """
    masters = dict(enumerate(itertools.chain.from_iterable(groups)))
    for master in masters.values():
        master.key = master.key.replace(PLAIN_MASTER_PREFIX, MASTER_PREFIX, 1)
    return masters


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    state.pop(SHARDED_STATE, None)  # read into place
    for part in optimizer.chained_optimizers:
        if isinstance(part, Float16OptimizerWithFloat16Params):
            masters = iter(master for _, master in sorted(state.get(PLAIN_MASTERS, {}).items()))
            state[PLAIN_MASTERS] = [[next(masters) for _ in group] for group in part.fp32_from_float16_groups]
    optimizer.load_state_dict(state)


def _set_weights(loaded: dict[str, Any], model: ModelChunks, carried: CarriedWeights) -> None:
    carried.take(loaded.get(CARRIED, {}))
    model.load_weights(loaded)


def load_weights(start: Checkpoint, model: ModelChunks, carried: CarriedWeights) -> None:
    """Loads only the weights of a checkpoint. Collective. Raises CheckpointError."""
    _set_weights(load_model_weights(start, {**model.sharded_weights(), CARRIED: carried.pieces()}), model, carried)


def restore(start: Checkpoint, engine: Engine) -> None:
    """Loads weights and moments. Collective; raises CheckpointError as `load_training_state` does."""
    model = engine.model
    loaded = load_training_state(start, sharded_state(engine, is_loading=True))
    _set_weights(loaded["model"], model, engine.carried)
    _load_optimizer(engine.optimizer, loaded["optimizer"])
    _restore_fp8(model, loaded.get("fp8", {}), start)
    if model.first.config.bf16:  # FP8 weights are saved as bf16, which differs from the masters rounded to FP8
        model.copy_masters(engine.optimizer)


def _restore_fp8(model: ModelChunks, stored: dict[str, Tensor], start: Checkpoint) -> None:
    own = model.fp8_state()
    for name, tensor in stored.items():
        own[name].copy_(tensor)
    if len(stored) < len(own) and model.first.groups.rank == 0:
        _logger.warning("%s has no FP8 histories of this length: FP8 scales start from defaults", start.path)
