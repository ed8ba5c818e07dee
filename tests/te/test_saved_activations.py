"""The bytes that backward reads of a layer of Transformer Engine, with the stand-ins, against parallel/memory.py."""

from __future__ import annotations

import pytest
import torch

from ross_mcore.costs import TRANSFORMER_ENGINE
from ross_mcore.models.language import Execution
from tests.unit.models.test_saved_activations import check_layer


@pytest.mark.parametrize("trains", [True, False])
def test_a_layer_keeps_what_the_plan_counts(trains: bool, process_group: None) -> None:
    check_layer(Execution("transformer_engine", torch.bfloat16), TRANSFORMER_ENGINE, trains)
