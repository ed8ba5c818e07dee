"""A range of a tensor's elements as rectangles, the form in which torch_dist stores and finds the pieces of a tensor.

The distributed optimizer gives every data-parallel rank a range of the elements of a weight, in the order of memory.
Stored as rectangles of the whole tensor, a rank writes and reads its own elements without any other rank, and the
checkpoint still loads at every layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor


class Rectangle(NamedTuple):
    """A block of a tensor: the index of its first element, and its size along every axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def rectangles(shape: Sequence[int], begin: int, end: int) -> list[Rectangle]:
    """Elements [begin, end) of a tensor of this shape, in row-major order, as rectangles in the same order.

    There are at most 2 * axes - 1: for a matrix the rest of a row, whole rows, and the beginning of a row.
    """
    if begin >= end:
        return []
    if len(shape) <= 1:
        return [Rectangle((begin,), (end - begin,)) if shape else Rectangle((), ())]
    size = math.prod(shape[1:])
    found: list[Rectangle] = []

    def within(row: int, first: int, last: int) -> Iterator[Rectangle]:
        for inner in rectangles(shape[1:], first, last):
            yield Rectangle((row, *inner.offsets), (1, *inner.sizes))

    row, first = divmod(begin, size)
    if first:
        found += within(row, first, min(size, first + end - begin))
        row += 1
    rows = max(0, end // size - row)
    if rows:
        found.append(Rectangle((row, *(0 for _ in shape[1:])), (rows, *shape[1:])))
    rest = end - (row + rows) * size
    return [*found, *(within(row + rows, 0, rest) if rest > 0 else ())]


def sharded_range(
    weight: ShardedTensor | ShardedTensorFactory, key: str, own: Tensor, begin: int
) -> Iterator[ShardedTensor]:
    """Views of `own`, the elements of the tensor `key` that no other data-parallel rank has, for a sharded state dict.

    The tensor is sharded over tensor and pipeline ranks as `weight` is. own [n]: elements [begin, begin + n) of this
    rank's shard, in row-major order.
    """
    blocks = [(0, weight)]
    if isinstance(weight, ShardedTensorFactory):  # several blocks, such as gate and up: a meta tensor shows which
        shape_alone = torch.empty(weight.data.shape, dtype=own.dtype, device="meta")
        built = nested_values(replace(weight, data=shape_alone).build())
        blocks = [(block.data.storage_offset(), block) for block in built]
    for start, block in blocks:
        assert block.prepend_axis_num == 0  # layers are stored under their own names (torch_dist.SHARDING)
        pipeline_copy, tensor_copy, _ = block.replica_id
        first, last = max(begin, start), min(begin + own.numel(), start + math.prod(block.local_shape))
        at = first - begin
        for offsets, sizes in rectangles(block.local_shape, first - start, last - start):
            count = math.prod(sizes)
            yield ShardedTensor(
                key,
                own[at : at + count].view(sizes),
                own.dtype,
                sizes,
                block.global_shape,
                tuple(map(sum, zip(block.global_offset, offsets, strict=True))),
                axis_fragmentations=None,  # no regular grid
                replica_id=(pipeline_copy, tensor_copy, 0),
            )
            at += count
