"""The suite runs on the CPU, also on machines that have GPUs: its layouts need more processes than those."""

import os
from collections.abc import Iterator

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup() -> None:
    """When mcore builds a model, it says in the environment which attention Transformer Engine is to take
    (language_module.py:104). The next test begins without."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A group of this process alone, for a module of tests."""
    import torch.distributed as dist

    from ross_mcore import platform

    was_there = dist.is_initialized()
    platform.initialize_process_group(1)
    yield
    if not was_there:
        dist.destroy_process_group()
