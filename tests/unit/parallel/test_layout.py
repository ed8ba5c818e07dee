from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from counting.pictures import busiest
from hypothesis import given, settings
from hypothesis import strategies as st

from ross_mcore.architecture import (
    DenoiserConfig,
    LanguageConfig,
    ModelConfig,
    PixelDecoderConfig,
    Precomputed,
    ProjectorConfig,
    VisionConfig,
)
from ross_mcore.costs import Plan, Recompute, layer_seconds, typical_data
from ross_mcore.errors import LayoutError
from ross_mcore.flops import forward_flops
from ross_mcore.machines import CPU, H100
from ross_mcore.models.inventory import inventory
from ross_mcore.parallel.layout import PairShare, Placement, balance, make_layout, share_of, stage_extra_costs

QWEN2_7B = LanguageConfig(
    "qwen2", 3584, 18944, 28, 28, 4, 128, 152064, 32768, 1e-6, 1e6, tie_word_embeddings=False, qkv_bias=True
)
SIGLIP = VisionConfig(
    {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    (0.5, 0.5, 0.5),
    (0.5, 0.5, 0.5),
)
FLUX = PixelDecoderConfig(
    {
        **{"latent_channels": 16, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
        **{"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
    }
)
FULL = Recompute("full")
ROSS_7B = ModelConfig(QWEN2_7B, SIGLIP, ProjectorConfig(), DenoiserConfig.from_type("denoiser_vit3x"), FLUX)


@settings(max_examples=40)
@given(st.integers(0, 50), st.integers(1, 9), st.integers(0, 20))
def test_shares_partition_the_items(count: int, size: int, turn: int) -> None:
    shares = [share_of(count, rank, size, turn) for rank in range(size)]
    assert list(itertools.chain(*shares)) == list(range(count))
    assert [len(shares[(turn + place) % size]) for place in range(size)] == [
        len(share_of(count, rank, size)) for rank in range(size)
    ]
    assert sorted(map(len, shares), reverse=True) == [count // size + (rank < count % size) for rank in range(size)]


@settings(max_examples=40)
@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 9), st.integers(0, 9))
def test_pairs_are_split_over_all_ranks(pictures: int, draws: int, size: int, turn: int) -> None:
    every = list(itertools.product(range(pictures), range(draws)))
    found, counts = [], []
    for rank in range(size):
        share = PairShare.of(pictures, draws, rank, size, turn)
        held = [pair for pair in every if pair[0] in share.pictures]
        found += held[share.pairs.start : share.pairs.stop]
        owners = [picture for picture, _ in held[share.pairs.start : share.pairs.stop]]
        assert [owners.count(picture) for picture in share.pictures] == list(share.draws_of_each)
        assert all(share.draws_of_each)
        counts.append(len(share.pairs))
    assert found == every and max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("size", "loads"), [(2, (1.22, 1.0, 1.02)), (4, (1.63, 1.0, 1.06)), (8, (3.25, 1.22, 1.11))])
def test_the_busiest_rank_does_little_more_than_the_mean(size: int, loads: tuple[float, ...]) -> None:
    """With whole pictures, the first ranks with one more; and with (picture, draw) pairs in turn."""
    assert busiest(size) == pytest.approx(loads, rel=0.005)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(0, 5), st.floats(0, 4), st.floats(0, 4))
def test_balance_is_optimal(stages: int, more: int, first: float, last: float) -> None:
    """Compared with all possible placements."""
    layers = stages + more

    def slowest(counts: tuple[int, ...]) -> float:
        load = [float(c) for c in counts]
        load[0] += first
        load[-1] += last
        return max(load)

    every = [c for c in itertools.product(range(1, layers + 1), repeat=stages) if sum(c) == layers]
    assert slowest(balance(layers, stages, first, last)) == pytest.approx(min(map(slowest, every)))


