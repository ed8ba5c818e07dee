"""Bytes on the wire of a training step, around every collective and every send, beside the least that the layout needs.

Counted is what each rank sends, by the ring algorithms: an all-reduce of n bytes over g ranks sends 2 (g - 1) / g n
from each rank, an all-gather or reduce-scatter whose whole is n sends (g - 1) / g n, a send n, a receive nothing.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from counting import Row
from counting.ranks import on_ranks
from ross_mcore.batch import IGNORE_INDEX
from ross_mcore.engine.run import Run
from ross_mcore.engine.step import AgreedStep


def size_of(tensors: Any) -> int:
    """Bytes of a tensor, or of all in nested lists."""
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(size_of, tensors))


def whole(share: int, size: int) -> float:
    """Bytes that each rank sends when all get the pieces of `share` bytes of all `size` ranks, or sum them up."""
    return (size - 1) * share


def ring(total: float, size: int) -> float:
    """Bytes that each rank sends in an all-reduce of `total` bytes."""
    return 2 * (size - 1) / size * total


def half(total: float, size: int) -> float:
    """Bytes that each rank sends in an all-gather or reduce-scatter of `total` bytes in all."""
    return (size - 1) / size * total


SENT: Mapping[str, Callable[[tuple[Any, ...], int], float]] = {
    "allreduce_": lambda args, size: ring(size_of(args[0]), size),
    "allreduce_coalesced_": lambda args, size: ring(size_of(args[0]), size),
    "allgather_": lambda args, size: whole(size_of(args[1]), size),
    "allgather_coalesced_": lambda args, size: whole(size_of(args[1]), size),
    "_allgather_base_": lambda args, size: whole(size_of(args[1]), size),
    "allgather_into_tensor_coalesced_": lambda args, size: whole(size_of(args[1]), size),
    "reduce_scatter_": lambda args, size: whole(size_of(args[0]), size),
    "_reduce_scatter_base_": lambda args, size: whole(size_of(args[0]), size),
    "reduce_scatter_tensor_coalesced_": lambda args, size: whole(size_of(args[0]), size),
    "alltoall_": lambda args, size: half(size_of(args[1]), size),
    "alltoall_base_": lambda args, size: half(size_of(args[1]), size),
    "broadcast_": lambda args, size: half(size_of(args[0]), size),  # the mean of the root and the others
    "reduce_": lambda args, size: half(size_of(args[0]), size),
    "gather_": lambda args, size: half(size_of(args[1]), size),
    "scatter_": lambda args, size: half(size_of(args[0]), size),
    "send": lambda args, size: size_of(args[0]),
    "recv_": lambda args, size: 0,
    "recv_any_source_": lambda args, size: 0,
    "barrier": lambda args, size: 0,
    "monitored_barrier_": lambda args, size: 0,
}
"""Operation of torch's c10d library -> bytes that a rank sends, from its arguments and the size of the group."""


