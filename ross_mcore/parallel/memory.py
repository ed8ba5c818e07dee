"""Memory of a rank of each pipeline stage: weights, gradients and optimizer counted, activations estimated.

Pure functions of the shapes of the whole model's tensors (models/inventory.py). tests/end_to_end/test_recipes.py
compares them with models that are built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ross_mcore.architecture import ModelConfig
from ross_mcore.parallel.layout import Layout, Stage, share_of
from ross_mcore.parts import is_sharded, part_of, place_of, trains

LABELLED = 4
"""One token in this many has a label, as stage balance assumes."""
DENOISER_VALUES = 20
"""Vectors of the denoiser's width that a block's backward reads per token: norms, qkv, attention, MLP, modulation."""


@dataclass(frozen=True)
class Plan:
    """The options that memory depends on.

    rows: per micro-batch; tokens: per row; micro_batches: per step and rank; recompute: "full", or anything else to
    keep activations.
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
    """Bytes of a rank: weights, gradients and optimizer counted, the peak of activations estimated."""

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
    """Memory of a rank of `stage`; `shapes` has the tensors of the whole model.

    Gradients are fp32. The optimizer keeps two fp32 moments of each trained parameter, and with bf16 an fp32 master;
    with the distributed optimizer each data-parallel rank holds its share of them.
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
    """Whether a stage hosts a tensor of the checkpoint. Raises ValueError for a name that belongs to no part."""
    place = place_of(name)
    if place is None:
        raise ValueError(f"{name} is not a weight of any part of the model")
    if place.section.stage == "of its layer":
        return place.layer in stage.layers
    is_hosted = stage.is_first if place.section.stage == "first" else stage.is_last
    return is_hosted or (tied and place.section.last_when_tied and stage.is_last)


def micro_batches_in_flight(layout: Layout, stage: Stage, micro_batches: int) -> float:
    """The most micro-batches whose activations of its layers a stage holds at a time.

    1F1B: the number of stages from this one to the last (Narayanan et al. 2021, section 2.2). Interleaved: the warm-up
    in mcore's schedules.py, counted in chunks, plus the current one.
    """
    remaining = layout.pipeline_parallel - stage.index
    if layout.virtual_stages == 1:
        return min(remaining, micro_batches)
    chunks = 2 * (remaining - 1) + (layout.virtual_stages - 1) * layout.pipeline_parallel + 1
    return min(chunks, micro_batches * layout.virtual_stages) / layout.virtual_stages


def bubble(layout: Layout, micro_batches: int) -> float:
    """The share of a step in which a rank of an evenly loaded pipeline waits (Narayanan et al. 2021, section 2.2)."""
    fill = layout.pipeline_parallel - 1
    return fill / (fill + micro_batches * layout.virtual_stages)


def _activations(model: ModelConfig, layout: Layout, stage: Stage, plan: Plan) -> float:
    """Tensors that backward reads: of the decoder layers, and on the last stage of logits and denoiser.

    With full recomputation the inputs of all decoder layers, and everything of one.
    """
    language, tensor = model.language, layout.tensor_parallel
    size, tokens = (2 if plan.bf16 else 4), plan.rows * plan.tokens
    split = tensor if plan.sequence_parallel else 1
    query, key = (heads * language.head_dim for heads in (language.num_attention_heads, language.num_key_value_heads))
    entry = tokens * language.hidden_size * size / split
    # inputs and outputs of two norms; queries, keys, values and output of the attention; gate, up and their product
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
