"""The suite runs on the CPU, also on machines that have GPUs: its layouts need more processes than those."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup() -> None:
    """When mcore builds a model, it says in the environment which attention Transformer Engine is to take
    (language_module.py:104). The next test begins without."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)
