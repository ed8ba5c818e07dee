"""Fingerprints of weights kept in FP8."""

from __future__ import annotations

import torch

from ross_mcore.guards.replicas import fingerprint


def test_fp8_weights_count_by_their_values() -> None:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling

    with te.fp8_model_init(enabled=True, recipe=DelayedScaling()):
        weight = te.Linear(32, 32, params_dtype=torch.bfloat16, bias=False, device="cpu").weight
    before = int(fingerprint(weight))
    assert int(fingerprint(weight)) == before
    weight._data[0, 0] ^= 1
    assert int(fingerprint(weight)) != before
