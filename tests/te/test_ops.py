"""Kernels of a decoder layer on Transformer Engine, counted on the stand-ins: each of its functions is one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from counting.dispatch import Operations
from counting.ops import of_layer

from ross_mcore.models.language import Execution
from tests.te import extension


@contextlib.contextmanager
def compiled(operations: Operations) -> Iterator[None]:
    """Every function of the extension, and of mcore's fuser, is one kernel."""
    with pytest.MonkeyPatch.context() as patch, operations.compiled():
        patch.setattr(extension, "around", operations.one)
        yield


@pytest.mark.parametrize(("fuses", "forward", "backward"), [(False, 16, 24), (True, 16, 20)])
def test_a_layer_has_no_more_kernels_than(fuses: bool, forward: int, backward: int, process_group: None) -> None:
    """Two norms, four products, two rotations, attention, SwiGLU, two residuals, and in the backward pass eight
    products; without fusion also four sums of weight gradients."""
    execution = Execution("transformer_engine", torch.bfloat16, gradient_accumulation_fusion=fuses)
    found = of_layer(execution, within=compiled)
    assert found.forward.total() <= forward, found.forward
    assert found.backward.total() <= backward, found.backward
