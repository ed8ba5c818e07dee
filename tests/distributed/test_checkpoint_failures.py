"""A save or load that fails on one rank ends on every rank, with the same message, and harms nothing that was there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ross_mcore import platform
from ross_mcore.architecture import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from ross_mcore.checkpoint import folder
from tests.distributed.harness import run_ranks

LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 8, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}


def model_config() -> ModelConfig:
    """Any architecture will do: these checkpoints hold one matrix."""
    language = LanguageConfig.from_huggingface({**LLAMA, "num_attention_heads": 1})
    return ModelConfig(language, VisionConfig(CLIP, (0, 0, 0), (1, 1, 1)), ProjectorConfig(), None, None)


def fail_on_rank_one(root: str, where: str, message: str) -> None:
    """What each of the two ranks runs: a good save, then one that fails on rank 1, then the good one is loaded."""
    platform.prepare()
    platform.initialize_process_group(1)
    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing import ShardedTensor

    from ross_mcore.checkpoint import saving, sharded

    rank = dist.get_rank()

    def state(rows: int = 2) -> dict[str, Any]:
        mine = torch.full((rows, 3), float(rank))
        return {"model": {"w": ShardedTensor.from_rank_offsets("w", mine, (0, rank, 2))}, "train_state": {}}

    good = sharded.save_checkpoint(Path(root), 1, state(), model_config())
    try:
        if where == "load":
            other = "other" if rank else "w"
            wanted = {other: ShardedTensor.from_rank_offsets(other, torch.zeros(2, 3), (0, rank, 2))}
            sharded.load_model_weights(good, wanted)
        else:
            if rank == 1:

                def broken(*_: Any, **__: Any) -> None:
                    raise OSError(28, "No space left on device")

                name = {"prepare": "split_state", "write": "_write"}[where]
                setattr(saving, name, broken)
            sharded.save_checkpoint(Path(root), 2, state(), model_config())
    except folder.CheckpointError as error:
        assert message in str(error), str(error)
    else:
        raise AssertionError("nothing was refused")
    assert folder.find_checkpoint(Path(root)) == good
    loaded = sharded.load_model_weights(good, state()["model"])
    assert torch.equal(loaded["w"], torch.full((2, 3), float(rank)))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("prepare", "No space left on device (rank 1)"),
        ("write", "No space left on device (rank 1)"),
        ("load", "it lacks other"),
    ],
)
def test_failure_on_one_rank_ends_all(tmp_path: Path, where: str, message: str) -> None:
    run_ranks(fail_on_rank_one, 2, str(tmp_path), where, message)
