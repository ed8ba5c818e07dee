from __future__ import annotations

import math

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from ross_mcore.checkpoint.ranges import rectangles, sharded_range


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (3, 2, 2, 2)], ids=str)
def test_every_range_is_cut_into_few_rectangles_in_its_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    for begin in range(whole.numel() + 1):
        for end in range(begin, whole.numel() + 1):
            found = rectangles(shape, begin, end)
            assert len(found) <= max(1, 2 * len(shape) - 1)
            elements = [
                whole[tuple(slice(o, o + size) for o, size in zip(*one, strict=True))].flatten() for one in found
            ]
            assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *elements]), torch.arange(begin, end))


@pytest.mark.parametrize("gated", [False, True])
def test_ranges_of_all_ranks_fill_the_whole_tensor(gated: bool) -> None:
    """A matrix sharded by rows over two ranks, or gate and up projections, each sharded so; three ranks share each."""
    whole, filled = torch.full((12, 5), -1.0), 0
    for rank in range(2):
        shard = torch.arange(30).view(6, 5) + 100.0 * rank
        weight = ShardedTensor.from_rank_offsets("w", shard, (0, rank, 2), replica_id=(0, 0, 1))
        sharded = apply_swiglu_sharded_factory(weight, ()) if gated else weight
        for begin, end in ((0, 4), (4, 23), (23, 30)):
            for piece in sharded_range(sharded, "m", shard.view(-1)[begin:end], begin):
                assert piece.key == "m" and piece.replica_id == (0, 0, 0) and piece.global_shape == (12, 5)
                assert piece.data.untyped_storage().data_ptr() == shard.untyped_storage().data_ptr()
                whole[piece.global_slice()] = piece.data
                filled += piece.data.numel()
    first, second = torch.arange(30).view(6, 5), torch.arange(30).view(6, 5) + 100.0
    assert filled == 60
    assert torch.equal(whole, torch.cat([first[:3], second[:3], first[3:], second[3:]] if gated else [first, second]))
