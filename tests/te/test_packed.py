"""Packed samples train as samples in separate rows, through Transformer Engine's attention (THD)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import INTERLEAVED, Case, layout
from tests.distributed.conftest import Finished
from tests.distributed.test_layouts import APART, assert_same_step, compared_gradients, packed_flags
from tests.te.looking import looks_of, train_and_look
from tests.te.test_fp8 import FP8

BF16: dict[str, Any] = {"transformer_impl": "transformer_engine", "bf16": True}

LOSSES, NORM, GRADIENTS = 3e-4, 5e-3, 2e-2
"""bf16 has 8 bits (4e-3). The same sums, split and rounded differently: measured up to 7e-5 on losses, 2e-3 on the norm
(one process has the norm of tensor 2 when it rounds the two halves of every sum over a split dimension) and 6e-3 of a
family's largest gradient. Attention across the samples of a row: 1e-3 on lm_loss, 7e-2 on the norm, 8e-2
(denoiser) to 2e-1 (projector) on gradients."""


def train_across_samples(flags: dict[str, Any], stop_after: int | None = None) -> None:
    """`train_and_look` with an attention that treats a row as one sample; micro-batches have one row."""
    from ross_mcore.models.attention import packed_sequence
    from ross_mcore.models.transformer_engine import CoreAttention

    attend = CoreAttention.forward

    def across(self: Any, query: Any, *others: Any, packed_seq_params: Any, **more: Any) -> Any:
        return attend(self, query, *others, packed_seq_params=packed_sequence([len(query)]), **more)

    CoreAttention.forward = across
    train_and_look(flags, stop_after)


@pytest.fixture(scope="module")
def separate(start: Callable[..., Finished]) -> Finished:
    run = start(Case("", 1, BF16), "engine_apart", rank=train_and_look, **APART)
    assert attention_layouts(run) == {"BSHD_BSHD_BSHD"}
    return run


def attention_layouts(run: Finished) -> set[str]:
    calls = [name for look in looks_of(run.folder) for name in look["calls"]]
    return {name.removeprefix("fused_attn_fwd ") for name in calls if name.startswith("fused_attn_fwd ")}


@pytest.mark.parametrize(
    "case",
    [
        Case("tp1", 1, BF16),
        Case("tp2xpp2+sp", 4, {**BF16, **layout(2, 2, sequence_parallel=True)}),
        Case("pp2xvpp2", 2, {**BF16, **layout(1, 2, **INTERLEAVED)}),
    ],
    ids=lambda case: case.name,
)
def test_packed_and_separate_samples_train_alike(
    case: Case, separate: Finished, start: Callable[..., Finished], workplace: Path
) -> None:
    """Like tests/distributed/test_layouts.py for the local layers in fp32, for which thd has no kernel."""
    flags = packed_flags(workplace / "shards_mixed")
    packed = start(case, f"engine_packed_{case.name}", rank=train_and_look, **flags)
    assert "THD_THD_THD" in attention_layouts(packed)  # in addition to rows of one sample
    assert_same_step(packed, separate, LOSSES, NORM)
    largest, difference = compared_gradients(packed, separate)
    for family in largest:
        assert largest[family] > 0
        assert difference[family] <= GRADIENTS * largest[family], (family, difference, largest)


def test_attention_across_samples_is_detected(
    separate: Finished, start: Callable[..., Finished], workplace: Path
) -> None:
    """A wrong mask exceeds the tolerances of the test above: in the loss and in every family."""
    flags = packed_flags(workplace / "shards_mixed")
    blurred = start(Case("", 1, BF16), "engine_blurred", rank=train_across_samples, **flags)
    (ours,), (theirs,) = blurred.metrics, separate.metrics
    for name, allowed in (("lm_loss", LOSSES), ("grad_norm", NORM)):
        assert abs(ours[name] / theirs[name] - 1) > allowed, name
    largest, difference = compared_gradients(blurred, separate)
    for family in largest:
        assert difference[family] > GRADIENTS * largest[family], (family, difference, largest)


def test_fp8_takes_packed_rows(separate: Finished, start: Callable[..., Finished], workplace: Path) -> None:
    """Under sequence parallelism each of two ranks has a multiple of 16 of a row's tokens."""
    case = Case("", 4, {**FP8, **layout(2, 2, sequence_parallel=True), "fp8_recipe": "tensorwise"})
    packed = start(case, "engine_packed_fp8", rank=train_and_look, **packed_flags(workplace / "shards_mixed"))
    assert "THD_THD_THD" in attention_layouts(packed)  # in addition to rows of one sample
    for look in looks_of(packed.folder):
        assert look["calls"]["quantize"] > 0 and look["tokens"] and not any(count % 16 for count in look["tokens"])
    (ours,), (theirs,) = packed.metrics, separate.metrics
    for name in ("lm_loss", "vm_loss"):  # an e4m3 number has 3 bits after the first, see test_fp8.py
        assert ours[name] != theirs[name] and ours[name] == pytest.approx(theirs[name], rel=2e-2), name
