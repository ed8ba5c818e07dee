"""The stand-ins' FP8: all three products of an FP8 linear equal products of values cast by hand."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from typing import TYPE_CHECKING

import pytest

from ross_mcore import platform

if TYPE_CHECKING:
    from torch import Tensor, dtype

E4M3_MAX, E5M2_MAX = 448.0, 57344.0


def cast(x: Tensor, to: dtype, scale: float) -> Tensor:
    """x scaled, cast to FP8 and converted back to float32; larger numbers become the largest of format `to`."""
    import torch

    top = torch.finfo(to).max
    return (x.float() * scale).clamp(-top, top).to(to).float() / scale


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_all_three_products_are_of_fp8_numbers(recipe: str) -> None:
    """Hybrid: activations and weights in e4m3, gradients in e5m2; delayed scales are those of the step before."""
    import torch
    from transformer_engine import pytorch as engine
    from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling, Format

    recipes = {
        "delayed": DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=2, amax_compute_algo="max"),
        "tensorwise": Float8CurrentScaling(fp8_format=Format.HYBRID),
    }
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    linear = engine.Linear(64, 48, bias=False, params_dtype=torch.bfloat16)
    weight = draw(48, 64)
    linear.weight.data.copy_(weight)
    before = [draw(32, 64), weight, 1e-3 * draw(32, 48)]
    now = [3 * before[0], weight, 1e-3 * draw(32, 48)]  # larger than before: delayed scaling clips the largest
    for inputs, _, gradient in (before, now):
        inputs.requires_grad_()
        linear.weight.grad = None
        with engine.fp8_autocast(enabled=True, fp8_recipe=recipes[recipe]):
            out = linear(inputs)
        out.backward(gradient)

    tops, types = (E4M3_MAX, E4M3_MAX, E5M2_MAX), (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e5m2)
    measured = before if recipe == "delayed" else now
    scales = [top / seen.abs().max().item() for top, seen in zip(tops, measured)]
    x, w, g = (cast(value.detach(), to, scale) for value, to, scale in zip(now, types, scales))
    assert ((x - now[0]).abs().max() > now[0].abs().max() / 2) == (recipe == "delayed")

    products = {"output": (out, x @ w.t()), "input": (now[0].grad, g @ w), "weight": (linear.weight.grad, g.t() @ x)}
    plain = {"output": now[0].float() @ weight.float().t(), "input": now[2].float() @ weight.float()}
    plain["weight"] = now[2].float().t() @ now[0].float()
    for name, (ours, expected) in products.items():
        largest = expected.abs().max()
        assert (ours - expected).abs().max() <= 4e-3 * largest, name  # bf16 results keep 8 bits
        assert (plain[name] - expected).abs().max() > 1.5e-2 * largest, name  # and casts leave 4 or 3 of 8


def test_transformer_engine_says_which_flash_attn_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own range of versions, as setup.py and docker/check_image.py have it."""
    import check_image
    from transformer_engine.pytorch.attention.dot_product_attention.backends import fa_utils

    engine = importlib.metadata.version("transformer_engine")
    lowest, highest = re.findall(r"[\d.]+", check_image.FLASH_ATTENTION[".".join(engine.split(".")[:2])])
    assert (str(fa_utils.version_required_blackwell), str(fa_utils.max_version)) == (lowest, highest)
    refusal = f"Transformer Engine {engine} takes flash-attn {fa_utils.version_required} to {highest}, and "
    assert platform.flash_attention_refusal() == refusal + "none is installed"
    monkeypatch.setattr(fa_utils, "version", "2.8.3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert platform.flash_attention_refusal() == refusal + "2.8.3 is installed"
    monkeypatch.setattr(fa_utils, "is_installed", True)
    assert platform.flash_attention_refusal() is None