def test_forward_flops_of_the_published_sample() -> None:
    """Qwen2-7B + SigLIP-384, 729 image + 300 text tokens, in TFLOP, as published with two or three digits.

    The published figures count all 27 tower layers (ROSS runs 26) and embed the condition once per draw (here once per
    image).
    """
    parts = forward_flops(ROSS_7B, tokens=1029, labelled_tokens=1029)
    condition = 3 * 2 * 729 * 3584 * 1024 / 1e12
    assert parts.layer / 1e12 == pytest.approx(0.487, abs=5e-4)
    assert parts.vision_model / 1e12 * 27 / 26 == pytest.approx(0.665, abs=2e-3)
    assert parts.output_layer / 1e12 == pytest.approx(1.12, abs=5e-3)
    assert parts.denoiser / 1e12 + condition == pytest.approx(0.39, abs=5e-3)
    assert parts.pixel_decoder / 1e12 == pytest.approx(0.79, abs=5e-3)


def test_operations_follow_from_the_shapes_of_weights() -> None:
    """Two operations per token and element of a matrix, plus attention."""
    shapes, parts = inventory(ROSS_7B), forward_flops(ROSS_7B, tokens=1029, labelled_tokens=7)

    def matrices(*prefixes: str) -> int:
        return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefixes) and len(shape) > 1)

    layers = [f"vision_model.tower.encoder.layers.{number}." for number in range(26)]
    tower = 2 * 729 * matrices(*layers, "vision_model.tower.embeddings.patch_embedding.") + 26 * 4 * 729**2 * 1152
    drawn = 2 * 729 * matrices("denoiser.blocks.", "denoiser.x_embedder.", "denoiser.final_layer.")
    denoiser = 4 * (drawn + 3 * 4 * 729**2 * 1024) + 2 * 729 * matrices("denoiser.z_embedder.")
    assert parts.layer == 2 * 1029 * matrices("language_model.decoder.layers.0.") + 2 * 1029**2 * 3584
    assert parts.output_layer == 2 * 7 * matrices("language_model.output_layer.")
    assert parts.vision_projection == 2 * 729 * matrices("vision_projection.")
    assert (parts.vision_model, parts.denoiser) == (tower, denoiser)


def test_the_balance_counts_the_encoder_and_the_denoiser() -> None:
    layout = make_layout(ROSS_7B, Placement(pipeline_parallel=4), world_size=4)
    first, *_, last = layout.layers_per_chunk
    assert sum(layout.layers_per_chunk) == 28
    assert last < 7 <= layout.layers_per_chunk[1] and first >= last


def test_precomputed_parts_cost_nothing() -> None:
    def place(precomputed: Precomputed) -> tuple[tuple[int, ...], tuple[float, float]]:
        placement = Placement(pipeline_parallel=4, plan=Plan(llm_trains=False, frozen_ahead=True), machine=CPU)
        layout = make_layout(ROSS_7B, placement, world_size=4, precomputed=precomputed)
        plan = replace(placement.plan, precomputed=precomputed)
        return layout.layers_per_chunk, stage_extra_costs(ROSS_7B, replace(placement, plan=plan))

    (*_, computed), (first, last) = place(Precomputed())
    (*_, read), (first_read, last_read) = place(Precomputed(features=True, latents=True))
    assert read > computed  # the last stage has room for more layers
    assert first - first_read > 0 and last - last_read > 0


def test_balance_by_milliseconds() -> None:
    """In fp32 the denoiser takes several times the time of the same operations in bf16, and recomputation makes layers
    dearer than the ends; both move layers, which counts of operations do not."""

    def layers(**options: object) -> tuple[int, ...]:
        plan = replace(Plan(denoiser="tf32", vae="bf16"), **options)  # type: ignore[arg-type]  # its own fields
        return make_layout(ROSS_7B, Placement(2, 2, plan=plan), world_size=4).layers_per_chunk

    assert layers(denoiser="fp32")[1] < layers()[1] <= layers(denoiser="bf16")[1]
    kept, again = (stage_extra_costs(ROSS_7B, Placement(2, 2, plan=Plan(recompute=r))) for r in (Recompute(), FULL))
    assert again[0] < 0.8 * kept[0] and again[1] < 0.8 * kept[1]
    by_operations = make_layout(ROSS_7B, Placement(2, 2, machine=CPU), world_size=4).layers_per_chunk
    assert layers(denoiser="fp32", vae="fp32")[1] < by_operations[1]


