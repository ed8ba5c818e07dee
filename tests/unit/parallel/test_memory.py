"""Memory of a rank, and micro-batches in flight."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ross_mcore.costs import LOCAL, Plan, Recompute, typical_data
from ross_mcore.models.inventory import inventory
from ross_mcore.parallel.layout import Layout
from ross_mcore.parallel.memory import Memory, layer_activations, micro_batches_in_flight, stage_memory
from tests.unit.parallel.test_layout import ROSS_7B

PLAN = Plan(rows=2, tokens=2048, packed=False, recompute=Recompute("full"))
MICRO_BATCHES = 32
ONE, SPLIT = Layout(1, 1, 1, (28,)), Layout(2, 2, 2, (15, 13))


def memory_of(layout: Layout, stage: int, **changes: object) -> Memory:
    plan = replace(PLAN, **changes)  # type: ignore[arg-type]  # its own fields
    data = typical_data(ROSS_7B, plan.llm_trains)
    return stage_memory(ROSS_7B, inventory(ROSS_7B), layout, layout.stage(stage), plan, data, MICRO_BATCHES)


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
    entry = 2 * 2048 * 3584 * 2 / 2
    inside = 4 * entry + 2 * 2048 * 2 * (2 * 3584 + 2 * 512 + 3 * 18944) / 2
    assert layer_activations(ROSS_7B, PLAN, tensor=2) == (entry, inside)
    local = replace(PLAN, kernels=LOCAL)
    assert layer_activations(ROSS_7B, local, tensor=2) == (entry, inside + 2 * 2048 * 2 * ((3584 + 512) / 2 + 4 * 128))

    def kept(*recompute: object, **changes: object) -> float:
        return memory_of(SPLIT, 0, recompute=Recompute(*recompute), **changes).activations  # type: ignore[arg-type]

    # 15 layers of two micro-batches
    assert kept() == kept("selective") == 15 * 2 * inside
    assert kept("full") == 15 * 2 * entry + inside
    assert kept("full", "uniform", 5) == 3 * 2 * entry + 5 * inside
    assert kept("full", "block", 4) == 2 * (4 * entry + 11 * inside) + inside
    assert kept("selective", "uniform", 1, ("mlp",)) == 15 * 2 * (inside - 2 * 2048 * 2 * 3 * 18944 / 2)
    assert kept("full", sequence_parallel=False) > kept("full")


def test_recomputing_the_denoiser_saves_most_of_its_activations() -> None:
    kept, again = (
        memory_of(SPLIT, 1, recompute=Recompute(denoiser=denoiser)).activations for denoiser in (False, True)
    )
    assert kept - again == pytest.approx(2 * (29 - 1) * 4 * 729 * 1024 * 4)


@pytest.mark.parametrize(
    ("layers", "stages", "micro_batches", "in_flight"),
    [
        ((28,), 1, 8, [1]),
        ((7, 7, 7, 7), 4, 8, [4, 3, 2, 1]),
        ((7, 7, 7, 7), 4, 2, [2, 2, 2, 1]),
        # chunks of 7 layers, two a rank: the first rank warms up 2 x 1 + 2 of them and computes one more
        ((7, 7, 7, 7), 2, 8, [5 / 2, 3 / 2]),
    ],
)
def test_micro_batches_in_flight(
    layers: tuple[int, ...], stages: int, micro_batches: int, in_flight: list[float]
) -> None:
    layout = Layout(1, stages, 1, layers)
    assert [micro_batches_in_flight(layout, layout.stage(index), micro_batches) for index in range(stages)] == in_flight
