"""Seconds of a micro-batch on a GPU: of one decoder layer, and of what the first and the last stage do besides.

A cost model, not a measurement: operations by precision over the rates of machines.py, bytes of pointwise work,
launches, and the communication of tensor parallelism. Its ratios are better than its absolute numbers. Pure functions.

Legend: T slots of a micro-batch, H width, F width of the MLP, Q width of the queries, K of the keys, t tensor-parallel
size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ross_mcore.architecture import NOTHING_PRECOMPUTED, ModelConfig, Precomputed
from ross_mcore.flops import PASSED_THROUGH, TRAINED, encoder_values, forward_flops, layer_flops, step_flops
from ross_mcore.machines import Machine, Precision

CAPTION_TOKENS = 14
"""Text tokens of a caption of LAION, CC and SBU by BLIP (benchmarks/packing.py)."""
TEXT_TOKENS, TEXT_ONLY_TOKENS, TEXT_ONLY = 255, 1100, 0.06
"""Text tokens of an instruction beside a picture and without one, and the share without (benchmarks/packing.py)."""
PACKED_FILL = 0.97
"""Real tokens of the slots of packed rows (benchmarks/packing.py)."""
OVERLAPPED = 0.7
"""Share of the communication that is hidden where a product of the same layer runs beside it."""
DENOISER_PASSES = 150
"""Values that a denoiser block reads and writes for each token and channel, forward and backward: norms, modulation,
gates, copies of the heads, and the activation on four times the width."""
TOWER_KERNELS = 25
"""Kernels of a layer of the vision tower, which takes at least the time of their launches."""


@dataclass(frozen=True)
class Data:
    """What a run's samples hold on average.

    tokens: of text and pictures; attended: length of the sample that a token is in, on average over tokens; images;
    labels: tokens with a label.
    """

    tokens: float
    attended: float
    images: float
    labels: float


def typical_data(model: ModelConfig, llm_trains: bool) -> Data:
    """Samples of the published mixtures: captions in stage 1, instructions in stage 2 (benchmarks/packing.py)."""
    picture = model.vision.image_tokens
    if not llm_trains:
        return Data(picture + CAPTION_TOKENS, picture + CAPTION_TOKENS, 1.0, CAPTION_TOKENS)
    tokens = (1 - TEXT_ONLY) * (picture + TEXT_TOKENS) + TEXT_ONLY * TEXT_ONLY_TOKENS
    return Data(tokens, tokens, 1 - TEXT_ONLY, TEXT_TOKENS)


@dataclass(frozen=True)
class Kernels:
    """Pointwise work of a decoder layer: reads and writes of a whole tensor, forward and backward.

    mlp: of [T, F/t] around the activation; rotary: of queries and keys; norms: of [T, H], norms and residual sums;
    rotary_launches: kernels, forward and backward. fused_attention: flash-attn or cuDNN; accumulates: whether the
    products of weight gradients add to the buffer themselves; wait_seconds: the device's idle time in a layer's forward
    while the host reads; step_seconds: the device's idle time between two steps.
    """

    mlp: tuple[float, float]
    rotary: tuple[float, float]
    norms: tuple[float, float] = (10, 16)
    rotary_launches: tuple[float, float] = (0, 0)
    fused_attention: bool = True
    accumulates: bool = True
    wait_seconds: float = 0.0
    step_seconds: float = 0.02


TRANSFORMER_ENGINE = Kernels(mlp=(3, 5), rotary=(2, 2))
LOCAL = Kernels(mlp=(3, 5), rotary=(14, 12), rotary_launches=(20, 16), fused_attention=False, accumulates=False)
"""torch's attention, and mcore's rotary embedding without a fused kernel."""


@dataclass(frozen=True)
class Recompute:
    """Activations that backward computes again; names and values as mcore's.

    num_layers: of each chunk under `block`; under `uniform` every layer is recomputed.
    """

    granularity: Literal["full", "selective"] | None = None
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = 1
    modules: tuple[str, ...] = ("core_attn",)
    denoiser: bool = False

    def layers(self, layers: int) -> int:
        """How many of a chunk's layers are recomputed whole."""
        if self.granularity != "full":
            return 0
        return min(self.num_layers, layers) if self.method == "block" else layers


