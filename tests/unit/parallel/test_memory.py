"""Memory of a rank, and micro-batches in flight."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ross_mcore.models.inventory import inventory
from ross_mcore.parallel.layout import Layout
from ross_mcore.parallel.memory import Memory, Plan, bubble, micro_batches_in_flight, stage_memory
from tests.unit.parallel.test_layout import ROSS_7B

PLAN = Plan(
    rows=2,
    tokens=2048,
    micro_batches=32,
    llm_trains=True,
    vision_trains=False,
    bf16=True,
    distributed_optimizer=True,
    sequence_parallel=True,
    recompute="full",
)
ONE, SPLIT = Layout(1, 1, 1, (28,)), Layout(2, 2, 2, (15, 13))


def memory_of(layout: Layout, stage: int, **changes: object) -> Memory:
    return stage_memory(ROSS_7B, inventory(ROSS_7B), layout, layout.stage(stage), replace(PLAN, **changes))


def test_one_rank_holds_the_whole_model() -> None:
    """Published parameter counts: Qwen2-7B, SigLIP-SO400M's tower, the denoiser, the FLUX VAE; and the projector."""
    language, tower, denoiser = 7_615_616_512, 428_225_600, 64_630_848
    vae = 83_819_683 + (32 * 32 + 32) + (16 * 16 + 16)  # with the two 1x1 convolutions that the published one lacks
    projector = 1152 * 3584 + 3584 + 3584 * 3584 + 3584
    positions = 729 * 1024
    found = memory_of(ONE, 0)
    assert found.weights == 2 * (language + tower + projector + denoiser) + 4 * vae
    trained = language + projector + denoiser - positions
    assert (found.gradients, found.optimizer) == (4 * trained, 12 * trained)
    frozen = memory_of(ONE, 0, llm_trains=False, bf16=False)
    trained = projector + denoiser
    assert (frozen.gradients, frozen.optimizer) == (4 * trained, 8 * trained)
    assert memory_of(ONE, 0, vision_trains=True).gradients - found.gradients == 4 * tower


def test_tensor_parallel_ranks_share_matrices_and_not_norms() -> None:
    halves, whole = memory_of(Layout(2, 1, 1, (28,)), 0), memory_of(ONE, 0)
    norms = 57 * 3584  # two a layer and the last
    shared = 7_615_616_512 - norms
    assert whole.weights - halves.weights == 2 * shared / 2


def test_the_stages_together_hold_the_model() -> None:
    parts = [memory_of(SPLIT, stage) for stage in (0, 1)]
    assert sum(part.weights for part in parts) == memory_of(Layout(2, 1, 1, (28,)), 0).weights
    assert [round(getattr(parts[0], name) / 1e9, 1) for name in ("weights", "gradients", "optimizer")] == [
        *(4.9, 8.1, 12.2)  # as the header of finetune_siglip_qwen2.yaml has it
    ]


def test_recomputation_and_sequence_parallelism_save_activations() -> None:
    kept = memory_of(SPLIT, 0, recompute=None).activations
    # a layer's input at 2 x 2,048 tokens in bf16 and half of it: 15 layers of two micro-batches, and one layer's inside
    entry = 2 * 2048 * 3584 * 2 / 2
    inside = 4 * entry + 2 * 2048 * 2 * (2 * 3584 + 2 * 512 + 3 * 18944) / 2
    assert memory_of(SPLIT, 0).activations == 15 * 2 * entry + inside
    assert kept == 15 * 2 * inside
    assert memory_of(SPLIT, 0, sequence_parallel=False).activations > memory_of(SPLIT, 0).activations


@pytest.mark.parametrize(
    ("layers", "stages", "micro_batches", "in_flight", "waiting"),
    [
        ((28,), 1, 8, [1], 0),
        ((7, 7, 7, 7), 4, 8, [4, 3, 2, 1], 3 / 11),
        ((7, 7, 7, 7), 4, 2, [2, 2, 2, 1], 3 / 5),
        # chunks of 7 layers, two a rank: the first rank warms up 2 x 1 + 2 of them and computes one more
        ((7, 7, 7, 7), 2, 8, [5 / 2, 3 / 2], 1 / 17),
    ],
)
def test_micro_batches_in_flight_and_the_bubble(
    layers: tuple[int, ...], stages: int, micro_batches: int, in_flight: list[float], waiting: float
) -> None:
    layout = Layout(1, stages, 1, layers)
    assert [micro_batches_in_flight(layout, layout.stage(index), micro_batches) for index in range(stages)] == in_flight
    assert bubble(layout, micro_batches) == pytest.approx(waiting)
