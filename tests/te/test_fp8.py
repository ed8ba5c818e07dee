"""FP8 reaches exactly the linears of the language model's decoder, as configured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ross_mcore.checkpoint.torch_dist import MASTER_PREFIX
from tests.distributed.cases import GATHERED, Case, layout
from tests.distributed.conftest import Finished, stored
from tests.te.looking import looks_of, train_and_look

LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
LAYERS = (1, 2, 3, 4)
FP8: dict[str, Any] = {"transformer_impl": "transformer_engine", "bf16": True, "fp8_format": "hybrid"}
TENSORWISE = {**FP8, "fp8_recipe": "tensorwise"}
BF16 = Case("bf16", 1, common=(("bf16", True),))

CASES = [
    (
        Case("delayed tp1", 1, {**FP8, "fp8_amax_history_len": 4, "fp8_amax_compute_algo": "max", "fp8_margin": 1}),
        "TEDelayedScaling/HYBRID",
        (),
    ),
    (
        Case("delayed tp2xpp2+sp", 4, {**FP8, **layout(2, 2, sequence_parallel=True), "fp8_amax_history_len": 4}),
        "TEDelayedScaling/HYBRID",
        (),
    ),
    (
        Case(
            "tensorwise, bf16 at both ends, pp2",
            2,
            {**TENSORWISE, **layout(1, 2, pipeline_layout="2,2"), "first_last_layers_bf16": True},
        ),
        "Float8CurrentScaling/HYBRID",
        (1, 4),
    ),
    (
        Case(
            "tensorwise e4m3 tp2", 2, {**TENSORWISE, **layout(2), "fp8_format": "e4m3", "recompute_granularity": "full"}
        ),
        "Float8CurrentScaling/E4M3",
        (),
    ),
]


@pytest.mark.parametrize(("case", "recipe", "in_bf16"), CASES, ids=[row[0].name for row in CASES])
def test_fp8_runs_where_it_should(
    case: Case, recipe: str, in_bf16: tuple[int, ...], start: Callable[..., Finished], reference: Callable
) -> None:
    run = start(case, f"fp8_{case.name}".replace(" ", "_").replace(",", ""), rank=train_and_look)
    looks = looks_of(run.folder)
    assert len(looks) == case.world
    linears: dict[str, list[str]] = {}
    for look in looks:
        assert look["fp8_elsewhere"] == []
        assert look["calls"]["quantize"] > 0 and look["calls"]["multi_tensor_adam"] > 0
        assert all(tokens % 16 == 0 for tokens in look["tokens"])
        assert look["optimizer"] == ["transformer_engine.pytorch.optimizers.fused_adam.FusedAdam"]
        if "Delayed" in recipe:
            assert look["histories"]
        if case.world == 1:  # of two micro-batches a step, the second reuses the weights that the first cast to FP8
            assert look["first_passes"] == [True, False] * 3
        linears |= look["linears"]
    expected = {f"{layer}/{name}": ["off" if layer in in_bf16 else recipe] for layer in LAYERS for name in LINEARS}
    assert linears == expected
    for ours, theirs in zip(run.metrics, reference(BF16).metrics, strict=True):
        assert ours["applied"]
        # an e4m3 number has 3 bits after the first: about 4% of each product, which sums average out
        for name in ("lm_loss", "vm_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-2), name
            assert ours[name] != theirs[name]


@pytest.mark.parametrize(("recipe", "more"), [("delayed", GATHERED), ("tensorwise", {})])
def test_weights_kept_in_fp8_are_those_that_a_step_would_cast(
    recipe: str, more: dict, start: Callable[..., Finished]
) -> None:
    """--fp8-param-gather casts the same masters earlier, and again when a run resumes: losses are bit-equal.

    The gradient norm is summed in another order of parameters, in fp32.
    """
    common = {**FP8, "fp8_recipe": recipe, **more}
    expected = start(Case("", 2, common), f"cast_{recipe}")
    kept = Case("", 2, {**common, "fp8_param_gather": True})
    start(kept, f"kept_{recipe}", stop_after=2)
    run = start(kept, f"kept_{recipe}")
    for ours, theirs in zip(run.metrics, expected.metrics, strict=True):
        assert (ours["lm_loss"], ours["vm_loss"]) == (theirs["lm_loss"], theirs["vm_loss"])
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
    saved = dict(stored(run.folder / "iter_0000003"))
    for layer in range(4):  # gate and up are two pieces of one FP8 weight
        name = f"language_model.decoder.layers.{layer}.mlp.linear_fc1.weight"
        error = (saved[name].float() - saved[MASTER_PREFIX + name]).norm() / saved[name].float().norm()
        assert 0.01 < error < 0.05  # of e4m3, after the first of its four bits