@dataclass(frozen=True)
class Plan:
    """The options of a run that the time and the memory of its steps depend on.

    rows: of a micro-batch; tokens: slots of a row; packed: whether a row holds several samples; frozen_ahead: whether a
    frozen tower runs for several micro-batches at once, so that launches do not limit it.
    """

    rows: int = 1
    tokens: int = 4096
    packed: bool = True
    llm_trains: bool = True
    vision_trains: bool = False
    bf16: bool = True
    fp8: bool = False
    denoiser: Precision = "fp32"
    vae: Precision = "fp32"
    kernels: Kernels = TRANSFORMER_ENGINE
    recompute: Recompute = field(default_factory=Recompute)
    sequence_parallel: bool = True
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    frozen_ahead: bool = True
    precomputed: Precomputed = NOTHING_PRECOMPUTED

    @property
    def slots(self) -> int:
        """Slots of a micro-batch."""
        return self.rows * self.tokens

    @property
    def value_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 else 4

    def samples(self, data: Data) -> float:
        """Samples of a micro-batch."""
        return self.rows * (PACKED_FILL * self.tokens / data.tokens if self.packed else 1)


@dataclass(frozen=True)
class Seconds:
    """Time of a part's forward and backward pass; again: of its forward pass as backward repeats it."""

    forward: float
    backward: float
    again: float = 0.0


def layer_seconds(model: ModelConfig, plan: Plan, data: Data, machine: Machine, tensor: int) -> Seconds:
    """One decoder layer and one micro-batch on one rank, with the communication of its tensor-parallel group."""
    language, kernels, shares = model.language, plan.kernels, machine.shares
    slots, width, size = plan.slots, language.hidden_size, plan.value_bytes
    memory = machine.memory_bytes_per_second * shares.memory
    # a row of one sample attends over its padding too
    attended = data.attended if plan.packed else plan.tokens
    products, attention = layer_flops(language, slots, attended)
    precision: Precision = "fp8" if plan.fp8 else _own(plan)
    product = products / tensor / (machine.peak(precision) * shares.products[precision])
    share = shares.fused_attention if kernels.fused_attention else shares.attention
    attend = attention / tensor / (machine.peak(_own(plan)) * share)

    turned = slots * (language.num_attention_heads + language.num_key_value_heads) * language.head_dim * size / tensor
    inner = slots * language.intermediate_size * size / tensor
    whole = slots * width * size

    def pointwise(which: Literal[0, 1]) -> float:
        entry = whole / (tensor if plan.sequence_parallel else 1)
        norms = kernels.norms[which] * entry / memory
        rotary = kernels.rotary[which] * turned / memory + kernels.rotary_launches[which] * machine.kernel_seconds
        return norms + rotary + kernels.mlp[which] * inner / memory

    # an exchange: one gather or scatter of [T, H]; a sum over ranks is one of each
    exchange = _collective(whole, machine, tensor)
    forward = product + attend + pointwise(0) + 4 * exchange + kernels.wait_seconds
    hidden = 1 - OVERLAPPED
    # backward sends what forward sends, two of the four beside products; with split sequences inputs are gathered again
    exchanges = 2 + 4 * hidden if plan.sequence_parallel else 4 * hidden
    gradients = 2 if plan.llm_trains else 1
    backward = gradients * product + 2.5 * attend + pointwise(1) + exchanges * exchange
    if plan.llm_trains and not kernels.accumulates:
        backward += products / (2 * slots) / tensor * (size + 8) / memory
    again = {None: 0.0, "full": forward, "selective": _selective(plan, attend, product, forward)}
    return Seconds(forward, backward, again[plan.recompute.granularity])


def first_seconds(model: ModelConfig, plan: Plan, data: Data, machine: Machine, tensor: int) -> Seconds:
    """What the first stage does beside its decoder layers: tower, projector, and the gradient of the embedding."""
    parts = forward_flops(model, 0, 0, plan.samples(data) * data.images / tensor, plan.precomputed)
    peak, shares = machine.peak(_own(plan)), machine.shares
    tower = parts.vision_model / (peak * shares.small_products)
    if parts.vision_model and (plan.vision_trains or not plan.frozen_ahead):
        tower = max(tower, model.vision.num_layers * TOWER_KERNELS * machine.launch_seconds)
    projector = parts.vision_projection / (peak * shares.products[_own(plan)])
    embedding = _table_seconds(model, plan, machine, tensor) if plan.llm_trains else 0.0
    return Seconds(tower + projector, (2 * tower if plan.vision_trains else 0) + 2 * projector + embedding)


