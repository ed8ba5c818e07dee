"""Saving and loading a model (and its optimizer) that is spread over ranks: mcore's dist_checkpointing, `torch_dist`.

Every tensor is stored whole, cut into the pieces its ranks hold, under a name that no layout changes; so a checkpoint
of one layout loads at any other. The state dicts are made by mcore with `sharding_metadata()`:

```
metadata = sharding_metadata()
state = {"model": model.sharded_state_dict(metadata=metadata)}
state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=False, metadata=metadata)
state["train_state"] = {"iteration": 100, ...}                                  # anything JSON can hold
save_checkpoint(root, 100, state, model_config, assets=loaded.path, keep_last=2)
```

All functions that take a state are collective: every rank calls them, and an error on one rank ends the call on all of
them with the same message. They need a process group (one of a single process will do).

Saving and loading at any layout are mcore's and torch's. Added here: pickles are read through safe_load.py, shapes and
names are compared before anything is read, and masters and weights stand in for each other between precisions.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory, StateDict
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from torch.distributed.checkpoint import Metadata, ReadItem
from torch.distributed.checkpoint import load as read_shards
from torch.distributed.checkpoint.api import CheckpointException

from ross_mcore.architecture import ModelConfig
from ross_mcore.checked import reason, shown
from ross_mcore.checkpoint import folder
from ross_mcore.checkpoint.folder import REMEDY, Checkpoint, find_checkpoint, require_checkpoint
from ross_mcore.checkpoint.manifest import read_json
from ross_mcore.checkpoint.safe_load import Reader, read_common, read_metadata, tensor_shapes, tensors_of
from ross_mcore.checkpoint.saving import Destination, begin_save, is_extra_state
from ross_mcore.checkpoint.torch_dist import (
    BACKEND,
    BACKEND_FILE,
    COMMON_FILE,
    FP8_PREFIX,
    MASTER_PREFIX,
    OPTIMIZER_PREFIX,
    PLAIN_MASTERS,
    SHARDING,
    sharding_metadata,
)
from ross_mcore.errors import CheckpointError
from ross_mcore.parallel.collectives import all_or_none, gather
from ross_mcore.shapes import differences

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "find_checkpoint",
    "load_model_weights",
    "load_training_state",
    "require_checkpoint",
    "save_checkpoint",
    "sharding_metadata",
]


def save_checkpoint(
    root: Path, iteration: int, state: dict[str, Any], model_config: ModelConfig, **options: Any
) -> Checkpoint:
    """Writes `root/iter_<iteration>` and makes it the newest checkpoint of `root`. Collective.

    state: see `begin_save`. options: the other fields of `Destination`.
    Raises CheckpointError on every rank when any rank fails; what was complete before stays so.
    """
    destination = Destination(Path(root), iteration, model_config, **options)
    return begin_save(destination, state).finish().checkpoint


def load_model_weights(checkpoint: Checkpoint, sharded_state: dict[str, Any]) -> dict[str, Any]:
    """Loads a model's own pieces of `checkpoint` and returns what `model.load_state_dict` takes. Collective.

    sharded_state: `model.sharded_state_dict(metadata=sharding_metadata())`. Tensors are read into the model's own
    storage where that is possible, in the model's element type. Raises CheckpointError on every rank naming the
    tensors that either side lacks, or both shapes where they differ.
    """
    loaded: dict[str, Any] = _load(checkpoint, {"model": sharded_state})["model"]
    return loaded


def load_training_state(checkpoint: Checkpoint, state: dict[str, Any]) -> dict[str, Any]:
    """Loads model, optimizer and everything else that `save_checkpoint` was given, at any layout. Collective.

    state: {"model": ..., "optimizer": optimizer.sharded_state_dict(model_state, is_loading=True, metadata=...)}, and
    "fp8" with the scales and histories of FP8 layers, of which those come back that the checkpoint has in this shape.
    Returns the same keys with what `load_state_dict` takes, the common entries, and "train_state".
    Raises CheckpointError as `load_model_weights` does, and when the checkpoint has no optimizer or train state.
    """
    if not (checkpoint.path / folder.TRAIN_STATE).exists():
        raise CheckpointError(
            f"{checkpoint.path} holds a model without training state ({folder.TRAIN_STATE} is missing): "
            "start a new run from it instead of resuming"
        )
    train_state = all_or_none(checkpoint.train_state, CheckpointError)
    return {**_load(checkpoint, state), "train_state": train_state}


def _load(checkpoint: Checkpoint, state: dict[str, Any]) -> dict[str, Any]:
    extra_state, wanted = extract_matching_values(state, is_extra_state)

    def check() -> tuple[Metadata, dict[str, Any]]:
        backend = read_json(checkpoint.path / BACKEND_FILE)  # which mcore reads too, trusting it
        if backend != BACKEND:
            raise CheckpointError(f"{checkpoint.path / BACKEND_FILE} says {shown(backend)}, this code reads {BACKEND}")
        metadata, common = read_metadata(checkpoint.path), read_common(checkpoint.path)
        stored = common.pop("content_metadata", None)
        if stored != SHARDING:
            raise CheckpointError(f"{checkpoint.path} was sharded with {shown(stored)}, this code reads {SHARDING}")
        _require_plain_groups(checkpoint, common.get("optimizer"))
        return metadata, common

    metadata, common = all_or_none(check, CheckpointError)
    if "fp8" in wanted:
        stored_shapes = tensor_shapes(metadata)
        fits = {k: t for k, t in wanted["fp8"].items() if stored_shapes.get(t.key) == tuple(t.global_shape)}
        wanted["fp8"] = fits
    elsewhere: dict[str, Any] = {}
    if "optimizer" in wanted:
        common["optimizer"] = _groups_as_wanted(common.get("optimizer"), wanted["optimizer"])
        elsewhere |= _masters_from_weights(metadata, wanted)
    _compare(checkpoint, metadata, wanted)
    if "optimizer" in wanted:
        elsewhere |= _weights_from_masters(metadata, wanted)

    def read(pieces: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
        try:
            loaded: dict[str, Any] = dist_checkpointing.load(
                pieces,
                str(checkpoint.path),
                sharded_strategy=_LoadStrategy(metadata),
                common_strategy=_Common(plain),
                validate_access_integrity=False,
            )
        except CheckpointException as error:
            raise CheckpointError(_first_failure(f"{checkpoint.path} cannot be read", error)) from None
        return loaded

    loaded = read(wanted, common)
    if any(gather(bool(elsewhere))):
        # by themselves: some of the same tensors were asked for already, and a tensor is read once in one go
        merge(loaded, read(elsewhere, {}))
    dict_list_map_inplace(lambda _: None, extra_state)
    merge(loaded, extra_state)
    return {key: value for key, value in loaded.items() if key in state or key not in ("model", "optimizer")}


# A checkpoint is of one of three optimizers and loads into any: mcore's distributed one, its plain one for bf16, its
# plain one for fp32. Moments have the same names and shapes in all. What differs is how deep parameter groups are
# nested, and that the first two keep fp32 masters of the weights; in an fp32 run, those are the weights.


def _require_plain_groups(checkpoint: Checkpoint, stored: Any) -> None:
    """Raises CheckpointError for a parameter group that cannot be looked up: mcore does so by some of its values."""
    stored = stored.get("optimizer", stored) if isinstance(stored, dict) else {}
    groups = stored.get("param_groups") if isinstance(stored, dict) else None
    for group in groups if isinstance(groups, list) else ():
        for key, value in group.items() if isinstance(group, dict) else ():
            if str(key).removeprefix("pre_") in param_group_identifier_keys and not isinstance(value, int | float):
                raise CheckpointError(
                    f"{checkpoint.path / COMMON_FILE}: {shown(key)} of a parameter group is {shown(value)}, expected a "
                    f"number; {REMEDY}"
                )


def _groups_as_wanted(stored: Any, wanted: dict[str, Any]) -> Any:
    """The parameter groups of a checkpoint, nested as the optimizer `wanted` is of nests them."""
    if not isinstance(stored, dict):
        return stored
    groups = stored.get("optimizer", stored)
    if "param_state" in wanted:
        return {"optimizer": groups, "param_state_sharding_type": wanted["param_state_sharding_type"]}
    groups = {"state": {}, **groups}  # which a rank that trains nothing adds nothing to
    return {"optimizer": groups} if PLAIN_MASTERS in wanted else groups


def _masters_from_weights(metadata: Metadata, wanted: dict[str, Any]) -> dict[str, Any]:
    """Masters that the checkpoint lacks, taken out of `wanted`, and to be read from the weights that they equal."""
    optimizer = wanted["optimizer"]
    if any(name.startswith(MASTER_PREFIX) for name in metadata.state_dict_metadata):
        return {}
    if PLAIN_MASTERS in optimizer:
        masters = {PLAIN_MASTERS: optimizer.pop(PLAIN_MASTERS)}
    else:
        masters, wanted["optimizer"] = extract_matching_values(
            optimizer, lambda value: getattr(value, "key", "").startswith(MASTER_PREFIX)
        )

    def from_the_weight(master: Any) -> Any:
        master.key = master.key.removeprefix(MASTER_PREFIX)
        return master

    dict_list_map_inplace(from_the_weight, masters)
    return {"optimizer": masters} if masters else {}


def _weights_from_masters(metadata: Metadata, wanted: dict[str, Any]) -> dict[str, Any]:
    """Weights of an fp32 model that the checkpoint has rounded, taken out of `wanted`, and to be read from masters."""
    stored = tensors_of(metadata)

    def is_rounded(value: Any) -> bool:
        name = getattr(value, "key", "")
        return (
            isinstance(value, ShardedTensor | ShardedTensorFactory)
            and value.data.dtype == torch.float32
            and MASTER_PREFIX + name in stored
            and stored[name].properties.dtype != torch.float32
        )

    def from_the_master(weight: Any) -> Any:
        weight.key = MASTER_PREFIX + weight.key
        return weight

    weights, wanted["model"] = extract_matching_values(wanted["model"], is_rounded)
    dict_list_map_inplace(from_the_master, weights)
    return {"model": weights} if weights else {}


def _compare(checkpoint: Checkpoint, metadata: Metadata, wanted: dict[str, Any]) -> None:
    """Raises CheckpointError, on every rank alike, unless the names and shapes agree. Collective."""
    tensors, _, _ = load_preprocess(wanted)
    mine = {t.key: tuple(t.global_shape) for t in nested_values(tensors) if isinstance(t, ShardedTensor)}
    asked: dict[str, tuple[int, ...]] = {}
    for names in gather(mine):
        asked.update(names)
    stored = tensor_shapes(metadata)
    with_optimizer = any(name.startswith(OPTIMIZER_PREFIX) for name in asked)
    considered = {
        name: shape
        for name, shape in stored.items()
        if name in asked
        or not name.startswith((MASTER_PREFIX, FP8_PREFIX))
        and (with_optimizer or not name.startswith(OPTIMIZER_PREFIX))
    }
    found = differences(asked, considered)
    missing, left_over, other_shape = [], [], []
    for one in found:
        if one.found is None:
            missing.append(one.name)
        elif one.expected is None:
            left_over.append(one.name)
        else:
            other_shape.append(f"{one.name}: stored {list(one.found)}, expected {list(one.expected)}")
    problems = []
    if missing:
        problems.append(f"it lacks {_some(missing)}")
    if left_over:
        problems.append(f"the model has no place for {_some(left_over)}")
    if other_shape:
        problems.append(f"shapes differ: {_some(other_shape)}")
    if not problems:
        return
    what, remedy = "does not fit this model", "take another checkpoint"
    if all(one.name.startswith(OPTIMIZER_PREFIX) for one in found):
        what = "has optimizer state of other trainable parts"
        remedy += ", or its weights alone (--load, --finetune and a new --save)"
    raise CheckpointError(f"{checkpoint.path} {what}: {'; '.join(problems)}; {remedy}")


def _some(names: list[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _first_failure(what: str, error: CheckpointException) -> str:
    """One line of torch's exception, which carries a traceback for every rank that failed."""
    rank, (failure, _) = sorted(error.failures.items())[0]
    said = str(failure) if isinstance(failure, CheckpointError) else f"{what}: {reason(failure)}"
    return f"{said} (rank {rank})"


class _LoadPlanner(MCoreLoadPlanner):
    """mcore's planner, except that an object is read as data, never as code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)


class _LoadStrategy(TorchDistLoadShardedStrategy):
    """TorchDistLoadShardedStrategy.load (mcore 0.16.1, strategies/torch.py) with safe metadata, reader and planner."""

    def __init__(self, metadata: Metadata) -> None:
        super().__init__()
        self._metadata = metadata

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> StateDict:
        tensors = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        by_name, flat_mapping, rename_mapping = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = cast(dict[str, Any], mcore_to_pyt_state_dict(by_name, True))
        planner = _LoadPlanner(shapes_validation_sharded_tensors=tensors, flatten_state_dict=False)
        read_shards(state, storage_reader=Reader(checkpoint_dir, self._metadata), planner=planner)
        loaded = {name: _unwrap_pyt_sharded_tensor(value) for name, value in state.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(loaded, flat_mapping, rename_mapping)
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded


class _Common(TorchCommonLoadStrategy):
    """The part of the state that is the same on all ranks, already read."""

    def __init__(self, common: StateDict) -> None:
        self._common = common

    def load_common(self, checkpoint_dir: str | Path) -> StateDict:
        return self._common
