"""The bytes that backward reads, counted with hooks on saved tensors, against parallel/memory.py."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from counting.ops import LANGUAGE, ONE_CALL, decoder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ross_mcore.architecture import DenoiserConfig
from ross_mcore.costs import LOCAL, Kernels, Plan
from ross_mcore.models import language
from ross_mcore.models.denoiser import Denoiser
from ross_mcore.parallel.groups import initialize
from ross_mcore.parallel.layout import Chunk, Layout
from ross_mcore.parallel.memory import DENOISER_VALUES, LOGIT_BYTES, layer_activations
from tests.unit.parallel.test_layout import ROSS_7B


def saved_bytes(compute: Callable[[], object], parameters: Iterator[torch.nn.Parameter]) -> int:
    """Bytes of the storages, other than weights, that a computation keeps for its backward."""
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = compute()
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    del result
    return sum(tensor.untyped_storage().nbytes() for place, tensor in found.items() if place not in weights)


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
def test_a_decoder_layer_keeps_what_the_plan_counts(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a norm that keeps its input, as a GPU's kernel does; torch's on a CPU keeps more."""

    def norm(self: language.RMSNorm, hidden: Tensor) -> Tensor:
        return F.layer_norm(hidden, self.weight.shape, self.weight, None, self.eps)

    monkeypatch.setattr(language.RMSNorm, "forward", norm)
    check_layer(language.Execution(dtype=torch.bfloat16), LOCAL, trains)


def check_layer(execution: language.Execution, kernels: Kernels, trains: bool) -> None:
    """What a second decoder layer adds; the rest are the norms' deviations and the sums of the softmax."""
    tokens = sum(ONE_CALL)

    def kept(layers: int) -> int:
        model = decoder(layers, execution).module.requires_grad_(trains)
        hidden = torch.randn(tokens, 1, LANGUAGE.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        return saved_bytes(lambda: model(hidden, ONE_CALL), model.parameters())

    plan = Plan(tokens=tokens, llm_trains=trains, kernels=kernels)
    _, planned = layer_activations(replace(ROSS_7B, language=LANGUAGE), plan, tensor=1)
    assert planned <= kept(2) - kept(1) <= planned + 24 * tokens


def test_the_denoiser_keeps_what_the_plan_counts() -> None:
    depth, width, images, grid = 3, 128, 2, 9
    model = Denoiser(DenoiserConfig(depth=depth, width=width, num_heads=4), 64, 256, grid)
    condition = torch.randn(images, grid**2, 256, requires_grad=True)
    latents, steps = torch.randn(4 * images, 64, grid, grid), torch.zeros(4 * images, dtype=torch.int64)
    found = saved_bytes(lambda: model(latents, steps, condition), model.parameters())
    assert found / (4 * depth * 4 * images * grid**2 * width) == pytest.approx(DENOISER_VALUES, rel=0.05)
