"""PURE: where things are. Degrees and a model -> what each pipeline stage hosts and which inputs it needs.

Nothing here knows a process group: a layout is data, computed once and validated when constructed.
"""

from __future__ import annotations

from dataclasses import dataclass

from ross_mcore.architecture import NOTHING_PRECOMPUTED, ModelConfig, Precomputed
from ross_mcore.errors import LayoutError
from ross_mcore.flops import forward_flops, stage_flops

TYPICAL_TEXT_TOKENS = 300
"""Text tokens of a typical instruction sample: what stage balance is computed for when nothing better is known."""


def share_of(count: int, rank: int, size: int) -> range:
    """The contiguous share of `count` items that `rank` of `size` ranks holds; the first ranks hold one more.

    Raises ValueError when rank is not one of size ranks.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} of {size} ranks")
    base, extra = divmod(count, size)
    start = rank * base + min(rank, extra)
    return range(start, start + base + (rank < extra))


@dataclass(frozen=True)
class DataShare:
    """What a rank reads of every step: the micro-batches of data-parallel rank `dp_rank` of `dp_size`.

    Of the pictures in them it decodes the share of tensor-parallel rank `tp_rank` of `tp_size`. `reads`: False on
    stages that plan the rows and read nothing.
    """

    dp_rank: int = 0
    dp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    reads: bool = True


EVERYTHING = DataShare()
"""The share of a rank that is alone."""


@dataclass(frozen=True)
class Chunk:
    """Decoder layers that follow each other and what stands before or after them: the unit of the pipeline schedule.

    number: which of its rank's chunks it is; is_first, is_last: of the model.
    """

    number: int
    layers: range
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class Stage:
    """What one pipeline rank hosts: one chunk, or several under the interleaved schedule."""

    index: int
    chunks: tuple[Chunk, ...]

    @property
    def layers(self) -> list[int]:
        """Numbers of its decoder layers."""
        return [layer for chunk in self.chunks for layer in chunk.layers]

    @property
    def is_first(self) -> bool:
        """Whether it hosts the model's beginning."""
        return self.chunks[0].is_first

    @property
    def is_last(self) -> bool:
        """Whether it hosts the model's end."""
        return self.chunks[-1].is_last

    @property
    def reads_data(self) -> bool:
        """Only the ends need the batch: tokens and pixels at the start, labels and pixels at the end."""
        return self.is_first or self.is_last


@dataclass(frozen=True)
class Layout:
    """A whole placement.

    layers_per_chunk: decoder layers of the model's chunks in order, summing to the model's; chunk c is on pipeline rank
    c % P, so that a rank holds chunks r, P + r, 2P + r ... (Narayanan et al. 2021, section 2.2).
    """

    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    layers_per_chunk: tuple[int, ...]

    def __post_init__(self) -> None:
        chunks, stages = len(self.layers_per_chunk), self.pipeline_parallel
        if chunks % stages or (chunks != stages and stages == 1):
            raise LayoutError(
                f"{chunks} stages described ({self.layers_per_chunk}), pipeline-model-parallel-size is {stages}"
            )
        if min(self.layers_per_chunk) < 1:
            raise LayoutError(f"every stage needs at least one decoder layer, got {self.layers_per_chunk}")

    @property
    def virtual_stages(self) -> int:
        """Chunks of every pipeline rank; more than 1 under the interleaved schedule."""
        return len(self.layers_per_chunk) // self.pipeline_parallel

    @property
    def micro_batch_multiple(self) -> int:
        """What the micro-batches of a rank must be a multiple of: P under the interleaved schedule."""
        return self.pipeline_parallel if self.virtual_stages > 1 else 1

    def stage(self, index: int) -> Stage:
        places = range(index, len(self.layers_per_chunk), self.pipeline_parallel)
        return Stage(index, tuple(self._chunk(number, place) for number, place in enumerate(places)))

    def _chunk(self, number: int, place: int) -> Chunk:
        start = sum(self.layers_per_chunk[:place])
        layers = range(start, start + self.layers_per_chunk[place])
        return Chunk(number, layers, is_first=place == 0, is_last=place == len(self.layers_per_chunk) - 1)

    def megatron_pipeline_layout(self) -> list[list[str]] | None:
        """mcore's `pipeline_model_parallel_layout`; None for a single stage."""
        if self.pipeline_parallel == 1:
            return None
        rows = [["decoder"] * count for count in self.layers_per_chunk]
        rows[0].insert(0, "embedding")
        rows[-1].append("loss")
        return rows


def stage_extra_costs(
    model: ModelConfig,
    llm_trains: bool,
    vision_trains: bool,
    tokens: int,
    precomputed: Precomputed = NOTHING_PRECOMPUTED,
) -> tuple[float, float]:
    """What the first and the last stage do beside decoder layers, in units of one decoder layer's step time."""
    parts = forward_flops(model, tokens, labelled_tokens=tokens / 4, precomputed=precomputed)
    first, layer, last = stage_flops(parts, llm_trains, vision_trains)
    return first / layer, last / layer


