"""Fingerprints of tensors, and which rank deviates."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ross_mcore.guards import replicas
from ross_mcore.guards.replicas import deviating, fingerprint

TYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64, torch.bool]


def tensor_of(dtype: torch.dtype, elements: int = 20) -> Tensor:
    bits = torch.randint(2 if dtype == torch.bool else 256, (elements * dtype.itemsize,), dtype=torch.uint8)
    return bits.view(dtype)


def value(tensor: Tensor) -> int:
    return int(fingerprint(tensor))


@pytest.fixture(autouse=True)
def pieces_of_sixteen_words(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that a small tensor has several pieces."""
    monkeypatch.setattr(replicas, "WORDS_AT_ONCE", 16)
    replicas._factors.cache_clear()
    torch.manual_seed(1)
    yield
    replicas._factors.cache_clear()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_bit_of_every_type_counts(dtype: torch.dtype) -> None:
    tensor = tensor_of(dtype)
    expected = value(tensor)
    assert value(tensor.clone()) == expected
    found = {expected}
    for byte in range(tensor.view(torch.uint8).numel()):
        for bit in (1,) if dtype == torch.bool else (1 << place for place in range(8)):
            flipped = tensor.clone()
            flipped.view(torch.uint8)[byte] ^= bit
            found.add(value(flipped))
    assert len(found) == 1 + tensor.numel() * (1 if dtype == torch.bool else 8 * dtype.itemsize)


def test_the_order_of_elements_counts_within_and_between_pieces() -> None:
    tensor = torch.randn(50)
    found = {value(tensor)}
    for first, second in ((0, 1), (3, 14), (0, 16), (5, 37), (18, 33)):
        swapped = tensor.clone()
        swapped[[first, second]] = tensor[[second, first]]
        found.add(value(swapped))
    pieces = tensor.clone()
    pieces[:16], pieces[16:32] = tensor[16:32], tensor[:16]
    found.add(value(pieces))
    assert len(found) == 7


def test_changes_do_not_cancel_out() -> None:
    """Flips all signs, and changes every two elements by the same bits up and down. Factors are odd, so that no change
    of one word is lost."""
    assert bool((replicas._factors(torch.device("cpu")) % 2 == 1).all())
    tensor = torch.randn(8).repeat(4)
    found = {value(tensor), value(-tensor)}
    for first in range(len(tensor)):
        for second in range(first):
            changed = tensor.clone()
            changed.view(torch.int32)[first] += 1
            changed.view(torch.int32)[second] -= 1
            found.add(value(changed))
    assert len(found) == 2 + 32 * 31 // 2


def test_zeros_have_signs_and_nans_equal_themselves() -> None:
    assert value(torch.tensor([0.0, 1.0])) != value(torch.tensor([-0.0, 1.0]))
    assert value(torch.tensor([math.nan, math.inf])) == value(torch.tensor([math.nan, math.inf]))
    assert value(torch.tensor([math.nan, math.inf])) != value(torch.tensor([math.nan, -math.inf]))


def test_shape_and_memory_layout_do_not_matter() -> None:
    tensor = torch.randn(5, 8).to(torch.bfloat16)
    expected = value(tensor)
    assert value(tensor.flatten()) == value(tensor.t().contiguous().t()) == expected
    room = torch.zeros(41, dtype=torch.bfloat16)
    room[1:] = tensor.flatten()
    assert value(room[1:]) == expected  # at an odd address
    assert value(torch.tensor(3.0)) == value(torch.tensor([3.0])) != 0
    assert value(torch.zeros(0)) == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({0: 5, 1: 5, 2: 5}, []),
        ({0: 5, 1: 6, 2: 5}, [1]),
        ({4: 6, 5: 5, 6: 7, 7: 5, 8: 5}, [4, 6]),
        ({0: 5, 1: 6}, []),
        ({0: 5, 1: 5, 2: 6, 3: 6}, []),
        ({3: 5}, []),
    ],
)
def test_a_rank_is_at_fault_when_most_others_agree(values: dict[int, int], expected: list[int]) -> None:
    assert deviating(values) == expected
