"""Saves and loads a model and its optimizer that are spread over ranks: mcore's dist_checkpointing, `torch_dist`.

A tensor is stored in the pieces that ranks hold, under a name that does not depend on the layout; so a checkpoint of
one layout loads at any other. The state dicts are mcore's, made with `sharding_metadata()`:

```
metadata = sharding_metadata()
state = {"model": model.sharded_state_dict(metadata=metadata)}
state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=False, metadata=metadata)
state["train_state"] = {"iteration": 100, ...}                                  # anything JSON can hold
save_checkpoint(root, 100, state, model_config, assets=loaded.path, keep_last=2)
```

All functions that take a state are collective: every rank calls them, and an error on one rank is raised on all of them
with the same message. They need a process group (of one process at least).

Saving and loading at any layout are mcore's and torch's. Added here: pickles are read through safe_load.py, names and
shapes are compared before any tensor is read, and where precisions differ, masters are read from weights or weights
from masters.
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
from ross_mcore.checkpoint.folder import REMEDY, Checkpoint
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
    SHARDED_STATE,
    SHARDING,
)
from ross_mcore.errors import CheckpointError
from ross_mcore.parallel.collectives import all_or_none, gather
from ross_mcore.shapes import differences


def save_checkpoint(
    root: Path, iteration: int, state: dict[str, Any], model_config: ModelConfig, **options: Any
) -> Checkpoint:
    """Writes `root/iter_<iteration>` and makes it the newest checkpoint of `root`. Collective.

    state: see `begin_save`, which also lists the errors. options: the other fields of `Destination`.
    """
    destination = Destination(Path(root), iteration, model_config, **options)
    return begin_save(destination, state).finish().checkpoint


def load_model_weights(checkpoint: Checkpoint, sharded_state: dict[str, Any]) -> dict[str, Any]:
    """Loads this rank's pieces of a model; returns the argument of `model.load_state_dict`. Collective.

    sharded_state: `model.sharded_state_dict(metadata=sharding_metadata())`. Tensors are read into the model's own
    storage where possible, in the model's dtype. Raises CheckpointError on every rank naming the tensors that either
    side lacks, or both shapes where they differ.
    """
    loaded: dict[str, Any] = _load(checkpoint, {"model": sharded_state})["model"]
    return loaded


def load_training_state(checkpoint: Checkpoint, state: dict[str, Any]) -> dict[str, Any]:
    """Loads the whole state that was given to `save_checkpoint`, at any layout. Collective.

    state: {"model": ..., "optimizer": optimizer.sharded_state_dict(model_state, is_loading=True, metadata=...)}, and
    "fp8" with the scales and histories of FP8 layers; only those are returned that the checkpoint has in this shape.
    Returns the same keys with the arguments of `load_state_dict`, the common entries, and "train_state".
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
        backend = read_json(checkpoint.path / BACKEND_FILE)  # mcore reads it too, without checks
        if backend != BACKEND:
            raise CheckpointError(f"{checkpoint.path / BACKEND_FILE} has {shown(backend)}, this code reads {BACKEND}")
        metadata, common = read_metadata(checkpoint.path), read_common(checkpoint.path)
        stored = common.pop("content_metadata", None)
        if stored != SHARDING:
            raise CheckpointError(f"{checkpoint.path} was sharded with {shown(stored)}, this code reads {SHARDING}")
        _require_plain_groups(checkpoint, common.get("optimizer"))
        return metadata, common

    metadata, common = all_or_none(check, CheckpointError)
    if "fp8" in wanted:
        shapes = tensor_shapes(metadata)
        wanted["fp8"] = {k: t for k, t in wanted["fp8"].items() if shapes.get(t.key) == tuple(t.global_shape)}
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
        # in a second call, because a tensor can be requested once per call and some of these were in the first
        merge(loaded, read(elsewhere, {}))
    dict_list_map_inplace(lambda _: None, extra_state)
    merge(loaded, extra_state)
    return {key: value for key, value in loaded.items() if key in state or key not in ("model", "optimizer")}


# A checkpoint of any of three optimizers loads into any of them: mcore's distributed one, its plain one for bf16, its
# plain one for fp32. Moments have the same names and shapes in all. Parameter groups are nested differently, and the
# first two keep fp32 masters of the weights; in an fp32 run, the weights are their own masters.