class WireCount(TorchDispatchMode):
    """Counts the bytes that this rank sends: `sent`, by (operation, size of the group, where it is called).

    Every collective and send of torch.distributed, coalesced, asynchronous or of objects, is an operation of c10d in
    torch's dispatcher. An operation that is not in SENT raises KeyError.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[tuple[str, int, str]] = Counter()
        self.calls: Counter[tuple[str, int, str]] = Counter()

    @property
    def total(self) -> float:
        return sum(self.sent.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function._schema.name.partition("::")
        if namespace in ("_c10d_functional", "c10d_functional"):
            raise KeyError(f"{function._schema.name} is not counted")
        if namespace == "c10d" and name != "check_for_nan":
            group = next(value for value in args if isinstance(value, torch.ScriptObject) and _is_group(value))
            size = dist.ProcessGroup.unbox(group).size()
            place = (name, size, _caller())
            self.sent[place] += SENT[name](args, size)
            self.calls[place] += 1
        return function(*args, **(kwargs or {}))


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())


def _caller() -> str:
    """The innermost function of this package or of mcore on the stack."""
    for frame in reversed(traceback.extract_stack()):
        parts = Path(frame.filename).parts
        if "ross_mcore" in parts or "megatron" in parts:
            return f"{'/'.join(parts[-2:])}:{frame.name}"
    return ""


@dataclass(frozen=True)
class MicroBatch:
    """tokens: with padding; labels: positions whose logits are computed; images, samples: their number."""

    tokens: int
    labels: int
    images: int
    samples: int


def micro_batches(step: AgreedStep) -> list[MicroBatch]:
    """Of a step that this rank has read."""
    found = []
    for rows, seq_length in zip(step.loaded.micro_batches or [], step.size.seq_lengths):
        samples = [sample for row in rows for sample in row]
        labels = sum(int((sample.labels[1:] != IGNORE_INDEX).sum()) for sample in samples)
        images = sum(len(sample.image_starts) for sample in samples)
        found.append(MicroBatch(seq_length * step.size.rows, max(1, labels), images, len(samples)))
    return found


def least(run: Run, batches: Iterable[MicroBatch]) -> dict[str, float]:
    """Bytes that this rank must send in a step of these micro-batches, by what they are for."""
    groups, model, config = run.groups, run.model_config, run.config
    layout, stage = groups.layout, groups.stage
    tensor, data, world = layout.tensor_parallel, layout.data_parallel, dist.get_world_size()
    element = 2 if config.execution.bf16 else 4
    split = config.parallel.sequence_parallel
    chunks = run.engine.model.parts
    found: Counter[str] = Counter()
    for batch in batches:
        hidden = batch.tokens * model.language.hidden_size * element
        pictures = batch.images * model.vision.image_tokens * model.language.hidden_size * element
        labelled = batch.labels * model.language.hidden_size * element
        # without sequence parallelism: two all-reduces forward, two backward; with it each is a reduce-scatter and an
        # all-gather, and the two inputs of column-parallel layers are gathered again for their weights' gradients
        found["layers"] += len(stage.layers) * (half(10 * hidden, tensor) if split else ring(4 * hidden, tensor))
        if stage.is_first:
            found["embeddings"] += half(2 * hidden, tensor) if split else ring(hidden, tensor)
            found["pictures to the language model"] += half(pictures, tensor)
        if stage.is_last:
            found["whole hidden states"] += half(hidden, tensor) if split else 0
            found["gradient of labelled states"] += ring(labelled, tensor)
            found["cross-entropy"] += ring(3 * 4 * batch.labels, tensor)
            found["gradient of pictures' states"] += half(pictures, tensor)
            found["sums of losses"] += ring(8 * batch.samples, tensor)
        found["pipeline"] += len(chunks) * 2 * hidden / (tensor if split else 1)
        found["pipeline"] -= (stage.is_first + stage.is_last) * hidden / (tensor if split else 1)
    trained = [weight for part in chunks for weight in part.parameters() if weight.requires_grad]
    count = sum(weight.numel() for weight in trained)
    if config.use_distributed_optimizer:
        found["gradients"] += half(4 * count, data)
        found["weights"] += half(element * count, data)
    else:
        found["gradients"] += ring(4 * count, data)
    for mark in ("average_gradients_across_tp_domain", "sequence_parallel"):
        found["gradients of replicated parts"] += ring(
            4 * sum(weight.numel() for weight in trained if getattr(weight, mark, False)), tensor
        )
    if model.language.tie_word_embeddings and groups.embedding is not None:
        rows = model.language.padded_vocab_size // tensor
        found["tied embeddings"] += ring(4 * rows * model.language.hidden_size, groups.embedding.size())
    found["agreement, losses, finite"] += whole(8 * 14, world) + ring(8 * (2 + 6 + 1), world)
    found["norm"] += ring(4, world if config.use_distributed_optimizer else world // data)
    return dict(found)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2 with sequence parallelism": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "DP2": (2, {}),
    "DP2, distributed optimizer": (2, {"use_distributed_optimizer": True}),
    "DP2, distributed optimizer, bf16": (2, {"bf16": True}),
    "TP2 x PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
"""Name -> ranks and flags."""


@dataclass(frozen=True)
class Wire:
    """A step of one rank: bytes by (operation, size of the group, place), and the least by what they are for."""

    sent: dict[tuple[str, int, str], float]
    least: dict[str, float]


def count_layouts(base: Path, shards: Path, save: Path, layouts: Iterable[str]) -> dict[str, Wire]:
    """The second step in each layout, on this one of several ranks; a layout with fewer ranks leaves the last out."""
    from counting.model import opened

    world, rank, found = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]), {}
    for name in layouts:
        ranks, flags = LAYOUTS[name]
        if rank >= ranks:
            continue
        os.environ["WORLD_SIZE"] = str(ranks)
        with opened(base, shards, save / name, global_batch_size=8, micro_batch_size=2, **flags) as run:
            engine = run.engine
            engine.train(engine.read(run.loader), 0)
            with WireCount() as wire:
                step = engine.read(run.loader)
                engine.train(step, 1)
            batches = micro_batches(step) if run.groups.stage.reads_data else []
            found[name] = Wire(dict(wire.sent), least(run, batches))
        os.environ["WORLD_SIZE"] = str(world)
    return found


def totals(wires: Iterable[Wire]) -> tuple[float, float]:
    """(bytes sent, least) over all ranks of a layout."""
    wires = list(wires)
    return sum(sum(wire.sent.values()) for wire in wires), sum(sum(wire.least.values()) for wire in wires)


def rows() -> list[Row]:
    from counting.model import write_small

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, shards = write_small(folder)
        ranks = on_ranks(count_layouts, 4, base, shards, folder / "runs", list(LAYOUTS))
    found = []
    for name in LAYOUTS:
        sent, needed = totals(rank[name] for rank in ranks if name in rank)
        meaning = f"of the least, {needed / 1e6:.2f} MB a step"
        found.append(Row(f"bytes sent, {name}", f"{sent / needed:.3f}", "<= 1.05", meaning))
    return found
