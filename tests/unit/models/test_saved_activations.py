"""The bytes that backward reads, counted with hooks on saved tensors, against parallel/memory.py."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from counting.kept import fused_norms, kept_bytes
from counting.ops import LANGUAGE, ONE_CALL, decoder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ross_mcore.costs import LOCAL, Kernels, Plan
from ross_mcore.models import language
from ross_mcore.parallel.groups import initialize
from ross_mcore.parallel.layout import Chunk, Layout
from ross_mcore.parallel.memory import LOGIT_BYTES, layer_activations
from tests.unit.parallel.test_layout import ROSS_7B


class Peak(TorchDispatchMode):
    """The most bytes of tensors made within this mode that exist at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.living: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.living:
                place, size = storage._cdata, storage.nbytes()
                self.living[place] = weakref.ref(storage, lambda _, place=place, size=size: self._drop(place, size))
                self.now += size
        self.most = max(self.most, self.now)
        return made

    def _drop(self, place: int, size: int) -> None:
        del self.living[place]
        self.now -= size


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_logits_need_what_the_plan_counts() -> None:
    groups, execution = initialize(Layout(1, 1, 1, (1,)), 0, 5), language.Execution(dtype=torch.bfloat16)
    small, tokens = replace(LANGUAGE, vocab_size=8192), 64
    config = language.transformer_config(small, groups, execution)
    model = language.LanguageModel(small, config, groups, execution, Chunk(0, range(1), True, True))
    states = torch.randn(tokens, 64, dtype=torch.bfloat16, requires_grad=True)
    with Peak() as peak:
        model.token_losses(states, torch.zeros(tokens, dtype=torch.int64)).sum().backward()
    assert peak.most / (tokens * 8192) == pytest.approx(LOGIT_BYTES, rel=0.01)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("trains", [True, False])
def test_a_decoder_layer_keeps_what_the_plan_counts(trains: bool) -> None:
    check_layer(language.Execution(dtype=torch.bfloat16), LOCAL, trains)


def check_layer(execution: language.Execution, kernels: Kernels, trains: bool) -> None:
    """What a second decoder layer adds; the rest are the norms' deviations and the sums of the softmax."""
    tokens = sum(ONE_CALL)

    def kept(layers: int) -> int:
        model = decoder(layers, execution).module.requires_grad_(trains)
        hidden = torch.randn(tokens, 1, LANGUAGE.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        with fused_norms():
            return kept_bytes(lambda: model(hidden, ONE_CALL), model)

    plan = Plan(tokens=tokens, llm_trains=trains, kernels=kernels)
    _, planned = layer_activations(replace(ROSS_7B, language=LANGUAGE), plan, tensor=1)
    assert planned <= kept(2) - kept(1) <= planned + 32 * tokens
