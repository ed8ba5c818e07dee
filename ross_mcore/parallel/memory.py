"""Memory of a rank of each pipeline stage: weights, gradients and optimizer counted, activations estimated.

Pure functions of the shapes of the whole model's tensors (models/inventory.py). tests/end_to_end/test_recipes.py
compares them with models that are built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ross_mcore.architecture import ModelConfig
from ross_mcore.costs import Data, Plan
from ross_mcore.flops import encoder_values
from ross_mcore.parallel.layout import Layout, Stage
from ross_mcore.parts import is_sharded, part_of, place_of, trains

DENOISER_VALUES = (12, 17)
"""Vectors of the denoiser's width that a block's backward reads per token: in fp32 (norms, modulation, residuals), and
factors and results of products in their precision. tests/unit/models/test_recompute.py counts them."""
VAE_PICTURES = 8
"""Pictures that the VAE encodes at a time (PixelDecoder.encode_batch_size)."""
LOGIT_BYTES = 8
"""The most of a logit at a time: in bf16, its exponential in fp32, and its gradient in bf16."""
MLP_TENSORS = 3
"""Tensors of the MLP's width that backward reads: gate and up, which the fused activation keeps, and their product."""
ENCODER_SHARE = 1 / 15
"""Of the values that the VAE encoder passes over, those that exist at a time: about four tensors of its first level."""


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
    model: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    layout: Layout,
    stage: Stage,
    plan: Plan,
    data: Data,
    micro_batches: int,
) -> Memory:
    """Memory of a rank of `stage`; `shapes` has the tensors of the whole model; micro_batches: of a step and rank.

    Gradients are fp32. The optimizer keeps two fp32 moments of each trained parameter, and with bf16 an fp32 master;
    with the distributed optimizer each data-parallel rank holds its share of them.
    """
    weights = trained = 0.0
    for name, shape in shapes.items():
        if not hosted(name, stage, model.language.tie_word_embeddings):
            continue
        count = math.prod(shape) / (layout.tensor_parallel if is_sharded(name) else 1)
        weights += count * (4 if part_of(name).runs_in_float32 else plan.value_bytes)
        trained += count * trains(name, plan.llm_trains, plan.vision_trains)
    share = layout.data_parallel if plan.distributed_optimizer else 1
    activations = _activations(model, layout, stage, plan, data, micro_batches)
    return Memory(weights, 4 * trained, (12 if plan.bf16 else 8) * trained / share, activations)


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


def layer_activations(model: ModelConfig, plan: Plan, tensor: int) -> tuple[float, float]:
    """Bytes of a micro-batch that a decoder layer's backward reads: its input alone, and everything.

    tests/unit/models/test_saved_activations.py counts them, and tests/te those of Transformer Engine's layers.
    """
    language, size = model.language, plan.value_bytes
    query, key = (heads * language.head_dim for heads in (language.num_attention_heads, language.num_key_value_heads))
    entry = plan.slots * language.hidden_size * size / (tensor if plan.sequence_parallel else 1)
    # inputs and outputs of two norms; rotated queries and keys, values, and the output; the local layers' values are a
    # view of all three before the rotation, and their rotations keep cosines and sines
    copies, angles = (2, 0) if plan.kernels.fused_attention else (3, 4 * language.head_dim)
    selected = plan.recompute.modules if plan.recompute.granularity == "selective" else ()
    inner = 0 if "mlp" in selected else MLP_TENSORS
    norms = 4
    if not plan.llm_trains:  # a frozen product does not keep its input
        norms, inner = 2, max(0, inner - 1)
    inside = plan.slots * size * (copies * (query + key) + inner * language.intermediate_size) / tensor
    return entry, norms * entry + inside + plan.slots * size * angles


def _activations(model: ModelConfig, layout: Layout, stage: Stage, plan: Plan, data: Data, micro_batches: int) -> float:
    """Tensors that backward reads: of the decoder layers, and on the last stage of logits and denoiser.

    Recomputation keeps the inputs of its layers, and everything of those that backward is at.
    """
    tensor, again = layout.tensor_parallel, plan.recompute
    entry, inside = layer_activations(model, plan, tensor)
    kept = 0.0
    for chunk in stage.chunks:
        recomputed = again.layers(len(chunk.layers))
        at_once = again.num_layers if again.method == "uniform" else 1
        kept += recomputed / at_once * entry + (len(chunk.layers) - recomputed) * inside
    kept *= micro_batches_in_flight(layout, stage, micro_batches)
    if again.granularity == "full":
        kept += (again.num_layers if again.method == "uniform" else 1) * inside
    if not stage.is_last:
        return kept
    logits = plan.slots * data.labels / data.tokens * model.language.padded_vocab_size / tensor * LOGIT_BYTES
    return kept + logits + _denoising(model, plan, data, tensor) + _encoding(model, plan)


def _images(plan: Plan, data: Data) -> float:
    """The images of a micro-batch, rounded up."""
    return math.ceil(plan.samples(data) * data.images)


def _denoising(model: ModelConfig, plan: Plan, data: Data, tensor: int) -> float:
    denoiser = model.denoiser
    if denoiser is None:
        return 0.0
    pairs = math.ceil(_images(plan, data) * denoiser.draws / tensor)
    vectors = pairs * model.vision.image_tokens * denoiser.width
    wide, narrow = DENOISER_VALUES
    block = vectors * (4 * wide + (2 if plan.denoiser == "bf16" else 4) * narrow)
    # recomputed blocks keep their inputs, and everything of the one that backward is at
    again = 4 * vectors if plan.recompute.denoiser else block
    return block + (denoiser.depth - 1) * again


def _encoding(model: ModelConfig, plan: Plan) -> float:
    """The VAE encoder's values that exist at a time; without gradients, so only those of the current block.

    It runs beside the denoiser, several micro-batches ahead, so its pictures at a time are as many as it takes.
    """
    if plan.precomputed.latents:
        return 0.0
    return VAE_PICTURES * encoder_values(model) * ENCODER_SHARE * (2 if plan.vae == "bf16" else 4)
