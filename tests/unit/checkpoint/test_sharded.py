"""Saving and loading through mcore in a group of one process; several ranks are tested in tests/distributed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

from ross_mcore.architecture import ModelConfig
from ross_mcore.checkpoint import folder, sharded
from ross_mcore.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("process_group")


def sharded_state(tensors: dict[str, Tensor]) -> dict[str, Any]:
    state: dict[str, Any] = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}
    state["layer._extra_state"] = ShardedObject("layer._extra_state", None, (1,), (0,))
    return state


def weights(value: float = 1.0) -> dict[str, Tensor]:
    return {"a.weight": torch.full((4, 3), value), "b.bias": torch.arange(5.0) * value}


def save(root: Path, iteration: int, model: ModelConfig, **keywords: Any) -> folder.Checkpoint:
    state = {
        "model": sharded_state(weights()),
        "optimizer": {
            "param_groups": [{"lr": 0.5, "betas": (0.9, 0.95), "step": iteration}],
            "state": {0: {"exp_avg": ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.a", torch.ones(4, 3))}},
        },
        "train_state": {"iteration": iteration, "consumed_samples": 8 * iteration},
    }
    return sharded.save_checkpoint(root, iteration, state, model, **keywords)


def wanted_state() -> dict[str, Any]:
    empty = {name: torch.zeros_like(tensor) for name, tensor in weights().items()}
    moments = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.a", torch.zeros(4, 3))
    return {"model": sharded_state(empty), "optimizer": {"state": {0: {"exp_avg": moments}}}}


def test_training_state_round_trip(tmp_path: Path, model_config: ModelConfig) -> None:
    checkpoint = save(tmp_path, 3, model_config)
    loaded = sharded.load_training_state(checkpoint, wanted_state())
    assert loaded["train_state"] == {"iteration": 3, "consumed_samples": 24}
    assert loaded["optimizer"]["param_groups"] == [{"lr": 0.5, "betas": (0.9, 0.95), "step": 3}]
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], torch.ones(4, 3))
    assert {name: tensor.tolist() for name, tensor in loaded["model"].items() if tensor is not None} == {
        name: tensor.tolist() for name, tensor in weights().items()
    }
    assert loaded["model"]["layer._extra_state"] is None


def test_weights_alone_ignore_the_optimizer_and_take_the_model_s_dtype(
    tmp_path: Path, model_config: ModelConfig
) -> None:
    checkpoint = save(tmp_path, 3, model_config)
    empty = {name: torch.zeros_like(tensor, dtype=torch.bfloat16) for name, tensor in weights().items()}
    loaded = sharded.load_model_weights(checkpoint, sharded_state(empty))
    assert loaded["a.weight"].dtype == torch.bfloat16 and torch.equal(loaded["a.weight"].float(), weights()["a.weight"])


BLOCKS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "whole": (),
    "rows": ((0, 1, 2),),
    "columns": ((1, 2, 3),),
    "rows and columns": ((0, 1, 2), (1, 1, 3)),
}
"""Blocks of a [4, 3] matrix: (axis, index of the block, number of blocks)."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lies", ["as stored", "transposed"])
@pytest.mark.parametrize("block", BLOCKS)
def test_any_block_is_read_into_the_memory_it_is_for(
    tmp_path: Path, model_config: ModelConfig, block: str, lies: str, dtype: torch.dtype
) -> None:
    whole = torch.arange(12.0).view(4, 3)
    checkpoint = sharded.save_checkpoint(tmp_path, 1, {"model": sharded_state({"a.weight": whole})}, model_config)
    expected = whole
    for axis, part, parts in BLOCKS[block]:
        expected = expected.chunk(parts, axis)[part]
    target = torch.zeros_like(expected, dtype=dtype)
    target = torch.zeros(*reversed(expected.shape), dtype=dtype).t() if lies == "transposed" else target
    wanted = {"a.weight": ShardedTensor.from_rank_offsets("a.weight", target, *BLOCKS[block])}
    sharded.load_model_weights(checkpoint, wanted)
    assert torch.equal(target, expected.to(dtype))


def test_state_is_not_changed_by_saving(tmp_path: Path, model_config: ModelConfig) -> None:
    state = {"model": sharded_state(weights()), "train_state": {"iteration": 1}}
    sharded.save_checkpoint(tmp_path, 1, state, model_config)
    assert set(state) == {"model", "train_state"} and set(state["model"]) == {
        "a.weight",
        "b.bias",
        "layer._extra_state",
    }