def _require_plain_groups(checkpoint: Checkpoint, stored: Any) -> None:
    """Raises CheckpointError unless the values by which mcore identifies a parameter group are numbers."""
    if not isinstance(stored, dict | None):
        raise CheckpointError(
            f"{checkpoint.path / COMMON_FILE}: optimizer is {shown(stored)}, expected a mapping; {REMEDY}"
        )
    stored = (stored or {}).get("optimizer", stored)
    groups = stored.get("param_groups") if isinstance(stored, dict) else None
    for group in groups if isinstance(groups, list) else ():
        for key, value in group.items() if isinstance(group, dict) else ():
            if str(key).removeprefix("pre_") in param_group_identifier_keys and not isinstance(value, int | float):
                raise CheckpointError(
                    f"{checkpoint.path / COMMON_FILE}: {shown(key)} of a parameter group is {shown(value)}, expected a "
                    f"number; {REMEDY}"
                )


def _groups_as_wanted(stored: Any, wanted: dict[str, Any]) -> Any:
    """The parameter groups of a checkpoint, nested as in the optimizer state `wanted`."""
    if not isinstance(stored, dict):
        return stored
    groups = stored.get("optimizer", stored)
    if SHARDED_STATE in wanted:
        return {"optimizer": groups}
    groups = {"state": {}, **groups}  # mcore merges nothing into it on a rank that trains nothing
    return {"optimizer": groups} if PLAIN_MASTERS in wanted else groups


def _masters_from_weights(metadata: Metadata, wanted: dict[str, Any]) -> dict[str, Any]:
    """Moves masters that the checkpoint lacks out of `wanted`; returns them renamed, to be read from the weights."""
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
    """Moves fp32 weights that the checkpoint has only rounded out of `wanted`; returns them renamed, as masters."""
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
    """Raises CheckpointError on every rank unless names and shapes agree. Collective."""
    tensors, _, _ = load_preprocess(wanted)
    mine = {t.key: tuple(t.global_shape) for t in nested_values(tensors) if isinstance(t, ShardedTensor)}
    asked: dict[str, tuple[int, ...]] = {}
    for names in gather(mine):
        asked.update(names)
    with_optimizer = any(name.startswith(OPTIMIZER_PREFIX) for name in asked)
    unasked = (MASTER_PREFIX, FP8_PREFIX) if with_optimizer else (OPTIMIZER_PREFIX,)
    stored = tensor_shapes(metadata)
    considered = {name: stored[name] for name in stored if name in asked or not name.startswith(unasked)}
    found = differences(asked, considered)
    if not found:
        return
    problems = {
        "it lacks": [one.name for one in found if one.found is None],
        "the model has no place for": [one.name for one in found if one.expected is None],
        "shapes differ:": [
            f"{one.name}: stored {list(one.found)}, expected {list(one.expected)}"
            for one in found
            if one.found is not None and one.expected is not None
        ],
    }
    what, remedy = "does not fit this model", "take another checkpoint"
    if all(one.name.startswith(OPTIMIZER_PREFIX) for one in found):
        what = "has optimizer state of other trainable parts"
        remedy += ", or its weights alone (--load, --finetune and a new --save)"
    listed = "; ".join(f"{problem} {_some(names)}" for problem, names in problems.items() if names)
    raise CheckpointError(f"{checkpoint.path} {what}: {listed}; {remedy}")


def _some(names: list[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _first_failure(what: str, error: CheckpointException) -> str:
    """One line from torch's exception, which holds a traceback of every rank that failed."""
    rank, (failure, _) = min(error.failures.items())
    message = str(failure) if isinstance(failure, CheckpointError) else f"{what}: {reason(failure)}"
    return f"{message} (rank {rank})"


class _LoadPlanner(MCoreLoadPlanner):
    """mcore's planner, but objects are loaded with weights_only."""

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
    """The state that is the same on all ranks, already read."""

    def __init__(self, common: StateDict) -> None:
        self._common = common

    def load_common(self, checkpoint_dir: str | Path) -> StateDict:
        return self._common