def balance(
    num_layers: int, stages: int, first_extra: float, last_extra: float, virtual_stages: int = 1
) -> tuple[int, ...]:
    """Layers per chunk that make the slowest rank as fast as possible; the extras are in units of a layer.

    Every chunk gets one layer; each further layer goes to the rank that is then least loaded, which is optimal because
    all layers cost the same, and there to the smallest chunk. Among equals the middle ranks come first: they hold no
    embedding and no vocabulary.
    """
    chunks = stages * virtual_stages
    if not 1 <= chunks <= num_layers:
        raise LayoutError(
            f"pipeline-model-parallel-size {stages} x {virtual_stages} with {num_layers} decoder layers: every stage "
            "needs at least one"
        )
    loads = [float(virtual_stages)] * stages
    loads[0] += first_extra
    loads[-1] += last_extra
    counts = [1] * chunks
    at_end = {0, stages - 1}
    for _ in range(num_layers - chunks):
        rank = min(range(stages), key=lambda i: (loads[i], i in at_end, i))
        smallest = min(range(rank, chunks, stages), key=lambda chunk: counts[chunk])
        counts[smallest] += 1
        loads[rank] += 1
    return tuple(counts)


def parse_layers(text: str, num_layers: int, stages: int) -> tuple[int, ...]:
    """`--pipeline-layout` given as decoder layers per chunk, `7,8,9,4`; k times as many are k chunks a rank."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise LayoutError(
            f"--pipeline-layout {text!r}: expected auto, even or layers per stage such as 8,8,8,4"
        ) from None
    if len(counts) % stages or sum(counts) != num_layers:
        raise LayoutError(
            f"--pipeline-layout {text}: {len(counts)} stages with {sum(counts)} layers in all; "
            f"the run has {stages} stages (or a multiple, interleaved) and the model {num_layers} decoder layers"
        )
    return counts


def _virtual_stages(num_layers: int, stages: int, layers_each: int) -> int:
    """Chunks of every rank when each has `layers_each` layers."""
    if stages == 1:
        raise LayoutError("--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size 2 or more")
    if num_layers % (stages * layers_each):
        raise LayoutError(
            f"--num-layers-per-virtual-pipeline-stage {layers_each} x pipeline-model-parallel-size {stages} does not "
            f"divide the model's {num_layers} decoder layers; give the layers of every chunk with --pipeline-layout, "
            f"in the order of the model and a multiple of {stages} of them"
        )
    return num_layers // (stages * layers_each)


def make_layout(
    model: ModelConfig,
    *,
    world_size: int,
    tensor_parallel: int,
    pipeline_parallel: int,
    pipeline_layout: str = "auto",
    layers_per_virtual_stage: int | None = None,
    llm_trains: bool = True,
    vision_trains: bool = False,
    precomputed: Precomputed = NOTHING_PRECOMPUTED,
) -> Layout:
    """Validates the degrees against the model and the number of processes, and places the layers.

    `layers_per_virtual_stage` asks for the interleaved schedule: as many chunks a rank as chunks of that size make,
    which are then balanced like stages. Raises LayoutError with the two counts that disagree and what to change.
    """
    language = model.language
    model_parallel = tensor_parallel * pipeline_parallel
    if world_size % model_parallel:
        raise LayoutError(
            f"{world_size} processes cannot be split into tensor {tensor_parallel} x pipeline {pipeline_parallel}: "
            f"start a multiple of {model_parallel} processes"
        )
    for what, count in (
        ("attention heads", language.num_attention_heads),
        ("key-value heads", language.num_key_value_heads),
        ("rows of the padded vocabulary", language.padded_vocab_size),
        ("columns of the MLP", language.intermediate_size),
    ):
        if count % tensor_parallel:
            raise LayoutError(
                f"tensor-model-parallel-size {tensor_parallel} does not divide the model's {count} {what}; "
                f"use one that does, and more pipeline stages or data parallelism instead"
            )
    if pipeline_parallel > language.num_hidden_layers:
        raise LayoutError(
            f"pipeline-model-parallel-size {pipeline_parallel} is larger than the model's "
            f"{language.num_hidden_layers} decoder layers; use at most {language.num_hidden_layers}"
        )
    layers, virtual_stages = language.num_hidden_layers, 1
    if layers_per_virtual_stage is not None:
        if pipeline_layout not in ("auto", "even"):
            raise LayoutError(
                f"--pipeline-layout {pipeline_layout} says how many layers each chunk has; "
                "remove --num-layers-per-virtual-pipeline-stage"
            )
        virtual_stages = _virtual_stages(layers, pipeline_parallel, layers_per_virtual_stage)
    if pipeline_layout == "auto":
        tokens = model.vision.image_tokens + TYPICAL_TEXT_TOKENS
        extras = stage_extra_costs(model, llm_trains, vision_trains, tokens, precomputed)
        counts = balance(layers, pipeline_parallel, *extras, virtual_stages)
    elif pipeline_layout == "even":
        counts = balance(layers, pipeline_parallel, 0.0, 0.0, virtual_stages)
    else:
        counts = parse_layers(pipeline_layout, layers, pipeline_parallel)
    return Layout(tensor_parallel, pipeline_parallel, world_size // model_parallel, counts)
