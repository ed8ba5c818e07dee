"""PURE: the memory of a rank, by pipeline stage: weights, gradients and optimizer counted, activations estimated.

Counted are the tensors that a stage hosts (`shapes`: those of the whole model by their names in a checkpoint, as
models/inventory.py lists them). tests/end_to_end/test_recipes.py compares with models that are built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ross_mcore.architecture import ModelConfig
from ross_mcore.parallel.layout import Layout, Stage, share_of
from ross_mcore.parts import is_sharded, part_of, place_of, trains

LABELLED = 4
"""One token in so many has a label, as stage balance assumes."""
DENOISER_VALUES = 20
"""Numbers of a denoiser block's width that its backward reads for a token: norms, qkv, attention, MLP, modulation."""


@dataclass(frozen=True)
class Plan:
    """What memory depends on beside model and layout.

    rows, tokens: of a micro-batch, tokens of each row; micro_batches: of a step and rank; recompute: `full`, or
    anything else for activations that are kept.
    """

    rows: int
    tokens: int
    micro_batches: int
    llm_trains: bool
    vision_trains: bool
    bf16: bool
    distributed_optimizer: bool
    sequence_parallel: bool
    recompute: str | None


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank. weights, gradients, optimizer: counted; activations: estimated, at the worst of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def stage_memory(
    model: ModelConfig, shapes: Mapping[str, tuple[int, ...]], layout: Layout, stage: Stage, plan: Plan
) -> Memory:
    """The memory of a rank of `stage`.

    Gradients are in fp32. With bf16 the optimizer keeps a master and two moments of each trained parameter in fp32,
    else the moments alone; with the distributed optimizer a data-parallel rank has its share of them.
    """
    size, weights, trained = (2 if plan.bf16 else 4), 0.0, 0.0
    for name, shape in shapes.items():
        if not hosted(name, stage, model.language.tie_word_embeddings):
            continue
        count = math.prod(shape) / (layout.tensor_parallel if is_sharded(name) else 1)
        weights += count * (4 if part_of(name).runs_in_float32 else size)
        trained += count * trains(name, plan.llm_trains, plan.vision_trains)
    share = layout.data_parallel if plan.distributed_optimizer else 1
    return Memory(
        weights, 4 * trained, (12 if plan.bf16 else 8) * trained / share, _activations(model, layout, stage, plan)
    )


def hosted(name: str, stage: Stage, tied: bool) -> bool:
    """Whether a stage has a tensor of the checkpoint. Raises ValueError for what is no part of the model."""
    place = place_of(name)
    if place is None:
        raise ValueError(f"{name} is no weight of any part of the model")
    if place.section.stage == "of its layer":
        return place.layer in stage.layers
    is_there = stage.is_first if place.section.stage == "first" else stage.is_last
    return is_there or (tied and place.section.last_when_tied and stage.is_last)


def micro_batches_in_flight(layout: Layout, stage: Stage, micro_batches: int) -> float:
    """How many micro-batches' activations of its layers a stage holds at the worst.

    1F1B: as many as there are stages from here on (Narayanan et al. 2021, section 2.2). Interleaved: the warm-up of
    mcore's schedules.py, of chunks, plus the one that computes.
    """
    to_the_end = layout.pipeline_parallel - stage.index
    if layout.virtual_stages == 1:
        return min(to_the_end, micro_batches)
    chunks = 2 * (to_the_end - 1) + (layout.virtual_stages - 1) * layout.pipeline_parallel + 1
    return min(chunks, micro_batches * layout.virtual_stages) / layout.virtual_stages


def bubble(layout: Layout, micro_batches: int) -> float:
    """The share of a step in which a rank of an evenly loaded pipeline waits (Narayanan et al. 2021, section 2.2)."""
    fill = layout.pipeline_parallel - 1
    return fill / (fill + micro_batches * layout.virtual_stages)


def _activations(model: ModelConfig, layout: Layout, stage: Stage, plan: Plan) -> float:
    """Of the decoder layers: what backward reads of them, or their inputs and one layer's under full recomputation;
    beside them, on the last stage, logits at the labelled positions and the denoiser, and nothing else."""
    language, tensor = model.language, layout.tensor_parallel
    size, tokens = (2 if plan.bf16 else 4), plan.rows * plan.tokens
    split = tensor if plan.sequence_parallel else 1
    query, key = (heads * language.head_dim for heads in (language.num_attention_heads, language.num_key_value_heads))
    entry = tokens * language.hidden_size * size / split
    # inputs and outputs of two norms; queries, keys, values and the attention's output; gate, up and their product
    inside = 4 * entry + tokens * size * (2 * query + 2 * key + 3 * language.intermediate_size) / tensor
    layers, flight = len(stage.layers), micro_batches_in_flight(layout, stage, plan.micro_batches)
    kept = layers * flight * entry + inside if plan.recompute == "full" else layers * flight * inside
    if not stage.is_last:
        return kept
    # logits, the same in fp32, and their gradient
    kept += tokens / LABELLED * language.padded_vocab_size / tensor * (size + 4 + 4)
    if (denoiser := model.denoiser) is not None:
        pictures = len(share_of(plan.rows, 0, tensor)) * denoiser.draws
        values = pictures * model.vision.image_tokens * denoiser.width * DENOISER_VALUES
        kept += 4 * denoiser.depth * values
    return kept
