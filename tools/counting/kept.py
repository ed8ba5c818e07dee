"""Bytes that the forward pass keeps for the backward pass, with every choice of recomputation and precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from counting import Row
from counting.ops import LANGUAGE, SEGMENTS, decoder
from ross_mcore.architecture import DenoiserConfig, LanguageConfig
from ross_mcore.costs import Recompute
from ross_mcore.models.denoiser import Denoiser
from ross_mcore.models.language import Execution, RMSNorm

QUARTER = replace(
    LANGUAGE, hidden_size=896, intermediate_size=4736, num_attention_heads=7, num_key_value_heads=1, head_dim=128
)
"""A quarter of the widths of Qwen2-7B, of which a layer keeps a quarter of the bytes."""
CHOICES = {
    "nothing": Recompute(),
    "core_attn": Recompute("selective", modules=("core_attn",)),
    "mlp": Recompute("selective", modules=("mlp",)),
    "core_attn and mlp": Recompute("selective", modules=("core_attn", "mlp")),
    "full, uniform 1": Recompute("full"),
}


class _FusedNorm(torch.autograd.Function):
    """RMSNorm as CUDA's kernel has it: it keeps its input and one number a token. On a CPU torch keeps fp32 copies."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(hidden, weight, inverse)
        return (wide * inverse).to(hidden.dtype) * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, inverse = ctx.saved_tensors
        normed, scaled = hidden.float() * inverse, (gradient * weight).float()
        of_hidden = inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        return of_hidden.to(hidden.dtype), (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype), None


@contextlib.contextmanager
def fused_norms() -> Iterator[None]:
    """Lets the local layers keep what they keep on a GPU."""

    def forward(self: RMSNorm, hidden: Tensor) -> Tensor:
        normed: Tensor = _FusedNorm.apply(hidden, self.weight, self.eps)
        return normed

    with mock.patch.object(RMSNorm, "forward", forward):
        yield


def kept_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """The bytes of all storages that `forward` keeps for its backward pass, without those of the module's weights."""
    seen: dict[int, Tensor] = {}  # of the tensors themselves, or their addresses would be used again

    def keep(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    own = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    found = sum(t.untyped_storage().nbytes() for address, t in seen.items() if address not in own)
    del result
    return found


def of_layers(layers: int, execution: Execution, language: LanguageConfig = LANGUAGE) -> int:
    """Bytes kept of a decoder of `layers` layers for a packed row of SEGMENTS."""
    model = decoder(layers, execution, language=language)
    hidden = torch.randn(sum(SEGMENTS), 1, language.hidden_size, dtype=execution.dtype, requires_grad=True)
    with fused_norms():
        return kept_bytes(lambda: model(hidden, SEGMENTS), model)


def of_layer(execution: Execution, language: LanguageConfig = LANGUAGE) -> float:
    """Bytes that one decoder layer keeps for a token: what a second layer adds to the first."""
    one, two = (of_layers(layers, execution, language) for layers in (1, 2))
    return (two - one) / sum(SEGMENTS)


def of_denoiser(denoiser: Denoiser, images: int = 1) -> float:
    """Bytes that a denoiser keeps for a token of a noisy latent (an image has `draws` of them)."""
    draws, grid = denoiser.config.draws, denoiser.grid
    latents = torch.randn(images * draws, denoiser.in_channels, grid, grid)
    timesteps = torch.zeros(images * draws, dtype=torch.int64)
    condition = torch.randn(images, grid**2, denoiser.condition_size, requires_grad=True)
    return kept_bytes(lambda: denoiser(latents, timesteps, condition), denoiser) / (images * draws * grid**2)


def rows() -> list[Row]:
    """At the widths of Qwen2-7B (a quarter of them, times four), one tensor-parallel rank, bf16; of the denoiser with
    weights in bf16."""
    bf16 = Execution(dtype=torch.bfloat16)
    found = []
    for name, recompute in CHOICES.items():
        count = 4 * of_layer(replace(bf16, recompute=recompute), QUARTER)
        aim = f"{4 * 2 * QUARTER.hidden_size:,}" if name.startswith("full") else ""
        found.append(Row(f"a local layer, {name} recomputed", f"{count:,.0f}", aim, "bytes a token"))
    for precision in ("fp32", "bf16"):
        for recompute in (False, True):
            denoiser = Denoiser(DenoiserConfig(), 64, 3584, 8, precision, recompute).to(torch.bfloat16)
            name = f"the denoiser in {precision}" + (", its blocks recomputed" if recompute else "")
            found.append(Row(name, f"{of_denoiser(denoiser):,.0f}", "", "bytes a token of a noisy latent"))
    return found