def test_no_machine_path_is_stored(tmp_path: Path, model_config: ModelConfig) -> None:
    checkpoint = save(tmp_path, 1, model_config)
    held = b"".join(path.read_bytes() for path in checkpoint.path.rglob("*") if path.is_file())
    assert str(tmp_path).encode() not in held


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c.weight": torch.zeros(2)}, r"it lacks c\.weight"),
        ({"b.bias": None}, r"no place for b\.bias"),
        ({"a.weight": torch.zeros(4, 4)}, r"a\.weight: stored \[4, 3\], expected \[4, 4\]"),
    ],
)
def test_model_of_another_shape_is_refused(
    tmp_path: Path, model_config: ModelConfig, change: dict[str, Any], message: str
) -> None:
    checkpoint = save(tmp_path, 1, model_config)
    tensors = {name: tensor for name, tensor in (weights() | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        sharded.load_model_weights(checkpoint, sharded_state(tensors))


def test_other_optimizer_state_is_refused_with_the_likely_cause(tmp_path: Path, model_config: ModelConfig) -> None:
    checkpoint = save(tmp_path, 1, model_config)
    state = wanted_state()
    state["optimizer"]["state"][1] = {"exp_avg": ShardedTensor.from_rank_offsets("optimizer.state.x", torch.zeros(2))}
    with pytest.raises(CheckpointError, match=r"other trainable parts.*it lacks optimizer\.state\.x"):
        sharded.load_training_state(checkpoint, state)


def test_model_without_training_state_cannot_be_resumed(tmp_path: Path, model_config: ModelConfig) -> None:
    checkpoint = sharded.save_checkpoint(tmp_path, 0, {"model": sharded_state(weights())}, model_config)
    with pytest.raises(CheckpointError, match="without training state"):
        sharded.load_training_state(checkpoint, wanted_state())


def test_failed_save_leaves_the_last_good_checkpoint(tmp_path: Path, model_config: ModelConfig) -> None:
    good = save(tmp_path, 1, model_config)
    state = {"model": sharded_state(weights()), "callback": print}
    with pytest.raises(CheckpointError, match=r"common\.pt"):
        sharded.save_checkpoint(tmp_path, 2, state, model_config)
    assert folder.find_checkpoint(tmp_path) == good
    assert save(tmp_path, 2, model_config).iteration == 2


def test_unwritable_place_is_named(tmp_path: Path, model_config: ModelConfig) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write a checkpoint under"):
        save(tmp_path / "file" / "run", 1, model_config)


def test_retention_while_saving(tmp_path: Path, model_config: ModelConfig) -> None:
    for iteration in range(1, 6):
        save(tmp_path, iteration, model_config, keep_last=2, save_retain_interval=2)
    assert sorted(checkpoint.iteration for checkpoint in folder.checkpoints(tmp_path)) == [2, 4, 5]


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_checkpoint_cannot_run_code(tmp_path: Path, model_config: ModelConfig, name: str) -> None:
    checkpoint = save(tmp_path, 1, model_config)
    (checkpoint.path / name).write_bytes(pickle.dumps(Payload(tmp_path / "evil")))
    with pytest.raises(CheckpointError, match=name):
        sharded.load_model_weights(checkpoint, sharded_state(weights()))
    assert not (tmp_path / "evil").exists()


def test_stored_object_cannot_run_code(tmp_path: Path, model_config: ModelConfig) -> None:
    """mcore's ShardedObject is a pickle inside a tensor file, which torch's planner loads without weights_only."""
    hostile = {"model": {"object": ShardedObject("object", Payload(tmp_path / "evil"), (1,), (0,))}, "train_state": {}}
    checkpoint = sharded.save_checkpoint(tmp_path, 1, hostile, model_config)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp cannot be read: .* more than tensors"):
        sharded.load_model_weights(checkpoint, {"object": ShardedObject("object", None, (1,), (0,))})
    assert not (tmp_path / "evil").exists()


def test_parameter_group_that_cannot_be_looked_up_is_named(tmp_path: Path, model_config: ModelConfig) -> None:
    checkpoint = save(tmp_path, 3, model_config)
    common = torch.load(checkpoint.path / "common.pt", weights_only=True)
    common["optimizer"]["param_groups"][0]["pre_wd_mult"] = [1.0, 1.0]
    torch.save(common, checkpoint.path / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt: 'pre_wd_mult' of a parameter group is \[1\.0, 1\.0\]"):
        sharded.load_training_state(checkpoint, wanted_state())