def last_seconds(model: ModelConfig, plan: Plan, data: Data, machine: Machine, tensor: int) -> Seconds:
    """What the last stage does beside its decoder layers: logits of the labelled tokens, VAE, denoiser."""
    samples = plan.samples(data)
    labels, images = samples * data.labels, samples * data.images / tensor
    parts = forward_flops(model, 0, labels, images, plan.precomputed)
    shares, memory = machine.shares, machine.memory_bytes_per_second * machine.shares.memory
    product = parts.output_layer / tensor / (machine.peak(_own(plan)) * shares.products[_own(plan)])
    scores = labels * model.language.padded_vocab_size / tensor * 4 * 6 / memory
    forward, backward = product + scores, (2 if plan.llm_trains else 1) * product + scores
    if plan.llm_trains and not plan.kernels.accumulates:
        backward += _table_seconds(model, plan, machine, tensor)
    if model.denoiser is None:
        return Seconds(forward, backward)
    values = images * model.denoiser.draws * model.vision.image_tokens * model.denoiser.width
    passes = DENOISER_PASSES * model.denoiser.depth * values * (2 if plan.denoiser == "bf16" else 4) / memory
    denoiser = parts.denoiser / (machine.peak(plan.denoiser) * shares.products[plan.denoiser]) + passes / 3
    convolved = parts.pixel_decoder / (machine.peak(plan.vae) * _convolutions(machine, plan.vae))
    read = encoder_values(model) * images * (2 if plan.vae == "bf16" else 4) / memory if parts.pixel_decoder else 0.0
    return Seconds(
        forward + denoiser + convolved + read, backward + 2 * denoiser, denoiser if plan.recompute.denoiser else 0.0
    )


def operations(
    model: ModelConfig, plan: Plan, data: Data, samples: float, slots: float, attended: float, recomputed: int
) -> tuple[float, float]:
    """Useful operations of some samples' training, and those that are done: with padding and recomputation.

    slots: of all their rows; attended: tokens that a slot attends to, twice; recomputed: decoder layers that backward
    computes again whole.
    """
    layers, again = model.language.num_hidden_layers, recomputed * sum(layer_flops(model.language, slots, attended))
    parts = forward_flops(model, 0, samples * data.labels, samples * data.images, plan.precomputed)
    ends = step_flops(parts, layers, plan.llm_trains, plan.vision_trains)
    passes = layers * (TRAINED if plan.llm_trains else PASSED_THROUGH)
    useful = sum(layer_flops(model.language, samples * data.tokens, data.attended))
    return ends + passes * useful, ends + passes * sum(layer_flops(model.language, slots, attended)) + again


def _own(plan: Plan) -> Precision:
    """The precision of the language model and the tower."""
    return "bf16" if plan.bf16 else "fp32"


def _collective(whole_bytes: float, machine: Machine, ranks: int) -> float:
    """Seconds of a gather or a scatter of this many bytes within a node."""
    if ranks == 1:
        return 0.0
    return whole_bytes * (ranks - 1) / ranks / (machine.nvlink * machine.shares.nvlink) + machine.latency_seconds


def _table_seconds(model: ModelConfig, plan: Plan, machine: Machine, tensor: int) -> float:
    """Adds the gradient of a matrix of the vocabulary to its buffer: read, and the buffer read and written."""
    count = model.language.padded_vocab_size / tensor * model.language.hidden_size
    return count * (plan.value_bytes + 8) / (machine.memory_bytes_per_second * machine.shares.memory)


def _selective(plan: Plan, attention: float, products: float, forward: float) -> float:
    """The modules' share of a layer's forward pass: `core_attn`, `mlp`; norms are left out."""
    modules = plan.recompute.modules
    return ("core_attn" in modules) * attention + ("mlp" in modules) * (forward - attention) * 0.8


def _convolutions(machine: Machine, precision: Precision) -> float:
    """The share of the peak that convolutions reach; those in fp32 reach that of products."""
    return machine.shares.products["fp32"] if precision == "fp32" else machine.shares.convolutions
