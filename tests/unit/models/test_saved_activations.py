"""The bytes that backward reads, counted with hooks on saved tensors, against parallel/memory.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from ross_mcore.architecture import DenoiserConfig, LanguageConfig
from ross_mcore.costs import LOCAL, Plan
from ross_mcore.models import language
from ross_mcore.models.attention import packed_sequence
from ross_mcore.models.denoiser import Denoiser
from ross_mcore.parallel.groups import initialize
from ross_mcore.parallel.layout import Layout
from ross_mcore.parallel.memory import DENOISER_VALUES, layer_activations
from tests.unit.parallel.test_layout import ROSS_7B, replace

SMALL = LanguageConfig("qwen2", 256, 1024, 1, 8, 2, 32, 512, 4096, 1e-6, 1e6, False, True)


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


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_decoder_layer_keeps_what_the_plan_counts(
    fused: bool, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a norm that keeps its input, as a GPU's kernel does; torch's on a CPU keeps more."""

    def norm(self: language.RMSNorm, hidden: Tensor) -> Tensor:
        return F.layer_norm(hidden, self.weight.shape, self.weight, None, self.eps)

    monkeypatch.setattr(language.RMSNorm, "forward", norm)
    execution = language.Execution(dtype=torch.bfloat16)
    config = language.transformer_config(SMALL, initialize(Layout(1, 1, 1, (1,)), 0, 5), execution)
    config.bias_activation_fusion = fused
    block = TransformerBlock(config, language.layer_spec(execution, 1), pre_process=True, post_process=False)
    block.requires_grad_(trains)
    tokens, hidden = 256, torch.randn(256, 1, 256, dtype=torch.bfloat16, requires_grad=True)
    rotary = RotaryEmbedding(32, 1.0, rotary_base=1e6, use_cpu_initialization=True)(128)
    found = saved_bytes(
        lambda: block(hidden, None, rotary_pos_emb=rotary, packed_seq_params=packed_sequence([128, 128])),
        block.parameters(),
    )
    plan = Plan(tokens=tokens, llm_trains=trains, kernels=replace(LOCAL, fused_mlp=fused))
    _, planned = layer_activations(replace(ROSS_7B, language=SMALL), plan, tensor=1)
    small = tokens * (8 * 32 + 8 * 4 + 4 * 2)  # rotary tables, sums of the softmax, means and deviations of the norms
    assert planned <= found <= planned + small


def test_the_denoiser_keeps_what_the_plan_counts() -> None:
    depth, width, images, grid = 3, 128, 2, 9
    model = Denoiser(DenoiserConfig(depth=depth, width=width, num_heads=4), 64, 256, grid)
    condition = torch.randn(images, grid**2, 256, requires_grad=True)
    latents, steps = torch.randn(4 * images, 64, grid, grid), torch.zeros(4 * images, dtype=torch.int64)
    found = saved_bytes(lambda: model(latents, steps, condition), model.parameters())
    assert found / (4 * depth * 4 * images * grid**2 * width) == pytest.approx(DENOISER_VALUES, rel=0.05)
