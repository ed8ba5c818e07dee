"""Attention of packed rows: within segments alone, in calls of few shapes; rotary angles by position in the segment."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ross_mcore import platform
from ross_mcore.models.attention import (
    RotaryAngles,
    SDPACoreAttention,
    packed_sequence,
    padded_length,
    varlen_attention,
)

HEADS, GROUPS, SIZE = 4, 2, 8


def attention() -> SDPACoreAttention:
    return SDPACoreAttention(SimpleNamespace(), layer_number=1)


def inputs(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(tokens, 1, heads, SIZE, generator=generator, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def one_segment(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(QK') V in float64, causal: [L, 1, h, D] -> [L, 1, h * D]."""
    q, k, v = (part.squeeze(1).transpose(0, 1).double() for part in (query, key, value))
    k, v = (part.repeat_interleave(HEADS // GROUPS, 0) for part in (k, v))
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(1, 2) * SIZE**-0.5).masked_fill(future, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)[:, None]


@pytest.mark.parametrize("lengths", [[5, 1, 64, 40], [37, 37], [96]], ids=str)
def test_a_packed_row_equals_its_segments(lengths: list[int]) -> None:
    parts = inputs(sum(lengths))
    ours = attention()(*parts, None, packed_sequence(lengths))
    theirs = torch.cat([one_segment(*pieces) for pieces in zip(*(part.split(lengths) for part in parts))])
    factors = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((result * factors).sum(), parts) for result in (ours, theirs)]
    for found, wanted in zip((ours, *gradients[0]), (theirs, *gradients[1]), strict=True):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-6)


def test_nothing_is_computed_between_segments() -> None:
    """A segment that is not finite leaves the others' results and gradients as they are."""
    lengths = [7, 30, 41]
    parts = inputs(sum(lengths))
    with torch.no_grad():
        parts[1][10], parts[2][20] = float("nan"), float("inf")
    result = attention()(*parts, None, packed_sequence(lengths))
    first, bad, last = result.split(lengths)
    assert not bad.isfinite().all()
    for gradient in torch.autograd.grad(first.sum() + last.sum(), parts):
        assert all(gradient.split(lengths)[place].isfinite().all() for place in (0, 2))


def test_a_hundred_steps_have_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 4,096 tokens with samples as in visual instruction data: 729 tokens a picture, text of 20 to 2,000."""
    numbers, shapes, lengths = random.Random(0), set(), set()

    def record(query: Tensor, *_: Any, **__: Any) -> Tensor:
        shapes.add(query.shape)
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    token = torch.zeros(4096, 1, 1, 1)
    for _ in range(100 * 2):
        row: list[int] = []
        while sum(row) < 4096:
            text = min(2000, int(numbers.lognormvariate(5.2, 0.8)) + 20)
            row.append(min(4096 - sum(row), text + 729 * (numbers.random() < 0.85)))
        lengths.update(row)
        attention()(token, token, token, None, packed_sequence(row))
    assert len(lengths) > 500 and len(shapes) <= 60


def test_one_call_in_16_bits_on_a_gpu_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first version had neither a scale nor grouped queries; then every segment is a call."""
    calls = []

    def newest(q: Tensor, k: Tensor, v: Tensor, *ends: Any, scale: Any, window_size: Any, enable_gqa: bool) -> Tensor:
        calls.append((*(end if isinstance(end, int) else end.tolist() for end in ends), window_size, enable_gqa))
        return q

    def first(q: Tensor, k: Tensor, v: Tensor, *ends: Any, is_causal: bool = False) -> Tensor:
        raise AssertionError("takes no scale")

    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(platform, "is_ampere", lambda: True)
    lengths, parts = [5, 1, 9], [part.bfloat16() for part in inputs(15)]
    for attend in (newest, first):
        monkeypatch.setattr(varlen, "varlen_attn", attend)
        varlen_attention.cache_clear()
        assert attention()(*parts, None, packed_sequence(lengths)).shape == (15, 1, HEADS * SIZE)
    varlen_attention.cache_clear()
    assert calls == [([0, 5, 6, 15], [0, 5, 6, 15], 9, 9, (-1, 0), True)]


def test_padding_is_small() -> None:
    assert all(0 <= padded_length(length) - length < max(32, length / 8) for length in range(1, 40_000, 7))
    assert len({padded_length(length) for length in range(1, 4097)}) == 56


def test_rotary_angles_start_again_in_every_segment() -> None:
    frequencies = torch.tensor([1.0, 0.25])
    angles = RotaryAngles(frequencies)(packed_sequence([3, 2]).positions)
    assert angles.shape == (5, 1, 1, 4)
    assert angles[:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1]
    assert torch.equal(angles[..., :2], angles[..., 2:]) and angles[2, 0, 0, 1] == 0.5
