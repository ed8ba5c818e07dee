"""Kernels of a local decoder layer and of the optimizer's step, counted on the CPU."""

from __future__ import annotations

import torch
from counting.ops import ONE_CALL, of_layer, of_optimizer

from ross_mcore.models.language import Execution


def test_a_local_layer_has_no_more_kernels_than(process_group: None) -> None:
    found = of_layer(Execution(dtype=torch.bfloat16), ONE_CALL)
    assert found.forward.total() <= 50, found.forward
    assert found.backward.total() <= 69, found.backward


def test_the_optimizers_step_does_not_grow_with_the_number_of_weights(process_group: None) -> None:
    """But for mcore's copies of bf16 weights from their masters. The host reads the norm, and whether all is finite."""
    for bf16, copies in ((False, 0), (True, 7)):
        two, three = (of_optimizer(layers, bf16) for layers in (2, 3))
        assert three.found.total() - two.found.total() == copies, three.found - two.found
        assert two.reads == three.reads == 2
