"""The cost model: its ratios, and what changes a part's time and what does not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ross_mcore.architecture import Precomputed
from ross_mcore.costs import (
    TRANSFORMER_ENGINE,
    Kernels,
    Plan,
    Recompute,
    first_seconds,
    last_seconds,
    layer_seconds,
    typical_data,
)
from ross_mcore.machines import A100, H100, H200, MACHINES, machine_of
from ross_mcore.models.inventory import inventory
from ross_mcore.parallel.layout import Layout
from ross_mcore.parallel.memory import hosted
from ross_mcore.parallel.timing import StepTime, step_time
from ross_mcore.parts import is_sharded, trains
from tests.unit.parallel.test_layout import ROSS_7B

DATA = typical_data(ROSS_7B, llm_trains=True)
SHAPES = inventory(ROSS_7B)
UNFUSED = Kernels(
    *((7, 11), (14, 12)),
    rotary_launches=(20, 16),
    fused_attention=False,
    accumulates=False,
    wait_seconds=0.3e-3,
    step_seconds=0.22,
)
"""A layer of separate kernels, whose lengths the host reads from the device."""
PACKED = Plan(vae="tf32", denoiser="tf32", overlap_param_gather=False, frozen_ahead=False)
FETCHED = replace(PACKED, kernels=replace(TRANSFORMER_ENGINE, step_seconds=0.07))


def timed(layout: Layout, plan: Plan, micro_batches: int) -> StepTime:
    trained = [
        sum(
            math.prod(shape) / (layout.tensor_parallel if is_sharded(name) else 1)
            for name, shape in SHAPES.items()
            if hosted(name, layout.stage(index), tied=False) and trains(name, True, False)
        )
        for index in range(layout.pipeline_parallel)
    ]
    return step_time(ROSS_7B, layout, plan, DATA, H100, micro_batches=micro_batches, trained=trained)


TP2_PP2, FULL = Layout(2, 2, 2, (15, 13)), Recompute("full")
CASES = {
    "padded": (TP2_PP2, replace(PACKED, rows=2, tokens=2357, packed=False, denoiser="fp32", kernels=UNFUSED), FULL, 32),
    "packed": (TP2_PP2, replace(PACKED, denoiser="fp32", kernels=UNFUSED), FULL, 16),
    "TF32": (TP2_PP2, replace(PACKED, kernels=UNFUSED), FULL, 16),
    "kept": (TP2_PP2, replace(PACKED, kernels=UNFUSED), Recompute(), 16),
    "fused": (TP2_PP2, replace(PACKED, kernels=replace(TRANSFORMER_ENGINE, step_seconds=0.22)), Recompute(), 16),
    "VAE": (Layout(2, 2, 2, (16, 12)), replace(FETCHED, vae="bf16"), Recompute(), 16),
    "no pipeline": (Layout(2, 1, 4, (28,)), FETCHED, Recompute(), 8),
}
EXPECTED = {"padded": 6.4, "packed": 3.8, "TF32": 3.1, "kept": 2.6, "fused": 2.2, "VAE": 1.9, "no pipeline": 1.8}
"""Seconds of a step of 128 samples on 8 H100, by a model of the same rates that was written independently."""


def test_a_step_on_eight_gpus() -> None:
    found = {
        name: timed(layout, replace(plan, recompute=recompute), count)
        for name, (layout, plan, recompute, count) in CASES.items()
    }
    seconds = {name: time.seconds for name, time in found.items()}
    assert seconds == {name: pytest.approx(expected, rel=0.08) for name, expected in EXPECTED.items()}
    assert sorted(seconds.values(), reverse=True) == list(seconds.values()), "each change helps"
    useful = {name: time.utilization(H100, bf16=True)[0] for name, time in found.items()}
    assert useful["padded"] == pytest.approx(0.108, abs=0.005)
    assert useful["no pipeline"] == pytest.approx(0.39, abs=0.015)


def test_useful_work_does_not_depend_on_how_it_is_done() -> None:
    padded, packed = (timed(*CASES[name][:2], CASES[name][3]) for name in ("padded", "packed"))
    assert padded.useful == pytest.approx(packed.useful, rel=0.02)
    assert padded.done > 1.5 * packed.done
    layout, plan, _, count = CASES["kept"]
    again = timed(layout, replace(plan, recompute=FULL), count)
    kept = timed(layout, plan, count)
    assert again.useful == kept.useful and 1.25 < again.done / kept.done < 1.34


def test_recomputation_costs_a_forward_pass() -> None:
    kept, full, attention = (
        layer_seconds(ROSS_7B, replace(PACKED, recompute=again), DATA, H100, 2)
        for again in (Recompute(), FULL, Recompute("selective"))
    )
    assert (kept.again, full.again) == (0, full.forward)
    assert 0 < attention.again < 0.1 * full.again


def test_communication_over_data_parallel_ranks() -> None:
    """Gradients in fp32 and weights in bf16, over NVLink, or over four adapters of a node; overlapped, a quarter of it,
    and what lasts longer than the backward pass of a micro-batch."""
    trained, link = 1e9, 450e9 * 0.622

    def seconds(ranks: int, **options: object) -> float:
        plan = replace(PACKED, **{"overlap_grad_reduce": False, **options})  # type: ignore[arg-type]  # its own fields
        layout = Layout(2, 1, ranks, (28,))
        return step_time(ROSS_7B, layout, plan, DATA, H100, micro_batches=1, trained=[trained]).communication

    assert seconds(4) == pytest.approx(trained * 0.75 * (4 + 2) / link)
    assert seconds(32) == pytest.approx(trained * 31 / 32 * (4 + 2) / (4 * 50e9 * 0.8))
    assert seconds(4, distributed_optimizer=False) == pytest.approx(trained * 0.75 * 2 * 4 / link)
    assert seconds(4, overlap_grad_reduce=True) == pytest.approx(trained * 0.75 * (4 / 4 + 2) / link)
    assert seconds(4, overlap_grad_reduce=True, overlap_param_gather=True) == pytest.approx(trained * 0.75 * 1.5 / link)
    trained = 1e11
    slow = seconds(4, overlap_grad_reduce=True)
    assert trained * 0.75 * (4 / 4 + 2) / link < slow < trained * 0.75 * (4 + 2) / link


def test_what_costs_nothing() -> None:
    none = replace(PACKED, precomputed=Precomputed(features=True, latents=True))
    first, last = (seconds(ROSS_7B, none, DATA, H100, 1) for seconds in (first_seconds, last_seconds))
    assert first.forward < first_seconds(ROSS_7B, PACKED, DATA, H100, 1).forward
    assert last.forward < last_seconds(ROSS_7B, PACKED, DATA, H100, 1).forward
    # no weight gradients under a frozen language model, and none of its embedding
    frozen = replace(PACKED, llm_trains=False)
    assert (
        layer_seconds(ROSS_7B, frozen, DATA, H100, 1).backward < layer_seconds(ROSS_7B, PACKED, DATA, H100, 1).backward
    )
    assert (
        first_seconds(ROSS_7B, frozen, DATA, H100, 1).backward < first_seconds(ROSS_7B, PACKED, DATA, H100, 1).backward
    )
    alone = layer_seconds(ROSS_7B, PACKED, DATA, H100, 1)
    without_links = layer_seconds(ROSS_7B, PACKED, DATA, replace(H100, nvlink=1e30, latency_seconds=0), 1)
    assert alone == without_links, "one rank sends nothing"


def test_machines() -> None:
    assert machine_of("NVIDIA H100 80GB HBM3") is H100 and machine_of("NVIDIA H200") is H200
    assert machine_of("NVIDIA A100-SXM4-80GB") is A100 and machine_of("NVIDIA H100 PCIe") is None
    assert MACHINES["H100"].peak("bf16") == 989.4e12
    assert A100.peak("fp8") == A100.peak("bf16")
    # operations by precision and bytes at the assumed rates
    assert H100.peak("bf16") * H100.shares.products["bf16"] == pytest.approx(600e12, rel=0.01)
    assert H100.peak("fp32") * H100.shares.products["fp32"] == pytest.approx(45e12, rel=0.01)
    assert H100.memory_bytes_per_second * H100.shares.memory == pytest.approx(2.6e12, rel=0.01)
