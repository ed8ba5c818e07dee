"""With Transformer Engine's layers too, forward and backward never wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.distributed.test_syncs import assert_few, counted


def test_only_the_end_of_a_step_waits(
    base: Callable[[str], Path], shards: Callable[[str], Path], tmp_path: Path
) -> None:
    flags = {"transformer_impl": "transformer_engine", "bf16": True}
    names = ["stage 1, a sample a row", "stage 2, packed, TP2 x PP2"]
    for name, found in counted(base("qwen2_siglip"), shards("mixed"), tmp_path, names, **flags):
        assert_few(name, found)
