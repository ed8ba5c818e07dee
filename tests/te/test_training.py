"""Whole ROSS models on Transformer Engine's layers and on `local` ones: same losses, gradients and steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.distributed.cases import Case, layout
from tests.distributed.conftest import Finished
from tests.distributed.test_layouts import assert_same, compared_gradients

ENGINE = {"transformer_impl": "transformer_engine"}
LAYOUTS = [
    Case("tp1", 1, {**ENGINE}),
    Case("tp2+sp", 2, {**layout(2, sequence_parallel=True), **ENGINE}),
    Case(
        "tp2xpp2+sp, weight gradients fused",
        4,
        {**layout(2, 2, sequence_parallel=True), **ENGINE, "gradient_accumulation_fusion": True},
    ),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_trains_like_the_local_layers(
    case: Case, start: Callable[..., Finished], reference: Callable[[Case], Finished]
) -> None:
    """fp32, three steps, against one process with --transformer-impl local."""
    expected = reference(case)
    run = start(case, f"engine_{case.name}")
    assert_same(run, expected, case.relative)
    largest, difference = compared_gradients(run, expected)
    for family in largest:
        assert largest[family] > 0 or family == "vision tower"
        assert difference[family] <= case.relative * largest[family], (family, difference, largest)
