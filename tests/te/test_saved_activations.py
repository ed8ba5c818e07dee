"""The bytes that backward reads of a layer of Transformer Engine, with the stand-ins, against parallel/memory.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from counting.ops import LANGUAGE, decoder

from ross_mcore.costs import Plan
from ross_mcore.models.language import Execution
from ross_mcore.parallel.memory import layer_activations
from tests.unit.models.test_saved_activations import saved_bytes
from tests.unit.parallel.test_layout import ROSS_7B

TOKENS = 96


@pytest.mark.parametrize("trains", [True, False])
def test_a_layer_keeps_what_the_plan_counts(trains: bool, process_group: None) -> None:
    def kept(layers: int) -> int:
        model = decoder(layers, Execution("transformer_engine", torch.bfloat16)).module.requires_grad_(trains)
        hidden = torch.randn(TOKENS, 1, LANGUAGE.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        return saved_bytes(lambda: model(hidden, (64, 32)), model.parameters())

    plan, model = Plan(tokens=TOKENS, llm_trains=trains), replace(ROSS_7B, language=LANGUAGE)
    _, planned = layer_activations(model, plan, tensor=1)
    assert planned <= kept(2) - kept(1) <= planned + 16 * TOKENS, "deviations of the norms, sums of the softmax"
