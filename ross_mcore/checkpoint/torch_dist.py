"""What is the same in every checkpoint of mcore's `torch_dist` format that this trainer writes. No mcore needed.

Names and constants alone: mcore and torch state them in several files, without a public name.
"""

from __future__ import annotations

from typing import Any

INDEX_FILE = ".metadata"
"""Name, shape and place of every tensor (written by torch.distributed.checkpoint)."""
COMMON_FILE = "common.pt"
"""What is the same on all ranks (written by mcore)."""
BACKEND_FILE = "metadata.json"
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
OPTIMIZER_PREFIX = "optimizer."
"""What the names of optimizer state begin with; the others are the model's."""
MASTER_PREFIX = OPTIMIZER_PREFIX + "state.param."
"""What precedes a weight's name in that of its fp32 master; so the distributed optimizer calls it."""
PLAIN_MASTER_PREFIX = OPTIMIZER_PREFIX + "state.fp32_param."
"""What mcore's other mixed-precision optimizer calls the same; no checkpoint has it."""
PLAIN_MASTERS = "fp32_from_fp16_params"
"""Where that one's state has its masters."""
FP8_PREFIX = OPTIMIZER_PREFIX + "fp8."
"""What the names of FP8 scales and histories begin with: training state that a checkpoint may have or lack."""
SHARDING = {
    # the only distributed-optimizer format of 0.16.1 that every other layout can read
    "distrib_optim_sharding_type": "fully_reshardable",
    # layer N is stored under its own name: layers may differ in what trains, and stages in how many they hold
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def sharding_metadata() -> dict[str, Any]:
    """What to pass as `metadata` to every `sharded_state_dict`; stored in the checkpoint and compared on load.

    A new dict each time, because mcore writes process groups into it.
    """
    return dict(SHARDING)
