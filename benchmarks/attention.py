"""Rotary embedding and attention of a packed row of 4,096 tokens, forward and backward, beside one call a sample.

    python benchmarks/attention.py

"one call a sample" is mcore's rotary embedding of packed rows (`thd`) and scaled_dot_product_attention of every sample
at its own length, as many shapes as there are lengths. Both ways take turns in one process; the ratio is of processor
time, the least of each row's turns.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from ross_mcore.models.attention import PackedSequence, RotaryAngles, SDPACoreAttention, packed_sequence, padded_length

TOKENS, HEADS, GROUPS, SIZE = 4096, 8, 2, 64
FREQUENCIES = 1e6 ** -(torch.arange(0, SIZE, 2) / SIZE)
TURNS = 8

Attend = Callable[[Tensor, Tensor, Tensor, PackedSequence], Tensor]


def packed_row(numbers: random.Random) -> list[int]:
    """Lengths of samples: 85% with a picture of 729 tokens, text of 20 to 2,000, most of 100 to 400."""
    row: list[int] = []
    while sum(row) < TOKENS:
        text = min(2000, int(numbers.lognormvariate(5.2, 0.8)) + 20)
        row.append(min(TOKENS - sum(row), text + 729 * (numbers.random() < 0.85)))
    return row


def ours(query: Tensor, key: Tensor, value: Tensor, packed: PackedSequence) -> Tensor:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    angles = RotaryAngles(FREQUENCIES)(packed.positions)  # once for all layers in a model
    query, key = (_apply_rotary_pos_emb_bshd(part, angles) for part in (query, key))
    return SDPACoreAttention(SimpleNamespace(), layer_number=1)(query, key, value, None, packed)


def one_call_a_sample(query: Tensor, key: Tensor, value: Tensor, packed: PackedSequence) -> Tensor:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

    angles = RotaryAngles(FREQUENCIES)(torch.arange(packed.max_seqlen_q))
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    query, key, value = (part.squeeze(1) for part in (query, key, value))
    query, key = (_apply_rotary_pos_emb_thd(part, packed.cu_seqlens_q, angles, cp_group=alone) for part in (query, key))
    found = []
    for parts in zip(*(part.split(packed.lengths) for part in (query, key, value))):
        q, k, v = (part[None].transpose(1, 2) for part in parts)
        found.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(found).flatten(1)[:, None]


def seconds(attend: Attend, row: Sequence[int]) -> float:
    parts = [torch.randn(TOKENS, 1, heads, SIZE, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)]
    packed = packed_sequence(row)
    began = time.thread_time()
    attend(*parts, packed).sum().backward()
    return time.thread_time() - began


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    numbers = random.Random(0)
    rows = [packed_row(numbers) for _ in range(3)]
    steps = [length for _ in range(100) for length in packed_row(numbers)]
    times: dict[Attend, list[list[float]]] = {}
    for _ in range(TURNS):
        for attend in (one_call_a_sample, ours):
            times.setdefault(attend, []).append([seconds(attend, row) for row in rows])
    plain, own = (sum(map(min, zip(*times[attend]))) for attend in (one_call_a_sample, ours))
    print(
        f"one call a sample {plain / len(rows) * 1e3:.0f} ms, ours {own / len(rows) * 1e3:.0f} ms: {plain / own:.3f} x"
    )
    print(f"shapes in 100 rows: {len(set(steps))} lengths, padded {len(set(map(padded_length, steps)))}")


if __name__ == "__main__":
    sys.exit(main())
