"""Constants of mcore's `torch_dist` checkpoint format, which mcore and torch spell in several files without a name.

Imports no mcore.
"""

from __future__ import annotations

from typing import Any

INDEX_FILE = ".metadata"
"""Name, shape and place of every tensor (torch.distributed.checkpoint)."""
COMMON_FILE = "common.pt"
"""The state that is the same on all ranks (mcore)."""
BACKEND_FILE = "metadata.json"
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
OPTIMIZER_PREFIX = "optimizer."
"""Prefix of the names of optimizer state; all other tensors are the model's."""
MASTER_PREFIX = OPTIMIZER_PREFIX + "state.param."
"""Prefix of a weight's name in the name of its fp32 master (the distributed optimizer's spelling)."""
PLAIN_MASTER_PREFIX = OPTIMIZER_PREFIX + "state.fp32_param."
"""The same prefix in mcore's other mixed-precision optimizer; no checkpoint has it."""
PLAIN_MASTERS = "fp32_from_fp16_params"
"""Key of the masters in the state of that optimizer."""
SHARDED_STATE = "param_state"
"""Key of the masters and moments in the state of the distributed optimizer."""
FP8_PREFIX = OPTIMIZER_PREFIX + "fp8."
"""Prefix of the names of FP8 scales and histories, which a checkpoint may have or lack."""
SHARDING = {
    # masters and moments have the names and shapes of their weights, so every layout can read them
    "distrib_optim_sharding_type": "fully_reshardable",
    # each layer is stored under its own name: layers may train or not, and stages may differ in their number of layers
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def sharding_metadata() -> dict[str, Any]:
    """The `metadata` argument of every `sharded_state_dict`; stored in the checkpoint and compared when it is loaded.

    A new dict each time, because mcore writes process groups into it.
    """
    return dict(SHARDING)
