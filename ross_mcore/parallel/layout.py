"""PURE: where things are. Degrees and a model -> what each pipeline stage hosts and which inputs it needs.

Nothing here knows a process group: a layout is data, computed once and validated when constructed.
"""

from __future__ import annotations

from dataclasses import dataclass

from ross_mcore.architecture import NOTHING_PRECOMPUTED, ModelConfig, Precomputed
from ross_mcore.flops import forward_flops, stage_flops

TYPICAL_TEXT_TOKENS = 300
"""Text tokens of a typical instruction sample: what stage balance is computed for when nothing better is known."""


class LayoutError(ValueError):
    """Degrees that do not fit the model or the number of processes; the message says what to change."""


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
class Stage:
    """One pipeline stage: its decoder layers and what else it hosts."""

    index: int
    layers: range
    is_first: bool
    is_last: bool

    @property
    def reads_data(self) -> bool:
        """Only the ends need the batch: tokens and pixels at the start, labels and pixels at the end."""
        return self.is_first or self.is_last


@dataclass(frozen=True)
class Layout:
    """A whole placement. `layers_per_stage` sums to the model's number of decoder layers."""

    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    layers_per_stage: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.layers_per_stage) != self.pipeline_parallel:
            raise LayoutError(
                f"{len(self.layers_per_stage)} stages described ({self.layers_per_stage}), "
                f"pipeline-model-parallel-size is {self.pipeline_parallel}"
            )
        if min(self.layers_per_stage) < 1:
            raise LayoutError(f"every stage needs at least one decoder layer, got {self.layers_per_stage}")

    def stage(self, index: int) -> Stage:
        start = sum(self.layers_per_stage[:index])
        return Stage(
            index=index,
            layers=range(start, start + self.layers_per_stage[index]),
            is_first=index == 0,
            is_last=index == self.pipeline_parallel - 1,
        )

    def megatron_pipeline_layout(self) -> list[list[str]] | None:
        """mcore's `pipeline_model_parallel_layout`; None for a single stage."""
        if self.pipeline_parallel == 1:
            return None
        rows = [["decoder"] * count for count in self.layers_per_stage]
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


def balance(num_layers: int, stages: int, first_extra: float, last_extra: float) -> tuple[int, ...]:
    """Layers per stage that make the slowest stage as fast as possible; the extras are in units of a layer.

    Every stage gets one layer; each further layer goes to the stage that is then least loaded, which is optimal because
    all layers cost the same. Among equals the middle stages come first: they hold no embedding and no vocabulary.
    """
    if not 1 <= stages <= num_layers:
        raise LayoutError(
            f"pipeline-model-parallel-size {stages} with {num_layers} decoder layers: every stage needs at least one"
        )
    extras = [0.0] * stages
    extras[0] += first_extra
    extras[-1] += last_extra
    counts = [1] * stages
    at_end = {0, stages - 1}
    for _ in range(num_layers - stages):
        best = min(range(stages), key=lambda i: (counts[i] + 1 + extras[i], i in at_end, i))
        counts[best] += 1
    return tuple(counts)


def parse_layers(text: str, num_layers: int, stages: int) -> tuple[int, ...]:
    """`--pipeline-layout` given as decoder layers per stage, `7,8,9,4`."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise LayoutError(
            f"--pipeline-layout {text!r}: expected auto, even or layers per stage such as 8,8,8,4"
        ) from None
    if len(counts) != stages or sum(counts) != num_layers:
        raise LayoutError(
            f"--pipeline-layout {text}: {len(counts)} stages with {sum(counts)} layers in all; "
            f"the run has {stages} stages and the model {num_layers} decoder layers"
        )
    return counts


def make_layout(
    model: ModelConfig,
    *,
    world_size: int,
    tensor_parallel: int,
    pipeline_parallel: int,
    pipeline_layout: str = "auto",
    llm_trains: bool = True,
    vision_trains: bool = False,
    precomputed: Precomputed = NOTHING_PRECOMPUTED,
) -> Layout:
    """Validates the degrees against the model and the number of processes, and places the layers.

    Raises LayoutError with the two counts that disagree and what to change.
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
    if pipeline_layout == "auto":
        tokens = model.vision.image_tokens + TYPICAL_TEXT_TOKENS
        extras = stage_extra_costs(model, llm_trains, vision_trains, tokens, precomputed)
        counts = balance(language.num_hidden_layers, pipeline_parallel, *extras)
    elif pipeline_layout == "even":
        counts = balance(language.num_hidden_layers, pipeline_parallel, 0.0, 0.0)
    else:
        counts = parse_layers(pipeline_layout, language.num_hidden_layers, pipeline_parallel)
    return Layout(tensor_parallel, pipeline_parallel, world_size // model_parallel, counts)
