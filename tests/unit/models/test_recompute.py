"""Every choice of recomputation: the same bits in losses and gradients, and the bytes that are kept."""

from __future__ import annotations

import torch
from counting.kept import CHOICES, of_denoiser, of_layer
from counting.ops import LANGUAGE, SEGMENTS, decoder

from ross_mcore.architecture import DenoiserConfig
from ross_mcore.costs import Recompute
from ross_mcore.models.denoiser import Denoiser
from ross_mcore.models.language import Execution
from ross_mcore.models.products import Precision

BLOCK = Recompute("full", "block", 1)


def gradients(recompute: Recompute) -> list[torch.Tensor]:
    """The states of two layers, and all gradients of their squares."""
    model = decoder(2, Execution(recompute=recompute))
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(sum(SEGMENTS), 1, LANGUAGE.hidden_size, generator=generator).requires_grad_()
    states = model(hidden, SEGMENTS)
    states.square().sum().backward()
    return [states.detach(), hidden.grad, *(weight.main_grad for weight in model.parameters())]


def test_what_is_recomputed_changes_no_bit() -> None:
    kept = gradients(Recompute())
    assert sum(bool(gradient.any()) for gradient in kept) > 16
    for recompute in (*CHOICES.values(), BLOCK):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(recompute), kept, strict=True)), (
            recompute
        )


def test_bytes_that_a_layer_keeps() -> None:
    """Of a token, in bf16. Without recomputation at most: of a norm its input, output and one fp32 number; the output
    of the qkv layer, rotated queries and keys with four angles for each number of a head; the output of the attention,
    of each segment and of all, and an fp32 number a head; gate and up of the MLP, and their product."""
    width, ffn, head = LANGUAGE.hidden_size, LANGUAGE.intermediate_size, LANGUAGE.head_dim
    queries, keys = LANGUAGE.num_attention_heads, LANGUAGE.num_key_value_heads
    norms, mlp = 2 * (2 * 2 * width + 4), 2 * 3 * ffn
    attention = 2 * head * (2 * queries + 3 * keys + 4 + 2 * queries) + 4 * queries
    found = {name: of_layer(Execution(dtype=torch.bfloat16, recompute=CHOICES[name])) for name in CHOICES}
    everything = found["nothing"]
    assert mlp < everything <= norms + attention + mlp
    assert everything - found["mlp"] == mlp
    assert found["core_attn and mlp"] - found["core_attn"] == -mlp and found["core_attn"] < everything
    assert found["full, uniform 1"] == 2 * width
    assert of_layer(Execution(dtype=torch.bfloat16, recompute=BLOCK)) == everything  # the second layer keeps all


def test_bytes_that_the_denoiser_keeps() -> None:
    """Of a token and a block. bf16: factors and results of the products, 17 times the width, take half of their bytes.
    Recomputed: only the block's input, because all blocks have the same condition. No copy of a weight is kept."""
    width, heads = 64, 4

    def kept(precision: Precision, recompute: bool, depth: int) -> float:
        config = DenoiserConfig(depth=depth, width=width, num_heads=heads)
        return of_denoiser(Denoiser(config, 8, 12, 4, precision, recompute).bfloat16())

    found = {(p, again): kept(p, again, 3) - kept(p, again, 2) for p in ("fp32", "bf16") for again in (False, True)}
    numbers = 4 * (2 * 2 + heads)  # mean and deviation of two norms; of the attention
    assert found == {
        ("fp32", False): 29 * 4 * width + numbers,
        ("bf16", False): (12 * 4 + 17 * 2) * width + numbers,
        ("fp32", True): 4 * width,
        ("bf16", True): 4 * width,
    }