def test_balance_follows_the_samples() -> None:
    """Captions have more images a token than instructions."""
    placement = Placement(2, 2, plan=Plan(denoiser="tf32", vae="tf32"))
    captions = replace(placement, data=replace(typical_data(ROSS_7B, True), tokens=743, attended=743, images=1))
    assert stage_extra_costs(ROSS_7B, captions)[1] > stage_extra_costs(ROSS_7B, placement)[1]


@pytest.mark.parametrize("virtual_stages", [1, 2])
def test_auto_is_the_fastest_of_all_placements(virtual_stages: int) -> None:
    """By the slowest stage of the cost model, non-interleaved and interleaved."""
    plan, data = Plan(denoiser="tf32", vae="tf32"), typical_data(ROSS_7B, True)
    placement = Placement(2, 2, plan=plan, layers_per_virtual_stage=7 if virtual_stages == 2 else None)
    layer = layer_seconds(ROSS_7B, plan, data, H100, 2)
    extras = stage_extra_costs(ROSS_7B, placement)
    unit = layer.forward + layer.backward

    def slowest(first: int) -> float:
        return max(first + extras[0], 28 - first + extras[1]) * unit

    layout = make_layout(ROSS_7B, placement, world_size=4)
    assert slowest(len(layout.stage(0).layers)) == min(map(slowest, range(1, 28)))


def test_stages_cover_the_layers() -> None:
    layout = make_layout(ROSS_7B, Placement(2, 3, pipeline_layout="10,11,7"), world_size=12)
    assert layout.data_parallel == 2
    assert [list(layout.stage(i).layers) for i in range(3)] == [
        list(range(10)),
        list(range(10, 21)),
        list(range(21, 28)),
    ]
    assert [layout.stage(i).reads_data for i in range(3)] == [True, False, True]
    rows = layout.megatron_pipeline_layout()
    assert rows is not None and rows[0][0] == "embedding" and rows[-1][-1] == "loss"


def test_chunks_of_the_interleaved_schedule_cover_the_layers() -> None:
    layout = make_layout(ROSS_7B, Placement(1, 2, layers_per_virtual_stage=7), world_size=2)
    first, last = layout.stage(0), layout.stage(1)
    assert (layout.virtual_stages, layout.micro_batch_multiple) == (2, 2)
    assert sorted(first.layers + last.layers) == list(range(28))
    assert [chunk.layers.start for chunk in first.chunks] < [chunk.layers.start for chunk in last.chunks]
    ends = [[(chunk.is_first, chunk.is_last) for chunk in stage.chunks] for stage in (first, last)]
    assert ends == [[(True, False), (False, False)], [(False, False), (False, True)]]
    assert len(first.layers) >= len(last.layers) and first.is_first and last.is_last and not first.is_last
    rows = layout.megatron_pipeline_layout()
    assert rows is not None and len(rows) == 4 and rows[0][0] == "embedding" and rows[-1][-1] == "loss"
    by_hand = make_layout(ROSS_7B, Placement(1, 2, pipeline_layout="8,8,8,4"), world_size=2)
    assert [len(chunk.layers) for chunk in by_hand.stage(1).chunks] == [8, 4]


@pytest.mark.parametrize(
    ("world_size", "placement", "message"),
    [
        (6, Placement(4), "multiple of 4"),
        (3, Placement(3), "28 attention heads"),
        (7, Placement(7), "4 key-value heads"),
        (29, Placement(1, 29), "larger than the model's 28"),
        (2, Placement(1, 2, pipeline_layout="10,10"), "20 layers"),
        (2, Placement(1, 2, pipeline_layout="0,28"), "at least one decoder layer"),
        (2, Placement(1, 2, pipeline_layout="some"), "expected auto, even"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused(world_size: int, placement: Placement, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        make_layout(ROSS_7B, placement, world_size=world_size)


def test_a_vocabulary_that_tensor_parallelism_cannot_split_is_refused() -> None:
    odd = replace(ROSS_7B, language=replace(QWEN2_7B, num_attention_heads=30, num_key_value_heads=6))
    with pytest.raises(LayoutError, match="rows of the padded vocabulary"):
        make_layout(replace(odd, language=replace(odd.language, vocab_size=32000)), Placement(6), world_size=6)
