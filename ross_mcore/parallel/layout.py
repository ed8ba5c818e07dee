"""Places a model on ranks: degrees of parallelism -> decoder layers of every pipeline stage.

Pure functions without process groups: a layout is data, computed once and validated when constructed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ross_mcore.architecture import NOTHING_PRECOMPUTED, LanguageConfig, ModelConfig, Precomputed
from ross_mcore.costs import Data, Plan, first_seconds, last_seconds, layer_seconds, typical_data
from ross_mcore.errors import LayoutError
from ross_mcore.machines import H100, Machine


def share_of(count: int, rank: int, size: int, turn: int = 0) -> range:
    """The contiguous share of `count` items that `rank` of `size` ranks holds, in the order of the ranks.

    Of an uneven division, the ranks from `turn` on (modulo size) hold one more, so that with the number of the
    micro-batch as turn every rank holds more in turn. Raises ValueError unless 0 <= rank < size.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} of {size} ranks")
    base, extra = divmod(count, size)
    holds_more = [(other - turn) % size < extra for other in range(rank + 1)]
    start = rank * base + sum(holds_more[:rank])
    return range(start, start + base + holds_more[rank])


@dataclass(frozen=True)
class PairShare:
    """A rank's contiguous share of the (picture, draw) pairs of a micro-batch, the draws of a picture one by one.

    pictures: those with a pair in the share; draws_of_each: how many draws of each, 0 < n <= draws, as only the first
    and the last picture can be shared with other ranks; pairs: the pairs among all those of `pictures`.
    """

    pictures: range
    draws_of_each: tuple[int, ...]
    pairs: range

    @classmethod
    def of(cls, pictures: int, draws: int, rank: int, size: int, turn: int = 0) -> PairShare:
        share = share_of(pictures * draws, rank, size, turn)
        if not share:
            return cls(range(0), (), range(0))
        held = range(share.start // draws, -(-share.stop // draws))
        ends = ((max(share.start, p * draws), min(share.stop, (p + 1) * draws)) for p in held)
        first = held.start * draws
        return cls(held, tuple(end - start for start, end in ends), range(share.start - first, share.stop - first))


@dataclass(frozen=True)
class DataShare:
    """The part of every step that a rank reads: the micro-batches of data-parallel rank `dp_rank` of `dp_size`.

    It decodes the share of their images that belongs to tensor-parallel rank `tp_rank` of `tp_size`. `reads` is False
    on middle stages, which plan rows but read none.
    """

    dp_rank: int = 0
    dp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    reads: bool = True


EVERYTHING = DataShare()
"""The share of a single rank."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive decoder layers, the unit of the pipeline schedule.

    number: index among the chunks of its rank; is_first, is_last: whether it is the model's first or last chunk, which
    also hosts the parts before or after the decoder layers.
    """

    number: int
    layers: range
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class Stage:
    """The chunks of one pipeline rank: one, or several under the interleaved schedule."""

    index: int
    chunks: tuple[Chunk, ...]

    @property
    def layers(self) -> list[int]:
        """Indices of its decoder layers in the model."""
        return [layer for chunk in self.chunks for layer in chunk.layers]

    @property
    def is_first(self) -> bool:
        """Whether it hosts the model's first chunk."""
        return self.chunks[0].is_first

    @property
    def is_last(self) -> bool:
        """Whether it hosts the model's last chunk."""
        return self.chunks[-1].is_last

    @property
    def reads_data(self) -> bool:
        """Whether it needs the batch: the first stage reads tokens and pixels, the last labels and pixels."""
        return self.is_first or self.is_last


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism, and how many decoder layers each chunk of the model has, in order.

    Chunk c is on pipeline rank c % P, so rank r holds chunks r, P + r, 2P + r ... (Narayanan et al. 2021, section 2.2).
    Raises LayoutError when the number of chunks does not fit the stages, or a chunk has no layer.
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
        """The interleaved schedule needs a multiple of P micro-batches per rank; others any number."""
        return self.pipeline_parallel if self.virtual_stages > 1 else 1

    def row_multiple(self, micro_batch_size: int) -> int:
        """The rows of a step over all ranks are a multiple of this."""
        return micro_batch_size * self.data_parallel * self.micro_batch_multiple

    def rows_for(self, wanted: float, micro_batch_size: int) -> int:
        """The multiple of `row_multiple` nearest to the wanted rows of a step; at least one multiple."""
        multiple = self.row_multiple(micro_batch_size)
        return max(1, round(wanted / multiple)) * multiple

    def stage(self, index: int) -> Stage:
        positions = range(index, len(self.layers_per_chunk), self.pipeline_parallel)
        return Stage(index, tuple(self._chunk(number, position) for number, position in enumerate(positions)))

    def _chunk(self, number: int, position: int) -> Chunk:
        start = sum(self.layers_per_chunk[:position])
        layers = range(start, start + self.layers_per_chunk[position])
        return Chunk(number, layers, is_first=position == 0, is_last=position == len(self.layers_per_chunk) - 1)

    def megatron_pipeline_layout(self) -> list[list[str]] | None:
        """mcore's `pipeline_model_parallel_layout`; None for a single stage."""
        if self.pipeline_parallel == 1:
            return None
        rows = [["decoder"] * count for count in self.layers_per_chunk]
        rows[0].insert(0, "embedding")
        rows[-1].append("loss")
        return rows


@dataclass(frozen=True)
class Placement:
    """The options of a run that decide how its model is placed on ranks."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    pipeline_layout: str = "auto"
    """`auto`, `even`, or decoder layers per chunk such as `8,8,8,4`."""
    layers_per_virtual_stage: int | None = None
    """Decoder layers per chunk under the interleaved schedule; None: one chunk per rank."""
    plan: Plan = field(default_factory=Plan)
    """The options that the time of a stage depends on."""
    data: Data | None = None
    """What the samples hold on average; None: typical_data."""
    machine: Machine = H100

    @property
    def is_balanced(self) -> bool:
        """Whether the time of the stages decides their layers."""
        return self.pipeline_parallel > 1 and self.pipeline_layout == "auto"


def stage_extra_costs(model: ModelConfig, placement: Placement) -> tuple[float, float]:
    """Time of a micro-batch on the first and the last stage without their decoder layers, in units of a layer's time.

    Rows that are not packed are taken to be as long as the mean sample. Layers that `--recompute-method block`
    recomputes are left out: every stage has as many.
    """
    plan, tensor = placement.plan, placement.tensor_parallel
    data = placement.data or typical_data(model, plan.llm_trains)
    if not plan.packed:
        plan = replace(plan, tokens=max(1, round(min(plan.tokens, data.tokens))))
    parts = layer_seconds, first_seconds, last_seconds
    layer, first, last = (seconds(model, plan, data, placement.machine, tensor) for seconds in parts)
    again = 0 if plan.recompute.method == "block" and plan.recompute.granularity == "full" else layer.again
    unit = layer.forward + layer.backward + again
    return (first.forward + first.backward) / unit, (last.forward + last.backward + last.again) / unit


def balance(
    num_layers: int, stages: int, first_extra: float, last_extra: float, virtual_stages: int = 1
) -> tuple[int, ...]:
    """Layers per chunk that minimise the load of the slowest rank; the extras are in units of a layer.

    Every chunk gets one layer. Each further layer goes to the rank with the least load, into its smallest chunk; this
    is optimal because all layers cost the same. Of equally loaded ranks a middle one is chosen, because it holds no
    embedding and no output layer. Raises LayoutError when there are more chunks than layers.
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
    """Parses `--pipeline-layout 7,8,9,4`: decoder layers per chunk; with k * stages numbers each rank has k chunks.

    Raises LayoutError for text that is not a list of numbers, and for counts that do not fit stages and layers.
    """
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
    """Chunks per rank when each chunk has `layers_each` layers."""
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
    model: ModelConfig, placement: Placement, *, world_size: int, precomputed: Precomputed = NOTHING_PRECOMPUTED
) -> Layout:
    """Checks the degrees against the model and the number of processes, and places the decoder layers.

    Raises LayoutError with the two counts that disagree and the remedy.
    """
    _check_degrees(model.language, placement, world_size)
    layers, stages, chosen = model.language.num_hidden_layers, placement.pipeline_parallel, placement.pipeline_layout
    virtual_stages = 1
    if placement.layers_per_virtual_stage is not None:
        if chosen not in ("auto", "even"):
            raise LayoutError(
                f"--pipeline-layout {chosen} sets the layers of every chunk; "
                "remove --num-layers-per-virtual-pipeline-stage"
            )
        virtual_stages = _virtual_stages(layers, stages, placement.layers_per_virtual_stage)
    if chosen == "auto":
        placement = replace(placement, plan=replace(placement.plan, precomputed=precomputed))
        extras = stage_extra_costs(model, placement)
        counts = balance(layers, stages, *extras, virtual_stages)
    elif chosen == "even":
        counts = balance(layers, stages, 0.0, 0.0, virtual_stages)
    else:
        counts = parse_layers(chosen, layers, stages)
    data_parallel = world_size // (placement.tensor_parallel * stages)
    return Layout(placement.tensor_parallel, stages, data_parallel, counts)


def _check_degrees(language: LanguageConfig, placement: Placement, world_size: int) -> None:
    tensor, pipeline = placement.tensor_parallel, placement.pipeline_parallel
    if world_size % (tensor * pipeline):
        raise LayoutError(
            f"{world_size} processes cannot be split into tensor {tensor} x pipeline {pipeline}: "
            f"start a multiple of {tensor * pipeline} processes"
        )
    for what, count in (
        ("attention heads", language.num_attention_heads),
        ("key-value heads", language.num_key_value_heads),
        ("rows of the padded vocabulary", language.padded_vocab_size),
        ("columns of the MLP", language.intermediate_size),
    ):
        if count % tensor:
            raise LayoutError(
                f"tensor-model-parallel-size {tensor} does not divide the model's {count} {what}; "
                "use one that does, and more pipeline stages or data parallelism instead"
            )
    if pipeline > language.num_hidden_layers:
        raise LayoutError(
            f"pipeline-model-parallel-size {pipeline} is larger than the model's "
            f"{language.num_hidden_layers} decoder layers; use at most {language.num_hidden_layers}"
        )
